"""The report's pictures. Colours follow Okabe and Ito, so that colour-blind readers tell them apart; shapes repeat
what colours say, and lines carry their names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robustdebias.comparison import START, Comparison, objective, run_label
from robustdebias.plot_style import FAINT, INK, STYLE

__all__ = ["bias", "draw_all", "group_losses", "group_weights", "held_out_loss", "overview"]

START_COLOUR = "#7a7a7a"
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
RUN_MARKERS = ("s", "D", "^", "v", "P", "X")
GROUP_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
GROUP_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)))

Runs = Mapping[str, Mapping[str, Any]]
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # group -> steps and values


def draw_all(results: Mapping[str, Any], comparison: Comparison) -> dict[str, Figure]:
    """File stem -> figure, of those there is something to show in."""
    made = {
        "overview": overview(results, comparison),
        "held_out_loss": held_out_loss(comparison),
        "group_weights": group_weights(results["runs"]),
        "group_losses": group_losses(results),
        "bias": bias(comparison),
    }
    return {stem: figure for stem, figure in made.items() if figure is not None}


def overview(results: Mapping[str, Any], comparison: Comparison) -> Figure | None:
    """The whole story on one page: loss by group, what Group DRO changed, its weights, and the stereotype score."""
    groups, domains = _rows(comparison, "mlm."), _rows(comparison, "stereoset.", ".ss")
    weighted = _weighted(results["runs"])
    panels: list[Callable[[Axes], None]] = []
    if groups:
        panels.append(
            lambda axes: _dots(axes, comparison, groups, "Held-out loss by group", "nats, lower is better")
        )
    contrast = _contrast(comparison, "mlm.overall")
    if groups and contrast:
        panels.append(lambda axes: _changes(axes, comparison, groups, *contrast))
    if weighted:
        panels.append(lambda axes: _weights(axes, *weighted[0]))
    if domains:
        panels.append(lambda axes: _stereotype_score(axes, comparison, domains))
    if not panels:
        return None
    heights = [0.27 * max(len(groups), 8) + 1.1, 3.9][: math.ceil(len(panels) / 2)]
    with _style():
        figure = Figure(figsize=(14, 0.8 + sum(heights)), layout="constrained")
        grid = figure.subplots(len(heights), min(2, len(panels)), squeeze=False, height_ratios=heights)
        for axes, panel in zip(grid.flat, panels, strict=False):
            panel(axes)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        _legend(figure, comparison)
    return figure


def held_out_loss(comparison: Comparison) -> Figure | None:
    """Loss by group for the start and every run, and what the last run changed against the baseline."""
    rows = _rows(comparison, "mlm.")
    if not rows:
        return None
    contrast = _contrast(comparison, "mlm.overall")
    with _style():
        figure = Figure(figsize=(13 if contrast else 8, 0.36 * len(rows) + 2), layout="constrained")
        grid = figure.subplots(1, 2 if contrast else 1, squeeze=False)[0]
        _dots(grid[0], comparison, rows, "Held-out loss by group", "nats, lower is better")
        if contrast:
            _changes(grid[1], comparison, rows, *contrast)
        _legend(figure, comparison)
    return figure


def bias(comparison: Comparison) -> Figure | None:
    """StereoSet's three scores by domain, and CrowS-Pairs by bias type where it was measured."""
    domains, crows = _rows(comparison, "stereoset.", ".ss"), _rows(comparison, "crows_pairs.")
    if not domains and not crows:
        return None
    with _style():
        panels = 3 * bool(domains) + bool(crows)
        height = 0.4 * max(len(domains), len(crows)) + 2
        figure = Figure(figsize=(4.3 * panels + 1.5, height), layout="constrained")
        grid = iter(figure.subplots(1, panels, squeeze=False)[0])
        if domains:
            _stereotype_score(next(grid), comparison, domains)
            for score, title in (("lms", "Language modelling score"), ("icat", "ICAT: both in one")):
                rows = [(label, name.removesuffix("ss") + score) for label, name in domains]
                _dots(next(grid), comparison, rows, title, "per cent, higher is better")
        if crows:
            axes = next(grid)
            _dots(axes, comparison, crows, "CrowS-Pairs (unreliable)", "per cent, 50 is ideal")
            _ideal(axes)
        _legend(figure, comparison)
    return figure


