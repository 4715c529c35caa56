"""Inputs as users have them -> the canonical form that backends take, with named errors.

Shapes and dtypes are checked here, on the host, from metadata alone. Values (labels, group ids) are checked
by the kernels, which see them anyway: see :func:`rd_kernels.ops.raise_if_bad`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["canonical_groups", "canonical_labels", "check_same_device"]

_INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_same_device(reference: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Raise ValueError naming the first tensor that is not on ``device``."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but {reference} is on {device}")


def canonical_labels(labels: Tensor, leading: torch.Size, argument: str = "labels") -> Tensor:
    """``labels`` of shape ``leading`` -> int64 [N], contiguous.

    Raises: TypeError for a dtype that holds no class index, ValueError for another shape.
    """
    if labels.dtype not in _INTEGER_DTYPES:
        raise TypeError(f"{argument} must hold class indices of an integer dtype, got {labels.dtype}")
    if labels.shape != leading:
        raise ValueError(
            f"{argument} must have shape {list(leading)} to match the rows, got {list(labels.shape)}"
        )
    return _flat_int64(labels)


def canonical_groups(groups: Tensor, leading: torch.Size, num_groups: int) -> Tensor:
    """Group membership -> int64 ids [N] or a bool mask [N, G], contiguous.

    ``groups`` is one of: ids of the labels' shape ``leading``; ids [B] with B = leading[0], one a sequence;
    a bool mask [*leading, G] or [B, G] for groups that overlap. Id -1: in no group.

    Raises: TypeError for a dtype that is neither integer nor bool, ValueError for another shape.
    """
    rows = leading.numel()
    if groups.dtype == torch.bool:
        if groups.shape == (*leading, num_groups):
            return groups.reshape(rows, num_groups).contiguous()
        if len(leading) > 1 and groups.shape == (leading[0], num_groups):
            per_token = groups.reshape(leading[0], *[1] * (len(leading) - 1), num_groups)
            return per_token.expand(*leading, num_groups).reshape(rows, num_groups).contiguous()
        allowed = [[*leading, num_groups]] + ([[leading[0], num_groups]] if len(leading) > 1 else [])
        raise ValueError(
            f"groups, a bool mask, must have shape {' or '.join(map(str, allowed))}, got {list(groups.shape)}"
        )
    if groups.dtype not in _INTEGER_DTYPES:
        raise TypeError(f"groups must be integer ids or a bool mask, got {groups.dtype}")
    if groups.shape == leading:
        return _flat_int64(groups)
    if len(leading) > 1 and groups.shape == (leading[0],):
        per_token = groups.reshape(leading[0], *[1] * (len(leading) - 1)).expand(leading)
        return _flat_int64(per_token)
    allowed = [list(leading)] + ([[leading[0]]] if len(leading) > 1 else [])
    raise ValueError(
        f"groups, ids, must have shape {' or '.join(map(str, allowed))}, got {list(groups.shape)}"
    )


def _flat_int64(values: Tensor) -> Tensor:
    # Most often they are that already, and three calls of torch are dear beside a small batch.
    if values.dim() == 1 and values.dtype == torch.int64 and values.is_contiguous():
        return values
    return values.reshape(-1).to(torch.int64).contiguous()
