"""From the evaluations of many runs to scores, differences and what may be said of them.

Two things move a difference between methods: which test items were chosen, and the training seed (data order, masks,
dropout). Both go into its interval. S seeds, R bootstrap draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from robustdebias.comparison import SMALL_EFFECT, SMALL_LOSS, SMALL_SCORE, slight_below
from robustdebias.evaluation import bootstrap
from robustdebias.evaluation.metric import Metric

__all__ = [
    "NO_CHANGE",
    "RULE",
    "START",
    "Difference",
    "Measured",
    "Score",
    "compare",
    "mean_scores",
    "measured",
]

START = "start"
NO_CHANGE = "no significant change"
RULE = (
    "The value of a method is the mean over seeds. The 95% interval of a value or difference joins two parts: the "
    f"spread over the test items (bootstrap, {bootstrap.DRAWS:,} draws; paired, as all models see the same items), and the "
    "spread over the training seeds (Student's t on the seeds' values; none with a single seed). The two half-widths are "
    "joined as the root of the sum of their squares. A difference is called better or worse only if this interval, of the "
    "distance from the ideal where the ideal is 0 or 50, leaves out zero, and slight if it is below "
    f"{SMALL_LOSS:.0%} of a loss or perplexity, {SMALL_SCORE:g} point of a score in per cent or {SMALL_EFFECT:g} of an effect "
    f"size; else there is {NO_CHANGE}. Scores of fewer than "
    f"{bootstrap.FEWEST} test items get no interval and no verdict, and groups of fewer texts are neither worst nor best. Among many rows about one in twenty leaves out zero by "
    "chance: rows were not corrected for their number."
)


@dataclass(frozen=True)
class Measured:
    """One model's scores, their draws over the test items, and which items these were."""

    values: dict[str, float]
    draws: dict[str, np.ndarray]  # [R] each, for those that have enough items
    items: dict[str, str]  # of each part


def measured(evaluation: Mapping[str, Any]) -> Measured:
    """Of an evaluation as :class:`robustdebias.suite.Suite` gives it."""
    items = {part: result.get("items", "") for part, result in evaluation.items()}
    return Measured(bootstrap.values(evaluation), bootstrap.draws(evaluation), items)


@dataclass(frozen=True)
class Score:
    """A row of the tidy table. ``seed`` is None for the start; of a mean, ``seeds`` is how many it is of."""

    grouping: str
    method: str
    metric: str
    value: float
    low: float | None
    high: float | None
    seed: int | None = None
    seeds: int = 1


@dataclass(frozen=True)
class Difference:
    """``method`` minus ``base``, mean over seeds. Without enough test items ``low`` and ``high`` are None."""

    grouping: str
    method: str
    base: str
    metric: str
    mean: float
    low: float | None
    high: float | None
    per_seed: list[float]
    verdict: str

    def record(self) -> dict[str, Any]:
        return asdict(self)


def mean_scores(grouping: str, method: str, runs: Sequence[Measured]) -> list[Score]:
    """Mean over the runs of a method [S] of every score that all of them have."""
    scores = []
    for metric in _common(runs):
        values = np.array([run.values[metric] for run in runs])
        low, high = _interval(values, [run.draws.get(metric) for run in runs])
        scores.append(Score(grouping, method, metric, float(values.mean()), low, high, None, len(runs)))
    return scores


def compare(
    grouping: str, method: str, runs: Sequence[Measured], base: str, base_runs: Sequence[Measured]
) -> list[Difference]:
    """Every score that both have on the same test items.

    Args: base_runs: those of the same seeds [S], or one model, the start, for all of them.
    """
    pairs = list(
        zip(runs, base_runs if len(base_runs) == len(runs) else list(base_runs) * len(runs), strict=True)
    )
    found = []
    for name in _common([*runs, *base_runs]):
        part = name.partition(".")[0]
        if any(run.items.get(part) != other.items.get(part) for run, other in pairs):
            continue
        metric = Metric.of(name)
        changes = np.array([run.values[name] - other.values[name] for run, other in pairs])
        draws = [_minus(run.draws.get(name), other.draws.get(name)) for run, other in pairs]
        low, high = _interval(changes, draws)
        if low is None:
            verdict = "no interval"
        else:
            worse = np.array(
                [
                    metric.badness(run.values[name]) - metric.badness(other.values[name])
                    for run, other in pairs
                ]
            )
            worse_draws = [
                metric.badness(run.draws[name]) - metric.badness(other.draws[name]) for run, other in pairs
            ]
            before = float(np.mean([other.values[name] for _, other in pairs]))
            verdict = _verdict(metric, float(worse.mean()), _interval(worse, worse_draws), before)
        found.append(
            Difference(
                grouping, method, base, name, float(changes.mean()), low, high, changes.tolist(), verdict
            )
        )
    return found


def _common(runs: Sequence[Measured]) -> list[str]:
    return [name for name in runs[0].values if all(name in run.values for run in runs)]


def _minus(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    return None if one is None or other is None else one - other


def _interval(
    values: np.ndarray, draws: Sequence[np.ndarray | None]
) -> tuple[float, float] | tuple[None, None]:
    """Of the mean of ``values`` [S], whose draws over the test items are ``draws`` [S][R]."""
    if any(sample is None for sample in draws):
        return None, None
    mean = float(values.mean())
    low, high = bootstrap.interval(np.mean(draws, axis=0))  # type: ignore[arg-type]
    by_seed = 0.0
    if len(values) > 1:
        tail = (1 + bootstrap.LEVEL) / 2
        by_seed = float(stats.t.ppf(tail, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    # The draws' own middle may lie beside the value, where the score is an extreme (the worst group).
    below, above = max(mean - low, 0.0), max(high - mean, 0.0)
    return mean - math.hypot(below, by_seed), mean + math.hypot(above, by_seed)


def _verdict(
    metric: Metric, worse: float, interval: tuple[float, float] | tuple[None, None], before: float
) -> str:
    low, high = interval
    if low is None or high is None or low <= 0 <= high:
        return NO_CHANGE
    slight = abs(worse) < slight_below(metric, before)
    return ("slightly " if slight else "") + ("worse" if worse > 0 else "better")
