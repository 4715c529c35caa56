"""What became of an experiment: the tidy tables, and the one dictionary that the card and its pictures are made from."""

from __future__ import annotations

import csv
import datetime
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robustdebias.checkpoint import RunDirectory, read_json, write_json, write_text
from robustdebias.evaluation.metric import Metric
from robustdebias.experiments.runner import Experiment
from robustdebias.experiments.statistics import (
    RULE,
    START,
    Difference,
    Measured,
    Score,
    compare,
    mean_scores,
    measured,
)
from robustdebias.finetuning import environment
from robustdebias.groups import collect_names
from robustdebias.preparation import PreparedCorpus

__all__ = ["summarise", "write_results"]

_CURVE_POINTS = 60
_FEW_TEXTS = 100
METHOD_LABELS = {
    "erm": ("ERM", "plain fine-tuning: the mean loss over masked tokens"),
    "reweight": ("reweighting", "every token weighted by the inverse size of its groups"),
    "group_dro": ("Group DRO", "more weight to the groups whose loss is higher at the moment"),
    "cvar": ("CVaR over texts", "only the worst share of a batch's texts counts; knows nothing of groups"),
    "chi_square": ("chi-square over texts", "worse texts of a batch weigh more; knows nothing of groups"),
}


def summarise(experiment: Experiment) -> dict[str, Any]:
    """Of the runs that are finished: see :mod:`robustdebias.experiments.card_input` for the dictionary's keys.

    Raises ValueError if none is.
    """
    settings, scores, means, differences = experiment.settings, [], [], []
    training: list[dict[str, Any]] = []
    evaluations: list[Mapping[str, Any]] = []
    baseline = next(iter(settings.methods))
    for grouping in settings.groupings:
        evaluations.append(experiment.start(grouping))
        start = measured(evaluations[-1])
        scores += _tidy(grouping, START, None, start)
        means += mean_scores(grouping, START, [start])
        by_method: dict[str, dict[int, Measured]] = {}
        for method in settings.methods:
            for seed in settings.seeds:
                run = RunDirectory(experiment.out / grouping / method / f"seed-{seed}")
                metrics = read_json(run.metrics) if run.metrics.is_file() and run.result.is_file() else {}
                if metrics.get("suite") != experiment.suites[grouping].describe():
                    continue  # still to be trained, or to be measured
                evaluations.append(metrics["evaluation"])
                found = by_method.setdefault(method, {})[seed] = measured(evaluations[-1])
                scores += _tidy(grouping, method, seed, found)
                training.append(_training(grouping, method, seed, run))
        for method, runs in by_method.items():
            means += mean_scores(grouping, method, list(runs.values()))
            differences += compare(grouping, method, list(runs.values()), START, [start])
            shared = [seed for seed in runs if seed in by_method.get(baseline, {})]
            if method != baseline and shared:
                differences += compare(
                    grouping, method, [runs[seed] for seed in shared], baseline,
                    [by_method[baseline][seed] for seed in shared],
                )  # fmt: skip
    if not training:
        raise ValueError(f"out: no run of {experiment.out} is finished")
    names = dict.fromkeys(score.metric for score in scores)
    return {
        "title": settings.title,
        "description": settings.description,
        "created": datetime.date.today().isoformat(),
        "config_text": experiment.text,
        "model": _model(experiment),
        "data": _data(experiment),
        "groupings": {name: _grouping(experiment, name) for name in settings.groupings},
        "methods": {name: _method(experiment, name) for name in settings.methods},
        "seeds": list(settings.seeds),
        "metrics": {name: _metric(name) for name in names},
        "scores": [asdict(score) for score in scores],
        "means": [asdict(score) for score in means],
        "differences": [difference.record() for difference in differences],
        "training": training,
        "definitions": _texts(evaluations, "definition"),
        "warnings": list(_texts(evaluations, "reliability_warning").values()),
        "caveats": _caveats(experiment, training, differences),
        "interval_rule": RULE,
        "environment": environment(),
    }


def write_results(out: Path, summary: Mapping[str, Any]) -> None:
    """``results.csv`` (a row for each model and score), ``differences.csv``, ``summary.json``; each in one step."""
    for name in ("scores", "differences"):
        rows = summary[name]
        buffer = io.StringIO()
        columns = [column for column in rows[0] if column not in ("per_seed", "seeds")] if rows else []
        writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(out / ("results.csv" if name == "scores" else "differences.csv"), buffer.getvalue())
    write_json(out / "summary.json", summary)


def _tidy(grouping: str, method: str, seed: int | None, model: Measured) -> list[Score]:
    rows = mean_scores(grouping, method, [model])
    return [Score(grouping, method, row.metric, row.value, row.low, row.high, seed) for row in rows]


