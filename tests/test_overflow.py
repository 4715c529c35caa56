"""Labelled rows packed, and those beyond the buffer's capacity computed apart: each backend against float64 torch.

Where nothing is labelled beyond the capacity, nothing may be read or written.
"""

import pytest
import torch
import torch.nn.functional as F

from rd_kernels.backends.interface import BAD_LABEL, HIT, IGNORED, MISS
from rd_kernels.backends.registry import get
from rd_kernels.backends.triton_backend import TritonBackend
from rd_kernels.reference import ReferenceBackend
from tests.conftest import on_device_of
from tests.gpu_oracles import HUGE, IGNORE, QUIET

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings(QUIET)]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Added to eager torch's error, per unit of the largest true value: some roundings of what is summed in float32.
EPSILON = {torch.float32: 2e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}
ROWS, VOCABULARY, WIDTH = 40, 45, 37  # hidden rows; several tiles of each with the small ones below
ABSENT = 11  # at the end of M


def small_tiles(rows=16, vocabulary=32, depth=32, width=32):
    """As the launcher's tables; the interpreter takes its time for each program, so they are not smaller still."""
    sizes = {"ROWS": rows, "VOCABULARY": vocabulary, "DEPTH": depth}
    forward, backward = (dict.fromkeys((2, 4), tile) for tile in (sizes, {**sizes, "WIDTH": width}))
    return forward, backward, backward


class Unseeing(ReferenceBackend):
    """As on a device whose values the host does not look at: all of M, in blocks of 10."""

    def _overflow_blocks(self, index, vocabulary):
        rows = index.numel()
        return [slice(start, min(start + 10, rows)) for start in range(0, rows, 10)]


@pytest.fixture(params=["triton", "reference", "unseeing", "cpu"])
def overflow(request, monkeypatch):
    """The launcher of each backend; Triton's with tiles that make several of small shapes."""
    monkeypatch.setattr(TritonBackend, "_tiles", small_tiles())
    monkeypatch.setattr(TritonBackend, "_chunk", 32)
    name = "reference" if request.param == "unseeing" else request.param
    with on_device_of(name):
        yield Unseeing() if request.param == "unseeing" else get(name)


def make(dtype, present=29, with_bias=True, wild=()):
    """-> hidden, weight, bias, labels [M], index [M], scale [M]; every third row of scale is 0.

    ``wild``: labels of the last rows present. Absent rows have labels, which must not matter.
    """
    hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(VOCABULARY, WIDTH) / 4
    bias = torch.randn(VOCABULARY) if with_bias else None
    order = torch.randperm(ROWS)[:present].sort().values
    index = torch.cat([order, torch.full((ABSENT,), -1)])
    labels = torch.randint(VOCABULARY, (index.numel(),))
    if wild:
        labels[present - len(wild) : present] = torch.tensor(wild)
    scale = torch.rand(index.numel()) + 0.5
    scale[::3] = 0
    return *(None if t is None else t.to(dtype) for t in (hidden, weight, bias)), labels, index, scale


def eager(hidden, weight, bias, labels, index, scale, dtype):
    """-> losses of the rows present, gradients of hidden, weight, bias (to be added): torch's own, in ``dtype``."""
    present = index >= 0
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    logits = F.linear(leaves[0][index[present]], leaves[1], leaves[2])
    loss = F.cross_entropy(logits, labels[present], ignore_index=IGNORE, reduction="none")
    (loss * scale[present].to(loss.dtype)).sum().backward()
    return loss.detach(), *(None if t is None else t.grad for t in leaves)


def run(backend, hidden, weight, bias, labels, index, scale, before):
    """-> row_loss, normaliser, outcome; and what becomes of ``before``, gradients to write to or None."""
    forward = backend.overflow_forward(hidden, weight, bias, labels, IGNORE, index)
    grads = [None if t is None else t.clone() for t in before]
    backend.overflow_backward(scale, hidden, weight, bias, labels, forward[1], IGNORE, index, *grads)
    return forward, grads


