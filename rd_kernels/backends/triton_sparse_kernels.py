"""Triton kernels for rows that rarely carry a label: they are packed, and what does not fit is computed apart.

Letters: N rows, V vocabulary, D hidden, K rows asked for, M rows of the overflow: those labelled beyond the buffer's
capacity. How many there are only the device knows, so the grids are for the most there can be, and a program that
finds none ends at once. ``acc`` is float32; sums have a fixed order, without atomics.
"""

import triton
import triton.language as tl

from rd_kernels.backends.triton_kernels import (
    BAD_LABEL,
    HIGHEST,
    HIT,
    IGNORED,
    INTERPRETED,
    LOWEST,
    MISS,
    _exp,
    _rounded,
)


@triton.jit
def _labelled(labels, rows, N, ignore_index):
    return tl.load(labels + rows, mask=rows < N, other=ignore_index) != ignore_index


@triton.jit(do_not_specialize=["N", "ignore_index"])
def compact_counts(
    labels,  # [N] int64
    counts,  # out [chunks] int32
    N,
    ignore_index,
    ROWS: tl.constexpr,
):
    """The rows with a label in each chunk of ROWS."""
    chunk = tl.program_id(0).to(tl.int64)
    labelled = _labelled(labels, chunk * ROWS + tl.arange(0, ROWS), N, ignore_index)
    tl.store(counts + chunk, tl.sum(labelled.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["N", "chunks", "capacity", "ignore_index"])
def compact_places(
    labels,  # [N] int64
    counts,  # [chunks] int32
    index,  # out [K] int64: rows with a label, then -1
    position,  # out [N] int64: the row's place among those with a label, or -1
    count,  # out [] int64
    N,
    chunks,
    capacity,  # K
    ignore_index,
    ROWS: tl.constexpr,
):
    """Each program adds up the chunks before its own by itself, so that none waits for another."""
    chunk = tl.program_id(0).to(tl.int64)
    before = tl.zeros([ROWS], tl.int64)
    total = tl.zeros([ROWS], tl.int64)
    for start in range(0, chunks, ROWS):
        others = start + tl.arange(0, ROWS)
        share = tl.load(counts + others, mask=others < chunks, other=0)
        before += tl.where(others < chunk, share, 0)
        total += share
    total = tl.sum(total, axis=0)

    rows = chunk * ROWS + tl.arange(0, ROWS)
    labelled = _labelled(labels, rows, N, ignore_index)
    place = tl.sum(before, axis=0) + tl.cumsum(labelled.to(tl.int32), axis=0) - 1
    tl.store(position + rows, tl.where(labelled, place, -1), mask=rows < N)
    tl.store(index + place, rows, mask=labelled & (place < capacity))
    tl.store(index + rows, tl.full([ROWS], -1, tl.int64), mask=(rows >= total) & (rows < capacity))
    tl.store(count, total, mask=chunk == 0)


@triton.jit
def gather_rows(
    x,  # [M, D]
    index,  # [K] int64
    out,  # out [K, D]: x at index, 0 where it is not in [0, M)
    row_stride,
    M,
    D,
    COLUMNS: tl.constexpr,
):
    """Program (k, columns)."""
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(index + place)
    readable = tl.where((row >= 0) & (row < M), D, 0)
    values = tl.load(x + row * row_stride + columns, mask=columns < readable, other=0.0)
    tl.store(out + place * D + columns, values, mask=columns < D)


@triton.jit
def _dot(a, b, sums):
    """sums + a @ b in float32. The interpreter's product of bfloat16 is wrong."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _tile(x, row_stride, rows, present, columns, D):
    """[rows, columns] of x [., D]; 0 in rows that are not present and beyond D."""
    mask = present[:, None] & (columns < D)[None, :]
    return tl.load(x + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _products(a, a_stride, a_rows, a_present, b, b_stride, b_rows, b_present, D, DEPTH: tl.constexpr):
    """[A, B]: the rows of a times those of b."""
    sums = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
    for start in range(0, D, DEPTH):
        columns = start + tl.arange(0, DEPTH)
        left = _tile(a, a_stride, a_rows, a_present, columns, D)
        right = _tile(b, b_stride, b_rows, b_present, columns, D)
        sums = _dot(left, tl.trans(right), sums)
    return sums


@triton.jit
def _overflow_rows(index, labels, start, M, V, ignore_index, ROWS: tl.constexpr):
    """-> places in [M] and whether there are such; their rows, -1: none there; their labels as int64 and as
    int32, in the second -1 where they do not count."""
    places = start + tl.arange(0, ROWS)
    inside = places < M
    rows = tl.load(index + places, mask=inside, other=-1)
    label = tl.load(labels + places, mask=rows >= 0, other=ignore_index)
    counted = (label >= 0) & (label < V) & (label != ignore_index)
    return places, inside, rows, label, tl.where(counted, label, -1).to(tl.int32)


@triton.jit
def _bias(bias, columns, V):
    values = tl.zeros([columns.shape[0]], tl.float32)
    if bias is not None:
        values += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)
    return values


@triton.jit(do_not_specialize=["M", "normaliser_stride", "ignore_index"])
def overflow_forward(
    hidden,  # [N, D]
    weight,  # [V, D]
    bias,  # [V] or None
    labels,  # [M] int64
    index,  # [M] int64: rows of hidden, then -1
    row_loss,  # out [M] acc
    normaliser,  # out [2, M] acc, as row_forward leaves it
    outcome,  # out [M] uint8
    hidden_stride,
    weight_stride,
    normaliser_stride,
    M,
    V,
    D,
    ignore_index,
    ROWS: tl.constexpr,
    VOCABULARY: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program for ROWS rows walks the vocabulary; the logits live in registers."""
    start_row = tl.program_id(0).to(tl.int64) * ROWS
    places, inside, rows, label, target = _overflow_rows(index, labels, start_row, M, V, ignore_index, ROWS)
    maximum = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    z_label = tl.zeros([ROWS], tl.float32)
    for start in range(0, tl.where(tl.load(index + start_row) >= 0, V, 0), VOCABULARY):
        columns = start + tl.arange(0, VOCABULARY)
        z = _products(
            hidden, hidden_stride, rows, rows >= 0,
            weight, weight_stride, columns.to(tl.int64), columns < V, D, DEPTH,
        )  # fmt: skip
        z = tl.where((columns < V)[None, :], z + _bias(bias, columns, V)[None, :], -float("inf"))
        new = tl.minimum(tl.maximum(maximum, tl.max(z, axis=1)), HIGHEST)
        total = total * _exp(maximum - new) + tl.sum(_exp(z - new[:, None]), axis=1)
        maximum = new
        z_label += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), axis=1)

    # From here on as in row_forward.
    infinite = tl.abs(total) == float("inf")
    row_maximum = tl.where(total == 0, -float("inf"), tl.where(infinite, float("inf"), maximum))
    log_total = tl.where((total == 0) | infinite, float("nan"), tl.log(total))
    loss = log_total + (maximum - z_label)
    hit = (z_label >= row_maximum) & (total == total)
    counted = target >= 0
    ignored = (rows < 0) | (label == ignore_index)
    uncounted = tl.where(ignored, 0.0, float("nan"))
    tl.store(row_loss + places, tl.where(counted, loss, uncounted), mask=inside)
    tl.store(normaliser + places, tl.where(counted, row_maximum, uncounted), mask=inside)
    tl.store(normaliser + normaliser_stride + places, tl.where(counted, log_total, uncounted), mask=inside)
    result = tl.where(counted, tl.where(hit, HIT, MISS), tl.where(ignored, IGNORED, BAD_LABEL))
    tl.store(outcome + places, result.to(tl.uint8), mask=inside)


