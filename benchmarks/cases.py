"""What is timed on: a case names a problem and makes its seeded inputs. Letters: N rows, V vocabulary, D hidden,
G groups.

Another kind of case is another frozen dataclass with ``name``, ``rows``, ``gate_rows``, ``products``, ``inputs`` and ``exact``, and
inputs with ``leaves``, ``ids``, ``q``, ``cross_entropy`` and ``head``: the harness asks for nothing else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STEP_SIZE = 0.01  # of Group DRO, everywhere in the benchmarks
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Result:
    """What one training step leaves: the loss [], each input's gradient, the group weights q [G] after it."""

    loss: Tensor
    gradients: tuple[Tensor, ...]
    q: Tensor | None = None  # None where the objective has no groups


@dataclass
class LogitsInputs:
    logits: Tensor  # [N, V], a leaf
    labels: Tensor  # [N]
    ids: Tensor  # [N], the group of each row
    q: Tensor  # [G], the state: every step updates it in place

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.logits,)

    def cross_entropy(self, reduction: str) -> Tensor:
        """[N] for "none", [] for "mean", in eager PyTorch: the yardstick of the gate."""
        return F.cross_entropy(self.logits, self.labels, reduction=reduction)

    def head(self, rows: int) -> LogitsInputs:
        """The same on the first rows, copied: what the gate runs on."""
        return LogitsInputs(_leaf(self.logits[:rows]), self.labels[:rows], self.ids[:rows], self.q.clone())


@dataclass
class LinearInputs:
    hidden: Tensor  # [N, D], leaf
    weight: Tensor  # [V, D], leaf
    bias: Tensor | None  # [V], leaf
    labels: Tensor  # [N]
    ids: Tensor  # [N]
    q: Tensor  # [G]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None)

    def cross_entropy(self, reduction: str) -> Tensor:
        logits = F.linear(self.hidden, self.weight, self.bias)
        return F.cross_entropy(logits, self.labels, reduction=reduction)

    def head(self, rows: int) -> LinearInputs:
        return dataclasses.replace(
            self,
            hidden=_leaf(self.hidden[:rows]),
            labels=self.labels[:rows],
            ids=self.ids[:rows],
            q=self.q.clone(),
        )


@dataclass(frozen=True)
class LogitsCase:
    """Cross-entropy of logits [N, V] with G groups, forward and backward."""

    rows: int
    vocabulary: int
    dtype: str = "fp32"
    groups: int = 8

    products = None

    @property
    def name(self) -> str:
        return f"logits N={self.rows} V={self.vocabulary} {self.dtype}"

    @property
    def gate_rows(self) -> int:
        """How many rows the float64 check reads: 2^25 logits, or 256 MB in float64, are enough."""
        return max(1, min(self.rows, 2**25 // self.vocabulary))

    def inputs(self, device: str) -> LogitsInputs:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(self.rows, self.vocabulary, generator=generator)
        return LogitsInputs(_leaf(logits.to(device, DTYPES[self.dtype])), *targets(self, generator, device))

    def exact(self, inputs: LogitsInputs, groups: bool) -> Result:
        """The step in float64 by formula, with Group DRO or as a plain mean."""
        loss, gradient, q = exact_rows(inputs.logits.detach().double(), inputs, groups)
        return Result(loss, (gradient,), q)


@dataclass(frozen=True)
class LinearCase:
    """The same of hidden [N, D] @ weight [V, D].T + bias [V]."""

    rows: int
    hidden: int
    vocabulary: int
    dtype: str = "fp32"
    bias: bool = True
    groups: int = 8

    @property
    def name(self) -> str:
        bias = "" if self.bias else " no bias"
        return f"linear N={self.rows} D={self.hidden} V={self.vocabulary} {self.dtype}{bias}"

    @property
    def products(self) -> torch.dtype | None:
        """The 16-bit dtype that products are rounded to, if any: see gate.py."""
        return None if self.dtype == "fp32" else DTYPES[self.dtype]

    @property
    def gate_rows(self) -> int:
        return max(1, min(self.rows, 2**25 // self.vocabulary))

    def inputs(self, device: str) -> LinearInputs:
        generator = torch.Generator().manual_seed(0)
        kind = {"device": device, "dtype": DTYPES[self.dtype]}
        hidden = torch.randn(self.rows, self.hidden, generator=generator)
        weight = torch.randn(self.vocabulary, self.hidden, generator=generator) / self.hidden**0.5
        bias = torch.randn(self.vocabulary, generator=generator) / 10
        return LinearInputs(
            _leaf(hidden.to(**kind)),
            _leaf(weight.to(**kind)),
            _leaf(bias.to(**kind)) if self.bias else None,
            *targets(self, generator, device),
        )

    def exact(self, inputs: LinearInputs, groups: bool) -> Result:
        hidden, weight = inputs.hidden.detach().double(), inputs.weight.detach().double()
        logits = hidden @ weight.T
        if inputs.bias is not None:
            logits += inputs.bias.detach().double()
        loss, gradient, q = exact_rows(logits, inputs, groups)
        gradients = (gradient @ weight, gradient.T @ hidden)
        return Result(loss, gradients if inputs.bias is None else (*gradients, gradient.sum(0)), q)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def targets(
    case: LogitsCase | LinearCase, generator: torch.Generator, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """-> labels [N], group ids [N] of uneven groups, q [G] away from uniform."""
    labels = torch.randint(case.vocabulary, (case.rows,), generator=generator)
    share = 1 / torch.arange(1, case.groups + 1)  # the last group has 1/G of the rows of the first
    ids = torch.multinomial(share, case.rows, replacement=True, generator=generator)
    q = torch.rand(case.groups, generator=generator) + 0.5
    return labels.to(device), ids.to(device), (q / q.sum()).to(device)


def exact_rows(
    logits: Tensor,  # [N, V] float64
    inputs: LogitsInputs | LinearInputs,
    groups: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> loss, gradient of the logits (overwrites them), new q. No autograd, nothing shared with the package."""
    rows = torch.arange(logits.shape[0], device=logits.device)
    log_sum = logits.logsumexp(1)
    row_loss = log_sum - logits[rows, inputs.labels]
    if groups:
        member = inputs.ids[:, None] == torch.arange(inputs.q.numel(), device=logits.device)  # [N, G]
        counts = member.sum(0).clamp(min=1)
        means = torch.where(member, row_loss[:, None], 0).sum(0) / counts
        q = inputs.q.double() * torch.exp(STEP_SIZE * means)
        q = q / q.sum()
        row_weight = (q / counts)[inputs.ids]
    else:
        q, row_weight = None, torch.full_like(row_loss, 1 / row_loss.numel())
    gradient = logits.sub_(log_sum[:, None]).exp_()
    gradient[rows, inputs.labels] -= 1
    return (row_weight * row_loss).sum(), gradient.mul_(row_weight[:, None]), q
