"""Forward and backward with Group DRO on logits: this op beside what people write in eager PyTorch.

`make bench` runs it. Read the ratio between rows of one run; absolute times belong to the machine.
"""

import pytest
import torch

import rd_kernels as rd
from tests.oracles import eager_group_dro

ROWS, VOCABULARY, GROUPS = 1024, 30522, 8


def fused(logits, labels, ids, backend):
    q = torch.full((GROUPS,), 1 / GROUPS)
    loss = rd.functional.group_dro_cross_entropy(logits, labels, ids, q, rd.GroupDRO(0.01), backend=backend)
    return torch.autograd.grad(loss, logits)


def eager(logits, labels, ids, _):
    member = ids[:, None] == torch.arange(GROUPS)
    loss, _ = eager_group_dro(logits, labels, member, torch.full((GROUPS,), 1 / GROUPS), 0.01)
    return torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("run", "backend"), [(fused, "cpu"), (fused, "reference"), (eager, "")], ids=["cpu", "reference", "eager"]
)
def test_forward_backward(benchmark, run, backend, dtype):
    logits = torch.randn(ROWS, VOCABULARY).to(dtype).requires_grad_()
    labels, ids = torch.randint(VOCABULARY, (ROWS,)), torch.arange(ROWS) % GROUPS
    # No timing without a correctness gate: the gradient against float64 on the same batch.
    (gradient,) = run(logits, labels, ids, backend)
    exact = logits.detach().double().requires_grad_()
    (expected,) = eager(exact, labels, ids, "")
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype] * expected.abs().max()
    assert (gradient - expected).abs().max() <= allowed
    benchmark.group = f"N={ROWS} V={VOCABULARY} {dtype}"
    benchmark.pedantic(run, (logits, labels, ids, backend), rounds=7, warmup_rounds=2)
