"""The linear op with a place for some of the rows: what is labelled is computed, all of it, whatever fits."""

import warnings

import pytest
import torch

import rd_kernels as rd
from rd_kernels import linear
from rd_kernels.backends.registry import get
from tests.test_linear import EPSILON, STEP, eager, inputs

pytestmark = pytest.mark.usefixtures("poisoned")


def sparse_inputs(rows=60, dtype=torch.float32, share=0.3):
    hidden, weight, bias, labels, groups = inputs(rows=rows, dtype=dtype)
    labels[torch.rand(rows) > share] = -100
    return hidden, weight, bias, labels, groups


def run(hidden, weight, bias, labels, groups, capacity, backend, grad_out=2.0, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    q = torch.full((3,), 1 / 3)
    loss = rd.functional.linear_group_dro_cross_entropy(
        leaves[0], leaves[1], labels, groups, q, rd.GroupDRO(STEP), bias=leaves[2], capacity=capacity,
        backend=backend, **options,
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, leaves, torch.full_like(loss, grad_out)), q


@pytest.fixture(params=["triton", "cuda", "reference", "cpu"])
def compacting(request, monkeypatch):
    """Each backend in turn, with rows compacted also where a CPU would pick the labelled ones."""
    from tests.conftest import on_device_of

    monkeypatch.setattr(type(get(request.param)), "on_gpu", True)
    with on_device_of(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capacity", [1, 7, 0.2, 59])
def test_against_float64(compacting, dtype, capacity):
    """Error at most eager's at the same dtype plus a few roundings, whether the labelled rows fit or most do not."""
    hidden, weight, bias, labels, groups = sparse_inputs(dtype=dtype)
    loss, gradients, q = run(hidden, weight, bias, labels, groups, capacity, compacting)
    exact_loss, exact = eager(hidden, weight, bias, labels, groups, torch.float64, grad_out=2.0)
    eager_loss, baseline = eager(hidden, weight, bias, labels, groups, dtype, grad_out=2.0)
    assert abs(loss - exact_loss) <= abs(eager_loss - exact_loss) + 2 * EPSILON[dtype] * exact_loss
    for value, truth, plain in zip(gradients, exact, baseline, strict=True):
        allowed = 4 * EPSILON[dtype] * float(truth.abs().max())
        assert (value - truth).abs().max() <= (plain - truth).abs().max() + allowed
    whole = run(hidden, weight, bias, labels, groups, None, compacting)
    # Beyond the capacity logits are not rounded to 16 bits.
    torch.testing.assert_close(q, whole[2], rtol=EPSILON[dtype], atol=1e-6)


def test_rows_without_a_label_take_no_part(compacting):
    """Whatever they hold; their gradient is 0; an overflow changes nothing of that."""
    hidden, weight, bias, labels, groups = sparse_inputs()
    expected = run(hidden, weight, bias, labels, groups, 40, compacting)
    hidden[labels == -100] = float("nan")
    for capacity in (40, 5):
        loss, gradients, _ = run(hidden, weight, bias, labels, groups, capacity, compacting)
        assert not gradients[0][labels == -100].any()
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(gradients, expected[1])


@pytest.mark.parametrize("capacity", [4, 25])
def test_all_or_none_of_the_rows_are_labelled(compacting, capacity):
    hidden, weight, bias, labels, groups = inputs(rows=30)
    none = torch.full_like(labels, -100)
    loss, gradients, q = run(hidden, weight, bias, none, groups, capacity, compacting)
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients)
    assert torch.equal(q, torch.full((3,), 1 / 3))
    labels = torch.randint(61, (30,))
    loss, gradients, _ = run(hidden, weight, bias, labels, groups, capacity, compacting)
    exact_loss, exact = eager(hidden, weight, bias, labels, groups, torch.float64, grad_out=2.0)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=0)
    for value, truth in zip(gradients, exact, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-6)


def test_with_a_memory_budget_rows_are_stored_recomputed_and_beyond(compacting):
    hidden, weight, bias, labels, groups = sparse_inputs(share=0.8)
    budget = 6 * (61 * 4 + 16 * 12)
    loss, gradients, _ = run(hidden, weight, bias, labels, groups, 20, compacting, memory_budget=budget)
    exact_loss, exact = eager(hidden, weight, bias, labels, groups, torch.float64, grad_out=2.0)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=0)
    for value, truth in zip(gradients, exact, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-6)


