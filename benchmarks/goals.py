"""What was aimed at on a GPU, and what a result says of it: met, missed, or not measured. Standard library only.

A goal holds for its worst case. Ours is the fastest of our rows with Group DRO that overwrites nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.results import Row, Run, ratio

MEAN = (", plain mean", ", ERM")
FLOOR = "floor: three bare GEMMs"
HUGGING_FACE = "transformers, eager Group DRO"
COLUMNS = "{:<68} {:>9} {:>9}  {:<13} {}"


@dataclass(frozen=True)
class Goal:
    """``value`` of a case, None where it says nothing; ``most`` or ``least`` it may be."""

    text: str
    cases: str  # pattern of their names
    value: Callable[[Run, str], float | None]
    least: float | None = None
    most: float | None = None

    def holds(self, value: float) -> bool:
        return value >= self.least if self.least is not None else value <= self.most  # False for NaN

    def worst(self, values: dict[str, float]) -> tuple[str, float]:
        """A failed implementation of ours, NaN, is worse than any number."""
        sign = 1 if self.least is not None else -1
        return min(values.items(), key=lambda item: -math.inf if math.isnan(item[1]) else sign * item[1])


@dataclass(frozen=True)
class Outcome:
    goal: Goal
    verdict: str  # met, missed, not measured
    value: float | None = None
    case: str = ""  # where it is worst
    number: int = 0  # of cases


def check(runs: Sequence[Run]) -> list[Outcome]:
    return [_outcome(goal, runs) for goal in GOALS]


def lines(runs: Sequence[Run]) -> list[str]:
    """A table."""
    text = [COLUMNS.format("goal, in its worst case", "wanted", "measured", "", "where").rstrip()]
    for outcome in check(runs):
        goal = outcome.goal
        wanted = f">= {goal.least:g}" if goal.least is not None else f"<= {goal.most:g}"
        value = (
            "" if outcome.value is None else "FAILED" if math.isnan(outcome.value) else f"{outcome.value:.2f}"
        )
        where = f"{outcome.case} (of {outcome.number})" if outcome.case else ""
        text.append(COLUMNS.format(goal.text, wanted, value, outcome.verdict, where).rstrip())
    return text


def _outcome(goal: Goal, runs: Sequence[Run]) -> Outcome:
    values = {}
    for run in runs:
        for case in run.cases:
            if re.fullmatch(goal.cases, case) and (value := goal.value(run, case)) is not None:
                values[case] = value
    if not values:
        return Outcome(goal, "not measured")
    case, value = goal.worst(values)
    return Outcome(goal, "met" if goal.holds(value) else "missed", value, case, len(values))


def against(base: Callable[[Run, str], Row | None]) -> Callable[[Run, str], float | None]:
    """Time of ``base`` / ours: how much faster ours is."""

    def value(run: Run, case: str) -> float | None:
        other, ours = base(run, case), _ours(run, case)
        if ours is None or other is None:
            return _failed(run, case)
        return ratio(other, ours).median

    return value


def named(name: str) -> Callable[[Run, str], Row | None]:
    return lambda run, case: run.timed(case).get(name)


def fastest_peer(groups: bool) -> Callable[[Run, str], Row | None]:
    return lambda run, case: min(_rows(run, case, "peer", groups), key=lambda row: row.median, default=None)


def over_the_gemms(run: Run, case: str) -> float | None:
    floor, ours = named(FLOOR)(run, case), _ours(run, case)
    return _failed(run, case) if ours is None or floor is None else ratio(ours, floor).median


def head_memory(run: Run, case: str) -> float | None:
    other, ours = named(HUGGING_FACE)(run, case), _ours(run, case)
    if ours is None or other is None:
        return _failed(run, case)
    return other.peak_mib / ours.peak_mib if other.peak_mib and ours.peak_mib else None


def copy_share(run: Run, case: str) -> float | None:
    ours = _ours(run, case)
    return _failed(run, case) if ours is None else ours.nbytes / ours.median / 1e9 / run.rates["copy GB/s"]


def over_erm(run: Run, case: str) -> float | None:
    ours = _ours(run, case)
    if ours is None:
        return _failed(run, case)
    erm = run.timed(case).get(f"{ours.name}, ERM")
    return None if erm is None else ratio(ours, erm).median


def _ours(run: Run, case: str) -> Row | None:
    return min(_rows(run, case, "ours", groups=True), key=lambda row: row.median, default=None)


def _rows(run: Run, case: str, kind: str, groups: bool) -> Iterator[Row]:
    """Timed rows of a kind, with per-row weights or as a plain mean; none that overwrites its input."""
    for row in run.timed(case).values():
        if row.kind == kind and not row.in_place and row.name.endswith(MEAN) != groups:
            yield row


def _failed(run: Run, case: str) -> float | None:
    """NaN where ours is not timed because it failed."""
    ours = [row for row in run.cases[case].values() if row.kind == "ours"]
    return math.nan if any(row.failed for row in ours) and _ours(run, case) is None else None


STEP, HEAD = r"BERT-base .* training step", r"BERT-base .* head alone"
LINEAR = r"linear .* bf16.*, both"
LOGITS = r"logits N=(4096|16384|65536) V=\d+ bf16, both"
GOALS = (
    Goal("step: times faster than Transformers with eager Group DRO", STEP, against(named(HUGGING_FACE)), least=2),
    Goal("head: times less peak memory than Transformers'", HEAD, head_memory, least=4),
    Goal("linear op: time over three cuBLAS GEMMs", LINEAR, over_the_gemms, most=1.15),
    Goal("linear op: times faster than the best peer with row weights", LINEAR, against(fastest_peer(True)), least=1.3),
    Goal("logits op, N >= 4096: share of the copy's bandwidth", LOGITS, copy_share, least=0.92),
    Goal("logits op, N >= 4096: Group DRO's time over ERM's", LOGITS, over_erm, most=1.02),
    Goal("logits op, N >= 4096: times faster than a peer's plain mean", LOGITS, against(fastest_peer(False)), least=1),
)  # fmt: skip
