"""The implementations that are timed: one small class each, with its best settings.

None but ours has Group DRO, so the others return row losses, and ``group_dro`` below is written on top of them as
people write it. To add one: subclass ``Peer``, give it a ``name`` and ``row_losses``, say in
``missing`` what it needs, and add it to the list of a benchmark module.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import rd_kernels as rd
from benchmarks.cases import DTYPES, STEP_SIZE, LinearCase, LinearInputs, LogitsInputs, Result
from rd_kernels.backends import registry
from rd_kernels.linear import default_memory_budget, plan


@dataclass(frozen=True)
class Step:
    """A step ready to be timed, and what was chosen for it (a chunk size, a compile mode)."""

    run: Callable[[], Result]
    note: str = ""


class Peer:
    """One implementation. An instance has no state; everything of a case is made by ``build``."""

    name: str
    ours = False  # ours must pass the gate; a peer that fails it is reported
    groups = True  # False: a plain mean over the rows, without Group DRO
    gated = True  # False: a floor, which computes no loss
    overwrites = (
        False  # the step destroys the logits: they are restored before each round, outside the timing
    )
    devices: tuple[str, ...] = ("cpu", "cuda")
    package: str | None = None  # what must be installed

    def missing(self, device: str) -> str | None:
        """Why it cannot run here; None if it can."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None

    def refuses(self, case: Any) -> str | None:
        """Why it cannot serve this case; None if it can."""
        return None

    def build(self, inputs: Any) -> Step:
        """Compile, tune, warm up: nothing here is timed."""
        return Step(lambda: self.step(inputs))

    def forward(self, inputs: Any) -> Callable[[], Tensor]:
        """A call that computes the loss and updates ``inputs.q``, compiled if need be: its halves are timed apart."""
        return lambda: self.loss(inputs)

    def backward(self, inputs: Any) -> Callable[[Any], Result]:
        """The other half: it takes what the forward returned."""
        return lambda loss: differentiated(loss, inputs, self.groups)

    def step(self, inputs: Any, *options: Any) -> Result:
        """Forward, update of ``inputs.q`` in place, backward. ``options``: what ``build`` chose."""
        return differentiated(self.loss(inputs, *options), inputs, self.groups)

    def loss(self, inputs: Any, *options: Any) -> Tensor:
        row_losses = self.row_losses(inputs, *options)
        return group_dro(row_losses, inputs.ids, inputs.q) if self.groups else row_losses.mean()

    def row_losses(self, inputs: Any, *options: Any) -> Tensor:
        """[N], or [] for a plain mean"""
        raise NotImplementedError


def differentiated(loss: Tensor, inputs: Any, groups: bool) -> Result:
    gradients = torch.autograd.grad(loss, inputs.leaves)
    return Result(loss.detach(), gradients, inputs.q if groups else None)


def group_dro(row_losses: Tensor, ids: Tensor, q: Tensor) -> Tensor:
    """Online Group DRO in eager PyTorch: losses [N], ids [N] -> loss []; q [G] is updated in place, in log space."""
    row_losses = row_losses.float()
    sums = torch.zeros_like(q).index_add(0, ids, row_losses)
    counts = torch.zeros_like(q).index_add(0, ids, torch.ones_like(row_losses))
    means = sums / counts.clamp(min=1)
    q.copy_(torch.softmax(q.log() + STEP_SIZE * means.detach(), 0))
    return torch.dot(q, means)


def fastest(candidates: Mapping[str, Callable[[], Result]]) -> Step:
    """Run each to warm it, then for the clock (a fast one several times); the note says which won."""
    if len(candidates) == 1:
        name, run = next(iter(candidates.items()))
        return Step(run, name)
    seconds = {}
    for name, run in candidates.items():
        run()
        seconds[name] = _seconds(run)
        if seconds[name] < 0.5:
            seconds[name] = min(_seconds(run) for _ in range(3))
    best = min(seconds, key=seconds.__getitem__)
    return Step(candidates[best], best)


def _seconds(run: Callable[[], Result]) -> float:
    start = time.perf_counter()
    if run().loss.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Eager(Peer):
    name = "torch eager"

    def row_losses(self, inputs: Any) -> Tensor:
        return inputs.cross_entropy("none")


class EagerMean(Eager):
    name = "torch eager, plain mean"
    groups = False

    def loss(self, inputs: Any) -> Tensor:
        return inputs.cross_entropy("mean")


def plain(peer: Peer) -> Peer:
    """``peer`` without Group DRO, for one whose row losses look at ``groups``: "X" becomes "X, plain mean"."""
    averaged = copy.copy(peer)
    averaged.name, averaged.groups = f"{peer.name}, plain mean", False
    return averaged


