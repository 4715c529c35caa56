"""The outcome of an experiment for people (``report.md`` with pictures) and for programs (``metrics.json``)."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustdebias.comparison import (
    RULE,
    START,
    VERDICTS,
    Comparison,
    Difference,
    Metric,
    compare,
    objective,
    run_label,
)
from robustdebias.evaluation.crows_pairs import RELIABILITY_WARNING

__all__ = ["comparison_table", "write_report"]

# Left out of metrics.json: outcomes of single items, and steps, which a run's directory has in history.jsonl.
_BULKY = frozenset({"per_text", "per_term", "per_item", "outcomes", "associations", "history"})

_OBJECTIVES = {
    "erm": "is plain fine-tuning: every hidden word counts the same.",
    "group_dro": "gives more weight to the groups that the model is worse at.",
}
# Where 50 is ideal, a score may move and yet be as far from it.
_DISTANCES = {
    "better": "closer to 50",
    "slightly better": "slightly closer to 50",
    "no clear difference": "not clearly closer or farther",
    "slightly worse": "slightly farther from 50",
    "worse": "farther from 50",
}
_PICTURES = {
    "overview": "Loss by group, what Group DRO changed against ERM, its group weights, and the stereotype score",
    "held_out_loss": "Held-out loss of each group",
    "group_weights": "Weight of each group in the loss, over the steps of training",
    "group_losses": "Loss of each group over the steps of training",
    "bias": "Bias scores before and after fine-tuning",
}


def write_report(out_dir: str | Path, results: Mapping[str, Any], *, svg: bool = False) -> Path:
    """Write ``report.md``, ``metrics.json`` and the pictures into ``out_dir``; returns the path of ``report.md``.

    A file is replaced in one step, and the report goes last: it never names a picture that isn't there.

    Args:
        results:
            ``runs``: name -> what ``training.train`` returns: ``config``, ``history`` (records of a step with
            ``step``, ``loss``, ``group_loss``, ``group_weight`` and at times ``evaluation``), ``evaluation``
            (``mlm``, ``stereoset``, ``crows_pairs``, each as its ``evaluate`` returns it), ``train_seconds``,
            ``tokens_per_second``;
            optional: ``start`` with the ``evaluation`` before training; ``groups``, the corpus' coverage as a
            dictionary; ``environment``; ``title``; ``notes``, sentences to print.
        svg: also write each picture as SVG.

    Raises: ValueError if there are no runs.
    """
    from robustdebias import plots  # matplotlib takes a second to import

    if not results.get("runs"):
        raise ValueError("results: there are no runs to report")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    comparison = compare(results)
    pictures = plots.draw_all(results, comparison)
    for stem, figure in pictures.items():
        for kind in ("png", "svg") if svg else ("png",):
            buffer = io.BytesIO()
            # Without a date the same results give the same bytes.
            figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
            _write(out_dir / f"{stem}.{kind}", buffer.getvalue())
    metrics = _plain({**results, **_comparison_record(comparison)})
    text = json.dumps(metrics, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    _write(out_dir / "metrics.json", text.encode() + b"\n")
    report = out_dir / "report.md"
    _write(report, _markdown(results, comparison, list(pictures)).encode())
    return report


def comparison_table(results: Mapping[str, Any]) -> str:
    """The main scores side by side, for a terminal."""
    comparison = compare(results)
    shown = [metric for metric in comparison.metrics() if metric.headline or metric.name.endswith(".ss")]
    rows = [["", "ideal", *map(run_label, comparison.names), *_contrast_headings(comparison, "-")]]
    rows += [[m.label, m.ideal, *_values(comparison, m), *_contrast_cells(comparison, m)] for m in shown]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = 2 + len(comparison.names)  # from here on cells are sentences, set to the left
    lines = [
        "  ".join(
            cell.rjust(width) if 0 < column < last else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    lines += [
        "",
        "Losses in nats, scores in per cent. In brackets: 95% interval over the test items (none where they are too few);",
        "it says nothing of another training seed.",
    ]
    if comparison.metrics("crows_pairs"):  # in either form
        lines.append(f"Warning: {RELIABILITY_WARNING}")
    return "\n".join(lines)


def _markdown(results: Mapping[str, Any], comparison: Comparison, pictures: Sequence[str]) -> str:
    """The report. Sections without content are left out."""
    sections: list[tuple[str, Iterable[str]]] = [
        ("In short", _in_short(results, comparison)),
        ("The runs", _runs(results)),
        ("Held-out loss by group", _loss_section(results, comparison)),
        ("Social bias: StereoSet", _stereoset_section(comparison)),
        ("Social bias: CrowS-Pairs", _crows_pairs_section(comparison)),
        ("Further measures", _further_section(results, comparison)),
        ("During training", _training_section(results)),
        ("The groups in the text", _coverage(results.get("groups") or {})),
        ("How differences are judged", [RULE]),
        ("Notes", [f"- {note}" for note in results.get("notes") or ()]),
        ("Environment", _environment(results.get("environment") or {})),
    ]
    placed = {
        "In short": ["overview"], "Held-out loss by group": ["held_out_loss"], "Social bias: StereoSet": ["bias"],
        "During training": ["group_weights", "group_losses"],
    }  # fmt: skip
    lines = [f"# {results.get('title') or 'Fine-tuning across demographic groups'}", ""]
    for heading, content in sections:
        body = list(content)
        if body:
            lines += [f"## {heading}", "", *body, ""]
            for stem in placed.get(heading, ()):
                if stem in pictures:
                    lines += [f"![{_PICTURES[stem]}]({stem}.png)", ""]
    return "\n".join(lines).rstrip() + "\n"


def _in_short(results: Mapping[str, Any], comparison: Comparison) -> Iterable[str]:
    """What was done, the main scores, and what they say."""
    objectives = {objective(run) for run in results["runs"].values()}
    told = [f"{run_label(name)} {text}" for name, text in _OBJECTIVES.items() if name in objectives]
    yield " ".join(
        ["A masked language model was fine-tuned on text about several demographic groups.", *told]
    )
    yield ""
    headlines = [metric for metric in comparison.metrics() if metric.headline]
    yield from _score_table(comparison, headlines, intervals=False)
    pairs = dict.fromkeys((d.base, d.other) for d in comparison.differences)
    if pairs:
        yield ""
    for base, other in pairs:
        by_verdict: dict[str, list[str]] = {}
        for metric in headlines:
            if found := comparison.difference(base, other, metric.name):
                by_verdict.setdefault(found.verdict, []).append(metric.label)
        verdicts = [
            f"**{verdict}**: {', '.join(by_verdict[verdict])}"
            for verdict in VERDICTS
            if verdict in by_verdict
        ]
        if verdicts:
            yield f"- {run_label(other)} against {run_label(base)}: {'; '.join(verdicts)}."


def _runs(results: Mapping[str, Any]) -> Iterable[str]:
    """Settings that differ and effort as a table, the settings in common in a line."""
    runs: Mapping[str, Any] = results["runs"]
    settings = [_settings(run.get("config") or {}) for run in runs.values()]
    keys = list(dict.fromkeys(key for own in settings for key in own))
    common = [key for key in keys if len({repr(own.get(key)) for own in settings}) == 1]
    rows = [[key, *(str(own.get(key, "-")) for own in settings)] for key in keys if key not in common]
    steps = [run["history"][-1]["step"] if run.get("history") else None for run in runs.values()]
    for label, numbers, form in (
        ("steps", steps, ",.0f"),
        ("minutes of training", [_per(run.get("train_seconds"), 60) for run in runs.values()], ".1f"),
        ("tokens a second", [run.get("tokens_per_second") for run in runs.values()], ",.0f"),
    ):
        if any(number is not None for number in numbers):
            rows.append([label, *("-" if number is None else f"{number:{form}}" for number in numbers)])
    if rows:
        yield from _table(["", *map(run_label, runs)], rows)
    if common:
        yield ""
        yield f"{'In common' if len(runs) > 1 else 'Settings'}: {', '.join(f'{key} {settings[0][key]}' for key in common)}."


def _per(number: float | None, divisor: float) -> float | None:
    return None if number is None else number / divisor


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flat configuration; the training settings may stand under ``train``."""
    flat = config.get("train", config)
    return {key: value for key, value in flat.items() if isinstance(value, (str, int, float, bool))}


