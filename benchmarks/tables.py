"""A run as text. Needs the standard library only: a machine with a GPU may have no more than torch."""

from __future__ import annotations

from benchmarks.results import Row, Run, ratio

COLUMNS = "{:<46} {:>11} {:>21} {:>9} {:>9}  {}"


def run_lines(run: Run) -> list[str]:
    """The machine, the rates, and the table of every case."""
    head = [f"{key}: {value}" for key, value in {**run.machine, **run.rates}.items() if value is not None]
    return head + [line for case in run.cases for line in ("", *case_lines(run, case))]


def case_lines(run: Run, case: str) -> list[str]:
    """The table of one case, fastest first; then who was not timed and why."""
    base = run.base(case)
    base_name = base.name if base else "ours"
    lines = [COLUMNS.format(case, "time", f"/ {base_name}", "/ floor", "peak MiB", "note").rstrip()]
    lines.append("-" * len(lines[0]))
    for row in sorted(run.timed(case).values(), key=lambda row: row.median):
        floor = run.floor(case, row)
        lines.append(
            COLUMNS.format(
                row.name,
                duration(row.median),
                str(ratio(row, base)) if base else "",
                f"{ratio(row, floor).median:.2f}" if floor else "",
                "" if row.peak_mib is None else f"{row.peak_mib:.0f}",
                _note(run, row),
            ).rstrip()
        )
    for row in run.cases[case].values():
        if row.rejected:
            lines.append(f"{row.name:<46} {'FAILED' if row.failed else 'not timed'}: {row.rejected}")
    return lines + group_costs(run, case)


def _note(run: Run, row: Row) -> str:
    tokens = "" if row.tokens is None else f"{row.tokens / row.median:,.0f} tokens/s"
    return ", ".join(filter(None, (tokens, bandwidth(run, row), products(run, row), row.note)))


def products(run: Run, row: Row) -> str:
    """Of the FLOPs that an exact step needs, and as a share of the run's large product."""
    if row.flops is None:
        return ""
    rate = row.flops / row.median / 1e12
    return f"{rate:.0f} TFLOP/s, {rate / run.rates['GEMM bf16 TFLOP/s']:.0%} of a large GEMM"


def bandwidth(run: Run, row: Row) -> str:
    """Of the bytes that an exact step must move, and as a share of the run's copy (bytes read and written)."""
    if row.nbytes is None:
        return ""
    rate = row.nbytes / row.median / 1e9
    return f"{rate:.0f} GB/s, {rate / run.rates['copy GB/s']:.0%} of copy"


def group_costs(run: Run, case: str) -> list[str]:
    """What Group DRO adds to an implementation's own mean over the rows."""
    rows = run.timed(case)
    return [
        f"Group DRO on top of {words}, {name}: time x {ratio(row, mean)}"
        for name, row in rows.items()
        for suffix, words in (("plain mean", "the plain mean"), ("ERM", "ERM"))
        if (mean := rows.get(f"{name}, {suffix}")) is not None
    ]


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:.1f} us"
    return f"{1e3 * seconds:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"
