"""The Triton kernel of step 3: from a batch's statistics to the groups' weights, by the rules of :mod:`rd_kernels.rules`.

Its body is a function of its own, which the one-launch forward runs in its last program: what another program of the
same kernel has stored is loaded past the first-level cache (".cg"). Letters: G groups. ``acc`` is float32.
"""

import triton
import triton.language as tl


@triton.jit
def _groups_of(stats, q, adjustment, start, G, rate, RULE: tl.constexpr, BLOCK: tl.constexpr):
    """-> loss sums, row counts, prior weights and scores of the groups from ``start`` on, [BLOCK] float64.

    Weights are proportional to exp(score), of "erm" to the prior, of "worst_group" to the prior of the largest score.
    A group of score -inf gets none, or keeps what it has.
    """
    group = start + tl.arange(0, BLOCK)
    inside = group < G
    sums = tl.load(stats + group, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
    counts = tl.load(stats + (G + 2) + group, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
    present = counts > 0
    score = sums / tl.where(present, counts, 1.0)
    if RULE == "group_dro" or RULE == "group_dro_hold":
        prior = tl.load(q + group, mask=inside, other=0.0).to(tl.float64)
        if adjustment is not None:
            score += tl.load(adjustment + group, mask=inside, other=0.0)
        score = tl.log(prior) + tl.where(present, rate * score, 0.0)
        weighted = present if RULE == "group_dro_hold" else inside
    else:
        prior = counts if RULE == "erm" or RULE == "tilted_rows" else present.to(tl.float64)
        if RULE == "tilted_rows" or RULE == "tilted_groups":
            score *= rate
        if RULE == "tilted_rows":
            score += tl.log(counts)
        weighted = present
    return sums, counts, prior, tl.where(weighted, score, float("-inf"))


@triton.jit
def _unnormalised(prior, score, largest, infinite, RULE: tl.constexpr):
    """Weights before they are divided by their sum; of a rule without state the prior where a mean is not finite."""
    if RULE == "worst_group":
        prior = tl.where((score == largest) | infinite, prior, 0.0)
    elif RULE == "tilted_rows" or RULE == "tilted_groups":
        prior = tl.where(infinite, prior, tl.exp(score - largest))
    elif RULE != "erm":
        prior = tl.exp(score - largest)
    return prior


@triton.jit
def apply_rule(
    stats,  # [4, G+2] acc; row 3 is written
    status,  # [2] int64
    q,  # [G] acc, updated
    adjustment,  # [G] acc or None
    loss,  # out [] acc
    coefficients,  # out [G] acc
    G,
    rate,  # float64
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The new state, each group's coefficient, and the loss, BLOCK groups at a time; in float64.

    The rules are defined in :mod:`rd_kernels.rules`: weights w on the groups, coefficients w_g / n_g.
    """
    HOLD: tl.constexpr = RULE == "group_dro_hold"
    STATE: tl.constexpr = HOLD or RULE == "group_dro"
    TILTED: tl.constexpr = RULE == "tilted_rows" or RULE == "tilted_groups"
    tl.static_assert(STATE or TILTED or RULE == "erm" or RULE == "worst_group", "unknown rule")
    rows = tl.zeros([BLOCK], tl.float64)
    shared = tl.zeros([BLOCK], tl.float64)
    largest = tl.full([BLOCK], float("-inf"), tl.float64)
    infinite = tl.zeros([BLOCK], tl.int32)
    for start in range(0, G, BLOCK):
        sums, counts, prior, score = _groups_of(stats, q, adjustment, start, G, rate, RULE, BLOCK)
        rows += counts
        shared += tl.where(score != float("-inf"), prior, 0.0)
        largest = tl.maximum(largest, score)
        infinite |= ((counts > 0) & ~(tl.abs(sums) < float("inf"))).to(tl.int32)
    rows, shared, largest = tl.sum(rows, axis=0), tl.sum(shared, axis=0), tl.max(largest, axis=0)
    infinite = tl.max(infinite, axis=0) > 0
    if TILTED:
        largest = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)

    norm = rows
    if RULE != "erm":
        weights = tl.zeros([BLOCK], tl.float64)
        for start in range(0, G, BLOCK):
            _, _, prior, score = _groups_of(stats, q, adjustment, start, G, rate, RULE, BLOCK)
            weights += _unnormalised(prior, score, largest, infinite, RULE)
        norm = tl.sum(weights, axis=0)

    valid = (tl.load(status, cache_modifier=".cg") == 0) & (tl.load(status + 1, cache_modifier=".cg") == 0)
    # Kept where no group is present or a mean is not finite: one bad batch must not destroy the state.
    usable = valid & (rows > 0) & ~infinite
    mass = 1.0
    if HOLD:
        usable = usable & (shared > 0)
        mass = shared
    scale = tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)
    total = tl.zeros([BLOCK], tl.float64)
    total_share = tl.zeros([BLOCK], tl.float64)
    for start in range(0, G, BLOCK):
        sums, counts, prior, score = _groups_of(stats, q, adjustment, start, G, rate, RULE, BLOCK)
        # Where there are more threads than groups, several hold a group and one of them stores: all have read first.
        tl.debug_barrier()
        group = start + tl.arange(0, BLOCK)
        present = counts > 0
        share = _unnormalised(prior, score, largest, infinite, RULE)
        if STATE:
            updated = mass * share / norm
            share = tl.where(usable & (score != float("-inf")), updated, prior).to(tl.float32).to(tl.float64)
            tl.store(q + group, share, mask=group < G)
        else:
            share *= scale
        coefficient = scale if RULE == "erm" else share / tl.where(present, counts, 1.0)
        coefficient = tl.where(present & valid, coefficient, 0.0)
        share = tl.where(valid, share, 0.0)
        tl.store(coefficients + group, coefficient, mask=group < G)
        tl.store(stats + 3 * (G + 2) + group, share, mask=group < G)
        total += tl.where(present, coefficient * sums, 0.0)
        total_share += share
    tl.store(loss, tl.where(valid, tl.sum(total, axis=0), float("nan")))
    tl.store(stats + 3 * (G + 2) + G, 0.0)
    tl.store(stats + 3 * (G + 2) + G + 1, tl.sum(total_share, axis=0))


@triton.jit(do_not_specialize=["G"])
def group_update(
    stats,  # [4, G+2] acc; row 3 is written
    status,  # [2] int64
    q,  # [G] acc, updated
    adjustment,  # [G] acc or None
    loss,  # out [] acc
    coefficients,  # out [G] acc
    G,
    rate: tl.float64,  # a float32 would round it, and overflow
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program."""
    apply_rule(stats, status, q, adjustment, loss, coefficients, G, rate, RULE, BLOCK)
