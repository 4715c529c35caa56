"""What the linear op leaves out: rows without a label, rows of weight 0, and with filter_eps a bounded share."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rd_kernels as rd
from rd_kernels import gemm, linear
from rd_kernels.backends.registry import get
from tests.test_linear import PeakMemory, budget_for, eager, inputs, run

CPU_BACKENDS = ["cpu", "reference"]


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles and blocks in a small problem."""
    monkeypatch.setattr(gemm, "TILE_ROWS", 7)
    monkeypatch.setattr(gemm, "TILE_COLUMNS", 10)
    monkeypatch.setattr(gemm, "FORWARD_COLUMNS", 9)


@pytest.fixture(autouse=True)
def leave_out_whatever_may_be(monkeypatch):
    """The op's own thresholds are made for large problems: here they would keep everything."""
    monkeypatch.setattr(linear, "_COPY_OF_COLUMNS", 0)
    monkeypatch.setattr(linear, "_COPY_OF_WEIGHT", 0)


def gradients(
    hidden, weight, bias, labels, scale, filter_eps=0.0, stored=None, block=1 << 20, which="cpu", grad_out=1.0
):
    """The op's two halves with given row weights -> the three gradients."""
    backend = get(which)
    stored = hidden.shape[0] if stored is None else stored
    layout = linear.Layout(hidden.shape[0], stored, block)
    shape = (weight.shape[0], -100, layout)
    _, normaliser, _, kept = linear.forward(backend, hidden, weight, bias, labels, None, *shape)
    return linear.backward(
        backend, torch.tensor(grad_out), scale, kept, normaliser, hidden, weight, bias, labels, None, None, *shape,
        [True, True, True], filter_eps,
    )  # fmt: skip


def exact_terms(hidden, weight, bias, labels, scale):
    """U [N, V] and the gradients in float64, from the definition."""
    h, w = hidden.double(), weight.double()
    u = torch.softmax(h @ w.t() + bias.double(), dim=1)
    counted = labels != -100
    u[counted.nonzero()[:, 0], labels[counted]] -= 1
    u[~counted] = 0
    weighted = scale.double()[:, None] * u
    return weighted, (weighted @ w, weighted.t() @ h, weighted.sum(0))


