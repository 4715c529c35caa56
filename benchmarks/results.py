"""The result file: what it holds, its ratios, and the comparison of two. Seconds are medians, one for each repeat."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass
class Row:
    """One implementation in one case."""

    name: str
    kind: str  # "ours", "peer" or "floor"
    in_place: bool = False
    seconds: list[float] = field(default_factory=list)  # by repeat; empty where it was rejected
    error: str = ""  # what the gate found
    peak_mib: float | None = None
    note: str = ""
    tokens: int | None = None  # of a step, where a step has tokens
    nbytes: int | None = None  # that an exact step reads and writes at least, where memory is what bounds it
    flops: int | None = None  # of the matrix products that an exact step needs
    rejected: str = ""  # why it was not timed
    failed: bool = False  # rejected by the gate or by its own error; otherwise it is missing here

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Ratio:
    """Of two rows' seconds: the median, the smallest and the largest over the repeats."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(row: Row, base: Row) -> Ratio:
    """Within each repeat, so that a drift of the machine cancels."""
    values = [own / other for own, other in zip(row.seconds, base.seconds, strict=False)]
    return Ratio(statistics.median(values), min(values), max(values))


@dataclass
class Run:
    """A whole run: ``cases[case][row name]``."""

    machine: dict[str, Any]
    rates: dict[str, float]
    cases: dict[str, dict[str, Row]] = field(default_factory=dict)

    def row(self, case: str, new: Row) -> Row:
        """The row with new's name; ``new`` itself if there is none yet."""
        return self.cases.setdefault(case, {}).setdefault(new.name, new)

    def timed(self, case: str) -> dict[str, Row]:
        return {name: row for name, row in self.cases.get(case, {}).items() if row.seconds}

    def base(self, case: str) -> Row | None:
        """What the others' ratios are taken to: ours, by its plain name if that is there."""
        ours = [row for row in self.timed(case).values() if row.kind == "ours"]
        return min(ours, key=lambda row: len(row.name), default=None)

    def floor(self, case: str, row: Row) -> Row | None:
        """The floor that is in place if the row is, else the first."""
        floors = [other for other in self.timed(case).values() if other.kind == "floor"]
        fitting = [floor for floor in floors if floor.in_place == row.in_place]
        return next(iter(fitting or floors), None)


def save(run: Run, path: Path) -> None:
    """Without the fields that are empty; one row a line."""
    blank = dataclasses.asdict(Row("", ""))
    cases = {
        case: [
            {key: value for key, value in dataclasses.asdict(row).items() if value != blank[key]}
            for row in rows.values()
        ]
        for case, rows in run.cases.items()
    }
    lines = ",\n".join(
        f"  {json.dumps(case)}: [\n" + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
        for case, rows in cases.items()
    )
    head = {"schema": SCHEMA, "machine": run.machine, "rates": run.rates}
    text = json.dumps(head, indent=1)[:-2] + ',\n "cases": {\n' + lines + "\n }\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def load(path: Path) -> Run:
    """ValueError for a file of another schema."""
    content = json.loads(path.read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} has schema {content.get('schema')}, this version reads {SCHEMA}; run it again"
        )
    cases = {case: {row["name"]: Row(**row) for row in rows} for case, rows in content["cases"].items()}
    return Run(content["machine"], content["rates"], cases)


@dataclass
class Change:
    """How one of our rows moved against everything else in its case; ``factor`` > 1: it became slower."""

    case: str
    name: str
    factor: float | None  # None: it was timed before and is not now
    reason: str = ""


def compare(baseline: Run, fresh: Run) -> Iterator[Change]:
    """Our rows in the cases of both runs.

    A row's factor is the median, over the peers and floors timed in both runs, of how its ratio to them changed. A
    machine twice as slow changes no ratio, and one peer that got faster does not move the median.
    """
    for case in baseline.cases:
        if case not in fresh.cases:
            continue
        before, now = baseline.timed(case), fresh.timed(case)
        others = [name for name in before if name in now and before[name].kind != "ours"]
        for name, row in before.items():
            if row.kind != "ours":
                continue
            if name not in now:
                gone = fresh.cases[case].get(name)
                yield Change(case, name, None, gone.rejected if gone else "not in the new run")
            elif others:
                factors = [
                    ratio(now[name], now[other]).median / ratio(row, before[other]).median for other in others
                ]
                yield Change(case, name, statistics.median(factors))
