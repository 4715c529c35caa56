"""Objectives without state: the mean, the worst group, and the worst mixture of a batch's groups or rows within a set.

Letters: G groups; n_g rows and m_g mean loss of a group in the batch; p_g its share of the batch. Over rows, each row
stands in place of a group, with its loss for m_g.

Common to all: a group absent from the batch has weight 0, q stays as it is, and where a mean loss is not finite the
weights are p (for the worst group: the same for each group), so that the loss is not finite either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rd_kernels.objectives.base import Batch, Objective, Update, check_choice, check_number
from rd_kernels.rules import RULES

__all__ = ["ERM", "KL", "CVaR", "ChiSquare", "Tilted", "WorstGroup"]


@dataclass(frozen=True)
class ERM(Objective):
    """Empirical risk minimisation: the mean over rows, c_g = 1 / sum(n).

    A row in several groups counts once for each; a row in no group does not count.
    """

    @property
    def rule(self) -> str:
        return "erm"


@dataclass(frozen=True)
class WorstGroup(Objective):
    """max_g m_g, over the groups of the batch; groups that tie share the weight."""

    @property
    def rule(self) -> str:
        return "worst_group"


class _Mixtures(Objective):
    """What the objectives over mixtures w of a batch's groups or rows share. ``base`` and ``over`` are fields of each."""

    base: Literal["rows", "groups"]
    over: Literal["groups", "rows"]

    @property
    def over_rows(self) -> bool:
        return self.over == "rows"

    def _check_choices(self) -> None:
        check_choice("base", self.base, ("rows", "groups"))
        check_choice("over", self.over, ("groups", "rows"))
        if self.over == "rows" and self.base == "groups":
            raise ValueError(
                "base must be 'rows' with over='rows', which does not look at groups; got 'groups'"
            )

    def _means_and_shares(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """m and p, [G] each, 0 for an absent group. Where a mean is not finite, all are 0: of equal ones each of
        these objectives makes p."""
        size = batch.counts if self.base == "rows" else batch.present.to(batch.counts.dtype)
        usable = batch.present & torch.isfinite(batch.means).all()
        return torch.where(usable, batch.means, 0), size / size.sum().clamp(min=1)


@dataclass(frozen=True)
class Tilted(_Mixtures):
    """Tilted risk (TERM, Li et al. 2021, arXiv 2007.01162, equation 2): weights proportional to p_g exp(t m_g).

    The gradient is that of (1/t) log sum_g p_g exp(t m_g). The value of the loss is sum_g w_g m_g with the same w, larger
    by KL(w || p) / t. ``t`` = 0 is the mean under p, t to infinity the worst group, to minus infinity the best one.

    Args:
        t: finite, at most 1e200 in size: times a float32 loss it must not overflow float64. Negative values play
            large losses down, against wrong labels.
        base: what p is: "rows", the groups' shares of the batch's rows, or "groups", the same for every group present.
        over: "groups", or "rows": each row of the batch has a weight of its own and the groups are for the report
            only; ``base`` must be "rows".

    Raises:
        ValueError, TypeError: an argument outside what is said above.
    """

    t: float
    base: Literal["rows", "groups"] = "rows"
    over: Literal["groups", "rows"] = "groups"

    def __post_init__(self) -> None:
        check_number("t", self.t, -1e200, 1e200)
        self._check_choices()

    @property
    def rule(self) -> str | None:
        return None if self.over_rows else f"tilted_{self.base}"

    @property
    def rate(self) -> float:
        return float(self.t)

    def update(self, batch: Batch, q: Tensor, memory: Tensor) -> Update:
        _, _, weights = RULES[f"tilted_{self.base}"](batch.sums, batch.counts, q, self.rate, None)
        return Update(weights)


@dataclass(frozen=True)
class CVaR(_Mixtures):
    """Conditional value at risk: the mean loss of the worst share ``alpha`` of the batch.

    max sum_g w_g m_g  over  sum_g w_g = 1, 0 <= w_g <= p_g / alpha  (over rows: Levy et al. 2020, arXiv 2010.05893;
    Sagawa et al.'s code calls the form over groups "greedy"). Exact, by sorting; groups that tie share in proportion
    to p. ``alpha`` = 1 is the mean under p; a small one is the worst group.

    Args:
        alpha: in (0, 1].
        base, over: as in :class:`Tilted`.

    Raises:
        ValueError, TypeError: an argument outside what is said above.
    """

    alpha: float
    base: Literal["rows", "groups"] = "rows"
    over: Literal["groups", "rows"] = "groups"

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha)
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {self.alpha}")
        self._check_choices()

    def update(self, batch: Batch, q: Tensor, memory: Tensor) -> Update:
        means, shares = self._means_and_shares(batch)
        tiny = torch.finfo(shares.dtype).tiny
        alpha = max(self.alpha, tiny)  # no smaller share has a reciprocal
        ordered, order = torch.where(batch.present, means, -torch.inf).sort(descending=True)
        # The largest loss that, with all that are larger, makes up alpha; none where rounding lets them all stay below.
        threshold = torch.where(shares[order].cumsum(0) >= alpha, ordered, -torch.inf).amax()
        beyond = torch.where(means > threshold, shares, 0) / alpha
        at = torch.where(means == threshold, shares, 0)
        rest = (1 - beyond.sum()).clamp(min=0)
        return Update(_normalised(beyond + rest * at / at.sum().clamp(min=tiny)))


