"""What both GPU backends tell of a row beside its loss: entropy, and how many logits are not <= the label's.

The entropy is held to float64 and to eager float32 as the losses are (test_gpu_kernels.py), the count to a loop.
"""

import pytest
import torch

from rd_kernels.backends.registry import get
from tests.gpu_oracles import BAD_LABEL, HIT, HUGE, IGNORE, IGNORED, QUIET, make
from tests.test_gpu_kernels import DTYPES, OPTIONS, SHAPES, assert_as_good_as_eager, class_weights

pytestmark = [pytest.mark.filterwarnings(QUIET), pytest.mark.usefixtures("poisoned"), pytest.mark.grid]

SUMS_APART = {"rtol": 2.0**-21, "atol": 2.0**-21, "equal_nan": True}


def entropy(logits, dtype):
    log_p = torch.log_softmax(logits.to(dtype), dim=1)
    return -torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p).sum(1)


def above(logits, labels):
    wide = logits.double().cpu()
    return [sum(not z <= row[y] for z in row.tolist()) for row, y in zip(wide, labels.tolist(), strict=True)]


def check(details, logits, labels):
    """Of rows that all count."""
    truth, eager = (entropy(logits, t) for t in (torch.float64, torch.float32))
    assert_as_good_as_eager(details[0], eager, truth)
    assert (details[0] >= 0).all()
    assert details[1].tolist() == above(logits, labels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), SHAPES)
