"""The group kernels of both GPU backends: reduction, update of the group weights, row factors; and the op as a whole.

The oracles are loops over rows, the update as its authors published it, and torch's autograd.
"""

import pytest
import torch

from rd_kernels.backends.interface import Backend
from rd_kernels.backends.registry import get
from tests.gpu_oracles import (
    BAD_LABEL,
    HIT,
    HUGE,
    IGNORE,
    IGNORED,
    MISS,
    QUIET,
    cross_entropy,
    make,
)

pytestmark = [pytest.mark.filterwarnings(QUIET), pytest.mark.usefixtures("poisoned")]


def make_groups(rows, count, masked):
    loss = torch.rand(rows) * 8
    outcome = torch.randint(4, (rows,)).to(torch.uint8)
    loss[outcome == IGNORED] = 0
    loss[outcome == BAD_LABEL] = float("nan")
    if masked:
        return loss, outcome, torch.rand(rows, count) < 1.5 / count
    return loss, outcome, torch.randint(-1, count, (rows,))


def members(groups, row, count):
    """The groups that contain ``row``; None for an id out of range."""
    if groups.dtype == torch.bool:
        return groups[row].nonzero()[:, 0].tolist()
    group = int(groups[row])
    if group == -1:
        return []
    return [group] if 0 <= group < count else None


def expected_stats(loss, outcome, groups, count):
    stats = torch.zeros(4, count + 2, dtype=torch.float64)
    bad_labels = bad_groups = 0
    for row, (value, result) in enumerate(zip(loss.tolist(), outcome.tolist(), strict=True)):
        bad_labels += result == BAD_LABEL
        if result in (MISS, HIT):
            inside = members(groups, row, count)
            bad_groups += inside is None
            columns = [] if inside is None else (inside or [count])
            for column in [*columns, count + 1]:
                stats[:3, column] += torch.tensor([value, 1, result == HIT], dtype=torch.float64)
    return stats, [bad_labels, bad_groups]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [1, 3, 14, 15, 70])
