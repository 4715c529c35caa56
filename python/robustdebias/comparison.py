"""Which scores differ between the start and the runs, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from robustdebias.evaluation import bootstrap
from robustdebias.evaluation.metric import Metric

__all__ = [
    "RULE", "START", "VERDICTS", "Comparison", "Difference", "Metric", "compare", "objective", "run_label", "slight_below",
]  # fmt: skip

START = "start"
SMALL_LOSS, SMALL_SCORE, SMALL_EFFECT = 0.01, 1.0, 0.05
VERDICTS = ("better", "slightly better", "no clear difference", "slightly worse", "worse", "no interval")
RULE = (
    "A difference counts only if its 95% interval (paired bootstrap over the test items, "
    f"{bootstrap.DRAWS:,} draws, fixed seed) leaves out zero; otherwise it is called 'no clear difference'. Scores of "
    f"fewer than {bootstrap.FEWEST} test items (texts, pairs) get no interval and no verdict, and groups of "
    "fewer texts are neither worst nor best. A difference is called "
    f"slight if it is below {SMALL_LOSS:.0%} of a loss, below {SMALL_SCORE:g} point of a score in per cent, or below "
    f"{SMALL_EFFECT:g} of an effect size. Where 50 is ideal, the distance from 50 is judged; where 0 is, that from 0. "
    "The interval says how far the choice of test items could move the number. It says nothing of another training "
    "seed, and among many rows about one in twenty leaves out zero by chance."
)


@dataclass(frozen=True)
class Difference:
    """``other`` minus ``base``. ``low`` and ``high`` are None where the items' outcomes are not at hand."""

    base: str
    other: str
    metric: Metric
    value: float
    low: float | None
    high: float | None
    verdict: str  # one of VERDICTS


@dataclass(frozen=True)
class Comparison:
    """Scores of the start (where there is one) and of the runs, in that order, and their differences.

    Differences: every run against the start, and against the baseline, the first run that is trained with ERM (or
    else the first run). Runs that were evaluated on other items are not compared.
    """

    names: list[str]
    baseline: str | None
    values: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, tuple[float, float]]]
    differences: list[Difference]

    def metrics(self, prefix: str = "") -> list[Metric]:
        """Those that any run has, in a fixed order."""
        names = dict.fromkeys(name for values in self.values.values() for name in values)
        return [Metric.of(name) for name in names if name.startswith(prefix)]

    def difference(self, base: str | None, other: str, metric: str) -> Difference | None:
        found = (d for d in self.differences if (d.base, d.other, d.metric.name) == (base, other, metric))
        return next(found, None)


def compare(results: Mapping[str, Any]) -> Comparison:
    """Of ``results`` as :func:`robustdebias.report.write_report` takes them."""
    runs: dict[str, Any] = results["runs"]
    evaluations = {name: run.get("evaluation") or {} for name, run in runs.items()}
    start = (results.get("start") or {}).get("evaluation")
    if start:
        evaluations = {START: start, **evaluations}
    samples = {name: bootstrap.draws(evaluation) for name, evaluation in evaluations.items()}
    values = {name: bootstrap.values(evaluation) for name, evaluation in evaluations.items()}
    erm = [name for name, run in runs.items() if objective(run) == "erm"]
    baseline = next(iter([*erm, *runs]), None)
    pairs = [(START, run) for run in runs if start]
    pairs += [(baseline, run) for run in runs if baseline not in (None, run)]
    differences = [
        _difference(base, other, Metric.of(name), values, samples)
        for base, other in pairs
        for name in values[base]
        if name in values[other] and _same_items(evaluations[base], evaluations[other], name)
    ]
    intervals = {
        name: {metric: bootstrap.interval(sample) for metric, sample in own.items()}
        for name, own in samples.items()
    }
    return Comparison(list(evaluations), baseline, values, intervals, differences)


def run_label(name: str) -> str:
    """A run's name as people write it."""
    return {"erm": "ERM", "group_dro": "Group DRO"}.get(name, name)


def objective(run: Mapping[str, Any]) -> str | None:
    """The objective in a run's configuration, which may hold the training settings under ``train``."""
    config = run.get("config") or {}
    return config.get("objective", (config.get("train") or {}).get("objective"))


def _same_items(one: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> bool:
    part = metric.partition(".")[0]
    return one[part].get("items") == other[part].get("items")


def slight_below(metric: Metric, before: float) -> float:
    """A difference below this is called slight."""
    if metric.is_loss:
        return SMALL_LOSS * abs(before)
    if metric.unit == "%":
        return SMALL_SCORE
    # A share is a hundredth of its per cent.
    return SMALL_EFFECT if metric.ideal == "0" else SMALL_SCORE / 100


def _difference(
    base: str,
    other: str,
    metric: Metric,
    values: Mapping[str, Mapping[str, float]],
    samples: Mapping[str, Mapping[str, np.ndarray]],
) -> Difference:
    name = metric.name
    before, after = values[base][name], values[other][name]
    if name not in samples[base] or name not in samples[other]:
        return Difference(base, other, metric, after - before, None, None, "no interval")
    low, high = bootstrap.interval(samples[other][name] - samples[base][name])
    before_drawn, after_drawn = (metric.badness(samples[run][name]) for run in (base, other))
    worse_low, worse_high = bootstrap.interval(after_drawn - before_drawn)
    if not (worse_low > 0 or worse_high < 0):
        verdict = "no clear difference"
    else:
        size = abs(metric.badness(after) - metric.badness(before))
        slight = size < slight_below(metric, before)
        verdict = ("slightly " if slight else "") + ("worse" if worse_low > 0 else "better")
    return Difference(base, other, metric, after - before, low, high, verdict)
