"""The native row kernels against float64 references, for every instruction set that this machine runs.

An error may be at most that of eager PyTorch at the same dtype plus ``EPSILON`` relative to the largest value.
Memory that the launcher allocates is poisoned with NaN (``poisoned``), so an element not written shows.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rd_kernels.backends.cpu import CPUBackend
from rd_kernels.backends.interface import BAD_LABEL, HIT, IGNORED, MISS

backend = CPUBackend()

# Of the largest value: two units in the last place for the exponential; half a rounding step of bfloat16.
EPSILON = {torch.float32: 2 * 2**-23, torch.bfloat16: 2**-8}
DTYPES = [torch.float32, torch.bfloat16]
ISAS = backend._native.usable_isas() if backend.missing() is None else ["portable"]
VOCABULARIES = [1, 2, 127, 1000, 30522]
ROWS = [0, 1, 3, 17]


@pytest.fixture(autouse=True)
def _built():
    reason = backend.missing()
    assert reason is None, reason


@pytest.fixture(params=ISAS)
def isa(request):
    before = backend._native.isa()
    backend._native.set_isa(request.param)
    yield request.param
    backend._native.set_isa(before)


@pytest.fixture
def threads():
    """Calls torch.set_num_threads and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def cross_entropy(logits, labels, weight=None, smoothing=0.0):
    weight = None if weight is None else weight.to(logits.dtype)
    return F.cross_entropy(logits, labels, weight, label_smoothing=smoothing, reduction="none")


def loss_and_gradient(logits, labels, scale, weight=None, smoothing=0.0):
    """torch's own loss [N], and the gradient of its sum weighted by ``scale`` [N], in the dtype of the logits."""
    leaf = logits.detach().clone().requires_grad_()
    losses = cross_entropy(leaf, labels, weight, smoothing)
    (gradient,) = torch.autograd.grad(losses, leaf, scale.to(losses.dtype))
    return losses.detach(), gradient


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).abs().max()) if exact.numel() else 0.0


def assert_no_worse(value, eager, exact, epsilon, case):
    assert not value.isnan().any(), case
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    assert error(value, exact) <= error(eager, exact) + epsilon * max(largest, 1e-9), case


def entropies(logits: Tensor) -> Tensor:
    """[N] of the softmax in nats, in the dtype of the logits; p = 0 adds 0."""
    log_p = logits.log_softmax(dim=1)
    return -torch.where(log_p.exp() == 0, 0, log_p.exp() * log_p).sum(dim=1)


def number_above(logits: Tensor, labels: Tensor) -> Tensor:
    return (~(logits <= logits.gather(1, labels[:, None]))).sum(dim=1).float()


@pytest.mark.parametrize("kind", ["plain", "weights", "smoothing", "weights and smoothing"])
def test_rows(poisoned, isa, kind):
    shapes = [*itertools.product(VOCABULARIES, ROWS), (128256, 1)]
    for (vocabulary, rows), dtype in itertools.product(shapes, DTYPES):
        case = f"V={vocabulary}, N={rows}, {dtype}"
        logits = (torch.randn(rows, vocabulary) * 4 + 20 * torch.randn(rows, 1)).to(dtype)
        labels = torch.randint(vocabulary, (rows,))
        weight = torch.rand(vocabulary) + 0.1 if "weights" in kind else None
        smoothing = 0.1 if "smoothing" in kind else 0.0
        scale = torch.randn(rows)
        exact, exact_gradient = loss_and_gradient(logits.double(), labels, scale.double(), weight, smoothing)
        eager, eager_gradient = loss_and_gradient(logits, labels, scale, weight, smoothing)

        loss, normaliser, outcome = backend.row_forward(logits, labels, weight, smoothing, -100)
        assert_no_worse(loss, eager, exact, EPSILON[torch.float32], case)
        maximum, lse = logits.double().amax(1), logits.double().logsumexp(1)
        assert torch.equal(normaliser[0].double(), maximum), case
        assert error(normaliser[1], lse - maximum) <= 1e-6, case
        assert torch.equal(outcome == HIT, logits.double().gather(1, labels[:, None])[:, 0] == maximum), case
        gradient = backend.row_backward(None, scale, logits, labels, normaliser, weight, smoothing, -100)
        assert gradient.dtype == dtype
        assert_no_worse(gradient, eager_gradient, exact_gradient, EPSILON[dtype], case)


