"""``python -m benchmarks.gpu``: the logits op on a GPU beside its peers, forward, backward and both, within a time limit.

Needs torch and rd_kernels only. GPU time by CUDA events: a pause on the GPU hides what the host takes to launch a
step, except where a step itself waits for the GPU. Before each step another buffer is read, so that the L2 cache
holds none of the logits; the backward follows its forward, as in training.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from benchmarks import gate, machine, others
from benchmarks.bench import YARDSTICKS
from benchmarks.cases import DTYPES, LogitsCase, LogitsInputs, Result, targets
from benchmarks.floor import FreshFloor, InPlaceFloor, read
from benchmarks.peers import (
    Compiled,
    CompiledMean,
    Eager,
    EagerMean,
    Ours,
    OursERM,
    OursInPlace,
    OursMean,
    Peer,
    differentiated,
    on,
)
from benchmarks.results import Row, Run, save
from benchmarks.tables import run_lines

REPEATS, MOST_LAPS = 5, 20  # ratios are taken within a repeat; laps of one implementation in a repeat
SECONDS = 3.0  # of timing for one problem, admission apart
COPIES = 2.2  # of the logits that must fit into free memory: they, their gradient, and the small rest
PASSES = {"forward": 1, "backward": 2, "both": 3}  # of N V elements: read; read and write; all of it


@dataclass(frozen=True)
class Problem(LogitsCase):
    """Inputs are made on the device: 2^31 random numbers are a minute's work on a CPU."""

    dtype: str = "bf16"

    def inputs(self, device: str) -> LogitsInputs:
        logits = torch.empty(self.rows, self.vocabulary, dtype=DTYPES[self.dtype], device=device)
        self.fill(logits)
        generator = torch.Generator().manual_seed(1)
        return LogitsInputs(logits.requires_grad_(), *targets(self, generator, device))

    def fill(self, logits: Tensor) -> None:
        """The logits as they were before a step in place overwrote them."""
        with torch.no_grad():
            logits.normal_(generator=torch.Generator(logits.device).manual_seed(0))

    @property
    def nbytes(self) -> int:
        return self.rows * self.vocabulary * DTYPES[self.dtype].itemsize

    def pass_name(self, which: str) -> str:
        return f"{self.name}, {which}"


VOCABULARIES = (30522, 50257, 128256, 262144)
# The most important first: what the time limit cuts off is the end.
PROBLEMS = tuple(
    Problem(rows, vocabulary, dtype)
    for dtype, all_rows in (("bf16", (4096, 16384)), ("fp32", (4096,)), ("bf16", (2048, 65536)), ("fp32", (2048, 16384, 65536)))
    for rows in all_rows
    for vocabulary in VOCABULARIES
)  # fmt: skip
COMPILED = {(4096, 30522), (4096, 128256)}  # compiling takes longer than everything else of a problem


def peers(problem: Problem) -> list[Peer]:
    ours = [
        on(name, peer)
        for name in ("cuda", "triton")
        for peer in (Ours(), OursERM(), OursMean(), OursInPlace())
    ]
    compiled = [Compiled(), CompiledMean()] if (problem.rows, problem.vocabulary) in COMPILED else []
    rest = [Eager(), EagerMean(), *others.LOGITS, *others.LOGITS_MEAN]
    return [FreshFloor(), InPlaceFloor(), *ours, *rest, *compiled]


class Clock(Protocol):
    def lap(self, forward: Callable, backward: Callable) -> tuple[float, float]:
        """Seconds of ``forward()`` and of ``backward(what it returned)``, on the device."""


class EventClock:
    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.buffer = torch.zeros(
            max(4 * properties.L2_cache_size, 1 << 28), dtype=torch.uint8, device="cuda"
        )
        self.pause = 0  # cycles

    def lap(self, forward: Callable, backward: Callable) -> tuple[float, float]:
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        read(self.buffer.view(torch.int16))
        torch.cuda._sleep(self.pause)
        launched = time.perf_counter()
        start.record()
        loss = forward()
        middle.record()
        backward(loss)
        end.record()
        # At 2 GHz the pause is a little longer than the last launch took; 10 ms are enough for any of them.
        self.pause = int(3e9 * min(0.01, time.perf_counter() - launched))
        end.synchronize()
        return start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3


@dataclass
class Entry:
    """An implementation that was admitted to a problem."""

    peer: Peer
    rows: dict[str, Row]  # by pass
    forward: Callable[[], object]
    backward: Callable[[object], object]
    restore: Callable[[], None] | None
    seconds: float  # of one lap


