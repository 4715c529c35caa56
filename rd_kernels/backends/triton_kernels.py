"""Triton kernels that walk the rows. What they compute is defined in :mod:`rd_kernels.reference`.

Letters: N rows, V vocabulary, G groups. ``acc`` is float32. Everything is summed in an order that depends on
the shapes alone, without atomics on floats: the same input gives the same bits. Nothing is read back by the host.

Rows are addressed in int64, columns in int32. An argument that is None is left out at compile time.
Imported on first use only (see triton_backend), because importing triton is slow and decides, by the
environment variable TRITON_INTERPRET, whether these functions are compiled or interpreted.
"""

import triton
import triton.language as tl

from rd_kernels.backends import interface
from rd_kernels.backends.triton_group_kernels import BAD_LABEL, HIT, IGNORED, finish_groups

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
MISS = tl.constexpr(interface.MISS)

LOG2_E = tl.constexpr(1.4426950408889634)
# The running maximum stays within the finite numbers, so that a logit of -inf adds exp(-inf) = 0 and one of +inf
# adds exp(inf) = inf, where infinite differences would give NaN: only a NaN does.
LOWEST = tl.constexpr(-3.4028234663852886e38)
HIGHEST = tl.constexpr(3.4028234663852886e38)
# exp of this and all below is 0 in float32, and it times 0 is 0, where -inf times 0 would be NaN.
NEGLIGIBLE = tl.constexpr(-128.0)


@triton.jit
def _exp(x):
    """exp without results below 2^-126, which cost tl.exp three more instructions each."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _tile(start, shift, V, LANES: tl.constexpr, WIDE: tl.constexpr):
    """Where a step of the loop over a row stands.

    A row is walked in pieces of WIDE elements, 16 bytes, that begin at multiples of 16 bytes whatever the row's
    own alignment is: ``shift`` elements before the row, so that every access of a whole piece is one wide one.
    -> places [LANES, WIDE], counted from the first piece's begin; columns, counted from the row's; the pieces
    wholly inside the row [LANES, 1]; the inside elements of other pieces [LANES, WIDE]; whether this step can
    hold any of those.
    """
    lane = start + tl.arange(0, LANES)[:, None] * WIDE
    places = lane + tl.arange(0, WIDE)[None, :]
    columns = places - shift
    first = lane - shift
    whole = (first >= 0) & (first + WIDE <= V)
    edges = (columns >= 0) & (columns < V) & ~whole
    return places, columns, whole, edges, (start == 0) | (start + LANES * WIDE > shift + V)


@triton.jit
def _load(pointers, whole, edges, at_edge, other):
    z = tl.load(pointers, mask=whole, other=other)
    if at_edge:
        z = tl.where(edges, tl.load(pointers, mask=edges, other=other), z)
    return z.to(tl.float32)


@triton.jit
def _store(pointers, values, whole, edges, at_edge):
    tl.store(pointers, values, mask=whole)
    if at_edge:
        tl.store(pointers, values, mask=edges)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """``x`` float32, converted to ``dtype`` to nearest even; Triton's interpreter would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        nearest = tl.where(x == x, nearest, bits) & 0xFFFF0000
        return nearest.to(tl.float32, bitcast=True).to(dtype)
    return x.to(dtype)


@triton.jit
def _normaliser(base, total):
    """-> a row's largest logit and log sum_j exp(z_j - base), of the largest finite logit and the sum.

    As in torch's cross_entropy the latter is NaN for a row that holds NaN or +inf or nothing but -inf.
    """
    infinite = tl.abs(total) == float("inf")
    row_maximum = tl.where(total == 0, -float("inf"), tl.where(infinite, float("inf"), base))
    return row_maximum, tl.where((total == 0) | infinite, float("nan"), tl.log(total))


@triton.jit
def _store_results(
    row,
    label,
    counted,
    ignored,
    hit,
    loss,
    row_maximum,
    log_total,
    row_loss,
    normaliser,
    normaliser_stride,
    outcome,
):
    uncounted = tl.where(ignored, 0.0, float("nan"))
    tl.store(row_loss + row, tl.where(counted, loss, uncounted))
    tl.store(normaliser + row, tl.where(counted, row_maximum, uncounted))
    tl.store(normaliser + normaliser_stride + row, tl.where(counted, log_total, uncounted))
    result = tl.where(counted, tl.where(hit, HIT, MISS), tl.where(ignored, IGNORED, BAD_LABEL))
    tl.store(outcome + row, result.to(tl.uint8))


@triton.jit
def _times_exp(x, exp_x):
    """x exp(x) for x <= 0, 0 where exp(x) is."""
    return tl.maximum(x, NEGLIGIBLE) * exp_x


