"""The mathematics of the objectives: solvers and published updates as oracles, limits, invariants, bad input."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize, minimize_scalar
from scipy.special import logsumexp, softmax

import rd_kernels as rd
from tests.oracles import PublishedDoReMi, PublishedGroupDRO

BATCHES = st.lists(
    st.tuples(st.integers(0, 9), st.floats(0, 12, allow_subnormal=False)), min_size=1, max_size=7
).filter(lambda groups: any(count for count, _ in groups))
BASES = st.sampled_from(["rows", "groups"])

STATELESS = [
    rd.ERM(),
    rd.WorstGroup(),
    *(
        objective
        for base in ("rows", "groups")
        for objective in (
            rd.Tilted(0.7, base),
            rd.Tilted(-3.0, base),
            rd.CVaR(0.3, base),
            rd.ChiSquare(0.2, base),
            rd.KL(0.2, base),
        )
    ),
]
STATEFUL = [
    rd.GroupDRO(0.1),
    rd.GroupDRO(0.1, 2.0, [100, 50, 7, 3, 1], "hold"),
    rd.GroupDRO(0.1, [1.0, 0.0, 3.0, 2.0, 0.5], [100, 50, 7, 3, 1], "hold", loss_ema=0.3, floor=0.05),
    rd.GroupDRO(0.1, loss_ema=0.3, floor=0.05),
    rd.DoReMi(0.5, 0.01),
]


def arrays(groups):
    """Counts and mean losses, float64 [G]."""
    counts, means = (np.array(column, dtype=np.float64) for column in zip(*groups, strict=True))
    return counts, means


def batch_of(counts, means, adjustment=None):
    """With half of each mean loss as the excess."""
    counts, means = (torch.as_tensor(each, dtype=torch.float64) for each in (counts, means))
    sums = torch.where(counts > 0, counts * means, 0)
    return rd.Batch(sums, counts, sums / 2, adjustment)


def start(objective, num_groups):
    """q and memory before the first batch."""
    q = torch.full((num_groups,), 1 / num_groups, dtype=torch.float64)
    return q, objective.initial_memory(num_groups)


def weights_of(objective, counts, means):
    """Of an objective without state, float64 [G]."""
    weights, q, memory = objective.update(batch_of(counts, means), *start(objective, len(counts)))
    assert q is None or torch.equal(q, start(objective, len(counts))[0])
    assert memory is None
    return weights.numpy()


def base(counts, kind):
    size = counts if kind == "rows" else (counts > 0).astype(float)
    return size / size.sum()


@settings(deadline=None, max_examples=200)
@given(groups=BATCHES, alpha=st.floats(0.01, 1), kind=BASES)
def test_cvar_solves_its_linear_program(groups, alpha, kind):
    counts, means = arrays(groups)
    shares = base(counts, kind)
    weights = weights_of(rd.CVaR(alpha, kind), counts, means)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    assert (weights <= shares / alpha + 1e-12).all()
    solved = linprog(
        -means,
        A_eq=np.ones((1, len(means))),
        b_eq=[1],
        bounds=[(0, share / alpha) for share in shares],
        method="highs",
        # Its own 1e-7 calls losses that differ by less the same.
        options={"dual_feasibility_tolerance": 1e-10, "primal_feasibility_tolerance": 1e-10},
    )
    assert weights @ means == pytest.approx(-solved.fun, abs=1e-8)


def test_cvar_over_rows_against_the_published_sum():
    """Levy et al. 2020: the floor(alpha m) largest losses get 1 / (alpha m) each, the next one what is left."""
    losses = np.random.default_rng(0).gamma(2, size=53)
    for alpha in (0.05, 0.2, 0.77, 1.0):
        size = alpha * len(losses)
        taken, descending = int(size), np.argsort(-losses)
        expected = np.zeros(len(losses))
        expected[descending[:taken]] = 1 / size
        expected[descending[taken : taken + 1]] = 1 - taken / size
        weights = weights_of(rd.CVaR(alpha, over="rows"), np.ones(len(losses)), losses)
        np.testing.assert_allclose(weights, expected, atol=1e-14)


def test_groups_that_tie_share():
    counts, means = np.array([1.0, 3.0, 4.0, 2.0]), np.array([5.0, 5.0, 1.0, 5.0])
    worst = np.array([1, 3, 0, 2]) / 6
    for objective in (rd.CVaR(0.2), rd.CVaR(0.6), rd.KL(5.0), rd.ChiSquare(5.0)):
        np.testing.assert_allclose(weights_of(objective, counts, means), worst)
    np.testing.assert_allclose(weights_of(rd.WorstGroup(), counts, means), [1 / 3, 1 / 3, 0, 1 / 3])


@settings(deadline=None, max_examples=100)
@given(groups=BATCHES, rho=st.floats(0, 3), kind=BASES)
def test_chi_square_is_the_worst_of_its_ball(groups, rho, kind):
    counts, means = arrays(groups)
    shares = base(counts, kind)
    weights = weights_of(rd.ChiSquare(rho, kind), counts, means)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    assert not weights[counts == 0].any()
    there = shares > 0
    p, m = shares[there], means[there]

    def divergence(w):
        return 0.5 * (p * (w / p - 1) ** 2).sum()

    assert divergence(weights[there]) <= rho + 1e-7
    solved = minimize(
        lambda w: -(w @ m), p, jac=lambda w: -m, bounds=[(0, 1)] * len(p), method="SLSQP",
        constraints=[
            {"type": "eq", "fun": lambda w: w.sum() - 1},
            {"type": "ineq", "fun": lambda w: rho - divergence(w)},
        ],
        options={"ftol": 1e-12, "maxiter": 1000},
    )  # fmt: skip
    feasible = divergence(solved.x) <= rho + 1e-7 and abs(solved.x.sum() - 1) < 1e-7
    if feasible:  # the solver sometimes gives up; nothing feasible may be worse than ours
        assert weights @ means >= -solved.fun - 1e-5


@pytest.mark.parametrize("over", ["rows", "groups"])
def test_chi_square_against_the_published_bisection(over):
    """The best response of Levy et al. 2020 over rows: p_i proportional to max(v_i - eta, 0), eta by bisection."""
    losses = np.random.default_rng(0).gamma(2, size=50)
    for rho in (0.01, 0.1, 1.0, 10.0):
        low, high = losses.max() - 1e3 * np.ptp(losses), losses.max()
        for _ in range(200):
            eta = (low + high) / 2
            p = np.maximum(losses - eta, 0)
            p /= p.sum()
            low, high = (low, eta) if 0.5 * ((50 * p - 1) ** 2).mean() > rho else (eta, high)
        weights = weights_of(rd.ChiSquare(rho, over=over), np.ones(50), losses)
        np.testing.assert_allclose(weights, p, atol=1e-9)


def divergence_of(weights, shares):
    """KL(w || p) to 50 digits, in a form that a sum of w off by a rounding does not disturb."""
    with localcontext() as context:
        context.prec = 50
        total = Decimal(0)
        for w, p in zip(map(Decimal, weights.tolist()), map(Decimal, shares.tolist()), strict=True):
            if p:
                total += p - w + (w * (w / p).ln() if w else 0)
        return float(total)


@settings(deadline=None, max_examples=100)
@given(groups=BATCHES, rho=st.floats(1e-6, 3), kind=BASES)
def test_kl_attains_the_dual_bound(groups, rho, kind):
    """No mixture in the ball can exceed  min over t > 0 of (rho + log sum p exp(t m)) / t  (Hu and Hong 2013)."""
    counts, means = arrays(groups)
    shares = base(counts, kind)
    weights = weights_of(rd.KL(rho, kind), counts, means)
    assert weights.sum() == pytest.approx(1, abs=1e-14)
    assert (weights >= 0).all()
    assert divergence_of(weights, shares) <= rho * (1 + 1e-9)
    there = shares > 0

    def bound(log_t):
        return (rho + logsumexp(math.exp(log_t) * means[there], b=shares[there])) / math.exp(log_t)

    nearest = min(np.linspace(-20, 40, 121), key=bound)  # quasi-convex: the least is beside it
    least = minimize_scalar(
        bound, bounds=(nearest - 0.5, nearest + 0.5), method="bounded", options={"xatol": 1e-10}
    ).fun
    assert weights @ means == pytest.approx(least, abs=1e-7)


@pytest.mark.parametrize("over", ["groups", "rows"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e38])
@pytest.mark.parametrize("rho", [1e-12, 1e-8, 1e-3, 0.3, 3.0, 4.6])
def test_kl_reaches_its_radius(rho, scale, over):
    """Up to log 100 = 4.605, where all is on one row; in losses of every scale, the worst of which nearly tie."""
    losses = np.random.default_rng(1).gamma(2, size=100)
    losses[:2] = losses.max() * np.array([2, 2 + 1e-9])
    weights = weights_of(rd.KL(rho, over=over), np.ones(100), scale * losses)
    assert divergence_of(weights, np.full(100, 0.01)) == pytest.approx(rho, rel=1e-7)


@settings(deadline=None, max_examples=100)
@given(groups=BATCHES, t=st.floats(-5, 5), kind=BASES)
def test_tilted_is_a_softmax_and_the_worst_of_the_ball_it_reaches(groups, t, kind):
    counts, means = arrays(groups)
    shares = base(counts, kind)
    with np.errstate(divide="ignore"):
        expected = softmax(np.log(shares) + t * means)
    weights = weights_of(rd.Tilted(t, kind), counts, means)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    rho = divergence_of(weights, shares)
    if t > 0 and rho > 1e-9:
        ball = weights_of(rd.KL(rho, kind), counts, means)
        assert ball @ means == pytest.approx(weights @ means, abs=1e-7)


@pytest.mark.parametrize("t", [-2.0, 0.5, 3.0])
def test_tilted_has_the_gradient_of_term(t):
    """And the value is larger than TERM's by KL(w || p) / t, as the docstring says."""
    counts, means = np.array([3.0, 5.0, 2.0]), np.array([1.0, 4.0, 2.5])
    shares = torch.from_numpy(base(counts, "rows"))
    losses = torch.from_numpy(means).requires_grad_()
    term = torch.logsumexp(shares.log() + t * losses, 0) / t
    weights = weights_of(rd.Tilted(t), counts, means)
    np.testing.assert_allclose(weights, torch.autograd.grad(term, losses)[0], rtol=1e-12)
    assert weights @ means == pytest.approx(term.item() + divergence_of(weights, shares) / t, rel=1e-12)