@dataclass(frozen=True)
class ChiSquare(_Mixtures):
    """The worst mixture in a chi-square ball around the batch's own.

    max sum_g w_g m_g  over the simplex with  1/2 sum_g p_g (w_g / p_g - 1)^2 <= rho  (Namkoong and Duchi 2016; over rows:
    Levy et al. 2020, arXiv 2010.05893). w_g is proportional to p_g max(m_g - eta, 0); eta is found exactly, by sorting,
    instead of by bisection. ``rho`` = 0 is the mean under p; from 1/2 (1/p - 1) on, p that of the worst group, all
    weight is on it.

    Args:
        rho: finite, >= 0.
        base, over: as in :class:`Tilted`.

    Raises:
        ValueError, TypeError: an argument outside what is said above.
    """

    rho: float
    base: Literal["rows", "groups"] = "rows"
    over: Literal["groups", "rows"] = "groups"

    def __post_init__(self) -> None:
        check_number("rho", self.rho, 0)
        self._check_choices()

    def update(self, batch: Batch, q: Tensor, memory: Tensor) -> Update:
        means, base = self._means_and_shares(batch)
        if self.rho == 0:
            return Update(base)
        depth = torch.where(batch.present, _depth(means, batch.present), -torch.inf)
        depth, order = depth.sort(descending=True)
        shares = base[order]
        mass = shares.cumsum(0)
        # Had the k worst groups all the weight, the constraint would be met at eta_k, with their mean and variance:
        # (mean_k - eta_k)^2 (mass_k (1 + 2 rho) - 1) = variance_k.
        centred = torch.where(shares > 0, depth, 0)  # from the largest down: no cancellation in the variance
        mean = (shares * centred).cumsum(0) / mass
        variance = ((shares * centred.square()).cumsum(0) / mass - mean.square()).clamp(min=0)
        reached = mass / mass[-1]
        slack = (reached - 1) + 2 * self.rho * reached  # exact where all are reached, however small rho is
        # Far below every loss the weights are p to the last bit: a bound instead of an infinity.
        eta = torch.where(slack > 0, (mean - (variance / slack).sqrt()).clamp(min=-1e100), torch.inf)
        following = torch.cat([depth[1:], depth.new_full((1,), -torch.inf)])
        solves = (depth > eta) & (following <= eta)
        excess = shares * (centred - torch.where(solves, eta, -torch.inf).amax()).clamp(min=0)
        worst = torch.where(depth == 0, shares, 0)  # the ball reaches past them, or all groups are equal
        weights = torch.where(solves.any(), excess, worst)
        return Update(_normalised(torch.zeros_like(weights).scatter(0, order, weights)))