def test_softmax_minus_onehot(poisoned, isa):
    for vocabulary, rows, dtype in itertools.product(VOCABULARIES, ROWS, DTYPES):
        case = f"V={vocabulary}, N={rows}, {dtype}"
        logits = (torch.randn(rows, vocabulary) * 4).to(dtype)
        labels = torch.randint(vocabulary, (rows,))
        ones = torch.ones(rows)
        exact, exact_gradient = loss_and_gradient(logits.double(), labels, ones.double())
        _, eager_gradient = loss_and_gradient(logits, labels, ones)
        separate = backend.row_forward(logits, labels, None, 0.0, -100)
        overwritten = logits.clone()
        fused = backend.softmax_minus_onehot_(overwritten, labels, -100)
        assert_no_worse(overwritten, eager_gradient, exact_gradient, EPSILON[dtype], case)
        assert_no_worse(fused[0], separate[0], exact, EPSILON[torch.float32], case)
        assert torch.equal(fused[1][0], separate[1][0]), case
        torch.testing.assert_close(fused[1][1], separate[1][1], rtol=1e-6, atol=1e-6)
        assert torch.equal(fused[2], separate[2]), case


@pytest.mark.parametrize(
    "spread", [1e-3, 1.0, 5.0, 40.0], ids=["near uniform", "flat", "peaked", "near certain"]
)
def test_details(poisoned, isa, spread):
    """Entropies against float64, beside eager float32; counts exactly; neither changes the row pass by a bit."""
    shapes = [*itertools.product(VOCABULARIES, [0, 1, 17]), (2500, 17), (128256, 2)]
    for (vocabulary, rows), dtype in itertools.product(shapes, DTYPES):
        case = f"V={vocabulary}, N={rows}, {dtype}"
        logits = (torch.randn(rows, vocabulary) * spread + 20 * torch.randn(rows, 1)).to(dtype)
        labels, weight = torch.randint(vocabulary, (rows,)), torch.rand(vocabulary)
        exact, eager = entropies(logits.double()), entropies(logits.float())
        plain = backend.row_forward(logits, labels, weight, 0.1, -100)
        details = torch.full((2, rows + 3), torch.nan)
        results = backend.row_forward(logits, labels, weight, 0.1, -100, details[:, :rows])
        assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True)), case
        assert_no_worse(details[0, :rows], eager, exact, EPSILON[torch.float32], case)
        assert torch.equal(details[1, :rows], number_above(logits, labels)), case
        assert torch.equal(details[1, :rows] == 0, results[2] == HIT), case
        assert details[:, rows:].isnan().all(), case
        fused = torch.full((2, rows), torch.nan)
        backend.softmax_minus_onehot_(logits, labels, -100, fused)
        assert_no_worse(fused[0], eager, exact, EPSILON[torch.float32], case)
        assert torch.equal(fused[1], details[1, :rows]), case


def test_details_keep_the_precision_of_a_small_entropy(isa):
    """Relative to it, not to the logits; the two that have all probability in one block or in different ones."""
    gaps = torch.tensor([2.0, 10, 15, 20, 25])
    for vocabulary, place in itertools.product([2, 100, 5000, 40000], [0, 1, -1]):
        logits = torch.full((5, vocabulary), -torch.inf)
        logits[:, place] = 1e3
        logits[:, place - 1] = 1e3 - gaps
        details = torch.empty(2, 5)
        backend.row_forward(logits, torch.full((5,), vocabulary - 1), None, 0.0, -100, details)
        odds = torch.exp(-gaps.double())
        exact = torch.log1p(odds) + gaps * odds / (1 + odds)
        torch.testing.assert_close(details[0].double(), exact, rtol=2e-6, atol=0)


