"""Nothing is timed before its loss and gradients were compared with float64.

The standard: an error of at most ``FACTOR`` times that of eager PyTorch in the same dtype on the same inputs, plus
``EPSILON``. The factor leaves room for another order of summation; the epsilon for results that eager happens to hit
exactly: a few roundings in float32, and one rounding of a gradient in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Result

FACTOR = 2.0
EPSILON = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclass(frozen=True)
class Verdict:
    """``worst`` is the measure closest to, or furthest over, its allowance."""

    passed: bool
    worst: str
    error: float  # relative
    allowed: float

    def __str__(self) -> str:
        relation = "<=" if self.passed else ">"
        return f"{self.worst}: error {self.error:.1e} {relation} {self.allowed:.1e}"


def errors(result: Result, exact: Result) -> dict[str, float]:
    """Relative errors by name. NaN, a wrong shape or a missing q count as infinite.

    A gradient is measured twice: its largest error over its largest element, and the sum of its errors over the sum
    of its elements. The largest elements belong to the labels; only the second sees what happens to the probabilities
    of a large vocabulary.
    """
    measured = {"loss": _largest(result.loss, exact.loss)}
    if exact.q is not None:
        measured["q"] = float("inf") if result.q is None else _largest(result.q, exact.q)
    for index, expected in enumerate(exact.gradients):
        got = result.gradients[index]
        measured[f"gradient {index}, largest"] = _largest(got, expected)
        measured[f"gradient {index}, sum"] = _total(got, expected)
    return measured


def judge(result: Result, exact: Result, eager: dict[str, float]) -> Verdict:
    """``eager``: the errors of eager PyTorch on the same inputs and in the same dtype."""
    epsilon = max(EPSILON[gradient.dtype] for gradient in result.gradients)
    measured = errors(result, exact)
    # Loss and q are float32 in every sound implementation that has float32 accumulation; eager's bfloat16 row losses
    # widen the first term for themselves.
    allowed = {
        name: FACTOR * eager[name] + (epsilon if "gradient" in name else EPSILON[torch.float32])
        for name in measured
    }
    worst = max(measured, key=lambda name: measured[name] / allowed[name])
    return Verdict(measured[worst] <= allowed[worst], worst, measured[worst], allowed[worst])


def _largest(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return _finite((got.double() - expected).abs().max() / expected.abs().max())


def _total(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return _finite((got.double() - expected).abs().sum() / expected.abs().sum())


def _finite(error: Tensor) -> float:
    return float(torch.nan_to_num(error, nan=float("inf")))