def _training(grouping: str, method: str, seed: int, run: RunDirectory) -> dict[str, Any]:
    result = run.read_result() or {}
    history: Sequence[Mapping[str, Any]] = result["history"]
    every = max(1, -(-len(history) // _CURVE_POINTS))
    kept = [
        record for number, record in enumerate(history) if number % every == 0 or number == len(history) - 1
    ]
    return {
        "grouping": grouping, "method": method, "seed": seed, "steps": len(history),
        "seconds": round(result["train_seconds"], 1), "tokens_per_second": round(result["tokens_per_second"], 1),
        "counterfactuals": result["config"]["data"].get("counterfactuals"),
        "history": [
            {"step": record["step"], "loss": round(record["loss"], 4), **{
                name: {group: round(value, 5) for group, value in record[name].items()}
                for name in ("group_loss", "group_weight")
            }}
            for record in kept
        ],
    }  # fmt: skip


def _model(experiment: Experiment) -> dict[str, Any]:
    chosen = experiment.settings.model
    model, _ = experiment.load_start()
    return {
        "name": chosen.name, "head": chosen.head, "note": chosen.note, "type": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()), "weights": experiment.start_weights,
    }  # fmt: skip


def _data(experiment: Experiment) -> dict[str, Any]:
    settings = experiment.settings
    first = next(iter(experiment.prepared.values()))
    suite = next(iter(experiment.suites.values()))
    return {
        "corpora": [
            {
                "name": corpus.name or (corpus.source if isinstance(corpus.source, str) else ", ".join(corpus.source)),
                "source": corpus.source if isinstance(corpus.source, str) else ", ".join(corpus.source),
                "license": corpus.licence, "texts": texts, "words": words,
            }
            for corpus, (texts, words) in zip(settings.data.corpora, experiment.texts, strict=True)
        ],
        "train_texts": len(first.train),
        "train_words": sum(len(example.text.split()) for example in first.train),
        "held_out_texts": len(suite.texts),
        "held_out_documents": len({example.document for example in suite.texts}),
        "text_sets": [
            {"name": name, "texts": len(texts), "groups": collect_names(texts)}
            for name, texts in suite.text_sets.items()
        ],
    }  # fmt: skip


def _grouping(experiment: Experiment, name: str) -> dict[str, Any]:
    prepared, chosen = experiment.prepared[name], experiment.settings.groupings[name]
    told = {
        "labels": "ready-made labels of the text",
        "lexicons": f"words of the lexicons {', '.join(chosen.lexicons)}",
        "clusters": f"{chosen.count} clusters of passages that are alike to the model",
        "none": "no groups: all text is one",
    }[chosen.source]
    level = {"attribute": ", by attribute", "value": "", "intersection": ", with intersections"}[chosen.level]
    return {
        "description": f"{told}{level}; groups of fewer than {chosen.min_texts} training passages are folded",
        "names": list(prepared.group_names),
        "train_texts": _sizes(prepared, "train"),
        "held_out_texts": dict(
            Counter(group for example in experiment.suites[name].texts for group in example.groups or ())
        ),
        "train_words": _sizes(prepared, "train", words=True),
        "folded": list(prepared.folded),
    }


def _sizes(prepared: PreparedCorpus, side: str, words: bool = False) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for example in getattr(prepared, side):
        for group in example.groups or ():
            sizes[group] += len(example.text.split()) if words else 1
    return {name: sizes[name] for name in prepared.group_names}


def _method(experiment: Experiment, name: str) -> dict[str, Any]:
    settings = experiment.settings
    method = settings.methods[name]
    config = settings.train_config(name, settings.seeds[0])
    label, description = METHOD_LABELS[config.objective]
    extras = []
    if config.objective == "group_dro" and config.adjustment:
        extras.append("size adjustment")
    if config.cda:
        extras.append("counterfactual pairs (CDA)")
    if config.dropout is not None or config.attention_dropout is not None:
        extras.append("raised dropout")
    if config.objective == "erm" and extras:
        label, description = " + ".join(extras), f"plain fine-tuning with {' and '.join(extras)}"
    elif extras:
        label, description = f"{label} + {' + '.join(extras)}", f"{description}; with {' and '.join(extras)}"
    return {
        "label": method.label or label,
        "description": method.description or description,
        "settings": dict(method.train),
    }


def _metric(name: str) -> dict[str, Any]:
    metric = Metric.of(name)
    return {**asdict(metric), "part": name.partition(".")[0]}


def _texts(evaluations: Sequence[Mapping[str, Any]], key: str) -> dict[str, str]:
    """What the parts say of themselves."""
    return {
        part: str(result[key])
        for evaluation in evaluations
        for part, result in evaluation.items()
        if result.get(key)
    }


def _caveats(
    experiment: Experiment, training: Sequence[Mapping[str, Any]], differences: Sequence[Difference]
) -> list[str]:
    settings = experiment.settings
    notes = []
    planned = len(experiment.cells())
    if len(training) < planned:
        notes.append(f"Only {len(training)} of {planned} runs are finished: this is an intermediate state.")
    if len(settings.seeds) < 2:
        notes.append("One training seed: how much of a difference is due to the seed is not known.")
    elif len(settings.seeds) < 5:
        notes.append(
            f"{len(settings.seeds)} training seeds: enough to see large differences between methods, not small ones."
        )
    for name in settings.groupings:
        sizes = Counter(group for example in experiment.suites[name].texts for group in example.groups or ())
        small = [
            f"{group} ({sizes[group]})"
            for group in experiment.prepared[name].group_names
            if sizes[group] < _FEW_TEXTS
        ]
        if small:
            notes.append(
                f"Fewer than {_FEW_TEXTS} held-out texts in the grouping {name}: {', '.join(small)}. The worst group's "
                "loss may be that of a few sentences."
            )
    judged = [difference for difference in differences if difference.verdict != "no interval"]
    notes.append(
        f"{len(judged)} differences were tested at 95%: about {len(judged) / 20:.0f} of them would leave out zero by chance "
        "if nothing had changed."
    )
    notes.append(
        "Scores of bias benchmarks are about the stereotypes that their authors wrote down, in American English. No score "
        "shows that a model is free of bias, and intrinsic scores such as these are weakly related to harm in use."
    )
    notes.append(
        "A method that lowers a group's loss makes the model better at text about the group, not fairer in itself."
    )
    return notes
