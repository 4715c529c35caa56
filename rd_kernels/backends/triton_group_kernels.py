"""Triton kernels of steps 2 and 3: sums by group, the objective, each row's factor.

The bodies are functions of their own: a forward over the rows runs them in its last programs (triton_kernels).
Sums are taken in float64: one of float32 values no more than a factor of 2^16 apart is exact there, so that two
kernels that sum in another order, because other threads share the work, still round to the same float32.
What another program of the same kernel has stored is loaded past the first-level cache (".cg"). Letters: N rows,
G groups; a chunk is a run of rows that one program sums. ``acc`` is float32.
"""

import triton
import triton.language as tl

from rd_kernels.backends import interface

HIT = tl.constexpr(interface.HIT)
IGNORED = tl.constexpr(interface.IGNORED)
BAD_LABEL = tl.constexpr(interface.BAD_LABEL)


@triton.jit
def _mask_tile(groups, rows, counted, columns, G):
    """[ROWS, COLUMNS] of the bool mask [N, G]; False beyond G and for rows that do not count."""
    inside = counted[:, None] & (columns < G)[None, :]
    return tl.load(groups + rows[:, None] * G + columns[None, :], mask=inside, other=0) != 0


@triton.jit
def reduce_chunk(
    row_loss,  # [N] acc
    outcome,  # [N] uint8
    groups,  # [N] int64 ids or [N, G] bool mask
    partials,  # out [chunks, 3, G+2] acc: loss sum, rows, hits
    bad,  # out [chunks, 2] int32: labels, group ids out of range
    chunk,
    chunk_rows,
    tile,
    N,
    G,
    IS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over a chunk's rows, ROWS at a time, for a tile of COLUMNS columns: the groups, then ungrouped, then all."""
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    counts = tl.zeros([ROWS, COLUMNS], tl.int32)
    hits = tl.zeros([ROWS, COLUMNS], tl.int32)
    bad_labels = tl.zeros([ROWS], tl.int32)
    bad_groups = tl.zeros([ROWS], tl.int32)
    # Only the program that owns the column "ungrouped" has to see a row's whole mask.
    owns_ungrouped = (tile * COLUMNS <= G) & ((tile + 1) * COLUMNS > G)
    for start in range(0, chunk_rows, ROWS):
        rows = chunk.to(tl.int64) * chunk_rows + start + tl.arange(0, ROWS)
        result = tl.load(outcome + rows, mask=rows < N, other=IGNORED, cache_modifier=".cg")
        loss = tl.load(row_loss + rows, mask=rows < N, other=0.0, cache_modifier=".cg")
        counted = result <= HIT
        if IS_MASK:
            member = _mask_tile(groups, rows, counted, columns, G)
            in_a_group = tl.max(member.to(tl.int32), axis=1)
            for first in range(0, tl.where(owns_ungrouped, tile * COLUMNS, 0), COLUMNS):
                other = _mask_tile(groups, rows, counted, first + tl.arange(0, COLUMNS), G)
                in_a_group = tl.maximum(in_a_group, tl.max(other.to(tl.int32), axis=1))
            member = member | ((in_a_group == 0)[:, None] & (columns == G)[None, :])
        else:
            group = tl.load(groups + rows, mask=rows < N, other=-1)  # not of counted: all three at once
            bad_id = counted & ((group < -1) | (group >= G))
            bad_groups += bad_id.to(tl.int32)
            column = tl.where(group == -1, G, tl.where(bad_id, -1, group))
            member = column[:, None] == columns[None, :]
        member = (member | (columns == G + 1)[None, :]) & counted[:, None]
        # where, not a product: 0 * NaN would spread one row's NaN to every group.
        sums += tl.where(member, loss[:, None], 0.0).to(tl.float64)
        counts += member.to(tl.int32)
        hits += (member & (result == HIT)[:, None]).to(tl.int32)
        bad_labels += (result == BAD_LABEL).to(tl.int32)

    out = partials + chunk.to(tl.int64) * 3 * (G + 2) + columns
    inside = columns < G + 2
    tl.store(out, tl.sum(sums, axis=0), mask=inside)
    tl.store(out + (G + 2), tl.sum(counts, axis=0), mask=inside)
    tl.store(out + 2 * (G + 2), tl.sum(hits, axis=0), mask=inside)
    tl.store(bad + chunk.to(tl.int64) * 2, tl.sum(bad_labels, axis=0), mask=tile == 0)
    tl.store(bad + chunk.to(tl.int64) * 2 + 1, tl.sum(bad_groups, axis=0), mask=tile == 0)


@triton.jit
def add_chunks(
    partials,  # [chunks, 3, G+2] acc
    bad,  # [chunks, 2] int32
    stats,  # out [4, G+2] acc
    status,  # out [2] int64
    statistic,
    tile,
    chunks,
    G,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of one row of the statistics: the chunks' sums added up, CHUNKS at a time; the weights, row 3: zeros."""
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < G + 2
    sums = tl.zeros([CHUNKS, COLUMNS], tl.float64)
    bad_labels = tl.zeros([CHUNKS], tl.int32)
    bad_groups = tl.zeros([CHUNKS], tl.int32)
    first = (tile == 0) & (statistic == 0)
    for start in range(0, tl.where(statistic < 3, chunks, 0), CHUNKS):
        chunk = (start + tl.arange(0, CHUNKS)).to(tl.int64)
        present = chunk < chunks
        places = (chunk * 3 + statistic)[:, None] * (G + 2) + columns[None, :]
        mask = present[:, None] & inside[None, :]
        sums += tl.load(partials + places, mask=mask, other=0.0, cache_modifier=".cg")
        bad_labels += tl.load(bad + chunk * 2, mask=present, other=0, cache_modifier=".cg")
        bad_groups += tl.load(bad + chunk * 2 + 1, mask=present, other=0, cache_modifier=".cg")
    tl.store(stats + statistic * (G + 2) + columns, tl.sum(sums, axis=0), mask=inside)
    tl.store(status, tl.sum(bad_labels, axis=0), mask=first)
    tl.store(status + 1, tl.sum(bad_groups, axis=0), mask=first)


@triton.jit
def _groups_of(stats, q, adjustment, start, G, step_size, HOLD: tl.constexpr, BLOCK: tl.constexpr):
    """-> loss sums, row counts, q of the groups from ``start`` on [BLOCK]; which are present; which of them the
    update of Group DRO changes; their new q's logarithm, not normalised, -inf for the others. All float64."""
    group = start + tl.arange(0, BLOCK)
    inside = group < G
    sums = tl.load(stats + group, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
    counts = tl.load(stats + (G + 2) + group, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
    weight = tl.load(q + group, mask=inside, other=0.0).to(tl.float64)
    present = counts > 0
    gain = sums / tl.where(present, counts, 1.0)
    if adjustment is not None:
        gain += tl.load(adjustment + group, mask=inside, other=0.0)
    changed = inside
    if HOLD:
        changed = present
    log_weight = tl.log(weight) + tl.where(present, step_size * gain, 0.0)
    return sums, counts, weight, present, changed, tl.where(changed, log_weight, float("-inf"))


@triton.jit
def update_objective(
    stats,  # [4, G+2] acc; row 3 is written
    status,  # [2] int64
    q,  # [G] acc, updated
    adjustment,  # [G] acc or None
    loss,  # out [] acc
    coefficients,  # out [G] acc
    G,
    step_size,  # float64
    OBJECTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The objective's new state, each group's coefficient, and the loss, BLOCK groups at a time; in float64.

    "erm": coefficients 1 / sum(n), shares n_g / sum(n). "group_dro": online exponentiated gradient in log space
    (Sagawa et al. 2020, Alg. 1), coefficients q_g / n_g; with "_hold" absent groups keep their weight, those present
    share what they had together.
    """
    HOLD: tl.constexpr = OBJECTIVE == "group_dro_hold"
    tl.static_assert(HOLD or OBJECTIVE == "group_dro" or OBJECTIVE == "erm", "unknown objective")
    rows = tl.zeros([BLOCK], tl.float64)
    shared = tl.zeros([BLOCK], tl.float64)
    largest = tl.full([BLOCK], float("-inf"), tl.float64)
    infinite = tl.zeros([BLOCK], tl.int32)
    for start in range(0, G, BLOCK):
        sums, counts, weight, present, changed, log_weight = _groups_of(
            stats, q, adjustment, start, G, step_size, HOLD, BLOCK
        )
        rows += counts
        shared += tl.where(changed, weight, 0.0)
        largest = tl.maximum(largest, log_weight)
        infinite |= (present & ~(tl.abs(sums) < float("inf"))).to(tl.int32)
    rows, shared, largest = tl.sum(rows, axis=0), tl.sum(shared, axis=0), tl.max(largest, axis=0)

    norm = tl.zeros([BLOCK], tl.float64)
    if OBJECTIVE != "erm":
        for start in range(0, G, BLOCK):
            _, _, _, _, _, log_weight = _groups_of(stats, q, adjustment, start, G, step_size, HOLD, BLOCK)
            norm += tl.exp(log_weight - largest)
    norm = tl.sum(norm, axis=0)

    valid = (tl.load(status, cache_modifier=".cg") == 0) & (tl.load(status + 1, cache_modifier=".cg") == 0)
    # Kept where no group is present or a mean is not finite: one bad batch must not destroy the state.
    usable = valid & (rows > 0) & (tl.max(infinite, axis=0) == 0)
    mass = 1.0
    if HOLD:
        usable = usable & (shared > 0)
        mass = shared
    total = tl.zeros([BLOCK], tl.float64)
    total_share = tl.zeros([BLOCK], tl.float64)
    for start in range(0, G, BLOCK):
        sums, counts, weight, present, changed, log_weight = _groups_of(
            stats, q, adjustment, start, G, step_size, HOLD, BLOCK
        )
        # Where there are more threads than groups, several hold a group and one of them stores: all have read first.
        tl.debug_barrier()
        group = start + tl.arange(0, BLOCK)
        if OBJECTIVE == "erm":
            coefficient = tl.where(rows > 0, 1.0 / tl.where(rows > 0, rows, 1.0), 0.0) + tl.zeros_like(counts)
            share = coefficient * counts
        else:
            updated = mass * tl.exp(log_weight - largest) / norm
            share = tl.where(usable & changed, updated, weight).to(tl.float32).to(tl.float64)
            coefficient = tl.where(present, share / tl.where(present, counts, 1.0), 0.0)
            tl.store(q + group, share, mask=group < G)
        coefficient = tl.where(valid, coefficient, 0.0)
        share = tl.where(valid, share, 0.0)
        tl.store(coefficients + group, coefficient, mask=group < G)
        tl.store(stats + 3 * (G + 2) + group, share, mask=group < G)
        total += tl.where(present, coefficient * sums, 0.0)
        total_share += share
    tl.store(loss, tl.where(valid, tl.sum(total, axis=0), float("nan")))
    tl.store(stats + 3 * (G + 2) + G, 0.0)
    tl.store(stats + 3 * (G + 2) + G + 1, tl.sum(total_share, axis=0))


@triton.jit
def _arrives_last(counter, expected):
    """True in the program that is the last of ``expected`` to come here; the counter is 0 again then.

    What the others stored before they came can be loaded after: the barrier puts every thread's stores before the
    addition, which releases them to the GPU and acquires those of the programs before it; the addition's result
    reaches the other threads over a barrier. An exchange, no store, resets the counter, since it is accessed
    atomically only.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
    return last


@triton.jit
def finish_groups(
    row,  # int64, whose results this program has stored
    row_loss,  # [N] acc
    outcome,  # [N] uint8
    groups,  # [N] int64 ids or [N, G] bool mask
    q,  # [G] acc, updated
    adjustment,  # [G] acc or None
    partials,  # scratch [chunks, 3, G+2] acc
    bad,  # scratch [chunks, 2] int32
    counters,  # [1 + chunks] int32, zeros, and left so: chunks done, rows done of each chunk
    stats,  # out [4, G+2] acc
    status,  # out [2] int64
    loss,  # out [] acc
    coefficients,  # out [G] acc
    chunk_rows,
    N,
    G,
    step_size,  # float64
    OBJECTIVE: tl.constexpr,
    IS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Steps 2 and 3 at the end of a program for one row: the last of a chunk sums it, the last chunk the rest.

    All columns are one tile: G + 2 <= COLUMNS.
    """
    chunk = row // chunk_rows
    chunks = tl.cdiv(N, chunk_rows)
    if _arrives_last(counters + 1 + chunk, tl.minimum(N - chunk * chunk_rows, chunk_rows)):
        reduce_chunk(
            row_loss, outcome, groups, partials, bad, chunk, chunk_rows, 0, N, G, IS_MASK, ROWS, COLUMNS
        )
        if _arrives_last(counters, chunks):
            for statistic in range(3):
                add_chunks(partials, bad, stats, status, statistic, 0, chunks, G, CHUNKS, COLUMNS)
            tl.debug_barrier()
            update_objective(stats, status, q, adjustment, loss, coefficients, G, step_size, OBJECTIVE, BLOCK)


@triton.jit(do_not_specialize=["chunk_rows", "N", "G"])
def group_partials(
    row_loss,  # [N] acc
    outcome,  # [N] uint8
    groups,  # [N] int64 ids or [N, G] bool mask
    partials,  # out [chunks, 3, G+2] acc
    bad,  # out [chunks, 2] int32
    chunk_rows,
    N,
    G,
    IS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (chunk, tile)."""
    chunk, tile = tl.program_id(0), tl.program_id(1)
    reduce_chunk(
        row_loss, outcome, groups, partials, bad, chunk, chunk_rows, tile, N, G, IS_MASK, ROWS, COLUMNS
    )


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
    """Program (tile, row of stats)."""
    tile, statistic = tl.program_id(0), tl.program_id(1)
    add_chunks(partials, bad, stats, status, statistic, tile, chunks, G, CHUNKS, COLUMNS)


@triton.jit(do_not_specialize=["G"])
def group_update(
    stats,  # [4, G+2] acc; row 3 is written
    status,  # [2] int64
    q,  # [G] acc, updated
    adjustment,  # [G] acc or None
    loss,  # out [] acc
    coefficients,  # out [G] acc
    G,
    step_size: tl.float64,  # a float32 would round it, and overflow
    OBJECTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program."""
    update_objective(stats, status, q, adjustment, loss, coefficients, G, step_size, OBJECTIVE, BLOCK)


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
