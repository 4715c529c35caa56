"""The linear op whose first product leaves exponentials, and its filter by tiles, through the public functions."""

import pytest
import torch
import torch.nn.functional as F

import rd_kernels as rd
from rd_kernels import functional
from rd_kernels.backends import triton_gemm
from rd_kernels.backends.registry import FUSED_LOGITS_VARIABLE, get
from tests.conftest import on_device_of
from tests.oracles import eager_group_dro
from tests.test_linear import EPSILON, STEP

pytestmark = pytest.mark.usefixtures("poisoned")
VOCABULARY = 2050  # padded to 2080


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles each way at a size that Triton's interpreter can do."""
    tiles = triton_gemm.GEMMTiles(rows=16, columns=128, depth=16)
    monkeypatch.setattr(triton_gemm, "GEMM_TILES", {"sm_80": tiles, "gfx942": tiles})


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setenv(FUSED_LOGITS_VARIABLE, "1")
    with on_device_of("triton"):
        yield


def inputs(rows=37, width=16, sharpness=1.0, dtype=torch.bfloat16):
    hidden = (torch.randn(rows, width) * sharpness).to(dtype)
    weight, bias = (torch.randn(VOCABULARY, width) / 2).to(dtype), torch.randn(VOCABULARY).to(dtype)
    labels, groups = torch.randint(VOCABULARY, (rows,)), torch.randint(-1, 3, (rows,))
    labels[::5] = -100
    labels[1], labels[2] = VOCABULARY - 1, 0
    return hidden, weight, bias, labels, groups


def run(hidden, weight, bias, labels, groups, grad_out=1.0, backend="triton", **options):
    """-> loss, gradients, q"""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    q = torch.full((3,), 1 / 3)
    loss = functional.linear_group_dro_cross_entropy(
        leaves[0],
        leaves[1],
        labels,
        groups,
        q,
        rd.GroupDRO(STEP),
        bias=leaves[2],
        backend="triton",
        **options,
    )
    return loss.detach(), torch.autograd.grad(loss, leaves, torch.full_like(loss, grad_out)), q


def truth(hidden, weight, bias, labels, groups, dtype=torch.float64):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    member = groups[:, None] == torch.arange(3)
    q = torch.full((3,), 1 / 3, dtype=torch.float64)
    loss, _ = eager_group_dro(F.linear(*leaves), labels, member, q, STEP)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def exponentials_used(monkeypatch):
    calls = []
    backend = type(get("triton"))
    original = backend.exponentials
    monkeypatch.setattr(
        backend, "exponentials", lambda self, *args: calls.append(args[-1].shape) or original(self, *args)
    )
    return calls


@pytest.mark.parametrize("options", [{}, {"capacity": 20}, {"memory_budget": 20 * (2080 * 2 + 16 * 10)}])
def test_against_float64(fused, monkeypatch, options):
    """All rows, with rows beyond the capacity, with rows that are recomputed: no worse than eager bfloat16."""
    calls = exponentials_used(monkeypatch)
    problem = inputs()
    loss, gradients, _ = run(*problem, **options)
    exact_loss, exact = truth(*problem)
    eager_loss, baseline = truth(*problem, torch.bfloat16)
    assert len(calls) == 1
    assert calls[0][0] <= options.get("capacity", 37)
    epsilon = EPSILON[torch.bfloat16]
    assert abs(loss - exact_loss) <= abs(eager_loss - exact_loss) + 2 * epsilon * exact_loss
    for value, expected, plain in zip(gradients, exact, baseline, strict=True):
        allowed = 4 * epsilon * float(expected.abs().max())
        assert (value - expected).abs().max() <= (plain - expected).abs().max() + allowed


def test_off_by_default_and_never_for_other_dtypes(monkeypatch):
    calls = exponentials_used(monkeypatch)
    with on_device_of("triton"):
        run(*inputs())
        monkeypatch.setenv(FUSED_LOGITS_VARIABLE, "1")
        for dtype in (torch.float32, torch.float16):
            run(*inputs(dtype=dtype))
    assert not calls
    monkeypatch.setenv(FUSED_LOGITS_VARIABLE, "yes")
    with pytest.raises(ValueError, match="RD_KERNELS_FUSED_LOGITS must be 0 or 1, got 'yes'"):
        run(*inputs())


def test_a_nan_row_in_no_group_stays_out_of_the_gradients(fused):
    hidden, weight, bias, labels, groups = inputs()
    groups[3], labels[3] = -1, 5
    _, expected, _ = run(hidden, weight, bias, labels, groups)
    hidden[3] = float("nan")
    _, gradients, _ = run(hidden, weight, bias, labels, groups)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)


