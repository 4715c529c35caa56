"""`robustdebias evaluate`: measure a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from robustdebias.options import (
    CorpusOption,
    CrowsPairsOption,
    DataDirOption,
    DeviceOption,
    EvalTextsOption,
    GroupsOption,
    HeadOption,
    HeldOutOption,
    LabelFieldOption,
    LexiconOption,
    LimitOption,
    MaxLengthOption,
    MinTextsOption,
    SeedOption,
    SplitOption,
    StereoSetOption,
    TextFieldOption,
)

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, directory, or the directory of a run.")
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("metrics.json"),
    head: HeadOption = None,
    corpus: CorpusOption = "",
    text_field: TextFieldOption = "text",
    split: SplitOption = "train",
    limit: LimitOption = None,
    held_out: HeldOutOption = 0.0,
    max_length: MaxLengthOption = 64,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    groups: GroupsOption = "gender,race,religion",
    lexicon: LexiconOption = None,
    label_field: LabelFieldOption = None,
    min_texts: MinTextsOption = 20,
    stereoset: StereoSetOption = None,
    crows_pairs: CrowsPairsOption = None,
    data_dir: DataDirOption = None,
    eval_texts: EvalTextsOption = 2000,
) -> None:
    """Measure a model: loss by group on a corpus, StereoSet, CrowS-Pairs. Writes JSON.

    The model is measured on all of the corpus; with --held-out 0.1 and the
    options of a finetune, on what that held out.

    \b
    robustdebias evaluate runs/dro --data-dir data --out dro.json
    robustdebias evaluate bert-base-uncased --stereoset dev.json
    robustdebias evaluate ./my-bert --corpus news.jsonl --text-field body
    """
    from robustdebias.checkpoint import write_json
    from robustdebias.corpus import load_corpus
    from robustdebias.finetuning import environment
    from robustdebias.modeling import load, pick_device
    from robustdebias.preparation import annotator_for, prepare, spread, words_within
    from robustdebias.suite import Suite, benchmark_files, headline

    chosen = benchmark_files(stereoset, crows_pairs, data_dir)
    if not corpus and not any(chosen):
        raise ValueError("nothing to measure on: give --stereoset, --crows-pairs, --data-dir or --corpus")

    texts, names, coverage = [], ["all"], None
    if corpus:
        prepared = prepare(
            load_corpus(corpus, text_field=text_field, label_field=label_field, split=split, limit=limit),
            None if label_field else annotator_for(groups, lexicon),
            max_words=words_within(max_length), held_out=held_out, min_texts=min_texts, seed=seed,
        )  # fmt: skip
        print(prepared.describe(), "\n", flush=True)
        texts = spread(prepared.held_out if held_out else prepared.train, eval_texts)
        names = prepared.group_names
        coverage = asdict(prepared.coverage)
    suite = Suite(texts, names, *chosen, max_length=max_length, seed=seed)
    directory = Path(model) / "model"
    loaded, tokenizer = load(directory if directory.is_dir() else model, head)
    measures = suite.measure(loaded.to(pick_device(device)), tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {
        "model": model, "suite": suite.describe(), "evaluation": measures, "groups": coverage,
        "environment": environment(),
    })  # fmt: skip
    print(f"{headline(measures)}\n\neverything is in {out}")