class Bench:
    def __init__(self, run: Run, clock: Clock, device: str = "cuda"):
        self.run, self.clock, self.device = run, clock, device

    def measure(self, problem: Problem, contestants: Sequence[Peer]) -> None:
        """Admit every implementation, then time them in turn, in an order that rotates from repeat to repeat."""
        inputs = problem.inputs(self.device)
        expected: dict[bool, tuple[Result, dict[str, float]]] = {}
        admitted = [self._admit(problem, inputs, peer, expected) for peer in contestants]
        entries = [entry for entry in admitted if entry is not None]
        laps = schedule(sum(entry.seconds for entry in entries))
        for repeat in range(REPEATS):
            turn = 2 * repeat % max(1, len(entries))
            for entry in entries[turn:] + entries[:turn]:
                times = [self._lap(entry) for _ in range(laps)]
                columns = {"forward": [f for f, _ in times], "backward": [b for _, b in times]}
                columns["both"] = [f + b for f, b in times]
                for which, seconds in columns.items():
                    entry.rows[which].seconds.append(float(f"{statistics.median(seconds):.4g}"))

    def _lap(self, entry: Entry) -> tuple[float, float]:
        if entry.restore is not None:
            entry.restore()
        return self.clock.lap(entry.forward, entry.backward)

    def _admit(self, problem: Problem, inputs: LogitsInputs, peer: Peer, expected: dict) -> Entry | None:
        """Gate ``peer`` against float64, warm it up, find its memory. None, and why, where it is not timed."""
        kind = "floor" if not peer.gated else "ours" if peer.ours else "peer"
        rows = {
            which: self.run.row(
                problem.pass_name(which),
                Row(peer.name, kind, peer.overwrites, nbytes=passes * problem.nbytes),
            )
            for which, passes in PASSES.items()
        }
        restore = (lambda: problem.fill(inputs.logits)) if peer.overwrites else None
        rejected, failed = peer.missing(self.device) or peer.refuses(problem), False
        try:
            if rejected is None and peer.gated:
                verdict = self._verdict(problem, inputs, peer, expected)
                rows["both"].error = str(verdict)
                if not verdict.passed:
                    rejected, failed = str(verdict), True
            if rejected is None:
                # A state of its own: the gate of the next one starts from the same q.
                forward, backward = halves(peer, replace(inputs, q=inputs.q.clone()))
                entry = Entry(peer, rows, forward, backward, restore, 0.0)
                for _ in range(3):
                    entry.seconds = sum(self._lap(entry))
                rows["both"].peak_mib = machine.peak_memory(lambda: backward(forward()), self.device)
                return entry
        except torch.OutOfMemoryError:
            rejected = "out of memory"
        except Exception as error:  # another project's kernel may raise anything; ours is reported as FAILED
            rejected, failed = f"{type(error).__name__}: {error}".partition("\n")[0][:200], True
        finally:
            if restore is not None:
                restore()
        for row in rows.values():
            row.rejected, row.failed = rejected, failed
        return None

    def _verdict(self, problem: Problem, inputs: LogitsInputs, peer: Peer, expected: dict) -> gate.Verdict:
        if peer.groups not in expected:
            head = inputs.head(problem.gate_rows)
            exact = problem.exact(head, peer.groups)
            eager = YARDSTICKS[peer.groups].step(inputs.head(problem.gate_rows))
            expected[peer.groups] = exact, gate.errors(eager, exact)
        forward, backward = halves(peer, inputs.head(problem.gate_rows))
        return gate.judge(backward(forward()), *expected[peer.groups], peer.ours)


def halves(peer: Peer, inputs: LogitsInputs) -> tuple[Callable, Callable]:
    """A step's forward and its backward, which takes what the forward returned."""
    if peer.gated:
        return peer.forward(inputs), lambda loss: differentiated(loss, inputs, peer.groups)
    logits = inputs.logits.detach()
    if peer.overwrites:
        return lambda: read(logits), lambda _: logits.neg_()
    return lambda: read(logits), lambda _: logits.clone()  # a target that is kept would be a third of COPIES


def schedule(turn: float) -> int:
    """Laps in a repeat, where one lap of every implementation takes ``turn`` seconds."""
    return max(2, min(MOST_LAPS, int(SECONDS / REPEATS / max(turn, 1e-6))))


def copy_rate(clock: Clock, device: str, nbytes: int = 1 << 30) -> float:
    """GB/s, bytes read and written, of a device-to-device copy."""
    source, target = torch.empty(2, nbytes, dtype=torch.uint8, device=device).random_()  # zeros may be faster
    seconds = [clock.lap(lambda: target.copy_(source), lambda _: None)[0] for _ in range(20)]
    return round(2 * nbytes / statistics.median(seconds) / 1e9, 1)


def measure_within(
    bench: Bench, problems: Sequence[Problem], limit: float, free: Callable[[], int], result: Path,
    now: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Problem after problem, stored after each. One is left out, and named, if ``limit`` seconds from now would not
    hold the slowest so far, or ``free()`` bytes not ``COPIES`` of its logits."""
    start, slowest = now(), 0.0
    left_out = {}
    for problem in problems:
        began = now()
        if began - start + slowest > limit:
            left_out[problem.name] = "time"
        elif COPIES * problem.nbytes > free():
            left_out[problem.name] = "memory"
        else:
            bench.measure(problem, peers(problem))
            slowest = max(slowest, now() - began)
            print(f"{problem.name}: {now() - began:.0f} s", flush=True)
        bench.run.machine["left out"] = "; ".join(f"{name}: {why}" for name, why in left_out.items()) or None
        save(bench.run, result)


def free_memory() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--result", type=Path, default=Path(".benchmarks/gpu.json"), help="the result file")
    parser.add_argument("--seconds", type=float, default=450, help="time limit (default: %(default)s)")
    parser.add_argument(
        "--only", default="", help="problems whose name contains this, such as V=30522 or bf16"
    )
    options = parser.parse_args()
    problems = [problem for problem in PROBLEMS if options.only in problem.name]
    if not torch.cuda.is_available() or not problems:
        reason = (
            f"no problem is called {options.only!r}" if torch.cuda.is_available() else "torch sees no GPU"
        )
        print(reason, file=sys.stderr)
        return 2
    clock = EventClock()
    bench = Bench(Run(machine.describe("cuda"), {"copy GB/s": copy_rate(clock, "cuda")}), clock)
    measure_within(bench, problems, options.seconds, free_memory, options.result)
    print("\n".join(run_lines(bench.run)))
    print(
        f"\nwritten to {options.result}; stored, it is benchmarks/results/{machine.file_name(bench.run.machine)}"
    )
    rows = [row for case in bench.run.cases.values() for row in case.values()]
    return int(any(row.failed and row.kind == "ours" for row in rows) or not any(row.seconds for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
