"""A fine-tuning step of a BERT with Group DRO: the case, and who takes the step. Weights are random, which costs the same.

The gate runs on a few sequences without dropout, since no two implementations draw alike; what is timed has the
dropout of training. Letters: B sequences, T tokens, M labelled positions, D hidden, V vocabulary, G groups.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rd_kernels as rd
from benchmarks import others
from benchmarks.cases import STEP_SIZE, LinearInputs, LogitsInputs, Result, exact_rows
from benchmarks.peers import Eager, Ours, Peer, Step, plain

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
    bf16: bool = False  # autocast

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.token_ids.device.type, torch.bfloat16, enabled=self.bf16)

    @property
    def attention_mask(self) -> Tensor:  # [B, T]; no padding
        return torch.ones_like(self.token_ids)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """All that is trained, but for the keys' biases: their gradient is zero, and so all error."""
        return tuple(p for name, p in self.model.named_parameters() if not name.endswith("key.bias"))

    @property
    def row_groups(self) -> Tensor:
        """[B T]"""
        return self.groups.repeat_interleave(self.token_ids.shape[1])

    @property
    def ids(self) -> Tensor:
        """[M], the groups of the labelled positions"""
        return self.row_groups[self.labels.flatten() != -100]

    def cross_entropy(self, reduction: str) -> Tensor:
        """As one takes it of Transformers' model: logits at all positions; [M] if not reduced."""
        labels = self.labels.flatten()
        with self.autocast():
            logits = self.model(self.token_ids, attention_mask=self.attention_mask).logits.flatten(0, 1)
            losses = F.cross_entropy(logits, labels, reduction=reduction)
        return losses if losses.dim() == 0 else losses[labels != -100]

    def decoder_inputs(self) -> LinearInputs:
        """The labelled rows of what the decoder is applied to; all in the dtype of the products."""
        labels = self.labels.flatten()
        labelled = labels != -100
        head = self.model.cls.predictions
        with self.autocast():
            encoded = self.model.bert(self.token_ids, attention_mask=self.attention_mask).last_hidden_state
            hidden = head.transform(encoded.flatten(0, 1)[labelled])
        dtype = torch.bfloat16 if self.bf16 else hidden.dtype
        operands = (tensor.to(dtype) for tensor in (hidden, head.decoder.weight, head.decoder.bias))
        return LinearInputs(*operands, labels[labelled], self.ids, self.q)

    def head(self, rows: int) -> StepInputs:
        self.model.eval()
        return replace(
            self, token_ids=self.token_ids[:rows], labels=self.labels[:rows], groups=self.groups[:rows],
            q=self.q.clone(), optimizer=None, dropout=False,
        )  # fmt: skip


@dataclass(frozen=True)
class StepCase:
    """Forward and backward of B x T tokens, 15% of them labelled; with AdamW (fused) if ``optimizer``."""

    title: str
    layers: int
    width: int
    heads: int
    rows: int  # B
    optimizer: bool = False
    groups: int = 4
    length: int = 128  # T
    dtype: str = "fp32"  # "bf16": autocast
    vocabulary: int = 30522

    gate_rows = 2

    @property
    def name(self) -> str:
        step = "training step" if self.optimizer else "forward, backward"
        return f"{self.size}, {step}"

    @property
    def size(self) -> str:
        bf16 = " bf16" if self.dtype == "bf16" else ""
        return f"{self.title} {self.layers}x{self.width}, {self.rows}x{self.length} tokens{bf16}"

    @property
    def products(self) -> torch.dtype | None:
        return torch.bfloat16 if self.dtype == "bf16" else None

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def inputs(self, device: str) -> StepInputs:
        from transformers import BertConfig, BertForMaskedLM

        torch.manual_seed(0)
        config = BertConfig(
            num_hidden_layers=self.layers, hidden_size=self.width, num_attention_heads=self.heads,
            intermediate_size=4 * self.width, attn_implementation="sdpa",
            max_position_embeddings=max(512, self.length), vocab_size=self.vocabulary,
        )  # fmt: skip
        model = BertForMaskedLM(config).to(device)
        # A rate of 0 costs what another does, and leaves the weights that the gate's expectation belongs to.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True) if self.optimizer else None
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(FIRST_WORD, config.vocab_size, (self.rows, self.length), generator=generator)
        chosen = torch.rand(words.shape, generator=generator) < LABELLED
        return StepInputs(
            model,
            words.masked_fill(chosen, MASK).to(device),
            words.masked_fill(~chosen, -100).to(device),
            (torch.arange(self.rows) % self.groups).to(device),
            torch.full((self.groups,), 1 / self.groups, device=device),
            optimizer,
            bf16=self.dtype == "bf16",
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


class Encoded(torch.nn.Module):
    """In the place of an encoder: random hidden states, whatever the tokens are."""

    def __init__(self, config: Any, rows: int, length: int, width: int):
        super().__init__()
        self.config = config
        self.states = torch.nn.Parameter(torch.randn(rows, length, width))  # [B, T, D]
        self.encoder = torch.nn.Module()
        self.encoder.layer = torch.nn.ModuleList([torch.nn.Identity()])  # where an adapter looks for layers

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=self.states[: len(input_ids)])


@dataclass(frozen=True)
class HeadCase(StepCase):
    """The head and the loss alone, forward and backward, on random hidden states."""

    @property
    def name(self) -> str:
        return f"{self.size}, head alone"

    def inputs(self, device: str) -> StepInputs:
        inputs = super().inputs(device)
        inputs.model.bert = Encoded(inputs.model.config, self.rows, self.length, self.width).to(device)
        return inputs