def test_limits():
    counts, means = np.array([3.0, 0.0, 5.0, 2.0]), np.array([1.0, 0.0, 4.0, 2.5])
    erm, worst, best = counts / counts.sum(), np.array([0.0, 0.0, 1.0, 0.0]), np.array([1.0, 0.0, 0.0, 0.0])
    for objective in (rd.ERM(), rd.CVaR(1.0), rd.ChiSquare(0.0), rd.KL(0.0), rd.Tilted(0.0)):
        np.testing.assert_allclose(weights_of(objective, counts, means), erm, rtol=1e-15)
    uniform = np.array([1, 0, 1, 1]) / 3
    for objective in (rd.CVaR(1.0, "groups"), rd.ChiSquare(0.0, "groups"), rd.KL(0.0, "groups")):
        np.testing.assert_allclose(weights_of(objective, counts, means), uniform, rtol=1e-15)
    for objective in (rd.ChiSquare(1e-9), rd.KL(1e-9), rd.Tilted(1e-5)):
        np.testing.assert_allclose(weights_of(objective, counts, means), erm, atol=1e-4)
    for objective in (rd.ChiSquare(1e-300), rd.KL(1e-300), rd.KL(5e-324), rd.Tilted(1e-300)):
        np.testing.assert_allclose(weights_of(objective, counts, means), erm, atol=1e-14)
    all_in = [rd.CVaR(1e-9), rd.CVaR(5e-324), rd.CVaR(0.5), rd.Tilted(1e3), rd.WorstGroup()]
    all_in += [rd.ChiSquare(rho) for rho in (0.5, 1e9, 1e300)]  # from 1/2 (1/0.5 - 1) on
    all_in += [rd.KL(rho) for rho in (math.log(2), 1e9, 1e300)]  # from -log 0.5 on
    for objective in all_in:
        np.testing.assert_allclose(weights_of(objective, counts, means), worst, atol=1e-12)
    assert weights_of(rd.KL(math.log(2) - 1e-3), counts, means)[2] < 1 - 1e-4  # not before
    np.testing.assert_allclose(weights_of(rd.Tilted(-1e3), counts, means), best)
    for objective in (rd.ChiSquare(0.3), rd.KL(0.3), rd.CVaR(0.3)):  # whatever the scale of the losses
        expected = weights_of(objective, counts, means)
        for scale in (1e-300, 1e38):
            np.testing.assert_allclose(weights_of(objective, counts, scale * means), expected, rtol=1e-9)
    for objective in (rd.ChiSquare(0.3), rd.KL(0.3), rd.Tilted(7.0), rd.CVaR(0.3)):
        np.testing.assert_allclose(weights_of(objective, counts, np.full(4, 2.0)), erm)


