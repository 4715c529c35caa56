"""What a bias card says: its sentences and tables, with all numbers as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from robustdebias.comparison import START
from robustdebias.experiments.card_input import Difference, Metric, Run, Summary

__all__ = ["Cell", "Table", "content", "number", "part_title"]

SYMBOLS = {
    "better": "✓", "slightly better": "✓", "no significant change": "≈", "slightly worse": "✗", "worse": "✗",
    "no interval": "?",
}  # fmt: skip
IDEALS = {"low": "lower is better", "high": "higher is better"}
NOTHING = "–"
_MEAN_INTERVAL = (
    " A score's interval is the mean of those of its seeds: it tells how far other test items could move the score, not "
    "how far another seed could."
)
_PARTS = {
    "mlm": "Held-out text", "stereoset": "StereoSet", "stereoset_inter": "StereoSet, between sentences",
    "crows_pairs": "CrowS-Pairs", "crows_pairs_differing": "CrowS-Pairs, differing tokens", "seat": "SEAT",
    "pseudo_perplexity": "Pseudo-perplexity", "downstream": "Downstream task",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A number with its interval, and the verdict on it if it is a difference."""

    value: str
    interval: str = ""
    verdict: str = ""

    @property
    def symbol(self) -> str:
        return SYMBOLS[self.verdict]

    def __str__(self) -> str:
        words = f"{self.symbol} {self.verdict}" if self.verdict else ""
        return " ".join(part for part in (self.value, self.interval, words) if part)


@dataclass(frozen=True)
class Block:
    """Rows of a table under a label of their own, or none."""

    label: str
    rows: list[list[Any]]  # of strings and cells


@dataclass(frozen=True)
class Table:
    caption: str
    head: list[str]
    blocks: list[Block]
    words: int = 1  # leading columns that hold words, set to the left


@dataclass(frozen=True)
class Finding:
    """What a method changed: verdict -> the metrics it was given for, each with its change."""

    title: str
    verdicts: dict[str, list[tuple[str, str]]]

    symbols = SYMBOLS


@dataclass(frozen=True)
class Part:
    title: str
    tables: list[Table]  # headline metrics
    warnings: list[str] = field(default_factory=list)


def content(summary: Summary) -> dict[str, Any]:
    """What the templates print. A part without data is empty, and left out there."""
    headline, rest = (_parts(summary, headline) for headline in (True, False))
    return {
        "title": summary.title,
        "created": summary.created,
        "description": [text for text in re.split(r"\n\s*\n", summary.description) if text.strip()],
        "done": _done(summary),
        "findings": list(_findings(summary)),
        "limits": [*summary.caveats, *summary.warnings],
        "data": _corpora(summary),
        "groupings": [
            (_group_table(summary, name), _sentence(grouping.description), ", ".join(grouping.folded))
            for name, grouping in summary.groupings.items()
        ],
        "model": _model(summary),
        "methods": _methods(summary),
        "parts": headline,
        "details": rest,
        "seeds": [table for name in summary.groupings if (table := _seed_table(summary, name)).blocks],
        "definitions": [(part_title(part), text) for part, text in summary.definitions.items()],
        "interval_rule": _sentence(summary.interval_rule) + ("" if summary.means else _MEAN_INTERVAL),
        "command": summary.command,
        "config_text": summary.config_text,
        "environment": [
            (key, _plain(value)) for key, value in summary.environment.items() if value is not None
        ],
    }


def number(value: float, digits: int, sign: str = "") -> str:
    text = f"{value:{sign},.{digits}f}"
    if not float(text.replace(",", "")):
        text = f"{0:.{digits}f}"  # no sign
    return text.replace("-", "−")


def part_title(part: str) -> str:
    kind, _, text_set = part.partition(":")
    return f"the text set {text_set}" if text_set else _PARTS.get(kind, kind)


def metric_note(metric: Metric) -> str:
    """Its unit and what is good."""
    return ", ".join(filter(None, (metric.unit, IDEALS.get(metric.ideal, f"{metric.ideal} is ideal"))))


# The beginning: what was done and what came of it.


