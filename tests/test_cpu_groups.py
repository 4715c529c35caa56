"""The native group reduction, weight update and row weights against plain loops in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rd_kernels.backends.cpu import CPUBackend
from rd_kernels.backends.interface import BAD_LABEL, HIT, IGNORED, MISS, Backend
from tests.oracles import PublishedGroupDRO, members_of

pytestmark = pytest.mark.usefixtures("poisoned")

backend = CPUBackend()
G = 5


def batch(kind: str, rows: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """-> row_loss [N], outcome [N], groups; losses of rows that do not count are garbage."""
    row_loss = torch.rand(rows) * 10
    outcome = torch.randint(3, (rows,), dtype=torch.uint8)
    row_loss[outcome == IGNORED] = torch.nan
    if kind == "mask":
        return row_loss, outcome, torch.rand(rows, G) < 0.3
    groups = torch.randint(-1, G, (rows,))
    if kind == "one absent":
        groups[groups == 3] = 1
    groups[outcome == IGNORED] = 1234  # not looked at
    return row_loss, outcome, groups


def plain_statistics(row_loss: Tensor, outcome: Tensor, groups: Tensor) -> list[list[float]]:
    """Loss sums, counts and hits of each group, of rows in none, and of all."""
    table = [[0.0] * (G + 2) for _ in range(3)]
    for loss, what, member in zip(
        row_loss.tolist(), outcome.tolist(), members_of(groups, list(range(len(row_loss)))), strict=True
    ):
        if what in (MISS, HIT):
            for column in [*(member or [G]), G + 1]:
                table[0][column] += loss
                table[1][column] += 1
                table[2][column] += what == HIT
    return table


def statistics(sums: list[float], counts: list[float]) -> Tensor:
    """stats [4, G+2] with given group columns; weights NaN, as nobody may rely on them."""
    stats = torch.zeros(4, G + 2)
    stats[0, :G], stats[1, :G], stats[3] = torch.tensor(sums), torch.tensor(counts), torch.nan
    return stats


def update(stats, q, objective="group_dro", step=0.1, adjustment=None, status=(0, 0)):
    return backend.group_update(stats, torch.tensor(status), q, objective, step, adjustment)


@pytest.mark.parametrize("kind", ["ids", "one absent", "mask"])
def test_reduction(kind):
    row_loss, outcome, groups = batch(kind)
    stats, status = backend.group_reduce(row_loss, outcome, groups, G)
    expected = torch.tensor(plain_statistics(row_loss, outcome, groups))
    torch.testing.assert_close(stats[:3], expected, rtol=2e-7, atol=0)
    assert not stats[3].any()
    assert status.tolist() == [0, 0]


def test_reduction_of_no_rows():
    empty = torch.empty(0)
    for groups in (torch.empty(0, dtype=torch.int64), torch.empty(0, G, dtype=torch.bool)):
        stats, status = backend.group_reduce(empty, empty.to(torch.uint8), groups, G)
        assert not stats.any()
        assert not status.any()
        scale = backend.row_scale(torch.ones(G), empty.to(torch.uint8), groups)
        assert scale.shape == (0,)


def test_values_out_of_range_are_counted():
    outcome = torch.tensor([MISS, HIT, MISS, BAD_LABEL, IGNORED, BAD_LABEL], dtype=torch.uint8)
    groups = torch.tensor([G, -2, 0, 99, 99, 0])
    stats, status = backend.group_reduce(torch.ones(6), outcome, groups, G)
    assert status.tolist() == [2, 2]
    assert stats[1].tolist() == [1.0] + [0.0] * G + [3.0]


def test_a_nan_loss_stays_in_its_groups():
    groups = torch.tensor([[True, False], [False, True]])
    stats, _ = backend.group_reduce(
        torch.tensor([torch.nan, 2.0]), torch.zeros(2, dtype=torch.uint8), groups, 2
    )
    assert stats[0].isnan().tolist() == [True, False, False, True]


@pytest.mark.parametrize("kind", ["ids", "one absent", "mask"])
def test_group_dro_follows_the_published_update(kind):
    """Several steps in a row, one group absent or overlapping groups, beside Sagawa et al.'s own loop."""
    counts = [7, 100, 31, 12, 50]
    oracle = PublishedGroupDRO(G, 0.3, adjustment=2.0, group_counts=counts)
    q, adjustment = torch.full((G,), 1 / G), 2 / torch.tensor(counts).sqrt()
    for _ in range(4):
        row_loss, outcome, groups = batch(kind)
        rows = (outcome != IGNORED).nonzero()[:, 0].tolist()
        expected = oracle.step(row_loss[rows], members_of(groups, rows))
        stats, status = backend.group_reduce(row_loss, outcome, groups, G)
        loss, coefficients = backend.group_update(stats, status, q, "group_dro", 0.3, adjustment)
        assert float(loss) == pytest.approx(expected, rel=1e-6)
        assert q.tolist() == pytest.approx(oracle.probabilities, rel=2e-6)
        assert stats[3, :G].tolist() == q.tolist()
        assert stats[3, G] == 0
        assert float(stats[3, G + 1]) == pytest.approx(1, rel=1e-6)
        present = stats[1, :G] > 0
        assert torch.equal(coefficients[~present], torch.zeros(int((~present).sum())))
        torch.testing.assert_close(coefficients[present], (q / stats[1, :G])[present], rtol=2e-7, atol=0)


