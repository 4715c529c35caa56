"""Entropy and top-k accuracy from the same read of the logits, and statistics over many calls."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import rd_kernels as rd
from tests.float64_oracle import Oracle, assert_agrees

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.grid]

N, V, D, G = 20, 11, 5, 4
NAMES = ("loss", "accuracy", "entropy", "top_k_accuracy")


def batch(rows=N):
    """Hidden states, decoder, bias, labels, groups in which rows overlap or are in none; the last group is absent."""
    hidden, weight, bias = torch.randn(rows, D), torch.randn(V, D), torch.randn(V)
    labels = torch.randint(V, (rows,))
    labels[::4] = -100
    return hidden, weight, bias, labels, (torch.rand(rows, G) < 0.4) & (torch.arange(G) < G - 1)


def losses_of(op, backend, **options):
    make = rd.GroupDROLoss if op == "logits" else rd.LinearGroupDROLoss
    options = {"entropy": True, "top_k": 3, **options}
    return make(G, options.pop("objective", rd.GroupDRO(0.5)), backend=backend, **options)


def call(op, hidden, weight, bias, labels, groups):
    return (
        (F.linear(hidden, weight, bias), labels, groups)
        if op == "logits"
        else (hidden, weight, labels, groups, bias)
    )


def columns(report):
    return [*report.by_group.values(), report.ungrouped, report.overall]


@pytest.mark.parametrize("op", ["logits", "linear"])
@pytest.mark.parametrize("top_k", [1, 3, V, V + 5])
def test_against_torch_in_float64(backend, op, top_k):
    hidden, weight, bias, labels, groups = batch()
    loss_fn = losses_of(op, backend, top_k=top_k)
    loss_fn(*call(op, hidden, weight, bias, labels, groups))
    exact = F.linear(hidden.double(), weight.double(), bias.double())
    entropy = torch.distributions.Categorical(logits=exact).entropy()
    among = (exact.topk(min(top_k, V)).indices == labels[:, None]).any(1).double()
    counted = labels != -100
    members = [counted & groups[:, g] for g in range(G)] + [counted & ~groups.any(1), counted]
    for stats, rows in zip(columns(loss_fn.report()), members, strict=True):
        assert stats.count == int(rows.sum())
        if stats.count == 0:
            assert math.isnan(stats.entropy)
            assert math.isnan(stats.top_k_accuracy)
        else:
            assert stats.entropy == pytest.approx(entropy[rows].mean().item(), rel=2e-6, abs=1e-6)
            assert stats.top_k_accuracy == pytest.approx(among[rows].mean().item(), rel=1e-6)
            if top_k == 1:
                assert stats.top_k_accuracy == stats.accuracy
            if top_k >= V:
                assert stats.top_k_accuracy == 1
    assert f"{loss_fn.report().overall.entropy:.4f}" in str(loss_fn.report())


@pytest.mark.parametrize("op", ["logits", "linear"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "objective", [rd.ERM(), rd.GroupDRO(0.5, floor=0.1), rd.CVaR(0.3, over="rows"), rd.DoReMi()], ids=str
)
def test_with_every_kind_of_objective(backend, objective, level, op):
    hidden, weight, bias = torch.randn(5, 4, D), torch.randn(V, D), torch.randn(V)
    labels, groups = torch.randint(V, (5, 4)), torch.rand(5, G) < 0.5
    labels[:, ::3] = -100
    reference = torch.rand(5, 4) if objective.needs_reference else None
    inputs = [F.linear(hidden, weight, bias)] if op == "logits" else [hidden, weight, bias]
    loss_fn = losses_of(op, backend, objective=objective, level=level)
    assert_agrees(loss_fn, Oracle(objective, G, level, top_k=3), inputs, labels, groups, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_count_for_the_label(backend, dtype):
    """Among the top k: fewer than k logits are larger."""
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 3.0]] * 4).to(dtype)
    labels = torch.tensor([4, 3, 1, 0])
    for top_k, expected in ((1, [1, 0, 0, 0]), (2, [1, 1, 1, 0]), (4, [1, 1, 1, 0]), (5, [1, 1, 1, 1])):
        loss_fn = rd.GroupDROLoss(G, top_k=top_k, backend=backend)
        loss_fn(logits, labels, torch.arange(4))
        report = loss_fn.report()
        assert [stats.top_k_accuracy for stats in report.by_group.values()] == expected
        assert report.overall.entropy is None  # was not asked for


def test_equal_and_certain_rows(backend):
    """log V where all logits are equal, 0 where one is far above; V = 1 too."""
    logits = torch.zeros(2, V)
    logits[1, 3] = 1e4
    loss_fn = rd.GroupDROLoss(2, entropy=True, backend=backend)
    loss_fn(logits, torch.tensor([0, 3]), torch.arange(2))
    first, second = loss_fn.report().by_group.values()
    assert first.entropy == pytest.approx(math.log(V), rel=1e-6)
    assert second.entropy == 0
    loss_fn(torch.randn(2, 1), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    assert loss_fn.report().overall.entropy == pytest.approx(0, abs=1e-7)


def test_rows_that_are_not_finite(backend):
    """-inf is a class that is never drawn. +inf and NaN have no entropy, and it stays in the row's groups."""
    logits = torch.randn(6, V)
    labels = torch.full((6,), 2)
    logits[0, 3:] = -torch.inf
    logits[1, 5] = torch.nan
    logits[2, 2] = torch.inf
    logits[3] = -torch.inf
    logits[4, 2] = torch.nan
    logits[5] = torch.nan
    labels_of_none = torch.tensor([-100] * 6)
    loss_fn = rd.GroupDROLoss(7, entropy=True, top_k=V - 1, backend=backend)
    loss_fn(torch.cat([logits, logits]), torch.cat([labels, labels_of_none]), torch.arange(12) % 6)
    report = loss_fn.report()
    entropies = [stats.entropy for stats in report.by_group.values()]
    expected = torch.distributions.Categorical(logits=logits[0, :3].double()).entropy().item()
    assert entropies[0] == pytest.approx(expected, rel=1e-6)
    assert all(math.isnan(entropy) for entropy in entropies[1:])
    # In row 1 at most the label's own and the NaN are not below; in row 4 and 5 nothing compares with the label's.
    above = int((logits[1] > logits[1, 2]).sum()) + 1
    hits = [stats.top_k_accuracy for stats in report.by_group.values()][:6]
    assert hits == [1, float(above < V - 1), 1, 1, 0, 0]
    assert (
        loss_fn.group_weights.tolist() == [pytest.approx(1 / 7)] * 7
    )  # one bad batch does not destroy the state


