"""The demo: one model fine-tuned with ERM and with Group DRO from the same start, and what became of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from robustdebias.checkpoint import read_json, write_json
from robustdebias.config import TrainConfig
from robustdebias.corpus import load_corpus
from robustdebias.demo_assets import fetch
from robustdebias.finetuning import as_results, fine_tune
from robustdebias.modeling import fingerprint, load
from robustdebias.preparation import annotator_for, prepare, words_within
from robustdebias.report import comparison_table, write_report
from robustdebias.suite import Suite, benchmark_files, headline

__all__ = ["HEAD_FILE", "run_demo"]

HEAD_FILE = Path(__file__).parent / "data" / "minilm_mlm_head.safetensors"

# A thousand news articles name few religions and ethnicities, so each of these is one group.
LEXICONS = "gender,race:any,religion:any"
HELD_OUT = 0.4  # of the articles: rare groups need enough text to be measured on

NOTES = (
    "Both runs start from the same weights and see the same batches, masks and dropout; only the weighting of the "
    "groups differs.",
    "One seed, a few hundred thousand tokens, groups of a few dozen held-out passages: differences of this size may "
    "well be chance. The demo shows how the method works, not that it works.",
    "Group DRO minimises the loss of the worst group. Nothing makes it lower a stereotype score: whether it does is "
    "what the benchmarks ask.",
    "A text is in a group if it mentions a word of the group's lexicon, and in several if it mentions several.",
)


def run_demo(
    out: Path,
    *,
    steps: int,
    model: str | None = None,
    head: Path | None = None,
    corpus: str | None = None,
    text_field: str = "text",
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> dict[str, Any]:
    """Fine-tune twice, evaluate three times, write the report to ``out``; go on where an earlier call stopped.

    ``model`` and ``corpus`` take the place of the demo's own; without both, nothing is downloaded. Returns what
    the report was made from. Raises ValueError if ``out`` holds something else, or a demo with other settings.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "start").is_dir())):
        raise ValueError(f"out: {out} holds something else than a demo; choose another directory")
    stereoset, crows_pairs = benchmark_files(None, None, data_dir)
    if model is None or corpus is None:
        _say("the model and the texts")
        assets = fetch(cache_dir)
        stereoset = stereoset or assets.stereoset
        if model is None:
            model, head = str(assets.model_dir), head or HEAD_FILE
        if corpus is None:
            corpus, text_field = str(assets.corpus), assets.corpus_field

    config = TrainConfig(max_steps=steps, seed=seed, backend=backend, save_every=25)
    annotator = annotator_for(LEXICONS)
    examples = load_corpus(corpus, text_field=text_field)
    prepared = prepare(
        examples, annotator, max_words=words_within(config.max_length), held_out=HELD_OUT, seed=seed
    )
    print(prepared.describe(), flush=True)
    suite = Suite(
        prepared.held_out, prepared.group_names, stereoset, crows_pairs,
        max_length=config.max_length, seed=seed,
    )  # fmt: skip
    notes = {"model": model, "head": head and str(head), "corpus": corpus}
    _say("the start: what the model knows and prefers before any fine-tuning")
    start = _measured_start(out / "start", model, head, suite, corpus, device)
    print(headline(start), flush=True)
    runs = {}
    for objective in ("erm", "group_dro"):
        _say(f"fine-tuning with {objective}, {steps} steps of {config.batch_size} passages")
        directory = out / objective
        runs[objective] = fine_tune(
            replace(config, objective=objective), lambda: load(model, head), prepared, suite,
            directory, start=start, device=device, resume=(directory / "config.json").is_file(), notes=notes,
        )  # fmt: skip
        print(headline(runs[objective]["evaluation"]), flush=True)
    results = as_results(runs, "What fine-tuning did", NOTES)
    write_report(out, results)
    _say("the comparison")
    print(f"{comparison_table(results)}\n\nthe report is {out / 'report.md'}")
    return results


def _measured_start(
    folder: Path, model: str, head: Path | None, suite: Suite, corpus: str, device: torch.device | str
) -> dict[str, Any]:
    """The start's evaluation, read if it was made before. Raises ValueError if that was with other settings."""
    path = folder / "metrics.json"
    loaded, tokenizer = load(model, head)
    made_with = {"suite": suite.describe(), "corpus": corpus, "weights": fingerprint(loaded)}
    if path.is_file():
        saved = read_json(path)
        if saved["made_with"] != made_with:
            raise ValueError(
                f"out: {folder.parent} holds a demo with other settings; choose another directory"
            )
        return saved["evaluation"]
    folder.mkdir(parents=True, exist_ok=True)
    measures = suite.measure(loaded.to(device), tokenizer)
    write_json(path, {"made_with": made_with, "evaluation": measures})
    return measures


def _say(line: str) -> None:
    print(f"\n== {line}", flush=True)
