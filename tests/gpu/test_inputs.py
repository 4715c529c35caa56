"""Values and dtypes: what is wrong shows without stopping the GPU, what is not served is refused by name."""

import pytest
import torch
import torch.nn.functional as F

import rd_kernels as rd
from tests.gpu.problems import assert_exact, exact, make_batch, make_loss, step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bad", ["label", "group"])
@pytest.mark.parametrize("value", [6, -7, 2**40])
def test_values_out_of_range_leave_the_state_alone_and_show_in_the_report(backend, bad, value):
    labels, groups = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 1])
    (labels if bad == "label" else groups)[1] = value
    logits = torch.randn(3, 6, requires_grad=True)
    loss_fn = make_loss(backend, num_groups=2)
    loss, gradient = step(loss_fn, logits, labels, groups)
    assert loss.isnan()
    assert not gradient.any()
    assert torch.equal(loss_fn.group_weights, torch.full((2,), 0.5))
    with pytest.raises(ValueError, match=f"{bad}s: 1 "):
        loss_fn.report()
    good = step(loss_fn, logits, labels.clamp(0, 5), groups.clamp(0, 1))
    assert all(tensor.isfinite().all() for tensor in good)
    assert loss_fn.report().overall.count == 3

    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4)
    linear = rd.LinearGroupDROLoss(2, backend=backend)
    loss, gradient = linear(hidden, weight, labels, groups), None
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.isnan()
    assert not gradient.any()
    assert torch.equal(linear.group_weights, torch.full((2,), 0.5))


def test_a_bad_label_of_cross_entropy_spoils_its_row_only(backend):
    logits = torch.randn(3, 6, requires_grad=True)
    losses = rd.functional.cross_entropy(logits, torch.tensor([1, 6, 3]), reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(losses, logits, torch.ones(3))
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient.any(1).tolist() == [True, False, True]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 4000, 4999], ids=["first", "middle", "label"])
def test_non_finite_logits_are_as_in_torch_on_a_cpu(backend, dtype, value, column):
    logits, labels = torch.randn(5, 5000, dtype=dtype), torch.full((5,), 4999)
    logits[2, column] = value
    ours, theirs = logits.clone().requires_grad_(), logits.cpu().float().requires_grad_()
    loss = rd.functional.cross_entropy(ours.float(), labels, reduction="none", backend=backend)
    narrow = rd.functional.cross_entropy(ours, labels, reduction="none", backend=backend)
    expected = F.cross_entropy(theirs, labels.cpu(), reduction="none")
    torch.testing.assert_close(loss.cpu(), expected, equal_nan=True, rtol=1e-5, atol=1e-6)
    assert narrow.dtype == dtype
    torch.testing.assert_close(narrow.cpu().float(), expected, equal_nan=True, rtol=2**-7, atol=1e-6)
    (gradient,) = torch.autograd.grad(narrow.float().sum(), ours)
    expected.sum().backward()
    torch.testing.assert_close(gradient.cpu().float(), theirs.grad, equal_nan=True, rtol=2**-7, atol=1e-6)


def test_float16_far_from_zero(backend):
    """Logits near the largest float16: accumulated in float32, nothing overflows."""
    logits, labels, groups = make_batch(16, 3001, torch.float16)
    logits = (logits * 7000).clamp(-65504, 65504)
    loss_fn = make_loss(backend)
    loss_fn.objective = rd.GroupDRO(1e-6)
    loss, gradient = step(loss_fn, logits.requires_grad_(), labels, groups)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_float64_is_refused_by_name_and_served_by_auto(backend):
    logits, labels, groups = make_batch(5, 30, torch.float64)
    with pytest.raises(RuntimeError, match=rf"backend '{backend}' cannot serve this call: .*float64"):
        make_loss(backend)(logits, labels, groups)
    with pytest.raises(RuntimeError, match="cannot serve this call"):
        make_loss(backend).cpu()(logits.cpu().float(), labels.cpu(), groups.cpu())
    assert make_loss("auto")(logits, labels, groups).dtype == torch.float64


def test_labels_on_the_cpu_are_refused(backend):
    logits, labels, groups = make_batch(5, 30, torch.float32)
    with pytest.raises(ValueError, match="labels is on cpu, but logits is on cuda:0"):
        make_loss(backend)(logits, labels.cpu(), groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    """Logits arrive in 16 bits, the loss is float32, the parameters' gradients keep their dtype."""
    hidden, weight = torch.randn(40, 64, requires_grad=True), torch.randn(3000, 64, requires_grad=True)
    labels, groups = torch.randint(3000, (40,)), torch.arange(40) % 3
    with torch.autocast("cuda", dtype):
        logits = F.linear(hidden, weight)
        assert logits.dtype == dtype
        losses = [
            rd.GroupDROLoss(3, backend=backend)(logits, labels, groups),
            rd.LinearGroupDROLoss(3, backend=backend)(hidden, weight, labels, groups),
            rd.CrossEntropyLoss(backend=backend)(logits, labels),
        ]
    assert all(loss.dtype == torch.float32 for loss in losses)
    exact_logits = (hidden @ weight.t()).double()
    truth = rd.GroupDROLoss(3, backend="reference")(exact_logits, labels, groups)
    expected = torch.autograd.grad(truth, (hidden, weight))
    for loss in losses[:2]:
        assert loss.item() == pytest.approx(truth.item(), rel=2e-2)
        for gradient, right in zip(
            torch.autograd.grad(loss, (hidden, weight), retain_graph=True), expected, strict=True
        ):
            assert gradient.dtype == torch.float32
            assert (gradient - right).norm() <= 2e-2 * right.norm()


@pytest.mark.parametrize("form", ["logits", "linear"])
def test_compiled_without_a_graph_break(backend, form):
    """A step of training under torch.compile(fullgraph=True): loss, gradients and q as in eager."""
    torch._dynamo.reset()
    module = rd.GroupDROLoss if form == "logits" else rd.LinearGroupDROLoss
    hidden, weight = torch.randn(33, 16, requires_grad=True), torch.randn(1003, 16, requires_grad=True)
    labels, groups = torch.randint(1003, (33,)), torch.arange(33) % 3

    def run(loss_fn, hidden, weight):
        h = torch.tanh(hidden)
        return (
            loss_fn(h @ weight.t(), labels, groups)
            if form == "logits"
            else loss_fn(h, weight, labels, groups)
        )

    losses = [module(3, rd.GroupDRO(0.5), backend=backend) for _ in range(2)]
    compiled = torch.compile(run, fullgraph=True)
    for _ in range(3):
        results = [run(losses[0], hidden, weight), compiled(losses[1], hidden, weight)]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(result, (hidden, weight)) for result in results]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(losses[0].group_weights, losses[1].group_weights, rtol=1e-5, atol=1e-6)


def test_a_step_is_exact(backend):
    """The helpers of this folder against each other, once more for masks."""
    for mask in (False, True):
        logits, labels, groups = make_batch(70, 1003, torch.float32, mask=mask)
        loss_fn = make_loss(backend)
        truth = exact(logits, labels, groups, loss_fn.group_weights)
        assert_exact(*step(loss_fn, logits.requires_grad_(), labels, groups), loss_fn.group_weights, truth)
