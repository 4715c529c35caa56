"""Between the group reduction and the objective stands one all-reduce of the sums and counts.

With it every rank computes the same coefficients from global statistics and the same new q.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rd_kernels import ops

__all__ = ["reduce_and_update", "world_size"]


def world_size(process_group: Any) -> int | None:
    """The size of ``process_group``; None for a single process.

    Raises RuntimeError for several ranks without a process group: each would drift to group weights of its own.
    """
    if process_group is not None:
        return torch.distributed.get_world_size(process_group)
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise RuntimeError(
            "several ranks need process_group (for instance torch.distributed.group.WORLD): "
            "without it each rank would train with its own group weights"
        )
    return None


def reduce_and_update(
    row_loss: Tensor,  # [N] acc
    outcome: Tensor,  # [N] uint8
    groups: Tensor,  # [N] ids or [N, G] mask
    q: Tensor,  # [G] float32, updated in place
    rule: tuple[str, float, Tensor | None],
    num_classes: int,
    process_group: Any,
    ranks: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps 2 and 3 over all ranks -> ``loss``, ``stats``, ``status``, ``row_scale``.

    The loss and the row scales are those of the joined batch times ``ranks``: DDP divides the gradients by
    the number of ranks.
    """
    stats, status = ops.group_reduce(row_loss, outcome, groups, num_classes, q.shape[0], backend)
    # One message: the few counts of bad input travel with the sums.
    message = torch.cat([stats[:3].reshape(-1), status.to(stats.dtype)])
    torch.distributed.all_reduce(message, group=process_group)
    stats = torch.cat([message[:-2].reshape(3, -1), stats[3:]])
    status = message[-2:].to(torch.int64)
    loss, coefficients = ops.group_update(stats, status, q, *rule, backend)
    scale = ops.row_scale(coefficients, outcome, groups, backend)
    # The value is the joined batch's on every rank; its gradient is this rank's share times `ranks`.
    return loss, stats, status, scale * ranks
