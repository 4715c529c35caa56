"""The path from an objective in Python to the gradients, on every backend."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

import rd_kernels as rd

pytestmark = pytest.mark.grid


@dataclass(frozen=True)
class Uniform(rd.Objective):
    """The mean of the group means, as the documentation has it."""

    def update(self, batch, q, memory):
        return rd.Update(batch.present / batch.present.sum().clamp(min=1))


@dataclass(frozen=True)
class Steps(rd.Objective):
    """Has a state: it counts its batches in q."""

    def update(self, batch, q, memory):
        return rd.Update(batch.counts / batch.counts.sum().clamp(min=1), q + 1)


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
    statistics = rd.Batch(sums.detach(), counts)
    weights = objective.update(statistics, torch.full_like(counts, 0.25), objective.initial_memory(4)).weights
    expected = (weights * sums / counts.clamp(min=1)).sum()
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
        def update(self, batch, q, memory):
            return rd.Update(batch.counts[:1])

    with pytest.raises(ValueError, match=r"Short.update must return weights \[4\], got \[1\]"):
        rd.GroupDROLoss(4, Short())(*batch())


def test_an_objective_without_rule_and_update():
    with pytest.raises(NotImplementedError, match="neither a rule nor an update"):
        rd.GroupDROLoss(4, rd.Objective())(*batch())
