"""`robustdebias compare`: finished runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["compare"]


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of finished runs.")],
    out: Annotated[Path, typer.Option("--out", help="Directory of the report.")] = Path("report"),
) -> None:
    """Put finished runs side by side: report.md with plots, metrics.json, and a table here.

    \b
    robustdebias compare runs/erm runs/dro --out report
    """
    from robustdebias.finetuning import as_results, read_run
    from robustdebias.report import comparison_table, write_report

    names = [run.name if len({r.name for r in runs}) == len(runs) else str(run) for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"runs: {', '.join(names)}: a run is named twice")
    if (out / "config.json").exists():
        raise ValueError(f"out: {out} is the directory of a run; choose another one for the report")
    results = as_results(dict(zip(names, map(read_run, runs), strict=True)), "Comparison of fine-tuning runs")
    write_report(out, results)
    print(f"{comparison_table(results)}\n\nthe report is {out / 'report.md'}")