@pytest.mark.parametrize("rows", [1, 33, 300])
def test_group_reduce_counts_every_row_once(kernels, masked, count, rows):
    loss, outcome, groups = make_groups(rows, count, masked)
    stats, status = kernels.group_reduce(loss, outcome, groups, count)
    expected, bad = expected_stats(loss, outcome, groups, count)
    assert stats.shape == (4, count + 2)
    assert status.dtype == torch.int64
    assert status.tolist() == bad
    torch.testing.assert_close(stats[0].double().cpu(), expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(stats[1:].double().cpu(), expected[1:])
    again, _ = kernels.group_reduce(loss, outcome, groups, count)
    assert torch.equal(stats, again)


def test_group_reduce_over_more_chunks_than_one_step(kernels):
    rows, count = 128 * 70, 2
    loss, outcome, groups = make_groups(rows, count, masked=False)
    stats, _ = kernels.group_reduce(loss, outcome, groups, count)
    counted = outcome <= HIT
    for group in range(count):
        chosen = loss[counted & (groups == group)].double()
        assert stats[1, group] == len(chosen)
        torch.testing.assert_close(stats[0, group].double(), chosen.sum(), rtol=1e-6, atol=0)


def test_group_reduce_keeps_a_nan_in_its_group(kernels):
    loss = torch.tensor([1.0, float("nan"), 2.0, 4.0])
    outcome = torch.zeros(4, dtype=torch.uint8)
    for groups in (
        torch.tensor([0, 1, 0, -1]),
        torch.tensor([[1, 0], [0, 1], [1, 0], [0, 0]]).bool(),
    ):
        stats, _ = kernels.group_reduce(loss, outcome, groups, 2)
        assert stats[0].isnan().tolist() == [False, True, False, True]
        assert stats[0, [0, 2]].tolist() == [3.0, 4.0]


def test_bad_group_ids_are_counted_on_labelled_rows_only(kernels):
    groups = torch.tensor([2, -2, HUGE, 7, 0, 1])
    outcome = torch.tensor([MISS, HIT, MISS, IGNORED, HIT, BAD_LABEL], dtype=torch.uint8)
    loss = torch.tensor([1.0, 2.0, 4.0, 0.0, 8.0, float("nan")])
    stats, status = kernels.group_reduce(loss, outcome, groups, 2)
    assert status.tolist() == [1, 3]
    assert stats[:3].tolist() == [[8.0, 0.0, 0.0, 15.0], [1.0, 0.0, 0.0, 4.0], [1.0, 0.0, 0.0, 2.0]]
    scale = kernels.row_scale(torch.tensor([3.0, 5.0]), outcome, groups)
    assert scale.tolist() == [0, 0, 0, 0, 3.0, 0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [1, 3, 70])
def test_row_scale_adds_the_coefficients_of_a_rows_groups(kernels, masked, count):
    _, outcome, groups = make_groups(200, count, masked)
    coefficients = torch.rand(count)
    scale = kernels.row_scale(coefficients, outcome, groups)
    expected = [
        sum((coefficients[group].item() for group in members(groups, row, count)), 0.0)
        if result <= HIT
        else 0.0
        for row, result in enumerate(outcome.tolist())
    ]
    torch.testing.assert_close(scale.tolist(), expected, rtol=1e-6, atol=1e-7)


def make_stats(sums, counts):
    stats = torch.full((4, len(sums) + 2), 9.0)
    stats[0, :-2], stats[1, :-2] = torch.tensor(sums), torch.tensor(counts)
    return stats, torch.zeros(2, dtype=torch.int64)


def published_update(sums, counts, q, step_size, adjustment):
    """Sagawa et al. 2020, Algorithm 1, as it stands there: multiply, then normalise. In float64."""
    sums, counts, q, adjustment = (t.double().cpu() for t in (sums, counts, q, adjustment))
    present = counts > 0
    means = torch.where(present, sums / counts.clamp(min=1), 0.0)
    q = q * torch.where(present, (step_size * (means + adjustment)).exp(), 1.0)
    q = q / q.sum()
    coefficients = torch.where(present, q / counts.clamp(min=1), 0.0)
    return q, coefficients, (q * means).sum()


@pytest.mark.parametrize("count", [1, 3, 17, 300])
@pytest.mark.parametrize("step_size", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("adjusted", [False, True])
def test_group_dro_is_the_published_update(kernels, count, step_size, adjusted):
    counts = torch.randint(0, 5, (count,)).float()
    counts[0] = 2
    sums = torch.rand(count) * 4 * counts
    q = torch.rand(count)
    q /= q.sum()
    adjustment = torch.rand(count) if adjusted else None
    given = adjustment if adjusted else torch.zeros(count)
    new_q, coefficients, loss = published_update(sums, counts, q, step_size, given)
    stats, status = make_stats(sums.tolist(), counts.tolist())
    before = stats[:3].clone()
    actual_loss, actual = kernels.group_update(stats, status, q, "group_dro", step_size, adjustment)
    assert actual_loss.shape == ()
    close = {"rtol": 4e-6, "atol": 1e-7}
    torch.testing.assert_close(q.double().cpu(), new_q, **close)
    torch.testing.assert_close(actual.double().cpu(), coefficients, **close)
    torch.testing.assert_close(actual_loss.double().cpu(), loss, **close)
    assert torch.equal(stats[:3], before)
    assert torch.equal(stats[3, :count], q)
    assert stats[3, count] == 0
    torch.testing.assert_close(stats[3, count + 1].item(), 1.0, **close)


def test_group_dro_does_not_overflow(kernels):
    stats, status = make_stats([11.0, 700.0, 1.0], [1.0, 1.0, 1.0])
    q = torch.tensor([0.5, 0.25, 0.25])
    loss, _ = kernels.group_update(stats, status, q, "group_dro", 10.0, None)
    assert q.tolist() == [0, 1, 0]
    assert loss == 700


@pytest.mark.parametrize("objective", ["group_dro", "group_dro_hold"])
@pytest.mark.parametrize("step_size", [0.3, 3e30, 1e38, 1e150])
def test_any_step_size_as_in_the_reference(kernels, objective, step_size):
    """step_size times a loss may exceed what float32 holds: q is no NaN."""
    sums, counts = [40.0, 8.0, 0.0, 2e9, 40.0], [4.0, 2.0, 0.0, 1e8, 4.0]
    results = []
    for backend in (get("reference"), kernels):
        stats, status = make_stats(sums, counts)
        q = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2])
        loss, coefficients = backend.group_update(stats, status, q, objective, step_size, None)
        results.append((loss, coefficients, q, stats[3]))
    assert results[0][2].isfinite().all()
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2.0**-22, atol=0)


def test_erm_is_the_mean_over_rows(kernels):
    stats, status = make_stats([6.0, 0.0, 1.0], [3.0, 0.0, 2.0])
    q = torch.tensor([0.2, 0.3, 0.5])
    loss, coefficients = kernels.group_update(stats, status, q, "erm", 0.0, None)
    torch.testing.assert_close(loss.item(), 1.4)
    torch.testing.assert_close(coefficients.tolist(), [0.2] * 3)
    torch.testing.assert_close(stats[3].tolist(), [0.6, 0.0, 0.4, 0.0, 1.0])
    assert torch.equal(q, torch.tensor([0.2, 0.3, 0.5]))


@pytest.mark.parametrize("objective", ["erm", "group_dro"])
def test_no_row_in_any_group(kernels, objective):
    stats, status = make_stats([0.0, 0.0], [0.0, 0.0])
    q = torch.tensor([0.3, 0.7])
    before = q.clone()
    loss, coefficients = kernels.group_update(stats, status, q, objective, 0.1, None)
    assert loss == 0
    assert coefficients.tolist() == [0, 0]
    assert torch.equal(q, before)
    assert torch.equal(stats[3, :2], before if objective == "group_dro" else torch.zeros_like(before))


