"""`robustdebias finetune`: one run, measured before and after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from robustdebias.options import (
    DATA,
    GROUPS,
    TRAINING,
    AbsentGroups,
    Accumulation,
    BackendOption,
    ClustersOption,
    CorpusOption,
    CrowsPairsOption,
    DataDirOption,
    DeviceOption,
    EvalTextsOption,
    GroupLevel,
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
    ModelOption,
    Objective,
    RequireOption,
    SeedOption,
    SplitOption,
    StereoSetOption,
    TextFieldOption,
)

__all__ = ["finetune"]


def finetune(
    corpus: CorpusOption,
    out: Annotated[Path, typer.Option("--out", help="Directory of the run.", rich_help_panel=DATA)],
    model: ModelOption = "bert-base-uncased",
    head: HeadOption = None,
    text_field: TextFieldOption = "text",
    split: SplitOption = "train",
    limit: LimitOption = None,
    held_out: HeldOutOption = 0.1,
    max_length: MaxLengthOption = 64,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    groups: GroupsOption = None,
    lexicon: LexiconOption = None,
    label_field: LabelFieldOption = None,
    label_axis: LabelAxisOption = False,
    level: LevelOption = Level.value,
    clusters: ClustersOption = None,
    min_texts: MinTextsOption = 20,
    require: RequireOption = None,
    group_level: Annotated[
        GroupLevel,
        typer.Option(
            help="All tokens of a text, or only those of demographic words.", rich_help_panel=GROUPS
        ),
    ] = GroupLevel.sequence,
    objective: Annotated[
        Objective,
        typer.Option(
            help="What is minimised: the mean loss, the mean weighted by inverse group size, that of the worst groups, "
            "or that of the worst texts (cvar and chi_square, which need no groups).",
            rich_help_panel=TRAINING,
        ),
    ] = Objective.group_dro,
    step_size: Annotated[
        float | None,
        typer.Option(
            help="group_dro: of the group weights.", show_default="5 / steps", rich_help_panel=TRAINING
        ),
    ] = None,
    adjustment: Annotated[
        float, typer.Option(help="group_dro: C of the size adjustment C/sqrt(N).", rich_help_panel=TRAINING)
    ] = 0.0,
    absent_groups: Annotated[
        AbsentGroups,
        typer.Option(
            help="group_dro: weight of a group that a batch has nothing of: kept, or lowered as published.",
            rich_help_panel=TRAINING,
        ),
    ] = AbsentGroups.hold,
    alpha: Annotated[
        float, typer.Option(help="cvar: the worst share of texts that counts.", rich_help_panel=TRAINING)
    ] = 0.2,
    radius: Annotated[
        float, typer.Option(help="chi_square: of the ball around equal weights.", rich_help_panel=TRAINING)
    ] = 1.0,
    cda: Annotated[
        bool,
        typer.Option(
            "--cda",
            help="Train on counterfactual pairs, by the lexicons of --groups.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    raised_dropout: Annotated[
        bool,
        typer.Option(
            "--raised-dropout",
            help="Dropout of 0.20, in attention 0.15, as a baseline against bias.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TRAINING)] = 1e-4,
    batch_size: Annotated[int, typer.Option(help="Passages a batch.", rich_help_panel=TRAINING)] = 32,
    accumulate: Annotated[int, typer.Option(help="Batches a step.", rich_help_panel=TRAINING)] = 1,
    accumulation: Annotated[
        Accumulation,
        typer.Option(
            help="These batches as one large batch, or each by itself: no second forward for DRO.",
            rich_help_panel=TRAINING,
        ),
    ] = Accumulation.exact,
    epochs: Annotated[float, typer.Option(help="Passes over the text.", rich_help_panel=TRAINING)] = 1.0,
    max_steps: Annotated[
        int | None, typer.Option(help="Steps; wins over --epochs.", rich_help_panel=TRAINING)
    ] = None,
    warmup: Annotated[float, typer.Option(help="Share of the steps.", rich_help_panel=TRAINING)] = 0.1,
    weight_decay: Annotated[float, typer.Option(rich_help_panel=TRAINING)] = 0.01,
    clip: Annotated[float, typer.Option(help="Largest gradient norm.", rich_help_panel=TRAINING)] = 1.0,
    mask_probability: Annotated[float, typer.Option(rich_help_panel=TRAINING)] = 0.15,
    whole_word: Annotated[bool, typer.Option("--whole-word", rich_help_panel=TRAINING)] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Autocast to bfloat16.", rich_help_panel=TRAINING)
    ] = False,
    eval_every: Annotated[
        int,
        typer.Option(help="Steps between evaluations on held-out text; 0: none.", rich_help_panel=TRAINING),
    ] = 0,
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0: none.", rich_help_panel=TRAINING)
    ] = 100,
    backend: BackendOption = "auto",
    stereoset: StereoSetOption = None,
    crows_pairs: CrowsPairsOption = None,
    data_dir: DataDirOption = None,
    eval_texts: EvalTextsOption = 2000,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --out, with the same options.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
) -> None:
    """Fine-tune a masked language model on a corpus, and measure it before and after.

    The corpus is a text file (a document a line, or blank lines between
    documents), JSON lines, BOLD's JSON, a folder of these, or a Hugging Face
    data set. Groups come from lexicons, or from a column of labels.

    \b
    robustdebias finetune --corpus news.jsonl --text-field body --out runs/dro
    robustdebias finetune --corpus wiki.txt --out runs/trades \\
        --groups gender,religion:any --lexicon trades.txt
    robustdebias finetune --corpus bold/ --model ./my-bert --out runs/erm \\
        --objective erm --max-steps 500
    robustdebias finetune --corpus wiki.txt --out runs/cda \\
        --objective erm --cda

    Ctrl-C saves the state and stops; the same command with --resume goes on
    from there and ends in the same numbers as an uninterrupted run.
    """
    from robustdebias.checkpoint import RunDirectory
    from robustdebias.config import RAISED_DROPOUT, TrainConfig
    from robustdebias.corpus import load_corpus
    from robustdebias.finetuning import as_results, fine_tune, swapper_for
    from robustdebias.grouping import grouping_for
    from robustdebias.modeling import load, pick_device
    from robustdebias.preparation import prepare, spread, words_within
    from robustdebias.report import comparison_table
    from robustdebias.suite import Suite, benchmark_files

    config = TrainConfig(
        objective=objective.value, step_size=step_size, adjustment=adjustment, absent_groups=absent_groups.value,
        alpha=alpha, radius=radius, cda=cda,
        lr=lr, warmup=warmup, weight_decay=weight_decay, clip=clip, batch_size=batch_size, accumulate=accumulate,
        accumulation=accumulation.value, max_length=max_length, mask_probability=mask_probability, whole_word=whole_word,
        group_level=group_level.value, epochs=epochs, max_steps=max_steps, bf16=bf16, eval_every=eval_every,
        save_every=save_every, seed=seed, backend=backend,
    )  # fmt: skip
    if raised_dropout:
        config = replace(config, **RAISED_DROPOUT)
    RunDirectory(out).check(resume=resume, overwrite=overwrite)
    examples = load_corpus(
        corpus, text_field=text_field, label_field=label_field, split=split, limit=limit,
        label_axis=label_axis or level is not Level.value,
    )  # fmt: skip
    grouping = grouping_for(
        examples, groups=groups, lexicons=lexicon, label_field=label_field, clusters=clusters, level=level.value,
        min_texts=min_texts, seed=seed,
    )  # fmt: skip
    if group_level is GroupLevel.token and (grouping.source != "lexicons" or level is Level.intersection):
        raise ValueError(
            "group_level: token needs groups of words: lexicons, not at the level of intersections"
        )
    annotator = grouping.annotator()
    swapper = swapper_for(grouping.lexicons, seed) if cda else None
    encoder, tokenizer = load(model, head) if clusters is not None else (None, None)
    prepared = prepare(
        examples, grouping, max_words=words_within(max_length), held_out=held_out, seed=seed,
        model=encoder and encoder.to(pick_device(device)), tokenizer=tokenizer,
    )  # fmt: skip
    print(prepared.describe(), "\n", flush=True)
    prepared.require(require or [])
    suite = Suite(
        spread(prepared.held_out, eval_texts), prepared.group_names, *benchmark_files(stereoset, crows_pairs, data_dir),
        max_length=max_length, seed=seed,
    )  # fmt: skip
    run = fine_tune(
        config, lambda: load(model, head), prepared, suite, out, annotator=annotator, swapper=swapper,
        device=pick_device(device), resume=resume, overwrite=overwrite, notes={"model": model, "head": head and str(head), "corpus": corpus},
    )  # fmt: skip
    method = objective.value + " + cda" * cda + " + dropout" * raised_dropout
    print(f"\n{comparison_table(as_results({method: run}, str(out)))}\n\nthe model is in {out / 'model'}")
