"""Gradient accumulation with the numbers of one large batch: what the losses' ``accumulate`` does. G groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rd_kernels import distributed, grouped
from rd_kernels.objectives import Objective

__all__ = ["Window"]


@dataclass(frozen=True, eq=False)
class Given(Objective):
    """Coefficients that are known already; 0 while they are not."""

    coefficients: Tensor | None = None  # [G]
    weights: Tensor | None = None  # [G], for the report

    def update(self, sums: Tensor, counts: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nothing = torch.zeros_like(sums)
        return (
            nothing if self.coefficients is None else self.coefficients,
            q,
            nothing if self.weights is None else self.weights,
        )


class Window:
    """The micro-batches of one step; see ``accumulate`` of the group losses."""

    def __init__(self, loss_fn: Any):
        self._loss_fn = loss_fn
        self._total: grouped.Grouped | None = None
        self._weighting: Given | None = None
        self._observed = self._called = 0

    def observe(self, *call: Any, **named: Any) -> None:
        """Add the statistics of a micro-batch, given what the loss takes. Computes no gradient and leaves q alone."""
        if self._weighting is not None:
            raise RuntimeError("observe() after a loss of the same window: observe all micro-batches first")
        with torch.no_grad():
            seen = self._loss_fn._grouped(self._loss_fn.group_weights.clone(), Given(), None, *call, **named)
        if self._total is not None:
            seen = seen._replace(
                stats=seen.stats + self._total.stats, status=seen.status + self._total.status
            )
        self._total = seen
        self._observed += 1

    def weighting(self) -> Objective:
        """What weights the micro-batches from now on; steps q when called first."""
        self._called += 1
        if self._weighting is None:
            if self._total is None:
                raise RuntimeError(
                    "accumulate(): a loss before observe() has seen the window's micro-batches"
                )
            loss_fn, (_, stats, status, *_) = self._loss_fn, self._total
            q = loss_fn.group_weights if loss_fn.training else loss_fn.group_weights.clone()
            _, coefficients = distributed.group_update(
                stats, status, q, loss_fn.objective, loss_fn._adjustment, "reference"
            )
            self._weighting = Given(coefficients.double(), stats[3, :-2].double())
        return self._weighting

    def finish(self) -> None:
        if self._called != self._observed:
            raise RuntimeError(
                f"accumulate(): {self._observed} micro-batches were observed, but the loss was called {self._called} times"
            )
        if self._total is not None:
            self._loss_fn._keep(self._total._replace(places=None))
