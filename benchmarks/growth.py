"""How cost grows with N rows, V vocabulary, G groups and threads: the cases, and the plot of their results.

A case's name says which line of the plot it belongs to and where on it: "growth with N, V = 4096: 64".
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import MaxNLocator

from benchmarks.cases import LogitsCase, LogitsInputs
from benchmarks.peers import Ours, OursMean, Peer, Step
from benchmarks.results import Ratio, Run


class OursMasked(Ours):
    """Groups as a bool mask [N, G]."""

    def build(self, inputs: LogitsInputs) -> Step:
        member = inputs.ids[:, None] == torch.arange(inputs.q.numel())
        masked = dataclasses.replace(inputs, ids=member)
        return Step(lambda: self.step(masked))


LARGE = "growth with N, V = 30522: 1024"
NAME = re.compile(r"growth with (?P<line>.+): (?P<at>\d+)")


@dataclass(frozen=True)
class GrowthCase(LogitsCase):
    line: str = ""  # what grows and what is fixed; begins with the axis
    at: int = 0
    mask: bool = False  # groups as a bool mask [N, G], not as ids [N]
    threads: int | None = None  # None: torch's

    @property
    def name(self) -> str:
        return f"growth with {self.line}: {self.at}"

    @property
    def gate_rows(self) -> int:
        return max(1, min(self.rows, 2**22 // self.vocabulary))

    @property
    def peers(self) -> tuple[Peer, ...]:
        return (OursMasked() if self.mask else Ours(), OursMean())

    @contextmanager
    def setting(self) -> Iterator[None]:
        """While it is timed."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _case(line: str, at: int, rows: int, vocabulary: int, **options: Any) -> GrowthCase:
    return GrowthCase(rows, vocabulary, line=line, at=at, **options)


def cases(cores: int) -> list[GrowthCase]:
    """At most 0.3 GB of logits and as much of gradients."""
    return [
        *(_case("N, V = 30522", n, n, 30522) for n in (1, 4, 16, 64, 256, 1024, 2048)),
        *(_case("N, V = 4096", n, n, 4096) for n in (1, 4, 16, 64, 256, 1024, 4096, 16384)),
        *(_case("V, N V = 2^25", v, 2**25 // v, v) for v in (1000, 4096, 16384, 30522, 65536, 262144)),
        *(_case("G, ids", g, 1024, 30522, groups=g) for g in (1, 4, 16, 64, 256, 1024, 4096)),
        *(_case("G, masks", g, 1024, 30522, groups=g, mask=True) for g in (1, 4, 16, 64)),
        # What groups cost doesn't depend on V: without the noise of the large vocabulary it can be seen.
        *(_case("G, ids, V = 1000", 4**k, 1024, 1000, groups=4**k) for k in range(7)),
        *(_case("G, masks, V = 1000", 4**k, 1024, 1000, groups=4**k, mask=True) for k in range(4)),
        *(_case("threads, N = 1024, V = 30522", t, 1024, 30522, threads=t) for t in _powers_of_two(cores)),
    ]


def _powers_of_two(cores: int) -> list[int]:
    """Up to ``cores``, which come last whether they are one or not."""
    return [2**k for k in range(cores.bit_length()) if 2**k < cores] + [cores]


def lines(run: Run) -> dict[str, dict[int, str]]:
    """``lines(run)[line][at]`` is the name of a case."""
    found: dict[str, dict[int, str]] = {}
    for name in run.cases:
        if match := NAME.fullmatch(name):
            found.setdefault(match["line"], {})[int(match["at"])] = name
    return found


def group_cost(run: Run, case: str) -> Ratio | None:
    """What Group DRO adds to the plain mean, as a share of the mean's time with N = 1024, V = 30522."""
    rows, large = run.timed(case), run.timed(LARGE).get(OursMean.name)
    if large is None or len(rows) < 2:
        return None
    base = rows[OursMean.name].median if "V = 1000" not in case else large.median
    added = [
        (own - mean) / base
        for own, mean in zip(rows[Ours.name].seconds, rows[OursMean.name].seconds, strict=True)
    ]
    return Ratio(statistics.median(added), min(added), max(added))


def plot(run: Run, path: Path) -> list[Path]:
    """Time and memory against N and V, Group DRO over the plain mean against G, speed against threads; -> [path],
    or nothing if the run has no such case."""
    found = lines(run)
    if not found:
        return []
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    panels = {"N": (axes[0, 0], axes[1, 0]), "V": (axes[0, 1], axes[1, 1])}
    for line, points in found.items():
        axis = line.split(",")[0]
        for name, style in (("rd_kernels", "o-"), ("rd_kernels, plain mean", ".:")):
            timed = {at: run.timed(case)[name] for at, case in points.items() if name in run.timed(case)}
            label = f"{line}: {name.removeprefix('rd_kernels, ')}"
            if axis in panels:
                time, memory = panels[axis]
                time.plot(list(timed), [1e3 * row.median for row in timed.values()], style, label=label)
                memory.plot(list(timed), [row.peak_mib or 0.1 for row in timed.values()], style, label=label)
            elif axis == "threads":
                speeds = [1 / row.median for row in timed.values()]
                axes[1, 2].plot(list(timed), [speed / speeds[0] for speed in speeds], style, label=label)
        if axis == "G":
            costs = {at: cost for at, case in points.items() if (cost := group_cost(run, case)) is not None}
            middle = [100 * cost.median for cost in costs.values()]
            below = [100 * (cost.median - cost.low) for cost in costs.values()]
            above = [100 * (cost.high - cost.median) for cost in costs.values()]
            if costs:
                axes[0, 2].errorbar(list(costs), middle, [below, above], marker="o", capsize=3, label=line)
    for axis, pair in panels.items():
        for panel, what in zip(pair, ("ms", "MiB beyond the inputs"), strict=True):
            panel.set(xlabel=axis, ylabel=what)
            if axis == "V":  # where N V is fixed, everything is of one size
                panel.set_ylim(bottom=0)
    axes[0, 2].axhline(2, color="tab:grey", linestyle="--")
    axes[0, 2].set(xlabel="G at N = 1024", ylabel="% over the plain mean at V = 30522", ylim=(-10, 10))
    axes[1, 2].set(xlabel="threads", ylabel="speed relative to one thread")
    axes[1, 2].set_ylim(bottom=0)
    axes[1, 2].xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in axes.flat:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small")
        else:  # a run of a part
            panel.remove()
            continue
        if panel is not axes[1, 2]:
            panel.set_xscale("log")
        if panel in panels["N"]:
            panel.set_yscale("log")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]
