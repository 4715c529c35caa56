"""Other projects' fused losses. All but torch's own need a GPU and an installed package; the calls are those that give
correct gradients for weighted rows, which the gate checks on the spot.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import LinearInputs, LogitsInputs
from benchmarks.peers import Peer, Step, fastest, plain


class TorchLinear(Peer):
    """Chunks of rows in a Python loop. Row weights need reduction "none", whose backward computes the logits again."""

    name = "torch linear_cross_entropy, auto chunks"
    note = "4 GEMMs: recomputes"

    def missing(self, device: str) -> str | None:
        there = hasattr(torch.nn, "LinearCrossEntropyOptions")
        return super().missing(device) if there else f"torch {torch.__version__} does not have it"

    def build(self, inputs: LinearInputs) -> Step:
        return self._chosen(inputs)[0]

    def forward(self, inputs: LinearInputs) -> Callable[[], Tensor]:
        chunks = self._chosen(inputs)[1]
        return lambda: self.loss(inputs, chunks)

    def _chosen(self, inputs: LinearInputs) -> tuple[Step, Any]:
        """-> the fastest of ``candidates``, and its options."""
        candidates = {
            name: torch.nn.LinearCrossEntropyOptions(**options)
            for name, options in self.candidates(inputs.hidden.shape[0]).items()
        }
        best = fastest({name: partial(self.step, inputs, chunks) for name, chunks in candidates.items()})
        return Step(best.run, f"{best.note}; {self.note}"), candidates[best.note]

    def candidates(self, rows: int) -> dict[str, dict[str, Any]]:
        return {"auto": {}}

    def row_losses(self, inputs: LinearInputs, chunks: Any) -> Tensor:
        return F.linear_cross_entropy(
            inputs.hidden, inputs.weight, inputs.labels, linear_bias=inputs.bias, options=chunks,
            reduction="none" if self.groups else "mean",
        )  # fmt: skip


class TorchLinearTuned(TorchLinear):
    name = "torch linear_cross_entropy, tuned chunks"

    def candidates(self, rows: int) -> dict[str, dict[str, Any]]:
        # On a CPU every other policy multiplies 16-bit weight gradients in an emulated GEMM; auto knows that.
        return {
            f"chunks of {size}": {"batch_chunk_size": size, "chunking_method": None}
            for size in sorted({min(size, rows) for size in (128, 512, 2048, 8192)})
        }


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

        fused = LigerFusedLinearCrossEntropyLoss(reduction="none" if self.groups else "mean")
        return fused(inputs.weight, inputs.hidden, inputs.labels, inputs.bias)


class CutCrossEntropy(Peer):
    """Without the gradient filter. The release on PyPI has no bias: there it is a column of the weight."""

    name = "cut-cross-entropy"
    devices = ("cuda",)
    package = "cut_cross_entropy"
    options: Mapping[str, Any] = MappingProxyType({"filter_eps": None})

    def row_losses(self, inputs: LinearInputs) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        hidden, weight, options = inputs.hidden, inputs.weight, dict(self.options)
        if inputs.bias is not None:
            if "bias" in inspect.signature(linear_cross_entropy).parameters:
                options["bias"] = inputs.bias
            else:
                hidden, weight = with_bias_column(hidden, weight, inputs.bias)
        reduction = "none" if self.groups else "mean"
        return linear_cross_entropy(hidden, weight, inputs.labels, reduction=reduction, **options)


class CutCrossEntropyFiltered(CutCrossEntropy):
    """As it comes: gradients below 2^-5 epsilon are left out, before any weight of a row is known."""

    name = "cut-cross-entropy, filtered"
    options = MappingProxyType({})


def with_bias_column(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor,  # [V]
    multiple: int = 16,
) -> tuple[Tensor, Tensor]:
    """hidden [N, E] and weight [V, E] whose product includes the bias; E is a multiple, which kernels like."""
    width = hidden.shape[1]
    padding = -(width + 1) % multiple
    ones = F.pad(hidden.new_ones(hidden.shape[0], 1), (0, padding))
    return torch.cat([hidden, ones], 1), torch.cat([weight, F.pad(bias[:, None], (0, padding))], 1)


LOGITS = (LigerLogits(), QuackLogits(), QuackInPlace(), FlashAttentionLogits(), FlashAttentionInPlace())
LOGITS_MEAN = (LigerLogitsMean(), QuackMean(), FlashAttentionMean())
LINEAR = (
    TorchLinear(), TorchLinearTuned(), TorchLinearMean(), LigerLinear(), CutCrossEntropy(),
    CutCrossEntropyFiltered(),
)  # fmt: skip
LINEAR_MEAN = (plain(LigerLinear()), plain(CutCrossEntropy()))
