"""The Triton kernel that overwrites rows by softmax - onehot, each held in a program's registers.

Letters: N rows, V vocabulary. ``acc`` is float32.
"""

import triton
import triton.language as tl

from rd_kernels.backends.triton_kernels import (
    HIGHEST,
    LOWEST,
    _exp,
    _normaliser,
    _rounded,
    _store_details,
    _store_results,
    _times_exp,
)


@triton.jit(do_not_specialize=["normaliser_stride", "details_stride", "ignore_index"])
def softmax_minus_onehot(
    logits,  # [N, V], overwritten by softmax - onehot(label); zeros on rows that do not count
    labels,  # [N] int64
    row_loss,  # out [N] acc
    normaliser,  # out [2, N] acc
    outcome,  # out [N] uint8
    details,  # out [2, N] acc or None, as of row_forward
    row_stride,
    normaliser_stride,
    details_stride,
    V,
    ignore_index,
    LANES: tl.constexpr,  # LANES * WIDE >= V: the row stays in registers
    WIDE: tl.constexpr,
):
    """One program a row: one read and one write of each element.

    The whole 16-byte pieces of a row, and apart from them the elements before the first and after the last one.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    ignored = label == ignore_index
    counted = (label >= 0) & (label < V) & (label != ignore_index)
    # Before anything is overwritten: the reductions below make every thread wait for the others.
    z_label = tl.load(logits + row * row_stride + label, mask=counted, other=0.0).to(tl.float32)

    start = logits + row * row_stride
    first = tl.cdiv(row * row_stride, WIDE)
    head = (first * WIDE - row * row_stride).to(tl.int32)
    pieces = tl.maximum(V - head, 0) // WIDE
    lane = tl.arange(0, LANES)[:, None]
    whole = lane < pieces
    # int64: their differences are known to the compiler, so that one register holds the address of all of them.
    places = logits + first * WIDE + lane.to(tl.int64) * WIDE + tl.arange(0, WIDE)[None, :]
    z = tl.load(places, mask=whole & (lane < tl.where(counted, pieces, 0)), other=-float("inf")).to(
        tl.float32
    )
    edge = tl.arange(0, 2 * WIDE)
    edge = tl.where(edge < WIDE, edge, head + (pieces - 1) * WIDE + edge)
    edges = edge < tl.where(tl.arange(0, 2 * WIDE) < WIDE, tl.minimum(head, V), V)
    readable = edge < tl.where(counted, V, 0)
    z_edge = tl.load(start + edge, mask=edges & readable, other=-float("inf")).to(tl.float32)

    if details is not None:
        above = tl.sum(tl.sum(tl.where(z <= z_label, 0, 1), axis=1), axis=0)
        above += tl.sum(tl.where(z_edge <= z_label, 0, 1), axis=0)
    base = tl.maximum(tl.max(tl.max(z, axis=1), axis=0), tl.max(z_edge, axis=0))
    base = tl.minimum(tl.maximum(base, LOWEST), HIGHEST)
    e, e_edge = _exp(z - base), _exp(z_edge - base)
    if details is not None:  # before threads wait for each other's sums: the registers of z are free then
        spread = tl.sum(tl.sum(_times_exp(z - base, e), axis=1), axis=0)
        spread += tl.sum(_times_exp(z_edge - base, e_edge), axis=0)
    total = tl.sum(tl.sum(e, axis=1), axis=0) + tl.sum(e_edge, axis=0)
    row_maximum, log_total = _normaliser(base, total)
    hit = (z_label >= row_maximum) & (total == total)
    loss = log_total + (base - z_label)
    _store_results(
        row, label, counted, ignored, hit, loss, row_maximum, log_total,
        row_loss, normaliser, normaliser_stride, outcome,
    )  # fmt: skip
    if details is not None:
        entropy = log_total - spread / total
        _store_details(row, counted, ignored, entropy, above, z_label, V, details, details_stride)

    dtype: tl.constexpr = logits.dtype.element_ty
    # NaN where there is no softmax; the e of a row that does not count are 0.
    scale = tl.where(counted, tl.where(log_total == log_total, 1.0 / total, log_total), 0.0)
    tl.store(places, _rounded(e * scale, dtype), mask=whole)
    tl.store(start + edge, _rounded(e_edge * scale, dtype), mask=edges)
    tl.debug_barrier()  # the label's probability is written before it is overwritten
    tl.store(start + label, _rounded(_exp(z_label - base) * scale - 1.0, dtype), mask=counted)