@pytest.mark.parametrize("kind", [rd.Tilted(0.9), rd.CVaR(0.3), rd.ChiSquare(0.4), rd.KL(0.4)], ids=str)
def test_over_rows_is_over_groups_of_one_row(kind):
    """Rows that do not count, here every fourth, have a count of 0; the order of q has nothing to do with that of rows."""
    losses, counts = torch.rand(40, dtype=torch.float64), (torch.arange(40) % 4 > 0).double()
    over_rows = replace(kind, over="rows")
    assert over_rows.over_rows
    assert over_rows.rule is None
    assert not kind.over_rows
    batch = rd.Batch(losses * counts, counts)
    got = over_rows.update(batch, *start(over_rows, 3))
    assert got.weights.shape == (40,)
    assert got.memory is got.q is None
    assert not got.weights[counts == 0].any()
    together = kind.update(batch, *start(kind, 40))
    torch.testing.assert_close(got.weights, together.weights, rtol=0, atol=0)


# The learned weights.

GROUPS = 4


def random_batch(generator, adjustment=None):
    """Row losses, references and groups with every other group rare, and their statistics."""
    rows = int(generator.integers(1, 9))
    losses, references = generator.gamma(2, size=rows), generator.gamma(2, size=rows)
    groups = generator.choice(GROUPS, size=rows, p=[0.6, 0.25, 0.1, 0.05])
    member = groups[:, None] == np.arange(GROUPS)
    excess = np.maximum(losses - references, 0) @ member
    statistics = [torch.from_numpy(each).double() for each in (losses @ member, member.sum(0), excess)]
    return losses, references, groups, rd.Batch(*statistics, adjustment)


