"""What the tests of the GPU kernels share: inputs, and float64 truth from torch's own cross_entropy."""

import torch
import torch.nn.functional as F

IGNORE = -100
MISS, HIT, IGNORED, BAD_LABEL = 0, 1, 2, 3
HUGE = 2**40  # a label or id beyond int32
# The interpreter computes with numpy, which warns where a GPU silently makes the inf or NaN that is wanted.
QUIET = "ignore::RuntimeWarning:triton.*"


def make(rows, vocabulary, dtype, scale=3.0):
    logits = (torch.randn(rows, vocabulary) * scale).to(dtype)
    return logits, torch.randint(vocabulary, (rows,))


def cross_entropy(logits, labels, dtype, weight=None, smoothing=0.0):
    weight = None if weight is None else weight.to(dtype)
    return F.cross_entropy(
        logits.to(dtype), labels, weight=weight, label_smoothing=smoothing, reduction="none"
    )


def gradient(logits, labels, factor, dtype, weight=None, smoothing=0.0):
    """d sum(factor * loss) / d logits, computed in ``dtype`` and rounded to the logits' unless float64."""
    leaf = (logits.double() if dtype == torch.float64 else logits).detach().requires_grad_()
    loss = cross_entropy(leaf, labels, dtype, weight, smoothing)
    (factor.to(dtype) * loss).sum().backward()
    return leaf.grad
