"""`robustdebias groups`: which groups a corpus has, before anyone trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustdebias.options import (
    DATA,
    ClustersOption,
    DeviceOption,
    GroupsOption,
    HeldOutOption,
    LabelAxisOption,
    LabelFieldOption,
    Level,
    LevelOption,
    LexiconOption,
    LimitOption,
    MaxLengthOption,
    MinTextsOption,
    RequireOption,
    SeedOption,
    SplitOption,
    TextFieldOption,
)

if TYPE_CHECKING:
    from robustdebias.grouping import Grouping
    from robustdebias.preparation import PreparedCorpus

__all__ = ["groups"]


def groups(
    corpus: Annotated[
        list[str], typer.Argument(metavar="CORPUS...", help="Files, folders or ids of data sets.")
    ],
    text_field: TextFieldOption = "text",
    split: SplitOption = "train",
    limit: LimitOption = None,
    held_out: HeldOutOption = 0.1,
    max_length: MaxLengthOption = 64,
    seed: SeedOption = 0,
    groups: GroupsOption = None,
    lexicon: LexiconOption = None,
    label_field: LabelFieldOption = None,
    label_axis: LabelAxisOption = False,
    level: LevelOption = Level.value,
    clusters: ClustersOption = None,
    min_texts: MinTextsOption = 20,
    require: RequireOption = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="ID|DIR", help="Finds clusters; its tokens are counted.", rich_help_panel=DATA),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="ID|DIR", help="Counts tokens, without a model.", rich_help_panel=DATA),
    ] = None,
    device: DeviceOption = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Directory for coverage.png, groups.json and groups.csv.", rich_help_panel=DATA),
    ] = None,
) -> None:  # fmt: skip
    """Show which groups a corpus has, how they overlap, and which are too small to stand alone.

    Passages are cut, held out and folded exactly as in a finetune with the same
    options. Groups are the corpus's own labels, a label field, words of
    lexicons, or clusters of passages that are alike to a model.

    \b
    robustdebias groups news.txt --out coverage
    robustdebias groups bold/ --level attribute
    robustdebias groups bold/ --groups gender,religion --level intersection
    robustdebias groups a.jsonl b.csv --label-field topic --require nurses
    robustdebias groups news.txt --clusters 8 --model ./my-bert
    """
    from robustdebias.corpus import load_corpora
    from robustdebias.grouping import grouping_for
    from robustdebias.preparation import prepare, words_within

    if clusters is not None and model is None:
        raise ValueError("model: --clusters needs a --model that tells which passages are alike")
    if model is not None and tokenizer is not None:
        raise ValueError("tokenizer: --model brings its own; give one of the two")
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; a directory is needed")
    examples = load_corpora(
        corpus, text_field=text_field, label_field=label_field, split=split, limit=limit,
        label_axis=label_axis or level is not Level.value,
    )  # fmt: skip
    grouping = grouping_for(
        examples, groups=groups, lexicons=lexicon, label_field=label_field, clusters=clusters, level=level.value,
        min_texts=min_texts, seed=seed,
    )  # fmt: skip
    grouping.annotator()  # a lexicon that cannot be read shows before a model is loaded
    encoder, pieces = _loaded(model, tokenizer, device)
    prepared = prepare(
        examples, grouping, max_words=words_within(max_length), held_out=held_out, seed=seed,
        model=encoder, tokenizer=pieces,
    )  # fmt: skip
    print(f"{prepared.describe()}\n{len(prepared.group_names):,} groups to train on", flush=True)
    prepared.require(require or [])
    if out is not None:
        notes = {"corpora": corpus, "held_out": held_out, "max_length": max_length, "seed": seed}
        _write(out, prepared, grouping, notes)
        print(f"\ncoverage.png, groups.json and groups.csv are in {out}")


def _loaded(model: str | None, tokenizer: str | None, device: str) -> tuple[Any, Any]:
    """The model on its device, and the tokenizer; None where none is asked for."""
    if model is not None:
        import warnings

        from robustdebias.modeling import load, pick_device

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a missing head, which clusters do without
            loaded, pieces = load(model)
        return loaded.to(pick_device(device)), pieces
    if tokenizer is not None:
        from transformers import AutoTokenizer

        from robustdebias.modeling import quiet_transformers

        quiet_transformers()
        try:
            return None, AutoTokenizer.from_pretrained(tokenizer, local_files_only=Path(tokenizer).is_dir())
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"tokenizer: cannot load {tokenizer}: {error}") from error
    return None, None


def _write(out: Path, prepared: PreparedCorpus, grouping: Grouping, notes: dict[str, Any]) -> None:
    import csv
    import json
    from collections import Counter
    from dataclasses import asdict

    from robustdebias.coverage_plots import draw_coverage

    counts = [
        Counter(group for piece in side for group in piece.groups or ())
        for side in (prepared.train, prepared.held_out)
    ]
    rows: list[dict[str, Any]] = []
    for row in prepared.coverage.rows():
        name = row["group"]
        state = "kept" if name in prepared.group_names else "folded" if row["texts"] else "absent"
        rows.append({**row, "train": counts[0][str(name)], "held_out": counts[1][str(name)], "state": state})
    figure = draw_coverage(prepared)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "coverage.png", dpi=110)
    with (out / "groups.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    report = {
        **notes,
        "grouping": asdict(grouping),
        "passages": {"train": len(prepared.train), "held_out": len(prepared.held_out)},
        "group_names": prepared.group_names,
        "folded": prepared.folded,
        "groups": rows,
        "coverage": asdict(prepared.coverage),
    }
    (out / "groups.json").write_text(
        json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
