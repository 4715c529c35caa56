"""Triton kernels of the groups: sums by group, each row's factor, masks packed.

The bodies are functions of their own: a forward over the rows runs them in its last programs (triton_kernels).
Sums are taken in float64: one of float32 values no more than a factor of 2^16 apart is exact there, so that two
kernels that sum in another order, because other threads share the work, still round to the same float32.
What another program of the same kernel has stored is loaded past the first-level cache (".cg"). Letters: N rows,
G groups; a chunk is a run of rows that one program sums. ``acc`` is float32. ``groups`` [N, width] are int64 ids (-1:
none), or with BITS int32 words, bit g % 32 of word g / 32 set where the row is in group g, none beyond G.
"""

import triton
import triton.language as tl

from rd_kernels.backends import interface
from rd_kernels.backends.triton_rule_kernels import apply_rule

HIT = tl.constexpr(interface.HIT)
IGNORED = tl.constexpr(interface.IGNORED)
BAD_LABEL = tl.constexpr(interface.BAD_LABEL)


@triton.jit
def _member_bits(groups, rows, readable, columns, width):
    """[ROWS, COLUMNS]: which of the rows are in which of the groups ``columns``, from words of bits."""
    inside = readable[:, None] & (columns // 32 < width)[None, :]
    words = tl.load(groups + rows[:, None] * width + (columns // 32)[None, :], mask=inside, other=0)
    return (words >> (columns % 32)[None, :]) & 1 != 0


@triton.jit
def reduce_chunk(
    row_loss,  # [N] acc
    outcome,  # [N] uint8
    groups,  # [N, width]
    partials,  # out [chunks, 3, G+2] acc: loss sum, rows, hits
    bad,  # out [chunks, 2] int32: labels, group ids out of range
    chunk,
    chunk_rows,
    tile,
    N,
    G,
    width,
    BITS: tl.constexpr,
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
    # Only the program that owns the column "ungrouped" has to see all of a row's words.
    owns_ungrouped = (tile * COLUMNS <= G) & ((tile + 1) * COLUMNS > G)
    for start in range(0, chunk_rows, ROWS):
        rows = chunk.to(tl.int64) * chunk_rows + start + tl.arange(0, ROWS)
        # None of the loads waits for another: what a row that does not count holds is masked out later.
        result = tl.load(outcome + rows, mask=rows < N, other=IGNORED, cache_modifier=".cg")
        loss = tl.load(row_loss + rows, mask=rows < N, other=0.0, cache_modifier=".cg")
        counted = result <= HIT
        named = tl.zeros([ROWS], tl.int32)  # not 0: in some group, or meant to be
        if BITS:
            member = _member_bits(groups, rows, rows < N, columns, width)
            for place in range(tl.where(owns_ungrouped, width, 0)):
                named |= tl.load(groups + rows * width + place, mask=rows < N, other=0)
        else:
            # Numbers, as AMD's compiler keeps what is true or false in too few registers.
            found = tl.zeros([ROWS, COLUMNS], tl.int32)
            bad_id = tl.zeros([ROWS], tl.int32)
            for place in range(width):
                group = tl.load(groups + rows * width + place, mask=rows < N, other=-1)
                outside = (group < -1) | (group >= G)
                found |= (tl.where(outside, -1, group)[:, None] == columns[None, :]).to(tl.int32)
                bad_id |= outside.to(tl.int32)
                named |= (group != -1).to(tl.int32)
            member = found != 0
            bad_groups += tl.where(counted, bad_id, 0)
        member = (member | (columns[None, :] >= tl.where(named != 0, G + 1, G)[:, None])) & counted[:, None]
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
    groups,  # [N, width]
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
    width,
    rate,  # float64
    RULE: tl.constexpr,
    BITS: tl.constexpr,
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
            row_loss, outcome, groups, partials, bad, chunk, chunk_rows, 0, N, G, width, BITS, ROWS, COLUMNS
        )
        if _arrives_last(counters, chunks):
            for statistic in range(3):
                add_chunks(partials, bad, stats, status, statistic, 0, chunks, G, CHUNKS, COLUMNS)
            tl.debug_barrier()
            apply_rule(stats, status, q, adjustment, loss, coefficients, G, rate, RULE, BLOCK)


@triton.jit(do_not_specialize=["chunk_rows", "N", "G"])
def group_partials(
    row_loss,  # [N] acc
    outcome,  # [N] uint8
    groups,  # [N, width]
    partials,  # out [chunks, 3, G+2] acc
    bad,  # out [chunks, 2] int32
    chunk_rows,
    N,
    G,
    width,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (chunk, tile)."""
    chunk, tile = tl.program_id(0), tl.program_id(1)
    reduce_chunk(
        row_loss, outcome, groups, partials, bad, chunk, chunk_rows, tile, N, G, width, BITS, ROWS, COLUMNS
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


@triton.jit(do_not_specialize=["N", "G"])
def row_scale(
    coefficients,  # [G] acc
    outcome,  # [N] uint8
    groups,  # [N, width]
    scale,  # out [N] acc
    N,
    G,
    width,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum of the coefficients of each row's groups; 0 for a row without label or group."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    counted = tl.load(outcome + rows, mask=rows < N, other=IGNORED) <= HIT
    value = tl.zeros([ROWS], tl.float32)
    if BITS:
        for start in range(0, G, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            member = _member_bits(groups, rows, counted, columns, width)
            coefficient = tl.load(coefficients + columns, mask=columns < G, other=0.0)
            value += tl.sum(tl.where(member, coefficient[None, :], 0.0), axis=1)
    else:
        for place in range(width):
            group = tl.load(groups + rows * width + place, mask=counted, other=-1)
            new = (group >= 0) & (group < G)
            for earlier in range(place):
                new &= tl.load(groups + rows * width + earlier, mask=counted, other=-1) != group
            value += tl.load(coefficients + group, mask=new, other=0.0)
    tl.store(scale + rows, value, mask=rows < N)


@triton.jit(do_not_specialize=["words"])
def pack_mask(
    mask,  # [M, G] bool, contiguous
    packed,  # out [M, width] int32, or [words]
    words,  # M width
    G,
    width,  # G / 32, rounded up
    WORDS: tl.constexpr,
):
    """WORDS words a program."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    group = (word % width * 32)[:, None] + bit[None, :]
    inside = (word < words)[:, None] & (group < G)
    member = tl.load(mask + (word // width * G)[:, None] + group, mask=inside, other=0) != 0
    tl.store(packed + word, tl.xor_sum(member.to(tl.int32) << bit[None, :], axis=1), mask=word < words)