def bound(hidden, weight, bias, labels, groups, eps):
    """-> C, the greatest norms of the decoder's and the hidden states' rows, times eps"""
    leaves = [t.double() for t in (hidden, weight, bias)]
    logits = F.linear(*leaves).requires_grad_()
    member = groups[:, None] == torch.arange(3)
    loss, _ = eager_group_dro(logits, labels, member, torch.full((3,), 1 / 3, dtype=torch.float64), STEP)
    total = torch.autograd.grad(loss, logits)[0].abs().sum()
    return eps * total * leaves[1].norm(dim=1).max(), eps * total * leaves[0].norm(dim=1).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [2**-9, 0.05, 0.3])
def test_the_filter_keeps_its_bound(monkeypatch, dtype, eps):
    """Beyond the rounding of the exact result; loss, q and the bias's gradient stay as they are."""
    with on_device_of("triton"):
        problem = inputs(rows=64, sharpness=4.0, dtype=dtype)
        exact_loss, exact_gradients, exact_q = run(*problem, filter_eps=1e-12)
        loss, gradients, q = run(*problem, filter_eps=eps)
        assert torch.equal(loss, exact_loss)
        assert torch.equal(q, exact_q)
        assert torch.equal(gradients[2], exact_gradients[2])
        _, expected = truth(*problem)
        for value, whole, allowed, true in zip(
            gradients, exact_gradients, bound(*problem, eps), expected, strict=False
        ):
            error = (value.double() - true).norm(dim=1).sum()
            assert error <= allowed + (whole.double() - true).norm(dim=1).sum()
        if eps == 0.3:
            assert not torch.equal(gradients[1], exact_gradients[1])


@pytest.mark.parametrize("ignore_index", [-100, 0, 7])
def test_the_filter_s_order_moves_labels_and_gradients_along(ignore_index):
    """A label may become the number that means "ignore", and a bad label stays one."""
    with on_device_of("triton"):
        hidden, weight, bias, labels, groups = inputs()
        labels = labels.where(labels >= 0, ignore_index)
        plain = run(hidden, weight, bias, labels, groups, ignore_index=ignore_index)
        sorted_ = run(hidden, weight, bias, labels, groups, ignore_index=ignore_index, filter_eps=1e-12)
        torch.testing.assert_close(sorted_[0], plain[0], rtol=4e-3, atol=0)
        for a, b in zip(sorted_[1], plain[1], strict=True):
            assert (a - b).abs().max() <= 4 * EPSILON[torch.bfloat16] * b.abs().max()
        labels[4] = VOCABULARY + 3
        if hidden.device.type == "cpu":
            with pytest.raises(ValueError, match="labels: 1 of them"):
                run(hidden, weight, bias, labels, groups, ignore_index=ignore_index, filter_eps=0.1)


def test_the_filter_with_a_capacity_and_a_small_budget():
    with on_device_of("triton"):
        problem = inputs(rows=60)
        plain = run(*problem)
        for options in ({"capacity": 20}, {"memory_budget": 20 * (2080 * 2 + 16 * 10)}):
            loss, gradients, _ = run(*problem, filter_eps=1e-12, **options)
            torch.testing.assert_close(loss, plain[0], rtol=4e-3, atol=0)
            for a, b in zip(gradients, plain[1], strict=True):
                assert (a - b).abs().max() <= 4 * EPSILON[torch.bfloat16] * b.abs().max()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_filter_is_refused_by_name_for_float32(backend):
    with on_device_of(backend):
        hidden, weight, bias, labels, groups = inputs(dtype=torch.float32)
        with pytest.raises(
            ValueError, match=r"filter_eps = 0\.1 is served on a CPU, and on a GPU for bfloat16 and"
        ):
            functional.linear_group_dro_cross_entropy(
                hidden, weight, labels, groups, torch.ones(3), bias=bias, backend=backend, filter_eps=0.1
            )


@pytest.mark.parametrize("options", [{"filter_eps": 0.1}, {"capacity": 20}])
def test_the_cuda_backend_borrows_triton_s_products(fused, options):
    with on_device_of("cuda"):
        problem = inputs()
        a, b = (run(*problem, backend=name, **options) for name in ("cuda", "triton"))
        torch.testing.assert_close(a[0], b[0])
        for x, y in zip(a[1], b[1], strict=True):
            assert (x - y).abs().max() <= 2 * EPSILON[torch.bfloat16] * y.abs().max()


def test_compiled_with_exponentials(fused):
    """The op's fake knows the shapes of what is kept."""
    torch._dynamo.reset()
    hidden, weight, bias, labels, groups = inputs(rows=20)
    loss_fn = rd.LinearGroupDROLoss(3, rd.GroupDRO(STEP), backend="triton")
    results = []
    for call in (loss_fn, torch.compile(loss_fn, fullgraph=True)):
        leaf = hidden.detach().clone().requires_grad_()
        loss_fn.group_weights.fill_(1 / 3)
        loss = call(leaf, weight, labels, groups, bias)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
