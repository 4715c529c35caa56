"""How one implementation is timed in one case: gated, tuned, its memory measured, then timed once for each repeat."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import gate, machine
from benchmarks.cases import Result
from benchmarks.floor import Floor, rates
from benchmarks.peers import Eager, EagerMean, Peer, Step
from benchmarks.results import Row, Run

SECONDS = 0.3  # of timing for one implementation in one repeat; a step slower than that is timed once
BLOCKS, INTERLEAVED_SECONDS = 5, 1.5  # of a case whose implementations take turns step by step
YARDSTICKS = {True: Eager(), False: EagerMean()}  # with Group DRO, and as a plain mean


class Rejected(Exception):
    """There is nothing to time: the implementation is missing here or cannot serve the case, or it ``failed``."""

    def __init__(self, reason: str, failed: bool):
        super().__init__(reason)
        self.failed = failed


class Bench:
    """What was measured so far, and the case at hand, whose inputs and float64 results are made once and shared."""

    def __init__(self, device: str):
        self.device = device
        self.run = Run(machine.describe(device), rates(device))
        self._contest: Contest | None = None

    def measure(self, benchmark: Any, case: Any, peer: Peer) -> None:
        """``benchmark``: pytest-benchmark's fixture. Raises ``Rejected``."""
        if self._contest is None or self._contest.case != case:
            self._contest = None  # the last case's memory goes first
            gc.collect()
            self._contest = Contest(case, self.device)
        kind = "floor" if isinstance(peer, Floor) else "ours" if peer.ours else "peer"
        row = self.run.row(
            case.name, Row(peer.name, kind, peer.overwrites, tokens=getattr(case, "tokens", None))
        )
        self._contest.measure(benchmark, peer, row)

    def interleave(self, case: Any, peers: Sequence[Peer]) -> None:
        """Time ``peers`` step by step in turn, for differences of a few per cent. Raises ``Rejected``."""
        self._contest = None
        gc.collect()
        contest = Contest(case, self.device)
        rows = [self.run.row(case.name, Row(peer.name, "ours" if peer.ours else "peer")) for peer in peers]
        steps = [contest.admit(peer, row).run for peer, row in zip(peers, rows, strict=True)]
        turn = sum(_seconds(step) for step in steps)
        turns = min(50, max(3, round(INTERLEAVED_SECONDS / BLOCKS / turn)))
        for _ in range(BLOCKS):
            seconds: list[list[float]] = [[] for _ in steps]
            for number in range(turns):
                order = range(len(steps)) if number % 2 else reversed(range(len(steps)))
                for index in order:
                    seconds[index].append(_seconds(steps[index]))
            for row, own in zip(rows, seconds, strict=True):
                row.seconds.append(float(f"{statistics.median(own):.4g}"))


class Contest:
    """A case that is being timed."""

    def __init__(self, case: Any, device: str):
        self.case, self.device = case, device
        self.inputs = case.inputs(device)
        self._q = self.inputs.q.clone()
        self._pristine: Tensor | None = None
        self._expected: dict[bool, tuple[Result, dict[str, float]]] = {}
        self._steps: dict[str, Step | Rejected] = {}
        self._seconds: dict[str, float] = {}

    def measure(self, benchmark: Any, peer: Peer, row: Row) -> None:
        """Add one repeat's median to ``row``; the first time also what was found on the way there."""
        if peer.name not in self._steps:
            try:
                self._steps[peer.name] = self.admit(peer, row)
            except Rejected as rejected:
                row.rejected, row.failed = str(rejected), rejected.failed
                self._steps[peer.name] = rejected
        step = self._steps[peer.name]
        if isinstance(step, Rejected):
            raise step
        restore = self._restore if peer.overwrites else None
        benchmark.group = self.case.name
        benchmark.pedantic(step.run, setup=restore, **schedule(self._seconds[peer.name], restore is not None))
        if restore is not None:
            restore()
        if benchmark.stats is not None:  # it is under --benchmark-disable
            row.seconds.append(float(f"{benchmark.stats.stats.median:.4g}"))

    def admit(self, peer: Peer, row: Row) -> Step:
        """Gate it and find its memory, into ``row``. Raises ``Rejected``."""
        if reason := peer.missing(self.device) or peer.refuses(self.case):
            raise Rejected(reason, failed=False)
        try:
            step = self._gated(peer, row) if peer.gated else peer.build(self.inputs)
            run = _synchronised(step.run, self.device)
            seconds = self._clocked(peer, run)
            self._seconds[peer.name] = seconds if seconds > 0.5 else min(seconds, self._clocked(peer, run))
            row.peak_mib = machine.peak_memory(run, self.device)
        except (RuntimeError, TypeError, ValueError, AttributeError, ImportError) as error:
            if peer.ours:
                raise
            raise Rejected(f"{type(error).__name__}: {error}".partition("\n")[0], failed=True) from error
        finally:
            if peer.overwrites:
                self._restore()
        row.note = step.note
        return Step(run, step.note)

    def _gated(self, peer: Peer, row: Row) -> Step:
        """Build ``peer`` and compare one step with float64: the very step that is timed, unless the case is huge."""
        whole = self.case.gate_rows >= self.case.rows
        inputs = self.inputs if whole else self.inputs.head(self.case.gate_rows)
        exact, eager = self._expectation(inputs, peer.groups)
        if peer.overwrites:
            self._restore()
        step = peer.build(inputs)
        result = self._from_start(inputs, step.run)
        verdict = gate.judge(result, exact, eager, peer.ours, self.case.products, len(inputs.ids))
        row.error = str(verdict)
        if not verdict.passed:
            raise Rejected(row.error, failed=True)
        return step if whole else peer.build(self.inputs)

    def _expectation(self, inputs: Any, groups: bool) -> tuple[Result, dict[str, float]]:
        """The float64 result, and the errors of eager PyTorch against it."""
        if groups not in self._expected:
            inputs.q.copy_(self._q)
            exact = self.case.exact(inputs, groups)
            yardstick = YARDSTICKS[groups]
            eager = self._from_start(inputs, lambda: yardstick.step(inputs))
            self._expected[groups] = exact, gate.errors(eager, exact)
        return self._expected[groups]

    def _from_start(self, inputs: Any, run: Callable[[], Result]) -> Result:
        """One step from the q that the float64 step started from: tuning has moved it."""
        inputs.q.copy_(self._q)
        return run()

    def _clocked(self, peer: Peer, run: Callable[[], Result]) -> float:
        if peer.overwrites:
            self._restore()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def _restore(self) -> None:
        """The logits as they were before a step overwrote them; remembers them the first time."""
        with torch.no_grad():
            if self._pristine is None:
                self._pristine = self.inputs.logits.detach().clone()
            self.inputs.logits.copy_(self._pristine)


def _seconds(run: Callable[[], Result]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def schedule(seconds: float, one_by_one: bool) -> dict[str, int]:
    """How often to run a step that takes ``seconds``; ``one_by_one`` where something is restored in between."""
    iterations = 1 if one_by_one else max(1, math.ceil(0.002 / seconds))  # below 2 ms the clock call shows
    rounds = min(15, max(1, int(SECONDS / (seconds * iterations))))
    return {"rounds": rounds, "iterations": iterations, "warmup_rounds": int(seconds < 0.5)}


def _synchronised(run: Callable[[], Result], device: str) -> Callable[[], Result]:
    if device != "cuda":
        return run

    def run_and_wait() -> Result:
        result = run()
        torch.cuda.synchronize()
        return result

    return run_and_wait
