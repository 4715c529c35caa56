"""The linear op: equal to the logits op, exact for any budget, and within it."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rd_kernels as rd
from rd_kernels.linear import plan
from tests.oracles import eager_group_dro
from tests.test_conformance import EPSILON

STEP = 0.3


def inputs(rows=37, vocabulary=61, width=16, dtype=torch.float32, num_groups=3):
    hidden = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(vocabulary, width) / 2).to(dtype)
    bias = torch.randn(vocabulary).to(dtype)
    labels = torch.randint(vocabulary, (rows,))
    labels[::5] = -100
    return hidden, weight, bias, labels, torch.rand(rows, num_groups) < 0.5


def run(hidden, weight, bias, labels, groups, budget=1 << 30, backend="auto", grad_out=1.0):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    q = torch.full((groups.shape[1],), 1 / groups.shape[1])
    loss = rd.functional.linear_group_dro_cross_entropy(
        leaves[0], leaves[1], labels, groups, q, rd.GroupDRO(STEP), bias=leaves[2], memory_budget=budget,
        backend=backend,
    )  # fmt: skip
    wanted = [leaf for leaf in leaves if leaf is not None]
    return loss.detach(), torch.autograd.grad(loss, wanted, torch.full_like(loss, grad_out)), q


def eager(hidden, weight, bias, labels, groups, dtype, grad_out=1.0):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    q = torch.full((groups.shape[1],), 1 / groups.shape[1], dtype=torch.float64)
    loss, _ = eager_group_dro(F.linear(*leaves), labels, groups, q, STEP)
    return loss.detach(), torch.autograd.grad(loss, leaves, torch.full_like(loss, grad_out))


def budget_for(rows, vocabulary, width, itemsize):
    """Bytes that hold exactly ``rows`` rows."""
    row = vocabulary * itemsize + width * (itemsize + 2 * max(itemsize, 4))
    return rows * row


@pytest.mark.parametrize("stored", ["all rows", "some rows", "one row at a time"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(backend, dtype, stored):
    """Error at most eager's at the same dtype, plus a few roundings, whether rows are stored or recomputed."""
    hidden, weight, bias, labels, groups = inputs(dtype=dtype)
    rows = {"all rows": 37, "some rows": 13, "one row at a time": 1}[stored]
    budget = budget_for(rows, 61, 16, hidden.element_size())
    loss, gradients, _ = run(hidden, weight, bias, labels, groups, budget, backend, grad_out=2.0)
    exact_loss, exact = eager(hidden, weight, bias, labels, groups, torch.float64, grad_out=2.0)
    eager_loss, baseline = eager(hidden, weight, bias, labels, groups, dtype, grad_out=2.0)
    assert abs(loss - exact_loss) <= abs(eager_loss - exact_loss) + 2 * EPSILON[dtype] * exact_loss
    for value, truth, plain in zip(gradients, exact, baseline, strict=True):
        assert value.dtype == dtype
        allowed = 4 * EPSILON[dtype] * float(truth.abs().max())
        assert (value - truth).abs().max() <= (plain - truth).abs().max() + allowed


def test_float64_is_exact_on_the_reference():
    hidden, weight, bias, labels, groups = inputs(dtype=torch.float64)
    loss, gradients, _ = run(hidden, weight, bias, labels, groups, 5000, "reference")
    exact_loss, exact = eager(hidden, weight, bias, labels, groups, torch.float64)
    torch.testing.assert_close(loss, exact_loss, rtol=1e-7, atol=0)  # q is kept in float32
    torch.testing.assert_close(gradients, exact, rtol=1e-6, atol=1e-7)


def test_equals_the_logits_op():
    """Same q, same report, with a sequence dimension, ids, no bias."""
    hidden, weight = torch.randn(4, 9, 16), torch.randn(61, 16)
    labels, groups = torch.randint(61, (4, 9)), torch.tensor([0, 1, -1, 1])
    linear, logits = rd.LinearGroupDROLoss(2, rd.GroupDRO(STEP)), rd.GroupDROLoss(2, rd.GroupDRO(STEP))
    torch.testing.assert_close(
        linear(hidden, weight, labels, groups), logits(hidden @ weight.t(), labels, groups)
    )
    torch.testing.assert_close(linear.group_weights, logits.group_weights)
    assert linear.report().by_group["1"].count == logits.report().by_group["1"].count == 18
    assert linear.report().ungrouped.count == 9