@dataclass(frozen=True)
class KL(_Mixtures):
    """The worst mixture in a Kullback-Leibler ball around the batch's own.

    max sum_g w_g m_g  over the simplex with  sum_g w_g log(w_g / p_g) <= rho  (Hu and Hong 2013). The weights are those
    of :class:`Tilted` at the t >= 0 whose divergence is ``rho``: an objective with its tilt set by a radius, whatever the
    scale of the losses. ``rho`` = 0 is the mean under p; from -log p on, p that of the worst group, all weight is on it.

    t is found by a search with a fixed number of steps. The weights stay inside the ball, but for rounding, and their
    divergence is within 1e-7 of ``rho``, relatively. Over rows that costs about 300 exponentials a row.

    Args:
        rho: finite, >= 0.
        base, over: as in :class:`Tilted`.

    Raises:
        ValueError, TypeError: an argument outside what is said above.
    """

    rho: float
    base: Literal["rows", "groups"] = "rows"
    over: Literal["groups", "rows"] = "groups"

    def __post_init__(self) -> None:
        check_number("rho", self.rho, 0)
        self._check_choices()

    def update(self, batch: Batch, q: Tensor, memory: Tensor) -> Update:
        means, shares = self._means_and_shares(batch)
        if self.rho == 0:
            return Update(shares)
        depth = _depth(means, batch.present)
        worst = torch.where(depth == 0, shares, 0)
        # Few steps for a few groups, where each is launches and no work; a smaller table for thousands of rows.
        candidates, steps = (16, 9) if self.over_rows else (512, 4)
        log_t = _log_tilt(shares, depth, self.rho, candidates, steps)
        tilted = shares * _log_ratio(shares, depth, log_t[None]).exp()[0]
        return Update(_normalised(torch.where(self.rho >= -worst.sum().log(), worst, tilted)))


def _depth(
    means: Tensor,  # [G]
    present: Tensor,  # [G] bool
) -> Tensor:
    """[G] in [-1, 0]: (m - max m) / (max m - min m), the losses without their scale; 0 for an absent group."""
    largest = torch.where(present, means, -torch.inf).amax()
    spread = largest - torch.where(present, means, torch.inf).amin()
    return torch.where(present, (means - largest) / torch.where(spread > 0, spread, 1), 0)


def _log_tilt(
    shares: Tensor,  # [G]
    depth: Tensor,  # [G] in [-1, 0]
    rho: float,
    candidates: int,
    steps: int,
) -> Tensor:
    """[] log of the largest t <= 1e25 at which the tilted weights are in the ball; candidates^steps tell its digits."""
    # The divergence is at most t^2 / 8 (the variance of depth under any weights is at most 1/4), so this t is inside.
    least = 0.5 * (math.log(8) + math.log(rho))
    log_t, width = shares.new_full((), least), max(math.log(1e25) - least, 0.0)
    parts = torch.arange(candidates, dtype=shares.dtype, device=shares.device) / candidates
    for _ in range(steps):
        tried = log_t + width * parts
        ratio = _log_ratio(shares, depth, tried)
        growth = ratio.expm1()
        # sum p (r log r - r + 1), r = w / p = 1 + growth: no term is negative, so small divergences keep their digits.
        divergence = (shares * ((growth + 1) * ratio - growth)).sum(1)
        log_t = torch.where(divergence <= rho, tried, log_t).amax()
        width /= candidates
    return log_t


def _log_ratio(
    shares: Tensor,  # [G]
    depth: Tensor,  # [G] in [-1, 0]
    log_tilt: Tensor,  # [K]
) -> Tensor:
    """[K, G] log(w / p) of the weights w proportional to p exp(t depth)."""
    exponent = log_tilt.exp()[:, None] * depth
    return exponent - torch.log1p((shares * exponent.expm1()).sum(1, keepdim=True))


def _normalised(weights: Tensor) -> Tensor:
    """Onto the simplex, to the last bit of rounding; all 0 for a batch without rows."""
    return weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
