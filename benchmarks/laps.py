"""How an implementation is timed on a GPU: gated, warmed, its memory measured, then forward and backward lap by lap.

GPU time by CUDA events: a pause on the GPU hides what the host takes to launch a step, except where a step itself
waits for the GPU. Before each step another buffer is read, so that the L2 cache holds none of its inputs; the backward
follows its forward, as in training.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from benchmarks import gate, machine
from benchmarks.bench import YARDSTICKS
from benchmarks.cases import Result
from benchmarks.floor import read
from benchmarks.peers import Peer
from benchmarks.results import Row, Run

REPEATS, MOST_LAPS = 5, 20  # ratios are taken within a repeat; laps of one implementation in a repeat
SECONDS = 3.0  # of timing for one problem, admission apart


@dataclass(frozen=True)
class Work:
    """What a pass must do at least: one of them is what bounds it."""

    nbytes: int | None = None
    flops: int | None = None
    tokens: int | None = None


class Problem(Protocol):
    """A case (cases.py) that may be timed on a GPU."""

    name: str
    gate_rows: int
    products: torch.dtype | None

    @property
    def passes(self) -> dict[str, Work]:
        """Of "forward", "backward" and "both", those that get a table; "both" is one of them."""

    @property
    def needs(self) -> int:
        """Bytes of device memory that must be free."""

    def table(self, which: str) -> str:
        """The name of a pass's table."""

    def inputs(self, device: str) -> Any: ...

    def exact(self, inputs: Any, groups: bool) -> Result: ...


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
        # At 2 GHz the pause is a little longer than the last launch took; 10 ms are enough for any op.
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
    seconds: float = field(default=0.0)  # of one lap


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
                for which, row in entry.rows.items():
                    row.seconds.append(float(f"{statistics.median(columns[which]):.4g}"))

    def _lap(self, entry: Entry) -> tuple[float, float]:
        if entry.restore is not None:
            entry.restore()
        return self.clock.lap(entry.forward, entry.backward)

    def _admit(self, problem: Problem, inputs: Any, peer: Peer, expected: dict) -> Entry | None:
        """Gate ``peer`` against float64, warm it up, find its memory. None, and why, where it is not timed."""
        kind = "floor" if not peer.gated else "ours" if peer.ours else "peer"
        rows = {
            which: self.run.row(problem.table(which), Row(peer.name, kind, peer.overwrites, **vars(work)))
            for which, work in problem.passes.items()
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
                own = replace(inputs, q=inputs.q.clone())
                entry = Entry(peer, rows, peer.forward(own), peer.backward(own), restore)
                for _ in range(3):
                    entry.seconds = sum(self._lap(entry))
                rows["both"].peak_mib = machine.peak_memory(
                    lambda: entry.backward(entry.forward()), self.device
                )
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

    def _verdict(self, problem: Problem, inputs: Any, peer: Peer, expected: dict) -> gate.Verdict:
        if peer.groups not in expected:
            exact = problem.exact(inputs.head(problem.gate_rows), peer.groups)
            eager = YARDSTICKS[peer.groups].step(inputs.head(problem.gate_rows))
            expected[peer.groups] = exact, gate.errors(eager, exact)
        own = inputs.head(problem.gate_rows)
        result = peer.backward(own)(peer.forward(own)())
        return gate.judge(result, *expected[peer.groups], peer.ours, problem.products, len(own.ids))


def schedule(turn: float) -> int:
    """Laps in a repeat, where one lap of every implementation takes ``turn`` seconds."""
    return max(2, min(MOST_LAPS, int(SECONDS / REPEATS / max(turn, 1e-6))))


def copy_rate(clock: Clock, device: str, nbytes: int = 1 << 30) -> float:
    """GB/s, bytes read and written, of a device-to-device copy."""
    source, target = torch.empty(2, nbytes, dtype=torch.uint8, device=device).random_()  # zeros may be faster
    seconds = [clock.lap(lambda: target.copy_(source), lambda _: None)[0] for _ in range(20)]
    return round(2 * nbytes / statistics.median(seconds) / 1e9, 1)


def gemm_rate(clock: Clock, device: str, size: int = 8192) -> float:
    """TFLOP/s of a square bfloat16 product, on random numbers: zeros may be faster."""
    left, right = torch.randn(2, size, size, device=device).bfloat16()
    out = torch.empty_like(left)
    seconds = [clock.lap(lambda: torch.mm(left, right, out=out), lambda _: None)[0] for _ in range(20)]
    return round(2 * size**3 / statistics.median(seconds) / 1e12, 1)
