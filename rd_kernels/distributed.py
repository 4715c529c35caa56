"""Group reduction and objective as separate steps: what several ranks and objectives written in Python need.

Between the two stands, on several ranks, one all-reduce of the sums and counts: with it every rank computes the same
coefficients from global statistics and the same new q.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rd_kernels import ops
from rd_kernels.objectives import Objective

__all__ = ["group_update", "reduce_and_update", "world_size"]


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
    objective: Objective,
    adjustment: Tensor | None,  # [G]
    num_classes: int,
    process_group: Any,
    ranks: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps 2 and 3 over all ranks -> ``loss``, ``stats``, ``status``, ``row_scale``.

    On several ranks the loss is that of the joined batch, and the row scales are its own times ``ranks``, because DDP
    divides the gradients by the number of ranks.
    """
    stats, status = ops.group_reduce(row_loss, outcome, groups, num_classes, q.shape[0], backend)
    if ranks is not None:
        # One message: the few counts of bad input travel with the sums.
        message = torch.cat([stats[:3].reshape(-1), status.to(stats.dtype)])
        torch.distributed.all_reduce(message, group=process_group)
        stats = torch.cat([message[:-2].reshape(3, -1), stats[3:]])
        status = message[-2:].to(torch.int64)
    loss, coefficients = group_update(stats, status, q, objective, adjustment, backend)
    scale = ops.row_scale(coefficients, outcome, groups, backend)
    return loss, stats, status, scale if ranks is None else scale * ranks


def group_update(
    stats: Tensor,  # [4, G+2] acc, its row 3 is written
    status: Tensor,  # [2]
    q: Tensor,  # [G] float32, updated in place
    objective: Objective,
    adjustment: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Step 3 -> ``loss`` [], ``coefficients`` [G]: by the backend where it has the rule, else by the objective itself.

    As there: a bad batch (``status``) has loss NaN and coefficients 0, and leaves q as it is.
    """
    if objective.rule is not None:
        return ops.group_update(stats, status, q, objective.rule, objective.rate, adjustment, backend)
    num_groups = q.shape[0]
    sums, counts = stats[0, :num_groups], stats[1, :num_groups]
    coefficients, new_q, weights = objective.update(sums.double(), counts.double(), q.double())
    for name, result in (("coefficients", coefficients), ("q", new_q), ("weights", weights)):
        if result.shape != q.shape:
            raise ValueError(
                f"{type(objective).__name__}.update must return {name} [{num_groups}], got {list(result.shape)}"
            )
    valid = (status == 0).all()
    coefficients = torch.where(valid & (counts > 0), coefficients.to(stats.dtype), 0)
    stats[3, :num_groups] = torch.where(valid, weights.to(stats.dtype), 0)
    stats[3, num_groups] = 0
    stats[3, num_groups + 1] = stats[3, :num_groups].sum()
    q.copy_(torch.where(valid & torch.isfinite(new_q).all(), new_q.to(q.dtype), q))
    parts = torch.where(counts > 0, coefficients * sums, 0)
    return torch.where(valid, parts.sum(), torch.nan), coefficients
