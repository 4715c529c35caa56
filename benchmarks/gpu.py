"""``python -m benchmarks.gpu``: the logits op, the linear op and a fine-tuning step on a GPU, each beside its peers.

Needs torch and rd_kernels only, and transformers for the step. Each suite ends within a time limit.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import goals, machine
from benchmarks.laps import Bench, EventClock, Problem, copy_rate, gemm_rate
from benchmarks.results import Run, save
from benchmarks.suites import SUITES
from benchmarks.tables import run_lines

NEEDS = {"step": "transformers"}


def measure_within(
    bench: Bench, problems: Sequence[Problem], limit: float, free: Callable[[], int], result: Path,
    now: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Problem after problem, stored after each. One is left out, and named, if ``limit`` seconds from now would not
    hold the slowest so far, or ``free()`` bytes not what it needs."""
    start, slowest = now(), 0.0
    left_out = []
    before = bench.run.machine.get("left out")
    for problem in problems:
        began = now()
        if began - start + slowest > limit:
            left_out.append(f"{problem.table('both')}: time")
        elif problem.needs > free():
            left_out.append(f"{problem.table('both')}: memory")
        else:
            bench.measure(problem, problem.contestants())
            slowest = max(slowest, now() - began)
            print(f"{problem.table('both')}: {now() - began:.0f} s", flush=True)
        bench.run.machine["left out"] = "; ".join(filter(None, (before, *left_out))) or None
        save(bench.run, result)


def free_memory() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="default: all")
    parser.add_argument("--result", type=Path, default=Path(".benchmarks/gpu.json"), help="the result file")
    parser.add_argument("--seconds", type=float, default=450, help="limit of a suite (default: %(default)s)")
    parser.add_argument(
        "--only", default="", help="problems whose name contains this, such as V=30522 or bf16"
    )
    options = parser.parse_args()
    chosen = {
        name: [problem for problem in SUITES[name] if options.only in problem.table("both")]
        for name in options.suite
    }
    if reason := refusal(chosen, options.only):
        print(reason, file=sys.stderr)
        return 2
    clock = EventClock()
    rates = {"copy GB/s": copy_rate(clock, "cuda"), "GEMM bf16 TFLOP/s": gemm_rate(clock, "cuda")}
    bench = Bench(Run(machine.describe("cuda") | {"suites": " ".join(options.suite)}, rates), clock)
    for problems in chosen.values():
        measure_within(bench, problems, options.seconds, free_memory, options.result)
    print("\n".join([*run_lines(bench.run), "", *goals.lines([bench.run])]))
    print(
        f"\nwritten to {options.result}; stored, it is benchmarks/results/{machine.file_name(bench.run.machine)}"
    )
    rows = [row for case in bench.run.cases.values() for row in case.values()]
    return int(any(row.failed and row.kind == "ours" for row in rows) or not any(row.seconds for row in rows))


def refusal(chosen: dict[str, list[Problem]], only: str) -> str | None:
    """Why there is nothing to measure."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if not any(chosen.values()):
        return f"no problem is called {only!r}"
    for suite, problems in chosen.items():
        package = NEEDS.get(suite)
        if problems and package and importlib.util.find_spec(package) is None:
            return f"{package} is not installed; --suite chooses what does not need it"
    return None


if __name__ == "__main__":
    raise SystemExit(main())
