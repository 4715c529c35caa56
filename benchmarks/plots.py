"""The plots of a run: one panel a case, and the distance from the floor over all cases."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt

from benchmarks import growth
from benchmarks.results import Run, ratio

COLOURS = {"ours": "tab:green", "peer": "tab:blue", "floor": "tab:grey"}


def write(run: Run, folder: Path) -> list[Path]:
    """-> the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _speed(run, folder / "speed.png"),
        _shapes(run, folder / "shapes.png"),
        *growth.plot(run, folder / "growth.png"),
    ]


def _speed(run: Run, path: Path) -> Path:
    """Bars: time relative to ours, with the range over the repeats, in every case with a peer."""
    of_growth = {case for points in growth.lines(run).values() for case in points.values()}
    cases = [
        case for case in run.cases if run.base(case) and len(run.timed(case)) > 1 and case not in of_growth
    ]
    columns = 2
    lines = max(1, math.ceil(len(cases) / columns))
    figure, axes = plt.subplots(lines, columns, figsize=(15, 3 * lines), squeeze=False, layout="constrained")
    for axis, case in zip(axes.flat, cases, strict=False):
        rows = sorted(run.timed(case).values(), key=lambda row: row.median, reverse=True)
        ratios = [ratio(row, run.base(case)) for row in rows]
        middle = [value.median for value in ratios]
        spread = [
            [value.median - value.low for value in ratios],
            [value.high - value.median for value in ratios],
        ]
        bars = axis.barh(
            [row.name for row in rows], middle, xerr=spread, color=[COLOURS[row.kind] for row in rows]
        )
        axis.bar_label(bars, [f"{value:.2f}" for value in middle], padding=4)
        axis.margins(x=0.12)
        axis.set_title(case)
        axis.set_xlabel(f"time / {run.base(case).name}")
    for axis in axes.flat[len(cases) :]:
        axis.remove()
    return _save(figure, path)


def _shapes(run: Run, path: Path) -> Path:
    """Times the floor, for ours and the slowest and fastest peer, one position a case."""
    cases = [case for case in run.cases if run.base(case) and run.floor(case, run.base(case))]
    figure, axis = plt.subplots(figsize=(10, 1.5 + 0.4 * len(cases)), layout="constrained")
    for kind, marker in (("ours", "o"), ("peer", "s")):
        points = [
            (ratio(row, run.floor(case, row)).median, position)
            for position, case in enumerate(cases)
            for row in run.timed(case).values()
            if row.kind == kind and "plain mean" not in row.name
        ]
        if points:
            axis.plot(*zip(*points, strict=True), marker, color=COLOURS[kind], alpha=0.7, label=kind)
    axis.axvline(1, color=COLOURS["floor"], label="floor")
    axis.set_yticks(range(len(cases)), cases)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("time / floor of the same run")
    axis.legend()
    return _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
