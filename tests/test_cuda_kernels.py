"""What is particular to the CUDA kernels: alignment, clusters, shared memory, counters, compaction.

Without a GPU they run in the emulation, which also plays older and smaller GPUs than there are here.
"""

import pytest
import torch

from rd_kernels.backends.registry import get
from tests.conftest import on_device_of
from tests.devices import device_of
from tests.gpu_oracles import IGNORE, cross_entropy, gradient, make
from tests.test_gpu_details import check

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
emulated = pytest.mark.skipif(device_of("cuda") != "cpu", reason="a GPU is what it is")
# multiprocessors, compute capability, shared memory of a block at most and of a multiprocessor
DEVICES = {
    "A100": "108,8,0,166912,167936",
    "L4": "58,8,9,101376,102400",
    "H100": "132,9,0,232448,233472",
    "RTX 5090": "170,12,0,101376,102400",
}


@pytest.fixture
def cuda():
    with on_device_of("cuda"):
        yield get("cuda")


def assert_close(actual, truth, dtype):
    assert ((actual.double() - truth).abs() <= EPSILON[dtype] * (2.0**-4 + truth.abs())).all()


def check_rows(cuda, logits, labels):
    """Loss, gradient, U and, of float32, details of these rows against float64."""
    dtype, given = logits.dtype, logits.clone()
    details = torch.empty(2, len(labels)) if dtype == torch.float32 else None
    loss, normaliser, _ = cuda.row_forward(logits, labels, None, 0.0, IGNORE, details)
    if details is not None:
        check(details, given, labels)
    assert_close(loss, cross_entropy(logits, labels, torch.float64), torch.float32)
    truth = gradient(logits, labels, torch.ones(len(labels)), torch.float64)
    result = cuda.row_backward(None, None, logits, labels, normaliser, None, 0.0, IGNORE)
    assert_close(result, truth, dtype)
    if logits.stride(0) >= logits.shape[1]:
        again, _, _ = cuda.softmax_minus_onehot_(logits, labels, IGNORE, details)
        assert_close(again, loss.double(), torch.float32)
        assert_close(logits, truth, dtype)
        if details is not None:
            check(details, given, labels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 5, 8, 15, 16, 17, 3001])
def test_every_alignment_of_a_row(cuda, dtype, vocabulary):
    """Rows that start at each multiple of the element size, gradients that start at another: nothing beside them is
    read into a result or written."""
    for start in range(8):
        for out_start in (start, 0, 1, 6):
            memory = torch.full((3, vocabulary + 29), torch.nan, dtype=dtype)
            logits = memory[:, start : start + vocabulary]
            logits.copy_(torch.randn(3, vocabulary))
            labels = torch.tensor([0, IGNORE, vocabulary - 1])
            _, normaliser, _ = cuda.row_forward(logits, labels, None, 0.0, IGNORE)
            buffer = torch.full((3, vocabulary + 13), 5.0, dtype=dtype)
            out = buffer[:, out_start : out_start + vocabulary]
            cuda.row_backward(None, None, logits, labels, normaliser, None, 0.0, IGNORE, out=out)
            truth = gradient(logits.contiguous(), labels, torch.ones(3), torch.float64)
            assert_close(out, truth, dtype)
            assert (buffer[:, :out_start] == 5).all()
            assert (buffer[:, out_start + vocabulary :] == 5).all()
            cuda.softmax_minus_onehot_(logits, labels, IGNORE)
            assert_close(logits, truth, dtype)
            assert memory[:, :start].isnan().all()
            assert memory[:, start + vocabulary :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 1, 5])
def test_rows_at_the_end_of_their_memory(cuda, dtype, start):
    """Rows as dense as can be, the gradient's in another alignment: the sanitizers see a step outside."""
    vocabulary = 3001
    logits, labels = make(3, vocabulary, dtype)
    labels[2] = vocabulary - 1
    truth = gradient(logits, labels, torch.ones(3), torch.float64)
    _, normaliser, _ = cuda.row_forward(logits, labels, None, 0.0, IGNORE)
    out = torch.empty(3 * vocabulary + start, dtype=dtype)[start:].view(3, vocabulary)
    cuda.row_backward(None, None, logits, labels, normaliser, None, 0.0, IGNORE, out=out)
    assert_close(out, truth, dtype)
    cuda.softmax_minus_onehot_(logits, labels, IGNORE)
    assert_close(logits, truth, dtype)


@emulated
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(2, 30522), (60, 4099), (1, 128256), (2, 262144)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_long_rows_on_every_kind_of_gpu(cuda, monkeypatch, device, rows, vocabulary, dtype):
    """Clusters of 1 to 8 blocks or none, rows kept by the copy engine, by threads, or read twice."""
    monkeypatch.setenv("RD_EMULATION_DEVICE", DEVICES[device])
    logits, labels = make(rows, vocabulary, dtype)
    labels[0] = vocabulary - 1
    check_rows(cuda, logits, labels)


