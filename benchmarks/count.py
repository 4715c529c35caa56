"""What the ops do, counted without a GPU: FLOPs of matrix products, kernels started, bytes of what they are given.

``TRITON_INTERPRET=1 python -m benchmarks.count`` prints it for the Triton backend, interpreted on the CPU.
Letters: N rows, V vocabulary, D hidden.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.cases import LinearCase, LogitsCase
from benchmarks.peers import Ours, OursInPlace, OursLinear, OursLinearFused, on
from rd_kernels import ops
from rd_kernels.backends.triton_launcher import Launcher
from rd_kernels.linear import plan

LABELLED, CAPACITY = 0.15, 0.2
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@dataclass
class Counts:
    flops: int = 0  # of matrix products
    products: int = 0
    ops: list[str] = field(default_factory=list)  # of ours, as torch sees them
    kernels: list[str] = field(default_factory=list)  # Triton's, in order
    nbytes: int = 0  # of the tensors given to kernels, once for each argument


class Watch(TorchDispatchMode):
    """Looks into our ops too, which hide what they do from a dispatch mode."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "rd_kernels":
            self.counts.ops.append(func._opname)
            with self:
                return getattr(ops, f"_{func._opname}")(*args, **kwargs)
        result = func(*args, **kwargs)
        packet = getattr(torch.ops.aten, func._opname.rstrip("_"), None)  # addmm_ costs what addmm does
        if packet in flop_registry:
            self.counts.flops += flop_registry[packet](*args, **kwargs, out_val=result)
            self.counts.products += 1
        return result


def count(run: Callable[[], object]) -> Counts:
    """Of ``run()``, a backward included. Rows of weight 0 and the CPU's tiles change the products, not their FLOPs."""
    counts = Counts()
    with _recorded_launches(counts), Watch(counts):
        run()
    return counts


@contextmanager
def _recorded_launches(counts: Counts) -> Iterator[None]:
    launch = Launcher._launch

    def recorded(self: Launcher, kernel: str, grid: Any, tensors: Any, scalars: Any, **options: Any) -> None:
        if 0 not in grid:
            counts.kernels.append(kernel)
            counts.nbytes += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        launch(self, kernel, grid, tensors, scalars, **options)

    with mock.patch.object(Launcher, "_launch", recorded):
        yield


def lines(name: str, counts: Counts, rows: int, vocabulary: int, width: int = 0) -> list[str]:
    kernels = ", ".join(
        f"{kernel} x {times}" if times > 1 else kernel for kernel, times in Counter(counts.kernels).items()
    )
    text = [f"{name}: {len(counts.kernels)} kernels: {kernels}"]
    text.append(f"  they are given {counts.nbytes / (rows * vocabulary):.2f} bytes for each logit")
    if width:
        gemms = counts.flops / (2 * rows * vocabulary * width)
        text.append(f"  {gemms:.2f} products of 2 N V D FLOPs")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--width", type=int, default=32)
    options = parser.parse_args()
    if not INTERPRETED:
        print("set TRITON_INTERPRET=1 before Python starts: kernels are run on the CPU", file=sys.stderr)
        return 2
    sizes = options.rows, options.vocabulary
    logits = LogitsCase(*sizes, "bf16").inputs("cpu")
    for peer in (on("triton", Ours()), on("triton", OursInPlace())):
        counts = count(lambda peer=peer: peer.step(logits))
        print("\n".join(lines(f"logits op, {peer.name}", counts, *sizes)))
    linear = LinearCase(options.rows, options.width, options.vocabulary, "bf16").inputs("cpu")
    for stored in (1.0, 0.5):
        peer = on("triton", OursLinear())
        peer.options = {"memory_budget": budget(stored, *sizes, options.width, 2)}
        counts = count(lambda peer=peer: peer.step(linear))
        print("\n".join(lines(f"linear op, {stored:.0%} stored", counts, *sizes, options.width)))
    counts = count(lambda: on("triton", OursLinearFused()).step(linear))
    print(
        "\n".join(
            lines("linear op, fused logits (one product more is Triton's)", counts, *sizes, options.width)
        )
    )
    linear.labels[torch.rand(options.rows, generator=torch.Generator().manual_seed(0)) > LABELLED] = -100
    peer = on("triton", OursLinear())
    peer.options = {"capacity": CAPACITY}
    counts = count(lambda: peer.step(linear))
    title = f"linear op, {LABELLED:.0%} labelled, capacity {CAPACITY:.0%}"
    print("\n".join(lines(title, counts, *sizes, options.width)))
    return 0


def budget(stored: float, rows: int, vocabulary: int, width: int, itemsize: int) -> int:
    """The smallest ``memory_budget`` that stores this share of the rows, or more: see ``plan``."""
    low, high = 0, 1 << 50
    while high - low > 1:
        middle = (low + high) // 2
        try:
            enough = plan(rows, vocabulary, width, itemsize, middle)[0] >= stored * rows
        except ValueError:  # not even one row
            enough = False
        low, high = (low, middle) if enough else (middle, high)
    return high


if __name__ == "__main__":
    raise SystemExit(main())
