"""A fine-tuning step of a BERT with Group DRO: the case, and who takes the step. Weights are random, which costs the same.

The gate runs on a few sequences without dropout, since no two implementations draw alike; what is timed has the
dropout of training. Letters: B sequences, T tokens, M labelled positions, G groups.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rd_kernels as rd
from benchmarks.cases import STEP_SIZE, LogitsInputs, Result, exact_rows
from benchmarks.peers import Peer, Step

TOKENS = 128
LABELLED = 0.15  # of the positions
FIRST_WORD, MASK = 1000, 103  # in BERT's vocabulary


@dataclass
class StepInputs:
    model: Any
    token_ids: Tensor  # [B, T]
    labels: Tensor  # [B, T], -100 where nothing is to be predicted
    groups: Tensor  # [B]
    q: Tensor  # [G]
    optimizer: torch.optim.Optimizer | None = None
    dropout: bool = True

    @property
    def attention_mask(self) -> Tensor:  # [B, T]; no padding
        return torch.ones_like(self.token_ids)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """All that is trained, but for the keys' biases: their gradient is zero, and so all error."""
        return tuple(p for name, p in self.model.named_parameters() if not name.endswith("key.bias"))

    @property
    def ids(self) -> Tensor:
        """[M], the groups of the labelled positions"""
        return self.groups.repeat_interleave(TOKENS)[self.labels.flatten() != -100]

    def cross_entropy(self, reduction: str) -> Tensor:
        """As one takes it of Transformers' model: logits at all positions; [M] if not reduced."""
        logits = self.model(self.token_ids, attention_mask=self.attention_mask).logits.flatten(0, 1)
        labels = self.labels.flatten()
        losses = F.cross_entropy(logits, labels, reduction=reduction)
        return losses if losses.dim() == 0 else losses[labels != -100]

    def head(self, rows: int) -> StepInputs:
        self.model.eval()
        return replace(
            self, token_ids=self.token_ids[:rows], labels=self.labels[:rows], groups=self.groups[:rows],
            q=self.q.clone(), optimizer=None, dropout=False,
        )  # fmt: skip


@dataclass(frozen=True)
class StepCase:
    """Forward and backward of B x 128 tokens, 15% of them labelled; with AdamW (fused) if ``optimizer``."""

    title: str
    layers: int
    width: int
    heads: int
    rows: int  # B
    optimizer: bool = False
    groups: int = 4

    gate_rows = 2

    @property
    def name(self) -> str:
        step = "training step" if self.optimizer else "forward, backward"
        return f"{self.title} {self.layers}x{self.width}, {self.rows}x{TOKENS} tokens, {step}"

    @property
    def tokens(self) -> int:
        return self.rows * TOKENS

    def inputs(self, device: str) -> StepInputs:
        from transformers import BertConfig, BertForMaskedLM

        torch.manual_seed(0)
        config = BertConfig(
            num_hidden_layers=self.layers, hidden_size=self.width, num_attention_heads=self.heads,
            intermediate_size=4 * self.width, attn_implementation="sdpa",
        )  # fmt: skip
        model = BertForMaskedLM(config).to(device)
        # A rate of 0 costs what another does, and leaves the weights that the gate's expectation belongs to.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True) if self.optimizer else None
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(FIRST_WORD, config.vocab_size, (self.rows, TOKENS), generator=generator)
        chosen = torch.rand(words.shape, generator=generator) < LABELLED
        return StepInputs(
            model,
            words.masked_fill(chosen, MASK).to(device),
            words.masked_fill(~chosen, -100).to(device),
            (torch.arange(self.rows) % self.groups).to(device),
            torch.full((self.groups,), 1 / self.groups, device=device),
            optimizer,
        )

    def exact(self, inputs: StepInputs, groups: bool) -> Result:
        model = copy.deepcopy(inputs.model).double()
        logits = model(inputs.token_ids, attention_mask=inputs.attention_mask).logits.flatten(0, 1)
        labels = inputs.labels.flatten()
        logits = logits[labels != -100]
        rows = LogitsInputs(logits.detach().clone(), labels[labels != -100], inputs.ids, inputs.q)
        loss, gradient, q = exact_rows(rows.logits, rows, groups)
        leaves = replace(inputs, model=model).leaves
        return Result(loss, torch.autograd.grad(logits, leaves, gradient), q)