@OPTIONS
def test_details_whatever_the_loss(kernels, dtype, rows, vocabulary, weighted, smoothing):
    logits, labels = make(rows, vocabulary, dtype)
    options = (class_weights(vocabulary) if weighted else None, smoothing, IGNORE)
    details = torch.empty(2, rows)
    results = kernels.row_forward(logits, labels, *options, details)
    check(details, logits, labels)
    for a, b in zip(results, kernels.row_forward(logits, labels, *options), strict=True):
        torch.testing.assert_close(a, b, **SUMS_APART)
    assert ((results[2] == HIT) == (details[1] == 0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [127, 2048, 2051, 30522])
def test_details_of_rows_that_are_overwritten(kernels, dtype, vocabulary):
    logits, labels = make(2, vocabulary, dtype)
    given, details = logits.clone(), torch.empty(2, 2)
    results = kernels.softmax_minus_onehot_(logits, labels, IGNORE, details)
    check(details, given, labels)
    plain = given.clone()
    for a, b in zip(results, kernels.softmax_minus_onehot_(plain, labels, IGNORE), strict=True):
        torch.testing.assert_close(a, b, **SUMS_APART)
    torch.testing.assert_close(logits, plain, rtol=torch.finfo(dtype).eps, atol=2.0**-22)


@pytest.mark.parametrize("vocabulary", [1000, 30522])
@pytest.mark.parametrize("margin", [0.0, 1e-3, 5.0, 12.0, 30.0, 90.0, 3e38])
def test_near_uniform_and_near_certain_rows(kernels, vocabulary, margin):
    """Also far from zero, where a logit's own rounding is all that is left of the small ones."""
    for offset, noise in ((0.0, 0.0), (40.0, 1e-3), (-5e3, 0.5)):
        logits = offset + noise * torch.randn(2, vocabulary)
        logits[0, vocabulary // 2] += margin
        logits[1, [3, vocabulary - 1]] += margin
        labels = torch.tensor([vocabulary // 2, 5])
        details = torch.empty(2, 2)
        kernels.row_forward(logits, labels, None, 0.0, IGNORE, details)
        check(details, logits, labels)


def test_a_maximum_that_comes_late(kernels):
    """The sums so far are put relative to it, from nothing (-inf) on and over as much as float32 holds."""
    top = torch.finfo(torch.float32).max
    rising = torch.linspace(-60, 60, 5000)
    logits = torch.stack(
        [rising, rising.flip(0), torch.where(rising < 55, -torch.inf, rising), rising * 1e36]
    )
    logits[3, :9] = torch.tensor([-top, -top / 2, -1.0, 0.0, 1.0, 1e-30, -1e-30, -torch.inf, -1e38])
    labels = torch.tensor([2500, 4, 4990, 3])
    details = torch.empty(2, 4)
    kernels.row_forward(logits, labels, None, 0.0, IGNORE, details)
    check(details, logits, labels)


def test_rows_without_a_counted_label(kernels):
    logits, _ = make(6, 300, torch.float32)
    labels = torch.tensor([5, IGNORE, 300, -1, HUGE, 0])
    logits[1:5] = torch.nan  # never read
    details = torch.empty(2, 6)
    kernels.row_forward(logits, labels, None, 0.0, IGNORE, details)
    again, overwritten = torch.empty(2, 6), logits.clone()
    _, _, outcome = kernels.softmax_minus_onehot_(overwritten, labels, IGNORE, again)
    for found in (details, again):
        assert (found[:, outcome == IGNORED] == 0).all()
        assert found[:, outcome == BAD_LABEL].isnan().all()
        check(found[:, [0, 5]], logits[[0, 5]], labels[[0, 5]])
    kernels.row_forward(logits[:0], labels[:0], None, 0.0, IGNORE, torch.empty(2, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [50, 2003])
def test_non_finite_logits_as_in_the_reference(kernels, dtype, vocabulary):
    inf, nan = float("inf"), float("nan")
    logits, labels = make(11, vocabulary, dtype)
    labels[:] = 3
    logits[0, 40] = nan
    logits[1, 40] = inf
    logits[2, 3] = inf
    logits[3] = -inf
    logits[4, 3] = -inf
    logits[5, 25:] = -inf
    logits[6, :-4] = -inf  # the first blocks hold nothing finite, the label neither
    logits[7, 3] = nan
    logits[8, [3, 4]] = inf
    logits[9, 3], logits[9, 30] = inf, nan
    expected, details, again = (torch.empty(2, 11) for _ in range(3))
    get("reference").row_forward(logits, labels, None, 0.0, IGNORE, expected)
    kernels.row_forward(logits, labels, None, 0.0, IGNORE, details)
    assert details[1].tolist() == expected[1].tolist() == above(logits, labels)
    assert details[0, [0, 1, 2, 3, 7, 8, 9]].isnan().all()
    torch.testing.assert_close(details[0], expected[0], rtol=1e-6, atol=1e-6, equal_nan=True)
    kernels.softmax_minus_onehot_(logits, labels, IGNORE, again)
    torch.testing.assert_close(again, details, **SUMS_APART)


@pytest.mark.parametrize("overwritten", [False, True])
@pytest.mark.parametrize(("vocabulary", "stride", "first"), [(1, 3, 1), (127, 127, 1), (2051, 2080, 3)])
def test_any_layout_of_logits_and_details(kernels, overwritten, vocabulary, stride, first):
    """Rows that begin anywhere; details with a stride of their own, and nothing beside them changed."""
    rows = 3
    for dtype in DTYPES:
        memory = torch.full((rows * stride + first,), 7.0, dtype=dtype)
        logits = memory.as_strided((rows, vocabulary), (stride, 1), first)
        values, labels = make(rows, vocabulary, dtype)
        logits.copy_(values)
        buffer = torch.full((2, rows + 7), 5.0)
        details = buffer[:, 2 : 2 + rows]
        if overwritten:
            kernels.softmax_minus_onehot_(logits, labels, IGNORE, details)
        else:
            kernels.row_forward(logits, labels, None, 0.0, IGNORE, details)
        check(details, values, labels)
        assert (buffer[:, :2] == 5).all()
        assert (buffer[:, 2 + rows :] == 5).all()


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_a_count_below_k_is_a_label_among_the_top_k(kernels, k):
    """Ties with the label are in its favour, as for a hit."""
    logits = torch.randint(-3, 4, (40, 30)).float()
    labels = torch.randint(30, (40,))
    details = torch.empty(2, 40)
    _, _, outcome = kernels.row_forward(logits, labels, None, 0.0, IGNORE, details)
    smallest_of_the_top = logits.topk(k, dim=1).values[:, -1]
    z_label = logits.gather(1, labels[:, None])[:, 0]
    assert torch.equal(details[1] < k, z_label >= smallest_of_the_top)
    assert torch.equal(details[1] == 0, outcome == HIT)