@pytest.mark.parametrize("absent_groups", ["decay", "hold"])
@pytest.mark.parametrize("constant", [0.0, 2.0, [3.0, 0.0, 1.0, 2.0]], ids=str)
@pytest.mark.parametrize(
    ("loss_ema", "floor"), [(None, 0.0), (0.1, 0.0), (1.0, 0.0), (None, 0.04), (0.3, 0.25)]
)
def test_group_dro_follows_the_published_loop(absent_groups, constant, loss_ema, floor):
    sizes = [400, 100, 25, 9]
    objective = rd.GroupDRO(0.2, constant, sizes, absent_groups, loss_ema, floor)
    oracle = PublishedGroupDRO(
        GROUPS, 0.2, constant, sizes, hold_absent=absent_groups == "hold", loss_ema=loss_ema, floor=floor
    )
    generator = np.random.default_rng(0)
    q, memory = start(objective, GROUPS)
    assert memory.shape == (len(objective.memory), GROUPS)
    for _ in range(60):
        losses, _, groups, batch = random_batch(generator, objective.adjustment_for(GROUPS))
        expected = oracle.step(torch.from_numpy(losses), [[group] for group in groups])
        weights, q, learned = objective.update(batch, q, memory)
        memory = memory if learned is None else learned
        assert q.tolist() == pytest.approx(oracle.probabilities, rel=1e-6)  # the adjustment is float32
        assert (weights * batch.means).sum().item() == pytest.approx(expected, rel=1e-6)
        assert q.min() >= floor - 1e-15
        assert q.sum().item() == pytest.approx(1, abs=1e-12)
    if loss_ema is not None:
        seen = [oracle.averages.get(group, math.nan) for group in range(GROUPS)]
        assert memory[0].tolist() == pytest.approx(seen, rel=1e-12, nan_ok=True)


def test_a_measured_gap_is_added_as_it_is():
    """``batch.adjustment`` comes from outside: it need not be the objective's own, and may be negative."""
    gap = torch.tensor([0.5, -0.25, 0.0, 2.0])
    for options in ({}, {"floor": 1e-300}):
        objective = rd.GroupDRO(0.3, **options)
        batch = batch_of([3.0, 1.0, 2.0, 4.0], [1.0, 2.0, 0.5, 0.1], gap)
        q = objective.update(batch, *start(objective, 4)).q
        np.testing.assert_allclose(q, softmax(0.3 * (batch.means + gap).numpy()), rtol=1e-12)


