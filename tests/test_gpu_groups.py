"""The group kernels of both GPU backends: bits packed, sums by group, row factors; and the op as a whole.

The oracles are loops over rows and torch's autograd. The rules: test_gpu_rules.py.
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

pytestmark = [pytest.mark.filterwarnings(QUIET), pytest.mark.usefixtures("poisoned"), pytest.mark.grid]


FORMS = pytest.mark.parametrize("form", ["ids", "lists", "bits"])


def words_of(mask):
    """[N, G] bool -> [N, W] int32 by sums of powers of two."""
    words = []
    for part in mask.split(32, dim=1):
        word = (part.long() * 2 ** torch.arange(part.shape[1])).sum(1)
        words.append(word - 2**32 * (word >= 2**31))
    return torch.stack(words, dim=1).to(torch.int32)


def make_groups(rows, count, form):
    """-> losses, outcomes, groups; lists name some groups twice and hold -1 anywhere."""
    loss = torch.rand(rows) * 8
    outcome = torch.randint(4, (rows,)).to(torch.uint8)
    loss[outcome == IGNORED] = 0
    loss[outcome == BAD_LABEL] = float("nan")
    if form == "bits":
        return loss, outcome, words_of(torch.rand(rows, count) < 1.5 / count)
    groups = torch.randint(-1, count, (rows, 4))
    groups[::3, 3] = groups[::3, 0]
    groups[::5] = -1
    return loss, outcome, groups[:, 1].contiguous() if form == "ids" else groups


def members(groups, row, count):
    """The groups that contain ``row``, and whether it names one that there is not."""
    if groups.dtype == torch.int32:
        words = groups[row].tolist()
        return [group for group in range(count) if words[group // 32] >> group % 32 & 1], False
    ids = groups[row].reshape(-1).tolist()
    return sorted({i for i in ids if 0 <= i < count}), any(not -1 <= i < count for i in ids)


def expected_stats(loss, outcome, groups, count):
    stats = torch.zeros(4, count + 2, dtype=torch.float64)
    bad_labels = bad_groups = 0
    for row, (value, result) in enumerate(zip(loss.tolist(), outcome.tolist(), strict=True)):
        bad_labels += result == BAD_LABEL
        if result in (MISS, HIT):
            inside, bad = members(groups, row, count)
            bad_groups += bad
            for column in [*inside, *([] if inside or bad else [count]), count + 1]:
                stats[:3, column] += torch.tensor([value, 1, result == HIT], dtype=torch.float64)
    return stats, [bad_labels, bad_groups]


@pytest.mark.parametrize("count", [1, 3, 31, 32, 33, 64, 70, 300])
@pytest.mark.parametrize("rows", [0, 1, 33, 300])
def test_pack_mask_sets_the_bits_of_a_row(kernels, rows, count):
    for density in (0.3, 1.0):
        mask = torch.rand(rows, count) < density
        words = kernels.pack_mask(mask)
        assert words.dtype == torch.int32
        assert words.shape == (rows, -(-count // 32))
        assert torch.equal(words, words_of(mask))


@FORMS
@pytest.mark.parametrize("count", [1, 3, 30, 31, 32, 33, 64, 70, 254, 300])
@pytest.mark.parametrize("rows", [1, 33, 300])
def test_group_reduce_counts_every_row_once(kernels, form, count, rows):
    loss, outcome, groups = make_groups(rows, count, form)
    stats, status = kernels.group_reduce(loss, outcome, groups, count)
    expected, bad = expected_stats(loss, outcome, groups, count)
    assert stats.shape == (4, count + 2)
    assert status.dtype == torch.int64
    assert status.tolist() == bad
    torch.testing.assert_close(stats[0].double().cpu(), expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(stats[1:].double().cpu(), expected[1:])
    again, _ = kernels.group_reduce(loss, outcome, groups, count)
    assert torch.equal(stats, again)


@pytest.mark.parametrize("count", [5, 70, 300])
def test_every_form_gives_the_same_sums(kernels, count):
    """Bits, and lists that name each of a row's groups twice, in falling order."""
    loss, outcome, words = make_groups(200, count, "bits")
    lists = torch.full((200, 2 * count), -1)
    for row in range(200):
        inside, _ = members(words, row, count)
        for place, group in enumerate(reversed([group for group in inside for _ in range(2)])):
            lists[row, place] = group
    by_bits, by_lists = (kernels.group_reduce(loss, outcome, groups, count) for groups in (words, lists))
    for a, b in zip(by_bits, by_lists, strict=True):
        assert torch.equal(a, b)
    coefficients = torch.rand(count)
    scales = [kernels.row_scale(coefficients, outcome, groups) for groups in (words, lists)]
    torch.testing.assert_close(*scales, rtol=1e-6, atol=0)


