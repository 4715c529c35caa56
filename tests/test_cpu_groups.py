"""The native group reduction, weight update and row weights against plain loops in Python floats."""

from __future__ import annotations

import math

import pytest
import scipy.special
import torch
from torch import Tensor

from rd_kernels.backends.cpu import CPUBackend
from rd_kernels.backends.interface import BAD_LABEL, HIT, IGNORED, MISS, Backend
from rd_kernels.reference import ReferenceBackend
from rd_kernels.rules import RULES
from tests.oracles import PublishedGroupDRO

pytestmark = pytest.mark.usefixtures("poisoned")

backend = CPUBackend()
G = 5
KINDS = ["ids", "one absent", "lists", "bits"]


def words_of(member: Tensor) -> Tensor:
    """A bool mask [N, G] -> int32 words of bits [N, W], one bit at a time."""
    rows, num_groups = member.shape
    words = torch.zeros(rows, -(-num_groups // 32), dtype=torch.int64)
    for row, group in member.nonzero().tolist():
        words[row, group // 32] |= 1 << group % 32
    return words.to(torch.int32)


def batch(kind: str, rows: int = 200, num_groups: int = G) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """-> row_loss [N], outcome [N], groups, each row's groups; losses of rows that do not count are garbage."""
    row_loss = torch.rand(rows) * 10
    outcome = torch.randint(3, (rows,), dtype=torch.uint8)
    row_loss[outcome == IGNORED] = torch.nan
    if kind == "bits":
        member = torch.rand(rows, num_groups) < 0.3
        return row_loss, outcome, words_of(member), [row.nonzero()[:, 0].tolist() for row in member]
    if kind == "lists":  # with ids that a row names twice, and rows in no group
        groups = torch.randint(-1, num_groups, (rows, 3))
        groups[::9] = -1
    else:
        groups = torch.randint(-1, num_groups, (rows,))
    if kind == "one absent":
        groups[groups == 3] = 1
    members = [sorted(set(ids) - {-1}) for ids in groups.reshape(rows, -1).tolist()]
    groups[outcome == IGNORED] = 1234  # not looked at
    return row_loss, outcome, groups, members


def plain_statistics(
    row_loss: Tensor, outcome: Tensor, members: list[list[int]], num_groups: int = G
) -> list[list[float]]:
    """Loss sums, counts and hits of each group, of rows in none, and of all."""
    table = [[0.0] * (num_groups + 2) for _ in range(3)]
    for loss, what, member in zip(row_loss.tolist(), outcome.tolist(), members, strict=True):
        if what in (MISS, HIT):
            for column in [*(member or [num_groups]), num_groups + 1]:
                table[0][column] += loss
                table[1][column] += 1
                table[2][column] += what == HIT
    return table


def statistics(sums: list[float], counts: list[float]) -> Tensor:
    """stats [4, G+2] with given group columns; weights NaN, as nobody may rely on them."""
    stats = torch.zeros(4, G + 2)
    stats[0, :G], stats[1, :G], stats[3] = torch.tensor(sums), torch.tensor(counts), torch.nan
    return stats


def update(stats, q, rule="group_dro", rate=0.1, adjustment=None, status=(0, 0)):
    return backend.group_update(stats, torch.tensor(status), q, rule, rate, adjustment)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_groups", [1, 4, 5, 32, 33, 70])
def test_reduction(kind, num_groups):
    row_loss, outcome, groups, members = batch(kind, num_groups=num_groups)
    stats, status = backend.group_reduce(row_loss, outcome, groups, num_groups)
    expected = torch.tensor(plain_statistics(row_loss, outcome, members, num_groups))
    torch.testing.assert_close(stats[:3], expected, rtol=2e-7, atol=0)
    assert not stats[3].any()
    assert status.tolist() == [0, 0]


@pytest.mark.parametrize("num_groups", [1, 4, 5, 40])
def test_one_group_a_row_is_the_same_in_each_form(num_groups):
    """Bit for bit, and as many times as a row names its group."""
    row_loss, outcome, ids, _ = batch("ids", num_groups=num_groups)
    outcome[outcome == IGNORED] = BAD_LABEL  # their ids are not looked at
    ids[outcome == BAD_LABEL] = -1
    forms = [ids, ids[:, None], ids[:, None].expand(-1, 2).contiguous()]
    forms.append(torch.stack([ids, torch.full_like(ids, -1)], dim=1))
    forms.append(words_of(ids[:, None] == torch.arange(num_groups)))
    coefficients, results = torch.randn(num_groups), []
    for groups in forms:
        scale = backend.row_scale(coefficients, outcome, groups)
        results.append((*backend.group_reduce(row_loss, outcome, groups, num_groups), scale))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_reduction_of_no_rows():
    empty = torch.empty(0)
    for groups in (
        torch.empty(0, dtype=torch.int64),
        torch.empty(0, 3, dtype=torch.int64),
        torch.empty(0, 1, dtype=torch.int32),
    ):
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


def test_a_row_with_an_id_out_of_range_is_bad_once_and_not_in_no_group():
    """What becomes of its other groups is the reference's affair: the batch is refused."""
    groups = torch.tensor([[G, -2, -1], [-1, 99, 0], [-1, -1, -1], [2, 2, -1], [77, 77, 77]])
    outcome = torch.tensor([MISS, HIT, MISS, MISS, IGNORED], dtype=torch.uint8)
    row_loss, coefficients = torch.rand(5), torch.rand(G)
    stats, status = backend.group_reduce(row_loss, outcome, groups, G)
    reference = ReferenceBackend()
    expected, expected_status = reference.group_reduce(row_loss, outcome, groups, G)
    assert torch.equal(stats, expected)
    assert torch.equal(status, expected_status)
    assert status.tolist() == [0, 2]
    assert stats[1, G:].tolist() == [1, 4]
    scale = backend.row_scale(coefficients, outcome, groups)
    assert torch.equal(scale, reference.row_scale(coefficients, outcome, groups))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_stays_in_its_groups(value):
    for groups in (torch.tensor([[0, 1], [1, 2], [2, -1]]), torch.tensor([[0b011], [0b110], [0b100]]).int()):
        row_loss = torch.tensor([value, 2.0, 3.0])
        stats, _ = backend.group_reduce(row_loss, torch.zeros(3, dtype=torch.uint8), groups, 3)
        assert torch.isfinite(stats[0]).tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("num_groups", [1, 4, 7, 8, 9, 32, 33, 64, 71])
@pytest.mark.parametrize("rows", [0, 1, 3, 50])
def test_masks_are_packed(rows, num_groups):
    for member in (torch.rand(rows, num_groups) < 0.5, torch.ones(rows, num_groups, dtype=torch.bool)):
        assert torch.equal(backend.pack_mask(member), words_of(member))


@pytest.mark.parametrize("kind", KINDS)
def test_group_dro_follows_the_published_update(kind):
    """Several steps in a row, one group absent or overlapping groups, beside Sagawa et al.'s own loop."""
    counts = [7, 100, 31, 12, 50]
    oracle = PublishedGroupDRO(G, 0.3, adjustment=2.0, group_counts=counts)
    q, adjustment = torch.full((G,), 1 / G), 2 / torch.tensor(counts).sqrt()
    for _ in range(4):
        row_loss, outcome, groups, members = batch(kind)
        rows = (outcome != IGNORED).nonzero()[:, 0].tolist()
        expected = oracle.step(row_loss[rows], [members[row] for row in rows])
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
    loss, coefficients = update(stats, q, "group_dro_hold", rate=0.5)
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
    assert coefficients.tolist() == pytest.approx([0.1, 0, 0.1, 0, 0.1])
    assert stats[3].tolist() == pytest.approx([0.3, 0, 0.2, 0, 0.5, 0, 1])
    assert torch.equal(q, before)


@pytest.mark.parametrize(("rule", "by_rows"), [("tilted_rows", True), ("tilted_groups", False)])
@pytest.mark.parametrize("rate", [0.0, 0.4, -0.4, 1e5])
def test_tilted_weights(rule, by_rows, rate):
    """Beside SciPy's softmax of log n_g + rate m_g over the groups present."""
    q = torch.full((G,), 1 / G)
    sums, counts = [3.0, 0, 8, 0, 10], [3.0, 0, 2, 0, 5]
    stats = statistics(sums, counts)
    loss, coefficients = update(stats, q, rule, rate)
    present, means = [0, 2, 4], [1.0, 4.0, 2.0]
    prior = [math.log(counts[g]) if by_rows else 0.0 for g in present]
    weights = scipy.special.softmax([p + rate * m for p, m in zip(prior, means, strict=True)])
    expected = [0.0] * G
    for g, weight in zip(present, weights, strict=True):
        expected[g] = weight
    assert stats[3].tolist() == pytest.approx([*expected, 0, 1], rel=1e-6)
    assert coefficients.tolist() == pytest.approx(
        [w / max(n, 1) for w, n in zip(expected, counts, strict=True)], rel=1e-6
    )
    assert float(loss) == pytest.approx(sum(w * m for w, m in zip(weights, means, strict=True)), rel=1e-6)
    assert torch.equal(q, torch.full((G,), 1 / G))


def test_worst_group():
    """All weight on the largest mean loss; two groups that share it share the weight."""
    q = torch.full((G,), 1 / G)
    stats = statistics([3.0, 0, 8, -4, 20], [3.0, 0, 2, 4, 5])
    loss, coefficients = update(stats, q, "worst_group")
    assert stats[3].tolist() == [0, 0, 0.5, 0, 0.5, 0, 1]
    assert coefficients.tolist() == pytest.approx([0, 0, 0.25, 0, 0.1])
    assert loss == 4
    assert torch.equal(q, torch.full((G,), 1 / G))


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_those_of_the_reference(rule):
    """In float64, on the same sums; with a rate whose product with a loss float32 does not hold, too."""
    for rate in (0.0, 0.7, 1e38):
        for _ in range(20):
            counts = torch.randint(4, (G,)).float()
            q, adjustment = torch.softmax(torch.randn(G), 0), torch.rand(G)
            stats, exact_q = statistics((torch.rand(G) * counts).tolist(), counts.tolist()), q.double()
            exact = stats.double()
            loss, coefficients = update(stats, q, rule, rate, adjustment)
            expected = ReferenceBackend().group_update(
                exact, torch.zeros(2, dtype=torch.int64), exact_q, rule, rate, adjustment
            )
            for value, other in (
                (loss, expected[0]),
                (coefficients, expected[1]),
                (q, exact_q),
                (stats, exact),
            ):
                torch.testing.assert_close(value.double(), other, rtol=3e-7, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_no_rows_in_any_group(rule):
    q = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15])
    before, stats = q.clone(), statistics([0.0] * G, [0.0] * G)
    loss, coefficients = update(stats, q, rule)
    assert loss == 0
    assert not coefficients.any()
    assert torch.equal(q, before)
    expected = q if rule in ("group_dro", "group_dro_hold") else torch.zeros(G)
    assert torch.equal(stats[3, :G], expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("status", [(1, 0), (0, 3)])
def test_bad_input_changes_nothing(rule, status):
    q = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15])
    before, stats = q.clone(), statistics([3.0, 0, 8, 0, 10], [3.0, 0, 2, 0, 5])
    loss, coefficients = update(stats, q, rule, status=status)
    assert loss.isnan()
    assert not coefficients.any()
    assert not stats[3].any()
    assert torch.equal(q, before)


@pytest.mark.parametrize("rule", ["group_dro", "group_dro_hold"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_group_loss_that_is_not_finite_keeps_q(rule, value):
    q = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15])
    before, stats = q.clone(), statistics([3.0, 0, value, 0, 10], [3.0, 0, 2, 0, 5])
    loss, coefficients = update(stats, q, rule)
    assert not torch.isfinite(loss)
    assert torch.equal(q, before)
    torch.testing.assert_close(coefficients, torch.tensor([0.1 / 3, 0, 0.15, 0, 0.03]))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("erm", [0.1, 0, 0.1, 0, 0.1]),
        ("tilted_rows", [0.1, 0, 0.1, 0, 0.1]),
        ("tilted_groups", [1 / 9, 0, 1 / 6, 0, 1 / 15]),
        ("worst_group", [1 / 9, 0, 1 / 6, 0, 1 / 15]),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_group_loss_that_is_not_finite_hides_no_group(rule, expected, value):
    """The coefficients stay finite, those of a rate of 0 or of a tie; the loss is not."""
    stats = statistics([3.0, 0, value, 0, 10], [3.0, 0, 2, 0, 5])
    loss, coefficients = update(stats, torch.full((G,), 1 / G), rule)
    assert not torch.isfinite(loss)
    torch.testing.assert_close(coefficients, torch.tensor(expected))


def test_large_steps_do_not_overflow():
    q = torch.full((G,), 1 / G)
    update(statistics([1.0, 900, 2, 3, 4], [1.0] * G), q, rate=1e6)
    assert q.tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_groups", [1, 5, 32, 70])
def test_row_scale(kind, num_groups):
    _, outcome, groups, members = batch(kind, num_groups=num_groups)
    outcome[:2] = BAD_LABEL
    coefficients = torch.randn(num_groups)
    scale = backend.row_scale(coefficients, outcome, groups)
    for row, what in enumerate(outcome.tolist()):
        counted = members[row] if what in (MISS, HIT) else []
        expected = sum(coefficients[group].item() for group in counted)
        assert float(scale[row]) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_row_scale_of_ids_out_of_range():
    groups, outcome = torch.tensor([-7, G, -1, 2]), torch.full((4,), HIT, dtype=torch.uint8)
    coefficients = torch.rand(G) + 1
    assert backend.row_scale(coefficients, outcome, groups).tolist() == [0, 0, 0, coefficients[2].item()]


@pytest.mark.parametrize("kind", ["ids", "lists", "bits"])
@pytest.mark.parametrize("rule", RULES)
def test_one_call_is_the_steps_one_by_one(kind, rule):
    """Bit for bit what the default composition of the four steps gives."""
    logits, labels = torch.randn(200, 300), torch.randint(300, (200,))
    labels[::7] = -100
    _, _, groups, _ = batch(kind)
    if kind != "bits":
        groups.clamp_(max=G - 1)
    q = torch.softmax(torch.randn(G), 0)
    other_q = q.clone()
    arguments = (rule, 0.2, torch.rand(G), -100)
    fused = backend.grouped_forward(logits, labels, groups, q, *arguments)
    composed = Backend.grouped_forward(backend, logits, labels, groups, other_q, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(fused, composed, strict=True))
    assert torch.equal(q, other_q)
    assert torch.isfinite(fused[0])


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="no rule named 'cvar'"):
        update(statistics([1.0] * G, [1.0] * G), torch.full((G,), 1 / G), "cvar")
