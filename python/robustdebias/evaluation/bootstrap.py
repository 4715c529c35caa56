"""How sure is a score? The same evaluation on items drawn anew, with replacement (the bootstrap; Efron 1979).

Texts are drawn from the held-out texts, StereoSet's items within their target term, CrowS-Pairs' pairs within their
bias type. The draws come from a fixed seed and depend on the number of items alone, so two models that were
evaluated on the same items get the same draws: the difference of their draws is a paired comparison.

R draws, N items, K outcomes of an item.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from robustdebias import evaluation as registry  # the package: its modules need the Resampler below

__all__ = ["DRAWS", "FEWEST", "LEVEL", "Resampler", "draws", "interval", "values"]

DRAWS = 2000
FEWEST = 10
"""Of fewer items than this no draws are made: drawing the same few again and again looks surer than it is."""
LEVEL = 0.95
SEED = 0


def values(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Every score of an evaluation as ``PART.NAME``, those that are defined.

    NAME as the part's module says, for instance ``mlm.worst``, ``stereoset.overall.ss``, ``crows_pairs.religion``.
    """
    return {
        f"{part}.{name}": value
        for part, result in _results(evaluation)
        for name, value in registry.module_of(part).scores(result).items()
        if value is not None
    }


def draws(evaluation: Mapping[str, Any], count: int = DRAWS) -> dict[str, np.ndarray]:
    """``count`` draws [R] of each score that :func:`values` names, where its items' outcomes are at hand.

    Left out: scores of fewer than FEWEST items.
    """
    return {
        f"{part}.{name}": sample
        for part, result in _results(evaluation)
        for name, sample in registry.module_of(part).draws(result, Resampler(count)).items()
    }


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The central 95% of the draws. A draw that is not defined (no text of a group was drawn) is left out."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(samples, [tail, 100 - tail])
    return float(low), float(high)


class Resampler:
    """How often each item is drawn. The same calls in the same order draw the same."""

    BLOCK = 4_000_000  # weights held at a time

    def __init__(self, count: int = DRAWS):
        self._count = count
        self._generator = np.random.default_rng(SEED)

    @staticmethod
    def enough(items: float) -> bool:
        """Whether so many items are worth a draw."""
        return items >= FEWEST

    def apply(self, outcomes: np.ndarray) -> np.ndarray:
        """Sums of ``outcomes`` [N, K] over the items of each draw: float64 [R, K]."""
        items = len(outcomes)
        sums, chance = [], np.full(items, 1 / items)
        rows = max(1, self.BLOCK // items)
        for first in range(0, self._count, rows):
            drawn = self._generator.multinomial(items, chance, size=min(rows, self._count - first))
            sums.append(drawn.astype(float) @ outcomes)
        return np.concatenate(sums)


def _results(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Parts that hold something, in the order of the registry; further sets of texts behind the first."""
    order = {kind: place for place, kind in enumerate(registry.PARTS)}
    present = (part for part, result in evaluation.items() if result and part.partition(":")[0] in order)
    for part in sorted(present, key=lambda part: (order[part.partition(":")[0]], ":" in part)):
        yield part, evaluation[part]