class Training(Peer):
    """A step up to the point where the next one can begin: gradients are freed, as usual."""

    devices = ("cpu",)

    def step(self, inputs: StepInputs, *options: Any) -> Result:
        if not inputs.dropout:
            return super().step(inputs, *options)
        inputs.model.train()
        loss = self.loss(inputs, *options)
        loss.backward()
        if inputs.optimizer is not None:
            inputs.optimizer.step()
        inputs.model.zero_grad()
        return Result(loss.detach(), (), inputs.q)


class Transformers(Training):
    name = "transformers, eager Group DRO"

    def row_losses(self, inputs: StepInputs) -> Tensor:
        return inputs.cross_entropy("none")


class TransformersGathered(Training):
    """What takes one line more: labelled positions are picked before the head."""

    name = "transformers, labelled rows picked before the head"

    def row_losses(self, inputs: StepInputs) -> Tensor:
        labels = inputs.labels.flatten()
        labelled = labels != -100
        encoded = inputs.model.bert(inputs.token_ids, attention_mask=inputs.attention_mask).last_hidden_state
        logits = inputs.model.cls(encoded.flatten(0, 1)[labelled])
        return F.cross_entropy(logits, labels[labelled], reduction="none")


class TransformersCompiled(Training):
    """Model and loss compiled as one graph."""

    name = "transformers, torch.compile"

    def build(self, inputs: StepInputs) -> Step:
        torch.compiler.reset()

        def loss(token_ids: Tensor, attention_mask: Tensor, labels: Tensor, ids: Tensor, q: Tensor) -> Tensor:
            logits = inputs.model(token_ids, attention_mask=attention_mask).logits.flatten(0, 1)
            # An index of unknown length would break the graph: other positions go to a group of their own.
            losses = F.cross_entropy(logits, labels, reduction="none")
            sums = torch.zeros(len(q) + 1).index_add(0, ids, losses)[:-1]
            counts = torch.zeros(len(q) + 1).index_add(0, ids, torch.ones_like(losses))[:-1]
            means = sums / counts.clamp(min=1)
            q.copy_(torch.softmax(q.log() + STEP_SIZE * means.detach(), 0))
            return torch.dot(q, means)

        compiled = torch.compile(loss, dynamic=False)
        return Step(lambda: self.step(inputs, compiled))

    def loss(self, inputs: StepInputs, compiled: Any) -> Tensor:
        labels = inputs.labels.flatten()
        ids = torch.where(labels == -100, len(inputs.q), inputs.groups.repeat_interleave(TOKENS))
        return compiled(inputs.token_ids, inputs.attention_mask, labels, ids, inputs.q)


class OursTraining(Training):
    """As ``robustdebias finetune`` takes it."""

    name = "robustdebias"
    ours = True

    def loss(self, inputs: StepInputs) -> Tensor:
        from robustdebias.modeling import masked_lm_inputs

        batch = {
            "input_ids": inputs.token_ids,
            "attention_mask": inputs.attention_mask,
            "labels": inputs.labels,
            "groups": F.one_hot(inputs.groups, len(inputs.q)).bool(),
        }
        rows = masked_lm_inputs(inputs.model, batch)
        return rd.functional.linear_group_dro_cross_entropy(
            rows.hidden,
            rows.weight,
            rows.labels,
            rows.groups,
            inputs.q,
            rd.GroupDRO(STEP_SIZE),
            bias=rows.bias,
        )
