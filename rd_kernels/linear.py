"""The linear op: logits = hidden @ weight.T + bias, never kept as logits; GEMMs by torch.

Row scaling commutes out of the gradient GEMMs. With U = softmax - onehot (unweighted) and r the row
weights, known only after the whole batch was reduced,

    d hidden = diag(r) (U W),   d weight = U^T (diag(r) H),   d bias = U^T r.

So the forward stores U once, before r is known, and the weights are folded in late: exact for any row
weights, 3 GEMMs, nothing recomputed. Where the memory budget holds only a fraction f of the rows, the
others' logits are computed again in the backward: 4 - f GEMMs. N rows, V vocabulary, D hidden.

On a CPU the two gradient GEMMs leave out the rows whose weight is 0, which changes nothing, and with
``filter_eps`` the lightest rows and vocabulary entries, within a bound (``select``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rd_kernels import gemm
from rd_kernels.backends.interface import Backend

__all__ = [
    "Layout",
    "Stored",
    "backward",
    "default_memory_budget",
    "forward",
    "mean_logit_order",
    "plan",
    "select",
]

# Working on a part of U costs a copy of it, and of the weight if columns are chosen; the whole is faster where less
# is left out than this share of the rows, or of the products: measured at N = 154 and 1024, D = 384 and 768.
_COPY_OF_ROWS = 0.15
_COPY_OF_COLUMNS = 0.2
_COPY_OF_WEIGHT = 48  # rows whose products cost as much


def default_memory_budget(device: torch.device) -> int:
    """Bytes: 1 GiB on a CPU; an eighth of a GPU's memory and at least 1 GiB."""
    least = 1 << 30
    if device.type != "cuda":
        return least
    return max(least, torch.cuda.get_device_properties(device).total_memory // 8)


# What torch.compiler.assume_constant_result does; that imports torch._dynamo, which takes seconds and triton.
default_memory_budget._dynamo_marked_constant = True  # type: ignore[attr-defined]


def plan(rows: int, vocabulary: int, width: int, itemsize: int, memory_budget: int) -> tuple[int, int]:
    """How many rows to store and how many to work on at a time, within ``memory_budget`` bytes.

    The budget covers what grows with the rows: a row's logits (or U), and its weighted hidden state in the
    backward with float32 intermediates. It does not cover the gradients; while several blocks are summed, a
    16-bit weight gradient is held twice, in float32 and as the block's share. Nor does it cover the fixed
    working space of products on tiles: one of 8 MiB, and twice 2048 rows of the weight in float32.
    Raises ValueError if the budget holds not even one row.
    """
    row_bytes = gemm.leading_dimension(vocabulary, itemsize) * itemsize + width * (
        itemsize + 2 * max(itemsize, 4)
    )
    affordable = memory_budget // row_bytes
    if affordable < 1:
        raise ValueError(f"memory_budget is {memory_budget} bytes, but a single row needs {row_bytes}")
    if affordable >= rows:
        return rows, max(rows, 1)
    # GEMMs on fewer than a few hundred rows are slow, so the working block comes before the store.
    block = min(affordable, max(256, affordable // 4))
    return affordable - block, block


@dataclass(frozen=True)
class Layout:
    """Which rows are kept how. All but the first ``capacity``, which are the labelled ones, are overflow."""

    capacity: int  # rows with a place in a buffer: all N without compaction
    stored: int  # of these, the first, are kept until the backward
    block: int  # of the others are computed at a time, twice
    fused: bool = False  # the product leaves scaled exponentials (Backend.exponentials), not logits


class Stored(NamedTuple):
    """What the forward leaves for the backward of the first rows, beside their results."""

    unweighted: Tensor  # [stored_rows, Vp], its rows gemm.leading_dimension elements apart
    factor: Tensor  # [stored_rows] acc: U = diag(factor) unweighted; [0] where every factor is 1
    tile_sums: Tensor  # [T, stored_rows] acc, sums of unweighted by tile; [0, 0] where they are not at hand


def forward(
    backend: Backend,
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [Vp, D]; rows from V on are padding, all zeros
    bias: Tensor | None,  # [Vp]
    labels: Tensor,  # [N]
    index: Tensor | None,  # [N] compact's
    num_classes: int,  # V
    ignore_index: int,
    layout: Layout,
    details: Tensor | None = None,  # [2, N] acc, Backend.row_forward's
) -> tuple[Tensor, Tensor, Tensor, Stored]:
    """-> ``row_loss`` [N], ``normaliser`` [2, N], ``outcome`` [N], and what is stored.

    With ``index`` row i of the results and of ``labels`` belongs to hidden[index[i]], -1: to none. ``details`` are
    written; not together with ``index`` or a fused product.
    """

    def details_of(block: slice) -> Tensor | None:
        return None if details is None else details[:, block]

    rows = hidden if index is None else backend.gather_rows(hidden, index[: layout.capacity])
    stored = layout.stored
    unweighted = _empty_rows(backend, rows, stored, weight.shape[0])
    factor = tile_sums = None
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.autocast(hidden.device.type, enabled=False):  # the caller chose the dtypes
        if layout.fused:
            row_loss, normaliser, outcome, factor, tile_sums = backend.exponentials(
                rows[:stored], weight, bias, labels[:stored], ignore_index, num_classes, unweighted
            )
            parts.append((row_loss, normaliser, outcome))
        else:
            gemm.logits_into(unweighted, rows[:stored], weight, bias)
            logits = unweighted[:, :num_classes]
            parts.append(
                backend.softmax_minus_onehot_(
                    logits, labels[:stored], ignore_index, details_of(slice(0, stored))
                )
            )
        for block, logits, _ in _recomputed(backend, rows, weight, bias, num_classes, layout):
            parts.append(
                backend.row_forward(logits, labels[block], None, 0.0, ignore_index, details_of(block))
            )
        if index is not None:
            beyond = slice(layout.capacity, None)
            parts.append(
                backend.overflow_forward(
                    hidden, weight[:num_classes], _first(bias, num_classes), labels[beyond], ignore_index,
                    index[beyond],
                )
            )  # fmt: skip
    row_loss, normaliser, outcome = (
        columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)
        for columns in zip(*parts, strict=True)
    )
    if factor is None or tile_sums is None:
        factor, tile_sums = row_loss.new_empty(0), row_loss.new_empty((0, 0))
    return row_loss, normaliser, outcome, Stored(unweighted, factor, tile_sums)


def backward(
    backend: Backend,
    grad_out: Tensor,  # [] acc
    row_scale: Tensor,  # [N] acc
    stored: Stored,
    normaliser: Tensor,  # [2, N] acc
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [Vp, D]
    bias: Tensor | None,  # [Vp]
    labels: Tensor,  # [N]
    index: Tensor | None,  # [N]
    position: Tensor | None,  # [N] compact's
    num_classes: int,  # V
    ignore_index: int,
    layout: Layout,
    needs: list[bool],
    filter_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of hidden, weight, bias in hidden's dtype; an empty tensor where not needed."""
    rows = hidden if index is None else backend.gather_rows(hidden, index[: layout.capacity])
    scale = row_scale * grad_out  # [N]
    # One block: its GEMM writes the result. Several: they are added up in acc, so that bf16 is rounded once.
    several = layout.stored < layout.capacity
    total_dtype = normaliser.dtype if several else hidden.dtype
    grad_rows = rows.new_empty(rows.shape) if needs[0] else None
    grad_weight = backend.empty(weight.shape, total_dtype, weight.device) if needs[1] else None
    grad_bias = scale.new_zeros(weight.shape[0]) if needs[2] else None
    if layout.capacity == 0 and grad_weight is not None:
        grad_weight.zero_()

    def accumulate(block: slice, unweighted: Tensor, block_scale: Tensor) -> None:
        selection = gemm.Selection()
        if hidden.device.type == "cpu" and not backend.on_gpu:  # a choice by values would wait for a GPU
            selection = select(
                unweighted, labels[block], block_scale, normaliser[1, block], ignore_index, filter_eps
            )
        arguments = (
            unweighted, rows[block], block_scale, weight,
            None if grad_rows is None else grad_rows[block], grad_weight, grad_bias, block.start == 0,
        )  # fmt: skip
        if selection.everything and not gemm.converts(hidden.device.type, hidden.dtype):
            gemm.add_whole(backend, *arguments)
        else:
            gemm.add_tiled(selection, *arguments)

    with torch.autocast(hidden.device.type, enabled=False):
        if layout.stored:
            block, kept_scale = slice(0, layout.stored), scale[: layout.stored]
            if layout.fused:  # a weight of 0 wins over a factor of NaN
                kept_scale = torch.where(kept_scale == 0, 0, kept_scale * stored.factor)
            if layout.fused and filter_eps > 0:
                grad_some, grad_weight_some = backend.filtered_gradients(
                    stored.unweighted, stored.tile_sums, labels[block], kept_scale, rows[block], weight, filter_eps,
                    (needs[0], needs[1]),
                )  # fmt: skip
                if grad_rows is not None and grad_some is not None:
                    grad_rows[block] = grad_some
                if grad_weight is not None and grad_weight_some is not None:
                    grad_weight = grad_weight_some.to(total_dtype)
                if grad_bias is not None:
                    backend.add_column_sums(stored.unweighted, kept_scale, grad_bias)
            else:
                accumulate(block, stored.unweighted, kept_scale)
        for block, logits, whole in _recomputed(backend, rows, weight, bias, num_classes, layout):
            backend.row_backward(
                None, None, logits, labels[block], normaliser[:, block], None, 0.0, ignore_index, out=logits
            )
            accumulate(block, whole, scale[block])
        grad_hidden = grad_rows
        if index is not None and position is not None:
            if grad_rows is not None:
                grad_hidden = backend.gather_rows(grad_rows, position)
            beyond = slice(layout.capacity, None)
            backend.overflow_backward(
                scale[beyond], hidden, weight[:num_classes], _first(bias, num_classes), labels[beyond],
                normaliser[:, beyond], ignore_index, index[beyond], grad_hidden,
                _first(grad_weight, num_classes), _first(grad_bias, num_classes),
            )  # fmt: skip
    return tuple(
        hidden.new_empty(0) if total is None else total.to(hidden.dtype)
        for total in (grad_hidden, grad_weight, grad_bias)
    )  # type: ignore[return-value]


def _recomputed(
    backend: Backend,
    rows: Tensor,  # [capacity, D]
    weight: Tensor,  # [Vp, D]
    bias: Tensor | None,  # [Vp]
    num_classes: int,
    layout: Layout,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The rows that are not stored, block by block -> which; their logits [block, V]; the memory around these
    [block, Vp], zeros in the padding. Valid until the next block."""
    size = min(layout.block, layout.capacity - layout.stored)
    buffer = _empty_rows(backend, rows, size, weight.shape[0])
    for start in range(layout.stored, layout.capacity, layout.block):
        block = slice(start, min(start + layout.block, layout.capacity))
        whole = gemm.logits_into(buffer[: block.stop - start], rows[block], weight, bias)
        yield block, whole[:, :num_classes], whole


def _first(tensor: Tensor | None, count: int) -> Tensor | None:
    return None if tensor is None else tensor[:count]


def mean_logit_order(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """-> [V] int64: the vocabulary by its mean logit over ``hidden`` [N, D], the largest first.

    In this order entries that are light for all rows share tiles. The mean of products with ``weight`` [V, D] is the
    product with the mean: no GEMM.
    """
    mean = torch.mv(weight, hidden.mean(0, dtype=torch.float32).to(weight.dtype)).float()
    return (mean if bias is None else mean + bias.detach()).argsort(descending=True, stable=True)


def select(
    unweighted: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    scale: Tensor,  # [N] acc
    log_sum: Tensor,  # [N] acc, NaN where U is
    ignore_index: int,
    filter_eps: float,
) -> gemm.Selection:
    """The part of U that the gradients are computed from. CPU only: the choice reads values.

    Rows of weight 0 are left out where they are many, or where their U is NaN, which times 0 is not 0.

    With ``filter_eps`` > 0 rows and columns are left out, the lightest first, whose entries together weigh at
    most ``filter_eps`` C, where an entry weighs |scale_i U_ij| and C is the weight of all. So the errors' norms
    add up to at most filter_eps C max_j |W_j| over the rows of d hidden, filter_eps C max_i |H_i| over the rows
    of d weight. Up to half of it goes to rows, what that leaves to columns. Weights that are not finite: nothing
    is left out.
    """
    rows, vocabulary = unweighted.shape
    used = scale != 0
    selection = gemm.Selection()
    unused = rows - int(used.sum())
    if unused and (unused >= _COPY_OF_ROWS * rows or bool((~used & ~torch.isfinite(log_sum)).any())):
        selection = gemm.Selection(rows=used.nonzero()[:, 0])
    if filter_eps == 0.0 or unused == rows:
        return selection
    labels = torch.where(labels == ignore_index, 0, labels)
    row_mass, column_mass = gemm.masses(selection, unweighted, labels, scale)
    allowed = filter_eps * float(row_mass.sum(dtype=torch.float64))
    if not math.isfinite(allowed):
        return selection
    heavy_rows, left_out = _heaviest(row_mass, allowed / 2)
    heavy_columns, _ = _heaviest(column_mass, allowed - left_out)
    saved = 1 - len(heavy_rows) * len(heavy_columns) / (len(row_mass) * vocabulary)
    if saved <= _COPY_OF_COLUMNS + _COPY_OF_WEIGHT / len(row_mass):
        return selection
    kept = heavy_rows if selection.rows is None else selection.rows[heavy_rows]
    return gemm.Selection(
        None if len(kept) == rows else kept, None if len(heavy_columns) == vocabulary else heavy_columns
    )


def _heaviest(mass: Tensor, allowed: float) -> tuple[Tensor, float]:
    """-> ascending indices of all but the lightest, which sum to at most ``allowed``; and their sum."""
    ascending, order = mass.sort()
    totals = ascending.cumsum(0, dtype=torch.float64)
    light = int((totals <= allowed).sum())
    return order[light:].sort().values, float(totals[light - 1]) if light else 0.0


def _empty_rows(backend: Backend, like: Tensor, rows: int, vocabulary: int) -> Tensor:
    """[rows, V] of ``like``'s dtype, unwritten."""
    stride = gemm.leading_dimension(vocabulary, like.element_size())
    return backend.empty((rows, vocabulary), like.dtype, like.device, (stride, 1))
