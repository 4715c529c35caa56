"""How a score is named and read, and what a metric's module offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from robustdebias.evaluation.bootstrap import Resampler

__all__ = ["IDEALS", "Metric", "Part"]

IDEALS = ("low", "high", "0", "50", "100")


@dataclass(frozen=True)
class Metric:
    """How a score is named and read.

    Args:
        name: as in :func:`robustdebias.evaluation.bootstrap.values`.
        ideal: one of IDEALS: "low" and "high" are as low and as high as can be; "0" and "50": the nearer the better.
        unit: "%", "nats", or "" for what has none.
        digits: behind the point, where people read it.
        headline: belongs to the few numbers that sum an evaluation up.

    Raises: ValueError for another ideal.
    """

    name: str
    label: str
    ideal: str
    unit: str = "%"
    digits: int = 1
    headline: bool = False

    def __post_init__(self) -> None:
        if self.ideal not in IDEALS:
            raise ValueError(f"ideal must be one of {IDEALS}, got {self.ideal!r} for {self.name}")

    @staticmethod
    def of(name: str) -> Metric:
        """Of a score's full name, as :func:`robustdebias.evaluation.metric_of`."""
        from robustdebias.evaluation import (
            metric_of,  # the registry knows the modules, and they know this file
        )

        return metric_of(name)

    @property
    def is_loss(self) -> bool:
        return self.ideal == "low"

    def badness(self, value: Any) -> Any:
        """Of a value or an array of them: the lower the better."""
        if self.ideal in ("0", "50"):
            return abs(value - float(self.ideal))
        return value if self.is_loss else -value


class Part(Protocol):
    """What the module of a metric offers. A result is the dictionary that its ``evaluate`` returns."""

    DEFINITION: str

    @property
    def evaluate(self) -> Any:
        """``evaluate(model, tokenizer, path, *, batch_size, progress)`` -> the scores with ``definition``, ``items``
        (the fingerprint of the data) and the outcome of every item. (``mlm`` has arguments of its own.)"""

    def scores(self, result: Mapping[str, Any]) -> dict[str, float | None]:
        """Every score by a dotted name, without the part's own; None: not defined."""

    def draws(self, result: Mapping[str, Any], weights: Resampler) -> dict[str, np.ndarray]:
        """Bootstrap draws [R] of the scores that have enough items; empty without the items' outcomes."""

    def metric(self, name: str) -> Metric:
        """How the score of this name, as ``scores`` has it, is read."""
