"""Objectives without state against solvers, published algorithms, and at their limits."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize, minimize_scalar
from scipy.special import logsumexp, softmax

import rd_kernels as rd
from tests.objective_cases import BASES, BATCHES, arrays, base, start, weights_of


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
