"""A bias card's pictures, in the style of the report's (``robustdebias.plots``)."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import mean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robustdebias.comparison import START
from robustdebias.experiments.card_input import Estimate, Metric, Run, Summary
from robustdebias.experiments.card_text import IDEALS, part_title
from robustdebias.plots import (
    FAINT,
    GROUP_COLOURS,
    GROUP_DASHES,
    INK,
    RUN_COLOURS,
    RUN_MARKERS,
    START_COLOUR,
    STYLE,
    name_lines,
)

__all__ = ["Picture", "draw_all"]

WIDTH = 9.0  # inches, of every picture, so that their letters are of one size on a page
GROUP = "mlm.group."
MOST_ROWS = 12  # of a panel of bias scores
_MEASURES = {"%": "per cent", "": "score"}


@dataclass(frozen=True)
class Picture:
    stem: str
    figure: Figure
    caption: str
    alt: str

    @property
    def width(self) -> int:
        """In CSS pixels."""
        return round(96 * self.figure.get_figwidth())

    @property
    def height(self) -> int:
        return round(96 * self.figure.get_figheight())


def draw_all(summary: Summary) -> list[Picture]:
    """Of each grouping, those that there is something to show in."""
    pictures = []
    for grouping, suffix in _suffixes(summary.groupings).items():
        with matplotlib.rc_context(STYLE):
            for name, draw, caption in _PICTURES:
                figure = draw(summary, grouping)
                if figure is not None:
                    of = f" Groups: {grouping}." if suffix else ""
                    methods = ", ".join(map(summary.label, summary.measured(grouping)))
                    alt = f"{caption.partition('.')[0]} ({methods}).{of} The tables have the numbers."
                    pictures.append(Picture(name + suffix, figure, caption + of, alt))
    return pictures


def differences(summary: Summary, grouping: str) -> Figure | None:
    """Each method minus the baseline: a panel for each unit, a row for each headline metric."""
    panels: dict[str, list[str]] = {}
    methods = [method for method in summary.measured(grouping) if method not in (START, summary.baseline)]
    for name, metric in summary.metrics.items():
        if metric.headline and any(
            summary.difference(grouping, method, summary.baseline, name) for method in methods
        ):
            # What has no unit has a scale of its own.
            panels.setdefault(metric.unit or metric.part, []).append(name)
    if not panels:
        return None
    figure, grid = _stacked([len(rows) for rows in panels.values()], len(methods))
    for axes, (unit, rows) in zip(grid, panels.items(), strict=True):
        axes.axvline(0, color=INK, linewidth=1.2)
        for method, offset, colour, marker in _offsets(summary, methods):
            for row, name in enumerate(rows):
                if found := summary.difference(grouping, method, summary.baseline, name):
                    clear = found.verdict not in ("no significant change", "no interval")
                    estimate = Estimate(found.mean, found.low, found.high)
                    _dot(axes, estimate, row + offset, colour, marker, hollow=not clear)
        _row_labels(axes, [_described(summary.metrics[name]) for name in rows])
        axes.margins(x=0.08)
        axes.set_xlabel({"%": "change in points", "nats": "change in nats"}.get(unit, "change"))
    grid[0].set_title(f"Change against {summary.label(summary.baseline)}")
    _legend(figure, summary, methods, "hollow: no significant change, or no interval")
    return figure


def group_loss(summary: Summary, grouping: str) -> Figure | None:
    """Held-out loss of all tokens and of each group, by falling loss under the baseline."""
    methods = summary.measured(grouping)
    rows = [name for name in summary.metrics if name.startswith(GROUP)]
    rows = [name for name in rows if any(summary.estimate(grouping, m, name) for m in methods)]
    if not rows:
        return None

    def baseline_loss(name: str) -> float:
        found = summary.estimate(grouping, summary.baseline, name)
        return found.value if found else -math.inf

    rows.sort(key=baseline_loss, reverse=True)
    labels = [name.removeprefix(GROUP) for name in rows]
    if "mlm.overall" in summary.metrics:
        rows, labels = ["mlm.overall", *rows], ["all tokens", *labels]
    # The start is far worse at the text than any method; its scale would squeeze the rest. It has a panel of its own.
    columns = [[m for m in methods if m != START], [m for m in methods if m == START]]
    columns = [column for column in columns if column]
    figure = Figure(figsize=(WIDTH, _height(len(rows), len(methods))), layout="constrained")
    grid = figure.subplots(1, len(columns), squeeze=False, sharey=True, width_ratios=[3, 1][: len(columns)])[
        0
    ]
    for axes, column in zip(grid, columns, strict=True):
        _scores(axes, summary, grouping, column, rows)
    _row_labels(grid[0], labels)
    grid[0].set_xlabel("nats, lower is better")
    grid[0].set_title("Held-out loss by group")
    for axes in grid[1:]:
        axes.set_title("Before")
        axes.set_xlabel("nats")
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
    if rows[0] == "mlm.overall":
        for axes in grid:
            axes.axhline(0.5, color=FAINT, linewidth=0.8)
    _legend(figure, summary, methods)
    return figure


def bias(summary: Summary, grouping: str) -> Figure | None:
    """Scores that measure bias, which are to be near 50 or 0: a panel for each part, with the ideal as a line."""
    methods = summary.measured(grouping)
    panels: dict[tuple[str, str], list[str]] = {}
    for names in summary.parts().values():
        for name in names:
            metric = summary.metrics[name]
            if metric.ideal in ("0", "50") and any(summary.estimate(grouping, m, name) for m in methods):
                panels.setdefault((metric.part, metric.ideal), []).append(name)
    if not panels:
        return None
    shown = {key: _chosen(summary, names) for key, names in panels.items()}
    figure, grid = _stacked([len(rows) for rows in shown.values()], len(methods))
    for axes, ((part, ideal), rows) in zip(grid, shown.items(), strict=True):
        axes.axvline(float(ideal), color=INK, linewidth=1.2)
        _scores(axes, summary, grouping, methods, rows)
        _row_labels(axes, [_wrapped(summary.metrics[name].label) for name in rows])
        left_out = len(panels[part, ideal]) - len(rows)
        axes.set_title(part_title(part) + (f" ({left_out} more in the tables)" if left_out else ""))
        measure = _MEASURES.get(summary.metrics[rows[0]].unit, summary.metrics[rows[0]].unit)
        axes.set_xlabel(f"{measure}; the line at {ideal} is ideal")
    _legend(figure, summary, methods)
    return figure


def trade_off(summary: Summary, grouping: str) -> Figure | None:
    """What a lower distance from no bias costs: change of the overall loss against that distance."""
    bias_metric = _main_bias(summary)
    methods = [method for method in summary.measured(grouping) if method != START]
    base = summary.baseline
    if bias_metric is None or "mlm.overall" not in summary.metrics or len(methods) < 2:
        return None
    metric = summary.metrics[bias_metric]

    def distance(value: float) -> float:
        return abs(value - float(metric.ideal))

    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    axes = figure.subplots()
    base_loss = summary.by_seed(grouping, base, "mlm.overall")
    drawn = []
    for method, _, colour, marker in _offsets(summary, methods):
        loss = summary.by_seed(grouping, method, "mlm.overall")
        score = summary.by_seed(grouping, method, bias_metric)
        seeds = [seed for seed in loss if seed in base_loss and seed in score]
        if not seeds:
            continue
        drawn.append(method)
        x, y = [loss[seed] - base_loss[seed] for seed in seeds], [score[seed] for seed in seeds]
        axes.plot(x, [distance(value) for value in y], marker, color=colour, markersize=5, alpha=0.45, mew=0)
        axes.plot(mean(x), distance(mean(y)), marker, color=colour, markersize=11, mec="white", mew=1)
    if len(drawn) < 2:
        return None
    axes.axvline(0, color=FAINT, linewidth=1)
    if start := summary.estimate(grouping, START, bias_metric):
        axes.axhline(distance(start.value), color=START_COLOUR, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.annotate(
            summary.label(START), (1, distance(start.value)), (-2, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="bottom", size=9.5, color=INK,
        )  # fmt: skip
    axes.margins(0.12)
    axes.set_ylim(bottom=0)
    axes.set_title("Language modelling against bias: lower left is better")
    axes.set_xlabel(f"change of the loss of all tokens against {summary.label(base)}, nats")
    axes.set_ylabel(f"distance of {metric.label} from {metric.ideal}")
    _legend(figure, summary, drawn, "large: mean over seeds; small: each seed")
    return figure


def group_weights(summary: Summary, grouping: str) -> Figure | None:
    """The groups' weights over steps: a panel for each method that has them; means over seeds, and each seed thin.

    Under ERM a group's "weight" is its share of each batch, which tells nothing of the method.
    """
    curves = {
        method: [_curves(run) for run in summary.runs(grouping, method)]
        for method, told in summary.methods.items()
        if told.settings.get("objective", "erm") != "erm"
    }
    weighted = {
        method: found for method, of_seeds in curves.items() if (found := [one for one in of_seeds if one])
    }
    names = summary.groupings[grouping].names
    if not weighted or not names:
        return None
    height = max(2.6, 0.21 * len(names) + 0.9)
    figure = Figure(figsize=(WIDTH, height * len(weighted) + 0.3), layout="constrained")
    grid = figure.subplots(len(weighted), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (method, of_seeds) in zip(grid, weighted.items(), strict=True):
        _weights(axes, names, of_seeds)
        axes.set_title(f"{summary.label(method)}: weights of the groups")
        axes.set_ylabel("weight in the loss")
        name_lines(axes)
    grid[-1].set_xlabel("step")
    return figure


_PICTURES: Sequence[tuple[str, Callable[[Summary, str], Figure | None], str]] = (
    ("differences", differences, "What each method changed against the baseline. Whiskers are intervals; a filled mark is a significant change."),
    ("group_loss", group_loss, "Loss on held-out text, by group. Whiskers are intervals."),
    ("bias", bias, "Bias scores, with the ideal as a line. Whiskers are intervals."),
    ("trade_off", trade_off, "Language modelling against bias. A method is of use if it goes down without going right."),
    ("group_weights", group_weights, "Group weights in training. Thick: mean over seeds; thin: each seed; dashed grey: equal weights."),
)  # fmt: skip


# Panels.


def _stacked(rows: Sequence[int], methods: int) -> tuple[Figure, list[Axes]]:
    """A panel above another, each as high as its rows need."""
    heights = [_height(count, methods) for count in rows]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.4), layout="constrained")
    grid = figure.subplots(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    return figure, list(grid)


def _height(rows: int, methods: int) -> float:
    return rows * max(0.42, 0.115 * methods) + 0.9


def _scores(axes: Axes, summary: Summary, grouping: str, methods: Sequence[str], rows: Sequence[str]) -> None:
    for method, offset, colour, marker in _offsets(summary, methods):
        for row, name in enumerate(rows):
            if found := summary.estimate(grouping, method, name):
                _dot(axes, found, row + offset, colour, marker)


def _dot(axes: Axes, at: Estimate, row: float, colour: str, marker: str, hollow: bool = False) -> None:
    if at.low is not None and at.high is not None:
        axes.plot(
            [at.low, at.high], [row, row], color=colour, linewidth=1.6, alpha=0.7, solid_capstyle="butt"
        )
    face, edge = ("white", colour) if hollow else (colour, "white")
    size = 6 if marker in "osD" else 7.8  # of about the same area
    axes.plot(
        at.value, row, marker, color=colour, markersize=size, mfc=face, mec=edge, mew=1.4 if hollow else 0.6
    )


def _weights(axes: Axes, names: Sequence[str], seeds: Sequence[Mapping[str, Mapping[int, float]]]) -> None:
    for number, group in enumerate(names):
        colour = GROUP_COLOURS[number % len(GROUP_COLOURS)]
        dashes = GROUP_DASHES[number // len(GROUP_COLOURS) % len(GROUP_DASHES)]
        curves = [curves[group] for curves in seeds if curves.get(group)]
        if not curves:
            continue
        if len(curves) > 1:
            for curve in curves:
                axes.plot(
                    list(curve),
                    list(curve.values()),
                    color=colour,
                    linestyle=dashes,
                    linewidth=0.7,
                    alpha=0.4,
                )
        steps = sorted(set.intersection(*map(set, curves)))
        means = [mean(curve[step] for curve in curves) for step in steps]
        axes.plot(steps, means, color=colour, linestyle=dashes, linewidth=2, label=group)
    axes.axhline(1 / len(names), color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(
        0, max((step for curves in seeds for curve in curves.values() for step in curve), default=1)
    )
    axes.set_ylim(bottom=0)


def _curves(run: Run) -> dict[str, dict[int, float]]:
    """Group -> step -> weight."""
    curves: dict[str, dict[int, float]] = {}
    for record in run.history:
        for group, weight in record.group_weight.items():
            if weight is not None:
                curves.setdefault(group, {})[record.step] = weight
    return curves


# What is shown, and how.


def _chosen(summary: Summary, names: Sequence[str]) -> list[str]:
    """At most MOST_ROWS: headlines before others, general ones (with fewer dots in their names) before special ones."""
    ranked = sorted(names, key=lambda name: (not summary.metrics[name].headline, name.count(".")))
    return [name for name in names if name in ranked[:MOST_ROWS]]


def _main_bias(summary: Summary) -> str | None:
    """The first score that measures bias, a headline if there is one."""
    names = [name for of_part in summary.parts().values() for name in of_part]
    names = [name for name in names if summary.metrics[name].ideal in ("0", "50")]
    return next(iter(sorted(names, key=lambda name: not summary.metrics[name].headline)), None)


def _offsets(summary: Summary, methods: Sequence[str]) -> Iterator[tuple[str, float, str, str]]:
    """Method, its place within a row, colour and marker, which are the same in all pictures."""
    looks = dict(
        zip(summary.methods, zip(cycle(RUN_COLOURS), cycle(RUN_MARKERS), strict=False), strict=False)
    )
    looks[START] = (START_COLOUR, "o")
    step = min(0.22, 0.72 / max(len(methods), 1))
    for number, method in enumerate(methods):
        yield method, (number - (len(methods) - 1) / 2) * step, *looks[method]


def _described(metric: Metric) -> str:
    return f"{_wrapped(metric.label)}\n({IDEALS.get(metric.ideal, f'ideal {metric.ideal}')})"


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 34))


def _row_labels(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    for row in range(1, len(labels)):
        axes.axhline(row - 0.5, color="#f0f0f0", linewidth=0.8, zorder=0)


def _legend(figure: Figure, summary: Summary, methods: Sequence[str], title: str | None = None) -> None:
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=7, linewidth=1.6, label=summary.label(method))
        for method, _, colour, marker in _offsets(summary, methods)
    ]
    width = sum(len(summary.label(method)) + 7 for method in methods)  # in letters, with marks and gaps
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles) if width < 95 else 4, title=title, alignment="left",
        title_fontsize=9.5,
    )  # fmt: skip


def _suffixes(groupings: Iterable[str]) -> dict[str, str]:
    """What a file's name says of a grouping: nothing if there is one only; else a different word for each."""
    names = list(groupings)
    if len(names) == 1:
        return {names[0]: ""}
    words = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in names]
    return {
        name: f"-{word}" if word and words.count(word) == 1 else f"-grouping-{number}"
        for number, (name, word) in enumerate(zip(names, words, strict=True), start=1)
    }
