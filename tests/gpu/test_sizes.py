"""Shapes and layouts that only a GPU makes feasible: more than 2^31 elements, every alignment, peak memory."""

import pytest
import torch

import rd_kernels as rd
from benchmarks.peers import Produced
from tests.gpu.problems import (
    DTYPES,
    ROUNDING,
    assert_exact,
    exact,
    make_batch,
    make_loss,
    require_memory,
    step,
)

pytestmark = pytest.mark.gpu

BERT, GEMMA = 30522, 262144


@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "fresh"])
def test_more_than_two_to_the_31_elements(backend, inplace):
    rows = 70_500
    size = 2 * rows * BERT
    require_memory(size * (1 if inplace else 2) + (3 << 30))
    logits = torch.empty(rows, BERT, dtype=torch.bfloat16).normal_().requires_grad_()
    labels = torch.randint(BERT, (rows,))
    crossing = 2**31 // BERT  # this row holds element 2^31
    picked = torch.tensor([0, 1, crossing - 1, crossing, crossing + 1, rows - 2, rows - 1])
    exact_z = logits.detach()[picked].double()
    exact_loss = torch.stack(
        [
            torch.nn.functional.cross_entropy(z.float(), y, reduction="none").double().sum()
            for z, y in zip(logits.detach().split(4096), labels.split(4096), strict=True)
        ]
    ).sum()
    loss_fn = rd.GroupDROLoss(1, rd.ERM(), backend=backend, inplace_backward=inplace)
    z = Produced.apply(logits) if inplace else logits
    loss = loss_fn(z, labels, torch.zeros(rows, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient.data_ptr() == logits.data_ptr()) == inplace
    assert loss.item() == pytest.approx(exact_loss.item() / rows, rel=1e-5)
    expected = exact_z.softmax(1)
    expected[torch.arange(len(picked)), labels[picked]] -= 1
    error = (gradient[picked].double() * rows - expected).abs().amax(1)
    assert (error <= ROUNDING[torch.bfloat16]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [50257, 128256, GEMMA])
def test_vocabularies_of_real_models(backend, dtype, vocabulary):
    logits, labels, groups = make_batch(9, vocabulary, dtype)
    labels[0], labels[2] = 0, vocabulary - 1
    loss_fn = make_loss(backend)
    truth = exact(logits, labels, groups, loss_fn.group_weights)
    loss, gradient = step(loss_fn, logits.requires_grad_(), labels, groups)
    assert_exact(loss, gradient, loss_fn.group_weights, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 1000, 4097, BERT])
@pytest.mark.parametrize("padding", [0, 1, 6, 8], ids=lambda padding: f"padding {padding}")
def test_every_alignment(backend, dtype, vocabulary, padding):
    """Rows that start at any element of 16 bytes and lie any distance apart; the first row may be left out."""
    rows = 6
    for first_column in range(8):
        for first_row in (0, 1):
            memory = torch.randn(first_row + rows, first_column + vocabulary + padding, dtype=dtype)
            logits = memory[first_row:, first_column : first_column + vocabulary]
            labels, groups = torch.randint(vocabulary, (rows,)), torch.arange(rows) % 4
            loss_fn = make_loss(backend)
            truth = exact(logits, labels, groups, loss_fn.group_weights)
            loss, gradient = step(loss_fn, logits.detach().requires_grad_(), labels, groups)
            assert_exact(loss, gradient, loss_fn.group_weights, truth)

            before, leaf = memory.clone(), logits.detach().requires_grad_()
            loss = make_loss(backend, inplace_backward=True)(Produced.apply(leaf), labels, groups)
            assert torch.equal(torch.autograd.grad(loss, leaf)[0], gradient)
            assert torch.equal(logits, gradient)  # in place
            logits.copy_(before[first_row:, first_column : first_column + vocabulary])
            assert torch.equal(memory, before)  # and nothing beside it was written


@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "fresh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory(backend, dtype, inplace):
    """Beside the logits: their gradient, unless it is in place, and what grows with the rows only."""
    rows = 4096
    logits, labels, groups = make_batch(rows, BERT, dtype)
    logits.requires_grad_()
    loss_fn = make_loss(backend, inplace_backward=inplace)

    def run():
        loss = loss_fn(Produced.apply(logits) if inplace else logits, labels, groups)
        return torch.autograd.grad(loss, logits)

    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    blocks = 4 << 20  # what torch's allocator rounds up
    assert peak <= (0 if inplace else logits.nbytes) + 64 * rows + blocks