def test_details_where_one_logit_has_all_probability(isa):
    for vocabulary, rest in itertools.product([1, 2, 33, 3000, 20000], [-torch.inf, -200.0, -3e38]):
        logits = torch.full((1, vocabulary), rest)
        logits[0, -1] = 1.0
        details = torch.empty(2, 1)
        backend.row_forward(logits, torch.zeros(1, dtype=torch.int64), None, 0.0, -100, details)
        assert details[:, 0].tolist() == [0, vocabulary > 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_details_of_ties_nan_and_infinity(isa, dtype):
    """And of rows that do not count, whatever they hold."""
    nan, inf = torch.nan, torch.inf
    rows = [
        ([1.0, 3, 3], 1, 0),
        ([3.0, 1, 2], 1, 2),
        ([nan, 1, 2], 2, 1),
        ([nan, 1, 2], 0, 2103),
        ([1.0, inf, 2], 1, 0),
        ([1.0, inf, 2], 2, 1),
        ([-inf, -inf, -inf], 0, 0),
        ([1.0, -inf, 2], 1, 2),
        ([nan, nan, nan], -100, 0),
        ([1.0, 2, 3], 3, nan),
    ]
    # Behind 2100 logits of -inf: the label and what is above it lie in different blocks.
    logits = torch.tensor([[-inf] * 2100 + values for values, *_ in rows], dtype=dtype)
    labels = torch.tensor([label + 2100 if label >= 0 else label for _, label, _ in rows])
    above = torch.tensor([count for *_, count in rows])
    finite = [0, 1, 7]
    for in_place in (False, True):
        details, z = torch.full((2, 10), -1.0), logits.clone()
        if in_place:
            backend.softmax_minus_onehot_(z, labels, -100, details)
        else:
            backend.row_forward(z, labels, None, 0.0, -100, details)
        torch.testing.assert_close(details[1], above, equal_nan=True)
        expected = torch.full((10,), nan)
        expected[finite] = entropies(logits[finite].double()).float()
        expected[8] = 0
        torch.testing.assert_close(details[0], expected, equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_do_not_count(poisoned, isa, dtype):
    """Ignored rows, labels out of range, and factors of 0: zeros, whatever the logits and factors hold."""
    logits = torch.randn(7, 300).to(dtype)
    logits[1], logits[4] = torch.nan, torch.inf
    labels = torch.tensor([5, -100, 300, -1, 7, 299, -(2**62)])
    scale = torch.tensor([1.0, torch.nan, torch.nan, 2.0, 0.0, 1.0, 1.0])
    loss, normaliser, outcome = backend.row_forward(logits, labels, None, 0.0, -100)
    bad = [2, 3, 6]
    assert (outcome[bad] == BAD_LABEL).all()
    assert outcome[1] == IGNORED
    assert loss[bad].isnan().all()
    assert normaliser[:, bad].isnan().all()
    assert loss[1] == 0
    assert torch.equal(normaliser[:, 1], torch.zeros(2))
    gradient = backend.row_backward(None, scale, logits, labels, normaliser, None, 0.0, -100)
    assert not gradient[[1, 2, 3, 4, 6]].any()
    assert gradient[[0, 5]].any(1).all()
    overwritten = logits.clone()
    fused = backend.softmax_minus_onehot_(overwritten, labels, -100)
    assert not overwritten[[1, 2, 3, 6]].any()
    assert torch.equal(fused[2], outcome)
    assert fused[0][bad].isnan().all()
    assert fused[0][1] == 0


def test_ignore_index_inside_the_vocabulary(isa):
    _, _, outcome = backend.row_forward(torch.randn(3, 4), torch.tensor([0, 2, -100]), None, 0.0, 2)
    assert outcome.tolist()[1:] == [IGNORED, BAD_LABEL]
    assert outcome[0] in (MISS, HIT)


def test_hits_count_ties_and_not_nan(isa):
    logits = torch.tensor(
        [[1.0, 3, 3], [3, 1, 2], [1, 2, 3], [torch.nan, 1, 2], [1, torch.inf, 2], [1, 1, 1]]
    )
    logits = torch.cat([logits, torch.tensor([[torch.inf, torch.nan, 1.0], [-torch.inf] * 3])])
    labels = torch.tensor([1, 1, 2, 2, 1, 0, 0, 0])
    expected = [HIT, MISS, HIT, MISS, HIT, HIT, MISS, HIT]
    assert backend.row_forward(logits, labels, None, 0.0, -100)[2].tolist() == expected
    assert backend.softmax_minus_onehot_(logits, labels, -100)[2].tolist() == expected


# In a row of 5000, so that it spans several blocks: value of the first 4000, of one later element, of the label.
NON_FINITE = {
    "first blocks -inf": (-torch.inf, 1.0, 2.0),
    "NaN in a finite row": (0.5, torch.nan, 2.0),
    "NaN after -inf": (-torch.inf, torch.nan, 1.0),
    "NaN, else -inf": (-torch.inf, torch.nan, -torch.inf),
    "+inf": (0.5, torch.inf, 2.0),
    "+inf after -inf": (-torch.inf, torch.inf, 2.0),
    "+inf at the label": (0.5, 1.0, torch.inf),
    "-inf at the label": (0.5, 1.0, -torch.inf),
    "all -inf": (-torch.inf, -torch.inf, -torch.inf),
    "huge": (-3e38, 3e38, 3e38),
    "far below": (-200.0, 0.0, -150.0),
}


@pytest.mark.parametrize("kind", NON_FINITE)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_non_finite_rows_behave_as_in_torch(poisoned, isa, kind, smoothing):
    first, later, at_label = NON_FINITE[kind]
    logits, labels = (
        torch.full((2, 5000), -torch.inf if kind == "all -inf" else -1.0),
        torch.tensor([4990, 17]),
    )
    logits[0, :4000], logits[0, 4500], logits[0, 4990] = first, later, at_label
    logits[1] = torch.randn(5000)
    exact, exact_gradient = loss_and_gradient(logits, labels, torch.ones(2), smoothing=smoothing)
    loss, normaliser, _ = backend.row_forward(logits, labels, None, smoothing, -100)
    torch.testing.assert_close(loss, exact, equal_nan=True, rtol=1e-5, atol=1e-6)
    gradient = backend.row_backward(None, None, logits, labels, normaliser, None, smoothing, -100)
    torch.testing.assert_close(gradient, exact_gradient, equal_nan=True, rtol=1e-5, atol=1e-7)
    if smoothing == 0:
        fused_loss, *_ = backend.softmax_minus_onehot_(logits, labels, -100)
        torch.testing.assert_close(fused_loss, exact, equal_nan=True, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits, exact_gradient, equal_nan=True, rtol=1e-5, atol=1e-7)


def test_nearly_certain_rows_keep_their_relative_precision(isa):
    """A loss of 1e-5 beside logits of 1e4: neither is rounded to the other's steps, nor is the gradient."""
    logits = torch.full((3, 100), 1e4)
    logits[:, 7] += torch.tensor([5.0, 12.0, 16.0])
    labels = torch.full((3,), 7)
    exact, exact_gradient = loss_and_gradient(logits.double(), labels, torch.ones(3).double())
    loss, normaliser, _ = backend.row_forward(logits, labels, None, 0.0, -100)
    gradient = backend.row_backward(None, None, logits, labels, normaliser, None, 0.0, -100)
    fused = logits.clone()
    backend.softmax_minus_onehot_(fused, labels, -100)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-6, atol=0)
    torch.testing.assert_close(fused.double(), exact_gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["expanded", "rows far apart", "out is logits", "out far apart"])
def test_strides(isa, dtype, layout):
    rows, vocabulary = 5, 2500
    labels, scale = torch.randint(vocabulary, (rows,)), torch.randn(rows)
    logits, out = torch.randn(rows, vocabulary).to(dtype), None
    if layout == "expanded":
        logits = logits[:1].expand(rows, vocabulary)
    elif layout == "rows far apart":
        logits = torch.full((rows, 4000), torch.nan, dtype=dtype)[:, 700:3200].copy_(logits)
    elif layout == "out far apart":
        out = torch.full((rows, 4000), torch.nan, dtype=dtype)[:, 1:2501]
    exact, exact_gradient = loss_and_gradient(logits.double(), labels, scale.double())
    if layout == "out is logits":
        out = logits
    loss, normaliser, _ = backend.row_forward(logits, labels, None, 0.0, -100)
    result = backend.row_backward(None, scale, logits, labels, normaliser, None, 0.0, -100, out=out)
    assert out is None or result is out
    assert error(loss, exact) <= 4e-6
    assert error(result, exact_gradient) <= EPSILON[dtype] * float(exact_gradient.abs().max())
    if layout == "out far apart":
        assert out._base[:, 0].isnan().all()
        assert out._base[:, 2501:].isnan().all()


def test_overwriting_rows_that_share_memory_is_refused():
    logits = torch.randn(1, 8).expand(3, 8)
    with pytest.raises(ValueError, match="logits: rows that overlap"):
        backend.softmax_minus_onehot_(logits, torch.zeros(3, dtype=torch.int64), -100)


def test_factors_of_any_stride(isa):
    logits, labels, row_scale = torch.randn(4, 50), torch.arange(4), torch.randn(4)
    _, normaliser, _ = backend.row_forward(logits, labels, None, 0.0, -100)
    strided = torch.randn(8)[::2]
    for grad_out in (None, torch.tensor(2.5), torch.tensor([2.5]).expand(4), strided):
        for scale in (None, row_scale):
            total = torch.ones(4, dtype=torch.float64)
            total = total if grad_out is None else total * grad_out
            total = total if scale is None else total * scale
            _, exact = loss_and_gradient(logits.double(), labels, total)
            gradient = backend.row_backward(grad_out, scale, logits, labels, normaliser, None, 0.0, -100)
            assert error(gradient, exact) <= EPSILON[torch.float32] * float(exact.abs().max())


def test_normaliser_of_a_block_of_rows(isa):
    """The linear op passes a slice [2, n] of a larger normaliser."""
    logits, labels = torch.randn(6, 70), torch.arange(6)
    _, normaliser, _ = backend.row_forward(logits, labels, None, 0.0, -100)
    whole = backend.row_backward(None, None, logits, labels, normaliser, None, 0.0, -100)
    part = backend.row_backward(None, None, logits[2:5], labels[2:5], normaliser[:, 2:5], None, 0.0, -100)
    assert torch.equal(part, whole[2:5])


def test_offsets_beyond_32_bits(isa):
    """Two bfloat16 rows that lie 2^31 + 5 elements apart; the memory between them is never touched."""
    vocabulary, stride = 4001, (1 << 31) + 5
    memory = torch.empty(stride + vocabulary, dtype=torch.bfloat16)
    logits = memory.as_strided((2, vocabulary), (stride, 1))
    logits.copy_(torch.randn(2, vocabulary))
    labels = torch.tensor([3, 4000])
    near = logits.clone()
    loss, normaliser, _ = backend.row_forward(logits, labels, None, 0.0, -100)
    expected, *_ = backend.row_forward(near, labels, None, 0.0, -100)
    assert torch.equal(loss, expected)
    gradient = backend.row_backward(None, None, near, labels, normaliser, None, 0.0, -100)
    backend.row_backward(None, None, logits, labels, normaliser, None, 0.0, -100, out=logits)
    assert torch.equal(logits, gradient)


def test_bfloat16_is_rounded_to_nearest_even(isa):
    """The bfloat16 kernel computes what the float32 kernel does, then rounds as torch does; NaN stays NaN."""
    logits = torch.randn(50, 3000).bfloat16()
    logits[7, 5] = torch.nan
    labels, scale = torch.randint(3000, (50,)), torch.randn(50) * 100
    results = []
    for z in (logits, logits.float()):
        _, normaliser, _ = backend.row_forward(z, labels, None, 0.0, -100)
        results.append(backend.row_backward(None, scale, z, labels, normaliser, None, 0.0, -100))
    rounded = results[1].bfloat16()
    assert results[0][7].isnan().all()
    keep = torch.arange(50) != 7
    assert torch.equal(results[0][keep].view(torch.int16), rounded[keep].view(torch.int16))


def test_bfloat16_ties_and_special_values(isa):
    """Where p is exactly 1 the gradient is the row's factor: its conversion must be torch's, bit for bit."""
    halfway = (torch.arange(0x3F80, 0x4080) << 16 | 0x8000).to(torch.int32).view(torch.float32)
    special = torch.tensor([1e-40, 3.4e38, torch.inf, -torch.inf, 1.17e-38])
    scale = torch.cat([halfway, -halfway, special])
    logits = torch.tensor([[-1e4, 0.0]]).expand(len(scale), 2).bfloat16()
    labels = torch.zeros(len(scale), dtype=torch.int64)
    _, normaliser, _ = backend.row_forward(logits, labels, None, 0.0, -100)
    gradient = backend.row_backward(None, scale, logits, labels, normaliser, None, 0.0, -100)
    assert torch.equal(gradient[:, 1].view(torch.int16), scale.bfloat16().view(torch.int16))
    # The NaN whose bits are all set would become -0 if it were rounded up.
    scale.fill_(torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32))
    gradient = backend.row_backward(None, scale, logits, labels, normaliser, None, 0.0, -100)
    assert gradient[:, 1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(67, 9001), (1, 300_001), (3, 70_000)])