def test_only_the_capacity_is_kept(compacting, monkeypatch):
    """The buffer holds as many rows as there are places: nothing of the size of the batch times the vocabulary."""
    kept = []
    forward = linear.forward

    def spy(*arguments):
        result = forward(*arguments)
        kept.append(result[3].unweighted.shape)
        return result

    monkeypatch.setattr(linear, "forward", spy)
    run(*sparse_inputs(), 0.25, compacting)
    assert kept == [(15, 61)]


def test_wanted_gradients_only(compacting):
    hidden, weight, bias, labels, groups = sparse_inputs()
    full = run(hidden, weight, bias, labels, groups, 7, compacting)
    for wanted in range(3):
        leaves = [
            t.detach().clone().requires_grad_(i == wanted) for i, t in enumerate((hidden, weight, bias))
        ]
        loss = rd.functional.linear_group_dro_cross_entropy(
            leaves[0], leaves[1], labels, groups, torch.full((3,), 1 / 3), rd.GroupDRO(STEP), bias=leaves[2],
            capacity=7, backend=compacting,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, leaves[wanted], torch.full_like(loss, 2.0))
        assert torch.equal(gradient, full[1][wanted])


def test_ids_and_a_sequence_dimension(compacting):
    hidden, weight = torch.randn(4, 9, 16), torch.randn(61, 16)
    labels, groups = torch.randint(61, (4, 9)), torch.tensor([0, 1, -1, 1])
    labels[torch.rand(4, 9) < 0.6] = -100
    some, logits = (
        rd.LinearGroupDROLoss(2, rd.GroupDRO(STEP), capacity=0.3, backend=compacting),
        rd.GroupDROLoss(2, rd.GroupDRO(STEP), backend=compacting),
    )
    some, logits = some.to(hidden.device), logits.to(hidden.device)
    torch.testing.assert_close(
        some(hidden, weight, labels, groups), logits(hidden @ weight.t(), labels, groups)
    )
    assert some.report().by_group["1"].count == logits.report().by_group["1"].count


def test_the_report_warns_of_an_overflow(compacting):
    hidden, weight, bias, labels, groups = inputs(rows=30)
    loss_fn = rd.LinearGroupDROLoss(3, capacity=20, backend=compacting).to(hidden.device)
    loss_fn(hidden, weight, labels, groups, bias)
    with pytest.warns(UserWarning, match="capacity had 20 places for 24 labelled rows"):
        assert loss_fn.report().overall.count == 24
    labels[6:] = -100
    loss_fn(hidden, weight, labels, groups, bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn.report()


@pytest.mark.parametrize("which", ["reference", "cpu"])
def test_compiled_without_a_graph_break(which):
    """Nothing depends on how many rows are labelled: one graph for all of these batches."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, examples):
        graphs.append(graph)
        return graph.forward

    loss_fn = rd.LinearGroupDROLoss(3, rd.GroupDRO(STEP), capacity=10, backend=which)
    plain = rd.LinearGroupDROLoss(3, rd.GroupDRO(STEP), backend=which)
    compiled = torch.compile(loss_fn, fullgraph=True, backend=count)
    for share in (0.1, 0.5, 0.0):
        hidden, weight, bias, labels, groups = sparse_inputs(share=share)
        loss = compiled(hidden, weight, labels, groups, bias)
        torch.testing.assert_close(loss, plain(hidden, weight, labels, groups, bias))
    assert len(graphs) == 1


@pytest.mark.parametrize("capacity", [0, -3, 1.5, 0.0, True, "all"])
def test_bad_capacity_is_named(capacity):
    with pytest.raises(ValueError, match="capacity must be None, a number of rows >= 1, or a share"):
        rd.LinearGroupDROLoss(2, capacity=capacity)
    with pytest.raises(ValueError, match="capacity must be"):
        rd.functional.linear_group_dro_cross_entropy(
            torch.randn(2, 3), torch.randn(4, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64),
            torch.ones(1), capacity=capacity,
        )  # fmt: skip