class Training(Peer):
    """A step up to the point where the next one can begin: gradients are freed, as usual."""

    package = "transformers"

    def build(self, inputs: StepInputs) -> Step:
        forward, backward = self.forward(inputs), self.backward(inputs)
        return Step(lambda: backward(forward()))

    def forward(self, inputs: StepInputs) -> Callable[[], Tensor]:
        return self._in_training(inputs, lambda: self.loss(inputs))

    def backward(self, inputs: StepInputs) -> Callable[[Tensor], Result]:
        if not inputs.dropout:
            return super().backward(inputs)

        def update(loss: Tensor) -> Result:
            loss.backward()
            if inputs.optimizer is not None:
                inputs.optimizer.step()
            inputs.model.zero_grad()
            return Result(loss.detach(), (), inputs.q)

        return update

    def _in_training(self, inputs: StepInputs, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            if inputs.model.training != inputs.dropout:
                inputs.model.train(inputs.dropout)
            with inputs.autocast():
                return loss()

        return run


class Transformers(Training):
    name = "transformers, eager Group DRO"

    def row_losses(self, inputs: StepInputs) -> Tensor:
        return inputs.cross_entropy("none" if self.groups else "mean")


class TransformersMean(Transformers):
    name = "transformers, plain mean"
    groups = False


class PickedRows(Training):
    """What takes one line more: labelled positions are picked before the head; then ``decoder`` is applied."""

    def __init__(self, name: str, decoder: Peer):
        self.name, self.decoder = name, decoder

    def missing(self, device: str) -> str | None:
        return super().missing(device) or self.decoder.missing(device)

    def row_losses(self, inputs: StepInputs) -> Tensor:
        return self.decoder.row_losses(inputs.decoder_inputs())


class TransformersGathered(PickedRows):
    def __init__(self) -> None:
        super().__init__("transformers, labelled rows picked before the head", Eager())


class TransformersCompiled(Training):
    """Model and loss compiled as one graph."""

    name = "transformers, torch.compile"

    def forward(self, inputs: StepInputs) -> Callable[[], Tensor]:
        torch.compiler.reset()

        def loss(token_ids: Tensor, attention_mask: Tensor, labels: Tensor, ids: Tensor, q: Tensor) -> Tensor:
            logits = inputs.model(token_ids, attention_mask=attention_mask).logits.flatten(0, 1)
            # An index of unknown length would break the graph: other positions go to a group of their own.
            losses = F.cross_entropy(logits, labels, reduction="none")
            zeros = torch.zeros(len(q) + 1, device=q.device)
            sums = zeros.index_add(0, ids, losses)[:-1]
            counts = zeros.index_add(0, ids, torch.ones_like(losses))[:-1]
            means = sums / counts.clamp(min=1)
            q.copy_(torch.softmax(q.log() + STEP_SIZE * means.detach(), 0))
            return torch.dot(q, means)

        compiled = torch.compile(loss, dynamic=False)
        labels = inputs.labels.flatten()
        ids = torch.where(labels == -100, len(inputs.q), inputs.row_groups)
        mask = inputs.attention_mask
        return self._in_training(inputs, lambda: compiled(inputs.token_ids, mask, labels, ids, inputs.q))


class OursTraining(Training, Ours):
    """As ``robustdebias finetune`` takes it."""

    name = "robustdebias"
    function = staticmethod(rd.functional.linear_group_dro_cross_entropy)

    def loss(self, inputs: StepInputs) -> Tensor:
        from robustdebias.modeling import masked_lm_inputs

        batch = {
            "input_ids": inputs.token_ids,
            "attention_mask": inputs.attention_mask,
            "labels": inputs.labels,
            "groups": F.one_hot(inputs.groups, len(inputs.q)).bool(),
        }
        rows = masked_lm_inputs(inputs.model, batch)
        return self.function(
            rows.hidden, rows.weight, rows.labels, rows.groups, inputs.q, self.objective, bias=rows.bias,
            backend=self.backend, **self.options,
        )  # fmt: skip


class OursTrainingERM(OursTraining):
    name = "robustdebias, ERM"
    groups = False
    objective = rd.ERM()


class OursPacked(OursTraining):
    """Nothing waits for the GPU: the op itself packs the labelled rows, with room for 20% of the positions."""

    name = "rd_kernels, capacity 20%"
    options = MappingProxyType({"capacity": 0.2})

    def loss(self, inputs: StepInputs) -> Tensor:
        encoded = inputs.model.bert(inputs.token_ids, attention_mask=inputs.attention_mask).last_hidden_state
        head = inputs.model.cls.predictions
        return self.function(
            head.transform(encoded), head.decoder.weight, inputs.labels, inputs.groups, inputs.q, self.objective,
            bias=head.decoder.bias, backend=self.backend, **self.options,
        )  # fmt: skip


# Other projects' linear losses in the same place.
PICKED = tuple(
    PickedRows(f"transformers with {peer.name}", peer)
    for peer in (others.LigerLinear(), others.CutCrossEntropy(), others.CutCrossEntropyFiltered())
)
PICKED_MEAN = (
    plain(TransformersGathered()),
    *(
        plain(PickedRows(f"transformers with {peer.name}", plain(peer)))
        for peer in (others.LigerLinear(), others.CutCrossEntropy())
    ),
)
