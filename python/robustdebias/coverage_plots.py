"""A picture of a corpus's groups: how many texts each has, and which of them it shares. G groups."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch
from matplotlib.textpath import TextToPath
from matplotlib.ticker import StrMethodFormatter

from robustdebias.plot_style import FAINT, INK, STYLE
from robustdebias.preparation import PreparedCorpus
from robustdebias.readers import OTHER

__all__ = ["MOST_GROUPS", "draw_coverage"]

MOST_GROUPS = 60
"""Groups that one picture shows: those with most texts, where there are more."""

_KEPT, _FOLDED = "#0072B2", "#B9CFE0"
_NUMBERED = 20  # groups whose overlaps are also written as numbers
_LONG = 30  # letters of a name that is too long to stand below a column

# In inches. Rows of the bars and of the heat map are the same, so both share the names.
_BARS, _GAP, _TOP, _RIGHT = 4.2, 0.25, 0.95, 1.1
_TITLE, _ROW, _COLUMN = 12.5, 10.5, 9  # points


def draw_coverage(corpus: PreparedCorpus) -> Figure:
    """Bars of the texts of each group, pale where it was folded; beside them, if there is any, the overlap of groups.

    Texts in no group are counted in the title; "other" has no bar unless it is all there is.
    """
    coverage = corpus.coverage
    texts = dict(zip(coverage.names, coverage.group_texts, strict=True))
    groups = [name for name in coverage.names if name != OTHER] or list(coverage.names)
    largest = set(sorted(groups, key=lambda name: -texts[name])[:MOST_GROUPS])
    names = [name for name in groups if name in largest]
    title = f"{coverage.texts:,} texts, {coverage.words:,} words"
    if texts.get(OTHER):
        title += f"; {texts[OTHER]:,} texts ({texts[OTHER] / coverage.texts:.1%}) in no group"
    if len(names) < len(groups):
        title += f"; the {len(names)} largest of {len(groups):,} groups"
    shown = [coverage.names.index(name) for name in names]
    both = np.array(coverage.overlap, dtype=float).reshape(len(coverage.names), -1)[np.ix_(shown, shown)]
    overlaps = both.sum() > np.trace(both)

    long = max(map(len, names), default=0) > _LONG
    columns = [str(number) for number in range(1, len(names) + 1)] if long else names
    rows = (
        [f"{name}  {column}" for name, column in zip(names, columns, strict=True)]
        if long and overlaps
        else names
    )
    left = _inches(rows, _ROW) + 0.2
    bottom = max(_inches(columns, _COLUMN) + 0.2, 0.9) if overlaps and not long else 0.9
    side = max(len(names), 1) * max(0.27, min(0.6, 2.4 / max(len(names), 1)))
    width, height = left + _BARS + (_GAP + side + _RIGHT if overlaps else 0.3), _TOP + side + bottom
    width = max(width, _inches([title], _TITLE) + 0.3)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        figure.text(0.15 / width, 1 - 0.15 / height, title, va="top", fontsize=_TITLE)

        def panel(start: float, inches: float) -> Axes:
            return figure.add_axes((start / width, bottom / height, inches / width, side / height))

        kept = [name in corpus.group_names for name in names]
        _bars(panel(left, _BARS), rows, [texts[name] for name in names], kept, coverage.texts)
        if not all(kept):
            looks = [Patch(color=_KEPT, label="trained on"), Patch(color=_FOLDED, label="too small, folded")]
            place = left / width, (bottom - 0.35) / height
            figure.legend(handles=looks, loc="upper left", bbox_to_anchor=place, ncols=2, fontsize=9.5)
        if overlaps:
            heat = left + _BARS + _GAP
            _heat_map(panel(heat, side), panel(heat + side + 0.15, 0.15), both, columns, upright=long)
    return figure


def _bars(axes: Axes, labels: list[str], counts: list[int], kept: list[bool], total: int) -> None:
    axes.barh(range(len(counts)), counts, color=[_KEPT if one else _FOLDED for one in kept], height=0.72)
    for row, count in enumerate(counts):
        axes.annotate(
            f"{count:,}   {count / max(total, 1):.1%}",
            (count, row), (4, 0), textcoords="offset points", va="center", fontsize=9, color=INK,
        )  # fmt: skip
    axes.set_yticks(range(len(counts)), labels, fontsize=_ROW)
    axes.set_ylim(len(counts) - 0.5, -0.5)
    axes.set_xlim(0, 1.35 * max([*counts, 1]))  # room for the numbers
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_title("Texts of each group")


def _heat_map(axes: Axes, scale: Axes, both: np.ndarray, columns: list[str], *, upright: bool) -> None:
    """Of texts in both groups [G, G], as shares of the row's."""
    texts = both.diagonal()[:, None]
    share = np.divide(both, texts, out=np.zeros_like(both), where=texts > 0)
    np.fill_diagonal(share, np.nan)  # all of itself, which says nothing
    top = float(np.nanmax(share))
    # The root, as most shares are small and a few are not.
    colours = matplotlib.colormaps["Blues"].with_extremes(bad="#d8d8d8")
    image = axes.imshow(share, cmap=colours, norm=PowerNorm(0.5, 0, top), aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=0 if upright else 90, fontsize=_COLUMN)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set(visible=True, color=FAINT)
    axes.set_title("Share of a row's texts\nthat are in the column too", fontsize=11)
    bar = axes.figure.colorbar(image, cax=scale, format=StrMethodFormatter("{x:.0%}"))
    bar.outline.set_visible(False)
    if len(columns) <= _NUMBERED:
        for row, column in zip(*np.nonzero(share >= 0.005), strict=True):
            value = share[row, column]
            colour = "white" if value > 0.36 * top else INK
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7, color=colour)


def _inches(texts: list[str], points: float) -> float:
    """The width of the widest, and some more, as letters on a screen sit on whole pixels."""
    font = FontProperties(size=points)
    widths = (TextToPath().get_text_width_height_descent(text, font, False)[0] for text in texts)
    return 1.06 * max(widths, default=0) / 72
