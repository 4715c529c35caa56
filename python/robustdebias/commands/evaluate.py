"""`robustdebias evaluate`: measure a model."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from robustdebias.options import (
    EVALUATION,
    CorpusOption,
    CrowsPairsOption,
    DataDirOption,
    DeviceOption,
    EvalTextsOption,
    GroupsOption,
    HeadOption,
    HeldOutOption,
    LabelAxisOption,
    LabelFieldOption,
    Level,
    LevelOption,
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


class StereoSetTasks(str, Enum):
    intrasentence = "intrasentence"
    intersentence = "intersentence"
    both = "both"


class CrowsPairsForm(str, Enum):
    original = "original"
    differing = "differing"
    both = "both"


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
    groups: GroupsOption = None,
    lexicon: LexiconOption = None,
    label_field: LabelFieldOption = None,
    label_axis: LabelAxisOption = False,
    level: LevelOption = Level.value,
    min_texts: MinTextsOption = 20,
    stereoset: StereoSetOption = None,
    crows_pairs: CrowsPairsOption = None,
    stereoset_tasks: Annotated[
        StereoSetTasks,
        typer.Option(
            help="intersentence ranks by the checkpoint's next-sentence head, without one by pseudo-likelihood.",
            rich_help_panel=EVALUATION,
        ),
    ] = StereoSetTasks.intrasentence,
    crows_pairs_form: Annotated[
        CrowsPairsForm,
        typer.Option(
            help="original: by the shared tokens; differing: by the others, as bias-bench. Not comparable.",
            rich_help_panel=EVALUATION,
        ),
    ] = CrowsPairsForm.original,
    seat: Annotated[
        Path | None, typer.Option(help="Folder with SEAT's sent-*.jsonl.", rich_help_panel=EVALUATION)
    ] = None,
    neutral: Annotated[
        Path | None,
        typer.Option(help="Neutral texts, one a line: their pseudo-perplexity.", rich_help_panel=EVALUATION),
    ] = None,
    downstream: Annotated[
        Path | None,
        typer.Option(
            help="Folder with a task in GLUE's format, to fine-tune a copy on.", rich_help_panel=EVALUATION
        ),
    ] = None,
    data_dir: DataDirOption = None,
    eval_texts: EvalTextsOption = 2000,
    resume: Annotated[
        bool, typer.Option("--resume", help="Measure only what --out does not hold yet of this model.")
    ] = False,
) -> None:
    """Measure a model: loss by group on a corpus, StereoSet, CrowS-Pairs, SEAT,
    pseudo-perplexity, a downstream task. Writes JSON.

    The model is measured on all of the corpus; with --held-out 0.1 and the
    options of a finetune, on what that held out. A --data-dir may also hold
    seat/, neutral.txt and downstream/.

    \b
    robustdebias evaluate runs/dro --data-dir data --out dro.json
    robustdebias evaluate bert-base-uncased --stereoset dev.json --stereoset-tasks both
    robustdebias evaluate ./my-bert --corpus news.jsonl --text-field body
    """
    from robustdebias.checkpoint import read_json, write_json
    from robustdebias.corpus import load_corpus
    from robustdebias.evaluation.stereoset_inter import with_next_sentence_head
    from robustdebias.finetuning import environment
    from robustdebias.grouping import grouping_for
    from robustdebias.modeling import fingerprint, load, pick_device
    from robustdebias.preparation import prepare, spread, words_within
    from robustdebias.suite import FORMS, TASKS, Suite, find_benchmarks, headline

    chosen = find_benchmarks(
        data_dir,
        stereoset=stereoset,
        crows_pairs=crows_pairs,
        seat=seat,
        neutral=neutral,
        downstream=downstream,
    )
    if not corpus and not any(chosen.values()):
        raise ValueError(
            "nothing to measure on: give --stereoset, --crows-pairs, --seat, --neutral, --downstream, --data-dir or "
            "--corpus"
        )

    texts, names, coverage = [], ["all"], None
    if corpus:
        examples = load_corpus(
            corpus, text_field=text_field, label_field=label_field, split=split, limit=limit,
            label_axis=label_axis or level is not Level.value,
        )  # fmt: skip
        grouping = grouping_for(
            examples, groups=groups, lexicons=lexicon, label_field=label_field, level=level.value,
            min_texts=min_texts, seed=seed,
        )  # fmt: skip
        prepared = prepare(
            examples, grouping, max_words=words_within(max_length), held_out=held_out, seed=seed
        )
        print(prepared.describe(), "\n", flush=True)
        texts = spread(prepared.held_out if held_out else prepared.train, eval_texts)
        names = prepared.group_names
        coverage = asdict(prepared.coverage)
    tasks = list(TASKS) if stereoset_tasks is StereoSetTasks.both else [stereoset_tasks.value]
    forms = list(FORMS) if crows_pairs_form is CrowsPairsForm.both else [crows_pairs_form.value]
    suite = Suite(
        texts,
        names,
        max_length=max_length,
        seed=seed,
        stereoset_tasks=tasks,
        crows_pairs_forms=forms,
        **chosen,
    )
    directory = Path(model) / "model"
    source = directory if directory.is_dir() else model
    loaded, tokenizer = load(source, head)
    if "intersentence" in tasks and chosen["stereoset"] and head is None:
        loaded = with_next_sentence_head(source, loaded)
    weights = fingerprint(loaded)
    known = read_json(out) if resume and out.is_file() else {}
    if known and known.get("weights") != weights:
        raise ValueError(f"out: {out} is not of this model; leave --resume out to replace it")
    record = {"model": model, "weights": weights, "groups": coverage, "environment": environment()}
    out.parent.mkdir(parents=True, exist_ok=True)
    measures = suite.measure(
        loaded.to(pick_device(device)),
        tokenizer,
        known=known,
        save=lambda done: write_json(out, {**record, **done}),
    )
    write_json(out, {**record, "suite": suite.describe(), "evaluation": measures})
    print(f"{headline(measures)}\n\neverything is in {out}")
