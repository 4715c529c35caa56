"""Other projects' fused losses. All but torch's own need a GPU and an installed package; the calls are those that give
correct gradients for weighted rows, which the gate checks on the spot.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import LinearCase, LinearInputs, LogitsInputs, Result
from benchmarks.peers import Peer, Step, fastest


class TorchLinear(Peer):
    """Chunks of rows in a Python loop. Row weights need reduction "none", whose backward computes the logits again."""

    name = "torch linear_cross_entropy, auto chunks"
    note = "4 GEMMs: recomputes"

    def missing(self, device: str) -> str | None:
        there = hasattr(torch.nn, "LinearCrossEntropyOptions")
        return super().missing(device) if there else f"torch {torch.__version__} does not have it"

    def build(self, inputs: LinearInputs) -> Step:
        return Step(self._with_options(inputs), self.note)

    def _with_options(self, inputs: LinearInputs, **options: Any) -> Callable[[], Result]:
        chunks = torch.nn.LinearCrossEntropyOptions(**options)
        return partial(self.step, inputs, chunks)

    def row_losses(self, inputs: LinearInputs, chunks: Any) -> Tensor:
        return F.linear_cross_entropy(
            inputs.hidden, inputs.weight, inputs.labels, linear_bias=inputs.bias, options=chunks,
            reduction="none" if self.groups else "mean",
        )  # fmt: skip


class TorchLinearTuned(TorchLinear):
    name = "torch linear_cross_entropy, tuned chunks"

    def build(self, inputs: LinearInputs) -> Step:
        rows = inputs.hidden.shape[0]
        sizes = sorted({min(size, rows) for size in (128, 512, 2048)})
        # On a CPU every other policy multiplies 16-bit weight gradients in an emulated GEMM; auto knows that.
        candidates = {
            f"chunks of {size}": self._with_options(inputs, batch_chunk_size=size, chunking_method=None)
            for size in sizes
        }
        best = fastest(candidates)
        return Step(best.run, f"{best.note}; {self.note}")


class TorchLinearMean(TorchLinearTuned):
    """What "none" could cost if it did not recompute; without groups, so only a lower bound."""

    name = "torch linear_cross_entropy, tuned, plain mean"
    note = "3 GEMMs"
    groups = False


class LigerLogits(Peer):
    name = "Liger-Kernel"
    devices = ("cuda",)
    package = "liger_kernel"
    overwrites = True  # its forward writes the gradient over the logits

    def row_losses(self, inputs: LogitsInputs) -> Tensor:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        reduction = "none" if self.groups else "mean"
        return LigerCrossEntropyLoss(reduction=reduction)(inputs.logits, inputs.labels)


class LigerLogitsMean(LigerLogits):
    name = "Liger-Kernel, plain mean"
    groups = False


class QuackLogits(Peer):
    name = "QuACK"
    devices = ("cuda",)
    package = "quack"

    def row_losses(self, inputs: LogitsInputs) -> Tensor:
        from quack import cross_entropy

        return cross_entropy(inputs.logits, inputs.labels, reduction="none", inplace_backward=self.overwrites)


class QuackMean(QuackLogits):
    name = "QuACK, plain mean"
    groups = False


class QuackInPlace(QuackLogits):
    name = "QuACK, in place"
    overwrites = True


class FlashAttentionLogits(Peer):
    name = "flash-attention"
    devices = ("cuda",)
    package = "flash_attn"

    def row_losses(self, inputs: LogitsInputs) -> Tensor:
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        return cross_entropy_loss(inputs.logits, inputs.labels, inplace_backward=self.overwrites)[0]


class FlashAttentionMean(FlashAttentionLogits):
    name = "flash-attention, plain mean"
    groups = False


class FlashAttentionInPlace(FlashAttentionLogits):
    name = "flash-attention, in place"
    overwrites = True


class LigerLinear(Peer):
    name = "Liger-Kernel"
    devices = ("cuda",)
    package = "liger_kernel"

    def row_losses(self, inputs: LinearInputs) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="none")
        return fused(inputs.weight, inputs.hidden, inputs.labels, inputs.bias)


class CutCrossEntropy(Peer):
    name = "cut-cross-entropy"
    devices = ("cuda",)
    package = "cut_cross_entropy"

    def refuses(self, case: LinearCase) -> str | None:
        return "the PyPI release has no bias" if case.bias else None

    def row_losses(self, inputs: LinearInputs) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, reduction="none")


LOGITS = (LigerLogits(), QuackLogits(), QuackInPlace(), FlashAttentionLogits(), FlashAttentionInPlace())
LOGITS_MEAN = (LigerLogitsMean(), QuackMean(), FlashAttentionMean())
LINEAR = (TorchLinear(), TorchLinearTuned(), TorchLinearMean(), LigerLinear(), CutCrossEntropy())
