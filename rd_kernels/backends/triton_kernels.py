"""Triton kernels of the op. What they compute is defined in :mod:`rd_kernels.reference`.

Letters: N rows, V vocabulary, G groups. ``acc`` is float32. Everything is summed in an order that depends on
the shapes alone, without atomics: the same input gives the same bits. Nothing is read back by the host.

Rows are addressed in int64, columns in int32. An argument that is None is left out at compile time.
Imported on first use only (see triton_backend), because importing triton is slow and decides, by the
environment variable TRITON_INTERPRET, whether these functions are compiled or interpreted.
"""

import triton
import triton.language as tl

from rd_kernels.backends import registry

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
MISS = tl.constexpr(registry.MISS)
HIT = tl.constexpr(registry.HIT)
IGNORED = tl.constexpr(registry.IGNORED)
BAD_LABEL = tl.constexpr(registry.BAD_LABEL)

LOG2_E = tl.constexpr(1.4426950408889634)
# The running maximum stays within the finite numbers, so that a logit of -inf adds exp(-inf) = 0 and one of +inf
# adds exp(inf) = inf, where infinite differences would give NaN: only a NaN does.
LOWEST = tl.constexpr(-3.4028234663852886e38)
HIGHEST = tl.constexpr(3.4028234663852886e38)


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


