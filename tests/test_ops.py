"""What torch demands of an op: opcheck, torch.compile without graph breaks, clear limits."""

import pytest
import torch

import rd_kernels as rd
from rd_kernels import ops


def arguments(backend):
    """Example arguments of every op, by name."""
    torch.manual_seed(0)
    labels = torch.tensor([3, -100, 0, 6, 2])
    logits, groups = torch.randn(5, 7), torch.tensor([0, 1, 1, -1, 2])
    mask = torch.rand(5, 3) < 0.5
    bits, lists = ops.pack_mask(mask, backend), torch.tensor([[0, -1], [1, 2], [-1, -1], [2, 0], [1, 1]])
    weight, q, adjustment = torch.rand(7), torch.tensor([0.2, 0.5, 0.3]), torch.rand(3)
    rows = ops.row_forward(logits, labels, weight, 0.1, -100, backend)
    row_loss, normaliser, outcome, _ = ops.row_forward(logits, labels, None, 0.0, -100, backend)
    stats, status = ops.group_reduce(row_loss, outcome, groups, 7, 3, backend)
    hidden, decoder, bias = torch.randn(5, 4), torch.randn(7, 4), torch.randn(7)
    shape = (7, -100, 5, 3, 2, False)
    linear = ops.linear_forward(hidden, decoder, bias, labels, None, *shape, backend)
    index, position = ops.compact(labels, -100, backend)
    some = (7, -100, 2, 1, 1, False)
    sparse = ops.linear_forward(hidden, decoder, bias, labels, index, *some, backend)
    return {
        "row_forward": [(logits, labels, weight, 0.1, -100), (logits, labels, None, 0.0, -100)],
        "row_backward": [
            (torch.randn(5), None, logits, labels, rows[1], weight, 0.1, -100),
            (torch.tensor(2.0), torch.rand(5), logits, labels, normaliser, None, 0.0, -100),
        ],
        "row_backward_": [
            (torch.tensor(2.0), torch.rand(5), logits.clone(), labels, normaliser, None, 0.0, -100),
        ],
        "grouped_forward": [
            (logits, labels, groups, q.clone(), "group_dro", 0.1, adjustment, -100),
            (logits, labels, bits, q.clone(), "erm", 0.0, None, -100),
            (logits, labels, lists, q.clone(), "tilted_rows", 2.0, None, -100),
        ],
        "group_reduce": [(row_loss, outcome, groups, 7, 3), (row_loss, outcome, bits, 7, 3)],
        "group_update": [(stats.clone(), status, q.clone(), "group_dro", 0.1, None)],
        "row_scale": [(torch.rand(3), outcome, groups), (torch.rand(3), outcome, bits)],
        "reduce_and_update": [(row_loss, outcome, groups, q.clone(), "group_dro", 0.1, adjustment, 7)],
        "pack_mask": [(mask,)],
        "compact": [(labels, -100)],
        "linear_forward": [
            (hidden, decoder, bias, labels, None, *shape),
            (hidden, decoder, None, labels, None, 7, -100, 5, 5, 5, False),
            (hidden, decoder, bias, labels, index, *some),
        ],
        "linear_backward": [
            (torch.tensor(2.0), torch.rand(5), *linear[4:], linear[1], hidden, decoder, bias, labels, None, None,
             *shape, [True, True, True]),
            (torch.tensor(2.0), torch.rand(5), *linear[4:], linear[1], hidden, decoder, None, labels, None, None,
             *shape, [True, False, False]),
            (torch.tensor(2.0), torch.rand(5), *sparse[4:], sparse[1], hidden, decoder, bias, labels, index, position,
             *some, [True, True, True]),
        ],
    }  # fmt: skip


OPS = ["row_forward", "row_backward", "row_backward_", "grouped_forward", "group_reduce", "group_update",
       "row_scale", "reduce_and_update", "pack_mask", "compact", "linear_forward", "linear_backward"]  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_opcheck(backend, name):
    """Schema (what is mutated, what aliases), fake tensors, and AOT dispatch with dynamic shapes."""
    for case in arguments(backend)[name]:
        torch.library.opcheck(getattr(torch.ops.rd_kernels, name).default, (*case, backend))


