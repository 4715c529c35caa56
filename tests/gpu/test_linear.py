"""The linear op at BERT's own shape on a GPU: exact with every way of keeping the rows, without waiting for the device."""

import pytest
import torch
import torch.nn.functional as F

import rd_kernels as rd
from tests.gpu.problems import STEP, exact, require_memory

pytestmark = pytest.mark.gpu

BERT, WIDTH, GROUPS = 30522, 768, 4
CAPACITIES = pytest.mark.parametrize("capacity", [None, 0.25, 64], ids=["all rows", "fits", "overflows"])


def make_problem(rows=700, dtype=torch.bfloat16, bias=True):
    """-> hidden, decoder, bias, labels (15%), groups"""
    hidden, decoder = torch.randn(rows, WIDTH, dtype=dtype), torch.randn(BERT, WIDTH, dtype=dtype) * 0.05
    labels = torch.randint(BERT, (rows,)).where(torch.rand(rows) < 0.15, -100)
    offset = torch.randn(BERT, dtype=dtype) if bias else None
    return hidden, decoder, offset, labels, torch.randint(-1, GROUPS, (rows,))


def make_loss(backend, **options):
    return rd.LinearGroupDROLoss(GROUPS, rd.GroupDRO(STEP), backend=backend, **options)


def step(loss_fn, hidden, decoder, bias, labels, groups):
    """-> loss, gradients of hidden, decoder and bias"""
    leaves = [t.detach().requires_grad_() for t in (hidden, decoder, bias) if t is not None]
    loss = loss_fn(leaves[0], leaves[1], labels, groups, leaves[2] if bias is not None else None)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def truth(hidden, decoder, bias, labels, groups, dtype):
    """-> the loss and the three gradients, the logits in ``dtype`` and all after them in float64"""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, decoder, bias)]
    logits = F.linear(*leaves)
    loss, gradient, _ = exact(logits, labels, groups, torch.full((GROUPS,), 1 / GROUPS))
    return loss, torch.autograd.grad(logits, leaves, gradient.to(dtype))


def relative(value, expected):
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@CAPACITIES
@pytest.mark.parametrize("fused", [False, True], ids=["products", "fused"])
def test_no_worse_than_a_16_bit_gradient_of_the_logits(backend, monkeypatch, capacity, fused):
    if fused and backend != "triton":
        pytest.skip("the fused product is Triton's")
    monkeypatch.setenv("RD_KERNELS_FUSED_LOGITS", str(int(fused)))
    problem = make_problem()
    loss, gradients = step(make_loss(backend, capacity=capacity), *problem)
    exact_loss, exact_gradients = truth(*problem, torch.float64)
    _, plain = truth(*problem, torch.bfloat16)
    assert float(loss) == pytest.approx(float(exact_loss), rel=2e-3)
    for value, expected, baseline in zip(gradients, exact_gradients, plain, strict=True):
        assert relative(value, expected) <= 1.05 * relative(baseline, expected) + 2**-10


@CAPACITIES
def test_no_wait_for_the_device(backend, capacity):
    """From the first statement to the end of the backward."""
    problem = make_problem()
    loss_fn = make_loss(backend, capacity=capacity).cuda()
    step(loss_fn, *problem)  # compiles, allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(loss_fn, *problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@CAPACITIES
def test_a_captured_step_follows_the_number_of_labels(backend, capacity):
    """Captured with 15% of the rows labelled, replayed with none, few and most of them: the eager bits each time."""
    problem = make_problem()
    loss_fn = make_loss(backend, capacity=capacity).cuda()
    with torch.cuda.stream(side := torch.cuda.Stream()):
        for _ in range(2):
            step(loss_fn, *problem)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        outputs = step(loss_fn, *problem)
    for share in (0.0, 0.05, 0.9):
        labels = torch.randint(BERT, problem[3].shape).where(torch.rand(problem[3].shape) < share, -100)
        problem[3].copy_(labels)
        loss_fn.group_weights.fill_(1 / GROUPS)
        graph.replay()
        torch.cuda.synchronize()
        found = (outputs[0].clone(), *(t.clone() for t in outputs[1]), loss_fn.group_weights.clone())
        loss_fn.group_weights.fill_(1 / GROUPS)
        loss, gradients = step(loss_fn, *problem)
        for a, b in zip(found, (loss, *gradients, loss_fn.group_weights), strict=True):
            assert torch.equal(a, b)


@CAPACITIES
def test_same_bits_twice(backend, capacity):
    problem = make_problem()
    runs = [step(make_loss(backend, capacity=capacity), *problem) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_more_than_two_to_the_31_logits_kept(backend):
    """U alone is 4.3 GB; row 2^31 / V stands where int32 would overflow."""
    rows = 70_500
    require_memory(12 << 30)
    hidden, decoder = (
        torch.randn(rows, 64, dtype=torch.bfloat16),
        torch.randn(BERT, 64, dtype=torch.bfloat16) * 0.1,
    )
    labels, groups = torch.randint(BERT, (rows,)), torch.zeros(rows, dtype=torch.int64)
    leaves = [t.requires_grad_() for t in (hidden, decoder)]
    q = torch.ones(1)
    loss = rd.functional.linear_group_dro_cross_entropy(
        *leaves, labels, groups, q, rd.ERM(), backend=backend, memory_budget=8 << 30
    )
    grad_hidden, _ = torch.autograd.grad(loss, leaves)
    picked = torch.tensor([0, 2**31 // BERT - 1, 2**31 // BERT, 2**31 // BERT + 1, rows - 1])
    h, w = hidden.detach()[picked].double(), decoder.detach().double()
    u = (h @ w.t()).softmax(1)
    u[torch.arange(len(picked)), labels[picked]] -= 1
    assert relative(grad_hidden[picked] * rows, u @ w) < 2**-7


def test_peak_memory_is_that_of_the_labelled_rows(backend):
    """With a place for a quarter of the rows the op needs less than half of the logits of all of them."""
    problem = make_problem(rows=8192)
    loss_fn = make_loss(backend, capacity=0.25).cuda()
    step(loss_fn, *problem)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss_fn, *problem)
    torch.cuda.synchronize()
    needed = torch.cuda.max_memory_allocated() - before
    gradients = 2 * (problem[0].numel() + BERT * WIDTH)
    assert needed < 0.25 * 8192 * 30528 * 2 + 3 * gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_and_pads_the_decoder_at_once(backend, dtype):
    hidden, decoder, bias, labels, groups = make_problem(dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (hidden, decoder, bias)]
    loss_fn = make_loss(backend, capacity=0.25).cuda()
    with torch.autocast("cuda", dtype):
        loss = loss_fn(hidden, decoder, labels, groups, bias)
    gradients = torch.autograd.grad(loss, leaves)
    assert loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    _, expected = truth(hidden, decoder, bias, labels, groups, torch.float64)
    assert all(relative(a, b) < 2**-5 for a, b in zip(gradients, expected, strict=True))
