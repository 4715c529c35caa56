"""The linear op's matrix products, each in the form that torch runs fastest on the device; exact in all of them.

On a CPU three things cost more than the arithmetic: a row of logits that does not start at a cache line (a
quarter of the forward product at V = 30522), torch's 16-bit products where the processor has no instructions for
them (tens of times slower than float32), and rows or columns that carry nothing. Hence padded rows, products over
blocks of the vocabulary, tiles converted to float32, and selections. N rows, V vocabulary, D hidden.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rd_kernels.backends.interface import Backend

__all__ = [
    "Selection",
    "add_tiled",
    "add_whole",
    "converts",
    "leading_dimension",
    "logits_into",
    "masses",
]

CACHE_LINE = 64  # bytes
# Of the logits at a time, measured: they and their share of the weight stay in the cache.
FORWARD_COLUMNS = 1024

# A tile of U in float32 takes 8 MiB: large enough for the products' full speed, whatever N and V are.
TILE_ROWS = 1024
TILE_COLUMNS = 2048


def leading_dimension(vocabulary: int, itemsize: int) -> int:
    """Elements from one row of logits to the next, so that every row starts at a cache line.

    Short rows are left as they are: the padding would be a large part of them.
    """
    if vocabulary * itemsize < 64 * CACHE_LINE:
        return vocabulary
    step = CACHE_LINE // itemsize
    return (vocabulary + step - 1) // step * step


@functools.lru_cache(maxsize=64)
def converts(device_type: str, dtype: torch.dtype) -> bool:
    """Whether products of this dtype are computed on float32 copies of tiles.

    Products of two 16-bit floats are exact in float32 and the sums are rounded once, at the end: at least as
    accurate as the 16-bit product.
    """
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is None or not supported()


def logits_into(
    out: Tensor,  # [N, V], unit stride along V
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
) -> Tensor:
    """``out = hidden @ weight.T + bias``."""
    if hidden.device.type != "cpu":
        return _affine(hidden, weight, bias, out)
    if not converts("cpu", hidden.dtype):
        for columns in _blocks(weight.shape[0], FORWARD_COLUMNS):
            _affine(hidden, weight[columns], None if bias is None else bias[columns], out[:, columns])
        return out
    workspace = Workspace()
    for columns in _blocks(weight.shape[0], TILE_COLUMNS):
        weight_block = workspace.get("weight", weight[columns].shape, torch.float32).copy_(weight[columns])
        bias_block = None if bias is None else bias[columns].float()
        for rows in _blocks(hidden.shape[0], TILE_ROWS):
            place = out[rows, columns]
            product = workspace.get("product", place.shape, torch.float32)
            place.copy_(_affine(hidden[rows].float(), weight_block, bias_block, product))
    return out


class Workspace:
    """Memory that is used again for every tile: allocated anew, a tile costs more in page faults than its copy."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """[*shape], holding anything; what ``name`` was used for before is lost. One dtype for each name."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=dtype)
        return self._buffers[name][:size].view(shape)


@dataclass(frozen=True)
class Selection:
    """The rows and columns of U that take part in the gradients: ascending indices, or None for all."""

    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def everything(self) -> bool:
        return self.rows is None and self.columns is None

    def column_blocks(self, vocabulary: int) -> Iterator[slice | Tensor]:
        """The chosen part of the vocabulary, in blocks: slices of it, or lists of entries."""
        total = vocabulary if self.columns is None else len(self.columns)
        for block in _blocks(total, TILE_COLUMNS):
            yield block if self.columns is None else self.columns[block]

    def tiles(
        self,
        unweighted: Tensor,  # [N, V]
        columns: slice | Tensor,
        dtype: torch.dtype,
        workspace: Workspace,
    ) -> Iterator[tuple[slice, Tensor]]:
        """-> which of the chosen rows, and U there in these columns, in ``dtype``; valid until the next one."""
        done = 0
        for block in _blocks(unweighted.shape[0], TILE_ROWS):
            tile = unweighted[block]
            if isinstance(columns, slice):
                tile = tile[:, columns]
            else:  # several times faster than indexing
                index = columns.expand(tile.shape[0], -1)
                tile = torch.gather(tile, 1, index, out=workspace.get("columns", index.shape, tile.dtype))
            if self.rows is not None:
                inside = self.rows[(self.rows >= block.start) & (self.rows < block.stop)] - block.start
                out = workspace.get("rows", (len(inside), tile.shape[1]), tile.dtype)
                tile = torch.index_select(tile, 0, inside, out=out)
            if tile.dtype != dtype:
                tile = workspace.get("converted", tile.shape, dtype).copy_(tile)
            yield slice(done, done + tile.shape[0]), tile
            done += tile.shape[0]


def add_whole(
    backend: Backend,
    unweighted: Tensor,  # [N, V]
    hidden: Tensor,  # [N, D]
    scale: Tensor,  # [N] acc
    weight: Tensor,  # [V, D]
    grad_hidden: Tensor | None,  # [N, D], overwritten
    grad_weight: Tensor | None,  # [V, D], the first time overwritten, then added to
    grad_bias: Tensor | None,  # [V] acc, added to
    first: bool,
) -> None:
    """The gradients' products as one GEMM each, in hidden's dtype. 0 for rows of scale 0 if U is finite there."""
    if grad_hidden is not None:
        # Scale 0 wins over a weight matrix with NaN or infinity.
        torch.mm(unweighted, weight, out=grad_hidden)
        backend.scale_rows(grad_hidden, scale, out=grad_hidden)
    if grad_weight is not None:
        weighted = backend.scale_rows(hidden, scale, out=hidden.new_empty(hidden.shape))
        if grad_weight.dtype != hidden.dtype:
            share = unweighted.t() @ weighted
            grad_weight.copy_(share) if first else grad_weight.add_(share)
        elif first:
            torch.mm(unweighted.t(), weighted, out=grad_weight)
        else:
            grad_weight.addmm_(unweighted.t(), weighted)
    if grad_bias is not None:
        backend.add_column_sums(unweighted, scale, grad_bias)