def test_held_groups_keep_their_weight():
    q = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15])
    stats = statistics([3.0, 0, 8, 0, 10], [3.0, 0, 2, 0, 5])
    loss, coefficients = update(stats, q, "group_dro_hold", step=0.5)
    raw = [0.1 * math.exp(0.5 * 1), 0.3 * math.exp(0.5 * 4), 0.15 * math.exp(0.5 * 2)]
    shared = [0.55 * value / sum(raw) for value in raw]
    assert q.tolist() == pytest.approx([shared[0], 0.2, shared[1], 0.25, shared[2]], rel=1e-6)
    assert coefficients.tolist() == pytest.approx(
        [shared[0] / 3, 0, shared[1] / 2, 0, shared[2] / 5], rel=1e-6
    )
    assert float(loss) == pytest.approx(shared[0] + shared[1] * 4 + shared[2] * 2, rel=1e-6)
    nothing = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    before = nothing.clone()
    update(stats, nothing, "group_dro_hold")
    assert torch.equal(nothing, before)


def test_erm():
    q = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15])
    before = q.clone()
    stats = statistics([3.0, 0, 8, 0, 10], [3.0, 0, 2, 0, 5])
    loss, coefficients = update(stats, q, "erm")
    assert float(loss) == pytest.approx(2.1)
    assert coefficients.tolist() == pytest.approx([0.1] * G)
    assert stats[3].tolist() == pytest.approx([0.3, 0, 0.2, 0, 0.5, 0, 1])
    assert torch.equal(q, before)


@pytest.mark.parametrize("objective", ["erm", "group_dro", "group_dro_hold"])
def test_no_rows_in_any_group(objective):
    q = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15])
    before, stats = q.clone(), statistics([0.0] * G, [0.0] * G)
    loss, coefficients = update(stats, q, objective)
    assert loss == 0
    assert not coefficients.any()
    assert torch.equal(q, before)
    expected = torch.zeros(G) if objective == "erm" else q
    assert torch.equal(stats[3, :G], expected)


@pytest.mark.parametrize("objective", ["erm", "group_dro", "group_dro_hold"])
@pytest.mark.parametrize("status", [(1, 0), (0, 3)])
def test_bad_input_changes_nothing(objective, status):
    q = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15])
    before, stats = q.clone(), statistics([3.0, 0, 8, 0, 10], [3.0, 0, 2, 0, 5])
    loss, coefficients = update(stats, q, objective, status=status)
    assert loss.isnan()
    assert not coefficients.any()
    assert not stats[3].any()
    assert torch.equal(q, before)


@pytest.mark.parametrize("objective", ["group_dro", "group_dro_hold"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_group_loss_that_is_not_finite_keeps_q(objective, value):
    q = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15])
    before, stats = q.clone(), statistics([3.0, 0, value, 0, 10], [3.0, 0, 2, 0, 5])
    loss, coefficients = update(stats, q, objective)
    assert not torch.isfinite(loss)
    assert torch.equal(q, before)
    torch.testing.assert_close(coefficients, torch.tensor([0.1 / 3, 0, 0.15, 0, 0.03]))


def test_large_steps_do_not_overflow():
    q = torch.full((G,), 1 / G)
    update(statistics([1.0, 900, 2, 3, 4], [1.0] * G), q, step=1e6)
    assert q.tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("kind", ["ids", "mask"])
def test_row_scale(kind):
    _, outcome, groups = batch(kind)
    outcome[:2] = BAD_LABEL
    coefficients = torch.randn(G)
    if kind == "ids":
        outcome[2:5], groups[2:5] = HIT, torch.tensor([-7, G, -1])
    scale = backend.row_scale(coefficients, outcome, groups)
    for row, what in enumerate(outcome.tolist()):
        expected = 0.0
        if what in (MISS, HIT):
            if kind == "mask":
                expected = sum(
                    c for c, member in zip(coefficients.tolist(), groups[row], strict=True) if member
                )
            elif 0 <= int(groups[row]) < G:
                expected = float(coefficients[groups[row]])
        assert float(scale[row]) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("kind", ["ids", "mask"])
@pytest.mark.parametrize("objective", ["erm", "group_dro", "group_dro_hold"])
def test_one_call_is_the_steps_one_by_one(kind, objective):
    """Bit for bit what the default composition of the four steps gives."""
    logits, labels = torch.randn(200, 300), torch.randint(300, (200,))
    labels[::7] = -100
    _, _, groups = batch(kind)
    if kind == "ids":
        groups.clamp_(max=G - 1)
    q = torch.softmax(torch.randn(G), 0)
    other_q = q.clone()
    arguments = (objective, 0.2, torch.rand(G), -100)
    fused = backend.grouped_forward(logits, labels, groups, q, *arguments)
    composed = Backend.grouped_forward(backend, logits, labels, groups, other_q, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(fused, composed, strict=True))
    assert torch.equal(q, other_q)
    assert torch.isfinite(fused[0])


def test_unknown_objective_is_named():
    with pytest.raises(ValueError, match=r"objective must be .*got 'cvar'"):
        update(statistics([1.0] * G, [1.0] * G), torch.full((G,), 1 / G), "cvar")