@pytest.mark.parametrize("absent_groups", ["decay", "hold"])
def test_the_rule_of_the_kernels_and_the_update_in_python_agree(absent_groups):
    """An average over one batch and a floor that float64 does not see change nothing but where the rule runs."""
    kernels = rd.GroupDRO(0.3, 1.0, [9, 8, 7, 6], absent_groups)
    python = replace(kernels, loss_ema=1.0, floor=1e-300)
    assert kernels.rule == {"decay": "group_dro", "hold": "group_dro_hold"}[absent_groups]
    assert python.rule is None
    generator = np.random.default_rng(2)
    (q, _), (other, memory) = start(kernels, GROUPS), start(python, GROUPS)
    for _ in range(20):
        *_, batch = random_batch(generator, kernels.adjustment_for(GROUPS))
        q = kernels.update(batch, q, memory[:0]).q
        _, other, memory = python.update(batch, other, memory)
        torch.testing.assert_close(other, q, rtol=1e-12, atol=0)


def test_hold_leaves_absent_groups_bit_for_bit_and_the_floor_brings_groups_back():
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    batch = batch_of([2.0, 0.0, 3.0, 0.0], [1.0, 0.0, 90.0, 0.0])
    held = rd.GroupDRO(1e200, absent_groups="hold", floor=0.05).update(batch, q, q[:0]).q
    torch.testing.assert_close(held, torch.tensor([0.05, 0.2, 0.35, 0.4], dtype=torch.float64))
    assert held[1] == q[1]
    assert held[3] == q[3]
    # A q from elsewhere that breaks the bound: as far up as what the groups present share allows, and still a simplex.
    short = torch.tensor([0.0, 0.5, 0.02, 0.48], dtype=torch.float64)
    held = rd.GroupDRO(1.0, absent_groups="hold", floor=0.05).update(batch, short, q[:0]).q
    torch.testing.assert_close(held, torch.tensor([0.01, 0.5, 0.01, 0.48], dtype=torch.float64))
    for options, expected in (({}, 0.0), ({"floor": 0.01}, 0.01)):
        objective = rd.GroupDRO(1e200, **options)
        first = objective.update(batch, q, q[:0]).q
        assert first.tolist() == pytest.approx([expected, expected, 1 - 3 * expected, expected])
        turned = objective.update(batch_of([2.0, 0.0, 3.0, 0.0], [90.0, 0.0, 1.0, 0.0]), first, q[:0]).q
        assert (turned[0] > 0.9) == bool(options)  # without a floor the group is lost for good


def test_doremi_follows_the_published_loop():
    objective = rd.DoReMi(0.7, 0.02)
    oracle = PublishedDoReMi([1 / GROUPS] * GROUPS, 0.7, 0.02)
    q, memory = start(objective, GROUPS)
    generator = np.random.default_rng(3)
    absent = 0
    for step in range(1, 61):
        losses, references, groups, batch = random_batch(generator)
        expected = oracle.step(losses.tolist(), references.tolist(), groups.tolist())
        weights, q, memory = objective.update(batch, q, memory)
        assert q.tolist() == pytest.approx(oracle.weights, rel=1e-10)
        assert (weights * batch.means).sum().item() == pytest.approx(expected, rel=1e-10)
        assert weights.sum().item() == pytest.approx(1)
        assert not weights[~batch.present].any()
        assert memory[0].tolist() == pytest.approx(oracle.excess, rel=1e-12)
        assert rd.DoReMi.average_weights(memory).tolist() == pytest.approx(oracle.average(), rel=1e-10)
        assert memory[2].tolist() == [step] * GROUPS
        absent += int((~batch.present).sum())
    assert absent > 60  # the loop saw what it is about


def test_doremi_at_its_limits():
    batch = batch_of([3.0, 2.0, 5.0, 0.0], [4.0, 1.0, 2.0, 0.0])
    uniform = rd.DoReMi(1.0, smoothing=1.0)
    weights, q, _ = uniform.update(batch, *start(uniform, 4))
    assert q.tolist() == [0.25] * 4
    np.testing.assert_allclose(weights, [0.3, 0.2, 0.5, 0.0])
    greedy = rd.DoReMi(1e200, smoothing=0.04)
    _, q, _ = greedy.update(batch, *start(greedy, 4))
    np.testing.assert_allclose(q, [0.97, 0.01, 0.01, 0.01])


