"""What every objective is: a rule that turns a batch's statistics into weights.

The loss of every objective is  sum_g w_g m_g  with the weights w held constant in the gradient (Danskin's theorem); m_g
is a group's mean loss. Letters: G groups, N rows; S_g loss sum and n_g rows of a group in the batch, m_g = S_g / n_g.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rd_kernels.rules import RULES

__all__ = ["Batch", "Objective", "Update", "check_choice", "check_number"]


class Batch(NamedTuple):
    """A batch's statistics, each [G] float64 on the device; on several ranks those of all. Where an objective is over
    rows, the rows stand in place of the groups."""

    sums: Tensor  # of the losses; 0 for an absent group
    counts: Tensor  # of the rows; 0 for an absent group
    excess: Tensor | None = None  # sums of max(loss - reference loss, 0), for an objective that asks for them
    adjustment: Tensor | None = None  # to be added to the mean losses before the update

    @property
    def present(self) -> Tensor:
        """[G] bool: the groups that the batch has rows of."""
        return self.counts > 0

    @property
    def means(self) -> Tensor:
        """[G] mean losses; 0 for an absent group."""
        return self.sums / self.counts.clamp(min=1)


class Update(NamedTuple):
    """What an objective makes of a batch. ``weights`` [G] multiply the groups' mean losses and stand in the report
    (absent groups: in the report only); ``q`` [G] and ``memory`` [M, G] go on to the next batch, None: as they were."""

    weights: Tensor
    q: Tensor | None = None
    memory: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """What every objective offers to the op: the name of a rule that the kernels have, or else :meth:`update`.

    One of your own is a subclass with ``update``; it works with every backend, in both ops, on several ranks and under
    ``torch.compile``. Here it is for the mean of the group means::

        @dataclass(frozen=True)
        class Uniform(rd.Objective):
            def update(self, batch, q, memory):
                return rd.Update(batch.present / batch.present.sum().clamp(min=1))
    """

    #: Names of what it remembers from batch to batch beside q, a row of ``memory`` [M, G] each.
    memory: ClassVar[tuple[str, ...]] = ()
    #: Whether the loss must be called with ``reference_losses``.
    needs_reference: ClassVar[bool] = False

    @property
    def rule(self) -> str | None:
        """The name of a rule in the kernels (:data:`rd_kernels.rules.RULES`); None: it is ``update`` that counts."""
        return None

    @property
    def rate(self) -> float:
        """The rule's step size or tilt."""
        return 0.0

    @property
    def over_rows(self) -> bool:
        """Whether ``update`` is to weight the rows, each with a count of 1, instead of the groups."""
        return False

    def check(self, num_groups: int) -> None:
        """Raise ValueError if the parameters do not fit this number of groups."""

    def adjustment_for(self, num_groups: int) -> Tensor | None:
        """What is added to each group's mean loss before the update: [G] float32, or None for nothing."""
        return None

    def initial_memory(self, num_groups: int) -> Tensor:
        """[M, G] float64 before the first batch; M = ``len(self.memory)``."""
        return torch.zeros((len(self.memory), num_groups), dtype=torch.float64)

    def update(self, batch: Batch, q: Tensor, memory: Tensor) -> Update:
        """From a batch's statistics to weights. Called once a batch, without gradients.

        Args: q [G], memory [M, G], float64; q is float32 between calls.

        Values must not be read on the host (``.item()``, ``if tensor``): that would wait for a GPU. A q or memory that
        is not finite where it was finite before is not taken over: one bad batch must not destroy the state.
        """
        if self.rule is None:
            raise NotImplementedError(f"{type(self).__name__} has neither a rule nor an update")
        _, q, weights = RULES[self.rule](batch.sums, batch.counts, q, self.rate, batch.adjustment)
        return Update(weights, q)


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Raise TypeError or ValueError unless ``value`` is a finite number, >= ``least`` and <= ``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or not least <= value <= most:
        bounds = (f" and >= {least:g}" if least > -math.inf else "") + (
            f" and <= {most:g}" if most < math.inf else ""
        )
        raise ValueError(f"{name} must be finite{bounds}, got {value}")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
