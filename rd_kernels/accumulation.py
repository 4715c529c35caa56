"""Gradient accumulation with the numbers of one large batch: what the losses' ``accumulate`` does. G groups, U units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rd_kernels import grouped, reduction
from rd_kernels.reduction import Given

__all__ = ["Window"]


class Window:
    """The micro-batches of one step; see ``accumulate`` of the group losses."""

    def __init__(self, loss_fn: Any):
        self._loss_fn = loss_fn
        self._seen: list[grouped.Grouped] = []
        self._given: list[Given] = []  # for each micro-batch its weights
        self._results: list[tuple[Tensor, Tensor]] = []  # loss and statistics

    def observe(self, *call: Any, **named: Any) -> None:
        """Add the statistics of a micro-batch, given what the loss takes. Computes no gradient and leaves q alone."""
        if self._given:
            raise RuntimeError("observe() after a loss of the same window: observe all micro-batches first")
        with torch.no_grad():
            self._seen.append(self._loss_fn._grouped(self._loss_fn._state_now(), Given(), *call, **named))

    def loss(self, *call: Any, **named: Any) -> grouped.Grouped:
        """That of the next micro-batch, weighted for all of them; the first steps q."""
        if not self._seen:
            raise RuntimeError("accumulate(): a loss before observe() has seen the window's micro-batches")
        if not self._given:
            self._given = self._weigh()
        if len(self._results) == len(self._seen):
            raise RuntimeError(
                f"accumulate(): {len(self._seen)} micro-batches were observed, this is one more"
            )
        given = self._given[len(self._results)]
        result = self._loss_fn._grouped(self._loss_fn._state_now(), given, *call, **named)
        self._results.append((result.loss.detach(), result.reduced.stats))
        return result

    def _weigh(self) -> list[Given]:
        """The objective's weights, from the statistics of all; updates q and memory where the loss is in training."""
        loss_fn, seen = self._loss_fn, [each.reduced for each in self._seen]
        self._stats = torch.stack([each.stats for each in seen]).sum(0)
        self._status = torch.stack([each.status for each in seen]).sum(0)
        if loss_fn.objective.over_rows:
            units = [each.units for each in seen if each.units is not None]
            weights = reduction.weigh(torch.cat(units, dim=1), loss_fn.objective, seen[0].process_group)
            weights = torch.where((self._status == 0).all(), weights, torch.nan)
            return [Given(weights=part) for part in weights.split([each.shape[1] for each in units])]
        state = loss_fn._state_now() if loss_fn.training else loss_fn._copied_state()
        _, coefficients = reduction.update(self._stats, self._status, state, loss_fn.settings, "reference")
        return [Given(coefficients, self._stats[3])] * len(seen)

    def finish(self) -> grouped.Grouped | None:
        """-> what stands for the whole window; None for a window without micro-batches."""
        if len(self._results) != len(self._seen):
            raise RuntimeError(
                f"accumulate(): {len(self._seen)} micro-batches were observed, but the loss was called "
                f"{len(self._results)} times"
            )
        if not self._seen:
            return None
        stats = self._stats
        if self._loss_fn.objective.over_rows:  # known by group only once the rows' weights were
            weights = torch.stack([stats[3] for _, stats in self._results]).sum(0)
            stats = torch.cat([stats[:3], weights[None], stats[4:]])
        loss = torch.stack([loss for loss, _ in self._results]).sum()
        last = self._seen[-1].reduced._replace(loss=loss, stats=stats, status=self._status)
        return self._seen[-1]._replace(loss=loss, reduced=last, places=None)
