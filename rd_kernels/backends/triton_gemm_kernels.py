"""Triton kernels of the linear op: a GEMM that stores exponentials, not logits, and GEMMs that leave tiles out.

z = hidden weight^T + bias is never stored. Row i's offset is o_i, its label's logit: a lower bound of the row's
maximum that costs one dot product a row and is known before the GEMM, so the GEMM's epilogue can store

    E_ij = exp(z_ij - o_i) 2^(-STEP k)

in 16 bits at once, with k the same for a row's share of a tile: 0 unless a logit lies far above the label's. Once
all tiles are done, each row gets one k for all its tiles, E[i, y_i] becomes exp(0) 2^(-STEP k) - s_i with s_i the
row's sum, and U = softmax - onehot = diag(1/s) E: the row weights of the gradient GEMMs take 1/s along. A change
of k multiplies by a power of two, so it rounds nothing again.

Letters: N rows, V vocabulary (Vp with its padding), D hidden, T tiles of the vocabulary. ``acc`` is float32.
Tiles are addressed in int64, places within one in int32. No atomics: the same input gives the same bits.
"""

import triton
import triton.language as tl

from rd_kernels.backends.triton_kernels import (
    BAD_LABEL,
    HIGHEST,
    HIT,
    IGNORED,
    INTERPRETED,
    LOG2_E,
    LOWEST,
    MISS,
    _rounded,
)

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _dot(a, b, total):
    if INTERPRETED:  # whose products of bfloat16 are wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def _grouped(program, height, width, GROUP: tl.constexpr):
    """-> block of rows, block of columns. GROUP blocks of rows share a block of columns while it is in L2."""
    first = program // (GROUP * width) * GROUP
    members = tl.minimum(height - first, GROUP)
    inner = program % (GROUP * width)
    return first + inner % members, inner // members


@triton.jit
def _offset(label_logit):
    return tl.where(tl.abs(label_logit) < float("inf"), label_logit, 0.0)


@triton.jit
def _exponent(z, offset):
    """Of 2: exp(z - offset). One expression for maxima and elements alike, so that rounding keeps their order."""
    return (z - offset) * LOG2_E


