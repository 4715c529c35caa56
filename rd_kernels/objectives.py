"""Objectives: how group losses become group weights. Each is a small frozen dataclass.

Every objective has the shape  loss = sum_g c_g S_g  with the coefficients c_g held constant in the
gradient (Danskin's theorem): S_g is the sum of the group's row losses. The rules of ERM and GroupDRO are in
:mod:`rd_kernels.reference`, and the kernels compute the same in their epilogue. The others are written in Python,
:meth:`Objective.update`, and run on the device between the group reduction and the backward, without waiting for it.

Letters: G groups; n_g rows and m_g = S_g / n_g mean loss of a group in the batch; p_g its share of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["ERM", "CVaR", "ChiSquare", "GroupDRO", "Objective"]


@dataclass(frozen=True)
class Objective:
    """What every objective offers to the op: the name of a rule that the kernels have, or else :meth:`update`.

    One of your own is a subclass with ``update``; it works with every backend, in both ops, on several ranks and under
    ``torch.compile``. Here it is for the mean of the group means::

        @dataclass(frozen=True)
        class Uniform(rd.Objective):
            def update(self, sums, counts, q):
                present = counts > 0
                weights = present / present.sum().clamp(min=1)
                return weights / counts.clamp(min=1), q, weights
    """

    @property
    def rule(self) -> str | None:
        """The name of a rule in the kernels; None: it is ``update`` that counts."""
        return None

    @property
    def rate(self) -> float:
        """Step size of the weight update; 0 for an objective without state."""
        return 0.0

    def adjustment_for(self, num_groups: int) -> Tensor | None:
        """What is added to each group's mean loss before the update: [G] float32, or None for nothing."""
        return None

    def update(self, sums: Tensor, counts: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From a batch's statistics to what multiplies them. Called once a batch, without gradients.

        Args: sums, counts, q [G], float64, on the device: loss sum and rows of each group (0 and 0 where the batch has
        nothing of it), on several ranks those of all; the state q, float32 between calls.

        Returns [G] each: the coefficients c, by which the rows' losses are multiplied (taken as 0 for an absent group);
        the new q (kept as it is if it is not finite); the groups' weights for the report, usually c_g n_g. Values must
        not be read on the host (``.item()``, ``if tensor``): that would wait for a GPU.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither a rule nor an update")


@dataclass(frozen=True)
class ERM(Objective):
    """Empirical risk minimisation: the mean over rows, c_g = 1 / sum(n).

    A row in several groups counts once for each; a row in no group does not count.
    """

    @property
    def rule(self) -> str:
        return "erm"


@dataclass(frozen=True)
class GroupDRO(Objective):
    """Group DRO by online exponentiated gradient (Sagawa et al. 2020, arXiv 1911.08731, Algorithm 1).

    q_g <- q_g exp(step_size (m_g + adjustment / sqrt(N_g))), normalised; c_g = q_g / n_g, where m_g and n_g
    are the batch's mean loss and row count of group g and N_g its size in the data set. q is updated with
    detached losses before it weights this batch. Computed in log space and in float64: neither the exponential nor
    step_size times a mean loss overflows.

    Args:
        step_size: finite, >= 0. The reference code's default is 0.01.
        adjustment: C of the size adjustment, finite, >= 0; needs ``group_counts`` unless it is 0.
        group_counts: N_g, one positive number per group.
        absent_groups: what becomes of the weight of a group that a batch has no rows of. "decay", the
            published rule: it loses weight whenever the normalisation takes it, so that a rare group ends near
            0 however large its loss is; meant for sampling that shows every group in every batch. "hold": its q
            stays as it is, and the groups that are present share the rest by the published proportions.

    Raises:
        ValueError, TypeError: an argument outside what is said above.
    """

    step_size: float = 0.01
    adjustment: float = 0.0
    group_counts: Sequence[int] | None = None
    absent_groups: Literal["decay", "hold"] = "decay"

    def __post_init__(self) -> None:
        for name in ("step_size", "adjustment"):
            value = getattr(self, name)
            _check_number(name, value)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if self.absent_groups not in ("decay", "hold"):
            raise ValueError(f"absent_groups must be 'decay' or 'hold', got {self.absent_groups!r}")
        if self.group_counts is not None:
            # A tuple, whatever was given: the dataclass stays hashable, the caller's list stays theirs.
            counts = tuple(float(count) for count in self.group_counts)
            if not all(math.isfinite(count) and count > 0 for count in counts):
                raise ValueError(f"group_counts must be positive and finite, got {list(self.group_counts)}")
            object.__setattr__(self, "group_counts", counts)
        elif self.adjustment > 0:
            raise ValueError("adjustment > 0 needs group_counts, the size of each group in the data set")

    @property
    def rule(self) -> str:
        return "group_dro" if self.absent_groups == "decay" else "group_dro_hold"

    @property
    def rate(self) -> float:
        return float(self.step_size)

    def adjustment_for(self, num_groups: int) -> Tensor | None:
        if self.group_counts is not None and len(self.group_counts) != num_groups:
            raise ValueError(
                f"group_counts has {len(self.group_counts)} entries, but there are {num_groups} groups"
            )
        if self.adjustment == 0 or self.group_counts is None:
            return None
        return self.adjustment / torch.tensor(self.group_counts, dtype=torch.float64).sqrt().to(torch.float32)


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
        _check_number("alpha", self.alpha)
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {self.alpha}")
        _check_base(self.base)

    def update(self, sums: Tensor, counts: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, order, shares = _worst_first(sums, counts, self.base)
        before = shares.cumsum(0) - shares
        taken = torch.minimum(shares, (self.alpha - before).clamp(min=0))
        # Divided by their sum, not by alpha: rounding leaves them on the simplex.
        weights = taken / taken.sum().clamp(min=torch.finfo(taken.dtype).tiny)
        return _as_coefficients(weights, order, counts, q)


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
        _check_number("rho", self.rho)
        if not math.isfinite(self.rho) or self.rho < 0:
            raise ValueError(f"rho must be finite and >= 0, got {self.rho}")
        _check_base(self.base)

    def update(self, sums: Tensor, counts: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        means, order, shares = _worst_first(sums, counts, self.base)
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
        return _as_coefficients(
            weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny), order, counts, q
        )


def _worst_first(sums: Tensor, counts: Tensor, base: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean losses in descending order (absent groups last, as -inf), that order, and the base distribution in it."""
    means, order = torch.where(counts > 0, sums / counts.clamp(min=1), -torch.inf).sort(
        descending=True, stable=True
    )
    size = counts if base == "rows" else (counts > 0).to(counts.dtype)
    return means, order, (size / size.sum().clamp(min=1))[order]


def _as_coefficients(
    weights: Tensor, order: Tensor, counts: Tensor, q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted weights -> what ``update`` returns."""
    weights = torch.zeros_like(weights).scatter(0, order, weights)
    return weights / counts.clamp(min=1), q, weights


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_base(base: str) -> None:
    if base not in ("rows", "groups"):
        raise ValueError(f"base must be 'rows' or 'groups', got {base!r}")