def test_they_are_not_there_unless_asked_for():
    for options, present in (({"top_k": 2}, "top_k_accuracy"), ({"entropy": True}, "entropy")):
        loss_fn = rd.GroupDROLoss(G, **options)
        loss_fn(torch.randn(N, V), torch.randint(V, (N,)), torch.randint(G, (N,)))
        given = {
            name
            for name in ("entropy", "top_k_accuracy", "excess")
            if getattr(loss_fn.report().overall, name) is not None
        }
        assert given == {present}


# Over many calls.


@pytest.mark.parametrize("op", ["logits", "linear"])
def test_total_report_is_that_of_the_joined_rows(backend, op):
    """Sums in float64: what float32 sums of one call differ by, and to the last bits from the reports of the calls."""
    loss_fn, joined, weights, reports = losses_of(op, backend), losses_of(op, backend), [], []
    hidden, weight, bias, labels, groups = batch(60)
    for start, stop in ((0, 9), (9, 10), (10, 10), (10, 60)):
        part = slice(start, stop)
        loss_fn(*call(op, hidden[part], weight, bias, labels[part], groups[part]))
        reports.append(columns(loss_fn.report()))
        weights.append(torch.tensor([stats.weight for stats in reports[-1]], dtype=torch.float64))
    joined(*call(op, hidden, weight, bias, labels, groups))
    total, whole = columns(loss_fn.total_report()), columns(joined.report())
    for column, (ours, theirs) in enumerate(zip(total, whole, strict=True)):
        assert ours.count == theirs.count == sum(report[column].count for report in reports)
        for name in NAMES:
            value = getattr(ours, name)
            assert value == pytest.approx(getattr(theirs, name), rel=2e-6, abs=1e-6, nan_ok=True)
            if ours.count:
                parts = [report[column] for report in reports if report[column].count]
                exact = math.fsum(getattr(part, name) * part.count for part in parts) / ours.count
                assert value == pytest.approx(exact, rel=1e-13)
    mean = torch.stack(weights).mean(0)
    assert [stats.weight for stats in total] == pytest.approx(mean.tolist(), rel=1e-12)


def test_excess_is_added_up_too(backend):
    logits, labels, groups = torch.randn(N, V), torch.randint(V, (N,)), torch.randint(2, (N,))
    reference = 3 * torch.rand(N)
    loss_fn = rd.GroupDROLoss(2, rd.DoReMi(), backend=backend)
    for part in (slice(0, 7), slice(7, N)):
        loss_fn(logits[part], labels[part], groups[part], reference[part])
    excess = (F.cross_entropy(logits.double(), labels, reduction="none") - reference.double()).clamp(min=0)
    for group, stats in enumerate(loss_fn.total_report().by_group.values()):
        assert stats.excess == pytest.approx(excess[groups == group].mean().item(), rel=1e-6)


