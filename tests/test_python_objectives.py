"""Objectives written in Python: CVaR and the chi-square ball against SciPy's solvers, one of a user's own, and the path
that runs them on every backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch.nn import functional as F

import rd_kernels as rd

BATCHES = st.lists(
    st.tuples(st.integers(0, 9), st.floats(0, 12, allow_subnormal=False)), min_size=1, max_size=7
).filter(lambda groups: any(count for count, _ in groups))


def arrays(groups):
    """Counts and mean losses, float64 [G]."""
    counts, means = (np.array(column, dtype=np.float64) for column in zip(*groups, strict=True))
    return counts, means


def weights_of(objective, counts, means):
    sums, counts = torch.from_numpy(counts * means), torch.from_numpy(counts)
    coefficients, _, weights = objective.update(sums, counts, torch.full_like(sums, 1 / len(sums)))
    torch.testing.assert_close(coefficients * counts, weights)  # what is reported is what is done
    return weights.numpy()


def base(counts, kind):
    size = counts if kind == "rows" else (counts > 0).astype(float)
    return size / size.sum()


@settings(deadline=None, max_examples=200)
@given(groups=BATCHES, alpha=st.floats(0.01, 1), kind=st.sampled_from(["rows", "groups"]))
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
    )
    assert weights @ means == pytest.approx(-solved.fun, abs=1e-8)


@settings(deadline=None, max_examples=100)
@given(groups=BATCHES, rho=st.floats(0, 3), kind=st.sampled_from(["rows", "groups"]))
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


def test_chi_square_against_the_published_bisection():
    """The best response of Levy et al. 2020 over rows: p_i proportional to max(v_i - eta, 0), eta by bisection."""
    losses = np.random.default_rng(0).gamma(2, size=50)
    for rho in (0.01, 0.1, 1.0, 10.0):
        low, high = losses.max() - 1e3 * np.ptp(losses), losses.max()
        for _ in range(200):
            eta = (low + high) / 2
            p = np.maximum(losses - eta, 0)
            p /= p.sum()
            low, high = (low, eta) if 0.5 * ((50 * p - 1) ** 2).mean() > rho else (eta, high)
        weights = weights_of(rd.ChiSquare(rho), np.ones(50), losses)
        np.testing.assert_allclose(weights, p, atol=1e-9)


def test_limits():
    counts, means = np.array([3.0, 0.0, 5.0, 2.0]), np.array([1.0, 0.0, 4.0, 2.5])
    erm, worst = counts / counts.sum(), np.array([0.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(weights_of(rd.CVaR(1.0), counts, means), erm)
    np.testing.assert_allclose(weights_of(rd.ChiSquare(0.0), counts, means), erm)
    np.testing.assert_allclose(weights_of(rd.ChiSquare(1e-9), counts, means), erm, atol=1e-4)
    np.testing.assert_allclose(weights_of(rd.CVaR(1e-9), counts, means), worst)
    np.testing.assert_allclose(weights_of(rd.ChiSquare(0.5), counts, means), worst)  # 1/2 (1/0.5 - 1)
    np.testing.assert_allclose(weights_of(rd.ChiSquare(1e9), counts, means), worst)
    equal = np.full(4, 2.0)
    np.testing.assert_allclose(weights_of(rd.ChiSquare(0.3), counts, equal), erm)


@pytest.mark.parametrize("objective", [rd.CVaR(0.3), rd.ChiSquare(0.2), rd.CVaR(0.3, "groups")], ids=str)
def test_the_order_of_the_groups_does_not_matter(objective):
    counts, means = np.array([3.0, 0.0, 5.0, 2.0, 4.0]), np.array([1.0, 0.0, 4.0, 2.5, 3.0])
    order = np.array([4, 2, 0, 1, 3])
    weights = weights_of(objective, counts, means)
    np.testing.assert_allclose(weights_of(objective, counts[order], means[order]), weights[order])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rd.CVaR(0.0), ValueError, r"alpha must be in \(0, 1\], got 0.0"),
        (lambda: rd.CVaR(1.5), ValueError, "alpha"),
        (lambda: rd.CVaR("0.1"), TypeError, "alpha must be a number, got str"),
        (lambda: rd.ChiSquare(-1.0), ValueError, "rho must be finite and >= 0"),
        (lambda: rd.ChiSquare(float("nan")), ValueError, "rho"),
        (lambda: rd.ChiSquare(1.0, "texts"), ValueError, "base must be 'rows' or 'groups', got 'texts'"),
    ],
)
def test_bad_parameters(make, error, message):
    with pytest.raises(error, match=message):
        make()


# The path from an objective in Python to the gradients, on every backend.


@dataclass(frozen=True)
class Uniform(rd.Objective):
    """The mean of the group means, as the documentation has it."""

    def update(self, sums, counts, q):
        present = counts > 0
        weights = present / present.sum().clamp(min=1)
        return weights / counts.clamp(min=1), q, weights


@dataclass(frozen=True)
class Steps(rd.Objective):
    """Has a state: it counts its batches in q."""

    def update(self, sums, counts, q):
        return counts * 0 + 1 / counts.sum(), q + 1, q


def batch(rows=40, vocabulary=11, groups=4):
    logits = torch.randn(rows, vocabulary, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[::5] = -100
    return logits, labels, torch.randint(-1, groups - 1, (rows,))  # the last group is absent


@pytest.mark.parametrize("objective", [Uniform(), rd.CVaR(0.4), rd.ChiSquare(0.2)], ids=str)
@pytest.mark.parametrize("form", ["ids", "mask"])
def test_loss_and_gradient(backend, objective, form):
    logits, labels, ids = batch()
    member = ids[:, None] == torch.arange(4)
    loss_fn = rd.GroupDROLoss(4, objective, backend=backend)
    loss = loss_fn(logits, labels, ids if form == "ids" else member)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    rows = F.cross_entropy(exact, labels, reduction="none")
    member = member & (labels != -100)[:, None]
    sums, counts = (rows[:, None] * member).sum(0), member.sum(0).double()
    coefficients, _, weights = objective.update(sums.detach(), counts, torch.full_like(counts, 0.25))
    expected = (torch.where(counts > 0, coefficients, 0) * sums).sum()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-6, rtol=1e-4)
    report = loss_fn.report()
    reported = torch.tensor([stats.weight for stats in report.by_group.values()], dtype=torch.float64)
    torch.testing.assert_close(reported, weights.double(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("objective", [Uniform(), rd.CVaR(0.4), rd.ChiSquare(0.2)], ids=str)
def test_the_linear_op_agrees_with_the_logits_op(backend, objective):
    hidden, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((40, 8), (11, 8), (11,)))
    _, labels, ids = batch()
    loss = rd.LinearGroupDROLoss(4, objective, backend=backend)(hidden, weight, labels, ids, bias)
    got = torch.autograd.grad(loss, (hidden, weight, bias))
    expected = rd.GroupDROLoss(4, objective, backend=backend)(hidden @ weight.t() + bias, labels, ids)
    wanted = torch.autograd.grad(expected, (hidden, weight, bias))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_state_and_bad_batches(backend):
    logits, labels, ids = batch()
    loss_fn = rd.GroupDROLoss(4, Steps(), backend=backend)
    loss_fn(logits, labels, ids)
    loss_fn(logits, labels, ids)
    assert loss_fn.group_weights.tolist() == [2.25] * 4
    loss_fn.eval()(logits, labels, ids)
    assert loss_fn.group_weights.tolist() == [2.25] * 4
    nothing = loss_fn(logits, torch.full_like(labels, -100), ids)
    assert nothing.item() == 0


def test_a_group_for_each_row_is_dro_without_groups():
    """CVaR over rows: the mean of the worst fifth of the losses (Rockafellar and Uryasev 2000)."""
    logits, labels = torch.randn(50, 7), torch.randint(0, 7, (50,))
    loss = rd.GroupDROLoss(50, rd.CVaR(0.2))(logits, labels, torch.arange(50))
    worst = F.cross_entropy(logits, labels, reduction="none").sort(descending=True).values[:10]
    torch.testing.assert_close(loss, worst.mean())


def test_compiled_without_a_graph_break():
    logits, labels, ids = batch()
    for objective in (rd.CVaR(0.4), rd.ChiSquare(0.2), Steps()):
        eager, traced = (rd.GroupDROLoss(4, objective, backend="reference") for _ in range(2))
        compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits, labels, ids), eager(logits, labels, ids))
        torch.testing.assert_close(traced.group_weights, eager.group_weights)


def test_an_update_of_the_wrong_length_is_an_error():
    @dataclass(frozen=True)
    class Short(rd.Objective):
        def update(self, sums, counts, q):
            return counts[:1], q, counts

    with pytest.raises(ValueError, match=r"Short.update must return coefficients \[4\], got \[1\]"):
        rd.GroupDROLoss(4, Short())(*batch())


def test_an_objective_without_rule_and_update():
    with pytest.raises(NotImplementedError, match="neither a rule nor an update"):
        rd.GroupDROLoss(4, rd.Objective())(*batch())