# What holds for all.


@pytest.mark.parametrize("objective", STATELESS + STATEFUL, ids=str)
def test_the_order_of_the_groups_does_not_matter(objective):
    order = torch.tensor([4, 2, 0, 1, 3])
    moved = objective
    if isinstance(objective, rd.GroupDRO):
        listed = {
            name: [getattr(objective, name)[group] for group in order]
            for name in ("adjustment", "group_counts")
            if isinstance(getattr(objective, name), tuple)
        }
        moved = replace(objective, **listed)
    (q, memory), (moved_q, moved_memory) = start(objective, 5), start(moved, 5)
    for counts, means in (
        ([3.0, 0.0, 5.0, 2.0, 4.0], [1.0, 0.0, 4.0, 2.5, 3.0]),
        ([0.0, 2.0, 5.0, 2.0, 1.0], [0.0, 2.5, 2.5, 0.3, 2.5]),
    ):
        batch = batch_of(counts, means, objective.adjustment_for(5))
        other = rd.Batch(batch.sums[order], batch.counts[order], batch.excess[order], moved.adjustment_for(5))
        one, two = objective.update(batch, q, memory), moved.update(other, moved_q, moved_memory)
        torch.testing.assert_close(two.weights, one.weights[order], rtol=1e-12, atol=1e-15)
        if objective in STATEFUL:
            q, moved_q = one.q, two.q
            torch.testing.assert_close(moved_q, q[order], rtol=1e-12, atol=1e-15)
        if one.memory is not None:
            memory, moved_memory = one.memory, two.memory
            torch.testing.assert_close(moved_memory, memory[:, order], rtol=1e-12, atol=1e-15, equal_nan=True)


EXTREME = [
    rd.Tilted(1e200),
    rd.Tilted(-1e200),
    rd.Tilted(1e200, "groups"),
    rd.CVaR(1e-300),
    rd.ChiSquare(1e300),
    rd.ChiSquare(1e-300),
    rd.KL(1e300),
    rd.KL(1e-300),
    rd.GroupDRO(1e200),
    rd.GroupDRO(1e200, 1e38, [1, 2, 3, 4, 5], "hold"),
    rd.GroupDRO(1e200, loss_ema=0.5, floor=0.1),
    rd.GroupDRO(1e200, absent_groups="hold", floor=0.1),
    rd.DoReMi(1e200, 1e-300),
    rd.DoReMi(1e200),
]


@pytest.mark.parametrize("objective", STATELESS + STATEFUL + EXTREME, ids=str)
@settings(deadline=None, max_examples=30)
@given(
    counts=st.lists(st.sampled_from([0, 1, 7, 10**9]), min_size=5, max_size=5).filter(any),
    means=st.lists(st.sampled_from([0.0, 1e-38, 1.0, 1.0 + 2**-52, 1e10, 1e38]), min_size=5, max_size=5),
)
def test_extreme_losses_and_parameters_leave_a_simplex(objective, counts, means):
    q, memory = start(objective, 5)
    for turn in (1, -1):  # the second batch meets the state that the first one left
        batch = batch_of(counts[::turn], means[::turn], objective.adjustment_for(5))
        weights, new_q, new_memory = objective.update(batch, q, memory)
        for simplex in (weights, new_q):
            if simplex is not None:
                assert (simplex >= 0).all()
                assert simplex.sum().item() == pytest.approx(1, abs=1e-6)
        if not isinstance(objective, rd.GroupDRO):  # there the weights are q
            assert not weights[~batch.present].any()
        if new_q is not None:
            q = new_q.float().double()  # as it is kept
        if new_memory is not None:
            memory = new_memory
            assert (memory.isfinite() | ~batch.present).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("objective", STATELESS + STATEFUL, ids=str)
