"""What is timed on a GPU, suite by suite: problems, the most important first, and who takes part in each.

What a time limit cuts off is the end of a suite. Letters: N rows, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import finetuning, others
from benchmarks.cases import DTYPES, LinearCase, LinearInputs, LogitsCase, LogitsInputs, targets
from benchmarks.finetuning import HeadCase, StepCase
from benchmarks.floor import FreshFloor, InPlaceFloor, ThreeGemms
from benchmarks.laps import Problem, Work
from benchmarks.peers import (
    Compiled,
    CompiledMean,
    Eager,
    EagerMean,
    Ours,
    OursERM,
    OursInPlace,
    OursLinear,
    OursLinearERM,
    OursLinearFused,
    OursLinearStored,
    OursMean,
    Peer,
    on,
)

BACKENDS = ("cuda", "triton")
COPIES = 2.2  # of the logits that must fit into free memory: they, their gradient, and the small rest


@dataclass(frozen=True)
class LogitsProblem(LogitsCase):
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

    @property
    def needs(self) -> int:
        return int(COPIES * self.nbytes)

    @property
    def passes(self) -> dict[str, Work]:
        """Of N V elements: read; read and write; all of it."""
        return {
            which: Work(nbytes=times * self.nbytes)
            for which, times in {"forward": 1, "backward": 2, "both": 3}.items()
        }

    def table(self, which: str) -> str:
        return f"{self.name}, {which}"

    def contestants(self) -> list[Peer]:
        ours = [
            on(name, peer) for name in BACKENDS for peer in (Ours(), OursERM(), OursMean(), OursInPlace())
        ]
        # Compiling takes longer than everything else of a problem.
        compiled = [Compiled(), CompiledMean()] if (self.rows, self.vocabulary) in COMPILED else []
        rest = [Eager(), EagerMean(), *others.LOGITS, *others.LOGITS_MEAN]
        return [FreshFloor(), InPlaceFloor(), *ours, *rest, *compiled]


@dataclass(frozen=True)
class LinearProblem(LinearCase):
    dtype: str = "bf16"

    @property
    def gate_rows(self) -> int:
        """2^29 logits are 4 GB in float64. So many that the default budget does not hold all of a large case."""
        return max(1, min(self.rows, 2**29 // self.vocabulary))

    def inputs(self, device: str) -> LinearInputs:
        """The numbers of a linear layer: logits of variance 1."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.empty(shape, dtype=DTYPES[self.dtype], device=device)
            return values.normal_(std=scale, generator=generator).requires_grad_()

        hidden = normal(self.rows, self.hidden)
        weight = normal(self.vocabulary, self.hidden, scale=self.hidden**-0.5)
        bias = normal(self.vocabulary, scale=0.1) if self.bias else None
        return LinearInputs(hidden, weight, bias, *targets(self, torch.Generator().manual_seed(1), device))

    @property
    def needs(self) -> int:
        """Logits and their gradient as eager PyTorch holds them, the gate's in float64, four times the weight in it."""
        nbytes = self.rows * self.vocabulary * DTYPES[self.dtype].itemsize
        gate = 8 * (self.gate_rows * self.vocabulary + 4 * self.vocabulary * self.hidden)
        return max(3 * nbytes, gate)

    @property
    def passes(self) -> dict[str, Work]:
        product = 2 * self.rows * self.vocabulary * self.hidden
        return {
            "forward": Work(flops=product),
            "backward": Work(flops=2 * product),
            "both": Work(flops=3 * product),
        }

    def table(self, which: str) -> str:
        return f"{self.name}, {which}"

    def contestants(self) -> list[Peer]:
        ours = [
            on(name, peer)
            for name in BACKENDS
            for peer in (OursLinear(), OursLinearERM(), OursLinearStored())
        ]
        ours.append(on("triton", OursLinearFused()))
        compiled = [Compiled(), CompiledMean()] if self == LINEAR[0] else []
        return [ThreeGemms(), *ours, Eager(), EagerMean(), *others.LINEAR, *others.LINEAR_MEAN, *compiled]


@dataclass(frozen=True)
class StepProblem(StepCase):
    """``compiled``: a table of its own at the end, since compiling takes minutes."""

    dtype: str = "bf16"
    optimizer: bool = True
    compiled: bool = False

    @property
    def needs(self) -> int:
        """Transformers' logits in bf16, in float32, and the gradients of both; as much for the encoder."""
        return 24 * self.tokens * self.vocabulary

    @property
    def passes(self) -> dict[str, Work]:
        return {"both": Work(tokens=self.tokens)}

    def table(self, which: str) -> str:
        return f"{self.name}, compiled" if self.compiled else self.name

    def contestants(self) -> list[Peer]:
        ours = [
            on(name, peer)
            for name in BACKENDS
            for peer in (finetuning.OursTraining(), finetuning.OursTrainingERM(), finetuning.OursPacked())
        ]
        if self.compiled:
            return [*ours[:2], finetuning.Transformers(), finetuning.TransformersCompiled()]
        peers = [finetuning.Transformers(), finetuning.TransformersMean(), finetuning.TransformersGathered()]
        return [*ours, *peers, *finetuning.PICKED, *finetuning.PICKED_MEAN]


@dataclass(frozen=True)
class HeadProblem(HeadCase, StepProblem):
    dtype: str = "bf16"


VOCABULARIES = (30522, 50257, 128256, 262144)
LOGITS = tuple(
    LogitsProblem(rows, vocabulary, dtype)
    for dtype, all_rows in (("bf16", (4096, 16384)), ("fp32", (4096,)), ("bf16", (2048, 65536)), ("fp32", (2048, 16384, 65536)))
    for rows in all_rows
    for vocabulary in VOCABULARIES
)  # fmt: skip
COMPILED = {(4096, 30522), (4096, 128256)}
LINEAR = (
    LinearProblem(2458, 768, 30522),
    LinearProblem(16384, 768, 30522),
    LinearProblem(2458, 4096, 128256, bias=False),
    LinearProblem(65536, 768, 30522),
    LinearProblem(16384, 4096, 128256, bias=False),
)
BERT: dict[str, Any] = {"title": "BERT-base", "layers": 12, "width": 768, "heads": 12}
STEP = (
    StepProblem(**BERT, rows=256, length=128),
    HeadProblem(**BERT, rows=256, length=128),
    StepProblem(**BERT, rows=32, length=512),
    HeadProblem(**BERT, rows=32, length=512),
    StepProblem(**BERT, rows=256, length=128, compiled=True),
)
SUITES: dict[str, Sequence[Problem]] = {"logits": LOGITS, "linear": LINEAR, "step": STEP}