def group_weights(runs: Runs) -> Figure | None:
    """The group weights q of each Group DRO run, over steps."""
    weighted = _weighted(runs)
    if not weighted:
        return None
    with _style():
        figure = Figure(figsize=(8.5 * len(weighted), 4.6), layout="constrained")
        for axes, (name, history) in zip(
            figure.subplots(1, len(weighted), squeeze=False)[0], weighted, strict=True
        ):
            _weights(axes, name, history)
    return figure


def group_losses(results: Mapping[str, Any]) -> Figure | None:
    """Loss by group over steps, a column for each run: on held-out text where it was followed, and in training."""
    runs: Runs = {name: run for name, run in results["runs"].items() if run.get("history")}
    start = (results.get("start") or {}).get("evaluation")
    held_out = {name: _held_out_curves(run["history"], start) for name, run in runs.items()}
    training = {name: _training_curves(run["history"]) for name, run in runs.items()}
    titled = {"on held-out text": held_out, "in training, smoothed": training}
    curves = [(title, by_run) for title, by_run in titled.items() if by_run and all(by_run.values())]
    if not curves:
        return None
    with _style():
        figure = Figure(figsize=(7.2 * len(runs), 4.3 * len(curves)), layout="constrained")
        grid = figure.subplots(len(curves), len(runs), squeeze=False, sharex=True, sharey="row")
        for row, (title, by_run) in zip(grid, curves, strict=True):
            _focus(row[0], list(by_run.values()))
            row[0].set_ylabel("nats, lower is better")
            for axes, (name, lines) in zip(row, by_run.items(), strict=True):
                _lines(axes, lines)
                axes.set_title(f"{run_label(name)}: loss {title}")
                name_lines(axes)
        for axes in grid[-1]:
            axes.set_xlabel("step")
    return figure


# The panels. Each draws on the axes it is given.


def _dots(
    axes: Axes, comparison: Comparison, rows: Sequence[tuple[str, str]], title: str, scale: str
) -> None:
    """A row for each (label, score name), in it a mark for each run, with its interval."""
    step = min(0.22, 0.66 / len(comparison.names))
    for number, (run, colour, marker) in enumerate(_looks(comparison)):
        offset = (number - (len(comparison.names) - 1) / 2) * step
        for row, (_, name) in enumerate(rows):
            value = comparison.values[run].get(name)
            if value is None:
                continue
            if ends := comparison.intervals[run].get(name):
                axes.plot(
                    ends, [row + offset] * 2, color=colour, linewidth=1.6, alpha=0.65, solid_capstyle="butt"
                )
            axes.plot(
                value, row + offset, marker, color=colour, markersize=6.5, markeredgecolor="white", mew=0.6
            )
    _row_labels(axes, rows)
    axes.set_title(title)
    axes.set_xlabel(scale)


def _stereotype_score(axes: Axes, comparison: Comparison, rows: Sequence[tuple[str, str]]) -> None:
    _dots(
        axes,
        comparison,
        rows,
        "Stereotype score (StereoSet)",
        "per cent of choices for the stereotype, 50 is ideal",
    )
    _ideal(axes)


def _changes(
    axes: Axes, comparison: Comparison, rows: Sequence[tuple[str, str]], base: str, other: str
) -> None:
    """``other`` minus ``base`` by group, with intervals; those that leave out zero are filled."""
    colour, marker = {name: (c, m) for name, c, m in _looks(comparison)}[other]
    axes.axvline(0, color=INK, linewidth=1)
    for row, (_, name) in enumerate(rows):
        found = comparison.difference(base, other, name)
        if found is None:
            continue
        clear = found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)
        if found.low is not None and found.high is not None:
            axes.plot([found.low, found.high], [row, row], color=colour, linewidth=1.8, solid_capstyle="butt")
        axes.plot(
            found.value, row, marker, markersize=7.5, mec=colour, mew=1.6, mfc=colour if clear else "white"
        )
    _row_labels(axes, rows)
    axes.margins(x=0.1)
    axes.set_title(f"{run_label(other)} minus {run_label(base)}")
    axes.set_xlabel(
        f"difference of the loss in nats; below 0: {run_label(other)} is better\nhollow: no clear difference, or too few texts"
    )