def _done(summary: Summary) -> str:
    """The experiment in one sentence."""
    labels = [method.label for method in summary.methods.values()]
    seeds = f"{len(summary.seeds)} seeds each" if len(summary.seeds) > 1 else "one seed each"
    measured = [
        f"{summary.data.held_out_texts:,} held-out texts of {summary.data.held_out_documents:,} documents",
        *(part_title(part) for part in summary.parts() if part != "mlm"),
    ]
    return (
        f"The model {summary.model.name} was fine-tuned on {summary.data.train_texts:,} texts with {_listed(labels)} ({seeds}), "
        f"and measured on {_listed(measured)}."
    )


def _findings(summary: Summary) -> Iterator[Finding]:
    """What fine-tuning as such did, then each method against the baseline."""
    base = summary.baseline
    pairs = [(base, START), *((method, base) for method in summary.methods if method != base)]
    for grouping in summary.groupings:
        for method, against in pairs:
            verdicts: dict[str, list[tuple[str, str]]] = {verdict: [] for verdict in SYMBOLS}
            for name, metric in summary.metrics.items():
                found = summary.difference(grouping, method, against, name)
                if found and metric.headline:
                    unit = {"%": "points"}.get(metric.unit, metric.unit)
                    cell = _change(metric, found)
                    change = " ".join(filter(None, (cell.value, unit, cell.interval)))
                    verdicts[found.verdict].append((metric.label, change))
            if any(verdicts.values()):
                title = (
                    f"{summary.label(method)} against {'the ' * (against == START)}{summary.label(against)}"
                )
                yield Finding(
                    _of_grouping(summary, grouping, title), {v: t for v, t in verdicts.items() if t}
                )


# Data and methods.


def _model(summary: Summary) -> str:
    model = summary.model
    head = f", {model.head}" if model.head else ""
    return f"Model: {model.name} ({model.type}, {model.parameters:,} parameters{head}). {_sentence(model.note or '')}".strip()


def _corpora(summary: Summary) -> list[Table]:
    corpora, sets = summary.data.corpora, summary.data.text_sets
    tables = [
        Table(
            "Text", ["corpus", "source", "licence", "texts", "words"],
            [Block("", [[c.name, c.source, c.license or NOTHING, _count(c.texts), _count(c.words)] for c in corpora])],
            words=3,
        ),
        Table(
            "Further texts that were measured on", ["name", "groups", "texts"],
            [Block("", [[s.name, ", ".join(s.groups), f"{s.texts:,}"] for s in sets])], words=2,
        ),
    ]  # fmt: skip
    return [table for table in tables if table.blocks[0].rows]


def _group_table(summary: Summary, name: str) -> Table:
    grouping, data = summary.groupings[name], summary.data

    def row(label: str, texts: int, held_out: int, words: int | None) -> list[str]:
        share = f"{texts / max(data.train_texts, 1):.1%}"
        return [label, _count(texts), share, _count(held_out), _count(words)]

    rows = [row("all texts", data.train_texts, data.held_out_texts, data.train_words)]
    rows += [
        row(group, grouping.train_texts.get(group, 0), grouping.held_out_texts.get(group, 0),
            grouping.train_words.get(group))
        for group in grouping.names
    ]  # fmt: skip
    head = ["group", "training texts", "share", "held-out texts", "training words"]
    return Table(f"Groups: {name}", head, [Block("", rows)])


def _methods(summary: Summary) -> Table:
    head = ["method", "what it is", "settings"]
    runs = {method: [run for run in summary.training if run.method == method] for method in summary.methods}
    effort = any(runs.values())
    rows = [
        [
            method.label + (" (baseline)" if name == summary.baseline and len(runs) > 1 else ""),
            method.description,
            ", ".join(f"{key} {_plain(value)}" for key, value in method.settings.items()) or NOTHING,
            *(_effort(runs[name]) if effort else []),
        ]
        for name, method in summary.methods.items()
    ]
    head += ["steps", "minutes a run", "tokens a second"] if effort else []
    return Table("What was compared, and its effort", head, [Block("", rows)], words=3)


def _effort(runs: Sequence[Run]) -> list[str]:
    if not runs:
        return [NOTHING] * 3
    speeds = [run.tokens_per_second for run in runs if run.tokens_per_second is not None]
    steps = sorted({run.steps for run in runs})
    return [
        f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}",
        f"{mean(run.seconds for run in runs) / 60:.1f}",
        f"{mean(speeds):,.0f}" if speeds else NOTHING,
    ]


# Results.


