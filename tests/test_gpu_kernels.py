"""The row kernels of both GPU backends against float64 torch: losses, outcomes and gradients."""

import pytest
import torch

from rd_kernels.backends.interface import Backend
from tests.gpu_oracles import (
    BAD_LABEL,
    HIT,
    HUGE,
    IGNORE,
    IGNORED,
    MISS,
    QUIET,
    cross_entropy,
    gradient,
    make,
)

pytestmark = [pytest.mark.filterwarnings(QUIET), pytest.mark.usefixtures("poisoned")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What a loss or log-sum-exp may be off by beyond eager float32: a few units in the last place of the logits.
EPSILON = 2.0**-21


def class_weights(vocabulary):
    return torch.rand(vocabulary) + 0.1


def expected_outcome(logits, labels, ignore_index=IGNORE):
    result = []
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        if label == ignore_index:
            result.append(IGNORED)
        elif not 0 <= label < len(row):
            result.append(BAD_LABEL)
        else:
            result.append(HIT if bool(row[label] >= row.max()) else MISS)
    return result


def assert_as_good_as_eager(actual, eager, truth, epsilon=EPSILON):
    """The largest error is at most that of eager torch plus ``epsilon`` of the largest value."""
    error, allowed = (actual.double() - truth).abs().max(), (eager.double() - truth).abs().max()
    allowed = allowed + epsilon * (1 + truth.abs().max())
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


OPTIONS = pytest.mark.parametrize(
    ("weighted", "smoothing"), [(False, 0.0), (True, 0.0), (False, 0.1), (True, 0.1)]
)
SHAPES = [(3, 1), (5, 2), (5, 127), (3, 1000), (4, 2003)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), SHAPES)
@OPTIONS
def test_rows_agree_with_float64_torch(kernels, dtype, rows, vocabulary, weighted, smoothing):
    logits, labels = make(rows, vocabulary, dtype)
    weight = class_weights(vocabulary) if weighted else None
    loss, normaliser, outcome = kernels.row_forward(logits, labels, weight, smoothing, IGNORE)
    assert loss.dtype == normaliser.dtype == torch.float32
    assert normaliser.shape == (2, rows)
    assert outcome.dtype == torch.uint8
    truth, eager = (
        cross_entropy(logits, labels, t, weight, smoothing) for t in (torch.float64, torch.float32)
    )
    assert_as_good_as_eager(loss, eager, truth)
    wide = logits.double()
    maximum, log_sum = normaliser
    assert torch.equal(maximum, logits.float().amax(dim=1))
    assert_as_good_as_eager(maximum + log_sum, torch.logsumexp(logits.float(), 1), torch.logsumexp(wide, 1))
    assert outcome.tolist() == expected_outcome(logits, labels)

    grad_out, scale = torch.rand(()), torch.randn(rows)
    actual = kernels.row_backward(grad_out, scale, logits, labels, normaliser, weight, smoothing, IGNORE)
    assert actual.dtype == dtype
    factor = grad_out * scale
    truth, eager = (
        gradient(logits, labels, factor, t, weight, smoothing) for t in (torch.float64, torch.float32)
    )
    assert_as_good_as_eager(actual, eager, truth)


@pytest.mark.parametrize(("rows", "vocabulary"), [(2, 30522), (1, 128256)])
def test_vocabularies_of_real_models(kernels, rows, vocabulary):
    logits, labels = make(rows, vocabulary, torch.bfloat16)
    loss, normaliser, _ = kernels.row_forward(logits, labels, None, 0.0, IGNORE)
    truth, eager = (cross_entropy(logits, labels, t) for t in (torch.float64, torch.float32))
    assert_as_good_as_eager(loss, eager, truth)
    actual = kernels.row_backward(None, None, logits, labels, normaliser, None, 0.0, IGNORE)
    ones = torch.ones(rows)
    truth, eager = (gradient(logits, labels, ones, t) for t in (torch.float64, torch.float32))
    assert_as_good_as_eager(actual, eager, truth, epsilon=2.0**-23)


