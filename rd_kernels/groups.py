"""Inputs as users have them -> the canonical form that backends take, with named errors.

Shapes and dtypes are checked here, on the host, from metadata alone. Values (labels, group ids) are checked
by the kernels, which see them anyway: see :func:`rd_kernels.ops.raise_if_bad`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["canonical_groups", "canonical_labels", "check_same_device", "membership"]

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


def canonical_groups(
    groups: Tensor, leading: torch.Size, num_groups: int, pack: Callable[[Tensor], Tensor]
) -> Tensor:
    """Group membership -> what the backends take, contiguous: int64 ids [N] or lists of them [N, K], or a bool mask as
    int32 words of bits [N, W], W = num_groups / 32 rounded up, which ``pack`` makes of [M, G] (Backend.pack_mask).

    ``groups`` is one of: ids of the labels' shape ``leading``, or [B] with B = leading[0], one a sequence; lists of K
    ids [*leading, K], or [B, 1, K] for all tokens of a sequence; a bool mask [*leading, G], or [B, G]. Id -1: no group.

    Raises: TypeError for a dtype that is neither integer nor bool, ValueError for another shape.
    """
    rows, given, deep = leading.numel(), groups.shape, len(leading) > 1
    ones = [1] * (len(leading) - 1)
    per_sequence = deep and given[:1] == leading[:1]
    if groups.dtype == torch.bool:
        if given == (*leading, num_groups):
            return pack(groups.reshape(rows, num_groups).contiguous())
        if per_sequence and given[1:] == (num_groups,):
            words = pack(groups.contiguous())
            per_token = words.reshape(leading[0], *ones, words.shape[1]).expand(*leading, words.shape[1])
            return per_token.reshape(rows, words.shape[1]).contiguous()
        allowed = [[*leading, num_groups]] + ([[leading[0], num_groups]] if deep else [])
        raise ValueError(
            f"groups, a bool mask, must have shape {' or '.join(map(str, allowed))}, got {list(given)}"
        )
    if groups.dtype not in _INTEGER_DTYPES:
        raise TypeError(f"groups must be integer ids or a bool mask, got {groups.dtype}")
    if given == leading:
        return _flat_int64(groups)
    if per_sequence and groups.dim() == 1:
        return _flat_int64(groups.reshape(leading[0], *ones).expand(leading))
    of_rows = given[:-1] == leading or (per_sequence and list(given[1:-1]) == ones)
    if groups.dim() == len(leading) + 1 and given[-1] > 0 and of_rows:
        return groups.expand(*leading, given[-1]).reshape(rows, given[-1]).to(torch.int64).contiguous()
    allowed = [list(leading)] + ([[leading[0]]] if deep else []) + [[*leading, "K"]]
    allowed += [[leading[0], *ones, "K"]] if deep else []
    raise ValueError(
        f"groups, ids, must have shape {' or '.join(str(shape).replace(chr(39), '') for shape in allowed)}, "
        f"got {list(given)}"
    )


def membership(groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """What ``canonical_groups`` returns -> who is in which group [N, G]; whose ids are all in [-1, G) [N]. Both bool."""
    group = torch.arange(num_groups, device=groups.device)
    if groups.dtype == torch.int32:
        member = (groups[:, group // 32] >> (group % 32).to(torch.int32)) & 1 == 1
        return member, torch.ones(groups.shape[0], dtype=torch.bool, device=groups.device)
    lists = groups[:, None] if groups.dim() == 1 else groups
    member = torch.zeros((groups.shape[0], num_groups), dtype=torch.bool, device=groups.device)
    for ids in lists.unbind(1):
        member = member | (ids[:, None] == group)
    return member, ((lists >= -1) & (lists < num_groups)).all(dim=1)


def _flat_int64(values: Tensor) -> Tensor:
    # Most often they are that already, and three calls of torch are dear beside a small batch.
    if values.dim() == 1 and values.dtype == torch.int64 and values.is_contiguous():
        return values
    return values.reshape(-1).to(torch.int64).contiguous()