@pytest.mark.parametrize("which", ["reference", "cpu"])
def test_opcheck_with_the_filter(which):
    for case in arguments(which)["linear_backward"]:
        torch.library.opcheck(torch.ops.rd_kernels.linear_backward.default, (*case, which, 0.1))


def test_opcheck_covers_every_op():
    registered = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("rd_kernels::")
    }
    assert registered == set(OPS)


def train(model, loss_fn, steps=3):
    """A few SGD steps -> losses, final parameters, q."""
    torch.manual_seed(1)
    decoder = torch.nn.Parameter(torch.randn(11, 6))
    embedding = torch.nn.Parameter(torch.randn(20, 6))
    optimizer = torch.optim.SGD([decoder, embedding], lr=0.5)
    losses = []
    for _ in range(steps):
        labels, groups = torch.randint(11, (20,)), torch.randint(3, (20,))
        labels[:3] = -100
        loss = model(loss_fn, embedding, decoder, labels, groups)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), decoder.detach(), embedding.detach(), loss_fn.group_weights


def logits_model(loss_fn, embedding, decoder, labels, groups):
    return loss_fn(torch.tanh(embedding) @ decoder.t(), labels, groups)


def linear_model(loss_fn, embedding, decoder, labels, groups):
    return loss_fn(torch.tanh(embedding), decoder, labels, groups)


@pytest.mark.parametrize("which", ["reference", "cpu"])
@pytest.mark.parametrize("form", ["logits", "linear"])
def test_compiled_training_matches_eager(which, form):
    """fullgraph: losses, gradients (through the parameters) and the updated q are the eager ones."""
    torch._dynamo.reset()
    module, model = {
        "logits": (rd.GroupDROLoss, logits_model),
        "linear": (rd.LinearGroupDROLoss, linear_model),
    }[form]
    eager = train(model, module(3, rd.GroupDRO(0.5), backend=which))
    compiled = train(torch.compile(model, fullgraph=True), module(3, rd.GroupDRO(0.5), backend=which))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compiled_cross_entropy_and_dynamic_rows():
    torch._dynamo.reset()
    loss_fn = rd.CrossEntropyLoss(label_smoothing=0.1)
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True)
    for rows in (4, 9, 17):
        logits, target = torch.randn(rows, 30, requires_grad=True), torch.randint(30, (rows,))
        loss = compiled(logits, target)
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        expected = torch.autograd.grad(loss_fn(logits, target), logits)
        torch.testing.assert_close(gradient, expected[0])


def test_compiled_report():
    torch._dynamo.reset()
    loss_fn = rd.GroupDROLoss(2)
    torch.compile(loss_fn, fullgraph=True)(torch.randn(4, 5), torch.arange(4), torch.tensor([0, 0, 0, 1]))
    assert [group.count for group in loss_fn.report().by_group.values()] == [3, 1]


def test_second_order_gradients_are_refused():
    logits = torch.randn(3, 5, requires_grad=True)
    loss = rd.functional.cross_entropy(logits, torch.arange(3))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_activation_checkpointing():
    """The recomputed forward would update q twice; so the loss belongs outside, and the model inside works."""
    from torch.utils.checkpoint import checkpoint

    layer = torch.nn.Linear(6, 9)
    hidden, labels, groups = torch.randn(5, 6), torch.arange(5), torch.arange(5) % 2
    loss_fn = rd.GroupDROLoss(2)
    loss_fn(checkpoint(layer, hidden, use_reentrant=False), labels, groups).backward()
    checkpointed = layer.weight.grad.clone()
    layer.zero_grad()
    rd.GroupDROLoss(2)(layer(hidden), labels, groups).backward()
    torch.testing.assert_close(checkpointed, layer.weight.grad)