def test_programmatic_launch_changes_no_bit(cuda):
    logits, labels = make(5, 3000, torch.bfloat16)
    groups, results = torch.arange(5) % 2, []
    try:
        for on in (False, True):
            cuda._native.set_programmatic_launch(on)
            q = torch.full((2,), 0.5)
            results.append(cuda.grouped_forward(logits, labels, groups, q, "group_dro", 0.1, None, IGNORE))
    finally:
        cuda._native.set_programmatic_launch(False)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("rows", "vocabulary"),  # a warp for each row, a block
    [(1, 3), (127, 3), (128, 3), (129, 3), (1000, 3), (1, 2500), (128, 2500), (129, 2500)],
)
@pytest.mark.parametrize(("num_groups", "masked"), [(1, False), (9, True), (300, False), (300, True)])
def test_one_kernel_or_three_same_bits(cuda, rows, vocabulary, num_groups, masked):
    """The fused forward is the separate steps, and leaves its counters at zero for the next kernel."""
    logits, labels = make(rows, vocabulary, torch.float32)
    labels[::5] = IGNORE
    groups = torch.randint(-1, num_groups, (rows,))
    if masked:
        groups = cuda.pack_mask(torch.rand(rows, num_groups) < 0.1)
    q, adjustment = torch.softmax(torch.randn(num_groups), 0), torch.rand(num_groups)
    arguments = ("group_dro_hold", 0.3, adjustment)
    separate_q = q.clone()
    loss, stats, status, scale, normaliser = cuda.grouped_forward(
        logits, labels, groups, q, *arguments, IGNORE
    )
    row_loss, separate_normaliser, outcome = cuda.row_forward(logits, labels, None, 0.0, IGNORE)
    separate = cuda.reduce_and_update(row_loss, outcome, groups, separate_q, *arguments)
    for a, b in zip((loss, stats, status, scale), separate, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(normaliser, separate_normaliser)
    assert torch.equal(q, separate_q)
    assert q.sum() == pytest.approx(1.0)
    assert all(not counters.any() for counters in cuda._counters.values())


def test_a_large_step_does_not_overflow(cuda):
    """The rate times the loss is beyond float32's range, not beyond double's."""
    stats = torch.tensor([[1e30, 1.0, 0, 0], [1.0, 1.0, 0, 2], [0.0] * 4, [0.0] * 4])
    q = torch.tensor([0.5, 0.5])
    cuda.group_update(stats, torch.zeros(2, dtype=torch.int64), q, "group_dro", 1e20, None)
    assert q.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("rows", [0, 1, 31, 1024, 1025, 3500])
@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("capacity", [0, 7, 300, 4000])
def test_compaction_keeps_the_order_and_counts_what_does_not_fit(cuda, rows, share, capacity):
    labels = torch.where(torch.rand(rows) < share, torch.randint(5, (rows,)), IGNORE)
    index, position, count = cuda.compact(labels, IGNORE, capacity)
    labelled = [i for i, label in enumerate(labels.tolist()) if label != IGNORE]
    fit = labelled[:capacity]
    assert int(count) == len(labelled)
    assert index.tolist() == fit + [-1] * (capacity - len(fit))
    places = {row: place for place, row in enumerate(labelled)}
    assert position.tolist() == [places.get(row, -1) for row in range(rows)]
    plain = get("reference").compact(labels, IGNORE, capacity)
    for a, b in zip((index, position, count), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "start"), [(64, 0), (64, 3), (1, 0), (17, 1)])
def test_rows_gathered_and_put_back(cuda, dtype, width, start):
    x = torch.randn(40, width + 5).to(dtype)[:, start : start + width]
    x[3, 0] = torch.nan
    labels = torch.where(torch.rand(40) < 0.4, 1, IGNORE)
    labels[3] = 1
    index, position, count = cuda.compact(labels, IGNORE, 30)
    packed = cuda.gather_rows(x, index)
    expected = torch.zeros(30, width, dtype=dtype)
    expected[: int(count)] = x[labels == 1]
    assert torch.equal(packed.nan_to_num(7.0), expected.nan_to_num(7.0))
    back = cuda.gather_rows(packed, position)
    kept = torch.where((labels == 1)[:, None], x, 0)
    assert torch.equal(back.nan_to_num(7.0), kept.nan_to_num(7.0))
    assert torch.equal(get("reference").gather_rows(x, index).nan_to_num(7.0), packed.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "start"), [(64, 0), (64, 3), (1, 0), (17, 1)])
def test_scaled_rows_are_rounded_once(cuda, dtype, width, start):
    x = torch.randn(20, width + 5).to(dtype)[:, start : start + width]
    scale = torch.randn(20)
    scale[4], x[4] = 0, torch.nan
    expected = torch.where(scale[:, None] == 0, 0, x.float() * scale[:, None]).to(dtype)
    out = torch.empty(20, width, dtype=dtype)
    assert torch.equal(cuda.scale_rows(x, scale, out), expected)
    assert torch.equal(cuda.scale_rows(x, scale, x), expected)


def test_a_failed_launch_names_the_kernel(cuda):
    native = cuda._native
    queue = native.Queue(99, 0)
    with pytest.raises(RuntimeError, match=r"CUDA kernel row_scale: .*cudaErrorInvalidDevice"):
        native.row_scale(queue, 0, 0, 1, native.Groups(0, 0, 1, 1), 0)


def test_rows_that_overlap_are_not_overwritten(cuda):
    logits = torch.randn(30).expand(2, 30)
    with pytest.raises(ValueError, match="rows that overlap"):
        cuda.softmax_minus_onehot_(logits, torch.tensor([1, 2]), IGNORE)


def test_refuses_what_it_cannot_serve(cuda):
    assert cuda.refuses(torch.zeros(1, 1)) is None
    assert "float64" in cuda.refuses(torch.zeros(1, 1, dtype=torch.float64))
    assert "meta" in cuda.refuses(torch.zeros(1, 1, device="meta"))
