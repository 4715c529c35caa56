"""Nothing is timed before its loss, q and gradients were compared with float64.

The standard: an error of at most ``FACTOR`` times that of eager PyTorch in the same dtype on the same inputs, which
leaves room for another order of summation, plus an epsilon for what eager happens to hit exactly. We hold ourselves to
``EPSILON``: a few roundings of float32, one of 16 bits. Peers get ``PEER_EPSILON``: a float32 sum over a vocabulary of
30522, one term after the other, is off by about sqrt(V) 2^-24 = 2^-16.5, and that is no reason to leave them out.

Where products are rounded to 16 bits on the way to the loss, eager's own error of it is a single draw, at times
almost 0. Then the loss may be off by a 16-bit epsilon for a row, averaged over the rows, and q by what that makes of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import STEP_SIZE, Result

FACTOR = 2.0
EPSILON = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}
PEER_EPSILON = {torch.float32: 2**-16, torch.bfloat16: 2**-7, torch.float16: 2**-10}


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


def judge(
    result: Result,
    exact: Result,
    eager: dict[str, float],
    ours: bool,
    products: torch.dtype | None = None,
    rows: int = 1,
) -> Verdict:
    """``eager``: the errors of eager PyTorch on the same inputs and in the same dtype.

    ``products``: the 16-bit dtype that products of the forward are rounded to, None if there are none; ``rows``: how
    many labels the loss is a mean over.
    """
    epsilon = EPSILON if ours else PEER_EPSILON
    # Loss and q have to be as good as float32; where eager rounds its row losses to 16 bits, FACTOR allows it.
    extra = dict.fromkeys(("loss", "q"), epsilon[torch.float32])
    if products is not None:
        extra["loss"] += epsilon[products] / math.sqrt(rows)
        # A group's mean is over fewer rows than all; for a few groups, their number is enough for that.
        extra["q"] += STEP_SIZE * float(exact.loss) * extra["loss"] * (1 if exact.q is None else len(exact.q))
    measured = errors(result, exact)
    allowed = {
        name: FACTOR * eager[name] + extra.get(name, epsilon[products or result.gradients[0].dtype])
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