def test_no_rows(kernels):
    logits, labels = make(0, 7, torch.float32)
    loss, normaliser, outcome = kernels.row_forward(logits, labels, None, 0.0, IGNORE)
    assert loss.shape == outcome.shape == (0,)
    assert normaliser.shape == (2, 0)
    assert kernels.row_backward(None, None, logits, labels, normaliser, None, 0.0, IGNORE).shape == (
        0,
        7,
    )
    for groups in (labels, labels.new_zeros(0, 3), labels.new_zeros(0, 1, dtype=torch.int32)):
        stats, status = kernels.group_reduce(loss, outcome, groups, 2)
        assert stats.count_nonzero() == 0
        assert status.tolist() == [0, 0]
        assert kernels.row_scale(torch.ones(2), outcome, groups).shape == (0,)


def test_rows_without_a_counted_label(kernels):
    logits, _ = make(8, 127, torch.float32)
    labels = torch.tensor([5, IGNORE, 127, -1, HUGE, -HUGE, 126, 0])
    logits[1:6] = float("nan")  # never read
    loss, normaliser, outcome = kernels.row_forward(logits, labels, None, 0.0, IGNORE)
    assert outcome.tolist() == expected_outcome(logits, labels)
    assert loss[1] == 0
    assert normaliser[:, 1].tolist() == [0, 0]
    assert loss[2:6].isnan().all()
    assert normaliser[:, 2:6].isnan().all()
    counted = torch.tensor([0, 6, 7])
    truth = cross_entropy(logits[counted], labels[counted], torch.float64)
    torch.testing.assert_close(loss[counted].double(), truth, rtol=1e-6, atol=1e-6)
    scale = torch.full((8,), float("nan"))
    scale[counted] = 1.0
    grad = kernels.row_backward(None, scale, logits, labels, normaliser, None, 0.0, IGNORE)
    assert grad[1:6].count_nonzero() == 0
    assert grad[counted].isfinite().all()