@triton.jit(do_not_specialize=["normaliser_stride", "ignore_index"])
def row_forward(
    logits,  # [N, V] float32, bfloat16 or float16
    labels,  # [N] int64
    class_weight,  # [V] acc or None
    weight_sum,  # [] acc, sum of class_weight; None without class_weight or without smoothing
    row_loss,  # out [N] acc
    normaliser,  # out [2, N] acc: the maximum m, log sum_j exp(z_j - m)
    outcome,  # out [N] uint8
    row_stride,
    normaliser_stride,
    V,
    ignore_index,
    smoothing,  # float or None
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program a row: the logits are read once, and only if the row counts."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    ignored = label == ignore_index
    counted = (label >= 0) & (label < V) & (label != ignore_index)
    piece = row * row_stride // WIDE
    shift = (row * row_stride - piece * WIDE).to(tl.int32)

    # Each lane keeps its own maximum and sum of exp(z - maximum): no barrier in the loop.
    maximum = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    for start in range(0, tl.where(counted, shift + V, 0), LANES * WIDE):
        places, columns, whole, edges, at_edge = _tile(start, shift, V, LANES, WIDE)
        z = _load(logits + piece * WIDE + places, whole, edges, at_edge, -float("inf"))
        new = tl.minimum(tl.maximum(maximum, tl.max(z, axis=1)), HIGHEST)
        total = total * _exp(maximum - new) + tl.sum(_exp(z - new[:, None]), axis=1)
        maximum = new
        if smoothing is not None:
            inside = (columns >= 0) & (columns < V)
            if class_weight is not None:
                z *= tl.load(class_weight + columns, mask=inside, other=0.0)
            weighted += tl.sum(tl.where(inside, z, 0.0), axis=1)

    base = tl.max(maximum, axis=0)
    total = tl.sum(total * _exp(maximum - base), axis=0)
    infinite = tl.abs(total) == float("inf")
    z_label = tl.load(logits + row * row_stride + label, mask=counted, other=0.0).to(tl.float32)
    row_maximum = tl.where(total == 0, -float("inf"), tl.where(infinite, float("inf"), base))
    hit = (z_label >= row_maximum) & (total == total)  # a NaN among the logits: no hit

    # As in torch's cross_entropy: NaN for a row that holds NaN or +inf or nothing but -inf.
    log_total = tl.where((total == 0) | infinite, float("nan"), tl.log(total))
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

    uncounted = tl.where(ignored, 0.0, float("nan"))
    tl.store(row_loss + row, tl.where(counted, loss, uncounted))
    tl.store(normaliser + row, tl.where(counted, row_maximum, uncounted))
    tl.store(normaliser + normaliser_stride + row, tl.where(counted, log_total, uncounted))
    result = tl.where(counted, tl.where(hit, HIT, MISS), tl.where(ignored, IGNORED, BAD_LABEL))
    tl.store(outcome + row, result.to(tl.uint8))


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


@triton.jit
def _mask_tile(groups, rows, counted, columns, G):
    """[ROWS, COLUMNS] of the bool mask [N, G]; False beyond G and for rows that do not count."""
    inside = counted[:, None] & (columns < G)[None, :]
    return tl.load(groups + rows[:, None] * G + columns[None, :], mask=inside, other=0) != 0


@triton.jit(do_not_specialize=["N", "G"])
def group_partials(
    row_loss,  # [N] acc
    outcome,  # [N] uint8
    groups,  # [N] int64 ids or [N, G] bool mask
    partials,  # out [chunks, 3, G+2] acc: loss sum, rows, hits
    bad,  # out [chunks, 2] int32: labels, group ids out of range
    N,
    G,
    IS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (chunk, tile): sums over ROWS rows for COLUMNS columns: the groups, then ungrouped, then all."""
    chunk = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    rows = chunk * ROWS + tl.arange(0, ROWS)
    result = tl.load(outcome + rows, mask=rows < N, other=IGNORED)
    counted = result <= HIT
    loss = tl.load(row_loss + rows, mask=counted, other=0.0)

    if IS_MASK:
        member = _mask_tile(groups, rows, counted, columns, G)
        in_a_group = tl.zeros([ROWS], tl.int32)
        # Only the program that owns the column "ungrouped" has to see a row's whole mask.
        owns_ungrouped = (tile * COLUMNS <= G) & ((tile + 1) * COLUMNS > G)
        for start in range(0, tl.where(owns_ungrouped, G, 0), COLUMNS):
            other = _mask_tile(groups, rows, counted, start + tl.arange(0, COLUMNS), G)
            in_a_group = tl.maximum(in_a_group, tl.max(other.to(tl.int32), axis=1))
        member = member | ((in_a_group == 0)[:, None] & (columns == G)[None, :])
        bad_id = tl.zeros([ROWS], tl.int32)
    else:
        group = tl.load(groups + rows, mask=counted, other=-1)
        bad_id = (counted & ((group < -1) | (group >= G))).to(tl.int32)
        column = tl.where(group == -1, G, tl.where(bad_id != 0, -1, group))
        member = column[:, None] == columns[None, :]
    member = (member | (columns == G + 1)[None, :]) & counted[:, None]

    # where, not a product: 0 * NaN would spread one row's NaN to every group.
    sums = tl.sum(tl.where(member, loss[:, None], 0.0), axis=0)
    counts = tl.sum(member.to(tl.float32), axis=0)
    hits = tl.sum((member & (result == HIT)[:, None]).to(tl.float32), axis=0)
    out = partials + chunk * 3 * (G + 2) + columns
    inside = columns < G + 2
    tl.store(out, sums, mask=inside)
    tl.store(out + (G + 2), counts, mask=inside)
    tl.store(out + 2 * (G + 2), hits, mask=inside)
    tl.store(bad + chunk * 2, tl.sum((result == BAD_LABEL).to(tl.int32), axis=0), mask=tile == 0)
    tl.store(bad + chunk * 2 + 1, tl.sum(bad_id, axis=0), mask=tile == 0)


@triton.jit(do_not_specialize=["chunks", "G"])
def group_totals(
    partials,  # [chunks, 3, G+2] acc
    bad,  # [chunks, 2] int32
    stats,  # out [4, G+2] acc
    status,  # out [2] int64
    chunks,
    G,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (tile, row of stats): the chunks' partial sums added up; the weights, row 3, are zeroed."""
    tile = tl.program_id(0)
    statistic = tl.program_id(1)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < G + 2
    sums = tl.zeros([CHUNKS, COLUMNS], tl.float32)
    bad_labels = tl.zeros([CHUNKS], tl.int64)
    bad_groups = tl.zeros([CHUNKS], tl.int64)
    for start in range(0, tl.where(statistic < 3, chunks, 0), CHUNKS):
        chunk = (start + tl.arange(0, CHUNKS)).to(tl.int64)
        present = chunk < chunks
        offsets = (chunk * 3 + statistic)[:, None] * (G + 2) + columns[None, :]
        sums += tl.load(partials + offsets, mask=present[:, None] & inside[None, :], other=0.0)
        bad_labels += tl.load(bad + chunk * 2, mask=present, other=0)
        bad_groups += tl.load(bad + chunk * 2 + 1, mask=present, other=0)
    tl.store(stats + statistic * (G + 2) + columns, tl.sum(sums, axis=0), mask=inside)
    first = (tile == 0) & (statistic == 0)
    tl.store(status, tl.sum(bad_labels, axis=0), mask=first)
    tl.store(status + 1, tl.sum(bad_groups, axis=0), mask=first)


@triton.jit
def _erm(sums, counts, weight):
    """-> coefficients 1 / sum(n), new state (kept), shares n_g / sum(n)."""
    total = tl.sum(counts, axis=0)
    coefficients = tl.where(total > 0, 1.0 / total, 0.0) + tl.zeros_like(counts)
    return coefficients, weight, coefficients * counts


@triton.jit
def _group_dro(sums, counts, weight, gain, step_size, HOLD: tl.constexpr):
    """Online exponentiated gradient in log space (Sagawa et al. 2020, Alg. 1); ``gain`` [G] is what is added to
    the means. HOLD: absent groups keep their weight, those present share what they had together.
    -> coefficients q_g / n_g, new q, shares (new q)."""
    present = counts > 0
    divisor = tl.where(present, counts, 1.0)
    means = sums / divisor
    log_weight = tl.log(weight) + tl.where(present, step_size * (means + gain), 0.0)
    total = 1.0
    if HOLD:
        log_weight = tl.where(present, log_weight, float("-inf"))
        total = tl.sum(tl.where(present, weight, 0.0), axis=0)
    updated = tl.exp(log_weight - tl.max(log_weight, axis=0))
    updated *= total / tl.sum(updated, axis=0)
    if HOLD:
        updated = tl.where(present, tl.where(total > 0, updated, weight), weight)
    # Kept where no group is present or a mean is not finite: one bad batch must not destroy the state.
    finite = tl.abs(means) < float("inf")
    unusable = tl.max((present & ~finite).to(tl.int32), axis=0) + (tl.sum(counts, axis=0) == 0).to(tl.int32)
    updated = tl.where(unusable == 0, updated, weight)
    return tl.where(present, updated / divisor, 0.0), updated, updated


@triton.jit(do_not_specialize=["G"])
def group_update(
    stats,  # [4, G+2] acc; row 3 is written
    status,  # [2] int64
    q,  # [G] acc, updated
    adjustment,  # [G] acc or None
    loss,  # out [] acc
    coefficients,  # out [G] acc
    G,
    step_size,
    OBJECTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the objective's new state, each group's coefficient, and the loss."""
    group = tl.arange(0, BLOCK)
    inside = group < G
    sums = tl.load(stats + group, mask=inside, other=0.0)
    counts = tl.load(stats + (G + 2) + group, mask=inside, other=0.0)
    weight = tl.load(q + group, mask=inside, other=0.0)
    if OBJECTIVE == "group_dro" or OBJECTIVE == "group_dro_hold":
        gain = tl.zeros([BLOCK], tl.float32)
        if adjustment is not None:
            gain = tl.load(adjustment + group, mask=inside, other=0.0)
        hold: tl.constexpr = OBJECTIVE == "group_dro_hold"
        coefficient, new_weight, share = _group_dro(sums, counts, weight, gain, step_size, hold)
    else:
        tl.static_assert(OBJECTIVE == "erm", "unknown objective")
        coefficient, new_weight, share = _erm(sums, counts, weight)

    valid = (tl.load(status) == 0) & (tl.load(status + 1) == 0)
    coefficient = tl.where(valid, coefficient, 0.0)
    share = tl.where(valid, share, 0.0)
    total = tl.sum(tl.where(counts > 0, coefficient * sums, 0.0), axis=0)
    tl.store(loss, tl.where(valid, total, float("nan")))
    tl.store(coefficients + group, coefficient, mask=inside)
    tl.store(q + group, tl.where(valid, new_weight, weight), mask=inside)
    shares = stats + 3 * (G + 2)
    tl.store(shares + group, share, mask=inside)
    tl.store(shares + G, 0.0)
    tl.store(shares + G + 1, tl.sum(share, axis=0))


@triton.jit(do_not_specialize=["N", "G"])
def row_scale(
    coefficients,  # [G] acc
    outcome,  # [N] uint8
    groups,  # [N] int64 ids or [N, G] bool mask
    scale,  # out [N] acc
    N,
    G,
    IS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum of the coefficients of each row's groups; 0 for a row without label or group."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    counted = tl.load(outcome + rows, mask=rows < N, other=IGNORED) <= HIT
    if IS_MASK:
        value = tl.zeros([ROWS], tl.float32)
        for start in range(0, G, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            member = _mask_tile(groups, rows, counted, columns, G)
            coefficient = tl.load(coefficients + columns, mask=columns < G, other=0.0)
            value += tl.sum(tl.where(member, coefficient[None, :], 0.0), axis=1)
    else:
        group = tl.load(groups + rows, mask=counted, other=-1)
        value = tl.load(coefficients + group, mask=(group >= 0) & (group < G), other=0.0)
    tl.store(scale + rows, value, mask=rows < N)