def gradients(hidden, weight, bias):
    """What is there before: any values, which rows not in the index keep and the sums start from."""
    grad_bias = None if bias is None else torch.randn(bias.shape)
    return [torch.randn(hidden.shape).to(hidden.dtype), torch.randn(weight.shape).to(weight.dtype), grad_bias]


def assert_as_exact(value, truth, plain, epsilon):
    """The largest error is at most plain torch's, plus epsilon of the largest true value."""
    if truth.numel() == 0:
        return
    allowed = float((plain.double() - truth).abs().max()) + epsilon * float(truth.abs().max())
    assert float((value.double() - truth).abs().max()) <= allowed


def same_bits(a, b):
    return all(
        x is y or torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_as_exact_as_eager_torch(overflow, dtype, with_bias):
    inputs = make(dtype, with_bias=with_bias)
    hidden, weight, bias, labels, index, scale = inputs
    before = gradients(*inputs[:3])
    (row_loss, normaliser, outcome), after = run(overflow, *inputs, before)
    true = eager(*inputs, torch.float64)
    plain = eager(*inputs, dtype)
    present = index >= 0
    epsilon = EPSILON[dtype]
    assert_as_exact(row_loss[present], true[0], plain[0], epsilon)
    logits = F.linear(
        hidden[index[present]].double(), weight.double(), None if bias is None else bias.double()
    )
    lse = logits.logsumexp(1)
    assert_as_exact(normaliser.sum(0)[present], lse, lse, 2e-6)
    assert_as_exact(normaliser[0, present], logits.amax(1), logits.amax(1), 2e-6)
    hits = logits.argmax(1) == labels[present]
    assert outcome[present].tolist() == torch.where(hits, HIT, MISS).tolist()

    rows = index[present]
    assert_as_exact(after[0][rows], true[1][rows], plain[1][rows], epsilon)
    others = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(after[0][others], before[0][others])
    assert (after[0][index[present & (scale == 0)]] == 0).all()
    sums = before[1].double() + true[2]
    assert_as_exact(after[1], sums, before[1] + plain[2], epsilon)
    if with_bias:
        assert_as_exact(after[2], before[2].double() + true[3], before[2] + plain[3].float(), epsilon)


@pytest.mark.parametrize("present", [0, 1, 16, 29])
def test_absent_rows_are_neutral_whatever_their_label(overflow, present):
    hidden, weight, bias, labels, index, _ = make(torch.float32, present)
    labels[present:] = torch.tensor([HUGE, -1, IGNORE, 0])[torch.arange(ABSENT) % 4]
    results = overflow.overflow_forward(hidden, weight, bias, labels, IGNORE, index)
    assert [t.shape for t in results] == [index.shape, (2, *index.shape), index.shape]
    assert [t.dtype for t in results] == [torch.float32, torch.float32, torch.uint8]
    row_loss, normaliser, outcome = results
    assert (row_loss[present:] == 0).all()
    assert (normaliser[:, present:] == 0).all()
    assert (outcome[present:] == IGNORED).all()
    assert torch.isfinite(row_loss).all()
    assert (outcome[:present] <= HIT).all()


def test_scales_beyond_the_range_of_float16(overflow):
    """The sums are inside it, the scaled probabilities and hidden states are not."""
    hidden, weight, bias, labels, index, scale = make(torch.float16)
    hidden /= 256
    scale[1:29] = torch.tensor([2e5, 1e5, 0.5])[torch.arange(28) % 3]
    inputs = (hidden, weight, bias, labels, index, scale)
    before = [torch.zeros_like(t) for t in (hidden, weight, bias.float())]
    _, after = run(overflow, *inputs, before)
    truth = eager(*inputs, torch.float64)[2]
    assert float(truth.abs().max()) < 60000
    assert_as_exact(after[1], truth, truth, 4 * EPSILON[torch.float16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_rows_nothing_is_read_or_written(overflow, dtype):
    hidden, weight, bias, labels, index, scale = make(dtype, present=0)
    for tensor in (hidden, weight, bias, scale):
        tensor.fill_(torch.nan)
    before = gradients(hidden, weight, bias)
    before[1][0], before[1][1] = -0.0, torch.nan
    before[2][0], before[2][1] = -0.0, torch.nan
    (row_loss, normaliser, outcome), after = run(overflow, hidden, weight, bias, labels, index, scale, before)
    assert same_bits(after, before)
    assert (row_loss == 0).all()
    assert (normaliser == 0).all()
    assert (outcome == IGNORED).all()


def test_no_overflow_at_all(overflow):
    """M = 0: the capacity is N."""
    hidden, weight, bias, *_ = make(torch.float32)
    empty = torch.empty(0, dtype=torch.int64)
    before = gradients(hidden, weight, bias)
    results, after = run(overflow, hidden, weight, bias, empty, empty, torch.empty(0), before)
    assert [t.shape for t in results] == [(0,), (2, 0), (0,)]
    assert same_bits(after, before)


def test_every_row_may_be_there(overflow):
    """No -1 at all, and a number of rows that is a multiple of the block."""
    hidden, weight, bias, labels, index, scale = make(torch.float32, present=32)
    inputs = (hidden, weight, bias, labels[:32], index[:32], scale[:32])
    before = [torch.zeros_like(t) for t in inputs[:3]]
    (row_loss, _, _), after = run(overflow, *inputs, before)
    true, plain = eager(*inputs, torch.float64), eager(*inputs, torch.float32)
    for value, truth, other in zip((row_loss, *after), true, plain, strict=True):
        assert_as_exact(value, truth, other, EPSILON[torch.float32])


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_a_gradient_not_asked_for_changes_no_other(overflow, needed):
    inputs = make(torch.float32)
    before = gradients(*inputs[:3])
    _, full = run(overflow, *inputs, before)
    _, part = run(overflow, *inputs, [t if i in needed else None for i, t in enumerate(before)])
    for i, tensor in enumerate(part):
        assert tensor is None if i not in needed else same_bits([tensor], [full[i]])


def test_labels_that_do_not_count(overflow):
    wild = (IGNORE, -1, VOCABULARY, HUGE, -HUGE)
    hidden, weight, bias, labels, index, scale = make(torch.float32, wild=wild)
    scale.fill_(1.0)
    first = 29 - len(wild)
    hidden[index[first:29]] = torch.nan  # must not spread
    before = gradients(hidden, weight, bias)
    (row_loss, normaliser, outcome), after = run(overflow, hidden, weight, bias, labels, index, scale, before)
    assert outcome[first:29].tolist() == [IGNORED] + [BAD_LABEL] * 4
    assert row_loss[first] == 0
    assert (normaliser[:, first] == 0).all()
    assert row_loss[first + 1 : 29].isnan().all()
    assert normaliser[:, first + 1 : 29].isnan().all()
    assert (after[0][index[first:29]] == 0).all()
    # The sums are those of the rows before.
    index[first:] = -1
    _, expected = run(overflow, hidden, weight, bias, labels, index, scale, before)
    for value, other in zip(after[1:], expected[1:], strict=True):
        assert torch.allclose(value, other, rtol=0, atol=1e-6)


def test_an_ignored_label_inside_the_vocabulary(overflow):
    hidden, weight, bias, labels, index, _ = make(torch.float32)
    labels[2] = 5
    _, _, outcome = overflow.overflow_forward(hidden, weight, bias, labels, 5, index)
    assert (outcome == IGNORED).tolist() == ((index < 0) | (labels == 5)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_and_nan_logits(overflow, dtype):
    """By the first hidden state times 1 in one vocabulary entry, 0 in all others."""
    hidden, weight, _, labels, index, scale = make(dtype)
    weight[:, 0] = 0
    bias = torch.zeros(VOCABULARY, dtype=dtype)
    bias[::2] = -torch.inf  # a masked half of the vocabulary is allowed
    labels[:29] = 1
    labels[4] = 2  # a label of probability 0
    hidden[index[7], 3] = torch.nan
    hidden[index[8]] = torch.inf  # infinities of both signs: NaN
    scale.fill_(1.0)
    before = [torch.zeros_like(hidden), torch.zeros_like(weight), torch.zeros(VOCABULARY)]
    inputs = (hidden, weight, bias, labels, index, scale)
    (row_loss, normaliser, outcome), after = run(overflow, *inputs, before)
    assert row_loss[4] == torch.inf
    assert outcome[4] == MISS
    assert row_loss[7:9].isnan().all()
    assert normaliser[1, 7:9].isnan().all()
    assert (outcome[7:9] == MISS).all()
    assert after[0][index[7:9]].isnan().all()
    assert after[1].isnan().any(dim=1).any()
    usual = torch.ones(29, dtype=torch.bool)
    usual[[4, 7, 8]] = False
    rows = index[:29][usual]
    assert torch.isfinite(row_loss[:29][usual]).all()
    assert torch.isfinite(after[0][rows]).all()

    # Scale 0 wins over all of that.
    scale[7:9] = 0
    _, after = run(overflow, *inputs, before)
    assert all(torch.isfinite(t).all() for t in after)
    assert (after[0][index[7:9]] == 0).all()


@pytest.mark.parametrize(("value", "maximum"), [(torch.inf, torch.inf), (-torch.inf, -torch.inf)])
def test_a_row_of_nothing_but_infinities(overflow, value, maximum):
    hidden, weight, _, labels, index, _ = make(torch.float32)
    bias = torch.full((VOCABULARY,), value)
    row_loss, normaliser, outcome = overflow.overflow_forward(hidden, weight, bias, labels, IGNORE, index)
    present = index >= 0
    assert row_loss[present].isnan().all()
    assert normaliser[1, present].isnan().all()
    assert (normaliser[0, present] == maximum).all()
    assert torch.isfinite(row_loss[~present]).all()
    assert (outcome[~present] == IGNORED).all()


def test_unrelated_rows_are_not_read(overflow):
    inputs = make(torch.float32)
    hidden, weight, bias, _, index, _ = inputs
    before = gradients(hidden, weight, bias)
    first = run(overflow, *inputs, before)
    others = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, index[index >= 0], False)
    hidden[others] = torch.nan
    before[0][others] = torch.nan
    second = run(overflow, *inputs, before)
    assert same_bits(first[0], second[0])
    assert same_bits(first[1][1:], second[1][1:])
    assert torch.equal(second[1][0].isnan().all(1), others)


def test_a_weight_of_nan_leaves_rows_of_scale_0_alone(overflow):
    hidden, weight, bias, labels, index, scale = make(torch.float32)
    weight[3] = torch.nan
    _, after = run(overflow, hidden, weight, bias, labels, index, scale, gradients(hidden, weight, bias))
    present = index >= 0
    assert (after[0][index[present & (scale == 0)]] == 0).all()
    assert after[0][index[present & (scale != 0)]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_and_as_deterministic_as_they_are(overflow, dtype):
    """Columns of wider matrices, and of a normaliser [2, N], give the same bits, and so does a second time."""
    hidden, weight, bias, labels, index, scale = make(dtype)

    def widened(x):
        wide = torch.full((x.shape[0], x.shape[1] + 9), torch.nan, dtype=x.dtype)
        wide[:, 3 : 3 + x.shape[1]] = x
        return wide[:, 3 : 3 + x.shape[1]]

    before = gradients(hidden, weight, bias)
    first = run(overflow, hidden, weight, bias, labels, index, scale, before)
    again = run(overflow, hidden, weight, bias, labels, index, scale, before)
    assert same_bits([*first[0], *first[1]], [*again[0], *again[1]])

    forward = overflow.overflow_forward(widened(hidden), widened(weight), bias, labels, IGNORE, index)
    grads = [widened(before[0]), widened(before[1]), before[2].clone()]
    overflow.overflow_backward(
        scale, widened(hidden), widened(weight), bias, labels, widened(forward[1]), IGNORE, index, *grads
    )
    results = [*(t.contiguous() for t in grads)]
    if overflow.name == "triton":
        assert same_bits([*forward, *results], [*first[0], *first[1]])
    for value, other in zip((*forward[:2], *results), (*first[0][:2], *first[1]), strict=True):
        epsilon = EPSILON[dtype] * float(other.abs().max())
        assert torch.allclose(value.float(), other.float(), rtol=0, atol=2 * epsilon)


@pytest.mark.parametrize(
    ("dtype", "rows", "vocabulary", "width"),
    [(torch.float32, 40, 40, 70), (torch.bfloat16, 70, 150, 140)],
)
def test_the_tiles_it_ships_with(dtype, rows, vocabulary, width):
    """Once, with a ragged edge in each direction."""
    with on_device_of("triton"):
        index = torch.cat([torch.arange(rows).flip(0), torch.full((10,), -1)])
        labels, scale = torch.randint(vocabulary, (rows + 10,)), torch.rand(rows + 10)
        hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(vocabulary, width) / 8).to(dtype)
        inputs = (hidden, weight, None, labels, index, scale)
        before = [torch.zeros_like(hidden), torch.zeros_like(weight), None]
        (row_loss, _, _), after = run(get("triton"), *inputs, before)
        true, plain = eager(*inputs, torch.float64), eager(*inputs, dtype)
        for value, truth, other in zip((row_loss[:rows], *after[:2]), true[:3], plain[:3], strict=True):
            assert_as_exact(value, truth, other, EPSILON[dtype])


@pytest.mark.parametrize("which", ["reference", "cpu"])
def test_float64(which):
    if get(which).refuses(torch.zeros(1, 1, dtype=torch.float64)) is not None:
        return  # it says that it does not serve it
    inputs = make(torch.float64)
    scale = inputs[5].double()
    before = [torch.zeros_like(t) for t in inputs[:3]]
    (row_loss, normaliser, _), after = run(get(which), *inputs[:5], scale, before)
    assert row_loss.dtype == normaliser.dtype == torch.float64
    for value, truth in zip((row_loss[:29], *after), eager(*inputs[:5], scale, torch.float64), strict=True):
        assert torch.allclose(value, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rows", [0, 1, 32, 33, 200])
@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("capacity", [0, 7, 50, 300])
@pytest.mark.parametrize("chunk", [32, 1024])
def test_compaction_keeps_the_order_and_counts_what_does_not_fit(monkeypatch, rows, share, capacity, chunk):
    monkeypatch.setattr(TritonBackend, "_chunk", chunk)
    with on_device_of("triton"):
        labels = torch.where(torch.rand(rows) < share, torch.randint(5, (rows,)), IGNORE)
        index, position, count = get("triton").compact(labels, IGNORE, capacity)
        labelled = [i for i, label in enumerate(labels.tolist()) if label != IGNORE]
        assert count.shape == ()
        assert int(count) == len(labelled)
        assert index.tolist() == (labelled + [-1] * capacity)[:capacity]
        places = {row: place for place, row in enumerate(labelled)}
        assert position.tolist() == [places.get(row, -1) for row in range(rows)]
        for a, b in zip(
            (index, position, count), get("reference").compact(labels, IGNORE, capacity), strict=True
        ):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "start"), [(64, 0), (64, 3), (1, 0), (17, 1), (1030, 0), (0, 0)])
def test_rows_gathered_and_put_back(dtype, width, start):
    with on_device_of("triton"):
        triton = get("triton")
        x = torch.randn(40, width + 5).to(dtype)[:, start : start + width]
        labels = torch.where(torch.rand(40) < 0.4, 1, IGNORE)
        x[labels != 1] = torch.nan
        x[labels.argmax()] = torch.inf
        index, position, count = triton.compact(labels, IGNORE, 30)
        packed = triton.gather_rows(x, index)
        expected = torch.zeros(30, width, dtype=dtype)
        expected[: int(count)] = x[labels == 1]
        assert packed.dtype == dtype
        assert torch.equal(packed, expected)
        assert torch.equal(triton.gather_rows(packed, position), torch.where((labels == 1)[:, None], x, 0))
        assert torch.equal(triton.gather_rows(x.t().contiguous().t(), index), expected)
        beyond = torch.tensor([40, HUGE, -HUGE, -1])
        assert (triton.gather_rows(x, beyond) == 0).all()
        assert (triton.gather_rows(x[:0], index) == 0).all()