def test_reset_and_evaluation(backend):
    hidden, weight, bias, labels, groups = batch()
    arguments = call("logits", hidden, weight, bias, labels, groups)
    loss_fn = losses_of("logits", backend)
    with pytest.raises(RuntimeError, match=r"total_report\(\) needs a call of the loss since the last reset"):
        loss_fn.total_report()
    loss_fn(*arguments)
    q = loss_fn.group_weights.clone()
    loss_fn.eval()(*arguments)
    assert torch.equal(loss_fn.group_weights, q)
    labelled = int((labels != -100).sum())
    assert loss_fn.total_report(reset=True).overall.count == 2 * labelled
    assert loss_fn.report().overall.count == labelled  # the last call is still known
    with pytest.raises(RuntimeError, match="since the last reset"):
        loss_fn.total_report()
    loss_fn(*arguments)
    assert loss_fn.total_report().overall.count == labelled
    loss_fn.reset_totals()
    with pytest.raises(RuntimeError, match="since the last reset"):
        loss_fn.total_report()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_a_batch_once(backend, reentrant):
    hidden, weight, bias, labels, groups = batch()
    loss_fn = losses_of("logits", backend)

    def forward(x):
        return loss_fn(F.linear(x, weight, bias), labels, groups)

    x = hidden.requires_grad_()
    for _ in range(2):
        checkpoint(forward, x, use_reentrant=reentrant).backward()
    total = loss_fn.total_report()
    assert total.overall.count == 2 * int((labels != -100).sum())
    assert total.overall.weight == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("op", ["logits", "linear"])
@pytest.mark.parametrize("objective", [rd.GroupDRO(0.5), rd.CVaR(0.3, over="rows")], ids=str)
def test_accumulation_counts_a_batch_once(backend, objective, op):
    hidden, weight, bias, labels, groups = batch()
    loss_fn, whole = (losses_of(op, backend, objective=objective) for _ in range(2))
    for _ in range(2):
        parts = [
            call(op, hidden[part].requires_grad_(), weight, bias, labels[part], groups[part])
            for part in (slice(0, 3), slice(3, N))
        ]
        with loss_fn.accumulate() as window:
            for part in parts:
                window.observe(*part)
            for part in parts:
                loss_fn(*part).backward()
        whole(*call(op, hidden, weight, bias, labels, groups))
    for got, want in ((loss_fn.report(), whole.report()), (loss_fn.total_report(), whole.total_report())):
        for ours, theirs in zip(columns(got), columns(want), strict=True):
            assert ours.count == theirs.count
            for name in (*NAMES, "weight"):
                expected = pytest.approx(getattr(theirs, name), rel=1e-5, abs=1e-6, nan_ok=True)
                assert getattr(ours, name) == expected, name


@pytest.mark.parametrize("op", ["logits", "linear"])
def test_compiled_without_a_graph_break(op):
    hidden, weight, bias, labels, groups = batch()
    eager, traced = losses_of(op, "reference"), losses_of(op, "reference")
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        arguments = call(op, hidden, weight, bias, labels, groups)
        torch.testing.assert_close(compiled(*arguments), eager(*arguments))
    for got, want in ((traced.report(), eager.report()), (traced.total_report(), eager.total_report())):
        assert got.overall.count == want.overall.count > 0
        for ours, theirs in zip(columns(got), columns(want), strict=True):
            for name in (*NAMES, "weight"):
                assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-6, nan_ok=True)


def test_what_a_checkpoint_holds():
    """The state, and nothing that belongs to a report."""
    assert list(losses_of("logits", "auto").state_dict()) == ["group_weights"]
    assert list(losses_of("linear", "auto", objective=rd.DoReMi()).state_dict()) == [
        "group_weights",
        "memory",
    ]


def test_totals_stay_in_float64():
    loss_fn = losses_of("logits", "reference").to(torch.half)
    for _ in range(2):
        loss_fn(torch.randn(N, V), torch.randint(V, (N,)), torch.rand(N, G) < 0.5)
    assert loss_fn._total_stats.dtype == torch.float64
    assert loss_fn.group_weights.dtype == torch.float32
    assert loss_fn.memory.dtype == torch.float64
    assert loss_fn.total_report().overall.count == 2 * N


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k must be None or an integer >= 1, got 0"),
        ({"top_k": True}, ValueError, "top_k must be None or an integer >= 1, got True"),
        ({"top_k": 2.0}, ValueError, "top_k must be None or an integer >= 1, got 2.0"),
        ({"entropy": "yes"}, TypeError, "entropy must be True or False, got 'yes'"),
    ],
)
def test_bad_arguments(options, error, message):
    for make in (rd.GroupDROLoss, rd.LinearGroupDROLoss):
        with pytest.raises(error, match=message):
            make(G, **options)


@pytest.mark.parametrize("options", [{"entropy": True}, {"top_k": 2}])
def test_they_are_not_served_with_a_capacity(backend, options):
    hidden, weight, bias, labels, groups = batch()
    loss_fn = rd.LinearGroupDROLoss(G, capacity=0.5, backend=backend, **options)
    with pytest.raises(ValueError, match="entropy and top_k are not served together with capacity"):
        loss_fn(hidden, weight, labels, groups, bias)