def confident(rows, vocabulary, width, sharpness, seed=0):
    """Rows whose probability sits on few entries, as a trained model's does; the label is often among them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator) * sharpness
    weight = torch.randn(vocabulary, width, generator=generator)
    bias = torch.randn(vocabulary, generator=generator)
    labels = (hidden @ weight.t() + bias).argmax(1)
    random = torch.randint(vocabulary, (rows,), generator=generator)
    labels = torch.where(torch.rand(rows, generator=generator) < 0.5, labels, random)
    labels[::7] = -100
    return hidden, weight, bias, labels


def check_bound(hidden, weight, bias, labels, scale, filter_eps, **options):
    """The stated bound, against float64, beside the rounding that the dense path is allowed."""
    grad_hidden, grad_weight, grad_bias = gradients(
        hidden, weight, bias, labels, scale, filter_eps, **options
    )
    weighted, (true_hidden, true_weight, true_bias) = exact_terms(hidden, weight, bias, labels, scale)
    total = float(weighted.abs().sum())
    epsilon = {torch.float32: 1e-5, torch.bfloat16: 2**-6}[
        hidden.dtype
    ]  # many float32 roundings; one of U and H
    sizes = float(weight.double().norm(dim=1).max()), float(hidden.double().norm(dim=1).max())
    for value, truth, size in zip((grad_hidden, grad_weight), (true_hidden, true_weight), sizes, strict=True):
        error = float((value.double() - truth).norm(dim=1).sum())
        assert error <= (filter_eps + epsilon) * total * size + 1e-30
    assert float((grad_bias.double() - true_bias).abs().sum()) <= epsilon * total + 1e-30
    return grad_hidden, grad_weight


@pytest.mark.parametrize("which", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [40, 17, 0])
@pytest.mark.parametrize("filter_eps", [1e-6, 1e-3, 0.05, 0.5])
def test_filter_keeps_its_bound(small_tiles, which, dtype, stored, filter_eps):
    hidden, weight, bias, labels = confident(40, 61, 16, 1.5)
    tensors = [t.to(dtype) for t in (hidden, weight, bias)]
    scale = torch.rand(40) * torch.tensor([1.0, 1e-6, 0.0, 3.0])[torch.arange(40) % 4]
    block = 1 << 20 if stored == 40 else 9
    _, grad_weight = check_bound(*tensors, labels, scale, filter_eps, stored=stored, block=block, which=which)
    if filter_eps >= 0.05 and stored == 40:
        assert (grad_weight == 0).all(dim=1).sum() > 0.1 * 61  # it left something out


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 30),
    vocabulary=st.integers(1, 50),
    sharpness=st.floats(0, 8),
    spread=st.floats(0, 12),
    filter_eps=st.floats(0, 0.99),
)
def test_filter_keeps_its_bound_on_any_input(seed, rows, vocabulary, sharpness, spread, filter_eps):
    hidden, weight, bias, labels = confident(rows, vocabulary, 5, sharpness, seed)
    scale = torch.exp(-spread * torch.rand(rows, generator=torch.Generator().manual_seed(seed)))
    check_bound(hidden, weight, bias, labels, scale, filter_eps)


def test_one_heavy_row_is_kept_and_light_ones_go():
    """A filter blind to the weights would keep the uniform rows, whose probabilities are not small."""
    hidden, weight, bias, labels = confident(40, 61, 16, 0.1)
    scale = torch.full((40,), 1e-6)
    scale[3] = 1.0
    grad_hidden, _ = check_bound(hidden, weight, bias, labels, scale, 1e-3)
    assert grad_hidden[3].any()
    assert not grad_hidden[torch.arange(40) != 3].any()


def test_nothing_is_left_out_where_the_copy_costs_more(monkeypatch):
    monkeypatch.undo()
    tensors = confident(40, 61, 16, 1.5)
    dense, filtered = (gradients(*tensors, torch.ones(40), filter_eps) for filter_eps in (0.0, 0.3))
    assert all(torch.equal(a, b) for a, b in zip(dense, filtered, strict=True))


def test_certain_rows_are_left_out():
    hidden, weight, bias, labels = confident(64, 61, 16, 0.5)
    hidden[::2] *= 40
    labels = torch.where(torch.arange(64) % 2 == 0, (hidden @ weight.t() + bias).argmax(1), 0)
    grad_hidden, _ = check_bound(hidden, weight, bias, labels, torch.ones(64), 1e-4)
    logits = (hidden @ weight.t() + bias).double()
    certain = 1 - logits.softmax(1)[torch.arange(64), labels] < 1e-7
    assert certain.sum() >= 16
    assert not grad_hidden[certain].any()
    assert grad_hidden[1::2].any(dim=1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_not_dropped_silently(value):
    hidden, weight, bias, labels = confident(40, 61, 16, 1.5)
    labels[5] = 0
    hidden[5] = value
    dense = gradients(hidden, weight, bias, labels, torch.ones(40))
    filtered = gradients(hidden, weight, bias, labels, torch.ones(40), 0.3)
    for a, b in zip(dense, filtered, strict=True):
        assert torch.equal(torch.isnan(a), torch.isnan(b))
    assert torch.isnan(filtered[0][5]).all()
    assert torch.isnan(filtered[1]).all()


@pytest.mark.parametrize("which", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filter_eps", [0.0, 1e-3])
@pytest.mark.parametrize("stored", [40, 13])
def test_a_row_that_is_not_finite_but_weighs_nothing_does_not_count(
    small_tiles, which, dtype, filter_eps, stored
):
    hidden, weight, bias, labels = (
        t.to(dtype) if t.is_floating_point() else t for t in confident(40, 61, 16, 1.5)
    )
    labels[5] = labels[30] = 0
    scale = torch.rand(40)
    scale[5] = scale[30] = 0
    poisoned = hidden.clone()
    poisoned[5], poisoned[30] = math.nan, math.inf
    clean, dirty = (
        gradients(h, weight, bias, labels, scale, filter_eps, stored=stored, block=9, which=which)
        for h in (hidden, poisoned)
    )
    for a, b in zip(clean, dirty, strict=True):
        # Where the processor multiplies 16-bit floats, whole blocks take operands rounded to them and tiles do not: then
        # the difference is a rounding of what is summed, which may cancel in the sum.
        largest = float(a.abs().max())
        rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (0.02, 2**-8 * largest)
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_filter_off_is_the_dense_path_to_the_bit(monkeypatch):
    hidden, weight, bias, labels, groups = inputs()
    default = run(hidden, weight, bias, labels, groups)

    def refuse(*args):
        raise AssertionError("the filter ran")

    monkeypatch.setattr(gemm, "masses", refuse)
    monkeypatch.setattr(gemm, "add_tiled", refuse)
    groups[:, 0] = True
    q = torch.full((3,), 1 / 3)
    results = []
    for options in ({}, {"filter_eps": None}, {"filter_eps": 0}):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        loss = rd.functional.linear_group_dro_cross_entropy(
            *leaves[:2], labels, groups, q.clone(), bias=leaves[2], backend="cpu", **options
        )
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert default[0] > 0


def test_forward_does_not_depend_on_the_filter():
    hidden, weight, bias, labels, groups = inputs()
    outcomes = []
    for filter_eps in (None, 0.3):
        loss_fn = rd.LinearGroupDROLoss(3, rd.GroupDRO(0.5), filter_eps=filter_eps)
        w = weight.clone().requires_grad_()
        loss = loss_fn(hidden, w, labels, groups, bias)
        loss.backward()
        outcomes.append((loss.detach(), loss_fn.group_weights, w.grad))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    assert not torch.equal(outcomes[0][2], outcomes[1][2])


@pytest.mark.parametrize("negative", [False, True])
def test_only_wanted_gradients_with_the_filter(negative):
    hidden, weight, bias, labels = confident(40, 61, 16, 1.5)
    full = gradients(hidden, weight, bias, labels, torch.ones(40), 0.01, grad_out=-2.0 if negative else 2.0)
    backend = get("cpu")
    shape = (61, -100, linear.Layout(40, 40, 40))
    _, normaliser, _, kept = linear.forward(backend, hidden, weight, bias, labels, None, *shape)
    for index in range(3):
        needs = [index == i for i in range(3)]
        parts = linear.backward(
            backend, torch.tensor(-2.0 if negative else 2.0), torch.ones(40), kept, normaliser, hidden, weight,
            bias, labels, None, None, *shape, needs, 0.01,
        )  # fmt: skip
        assert [part.numel() > 0 for part in parts] == needs
        assert torch.equal(parts[index], full[index])


@pytest.mark.parametrize("which", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_label_take_no_part(monkeypatch, which, dtype):
    """Nothing is computed for them, whatever they hold, and the gradients are those of the labelled rows."""
    hidden, weight, bias, labels, groups = inputs(rows=60, dtype=dtype)
    labels[torch.rand(60) < 0.7] = -100
    labelled = labels != -100
    expected = run(hidden[labelled], weight, bias, labels[labelled], groups[labelled], backend=which)
    hidden[~labelled] = math.nan
    seen = []
    forward = linear.forward
    monkeypatch.setattr(linear, "forward", lambda *args: seen.append(args[1].shape[0]) or forward(*args))
    loss, (grad_hidden, *others), q = run(hidden, weight, bias, labels, groups, backend=which)
    assert seen == [int(labelled.sum())]
    assert torch.equal(loss, expected[0])
    assert torch.equal(q, expected[2])
    assert torch.equal(grad_hidden[labelled], expected[1][0])
    assert not grad_hidden[~labelled].any()
    assert all(torch.equal(a, b) for a, b in zip(others, expected[1][1:], strict=True))


def test_many_rows_in_no_group(small_tiles):
    """Their weight is 0: the gradient's products leave them out; ids, a sequence dimension, both budgets."""
    hidden, weight, bias, labels, _ = inputs(rows=40)
    groups = torch.where(torch.arange(40) % 2 == 0, -1, torch.arange(40) % 3)
    member = groups[:, None] == torch.arange(3)
    exact_loss, exact = eager(hidden, weight, bias, labels, member, torch.float64)
    loss, gradients_, _ = run(hidden, weight, bias, labels, member)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=0)
    for value, truth in zip(gradients_, exact, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-6)
    scale = (groups >= 0).float()
    whole = linear.select(torch.rand(40, 5), labels, scale, torch.zeros(40), -100, 0.0)
    assert torch.equal(whole.rows, (groups >= 0).nonzero()[:, 0])