@triton.jit
def _steps(maximum, label_logit, STEP: tl.constexpr, TOP: tl.constexpr):
    """-> k. exp(maximum - offset) 2^(-STEP k) is at most 2^TOP, exactly so whatever the logits' magnitude: STEP is a
    power of two. A label's logit that is not finite is no bound from below: there k may be negative."""
    top = tl.minimum(tl.maximum(_exponent(maximum, _offset(label_logit)), LOWEST), HIGHEST)
    bounded = (top <= TOP) & (tl.abs(label_logit) < float("inf"))
    return tl.where(bounded, 0.0, tl.ceil(top / STEP) - 1.0)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def label_logits(
    hidden,  # [N, D] 16-bit
    weight,  # [Vp, D] 16-bit
    bias,  # [Vp] or None
    labels,  # [N] int64
    label_logit,  # out [N] acc; 0 for a row that does not count
    N,
    V,
    D,
    hidden_stride,
    weight_stride,
    ignore_index,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """hidden_i . weight[y_i] + bias[y_i]"""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    label = tl.load(labels + rows, mask=rows < N, other=ignore_index)
    counted = (label >= 0) & (label < V) & (label != ignore_index)
    total = tl.zeros([ROWS, DEPTH], tl.float32)
    for start in range(0, D, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = counted[:, None] & (depth < D)[None, :]
        h = tl.load(hidden + rows[:, None] * hidden_stride + depth[None, :], mask=inside, other=0.0)
        w = tl.load(weight + label[:, None] * weight_stride + depth[None, :], mask=inside, other=0.0)
        total += h.to(tl.float32) * w.to(tl.float32)
    z = tl.sum(total, axis=1)
    if bias is not None:
        z += tl.load(bias + label, mask=counted, other=0.0).to(tl.float32)
    tl.store(label_logit + rows, z, mask=rows < N)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def exponentials(
    hidden,  # [N, D] 16-bit
    weight,  # [Vp, D] 16-bit
    bias,  # [Vp] or None
    labels,  # [N] int64
    label_logit,  # [N] acc
    out,  # out [N, Vp] 16-bit: E, each tile with its own k; 0 in padding and in rows that do not count
    tile_max,  # out [T, N] acc: of z
    tile_sums,  # out [T, N] acc: of E before rounding
    N,
    V,
    padded,  # Vp
    D,
    hidden_stride,
    weight_stride,
    ignore_index,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,  # D is a multiple of DEPTH
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    TOP: tl.constexpr,
):
    """One program a tile of E, [ROWS, COLUMNS]."""
    row_block, tile = _grouped(tl.program_id(0), tl.cdiv(N, ROWS), tl.cdiv(padded, COLUMNS), GROUP)
    first_row = row_block.to(tl.int64) * ROWS
    first_column = tile * COLUMNS
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    label = tl.load(labels + rows, mask=rows < N, other=ignore_index)
    counted = (label >= 0) & (label < V) & (label != ignore_index)

    # Rows and columns beyond the end read the last one again: no masks in the loop.
    near = tl.minimum(tl.arange(0, ROWS), (N - 1 - first_row).to(tl.int32))
    across = tl.minimum(tl.arange(0, COLUMNS), padded - 1 - first_column)
    depth = tl.arange(0, DEPTH)
    h_tile = hidden + first_row * hidden_stride + (near[:, None] * hidden_stride + depth[None, :])
    w_tile = (
        weight
        + first_column.to(tl.int64) * weight_stride
        + (depth[:, None] + across[None, :] * weight_stride)
    )
    z = tl.zeros([ROWS, COLUMNS], tl.float32)
    some_count = tl.max(counted.to(tl.int32), axis=0) > 0
    for start in range(0, tl.where(some_count, D, 0), DEPTH):
        if WHOLE:
            h = tl.load(h_tile + start)
            w = tl.load(w_tile + start)
        else:
            h = tl.load(h_tile + start, mask=(start + depth < D)[None, :], other=0.0)
            w = tl.load(w_tile + start, mask=(start + depth < D)[:, None], other=0.0)
        z = _dot(h, w, z)

    if bias is not None:
        z += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    own = tl.load(label_logit + rows, mask=rows < N, other=0.0)
    # The bound from below holds exactly, and so does the comparison of the label with the maximum.
    z = tl.where(columns[None, :] == label[:, None], own[:, None], z)
    z = tl.where(counted[:, None] & (columns < V)[None, :], z, -float("inf"))
    maximum = tl.max(z, axis=1)
    shift = STEP * _steps(maximum, own, STEP, TOP)
    e = tl.exp2(_exponent(z, _offset(own)[:, None]) - shift[:, None])

    stats = tile.to(tl.int64) * N + rows
    tl.store(tile_max + stats, maximum, mask=rows < N)
    tl.store(tile_sums + stats, tl.sum(e, axis=1), mask=rows < N)
    place = out + first_row * padded + first_column
    inside = (rows < N)[:, None] & (columns < padded)[None, :]
    local = tl.arange(0, ROWS)[:, None] * padded + tl.arange(0, COLUMNS)[None, :]
    tl.store(place + local, _rounded(e, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "T", "ignore_index"])
def finish_rows(
    labels,  # [N] int64
    label_logit,  # [N] acc
    tile_max,  # [T, N] acc
    tile_sums,  # [T, N] acc
    out,  # [N, Vp]: E, written at the labels
    row_loss,  # out [N] acc
    normaliser,  # out [2, N] acc: the maximum m, log sum_j exp(z_j - m)
    outcome,  # out [N] uint8
    factor,  # out [N] acc: 1/s and what makes U exact at the label; NaN where the loss is; 0 for a row that does not count
    steps,  # out [N] acc: the row's k
    N,
    T,
    V,
    padded,  # Vp
    ignore_index,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    TOP: tl.constexpr,
    ROOM: tl.constexpr,  # a row's sum is at most 2^ROOM, since E must hold it at the label
):
    """One program ROWS rows: the tiles' maxima and sums become the row's; TILES tiles at a time."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = rows < N
    label = tl.load(labels + rows, mask=present, other=ignore_index)
    ignored = label == ignore_index
    counted = (label >= 0) & (label < V) & (label != ignore_index)
    own = tl.load(label_logit + rows, mask=present, other=0.0)

    tile = tl.arange(0, TILES)[:, None].to(tl.int64)
    maximum = tl.full([ROWS], -float("inf"), tl.float32)
    for start in range(0, T, TILES):
        inside = present[None, :] & (start + tile < T)
        m = tl.load(tile_max + (start + tile) * N + rows[None, :], mask=inside, other=-float("inf"))
        maximum = tl.maximum(maximum, tl.max(m, axis=0))
    k = _steps(maximum, own, STEP, TOP)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, T, TILES):
        inside = present[None, :] & (start + tile < T)
        places = (start + tile) * N + rows[None, :]
        m = tl.load(tile_max + places, mask=inside, other=-float("inf"))
        s = tl.load(tile_sums + places, mask=inside, other=0.0)
        total += tl.sum(s * tl.exp2(STEP * (_steps(m, own[None, :], STEP, TOP) - k[None, :])), axis=0)

    valid = counted & (total > 0) & (total < float("inf"))
    s = tl.where(valid, total, 1.0)
    excess = tl.maximum(tl.ceil((tl.log2(s) - ROOM) / STEP), 0.0)
    k += excess
    s *= tl.exp2(-STEP * excess)
    tl.store(steps + rows, k, mask=present)

    offset = _offset(own)
    uncounted = tl.where(ignored, 0.0, float("nan"))
    loss = tl.log(s) + LN_2 * (STEP * k) + (offset - own)
    log_total = tl.log(s) - LN_2 * (_exponent(maximum, offset) - STEP * k)
    hit = (own >= maximum) & (total == total)
    result = tl.where(counted, tl.where(hit, HIT, MISS), tl.where(ignored, IGNORED, BAD_LABEL))
    tl.store(row_loss + rows, tl.where(counted, tl.where(valid, loss, float("nan")), uncounted), mask=present)
    tl.store(normaliser + rows, tl.where(counted, maximum, uncounted), mask=present)
    log_total = tl.where(counted, tl.where(valid, log_total, float("nan")), uncounted)
    tl.store(normaliser + N + rows, log_total, mask=present)
    tl.store(outcome + rows, result.to(tl.uint8), mask=present)

    e = tl.where(tl.abs(own) < float("inf"), tl.exp2(-STEP * k), 0.0)
    at_label = _rounded(tl.where(valid, e - s, 0.0), out.dtype.element_ty)
    tl.store(out + rows * padded + label, at_label, mask=counted)
    # The label's element is as large as all others together: what its rounding takes, the factor gives back.
    lost = (e - s) / at_label.to(tl.float32)
    inverse = tl.where(tl.abs(lost - 1.0) < 0.01, lost, 1.0) / s  # not where it is nearly 0
    inverse = tl.where(counted, tl.where(valid, inverse, float("nan")), 0.0)
    tl.store(factor + rows, inverse, mask=present)


@triton.jit(do_not_specialize=["N"])
def settle_tiles(
    labels,  # [N] int64
    label_logit,  # [N] acc
    steps,  # [N] acc
    factor,  # [N] acc
    tile_max,  # [T, N] acc
    tile_sums,  # [T, N] acc, brought to the row's k
    out,  # [N, Vp]: E, brought to the row's k but at the labels; 0 where the factor is NaN
    N,
    padded,  # Vp
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,  # columns at a time
    STEP: tl.constexpr,
    TOP: tl.constexpr,
):
    """Program (block of rows, tile): touches E only if some row's k here is not the row's."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    present = rows < N
    stats = tile.to(tl.int64) * N + rows
    own = tl.load(label_logit + rows, mask=present, other=0.0)
    inverse = tl.load(factor + rows, mask=present, other=0.0)
    k = tl.load(steps + rows, mask=present, other=0.0)
    s = tl.load(tile_sums + stats, mask=present, other=0.0)
    m = tl.load(tile_max + stats, mask=present, other=-float("inf"))
    valid = inverse == inverse
    change = tl.exp2(STEP * (_steps(m, own, STEP, TOP) - k))
    tl.store(tile_sums + stats, tl.where(valid, s * change, float("nan")), mask=present)
    # A row without a finite sum is kept out of E, so that a weight of 0 leaves it out of the gradients.
    touched = present & (~valid | ((change != 1.0) & (s != 0.0)))
    if tl.max(touched.to(tl.int32), axis=0) > 0:
        label = tl.load(labels + rows, mask=present, other=-1)
        for start in range(0, COLUMNS, CHUNK):
            columns = tile * COLUMNS + start + tl.arange(0, CHUNK)
            inside = touched[:, None] & (columns < padded)[None, :]
            inside = inside & (columns[None, :] != label[:, None])
            places = out + rows[:, None] * padded + columns[None, :]
            e = tl.load(places, mask=inside, other=0.0).to(tl.float32)
            e = tl.where(valid[:, None], e * change[:, None], 0.0)
            tl.store(places, _rounded(e, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def live_product(
    a,  # [M, K] by its strides: E, or E^T
    b,  # [K, D] 16-bit
    factor,  # [M] acc or None
    unit,  # [] acc or None
    live_blocks,  # [ceil(M / HEIGHT), blocks] int32: first those blocks of K that are live
    live_count,  # [ceil(M / HEIGHT)] int32
    out,  # out [splits, M, D]: diag(factor) unit A B over a split's share of the live blocks
    M,
    K,
    D,
    blocks,  # ceil(K / SPAN)
    row_stride,
    column_stride,
    b_stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    SPAN: tl.constexpr,  # of K in a block: a multiple of DEPTH
    GROUP: tl.constexpr,
):
    """Program (tile of the product, split): one loop over the live parts of K alone, so that it is pipelined."""
    row_block, column_block = _grouped(tl.program_id(0), tl.cdiv(M, HEIGHT), tl.cdiv(D, WIDTH), GROUP)
    first_row = row_block.to(tl.int64) * HEIGHT
    local = tl.arange(0, HEIGHT)
    rows = row_block * HEIGHT + local
    columns = column_block * WIDTH + tl.arange(0, WIDTH)
    depth = tl.arange(0, DEPTH)
    a_tile = a + first_row * row_stride + (local[:, None] * row_stride + depth[None, :] * column_stride)
    b_tile = b + (depth[:, None] * b_stride + columns[None, :])
    blocks_here = live_blocks + row_block.to(tl.int64) * blocks
    tl.static_assert(SPAN % DEPTH == 0)
    PARTS: tl.constexpr = SPAN // DEPTH
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    count = tl.load(live_count + row_block) * PARTS
    share = tl.cdiv(count, tl.num_programs(1))
    begin = tl.program_id(1) * share
    # The next block's number is read a step ahead: read in its own step, it would take stages from the tiles.
    block = tl.load(blocks_here + begin // PARTS, mask=begin < count, other=0)
    for part in range(begin, tl.minimum(begin + share, count)):
        first = block * SPAN + part % PARTS * DEPTH
        block = tl.load(blocks_here + tl.minimum((part + 1) // PARTS, blocks - 1))
        inside = first + depth < K
        start = first.to(tl.int64)
        e = tl.load(a_tile + start * column_stride, mask=(rows < M)[:, None] & inside[None, :], other=0.0)
        x = tl.load(b_tile + start * b_stride, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
        total = _dot(e, x, total)
    if factor is not None:
        total *= tl.load(factor + rows, mask=rows < M, other=0.0)[:, None]
    if unit is not None:
        total *= tl.load(unit)
    place = (
        out + (tl.program_id(1).to(tl.int64) * M + first_row) * D + (local[:, None] * D + columns[None, :])
    )
    tl.store(place, _rounded(total, out.dtype.element_ty), mask=(rows < M)[:, None] & (columns < D)[None, :])
