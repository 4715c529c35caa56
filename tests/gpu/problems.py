"""What the GPU tests share: seeded batches, one step of the op, and float64 truth by formula. Torch's default device
is the GPU here (fixture `backend`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rd_kernels as rd

STEP = 0.3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the gradient, relative to its largest element: a few roundings of float32, one of 16 bits and what float32 adds.
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 1.1 * 2**-8, torch.float16: 1.1 * 2**-11}


def make_batch(rows: int, vocabulary: int, dtype: torch.dtype, num_groups: int = 4, mask: bool = False):
    """-> logits [N, V], labels [N] with a few ignored, groups (ids [N], or a mask [N, G])"""
    logits = torch.randn(rows, vocabulary, dtype=dtype) * 3
    labels = torch.randint(vocabulary, (rows,))
    labels[1::7] = -100
    groups = torch.rand(rows, num_groups) < 0.4 if mask else torch.randint(-1, num_groups, (rows,))
    return logits, labels, groups


def make_loss(backend: str, num_groups: int = 4, **options) -> rd.GroupDROLoss:
    return rd.GroupDROLoss(num_groups, rd.GroupDRO(STEP), backend=backend, **options)


def step(loss_fn, logits: Tensor, labels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward -> loss, gradient of ``logits``, which must require it."""
    loss = loss_fn(logits, labels, groups)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


def require_memory(needed: int) -> None:
    """Skip if fewer bytes than that are free on the GPU."""
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")


def exact(logits: Tensor, labels: Tensor, groups: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss, gradient, new q in float64: one Group DRO step by formula."""
    z, q = logits.detach().double(), q.double()
    counted = labels != -100
    y = labels.where(counted, 0)
    member = groups if groups.dtype == torch.bool else groups[:, None] == torch.arange(q.numel())
    member = (member & counted[:, None]).double()
    losses = torch.where(counted, z.logsumexp(1) - z.gather(1, y[:, None])[:, 0], 0)
    counts = member.sum(0)
    means = (member.t() @ losses) / counts.clamp(min=1)
    new_q = q * torch.where(counts > 0, (STEP * means).exp(), 1)
    new_q = new_q / new_q.sum()
    scale = member @ torch.where(counts > 0, new_q / counts.clamp(min=1), 0)
    gradient = z.softmax(1)
    gradient[torch.arange(len(y)), y] -= 1
    return (new_q * means).sum(), gradient * scale[:, None], new_q


def assert_exact(loss, gradient, q, truth) -> None:
    """Within the rounding of the gradient's dtype, and of float32 for loss and q."""
    exact_loss, exact_gradient, exact_q = truth
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(q.double(), exact_q, rtol=4e-6, atol=1e-7)
    error = (gradient.double() - exact_gradient).abs().max()
    # float16: a gradient of a mean over many rows is subnormal there.
    smallest = torch.finfo(gradient.dtype).smallest_normal * torch.finfo(gradient.dtype).eps
    assert error <= ROUNDING[gradient.dtype] * exact_gradient.abs().max() + smallest


def assert_same_bits(found, expected) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