def add_tiled(
    selection: Selection,
    unweighted: Tensor,  # [N, V]
    hidden: Tensor,  # [N, D]
    scale: Tensor,  # [N] acc
    weight: Tensor,  # [V, D]
    grad_hidden: Tensor | None,  # [N, D], overwritten
    grad_weight: Tensor | None,  # [V, D], the first time overwritten, then added to
    grad_bias: Tensor | None,  # [V] acc, added to
    first: bool,
) -> None:
    """The same from tiles of U's chosen part, in acc.

    What is not chosen contributes nothing; only the bias's gradient, which costs no GEMM, leaves out no column
    and only rows of scale 0.
    """
    acc = scale.dtype
    rows = selection.rows
    if grad_bias is not None:
        used = None if rows is None else (scale != 0).nonzero()[:, 0]
        grad_bias.add_(_column_sums(Selection(used), unweighted, scale))
    if rows is not None:
        hidden, scale = hidden.index_select(0, rows), scale.index_select(0, rows)
    column = scale[:, None]
    weighted = _weighted(hidden, column)
    hidden_sum = torch.zeros(hidden.shape if grad_hidden is not None else (0,), dtype=acc)
    if grad_weight is not None and first and selection.columns is not None:
        left_out = torch.ones(len(grad_weight), dtype=torch.bool).index_fill_(0, selection.columns, False)
        grad_weight.index_fill_(0, left_out.nonzero()[:, 0], 0)
    workspace = Workspace()
    for columns in selection.column_blocks(unweighted.shape[1]):
        weight_block = _rows_of(weight, columns, acc, workspace)
        weight_sum = workspace.get("weight_sum", weight_block.shape, acc)
        for part, tile in selection.tiles(unweighted, columns, acc, workspace):
            if grad_hidden is not None:
                hidden_sum[part].addmm_(tile, weight_block)
            if grad_weight is not None:
                torch.addmm(
                    weight_sum, tile.t(), weighted[part], beta=0 if part.start == 0 else 1, out=weight_sum
                )
        if grad_weight is None:
            continue
        if isinstance(columns, slice):
            place = grad_weight[columns]
            place.copy_(weight_sum) if first else place.add_(weight_sum)
        elif first:
            grad_weight.index_copy_(0, columns, weight_sum.to(grad_weight.dtype))
        else:
            grad_weight.index_add_(0, columns, weight_sum)
    if grad_hidden is not None:
        hidden_sum.mul_(column).masked_fill_(column == 0, 0)
        if rows is None:
            grad_hidden.copy_(hidden_sum)
        else:
            grad_hidden.zero_().index_copy_(0, rows, hidden_sum.to(grad_hidden.dtype))


def masses(
    selection: Selection,  # of rows only
    unweighted: Tensor,  # [N, V]
    labels: Tensor,  # [N], any of [0, V) where a row does not count
    scale: Tensor,  # [N] acc
) -> tuple[Tensor, Tensor]:
    """-> sum_j |scale_i U_ij| by chosen row, and sum_i |scale_i U_ij| by column over the chosen rows, in acc.

    From U's signed sums, without a copy of |U|: only the entry at the label is negative.
    """
    scale = scale.abs()
    row_sums = torch.zeros_like(scale) if selection.rows is None else scale.new_zeros(len(selection.rows))
    column_sums = _column_sums(selection, unweighted, scale, row_sums)
    at_label = -unweighted.gather(1, labels[:, None])[:, 0].to(scale.dtype)
    if selection.rows is not None:
        at_label, labels, scale = (t.index_select(0, selection.rows) for t in (at_label, labels, scale))
    twice = 2 * at_label.clamp_(min=0)
    return (row_sums + twice) * scale, column_sums.index_add_(0, labels, twice * scale)


def _column_sums(
    selection: Selection,  # of rows only
    unweighted: Tensor,  # [N, V]
    scale: Tensor,  # [N] acc
    row_sums: Tensor | None = None,  # of the chosen rows, in acc: sum_j U_ij is added
) -> Tensor:
    """sum_i scale_i U_ij over the chosen rows, in acc [V]."""
    if selection.rows is not None:
        scale = scale.index_select(0, selection.rows)
    sums = torch.zeros(unweighted.shape[1], dtype=scale.dtype)
    workspace = Workspace()
    for columns in selection.column_blocks(unweighted.shape[1]):
        for part, tile in selection.tiles(unweighted, columns, scale.dtype, workspace):
            sums[columns] += torch.mv(tile.t(), scale[part])
            if row_sums is not None:
                row_sums[part] += tile.sum(dim=1)
    return sums


def _weighted(hidden: Tensor, scale: Tensor) -> Tensor:
    """In acc; 0 where scale [N, 1] is, whatever the hidden state."""
    return torch.where(scale == 0, 0, hidden * scale)


def _rows_of(weight: Tensor, chosen: slice | Tensor, dtype: torch.dtype, workspace: Workspace) -> Tensor:
    """weight[chosen] in ``dtype``."""
    if isinstance(chosen, slice):
        part = weight[chosen]
    else:
        out = workspace.get("weight_rows", (len(chosen), weight.shape[1]), weight.dtype)
        part = torch.index_select(weight, 0, chosen, out=out)
    return part if part.dtype == dtype else workspace.get("weight", part.shape, dtype).copy_(part)


def _affine(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def _blocks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