def test_a_mean_that_is_not_finite(objective, bad):
    """The loss is not finite either, so that it is seen, and the state stays."""
    q, memory = start(objective, 5)
    seen = objective.update(batch_of([2.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]), q, memory)
    q, memory = (now if new is None else new for now, new in ((q, seen.q), (memory, seen.memory)))
    batch = batch_of([2.0, 3.0, 1.0, 0.0, 2.0], [1.0, bad, 2.0, 0.0, 0.5], objective.adjustment_for(5))
    weights, new_q, new_memory = objective.update(batch, q, memory)
    assert not math.isfinite((weights * batch.means).sum())
    if objective in STATELESS:
        kind = "groups" if objective == rd.WorstGroup() else getattr(objective, "base", "rows")
        np.testing.assert_allclose(weights, base(batch.counts.numpy(), kind))
    assert new_q is None or torch.equal(new_q, q)
    assert new_memory is None or torch.equal(new_memory, memory)


@pytest.mark.parametrize("objective", STATELESS + STATEFUL, ids=str)
def test_a_batch_without_rows_changes_nothing(objective):
    q, memory = start(objective, 5)
    weights, new_q, new_memory = objective.update(batch_of([0.0] * 5, [0.0] * 5), q, memory)
    assert torch.isfinite(weights).all()
    if not isinstance(objective, rd.GroupDRO):  # there the weights are q
        assert not weights.any()
    assert new_q is None or torch.equal(new_q, q)
    assert new_memory is None or torch.equal(new_memory.nan_to_num(-1), memory.nan_to_num(-1))


@pytest.mark.parametrize("objective", STATELESS + STATEFUL, ids=str)
def test_no_value_is_read_on_the_host(objective):
    """Tensors without data: what reads one raises."""
    batch = rd.Batch(*(torch.empty(5, dtype=torch.float64, device="meta") for _ in range(3)))
    q, memory = (each.to("meta") for each in start(objective, 5))
    assert objective.update(batch, q, memory).weights.shape == (5,)