@triton.jit
def _factors(scale, normaliser, normaliser_stride, places, target):
    """-> scale, 0 for a row that does not count; maximum and log_sum where it does, else 0."""
    factor = tl.load(scale + places, mask=target >= 0, other=0.0)
    maximum = tl.load(normaliser + places, mask=target >= 0, other=0.0)
    log_total = tl.load(normaliser + normaliser_stride + places, mask=target >= 0, other=0.0)
    return factor, maximum, log_total


@triton.jit(do_not_specialize=["M", "normaliser_stride", "ignore_index"])
def overflow_grad_hidden(
    scale,  # [M] acc
    hidden,  # [N, D]
    weight,  # [V, D]
    bias,  # [V] or None
    labels,  # [M] int64
    normaliser,  # [2, M] acc
    index,  # [M] int64
    grad_hidden,  # out [N, D], at index only
    hidden_stride,
    weight_stride,
    normaliser_stride,
    grad_stride,
    M,
    V,
    D,
    ignore_index,
    ROWS: tl.constexpr,
    VOCABULARY: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (rows, WIDTH of D): diag(scale) (U W), the logits computed again."""
    start_row = tl.program_id(0).to(tl.int64) * ROWS
    if tl.load(index + start_row) < 0:
        return
    places, _, rows, _, target = _overflow_rows(index, labels, start_row, M, V, ignore_index, ROWS)
    factor, maximum, log_total = _factors(scale, normaliser, normaliser_stride, places, target)
    width = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, V, VOCABULARY):
        columns = start + tl.arange(0, VOCABULARY)
        z = _products(
            hidden, hidden_stride, rows, rows >= 0,
            weight, weight_stride, columns.to(tl.int64), columns < V, D, DEPTH,
        )  # fmt: skip
        z += _bias(bias, columns, V)[None, :]
        u = _exp((z - maximum[:, None]) - log_total[:, None])
        u -= tl.where(columns[None, :] == target[:, None], 1.0, 0.0)
        u = tl.where((columns < V)[None, :], u, 0.0)
        block = _tile(weight, weight_stride, columns.to(tl.int64), columns < V, width, D)
        sums = _dot(_rounded(u, block.dtype), block, sums)
    result = tl.where((factor == 0)[:, None], 0.0, factor[:, None] * sums)
    mask = (rows >= 0)[:, None] & (width < D)[None, :]
    out = grad_hidden + rows[:, None] * grad_stride + width[None, :]
    tl.store(out, _rounded(result, grad_hidden.dtype.element_ty), mask=mask)


@triton.jit
def _present(index, M, BLOCK: tl.constexpr):
    """How many rows there are: ``index`` [M] is theirs up to the first -1."""
    count = tl.zeros([], tl.int32)
    for start in range(0, M, BLOCK):
        places = start + tl.arange(0, BLOCK)
        count += tl.sum((tl.load(index + places, mask=places < M, other=-1) >= 0).to(tl.int32), axis=0)
    return count


@triton.jit(do_not_specialize=["M", "normaliser_stride", "ignore_index"])
def overflow_grad_weight(
    scale,  # [M] acc
    hidden,  # [N, D]
    weight,  # [V, D]
    bias,  # [V] or None
    labels,  # [M] int64
    normaliser,  # [2, M] acc
    index,  # [M] int64
    grad_weight,  # [V, D], added to; or None
    grad_bias,  # [V] acc, added to; or None
    hidden_stride,
    weight_stride,
    normaliser_stride,
    grad_stride,
    M,
    V,
    D,
    ignore_index,
    ROWS: tl.constexpr,
    VOCABULARY: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (vocabulary, WIDTH of D): U^T diag(scale) H and, in the first WIDTH, U^T scale."""
    if tl.load(index) < 0:
        return
    columns = tl.program_id(0) * VOCABULARY + tl.arange(0, VOCABULARY)
    known = columns < V
    entries = columns.to(tl.int64)
    width = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    offset = _bias(bias, columns, V)
    weight_sum = tl.zeros([VOCABULARY, WIDTH], tl.float32)
    bias_sum = tl.zeros([VOCABULARY], tl.float32)
    # Counted, and not looked for row by row: triton 3.6 does not compile a product in a while loop.
    for start_row in range(0, _present(index, M, 1024), ROWS):
        places, _, rows, _, target = _overflow_rows(index, labels, start_row, M, V, ignore_index, ROWS)
        factor, maximum, log_total = _factors(scale, normaliser, normaliser_stride, places, target)
        # Transposed from the start: U^T is the left side of the product below.
        z = _products(weight, weight_stride, entries, known, hidden, hidden_stride, rows, rows >= 0, D, DEPTH)
        u = _exp((z + offset[:, None] - maximum[None, :]) - log_total[None, :])
        u -= tl.where(columns[:, None] == target[None, :], 1.0, 0.0)
        # Scale 0 wins over NaN, in U as in H.
        u = tl.where(known[:, None] & (factor != 0)[None, :], u, 0.0)
        if grad_bias is not None:
            bias_sum += tl.sum(u * factor[None, :], axis=1)
        if grad_weight is not None:
            # The scale goes into U, which is rounded anyway, relative to the largest: neither leaves float16's range.
            top = tl.max(tl.abs(factor), axis=0)
            share = tl.where(factor == 0, 0.0, factor / top)
            block = _tile(hidden, hidden_stride, rows, factor != 0, width, D)
            product = _dot(_rounded(u * share[None, :], block.dtype), block, tl.zeros_like(weight_sum))
            weight_sum += top * product

    if grad_bias is not None:
        mine = columns < tl.where(tl.program_id(1) == 0, V, 0)
        bias_sum += tl.load(grad_bias + columns, mask=mine, other=0.0)
        tl.store(grad_bias + columns, bias_sum, mask=mine)
    if grad_weight is not None:
        mask = known[:, None] & (width < D)[None, :]
        out = grad_weight + entries[:, None] * grad_stride + width[None, :]
        weight_sum += tl.load(out, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, _rounded(weight_sum, grad_weight.dtype.element_ty), mask=mask)