def _parts(summary: Summary, headline: bool) -> list[Part]:
    """The tables of the metrics that are headlines, or of those that are not."""
    parts = []
    for part, metrics in summary.parts().items():
        chosen = [name for name in metrics if summary.metrics[name].headline == headline]
        tables = [_result_table(summary, part, grouping, chosen) for grouping in summary.groupings]
        title = part_title(part)
        # A warning about a benchmark stands by its scores too.
        warnings = [text for text in summary.warnings if title.partition(",")[0] in text]
        if any(table.blocks for table in tables):
            parts.append(Part(title, [table for table in tables if table.blocks], warnings))
    return parts


def _result_table(summary: Summary, part: str, grouping: str, metrics: Sequence[str]) -> Table:
    """Methods as columns; for each metric its score, then the change against the baseline and against the start."""
    methods = summary.measured(grouping)
    blocks = []
    for name in metrics:
        metric = summary.metrics[name]
        scores = [summary.estimate(grouping, method, name) for method in methods]
        cells = [
            Cell(number(s.value, metric.digits), _interval(s.low, s.high, metric.digits)) if s else NOTHING
            for s in scores
        ]
        if not any(scores):
            continue
        rows: list[list[Any]] = [["score", *cells]]
        for base in dict.fromkeys((summary.baseline, START)):
            found = [summary.difference(grouping, method, base, name) for method in methods]
            if any(found):
                against = f"against {'the ' * (base == START)}{summary.label(base)}"
                rows.append([against, *(_change(metric, d) if d else NOTHING for d in found)])
        blocks.append(Block(f"{metric.label} ({metric_note(metric)})", rows))
    caption = _of_grouping(summary, grouping, part_title(part))
    return Table(caption, ["", *map(summary.label, methods)], blocks)


def _change(metric: Metric, found: Difference) -> Cell:
    """With more digits where an interval that leaves out zero would seem to touch it."""
    digits = metric.digits
    if found.low is not None and found.high is not None and found.low * found.high > 0:
        nearest = min(abs(found.low), abs(found.high))
        while not round(nearest, digits) and digits < metric.digits + 2:
            digits += 1
    return Cell(number(found.mean, digits, "+"), _interval(found.low, found.high, digits, "+"), found.verdict)


def _interval(low: float | None, high: float | None, digits: int, sign: str = "") -> str:
    if low is None or high is None:
        return ""
    return f"({number(low, digits, sign)} to {number(high, digits, sign)})"


def _seed_table(summary: Summary, grouping: str) -> Table:
    """Of the headline metrics: each seed's score by method, each seed's difference to the baseline, and their spread.

    Empty if there is a single seed.
    """
    blocks = []
    for name, metric in summary.metrics.items():
        if not metric.headline or len(summary.seeds) < 2:
            continue
        rows = []
        for method in summary.methods:
            by_seed = summary.by_seed(grouping, method, name)
            rows.append(_spread(summary.label(method), [by_seed.get(seed) for seed in summary.seeds], metric))
        for method in summary.methods:
            if found := summary.difference(grouping, method, summary.baseline, name):
                label = f"{summary.label(method)} − {summary.label(summary.baseline)}"
                rows.append(_spread(label, found.per_seed, metric, "+"))
        if rows := [row for row in rows if any(cell != NOTHING for cell in row[1:])]:
            blocks.append(Block(f"{metric.label} ({metric_note(metric)})", rows))
    head = ["", *(f"seed {seed}" for seed in summary.seeds), "standard deviation"]
    return Table(_of_grouping(summary, grouping, "Seed by seed"), head, blocks)


def _spread(label: str, values: Sequence[float | None], metric: Metric, sign: str = "") -> list[str]:
    known = [value for value in values if value is not None]
    cells = [NOTHING if value is None else number(value, metric.digits, sign) for value in values]
    return [label, *cells, number(stdev(known), metric.digits) if len(known) > 1 else NOTHING]


# Words.


def _of_grouping(summary: Summary, grouping: str, text: str) -> str:
    """Names the grouping where there are several."""
    return text if len(summary.groupings) == 1 else f"{text} (groups: {grouping})"


def _sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    text = text.strip()
    return text[:1].upper() + text[1:] + "." * bool(text and text[-1] not in ".!?")


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _count(number: int | None) -> str:
    return NOTHING if number is None else f"{number:,}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
