"""``inplace_backward``: the same gradient in the logits' own memory, and nothing overwritten silently."""

from __future__ import annotations

import pytest
import torch

import rd_kernels as rd

ROWS, VOCABULARY, GROUPS = 6, 300, 3


@pytest.fixture
def batch():  # a test that uses `backend` names it first: then this runs on its device
    hidden = torch.randn(ROWS, 8, requires_grad=True)
    weight = torch.randn(VOCABULARY, 8, requires_grad=True)
    labels = torch.randint(VOCABULARY, (ROWS,))
    return hidden, weight, labels, torch.arange(ROWS) % GROUPS


def gradients(batch, inplace_backward, backend, loss_of=None):
    hidden, weight, labels, groups = batch
    logits = hidden @ weight.t()
    if loss_of is None:
        loss_fn = rd.GroupDROLoss(GROUPS, backend=backend, inplace_backward=inplace_backward)
        loss = loss_fn(logits, labels, groups)
    else:
        loss = loss_of(logits, labels)
    return torch.autograd.grad(2 * loss, (hidden, weight)), logits


def test_same_gradients_in_the_logits_memory(backend, batch):
    expected, untouched = gradients(batch, False, backend)
    found, overwritten = gradients(batch, True, backend)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not torch.equal(untouched, overwritten)
    torch.testing.assert_close(overwritten.sum(1), torch.zeros(ROWS), atol=1e-6, rtol=0)  # a softmax gradient


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy(batch, reduction):
    def loss_of(inplace_backward):
        return rd.CrossEntropyLoss(
            reduction=reduction, label_smoothing=0.1, inplace_backward=inplace_backward
        )

    expected, _ = gradients(batch, None, None, loss_of(False))
    found, _ = gradients(batch, None, None, loss_of(True))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_autograd_refuses_to_read_overwritten_logits(batch):
    hidden, weight, labels, groups = batch
    logits = hidden @ weight.t()
    loss = rd.GroupDROLoss(GROUPS, inplace_backward=True)(logits, labels, groups)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = hidden @ weight.t()
    other = logits.square().sum()  # saves the logits, and its backward runs after the loss's
    loss = rd.GroupDROLoss(GROUPS, inplace_backward=True)(logits, labels, groups)
    loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("reshape", [lambda z: z, lambda z: z.reshape(2, 3, VOCABULARY)])
def test_a_leaf_is_refused(reshape):
    logits = torch.randn(ROWS, VOCABULARY, requires_grad=True)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    before = logits.detach().clone()
    loss_fn = rd.GroupDROLoss(GROUPS, inplace_backward=True)
    z = reshape(logits)
    labels_of_z = labels.reshape(z.shape[:-1])
    with pytest.raises(ValueError, match=r"inplace_backward .* logits, which is a leaf"):
        loss_fn(z, labels_of_z, labels_of_z)
    with pytest.raises(ValueError, match=r"inplace_backward .* input, which is a leaf"):
        rd.functional.cross_entropy(logits, labels, inplace_backward=True)
    assert torch.equal(logits, before)


def test_rows_that_share_memory_are_refused():
    row = torch.randn(1, VOCABULARY, requires_grad=True) * 1
    labels = torch.zeros(ROWS, dtype=torch.int64)
    with pytest.raises(ValueError, match="rows do not share memory"):
        rd.functional.cross_entropy(row.expand(ROWS, VOCABULARY), labels, inplace_backward=True)


def test_under_compile_the_gradient_is_allocated(batch):
    hidden, weight, labels, groups = batch

    def step(hidden, weight):
        q = torch.full((GROUPS,), 1 / GROUPS)
        return rd.functional.group_dro_cross_entropy(
            hidden @ weight.t(), labels, groups, q, inplace_backward=True
        )

    expected, _ = gradients(batch, False, "auto")
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, weight)
    found = torch.autograd.grad(2 * loss, (hidden, weight))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)