def _weights(axes: Axes, name: str, history: Sequence[Mapping[str, Any]]) -> None:
    steps = [record["step"] for record in history]
    groups = list(history[-1]["group_weight"])
    lines = {g: (steps, [record["group_weight"].get(g, math.nan) for record in history]) for g in groups}
    _lines(axes, lines)
    axes.set_ylim(0, 1.08 * max(np.nanmax(values) for _, values in lines.values()))
    axes.axhline(1 / len(groups), color=FAINT, linewidth=1, linestyle=(0, (4, 3)), label="(equal weights)")
    axes.set_title(f"Group weights during training ({run_label(name)})")
    axes.set_xlabel("step")
    axes.set_ylabel("weight of the group in the loss")
    name_lines(axes)


def _lines(axes: Axes, lines: Curves) -> None:
    """Named lines. Equal places in ``lines`` look equal in all panels."""
    for number, (group, (steps, values)) in enumerate(lines.items()):
        dashes = GROUP_DASHES[number // len(GROUP_COLOURS) % len(GROUP_DASHES)]
        axes.plot(
            steps, values, color=GROUP_COLOURS[number % len(GROUP_COLOURS)], linestyle=dashes, linewidth=1.9,
            marker="o" if len(steps) < 12 else None, markersize=3.5, label=group,
        )  # fmt: skip
    steps = [step for of_group, _ in lines.values() for step in of_group]
    axes.set_xlim(0, max(steps, default=1))


def name_lines(axes: Axes) -> None:
    """Names at the right ends of the lines, pushed apart so that none covers another. Call it when scales are set."""
    low, high = axes.get_ylim()
    ends = []
    for line in axes.get_lines():
        values = np.asarray(line.get_ydata(), dtype=float)
        values = values[np.isfinite(values)]
        if len(values) and not str(line.get_label()).startswith("_"):
            ends.append((values[-1], str(line.get_label()), line.get_color()))
    ends.sort()
    size = 9.5
    inches = axes.bbox.height / axes.figure.dpi
    wanted = [min(max((value - low) / (high - low), 0), 1) for value, *_ in ends]
    for (_, group, colour), end, place in zip(
        ends, wanted, _spread(wanted, 1.3 * size / 72 / inches), strict=True
    ):
        axes.annotate(
            group, (1, end), (1.05, place), xycoords="axes fraction", textcoords="axes fraction", color=colour,
            size=size, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights at least ``gap`` apart and otherwise as near to those wanted (ascending) as can be, around 0 to 1."""
    # Neighbours that are too near form a block, which sits where its members want it to be on average.
    blocks: list[list[float]] = []
    for height in wanted:
        blocks.append([height])
        while len(blocks) > 1 and _lowest(blocks[-2], gap) + len(blocks[-2]) * gap > _lowest(blocks[-1], gap):
            last = blocks.pop()
            blocks[-1] += last
    return [_lowest(block, gap) + number * gap for block in blocks for number in range(len(block))]


def _lowest(block: Sequence[float], gap: float) -> float:
    """The height of a block's first member, such that the block lies within 0 to 1 if it can."""
    span = (len(block) - 1) * gap
    return max(min(sum(block) / len(block) - span / 2, 1 - span), 0.0)


def _focus(axes: Axes, curves: Sequence[Curves]) -> None:
    """Scale to what follows the first steep part, so that the differences between groups can be seen."""
    later = [values[-max(2, int(0.9 * len(values))) :] for lines in curves for _, values in lines.values()]
    flat = np.concatenate([np.asarray(values, dtype=float) for values in later])
    flat = flat[np.isfinite(flat)]
    if len(flat):
        pad = 0.05 * (flat.max() - flat.min()) or 0.1
        axes.set_ylim(flat.min() - pad, flat.max() + pad)


# What the panels show.


def _rows(comparison: Comparison, prefix: str, suffix: str = "") -> list[tuple[str, str]]:
    """(label, score name) for each row of a panel: all first, then groups by falling loss, or domains by name."""
    metrics = [m.name for m in comparison.metrics(prefix) if m.name.endswith(suffix)]
    if prefix == "mlm.":
        groups = [name for name in metrics if name.startswith("mlm.group.")]
        order = comparison.values[comparison.baseline or comparison.names[0]]
        groups.sort(key=lambda name: -order.get(name, 0.0))
        whole = [("all tokens", "mlm.overall")] if "mlm.overall" in metrics else []
        return whole + [(name.removeprefix("mlm.group."), name) for name in groups]
    return [(name.removeprefix(prefix).removesuffix(suffix), name) for name in metrics]


def _contrast(comparison: Comparison, metric: str) -> tuple[str, str] | None:
    """The baseline and the last run that it can be compared with."""
    others = [
        d.other for d in comparison.differences if d.base == comparison.baseline and d.metric.name == metric
    ]
    return (str(comparison.baseline), others[-1]) if others else None


def _weighted(runs: Runs) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Runs whose group weights are learnt."""
    return [
        (name, run["history"])
        for name, run in runs.items()
        if objective(run) != "erm" and run.get("history") and run["history"][-1].get("group_weight")
    ]


def _held_out_curves(history: Sequence[Mapping[str, Any]], start: Mapping[str, Any] | None) -> Curves:
    """Loss by group at the evaluations of a run; nothing if there were fewer than two."""
    points = [(r["step"], r["evaluation"]["mlm"]) for r in history if "mlm" in (r.get("evaluation") or {})]
    if len(points) < 2:
        return {}
    if start and "mlm" in start:
        points.insert(0, (0, start["mlm"]))
    groups = list(points[-1][1]["by_group"])
    steps = [step for step, _ in points]
    losses = {g: [mlm["by_group"].get(g, {}).get("loss") for _, mlm in points] for g in groups}
    return {g: (steps, [math.nan if loss is None else loss for loss in losses[g]]) for g in groups}


def _training_curves(history: Sequence[Mapping[str, Any]]) -> Curves:
    """Loss by group in the batches: a moving mean over about a tenth of the run, by tokens."""
    keep = 1 - 1 / max(1.0, len(history) / 10)
    groups = list(
        dict.fromkeys(
            g for record in history for g in (*record.get("group_weight", ()), *record["group_loss"])
        )
    )
    curves = {}
    for group in groups:
        total = tokens = 0.0
        steps, values = [], []
        for record in history:
            total, tokens = keep * total, keep * tokens
            loss = record["group_loss"].get(group)
            if loss is not None and math.isfinite(loss):
                count = record.get("group_count", {}).get(group, 1)
                total, tokens = total + loss * count, tokens + count
            if tokens:
                steps.append(record["step"])
                values.append(total / tokens)
        if steps:
            curves[group] = steps, values
    return curves


# Looks.


def _looks(comparison: Comparison) -> Iterator[tuple[str, str, str]]:
    """Name, colour and marker of the start and each run."""
    looks = zip(cycle(RUN_COLOURS), cycle(RUN_MARKERS), strict=False)
    for name in comparison.names:
        yield (name, START_COLOUR, "o") if name == START else (name, *next(looks))


def _legend(figure: Figure, comparison: Comparison) -> None:
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=7, linewidth=1.6, label=run_label(name))
        for name, colour, marker in _looks(comparison)
    ]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), title="whiskers: 95% interval over test items",
        alignment="left", title_fontsize=9.5,
    )  # fmt: skip


def _row_labels(axes: Axes, rows: Sequence[tuple[str, str]]) -> None:
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    if len(rows) > 1:
        axes.axhline(0.5, color=FAINT, linewidth=0.8)  # below the row of all


def _ideal(axes: Axes) -> None:
    axes.axvline(50, color=INK, linewidth=1.2)
    axes.annotate("ideal", (50, 1), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                  va="top", size=9, color=INK)  # fmt: skip


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(STYLE):
        yield