def test_results_do_not_depend_on_the_number_of_threads(isa, dtype, rows, vocabulary, threads):
    """Many rows, shared out whole, and few long ones, shared out in segments."""
    logits, labels = torch.randn(rows, vocabulary).to(dtype), torch.randint(vocabulary, (rows,))
    labels[1::5] = -100
    weight, scale = torch.rand(vocabulary), torch.randn(rows)
    results = []
    for count in (1, 2, 5):
        threads(count)
        details = torch.empty(2, 2, rows)
        forward = backend.row_forward(logits, labels, weight, 0.1, -100, details[0])
        gradient = backend.row_backward(None, scale, logits, labels, forward[1], weight, 0.1, -100)
        overwritten = logits.clone()
        fused = backend.softmax_minus_onehot_(overwritten, labels, -100, details[1])
        results.append((*forward, gradient, *fused, overwritten, details))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_exponential_error_in_ulp(isa):
    """Every 257th float in [-87, -0] against float64."""
    largest = 0.0
    for start in range(0x80000000, 0xC2AE0001, 1 << 28):
        bits = torch.arange(start, min(start + (1 << 28), 0xC2AE0001), 257) - (1 << 32)
        x = bits.to(torch.int32).view(torch.float32)
        result = torch.full_like(x, torch.nan)
        backend._native.exp(x.data_ptr(), result.data_ptr(), x.numel())
        exact = x.double().exp()
        ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact)[1] - 24)
        largest = max(largest, float(((result.double() - exact).abs() / ulp).max()))
    assert largest < 1.25
    x, result = torch.tensor([-0.0, 0.0]), torch.empty(2)
    backend._native.exp(x.data_ptr(), result.data_ptr(), 2)
    assert result.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_below_exp_minus_87_are_zero(isa, dtype):
    logits = torch.tensor([[0.0, -86.5, -87.5, -104, -1e30, -torch.inf, -1, -86.5]], dtype=dtype)
    labels = torch.zeros(1, dtype=torch.int64)
    _, normaliser, _ = backend.row_forward(logits, labels, None, 0.0, -100)
    gradient = backend.row_backward(None, None, logits, labels, normaliser, None, 0.0, -100)
    assert torch.equal(gradient[0] == 0, torch.tensor([False, False, True, True, True, True, False, False]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 5, 63, 2047, 2048, 20000, 39999])
def test_nan_and_infinity_anywhere_spoil_their_row_alone(isa, dtype, position):
    """Also a NaN with a payload, whose bits survive arithmetic."""
    for value in (
        torch.nan,
        torch.inf,
        torch.tensor(0x7FBFFFFF, dtype=torch.int32).view(torch.float32).item(),
    ):
        logits = torch.randn(3, 40000).to(dtype)
        logits[1, position] = value
        labels = torch.full((3,), 7)
        loss, normaliser, _ = backend.row_forward(logits, labels, None, 0.0, -100)
        assert loss.isnan().tolist() == [False, True, False]
        details = torch.empty(2, 3)
        detailed, *_ = backend.row_forward(logits, labels, None, 0.0, -100, details)
        torch.testing.assert_close(detailed, loss, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(details[0].isnan(), loss.isnan())
        gradient = backend.row_backward(None, None, logits, labels, normaliser, None, 0.0, -100)
        assert gradient[1].isnan().all()
        assert not gradient[[0, 2]].isnan().any()