def test_every_update_compiles_in_one_graph():
    batch = batch_of([3.0, 0.0, 5.0, 2.0, 4.0], [1.0, 0.0, 4.0, 2.5, 3.0])
    stateless = [
        rd.KL(0.3, over="rows"),
        rd.CVaR(0.3),
        rd.ChiSquare(0.3, "groups"),
        rd.Tilted(0.3, over="rows"),
    ]
    for objective in stateless + STATEFUL[2:]:
        arguments = (batch._replace(adjustment=objective.adjustment_for(5)), *start(objective, 5))
        torch.compiler.reset()
        compiled = torch.compile(objective.update, fullgraph=True, backend="aot_eager")(*arguments)
        for one, other in zip(compiled, objective.update(*arguments), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rd.CVaR(0.0), ValueError, r"alpha must be in \(0, 1\], got 0.0"),
        (lambda: rd.CVaR(1.5), ValueError, "alpha"),
        (lambda: rd.CVaR("0.1"), TypeError, "alpha must be a number, got str"),
        (lambda: rd.ChiSquare(-1.0), ValueError, "rho must be finite and >= 0, got -1.0"),
        (lambda: rd.ChiSquare(math.nan), ValueError, "rho must be finite and >= 0, got nan"),
        (lambda: rd.KL(-1e-9), ValueError, "rho must be finite and >= 0, got -1e-09"),
        (lambda: rd.KL(math.inf), ValueError, "rho must be finite and >= 0, got inf"),
        (lambda: rd.KL(True), TypeError, "rho must be a number, got bool"),
        (lambda: rd.Tilted(2e200), ValueError, r"t must be finite and >= -1e\+200 and <= 1e\+200, got 2e\+200"),
        (lambda: rd.Tilted(-math.inf), ValueError, "t must be finite"),
        (lambda: rd.GroupDRO(2e200), ValueError, r"step_size must be finite and >= 0 and <= 1e\+200"),
        (lambda: rd.GroupDRO(adjustment="1"), TypeError, "adjustment must be a number, got str"),
        (lambda: rd.GroupDRO(adjustment=None), TypeError, "adjustment must be a number, got NoneType"),
        (lambda: rd.GroupDRO(adjustment=[1.0, "b"]), TypeError, r"adjustment must hold numbers only, got \[1.0"),
        (lambda: rd.GroupDRO(adjustment=[1.0, -2.0]), ValueError, "adjustment must be finite and >= 0"),
        (lambda: rd.GroupDRO(adjustment=[1.0, 0.0]), ValueError, "adjustment > 0 needs group_counts"),
        (lambda: rd.GroupDRO(group_counts=5), TypeError, "group_counts must be a sequence of numbers, got int"),
        (lambda: rd.GroupDRO(group_counts=[1, 0]), ValueError, "group_counts must be positive and finite"),
        (lambda: rd.GroupDRO(loss_ema=0.0), ValueError, r"loss_ema must be in \(0, 1\], or None, got 0.0"),
        (lambda: rd.GroupDRO(loss_ema=1.1), ValueError, "loss_ema"),
        (lambda: rd.GroupDRO(loss_ema="0.1"), TypeError, "loss_ema must be a number, got str"),
        (lambda: rd.GroupDRO(floor=-0.1), ValueError, "floor must be finite and >= 0 and <= 1, got -0.1"),
        (lambda: rd.GroupDRO(floor=0.3).check(4), ValueError, "floor must be <= 1 / 4, the number of groups, got 0.3"),
        (lambda: rd.GroupDRO(0.1, [1, 2], [1, 2]).check(3), ValueError, "adjustment has 2 entries, but there are 3"),
        (lambda: rd.GroupDRO(0.1, 1.0, [1, 2]).check(3), ValueError, "group_counts has 2 entries, but there are 3"),
        (lambda: rd.GroupDRO(0.1, 1.0, [1, 2]).adjustment_for(3), ValueError, "group_counts has 2 entries"),
        (lambda: rd.GroupDRO(absent_groups="drop"), ValueError, "absent_groups must be 'decay' or 'hold', got 'drop'"),
        (lambda: rd.DoReMi(-1.0), ValueError, "step_size must be finite and >= 0"),
        (lambda: rd.DoReMi(smoothing=1.5), ValueError, r"smoothing must be in \(0, 1\], got 1.5"),
        (lambda: rd.DoReMi(smoothing=0.0), ValueError, r"smoothing must be in \(0, 1\], got 0.0"),
        (lambda: rd.DoReMi(smoothing=None), TypeError, "smoothing must be a number, got NoneType"),
        (
            lambda: rd.DoReMi().update(rd.Batch(torch.ones(2), torch.ones(2)), torch.ones(2) / 2, torch.zeros(3, 2)),
            ValueError,
            "needs batch.excess",
        ),
        (lambda: rd.DoReMi.average_weights(torch.zeros(4)), ValueError, r"memory must be \[3, G\].*got \[4\]"),
    ],
)  # fmt: skip
def test_bad_parameters(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("make", [rd.Tilted, rd.CVaR, rd.ChiSquare, rd.KL])
def test_bad_choices_of_base_and_over(make):
    with pytest.raises(ValueError, match="base must be 'rows' or 'groups', got 'texts'"):
        make(0.5, "texts")
    with pytest.raises(ValueError, match="over must be 'groups' or 'rows', got 'tokens'"):
        make(0.5, over="tokens")
    with pytest.raises(ValueError, match=r"base must be 'rows' with over='rows'.*got 'groups'"):
        make(0.5, "groups", "rows")


def test_the_floor_may_be_all_there_is():
    """1 / G itself is allowed; q is then uniform whatever the losses are. And hashing works with lists given."""
    objective = rd.GroupDRO(5.0, [1, 2, 3], [3, 2, 1], floor=1 / 3)
    objective.check(3)
    assert hash(objective) == hash(replace(objective))
    q = objective.update(batch_of([1.0] * 3, [1.0, 5.0, 9.0]), *start(objective, 3)).q
    np.testing.assert_allclose(q, [1 / 3] * 3)


def test_the_objective_that_the_documentation_writes():
    text = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text()
    code = text.split("## One of your own")[1].split("```python\n")[1].split("```")[0]
    names = {"dataclass": dataclass, "rd": rd, "torch": torch, "__name__": __name__}
    exec(code, names)
    counts, means = [3.0, 0.0, 5.0, 2.0], [1.0, 0.0, 4.0, 2.5]
    assert weights_of(names["Worst"](2), counts, means).tolist() == [0, 0, 0.5, 0.5]
    assert weights_of(names["Worst"](4), counts, means).tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])


def test_the_documentation_has_every_objective():
    text = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text()
    for objective in STATELESS + STATEFUL:
        assert f"| `{type(objective).__name__}(" in text