def test_compiled_with_the_filter():
    torch._dynamo.reset()
    hidden, weight, bias, labels = confident(40, 61, 16, 1.5)
    groups = torch.arange(40) % 3
    results = []
    for compiled in (False, True):
        loss_fn = rd.LinearGroupDROLoss(3, rd.GroupDRO(0.5), filter_eps=0.01)
        call = torch.compile(loss_fn, fullgraph=True) if compiled else loss_fn
        w = weight.clone().requires_grad_()
        loss = call(hidden, w, labels, groups, bias)
        loss.backward()
        results.append((loss.detach(), loss_fn.group_weights, w.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("value", [-1e-3, 1, 1.5, math.nan, math.inf, True, "auto"])
def test_bad_filter_is_named(value):
    hidden, weight, _, labels, groups = inputs()
    with pytest.raises(ValueError, match=r"filter_eps must be None or a number in \[0, 1\), got"):
        rd.functional.linear_group_dro_cross_entropy(
            hidden, weight, labels, groups, torch.full((3,), 1 / 3), filter_eps=value
        )
    with pytest.raises(ValueError, match="filter_eps must be"):
        rd.LinearGroupDROLoss(3, filter_eps=value)


def test_filter_elsewhere_than_on_a_cpu_is_refused():
    hidden, weight, _, labels, groups = (t.to("meta") for t in inputs())
    with pytest.raises(ValueError, match=r"filter_eps = 0\.01 is served on a CPU, .* on meta"):
        rd.functional.linear_group_dro_cross_entropy(
            hidden, weight, labels, groups, torch.full((3,), 1 / 3, device="meta"), filter_eps=0.01
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rows_start_at_cache_lines_and_padding_is_small(dtype):
    for vocabulary in (1, 61, 1000, 30522, 50257, 128256):
        itemsize = torch.empty(0, dtype=dtype).element_size()
        stride = gemm.leading_dimension(vocabulary, itemsize)
        assert vocabulary <= stride <= vocabulary * 1.016
        assert stride == vocabulary or (stride * itemsize) % 64 == 0
        assert vocabulary < 4096 or (stride * itemsize) % 64 == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("converted", [False, True])
def test_16_bit_products_in_float32_or_not(monkeypatch, small_tiles, dtype, converted):
    """The same within rounding, whether torch multiplies 16-bit matrices itself or tiles are converted."""
    monkeypatch.setattr(gemm, "converts", lambda device_type, dtype: converted)
    hidden, weight, bias, labels = (
        t.to(dtype) if t.is_floating_point() else t for t in confident(40, 61, 16, 0.5)
    )
    scale = torch.rand(40)
    values = gradients(hidden, weight, bias, labels, scale, which="reference")
    _, exact = exact_terms(hidden, weight, bias, labels, scale)
    for value, truth in zip(values, exact, strict=True):
        assert (value.double() - truth).norm() <= 2**-6 * truth.norm()


def test_autocast_stores_u_in_16_bits(monkeypatch):
    """U takes half the memory, and nothing of float32 grows with N V."""
    seen = []
    backward = linear.backward
    monkeypatch.setattr(
        linear, "backward", lambda *args: seen.append(args[3].unweighted.dtype) or backward(*args)
    )
    hidden, weight, bias, labels, groups = inputs()
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = rd.LinearGroupDROLoss(3)(hidden, weight, labels, groups, bias)
    for gradient, leaf in zip(torch.autograd.grad(loss, leaves), leaves, strict=True):
        assert gradient.dtype == leaf.dtype == torch.float32
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("filter_eps", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_held", [200, 1000])
def test_memory_with_tiles_stays_within_the_budget(monkeypatch, dtype, rows_held, filter_eps):
    """As in test_linear, plus the stated working space of fixed size."""
    monkeypatch.setattr(gemm, "TILE_ROWS", 64)
    monkeypatch.setattr(gemm, "TILE_COLUMNS", 100)
    rows, vocabulary, width = 1000, 700, 24
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in confident(rows, vocabulary, width, 1.0)]
    itemsize = tensors[0].element_size()
    budget = budget_for(rows_held, vocabulary, width, itemsize)
    stored, block = linear.plan(rows, vocabulary, width, itemsize, budget)
    scale = torch.rand(rows)
    with PeakMemory(*tensors, scale) as memory:
        values = gradients(*tensors, scale, filter_eps, stored=stored, block=block)
    allowed = budget + sum(value.nbytes for value in values) + vocabulary * 24 + 64 * rows
    if dtype != torch.float32 and stored < rows:
        allowed += 4 * vocabulary * width  # the sum of the blocks' weight gradients
    tiles = (
        3 * 64 * 100 * 4 + 3 * 100 * width * 4
    )  # U as chosen by columns, by rows, converted; weight likewise
    assert memory.peak <= allowed + tiles + 64 * 100 * 8
