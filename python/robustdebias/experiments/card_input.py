"""What a bias card is made from: the summary of an experiment, checked, and what is looked up in it.

A summary is plain data (JSON). Its keys are the fields below; keys it has beside them are passed over.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from robustdebias.comparison import START

__all__ = ["Difference", "Estimate", "Metric", "Summary", "read"]

Verdict = Literal[
    "better", "slightly better", "no significant change", "slightly worse", "worse", "no interval"
]


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_known)]
"""What is not a finite number is absent."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Model(_Record):
    name: str
    type: str
    parameters: int
    head: str | None
    note: str | None


class Corpus(_Record):
    name: str
    source: str
    license: str | None
    texts: int | None = None
    words: int | None = None


class TextSet(_Record):
    name: str
    texts: int
    groups: list[str]


class Data(_Record):
    corpora: list[Corpus]
    train_texts: int
    train_words: int | None = None
    held_out_texts: int
    held_out_documents: int
    text_sets: list[TextSet]


class Grouping(_Record):
    description: str
    names: list[str]
    train_texts: dict[str, int]
    held_out_texts: dict[str, int]
    train_words: dict[str, int]
    folded: list[str]


class Method(_Record):
    label: str
    description: str
    settings: dict[str, Any]  # what differs between the methods


class Metric(_Record):
    label: str
    ideal: Literal["low", "high", "0", "50", "100"]
    part: str
    unit: str  # "nats", "%" or none
    digits: int
    headline: bool


class Score(_Record):
    grouping: str
    method: str  # "start": the model before fine-tuning
    seed: int | None = None
    metric: str
    value: float
    low: Number
    high: Number


class Difference(_Record):
    """``method`` minus ``base``: the mean over seeds with its interval, and each seed's."""

    grouping: str
    method: str
    base: str
    metric: str
    mean: float
    low: Number
    high: Number
    per_seed: list[Number]
    verdict: Verdict


class Step(_Record):
    step: int
    group_weight: dict[str, Number]


class Run(_Record):
    grouping: str
    method: str
    seed: int
    steps: int
    seconds: float
    tokens_per_second: Number
    history: list[Step]


class Estimate(NamedTuple):
    """A score's mean over seeds, and its interval where there is one."""

    value: float
    low: float | None
    high: float | None


class Summary(_Record):
    title: str
    description: str
    created: str
    config_text: str
    command: str = ""
    model: Model
    data: Data
    groupings: dict[str, Grouping]
    methods: dict[str, Method]  # the first is the baseline
    seeds: list[int]
    metrics: dict[str, Metric]
    scores: list[Score]  # of each seed
    means: list[Score] = []  # over seeds; where there are none, the scores are averaged here
    differences: list[Difference]
    training: list[Run]
    definitions: dict[str, str]  # by part
    warnings: list[str]
    caveats: list[str]
    interval_rule: str
    environment: dict[str, Any]

    @model_validator(mode="after")
    def _names_are_known(self) -> Summary:
        if not self.methods:
            raise ValueError("methods: there are none")
        with_start = {START, *self.methods}
        for key, allowed, rows in (
            ("grouping", set(self.groupings), [*self.scores, *self.means, *self.differences, *self.training]),
            ("method", with_start, [*self.scores, *self.means, *self.differences, *self.training]),
            ("base", with_start, self.differences),
            ("metric", set(self.metrics), [*self.scores, *self.means, *self.differences]),
        ):
            for row in rows:
                if (name := getattr(row, key)) not in allowed:
                    raise ValueError(f"{key}: {name!r} in {row!r} is none of {', '.join(sorted(allowed))}")
        return self

    @property
    def baseline(self) -> str:
        return next(iter(self.methods))

    def label(self, method: str) -> str:
        return "untouched model" if method == START else self.methods[method].label

    def measured(self, grouping: str) -> list[str]:
        """The start, if it was measured, and the methods that have scores, in the summary's order."""
        found = {score.method for score in self.scores if score.grouping == grouping}
        return [method for method in (START, *self.methods) if method in found]

    def parts(self) -> dict[str, list[str]]:
        """Part -> its metrics that have a score."""
        found = {score.metric for score in self.scores}
        parts: dict[str, list[str]] = {}
        for name, metric in self.metrics.items():
            if name in found:
                parts.setdefault(metric.part, []).append(name)
        return parts

    def by_seed(self, grouping: str, method: str, metric: str) -> dict[int | None, float]:
        """Seed -> value. That of the start has the seed None."""
        return {score.seed: score.value for score in self._scores.get((grouping, method, metric), [])}

    def estimate(self, grouping: str, method: str, metric: str) -> Estimate | None:
        """As the summary has it; else the mean over seeds, its interval ends the means of the seeds' ends.

        All seeds are measured on the same items, so that such an interval is at most wider than the mean's own over
        the items. It says nothing of other seeds.
        """
        key = grouping, method, metric
        if mean := self._means.get(key):
            return mean
        scores = self._scores.get(key)
        if not scores:
            return None
        low, high = (_mean([getattr(score, end) for score in scores]) for end in ("low", "high"))
        return Estimate(sum(score.value for score in scores) / len(scores), low, high)

    def difference(self, grouping: str, method: str, base: str, metric: str) -> Difference | None:
        return self._differences.get((grouping, method, base, metric))

    def runs(self, grouping: str, method: str) -> list[Run]:
        return [run for run in self.training if (run.grouping, run.method) == (grouping, method)]

    @cached_property
    def _scores(self) -> Mapping[tuple[str, str, str], list[Score]]:
        found = defaultdict(list)
        for score in self.scores:
            if math.isfinite(score.value):
                found[score.grouping, score.method, score.metric].append(score)
        return found

    @cached_property
    def _means(self) -> Mapping[tuple[str, str, str], Estimate]:
        return {
            (mean.grouping, mean.method, mean.metric): Estimate(mean.value, mean.low, mean.high)
            for mean in self.means
            if math.isfinite(mean.value)
        }

    @cached_property
    def _differences(self) -> Mapping[tuple[str, str, str, str], Difference]:
        return {
            (d.grouping, d.method, d.base, d.metric): d for d in self.differences if math.isfinite(d.mean)
        }


def read(summary: Mapping[str, Any]) -> Summary:
    """The summary, checked. Raises ValueError naming each key that is missing or has a value that it can't have."""
    try:
        return Summary.model_validate(summary)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}".removeprefix(": ")
            for problem in error.errors(include_url=False)
        ]
        raise ValueError("summary: " + "; ".join(problems)) from None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