@triton.jit
def _store_details(row, counted, ignored, entropy, above, z_label, V, details, details_stride):
    """``above`` counts what is not <= ``z_label``, but for a NaN there, which everything outside the row is as well."""
    uncounted = tl.where(ignored, 0.0, float("nan"))
    tl.store(details + row, tl.where(counted, entropy, uncounted))
    above = tl.where(z_label == z_label, above, V).to(tl.float32)
    tl.store(details + details_stride + row, tl.where(counted, above, uncounted))


@triton.jit
def _forward_row(
    row,  # int64
    logits,  # [N, V] float32, bfloat16 or float16
    labels,  # [N] int64
    class_weight,  # [V] acc or None
    weight_sum,  # [] acc, sum of class_weight; None without class_weight or without smoothing
    row_loss,  # out [N] acc
    normaliser,  # out [2, N] acc: the maximum m, log sum_j exp(z_j - m)
    outcome,  # out [N] uint8
    details,  # out [2, N] acc or None: entropy; how many logits are not <= the label's
    row_stride,
    normaliser_stride,
    details_stride,
    V,
    ignore_index,
    smoothing,  # float or None
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Step 1 of one row: the logits are read once, and only if the row counts."""
    label = tl.load(labels + row)
    ignored = label == ignore_index
    counted = (label >= 0) & (label < V) & (label != ignore_index)
    piece = row * row_stride // WIDE
    shift = (row * row_stride - piece * WIDE).to(tl.int32)

    # Each lane keeps its own maximum and sum of exp(z - maximum): no barrier in the loop.
    maximum = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    spread = tl.zeros([LANES], tl.float32)  # of (z - maximum) exp(z - maximum)
    above = tl.zeros([LANES], tl.int32)
    if details is not None:
        z_label = tl.load(logits + row * row_stride + label, mask=counted, other=0.0).to(tl.float32)
    for start in range(0, tl.where(counted, shift + V, 0), LANES * WIDE):
        places, columns, whole, edges, at_edge = _tile(start, shift, V, LANES, WIDE)
        z = _load(logits + piece * WIDE + places, whole, edges, at_edge, -float("inf"))
        new = tl.minimum(tl.maximum(maximum, tl.max(z, axis=1)), HIGHEST)
        e = _exp(z - new[:, None])
        if details is not None:
            moved = spread + tl.maximum(maximum - new, NEGLIGIBLE) * total
            spread = moved * _exp(maximum - new) + tl.sum(_times_exp(z - new[:, None], e), axis=1)
            above += tl.sum(tl.where(z <= z_label, 0, 1), axis=1)
        total = total * _exp(maximum - new) + tl.sum(e, axis=1)
        maximum = new
        if smoothing is not None:
            inside = (columns >= 0) & (columns < V)
            if class_weight is not None:
                z *= tl.load(class_weight + columns, mask=inside, other=0.0)
            weighted += tl.sum(tl.where(inside, z, 0.0), axis=1)

    base = tl.max(maximum, axis=0)
    if details is not None:
        spread += tl.maximum(maximum - base, NEGLIGIBLE) * total
        spread = tl.sum(spread * _exp(maximum - base), axis=0)
    else:
        z_label = tl.load(logits + row * row_stride + label, mask=counted, other=0.0).to(tl.float32)
    total = tl.sum(total * _exp(maximum - base), axis=0)
    row_maximum, log_total = _normaliser(base, total)
    hit = (z_label >= row_maximum) & (total == total)  # a NaN among the logits: no hit

    # Not (base + log_total) - z_label: a small loss would inherit the rounding of a large maximum.
    loss = log_total + (base - z_label)
    if class_weight is not None:
        loss *= tl.load(class_weight + label, mask=counted, other=0.0)
    if smoothing is not None:
        # W lse - sum_j w_j z_j, W = sum_j w_j
        mass = V
        if class_weight is not None:
            mass = tl.load(weight_sum)
        smooth = mass * log_total + (mass * base - tl.sum(weighted, axis=0))
        loss = (1.0 - smoothing) * loss + smoothing / V * smooth
    _store_results(
        row, label, counted, ignored, hit, loss, row_maximum, log_total,
        row_loss, normaliser, normaliser_stride, outcome,
    )  # fmt: skip
    if details is not None:
        entropy, above = log_total - spread / total, tl.sum(above, axis=0)
        _store_details(row, counted, ignored, entropy, above, z_label, V, details, details_stride)


@triton.jit(do_not_specialize=["normaliser_stride", "details_stride", "ignore_index"])
def row_forward(
    logits,  # [N, V] float32, bfloat16 or float16
    labels,  # [N] int64
    class_weight,  # [V] acc or None
    weight_sum,  # [] acc, or None
    row_loss,  # out [N] acc
    normaliser,  # out [2, N] acc
    outcome,  # out [N] uint8
    details,  # out [2, N] acc or None
    row_stride,
    normaliser_stride,
    details_stride,
    V,
    ignore_index,
    smoothing,  # float or None
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    _forward_row(
        row, logits, labels, class_weight, weight_sum, row_loss, normaliser, outcome, details,
        row_stride, normaliser_stride, details_stride, V, ignore_index, smoothing, LANES, WIDE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["normaliser_stride", "ignore_index", "chunk_rows", "G"])
def grouped_forward(
    logits,  # [N, V] float32, bfloat16 or float16
    labels,  # [N] int64
    groups,  # [N, width]
    q,  # [G] acc, updated
    adjustment,  # [G] acc or None
    row_loss,  # out [N] acc
    normaliser,  # out [2, N] acc
    outcome,  # out [N] uint8
    partials,  # scratch [chunks, 3, G+2] acc
    bad,  # scratch [chunks, 2] int32
    counters,  # [1 + chunks] int32, zeros, and left so
    stats,  # out [4, G+2] acc
    status,  # out [2] int64
    loss,  # out [] acc
    coefficients,  # out [G] acc
    row_stride,
    normaliser_stride,
    V,
    ignore_index,
    chunk_rows,
    G,
    width,
    rate: tl.float64,
    RULE: tl.constexpr,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Steps 1 to 3 in one launch: one program a row, and the last to be done go on to the groups."""
    row = tl.program_id(0).to(tl.int64)
    _forward_row(
        row, logits, labels, None, None, row_loss, normaliser, outcome, None,
        row_stride, normaliser_stride, 0, V, ignore_index, None, LANES, WIDE,
    )  # fmt: skip
    finish_groups(
        row, row_loss, outcome, groups, q, adjustment, partials, bad, counters, stats, status, loss, coefficients,
        chunk_rows, tl.num_programs(0), G, width, rate, RULE, BITS, ROWS, CHUNKS, COLUMNS, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["grad_out_stride", "normaliser_stride", "ignore_index"])
def row_backward(
    grad_out,  # [N] or [] acc, or None: 1
    row_scale,  # [N] acc or None: 1
    logits,  # [N, V]
    labels,  # [N] int64
    normaliser,  # [2, N] acc, as row_forward leaves it
    class_weight,  # [V] acc or None
    weight_sum,  # [] acc, sum of class_weight; None without class_weight or without smoothing
    grad_logits,  # out [N, V]; may be logits
    grad_out_stride,
    row_stride,
    normaliser_stride,
    grad_row_stride,
    V,
    ignore_index,
    smoothing,  # float or None
    SAME_STRIDE: tl.constexpr,  # row_stride == grad_row_stride: both are aligned alike
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program a row: one read and one write of each element; a row without gradient is only written."""
    # The last row first: the forward has read it last, so it is the likeliest to be in L2 still.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    label = tl.load(labels + row)
    counted = (label >= 0) & (label < V) & (label != ignore_index)
    scale = tl.full([], 1.0, tl.float32)
    if grad_out is not None:
        scale *= tl.load(grad_out + row * grad_out_stride)
    if row_scale is not None:
        scale *= tl.load(row_scale + row)
    readable = tl.where(counted & (scale != 0), V, 0)
    maximum = tl.load(normaliser + row)
    log_total = tl.load(normaliser + normaliser_stride + row)

    # dz_j = scale (mass p_j - hard [j = label] - soft w_j)
    hard = tl.full([], 1.0, tl.float32)
    mass = hard
    if class_weight is not None:
        hard = tl.load(class_weight + label, mask=counted, other=0.0)
        mass = hard
    if smoothing is not None:
        hard *= 1.0 - smoothing
        soft = smoothing / V
        if class_weight is not None:
            mass = hard + soft * tl.load(weight_sum)

    piece = row * row_stride // WIDE
    shift = (row * row_stride - piece * WIDE).to(tl.int32)
    grad_start = piece * WIDE if SAME_STRIDE else row * grad_row_stride - shift
    for start in range(0, shift + V, LANES * WIDE):
        places, columns, whole, edges, at_edge = _tile(start, shift, V, LANES, WIDE)
        _, _, read_whole, read_edges, _ = _tile(start, shift, readable, LANES, WIDE)
        z = _load(logits + piece * WIDE + places, read_whole, read_edges, at_edge, 0.0)
        grad = mass * _exp((z - maximum) - log_total) - tl.where(columns == label, hard, 0.0)
        if smoothing is not None:
            if class_weight is not None:
                grad -= soft * tl.load(class_weight + columns, mask=(columns >= 0) & (columns < V), other=0.0)
            else:
                grad -= soft
        grad = _rounded(tl.where(columns < readable, scale * grad, 0.0), grad_logits.dtype.element_ty)
        _store(grad_logits + grad_start + places, grad, whole, edges, at_edge)
