"""Objectives without state: the mean, and the worst mixture of the batch's groups within a set of mixtures.

Letters: G groups; n_g rows and m_g mean loss of a group in the batch; p_g its share of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rd_kernels.objectives.base import Batch, Objective, Update, check_choice, check_number

__all__ = ["ERM", "CVaR", "ChiSquare"]


@dataclass(frozen=True)
class ERM(Objective):
    """Empirical risk minimisation: the mean over rows, c_g = 1 / sum(n).

    A row in several groups counts once for each; a row in no group does not count.
    """

    @property
    def rule(self) -> str:
        return "erm"


@dataclass(frozen=True)
class CVaR(Objective):
    """Conditional value at risk: the mean loss of the worst share ``alpha`` of the batch, whole groups first.

    max sum_g w_g m_g  over  sum_g w_g = 1, 0 <= w_g <= p_g / alpha  (Levy et al. 2020, arXiv 2010.05893, with groups
    in place of rows; Sagawa et al.'s code calls the like "greedy"). Solved exactly by sorting. ``alpha`` = 1 is the
    mean over rows; a small one is the worst group. No state: q stays as it is. Give each text or row an id of its own
    as its group for DRO without groups.

    Args:
        alpha: in (0, 1].
        base: what p is: "rows", the groups' shares of the batch's rows, or "groups", the same for every group present.

    Raises:
        ValueError, TypeError: an argument outside what is said above.
    """

    alpha: float
    base: Literal["rows", "groups"] = "rows"

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha)
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {self.alpha}")
        check_choice("base", self.base, ("rows", "groups"))

    def update(self, batch: Batch, q: Tensor, memory: Tensor) -> Update:
        _, order, shares = _worst_first(batch, self.base)
        before = shares.cumsum(0) - shares
        taken = torch.minimum(shares, (self.alpha - before).clamp(min=0))
        # Divided by their sum, not by alpha: rounding leaves them on the simplex.
        weights = taken / taken.sum().clamp(min=torch.finfo(taken.dtype).tiny)
        return _in_order(weights, order)


@dataclass(frozen=True)
class ChiSquare(Objective):
    """The worst mixture of groups in a chi-square ball around the batch's own.

    max sum_g w_g m_g  over the simplex with  1/2 sum_g p_g (w_g / p_g - 1)^2 <= rho  (Namkoong and Duchi 2016; Levy et
    al. 2020, arXiv 2010.05893, with groups in place of rows). w_g is proportional to p_g max(m_g - eta, 0); eta is
    found exactly, by sorting, instead of by bisection. ``rho`` = 0 is the mean over rows; from 1/2 (1/p - 1) on, p that
    of the worst group, all weight is on it. No state: q stays as it is.

    Args:
        rho: finite, >= 0.
        base: what p is, as in :class:`CVaR`.

    Raises:
        ValueError, TypeError: an argument outside what is said above.
    """

    rho: float
    base: Literal["rows", "groups"] = "rows"

    def __post_init__(self) -> None:
        check_number("rho", self.rho, 0)
        check_choice("base", self.base, ("rows", "groups"))

    def update(self, batch: Batch, q: Tensor, memory: Tensor) -> Update:
        means, order, shares = _worst_first(batch, self.base)
        mass = shares.cumsum(0)
        # Had the k worst groups all the weight, the constraint would be met at eta_k, with their mean and variance:
        # (mean_k - eta_k)^2 (mass_k (1 + 2 rho) - 1) = variance_k.
        centred = torch.where(shares > 0, means - means[0], 0)  # no cancellation in the variance
        mean = (shares * centred).cumsum(0) / mass
        variance = ((shares * centred.square()).cumsum(0) / mass - mean.square()).clamp(min=0)
        reached = mass / mass[-1]
        slack = (reached - 1) + 2 * self.rho * reached  # exact where all are reached, however small rho is
        # Far below every loss the weights are p to the last bit: a bound instead of an infinity.
        eta = torch.where(slack > 0, (mean - (variance / slack).sqrt()).clamp(min=-1e100), torch.inf)
        present = torch.where(shares > 0, centred, -torch.inf)
        following = torch.cat([present[1:], present.new_full((1,), -torch.inf)])
        solves = (present > eta) & (following <= eta)
        excess = shares * (centred - torch.where(solves, eta, -torch.inf).amax()).clamp(min=0)
        worst = torch.where(centred == 0, shares, 0)  # the ball reaches past them, or all groups are equal
        weights = torch.where(solves.any(), excess, worst)
        if self.rho == 0:
            weights = shares
        return _in_order(weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny), order)


def _worst_first(batch: Batch, base: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean losses in descending order (absent groups last, as -inf), that order, and the base distribution in it."""
    counts = batch.counts
    means, order = torch.where(batch.present, batch.means, -torch.inf).sort(descending=True, stable=True)
    size = counts if base == "rows" else (counts > 0).to(counts.dtype)
    return means, order, (size / size.sum().clamp(min=1))[order]


def _in_order(weights: Tensor, order: Tensor) -> Update:
    """Sorted weights -> what ``update`` returns."""
    return Update(torch.zeros_like(weights).scatter(0, order, weights))
