"""What the machine allows: the passes over memory and the GEMMs that an exact step cannot do without, as torch ops.

The floors are timed among the implementations, in the same rounds. ``rates`` states the bandwidths behind them.
A floor writes into memory that already exists: a fresh gradient's page faults are the implementation's own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, LinearInputs, LogitsInputs, Result
from benchmarks.peers import Peer, Step, fastest
from rd_kernels.gemm import leading_dimension


class Floor(Peer):
    gated = False


class FreshFloor(Floor):
    """Exact row weights are known only after all rows were read: two reads and one write of N V elements."""

    name = "floor: read, copy"

    def build(self, inputs: LogitsInputs) -> Step:
        logits = inputs.logits.detach()
        target = torch.empty_like(logits)

        def run() -> Result:
            return Result(read(logits), (target.copy_(logits),))

        return Step(run)

    def forward(self, inputs: LogitsInputs) -> Callable[[], Tensor]:
        return lambda: read(inputs.logits.detach())

    def backward(self, inputs: LogitsInputs) -> Callable[[Tensor], Result]:
        # A target that is kept would be as large as the logits.
        return lambda total: Result(total, (inputs.logits.detach().clone(),))


class InPlaceFloor(Floor):
    name = "floor: read, read and write in place"
    overwrites = True

    def build(self, inputs: LogitsInputs) -> Step:
        logits = inputs.logits.detach()
        return Step(lambda: Result(read(logits), (logits.neg_(),)))

    def forward(self, inputs: LogitsInputs) -> Callable[[], Tensor]:
        return lambda: read(inputs.logits.detach())

    def backward(self, inputs: LogitsInputs) -> Callable[[Tensor], Result]:
        return lambda total: Result(total, (inputs.logits.detach().neg_(),))


class ThreeGemms(Floor):
    """Logits, gradient of the hidden states, gradient of the weight, and nothing between them.

    The fastest of the obvious ways: on a CPU without bfloat16 instructions torch's 16-bit GEMMs differ by a factor of
    25 with the layout of their operands, and float32 with its conversions is faster than any of them.
    """

    name = "floor: three bare GEMMs"

    def build(self, inputs: LinearInputs) -> Step:
        hidden, weight = inputs.hidden.detach(), inputs.weight.detach()

        def as_they_are() -> Result:
            logits = hidden @ weight.T
            return Result(logits[0, 0], (logits @ weight, logits.T @ hidden))

        def in_float32() -> Result:
            wide_hidden, wide_weight = hidden.float(), weight.float()
            logits = wide_hidden @ wide_weight.T
            gradients = (logits @ wide_weight, logits.T @ wide_hidden)
            return Result(logits[0, 0], tuple(gradient.to(weight.dtype) for gradient in gradients))

        if weight.dtype == torch.float32:
            return Step(as_they_are)
        return fastest({"as they are": as_they_are, "in float32": in_float32})

    def forward(self, inputs: LinearInputs) -> Callable[[], Tensor]:
        """For a GPU: rows of logits start at a cache line, without which cuBLAS has slower kernels only."""
        hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        logits = hidden.new_empty((rows, leading_dimension(vocabulary, hidden.element_size())))[
            :, :vocabulary
        ]
        return lambda: torch.mm(hidden, weight.T, out=logits)

    def backward(self, inputs: LinearInputs) -> Callable[[Tensor], Result]:
        hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
        gradients = torch.empty_like(hidden), torch.empty_like(weight)

        def run(logits: Tensor) -> Result:
            torch.mm(logits, weight, out=gradients[0])
            torch.mm(logits.T, hidden, out=gradients[1])
            return Result(logits[0, 0], gradients)

        return run


def read(tensor: Tensor) -> Tensor:
    """One pass over the memory, [] int64: the sum of its bytes, eight at a time, is bound by nothing else."""
    flat = tensor.view(-1)
    whole = flat.numel() // 4 * 4  # 8 bytes hold 2 or 4 elements
    return flat[:whole].view(torch.int64).sum()


def rates(device: str) -> dict[str, float]:
    """Bandwidths in GB/s on 256 MB and rates of hidden @ weight.T in GFLOP/s at 1024 x 768 x 8192 (16 bits: 256 rows
    on a CPU)."""
    data, target = torch.zeros(2, 2**26, device=device)
    measured = {
        "read GB/s": data.nbytes / _median(lambda: read(data), device),
        "copy GB/s": 2 * data.nbytes / _median(lambda: target.copy_(data), device),
        "in place GB/s": 2 * data.nbytes / _median(lambda: data.neg_(), device),
    }
    for name in ("fp32", "bf16"):
        rows = 1024 if device == "cuda" or name == "fp32" else 256
        left = torch.ones(rows, 768, device=device, dtype=DTYPES[name])
        right = torch.ones(8192, 768, device=device, dtype=DTYPES[name]).T
        flops = 2 * rows * 768 * 8192
        measured[f"GEMM {name} GFLOP/s"] = flops / _median(lambda a=left, b=right: a @ b, device)
    return {name: round(rate / 1e9, 1) for name, rate in measured.items()}


def _median(run: Callable[[], Tensor], device: str, rounds: int = 7) -> float:
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
