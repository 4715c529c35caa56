"""What several ranks exchange between the row pass and the objective, so that all compute the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["SAME_BATCH", "add_up", "join", "world_size"]

#: In place of a process group: all ranks have the same batch, so there is nothing to exchange.
SAME_BATCH = "same batch"


def world_size(process_group: Any) -> int | None:
    """The size of ``process_group``; None for a single process.

    Raises RuntimeError for several ranks without a process group: each would drift to group weights of its own.
    """
    if process_group is SAME_BATCH:
        return None
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


def add_up(tensors: list[Tensor], process_group: Any) -> list[Tensor]:
    """The sums over all ranks, in one message and in float64, where a count is exact; shapes and dtypes stay."""
    message = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
    torch.distributed.all_reduce(message, group=process_group)
    parts = message.split([tensor.numel() for tensor in tensors])
    return [part.reshape(each.shape).to(each.dtype) for part, each in zip(parts, tensors, strict=True)]


def join(columns: Tensor, process_group: Any) -> tuple[Tensor, slice]:
    """Columns [K, N_r] of each rank r -> those of all [K, sum of N_r], rank after rank; and which are one's own.

    The ranks' numbers of columns are read on the host: this waits for the device.
    """
    rank = torch.distributed.get_rank(process_group)
    ranks = torch.distributed.get_world_size(process_group)
    own = torch.tensor([columns.shape[1]], device=columns.device)
    sizes = [torch.empty_like(own) for _ in range(ranks)]
    torch.distributed.all_gather(sizes, own, group=process_group)
    widths = torch.cat(sizes).tolist()
    if not any(widths):
        return columns, slice(0, 0)
    padded = columns.new_zeros((columns.shape[0], max(widths)))
    padded[:, : columns.shape[1]] = columns
    gathered = [torch.empty_like(padded) for _ in range(ranks)]
    torch.distributed.all_gather(gathered, padded, group=process_group)
    joined = torch.cat([part[:, :width] for part, width in zip(gathered, widths, strict=True)], dim=1)
    start = sum(widths[:rank])
    return joined, slice(start, start + widths[rank])