def test_ignore_index_inside_the_vocabulary(kernels):
    logits, labels = make(6, 4, torch.float32)
    labels[:3] = 2
    loss, normaliser, outcome = kernels.row_forward(logits, labels, None, 0.0, 2)
    grad = kernels.row_backward(None, None, logits, labels, normaliser, None, 0.0, 2)
    ignored = labels == 2
    assert (outcome[ignored] == IGNORED).all()
    assert loss[ignored].count_nonzero() == grad[ignored].count_nonzero() == 0
    assert (loss[~ignored] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted_and_smoothed", [False, True])
def test_non_finite_logits_as_in_torch(kernels, dtype, weighted_and_smoothed):
    inf, nan = float("inf"), float("nan")
    vocabulary = 2003
    logits, labels = make(11, vocabulary, dtype)
    labels[:] = 3
    logits[0, 1900] = nan
    logits[1, 1900] = inf
    logits[2, 3] = inf
    logits[3] = -inf
    logits[4, 3] = -inf
    logits[5, 1500:] = -inf
    logits[6, :1999] = -inf  # the first blocks hold nothing finite, the label neither
    logits[7, 3] = nan
    logits[8, [3, 4]] = inf
    logits[9, 3], logits[9, 700] = inf, nan
    weight, smoothing = (class_weights(vocabulary), 0.1) if weighted_and_smoothed else (None, 0.0)
    loss, normaliser, outcome = kernels.row_forward(logits, labels, weight, smoothing, IGNORE)
    truth = cross_entropy(logits, labels, torch.float64, weight, smoothing)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert outcome.tolist() == expected_outcome(logits, labels)
    finite = [4, 5, 6, 10]
    truth = logits[finite].double().logsumexp(1)
    torch.testing.assert_close(normaliser[:, finite].sum(0).double(), truth, rtol=1e-6, atol=1e-6)
    assert normaliser[1, [0, 1, 2, 3, 7, 8, 9]].isnan().all()


def test_largest_finite_logits_do_not_overflow(kernels):
    top = torch.finfo(torch.float32).max
    logits = torch.tensor([[top, top, -top], [-top, -top, -top], [top, 0.0, -top]])
    labels = torch.tensor([0, 1, 0])
    loss, _, outcome = kernels.row_forward(logits, labels, None, 0.0, IGNORE)
    torch.testing.assert_close(loss.double(), cross_entropy(logits, labels, torch.float64))
    assert outcome.tolist() == [HIT, HIT, HIT]


@pytest.mark.parametrize("margin", [5.0, 12.0, 30.0, 90.0])
def test_small_losses_of_confident_rows_keep_their_digits(kernels, margin):
    logits = torch.full((1, 1000), 40.0)
    logits[0, 7] += margin
    labels = torch.tensor([7])
    loss, normaliser, outcome = kernels.row_forward(logits, labels, None, 0.0, IGNORE)
    truth, eager = (cross_entropy(logits, labels, t) for t in (torch.float64, torch.float32))
    assert_as_good_as_eager(loss, eager, truth, epsilon=2.0**-22)
    assert outcome.tolist() == [HIT]
    grad = kernels.row_backward(None, None, logits, labels, normaliser, None, 0.0, IGNORE)
    truth = gradient(logits, labels, torch.ones(1), torch.float64)
    assert (grad.double() - truth).abs().max() <= 2.0**-22


def test_a_tie_with_the_maximum_is_a_hit(kernels):
    logits = torch.tensor([[1.0, 2.0, 2.0], [2.0, 1.0, 2.0]])
    _, _, outcome = kernels.row_forward(logits, torch.tensor([2, 1]), None, 0.0, IGNORE)
    assert outcome.tolist() == [HIT, MISS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["padded", "odd padding", "offset", "expanded"])
def test_any_row_stride_and_start(kernels, dtype, layout):
    rows, vocabulary = 4, 1500
    if layout == "expanded":
        logits = make(1, vocabulary, dtype)[0].expand(rows, vocabulary)
    else:
        columns, first = {"padded": (1536, 0), "odd padding": (1507, 0), "offset": (1519, 3)}[layout]
        logits = make(rows, columns, dtype)[0][:, first : first + vocabulary]
    labels = torch.randint(vocabulary, (rows,))
    dense = logits.contiguous()
    assert logits.stride(0) != dense.stride(0)
    strided, plain = (kernels.row_forward(z, labels, None, 0.1, IGNORE) for z in (logits, dense))
    for a, b in zip(strided, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    normaliser = plain[1]
    expected = kernels.row_backward(None, None, dense, labels, normaliser, None, 0.1, IGNORE)
    assert torch.equal(
        kernels.row_backward(None, None, logits, labels, normaliser, None, 0.1, IGNORE), expected
    )
    # Written into a view: nothing beside it may change.
    buffer = torch.full((rows, vocabulary + 21), 5.0, dtype=dtype)
    out = buffer[:, 9 : 9 + vocabulary]
    assert kernels.row_backward(None, None, logits, labels, normaliser, None, 0.1, IGNORE, out=out) is out
    assert torch.equal(out, expected)
    assert (buffer[:, :9] == 5).all()
    assert (buffer[:, 9 + vocabulary :] == 5).all()


@pytest.mark.parametrize("form", ["none", "scalar", "dense", "expanded", "strided"])
@pytest.mark.parametrize("scaled", [False, True])
def test_every_form_of_grad_out(kernels, form, scaled):
    rows, vocabulary = 5, 127
    logits, labels = make(rows, vocabulary, torch.float32)
    grad_out = {
        "none": None,
        "scalar": torch.tensor(-0.7),
        "dense": torch.randn(rows),
        "expanded": torch.tensor(1.3).expand(rows),
        "strided": torch.randn(3 * rows)[::3],
    }[form]
    scale = torch.rand(rows) if scaled else None
    _, normaliser, _ = kernels.row_forward(logits, labels, None, 0.0, IGNORE)
    actual = kernels.row_backward(grad_out, scale, logits, labels, normaliser, None, 0.0, IGNORE)
    factor = torch.ones(rows)
    for part in (grad_out, scale):
        factor = factor if part is None else factor * part
    truth = gradient(logits, labels, factor, torch.float64)
    torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=1e-7)


def test_a_factor_of_zero_stops_non_finite_logits(kernels):
    logits, labels = make(4, 2003, torch.float32)
    logits[1] = float("nan")
    logits[2, 5] = float("inf")
    scale = torch.tensor([1.0, 0.0, -0.0, 2.0])
    _, normaliser, _ = kernels.row_forward(logits, labels, None, 0.0, IGNORE)
    grad = kernels.row_backward(None, scale, logits, labels, normaliser, None, 0.0, IGNORE)
    assert grad[1:3].count_nonzero() == 0
    assert grad[[0, 3]].isfinite().all()
    scale[1] = float("nan")
    grad = kernels.row_backward(None, scale, logits, labels, normaliser, None, 0.0, IGNORE)
    assert grad[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@OPTIONS
def test_backward_in_place_is_the_same_bits(kernels, dtype, weighted, smoothing):
    logits, labels = make(4, 2003, dtype)
    labels[2] = IGNORE
    weight = class_weights(2003) if weighted else None
    scale = torch.tensor([0.5, 0.0, 1.0, -2.0])
    _, normaliser, _ = kernels.row_forward(logits, labels, weight, smoothing, IGNORE)
    apart = kernels.row_backward(None, scale, logits, labels, normaliser, weight, smoothing, IGNORE)
    kernels.row_backward(None, scale, logits, labels, normaliser, weight, smoothing, IGNORE, out=logits)
    assert torch.equal(logits, apart)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_minus_onehot(kernels, dtype):
    logits, labels = make(4, 1003, dtype)
    labels[1], labels[2] = IGNORE, 1003
    expected = torch.softmax(logits.double(), dim=1)
    for row in (0, 3):
        expected[row, labels[row]] -= 1
    expected[1:3] = 0
    reference = kernels.row_forward(logits, labels, None, 0.0, IGNORE)
    result = kernels.softmax_minus_onehot_(logits, labels, IGNORE)
    for a, b in zip(result, reference, strict=True):
        # Both are right to a few roundings, but may sum a row in another order.
        torch.testing.assert_close(a, b, rtol=2.0**-21, atol=2.0**-21, equal_nan=True)
    # Half a unit in the last place of the result, the rounding of z - max in float32, and that of p - 1.
    bound = (torch.finfo(dtype).eps / 2 + 2.0**-19) * expected.abs() + 2.0**-23
    assert ((logits.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocabulary", "stride", "first"),
    [
        (1, 1, 0),
        (5, 8, 3),
        (127, 127, 1),
        (2048, 2048, 0),
        (2051, 2080, 0),
        (30522, 30528, 0),
        (40000, 40000, 0),
    ],
)
def test_softmax_minus_onehot_of_any_row(kernels, dtype, vocabulary, stride, first):
    """Rows that begin anywhere, end inside a 16-byte piece, are shorter than one; nothing beside them changes."""
    rows = 3 if vocabulary < 30000 else 2
    memory = torch.full((rows * stride + first,), 7.0, dtype=dtype)
    logits = memory.as_strided((rows, vocabulary), (stride, 1), first)
    values, labels = make(rows, vocabulary, dtype)
    logits.copy_(values)
    labels[0] = vocabulary - 1
    results = kernels.softmax_minus_onehot_(logits, labels, IGNORE)
    expected = kernels.row_forward(values, labels, None, 0.0, IGNORE)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-21, atol=2.0**-21)
    eager, truth = (gradient(values, labels, torch.ones(rows), t) for t in (torch.float32, torch.float64))
    assert_as_good_as_eager(logits, eager, truth)
    logits.fill_(7.0)
    assert (memory == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_minus_onehot_of_non_finite_logits(kernels, dtype):
    """NaN where the loss is: as the two kernels that it stands for."""
    inf, nan = float("inf"), float("nan")
    logits, labels = make(9, 300, dtype)
    labels[:] = 3
    logits[0, 100], logits[1, 100], logits[2, 3], logits[3], logits[4, 3] = nan, inf, inf, -inf, -inf
    logits[5, 50:], logits[6] = -inf, nan
    labels[6], labels[7] = IGNORE, 300
    apart = logits.clone()
    expected = Backend.softmax_minus_onehot_(kernels, apart, labels, IGNORE)
    results = kernels.softmax_minus_onehot_(logits, labels, IGNORE)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-21, atol=2.0**-21, equal_nan=True)
    torch.testing.assert_close(logits, apart, rtol=torch.finfo(dtype).eps, atol=2.0**-22, equal_nan=True)


@pytest.mark.slow
def test_more_elements_than_int32_counts(kernels):
    stride = 2**31 + 8
    memory = torch.zeros(stride + 300, dtype=torch.bfloat16)
    logits = memory.as_strided((2, 300), (stride, 1))
    logits.copy_(torch.randn(2, 300))
    labels = torch.tensor([4, 5])
    truth = cross_entropy(logits, labels, torch.float64)
    expected = gradient(logits, labels, torch.ones(2), torch.float32)
    loss, _, _ = kernels.softmax_minus_onehot_(logits, labels, IGNORE)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-6)
