"""`robustdebias experiment`: methods x seeds x groupings from one file, to tables, plots and a bias card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustdebias.options import DeviceOption

__all__ = ["experiment"]


def experiment(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML file; docs/tutorial.md explains it.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory.", show_default="the file's name, beside it")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir", help="Where the file's paths are looked up.", show_default="beside the file"
        ),
    ] = None,
    device: DeviceOption = "auto",
    plan: Annotated[
        bool, typer.Option("--plan", help="Check everything, print what would be run, and stop.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Train nothing: tables and card of what is finished.")
    ] = False,
) -> None:
    """Compare methods of fine-tuning over several seeds, and write a bias card.

    Everything stands in one TOML file: model, text, groups, methods, seeds,
    what to measure. An interrupted experiment goes on with the same command;
    what is finished is not repeated.

    \b
    robustdebias experiment my.toml --plan          # groups and sizes, before anyone trains
    robustdebias experiment my.toml
    robustdebias experiment my.toml --data-dir data --out results
    """
    from robustdebias.experiments.card import write_card
    from robustdebias.experiments.runner import open_experiment
    from robustdebias.experiments.summary import summarise, write_results
    from robustdebias.modeling import pick_device

    out = config.with_suffix("") if out is None else out
    opened = open_experiment(config, out, data_dir=data_dir, device=pick_device(device))
    if plan or not report:
        print(opened.plan(), flush=True)
    if plan:
        return
    if not report:
        opened.run(lambda line: print(line, flush=True))
    summary = summarise(opened)
    summary["command"] = f"robustdebias experiment {config.name}" + (
        " --data-dir DATA" if data_dir is not None else ""
    )
    write_results(out, summary)
    markdown, html = write_card(out, summary)
    print(f"\nthe card is {html}, and as Markdown {markdown}; every number is in {out / 'results.csv'}")