def _loss_section(results: Mapping[str, Any], comparison: Comparison) -> Iterable[str]:
    metrics = comparison.metrics("mlm.")
    if not metrics:
        return
    yield (
        "The loss is how badly the model predicts hidden words of texts it has not been trained on, in nats: the lower "
        "the better, and exp(loss) is the perplexity. A text counts in every group it mentions. The worst group is the "
        "one with the highest loss; the gap is its distance to the best group. A small gap with a high loss is no gain: "
        "look at both."
    )
    yield ""
    evaluations = {START: results.get("start") or {}, **results["runs"]}
    held_out = {name: (run.get("evaluation") or {}).get("mlm") for name, run in evaluations.items()}
    worst = [
        f"{run_label(name)}: {mlm['worst_group']}"
        for name, mlm in held_out.items()
        if mlm and mlm["worst_group"]
    ]
    sizes = next(mlm["by_group"] for mlm in held_out.values() if mlm)
    if worst:
        yield f"The worst group is, by model, {'; '.join(worst)}."
    yield "Tokens tested: " + ", ".join(f"{name} {stats['count']:,}" for name, stats in sizes.items()) + "."
    yield ""
    yield from _score_table(comparison, metrics)


def _stereoset_section(comparison: Comparison) -> Iterable[str]:
    metrics = comparison.metrics("stereoset.")
    if not metrics:
        return
    yield (
        "StereoSet (Nadeem et al. 2021) offers the model three words for a gap: a stereotype, an anti-stereotype and an "
        "unrelated word."
    )
    yield ""
    yield "- **SS**, stereotype score: how often it prefers the stereotype to the anti-stereotype. 50 is ideal."
    yield "- **LMS**, language modelling score: how often it prefers a meaningful word to the unrelated one. 100 is ideal."
    yield "- **ICAT** joins both: LMS * min(SS, 100 - SS) / 50. 100 is ideal."
    yield ""
    yield (
        "A model that guesses has SS 50 and LMS 50: a lower SS with a lower LMS can be lost ability rather than less "
        "bias. StereoSet is noisy too (Blodgett et al. 2021), so no score of it shows that a model is free of bias."
    )
    yield ""
    yield from _score_table(comparison, metrics)