def test_only_wanted_gradients():
    hidden, weight, _, labels, groups = inputs()
    loss = rd.functional.linear_group_dro_cross_entropy(
        hidden, weight.requires_grad_(), labels, groups, torch.full((3,), 1 / 3)
    )
    loss.backward()
    assert hidden.grad is None
    assert weight.grad.abs().sum() > 0


def test_second_backward_through_a_retained_graph():
    hidden, weight, _, labels, groups = inputs()
    hidden.requires_grad_()
    loss = rd.functional.linear_group_dro_cross_entropy(
        hidden, weight, labels, groups, torch.full((3,), 1 / 3), memory_budget=budget_for(20, 61, 16, 4)
    )
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, hidden)
    torch.testing.assert_close(second, 3 * first)


def test_all_rows_ignored_and_no_rows():
    hidden, weight, bias, labels, groups = inputs()
    for rows in (37, 0):
        loss, gradients, q = run(
            hidden[:rows], weight, bias, torch.full_like(labels[:rows], -100), groups[:rows]
        )
        assert loss == 0
        assert all(not gradient.any() for gradient in gradients)
        assert torch.equal(q, torch.full((3,), 1 / 3))


class PeakMemory(TorchDispatchMode):
    """Peak bytes of storages that came out of torch calls and are alive at the same time."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {tensor.untyped_storage()._cdata for tensor in inputs}  # views of these are not new
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self.inputs:
                    continue
                self.alive[storage._cdata] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    storage.nbytes(),
                )
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("rows_held", [16, 200, 600, 1000])
def test_memory_stays_within_the_budget(rows_held):
    """Everything allocated in forward and backward, but the gradients and per-row scalars, fits the budget."""
    from rd_kernels import linear
    from rd_kernels.backends.registry import get

    rows, vocabulary, width = 1000, 700, 24
    hidden, weight, bias, labels, _ = inputs(rows, vocabulary, width)
    budget = budget_for(rows_held, vocabulary, width, 4)
    layout = linear.Layout(rows, *plan(rows, vocabulary, width, 4, budget))
    backend = get("cpu")
    scale = torch.rand(rows)
    with PeakMemory(hidden, weight, bias, labels, scale) as memory:
        _, normaliser, _, kept = linear.forward(
            backend, hidden, weight, bias, labels, None, vocabulary, -100, layout
        )
        gradients = linear.backward(
            backend, torch.tensor(1.0), scale, kept, normaliser, hidden, weight, bias, labels, None, None,
            vocabulary, -100, layout, [True, True, True],
        )  # fmt: skip
    gradient_bytes = sum(gradient.nbytes for gradient in gradients)
    per_row_scalars = 64 * rows
    assert memory.peak <= budget + gradient_bytes + vocabulary * 4 + per_row_scalars
    if rows_held < rows:
        assert memory.peak < rows * vocabulary * 4 + gradient_bytes  # never all the logits


@pytest.mark.parametrize("rows", [0, 1, 5, 1000, 100_000])
@pytest.mark.parametrize("budget", [400, 1000, 10**6, 10**9])
def test_plan_covers_all_rows_within_the_budget(rows, budget):
    stored, block = plan(rows, 30, 10, 4, budget)
    row_bytes = 30 * 4 + 10 * 12
    assert 0 <= stored <= rows
    assert block >= 1
    if stored < rows:
        assert (stored + block) * row_bytes <= budget


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.randn(61, 15)}, ValueError, r"weight must have shape \[V, 16\]"),
        ({"weight": torch.randn(0, 16)}, ValueError, "V >= 1"),
        ({"bias": torch.randn(60)}, ValueError, r"bias must have shape \[61\]"),
        ({"weight": torch.randn(61, 16).bfloat16()}, TypeError, "weight is torch.bfloat16, but hidden is"),
        ({"hidden": torch.ones(37, 16, dtype=torch.int32)}, TypeError, "hidden must be floating point"),
        ({"memory_budget": 100}, ValueError, "memory_budget is 100 bytes, but a single row needs"),
        ({"weight": torch.randn(61, 16, device="meta")}, ValueError, "weight is on meta"),
    ],
)
def test_bad_input_is_named(change, error, message):
    hidden, weight, bias, labels, groups = inputs()
    call = {"hidden": hidden, "weight": weight, "labels": labels, "groups": groups, "bias": bias}
    with pytest.raises(error, match=message):
        rd.functional.linear_group_dro_cross_entropy(
            **call | {"group_weights": torch.full((3,), 1 / 3)} | change
        )