class Compiled(Eager):
    name = "torch.compile"
    modes: tuple[str, ...] = ("default",)

    def build(self, inputs: Any) -> Step:
        # A peer is built once for each case: without the reset its shapes would become dynamic.
        torch.compiler.reset()
        compiled = {
            mode: torch.compile(self.loss, fullgraph=True, dynamic=False, mode=mode) for mode in self.modes
        }
        return fastest(
            {
                mode: lambda loss=loss: differentiated(loss(inputs), inputs, self.groups)
                for mode, loss in compiled.items()
            }
        )

    def forward(self, inputs: Any) -> Callable[[], Tensor]:
        torch.compiler.reset()
        compiled = torch.compile(self.loss, fullgraph=True, dynamic=False)
        return lambda: compiled(inputs)


class CompiledMean(Compiled, EagerMean):
    name = "torch.compile, plain mean"


class Ours(Peer):
    name = "rd_kernels"
    ours = True
    backend = "auto"
    function: Callable[..., Tensor] = staticmethod(rd.functional.group_dro_cross_entropy)
    objective: rd.ERM | rd.GroupDRO = rd.GroupDRO(STEP_SIZE)
    options: Mapping[str, Any] = MappingProxyType({})  # of ``function``; a version without one is left out

    def missing(self, device: str) -> str | None:
        known = inspect.signature(self.function).parameters
        unknown = [option for option in self.options if option not in known]
        if self.backend not in ("auto", *registry.BACKENDS):
            return f"this version has no backend {self.backend!r}"
        if self.backend != "auto" and (reason := registry.get(self.backend).missing()):
            return reason
        return f"this version has no {unknown[0]}" if unknown else super().missing(device)

    def loss(self, inputs: LogitsInputs) -> Tensor:
        return self.function(
            inputs.logits, inputs.labels, inputs.ids, inputs.q, self.objective, backend=self.backend,
            **self.options,
        )  # fmt: skip


class Produced(torch.autograd.Function):
    """Logits as a model's last operation leaves them: no leaf, and its backward does not need them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class OursInPlace(Ours):
    name = "rd_kernels, in place"
    options = MappingProxyType({"inplace_backward": True})
    overwrites = True

    def loss(self, inputs: LogitsInputs) -> Tensor:
        return super().loss(replace(inputs, logits=Produced.apply(inputs.logits)))


class OursReference(Ours):
    name = "rd_kernels, reference backend"
    backend = "reference"


class OursMean(Ours):
    name = "rd_kernels, plain mean"
    groups = False

    def loss(self, inputs: LogitsInputs) -> Tensor:
        return rd.functional.cross_entropy(inputs.logits, inputs.labels, backend=self.backend)


class OursERM(Ours):
    """The grouped op without robustness: the mean over the rows, with the statistics of the groups."""

    name = "rd_kernels, ERM"
    groups = False
    objective = rd.ERM()


def on(backend: str, peer: Ours) -> Ours:
    """``peer`` by one of our backends; "rd_kernels, in place" becomes "rd_kernels cuda, in place"."""
    served = copy.copy(peer)
    name, comma, variant = peer.name.partition(",")
    served.name, served.backend = f"{name} {backend}{comma}{variant}", backend
    return served


class OursLinear(Ours):
    """With the default ``memory_budget``."""

    function = staticmethod(rd.functional.linear_group_dro_cross_entropy)

    def loss(self, inputs: LinearInputs) -> Tensor:
        return self.function(
            inputs.hidden, inputs.weight, inputs.labels, inputs.ids, inputs.q, self.objective,
            bias=inputs.bias, backend=self.backend, **self.options,
        )  # fmt: skip


class OursLinearERM(OursLinear):
    """The plain mean over the rows, by the same op."""

    name = "rd_kernels, ERM"
    groups = False
    objective = rd.ERM()


class OursLinearStored(OursLinear):
    """3 GEMMs where the default budget would compute rows again."""

    name = "rd_kernels, all stored"
    options = MappingProxyType({"memory_budget": 1 << 40})

    def refuses(self, case: LinearCase) -> str | None:
        itemsize = DTYPES[case.dtype].itemsize
        budget = default_memory_budget(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        stored, _ = plan(case.rows, case.vocabulary, case.hidden, itemsize, budget)
        return "the default budget holds all rows" if stored == case.rows else None


class OursLinearFused(OursLinear):
    """The first GEMM is Triton's and leaves exponentials instead of logits."""

    name = "rd_kernels, fused logits"
    backend = "triton"

    def refuses(self, case: LinearCase) -> str | None:
        return None if case.dtype == "bf16" else "bfloat16 only"

    def loss(self, inputs: LinearInputs) -> Tensor:
        with patch.dict(os.environ, {registry.FUSED_LOGITS_VARIABLE: "1"}):
            return super().loss(inputs)