def _crows_pairs_section(comparison: Comparison) -> Iterable[str]:
    metrics = comparison.metrics("crows_pairs.")
    if not metrics:
        return
    yield f"> **Warning.** {RELIABILITY_WARNING}"
    yield ""
    yield "How often the model finds the more stereotyping sentence of a pair more probable (original variant). 50 is ideal."
    yield ""
    yield from _score_table(comparison, metrics)


def _further_section(results: Mapping[str, Any], comparison: Comparison) -> Iterable[str]:
    """Parts without a section of their own: each its definition and its scores."""
    evaluations = [
        (run or {}).get("evaluation") or {} for run in (results.get("start"), *results["runs"].values())
    ]
    parts = dict.fromkeys(metric.name.partition(".")[0] for metric in comparison.metrics())
    for part in parts:
        if part not in ("mlm", "stereoset", "crows_pairs"):
            result = next(evaluation[part] for evaluation in evaluations if part in evaluation)
            yield f"**{part}**: {result['definition']}."
            if warning := result.get("reliability_warning"):
                yield from ("", f"> **Warning.** {warning}")
            yield ""
            yield from _score_table(comparison, comparison.metrics(f"{part}."))
            yield ""


def _training_section(results: Mapping[str, Any]) -> Iterable[str]:
    if any(run.get("history") for run in results["runs"].values()):
        yield (
            "Group DRO gives more weight to the groups that have the higher loss at the moment. A weight far above the "
            "dashed line means that the group was hard throughout, not that the text says more about it. Loss curves are "
            "of single batches, so they are noisy; what counts is the loss on held-out text."
        )


