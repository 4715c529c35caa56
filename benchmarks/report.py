"""Reads result files: ``python -m benchmarks.report table|plot|markdown|compare|goals --help``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import goals, plots
from benchmarks.machine import file_name
from benchmarks.results import Row, Run, compare, load, ratio
from benchmarks.tables import duration, run_lines

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Tables, plots and comparisons of result files."
)
RESULT = Path(".benchmarks/latest.json")  # where `make bench` leaves its result
Result = Annotated[Path, typer.Argument(help="A result file.", exists=True, dir_okay=False)]

# The README's table stands between these. Its lines, and its columns: the rows that may fill them.
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
SUMMARY = {
    "logits N=1024 V=30522 fp32": "logits, 1024 x 30522, float32",
    "logits N=1024 V=30522 bf16": "logits, 1024 x 30522, bfloat16",
    "linear N=1024 D=768 V=30522 fp32": "linear, 1024 x 768 x 30522, float32",
    "linear N=154 D=768 V=30522 fp32": "linear, 154 x 768 x 30522, float32",
    "linear N=32 D=768 V=30522 bf16": "linear, 32 x 768 x 30522, bfloat16",
    "BERT-tiny 2x128, 16x128 tokens, training step": "whole step, BERT 2 x 128, 16 x 128 tokens",
    "MiniLM 6x384, 8x128 tokens, training step": "whole step, MiniLM 6 x 384, 8 x 128 tokens",
    "BERT-base 12x768, 8x128 tokens, training step": "whole step, BERT-base, 8 x 128 tokens",
}
COLUMN_ROWS = {
    "floor": ("floor: read, copy", "floor: three bare GEMMs"),
    "torch eager": ("torch eager", "transformers, eager Group DRO"),
    "torch.compile": ("torch.compile", "transformers, torch.compile"),
    "linear_cross_entropy, tuned": ("torch linear_cross_entropy, tuned chunks",),
}


@app.command()
def table(result: Result = RESULT) -> None:
    """Print every case: time, ratios within the run with [smallest, largest] over the repeats, memory, gate."""
    run = load(result)
    typer.echo("\n".join(run_lines(run)))
    typer.echo(f"\nStore it as benchmarks/results/{file_name(run.machine)}")


@app.command()
def plot(result: Result = RESULT, out: Annotated[Path, typer.Option(help="Folder.")] = RESULT.parent) -> None:
    """Write ``speed.png`` (who is how fast, case by case) and ``shapes.png`` (how far from the floor)."""
    for path in plots.write(load(result), out):
        typer.echo(path)


@app.command()
def markdown(
    result: Result = RESULT,
    case: Annotated[list[str] | None, typer.Option(help="A case's name; may be repeated.")] = None,
) -> None:
    """Print the README's table: implementations by cases, time and ratio to ours. By default all cases."""
    run = load(result)
    cases = [name for name in run.cases if not case or name in case]
    names = dict.fromkeys(name for key in cases for name in run.cases[key])
    typer.echo("| | " + " | ".join(cases) + " |")
    typer.echo("|---" * (len(cases) + 1) + "|")
    for name in names:
        cells = [_cell(run, key, run.cases[key].get(name)) for key in cases]
        if any(cells):
            typer.echo(f"| {name} | " + " | ".join(cells) + " |")


@app.command()
def readme(
    result: Result,
    path: Annotated[Path, typer.Argument(help="Rewritten between the two markers.")] = Path("README.md"),
) -> None:
    """Put the summary of a stored result into the README: our time, and everyone's ratio to it."""
    head, rest = path.read_text().split(BEGIN)
    tail = rest.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n{summary(load(result))}\n{END}{tail}")


@app.command(name="compare")
def compare_command(
    baseline: Annotated[Path, typer.Argument(help="A stored result file.", exists=True, dir_okay=False)],
    result: Result = RESULT,
    tolerance: Annotated[
        float, typer.Option(help="How much slower than everything else ours may become.")
    ] = 0.15,
) -> None:
    """Compare our ratios to the peers and floors with a stored run's. Exits with 1 on a regression."""
    stored, fresh = load(baseline), load(result)
    changes = list(compare(stored, fresh))
    if not changes:
        raise typer.BadParameter(f"{baseline} and {result} have no case of ours in common")
    regressions = 0
    for change in changes:
        bad = change.factor is None or change.factor > 1 + tolerance
        regressions += bad
        verdict = change.reason if change.factor is None else f"{100 * (change.factor - 1):+.0f}% time"
        typer.echo(f"{'REGRESSION' if bad else 'ok':<11} {change.case:<40} {change.name:<30} {verdict}")
    left_out = [case for case in stored.cases if case not in fresh.cases]
    if left_out:
        typer.echo(f"not in {result}: {', '.join(left_out)}")
    if regressions:
        typer.echo(f"{regressions} of {len(changes)} slower by more than {100 * tolerance:.0f}%, or gone")
        raise typer.Exit(1)


@app.command(name="goals")
def goals_command(
    results: Annotated[
        list[Path], typer.Argument(help="Result files of a GPU.", exists=True, dir_okay=False)
    ],
) -> None:
    """What was aimed at on a GPU: met, missed, or not measured, in the worst case of these files."""
    typer.echo("\n".join(goals.lines([load(path) for path in results])))


def summary(run: Run) -> str:
    """A Markdown table: a line for each of ``SUMMARY``'s cases that the run has."""
    lines = ["| forward and backward with Group DRO | ours | " + " | ".join(COLUMN_ROWS) + " |"]
    lines.append("|---" * (2 + len(COLUMN_ROWS)) + "|")
    for case, label in SUMMARY.items():
        base = run.base(case)
        if base is None:
            continue
        cells = []
        for names in COLUMN_ROWS.values():
            row = next((row for name, row in run.timed(case).items() if name in names), None)
            cells.append("" if row is None else f"{ratio(row, base).median:.2f}")
        lines.append(f"| {label} | {duration(base.median)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(run: Run, case: str, row: Row | None) -> str:
    if row is None or not (row.seconds or row.failed):
        return ""
    if row.failed:
        return "fails the gate"
    base = run.base(case)
    return f"{duration(row.median)}" + (f" ({ratio(row, base).median:.2f})" if base else "")


if __name__ == "__main__":
    app()