def test_group_reduce_over_more_chunks_than_one_step(kernels):
    rows, count = 128 * 70, 2
    loss, outcome, groups = make_groups(rows, count, "ids")
    stats, _ = kernels.group_reduce(loss, outcome, groups, count)
    counted = outcome <= HIT
    for group in range(count):
        chosen = loss[counted & (groups == group)].double()
        assert stats[1, group] == len(chosen)
        torch.testing.assert_close(stats[0, group].double(), chosen.sum(), rtol=1e-6, atol=0)


def test_group_reduce_keeps_a_nan_in_its_group(kernels):
    loss = torch.tensor([1.0, float("nan"), 2.0, 4.0])
    outcome = torch.zeros(4, dtype=torch.uint8)
    ids = torch.tensor([0, 1, 0, -1])
    for groups in (ids, ids[:, None].repeat(1, 2), torch.tensor([[1], [2], [1], [0]], dtype=torch.int32)):
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


def test_a_list_with_bad_ids_is_counted_once(kernels):
    """A good id beside a bad one still counts, as in the reference: the loss is NaN anyway."""
    bad = [[2, -2, HUGE], [-1, -HUGE, -1], [1, 7, 1], [0, -1, -1], [-1, -1, -1], [2, 2, 2], [1, 0, 1]]
    groups = torch.tensor(bad)
    outcome = torch.tensor([MISS, HIT, HIT, MISS, HIT, IGNORED, MISS], dtype=torch.uint8)
    loss = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 0.0, 32.0])
    coefficients = torch.tensor([3.0, 5.0])
    stats, status = kernels.group_reduce(loss, outcome, groups, 2)
    scale = kernels.row_scale(coefficients, outcome, groups)
    expected, bad = expected_stats(loss, outcome, groups, 2)
    assert status.tolist() == bad == [0, 3]
    assert torch.equal(stats.double().cpu(), expected)
    reference = get("reference")
    assert torch.equal(stats, reference.group_reduce(loss, outcome, groups, 2)[0])
    assert torch.equal(scale, reference.row_scale(coefficients, outcome, groups))


@FORMS
@pytest.mark.parametrize("count", [1, 3, 33, 70, 300])
def test_row_scale_adds_the_coefficients_of_a_rows_groups(kernels, form, count):
    _, outcome, groups = make_groups(200, count, form)
    coefficients = torch.rand(count)
    scale = kernels.row_scale(coefficients, outcome, groups)
    expected = [
        sum((coefficients[group].item() for group in members(groups, row, count)[0]), 0.0)
        if result <= HIT
        else 0.0
        for row, result in enumerate(outcome.tolist())
    ]
    torch.testing.assert_close(scale.tolist(), expected, rtol=1e-6, atol=1e-7)


@FORMS
def test_whole_op_is_the_gradient_of_the_weighted_group_means(kernels, form):
    rows, vocabulary, count = 40, 127, 3
    logits, labels = make(rows, vocabulary, torch.float32)
    labels[::7] = IGNORE
    _, _, groups = make_groups(rows, count, form)
    q = torch.tensor([0.2, 0.3, 0.5])
    leaf = logits.double().requires_grad_()
    row_loss = cross_entropy(leaf, labels, torch.float64)
    counted = labels != IGNORE
    inside = [
        torch.tensor([group in members(groups, row, count)[0] for row in range(rows)]) & counted
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


@FORMS
@pytest.mark.parametrize(
    ("rows", "count", "rule"),
    [
        (1, 1, "erm"),
        (130, 14, "group_dro"),
        (33, 15, "group_dro_hold"),
        (20, 62, "tilted_rows"),
        (9, 63, "group_dro"),
        (40, 33, "tilted_groups"),
        (12, 300, "worst_group"),
    ],
)
def test_one_launch_gives_the_bits_of_several(kernels, form, rows, count, rule):
    """Whatever the number of rows in a chunk and of groups in a tile; and again: the counters are left as found."""
    logits, labels = make(rows, 40, torch.float32)
    labels[2::5], labels[3::50] = IGNORE, 40  # out of range
    _, _, groups = make_groups(rows, count, form)
    if form != "bits":
        groups[1::60] = count
    adjustment = torch.rand(count)
    start = torch.softmax(torch.randn(count), 0)
    options = (rule, 0.3, adjustment, IGNORE)
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