def _coverage(groups: Mapping[str, Any]) -> Iterable[str]:
    """Of a ``Coverage`` as a dictionary."""
    if not groups.get("names"):
        return
    texts, words = max(groups["texts"], 1), max(groups["words"], 1)
    yield f"{groups['texts']:,} texts, {groups['words']:,} words. A text can be in several groups."
    yield ""
    rows = [
        [name, f"{own:,}", f"{own / texts:.1%}", f"{own_words:,}", f"{own_words / words:.1%}"]
        for name, own, own_words in zip(
            groups["names"], groups["group_texts"], groups["group_words"], strict=True
        )
    ]
    yield from _table(["group", "texts", "share", "words", "share"], rows)


def _environment(environment: Mapping[str, Any]) -> list[str]:
    return [f"- {key}: {value}" for key, value in sorted(environment.items()) if value is not None]


# Tables and numbers.


def _score_table(comparison: Comparison, metrics: Sequence[Metric], intervals: bool = True) -> list[str]:
    heading = ["", "ideal", *map(run_label, comparison.names), *_contrast_headings(comparison, "−")]
    rows = [
        [m.label, m.ideal, *_values(comparison, m, intervals), *_contrast_cells(comparison, m)]
        for m in metrics
    ]
    return _table(heading, rows)


def _contrasts(comparison: Comparison) -> list[str]:
    """The runs that are compared with the baseline."""
    return list(dict.fromkeys(d.other for d in comparison.differences if d.base == comparison.baseline))


def _contrast_headings(comparison: Comparison, minus: str) -> list[str]:
    return [
        f"{run_label(other)} {minus} {run_label(str(comparison.baseline))}"
        for other in _contrasts(comparison)
    ]


def _contrast_cells(comparison: Comparison, metric: Metric) -> list[str]:
    found = [
        comparison.difference(comparison.baseline, other, metric.name) for other in _contrasts(comparison)
    ]
    return [_change(difference) if difference else "-" for difference in found]


def _values(comparison: Comparison, metric: Metric, intervals: bool = False) -> list[str]:
    cells = []
    for run in comparison.names:
        value, ends = comparison.values[run].get(metric.name), comparison.intervals[run].get(metric.name)
        cell = "-" if value is None else _number(metric, value)
        if intervals and value is not None and ends is not None:
            cell += f" [{_number(metric, ends[0])}, {_number(metric, ends[1])}]"
        cells.append(cell)
    return cells


def _number(metric: Metric, value: float, sign: str = "") -> str:
    return f"{round(value, metric.digits) + 0.0:{sign}.{metric.digits}f}"  # no -0.0


def _change(found: Difference) -> str:
    text = _number(found.metric, found.value, "+")
    if found.low is None or found.high is None:
        return text
    ends = f"[{_number(found.metric, found.low, '+')}, {_number(found.metric, found.high, '+')}]"
    words = _DISTANCES[found.verdict] if found.metric.ideal == "50" else found.verdict
    return f"{text} {ends} {words}"


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(heading), "|" + " --- |" + " ---: |" * (len(heading) - 1), *map(line, rows)]


def _comparison_record(comparison: Comparison) -> dict[str, Any]:
    return {
        "scores": {
            run: {
                name: {"value": value, "interval": comparison.intervals[run].get(name)} for name, value in own.items()
            }
            for run, own in comparison.values.items()
        },
        "differences": [
            {
                "base": d.base, "other": d.other, "score": d.metric.name, "value": d.value,
                "interval": None if d.low is None else [d.low, d.high], "verdict": d.verdict,
            }
            for d in comparison.differences
        ],
        "rule": RULE,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers that are not finite become null, bulky parts are left out."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key not in _BULKY}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


def _write(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, never half of it."""
    part = path.with_name(path.name + ".partial")
    part.write_bytes(content)
    os.replace(part, path)
