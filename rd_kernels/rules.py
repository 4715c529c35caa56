"""The rules that the kernels have in their epilogue, in plain PyTorch: from a batch's sums to what multiplies them.

The definition that the kernels are held to. Each is ``rule(sums, counts, q, rate, adjustment)`` with sums, counts and q
[G], and returns, [G] each, the coefficients c (0 for a group absent from the batch), the new q, and the groups' weights
for the report. All arithmetic is in float64, rounded once to the dtype of q: ``rate`` times a loss may exceed what
float32 holds. Where a group's mean loss is not finite, neither is the loss, and q stays: one bad batch must not destroy
the state. Letters: G groups; m_g = S_g / n_g.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["RULES"]

Rule = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor, Tensor]]


def _erm(
    sums: Tensor, counts: Tensor, q: Tensor, rate: float, adjustment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Empirical risk: every row counts the same, c_g = 1 / sum(n)."""
    return _weighted(_shares(counts), counts, q)


def _group_dro(hold: bool) -> Rule:
    """Online exponentiated gradient (Sagawa et al. 2020, arXiv 1911.08731, Algorithm 1), in log space.

    q_g <- q_g exp(rate (m_g + adjustment_g)), normalised; c_g = q_g / n_g. A group absent from the batch keeps its q up
    to normalisation, or, with ``hold``, keeps it: then the groups present share what they had together.
    """

    def rule(
        sums: Tensor, counts: Tensor, q: Tensor, rate: float, adjustment: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        given, (sums, counts, q) = q, (each.double() for each in (sums, counts, q))
        present = counts > 0
        means = sums / counts.clamp(min=1)
        gain = means if adjustment is None else means + adjustment.double()
        log_q = torch.log(q) + torch.where(present, rate * gain, torch.zeros_like(gain))
        usable = present.any() & torch.isfinite(means).all()
        if hold:
            shared = torch.where(present, q, torch.zeros_like(q)).sum()
            usable = usable & (shared > 0)  # a share of nothing has no proportions
            log_q = log_q.masked_fill(~present, -torch.inf)
            updated = torch.where(present, shared * torch.softmax(log_q, dim=0), q)
        else:
            updated = torch.softmax(log_q, dim=0)
        q = torch.where(usable, updated.to(given.dtype), given)
        return torch.where(present, q / counts.clamp(min=1), 0).to(given.dtype), q, q

    return rule


def _tilted(by_rows: bool) -> Rule:
    """Weights proportional to n_g exp(rate m_g), or without n_g (TERM, Li et al. 2020, arXiv 2007.01162).

    Without state. Where a mean loss is not finite: as with a rate of 0.
    """

    def rule(
        sums: Tensor, counts: Tensor, q: Tensor, rate: float, adjustment: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums, counts = sums.double(), counts.double()
        present = counts > 0
        means = sums / counts.clamp(min=1)
        tilt = torch.where(torch.isfinite(means).all(), rate * means, torch.zeros_like(means))
        log_prior = counts.log() if by_rows else torch.zeros_like(counts)
        log_weights = torch.where(present, log_prior + tilt, -torch.inf)
        return _weighted(_normalised(torch.exp(log_weights - _finite(log_weights.amax()))), counts, q)

    return rule


def _worst_group(
    sums: Tensor, counts: Tensor, q: Tensor, rate: float, adjustment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All weight on the largest mean loss, ties sharing. Where a mean loss is not finite: on all that are present."""
    sums, counts = sums.double(), counts.double()
    present = counts > 0
    means = torch.where(present, sums / counts.clamp(min=1), -torch.inf)
    worst = present & ((means == means.amax()) | ~torch.isfinite(sums).all())
    return _weighted(_normalised(worst.double()), counts, q)


def _shares(counts: Tensor) -> Tensor:
    return _normalised(counts.double())


def _normalised(weights: Tensor) -> Tensor:
    """Onto the simplex; zeros stay zeros."""
    total = weights.sum()
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1), torch.zeros_like(weights))


def _finite(value: Tensor) -> Tensor:
    return torch.where(torch.isfinite(value), value, torch.zeros_like(value))


def _weighted(weights: Tensor, counts: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    coefficients = torch.where(counts > 0, weights / counts.clamp(min=1), 0)
    return coefficients.to(q.dtype), q, weights.to(q.dtype)


RULES: dict[str, Rule] = {
    "erm": _erm,
    "group_dro": _group_dro(hold=False),
    "group_dro_hold": _group_dro(hold=True),
    "tilted_rows": _tilted(by_rows=True),
    "tilted_groups": _tilted(by_rows=False),
    "worst_group": _worst_group,
}