@pytest.mark.parametrize("objective", ["erm", "group_dro"])
@pytest.mark.parametrize("bad", [[1, 0], [0, 3]])
def test_a_bad_input_leaves_the_state_alone(kernels, objective, bad):
    stats, status = make_stats([2.0, 3.0], [1.0, 2.0])
    status.copy_(torch.tensor(bad))
    q = torch.tensor([0.3, 0.7])
    before = q.clone()
    loss, coefficients = kernels.group_update(stats, status, q, objective, 0.1, None)
    assert loss.isnan()
    assert coefficients.tolist() == [0, 0]
    assert stats[3].count_nonzero() == 0
    assert torch.equal(q, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_mean_keeps_the_group_weights(kernels, bad):
    stats, status = make_stats([2.0, bad, 0.0], [1.0, 2.0, 0.0])
    q = torch.tensor([0.25, 0.5, 0.25])
    loss, coefficients = kernels.group_update(stats, status, q, "group_dro", 0.1, None)
    assert not loss.isfinite()
    assert q.tolist() == [0.25, 0.5, 0.25]
    assert coefficients.tolist() == [0.25, 0.25, 0]


@pytest.mark.parametrize("masked", [False, True])
def test_whole_op_is_the_gradient_of_the_weighted_group_means(kernels, masked):
    rows, vocabulary, count = 40, 127, 3
    logits, labels = make(rows, vocabulary, torch.float32)
    labels[::7] = IGNORE
    _, _, groups = make_groups(rows, count, masked)
    q = torch.tensor([0.2, 0.3, 0.5])
    leaf = logits.double().requires_grad_()
    row_loss = cross_entropy(leaf, labels, torch.float64)
    counted = labels != IGNORE
    inside = [
        torch.tensor([group in members(groups, row, count) for row in range(rows)]) & counted
        for group in range(count)
    ]
    means = torch.stack([row_loss[rows_of].mean() for rows_of in inside])
    weights = q.double() * (0.5 * means.detach()).exp()
    weights /= weights.sum()
    truth = (weights * means).sum()
    (2 * truth).backward()

    loss, stats, status, scale, normaliser = kernels.grouped_forward(
        logits, labels, groups, q, "group_dro", 0.5, None, IGNORE
    )
    grad_out = torch.tensor(2.0)
    grad = kernels.row_backward(grad_out, scale, logits, labels, normaliser, None, 0.0, IGNORE)
    assert status.tolist() == [0, 0]
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(q.double(), weights, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[1, :count].tolist(), [float(rows_of.sum()) for rows_of in inside])
    torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "count", "objective"),
    [
        (1, 1, "erm"),
        (130, 14, "group_dro"),
        (33, 15, "group_dro_hold"),
        (20, 62, "erm"),
        (9, 63, "group_dro"),
    ],
)
def test_one_launch_gives_the_bits_of_several(kernels, masked, rows, count, objective):
    """Whatever the number of rows in a chunk and of groups in a tile; and again: the counters are left as found."""
    logits, labels = make(rows, 40, torch.float32)
    labels[2::5], labels[3::50] = IGNORE, 40  # out of range
    _, _, groups = make_groups(rows, count, masked)
    if not masked:
        groups[1::60] = count
    adjustment = torch.rand(count)
    start = torch.softmax(torch.randn(count), 0)
    options = (objective, 0.3, adjustment, IGNORE)
    q = start.clone()
    expected = (*Backend.grouped_forward(kernels, logits, labels, groups, q, *options), q)
    for _ in range(2):
        q = start.clone()
        actual = (*kernels.grouped_forward(logits, labels, groups, q, *options), q)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_rows_of_a_valid_batch_in_one_launch(kernels):
    """As above, without the bad labels and ids that hide the loss."""
    logits, labels = make(140, 40, torch.bfloat16)
    groups, q = torch.randint(-1, 3, (140,)), torch.full((3,), 1 / 3)
    separate = q.clone()
    expected = Backend.grouped_forward(
        kernels, logits, labels, groups, separate, "group_dro", 0.3, None, IGNORE
    )
    actual = kernels.grouped_forward(logits, labels, groups, q, "group_dro", 0.3, None, IGNORE)
    assert actual[0].isfinite()
    assert all(torch.equal(a, b) for a, b in zip((*actual, q), (*expected, separate), strict=True))


def test_many_groups_update_in_turns(kernels):
    """More than the objective treats at a time."""
    count = 700
    sums, counts = torch.rand(count) * 9, torch.randint(0, 3, (count,)).float()
    q = torch.softmax(torch.randn(count), 0)
    new_q, coefficients, loss = published_update(sums, counts, q, 0.5, torch.zeros(count))
    stats, status = make_stats(sums.tolist(), counts.tolist())
    actual_loss, actual = kernels.group_update(stats, status, q, "group_dro", 0.5, None)
    torch.testing.assert_close(q.double().cpu(), new_q, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual.double().cpu(), coefficients, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual_loss.double().cpu(), loss, rtol=1e-6, atol=0)
