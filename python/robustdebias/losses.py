"""The objectives of a run, over the labelled positions that an adapter hands out.

l_i is the loss of labelled token i; tokens may be in several groups, or in none.

erm         mean of l_i. A token counts once however many groups it is in (``rd.ERM`` counts a row for each of them).
reweight    sum w_i l_i / sum w_i with w_i = sum over i's groups of 1 / N_g, N_g the training examples of group g; a
            token in no group has the weight of those in "other", or 0 (as with Group DRO) where nobody is in "other".
            Weighting by inverse group frequency (for instance Idrissi et al. 2022, arXiv 2110.14503).
group_dro   sum_g q_g m_g, m_g the mean of l_i over group g: the op of :mod:`rd_kernels` as it is.
cvar        sum_t p_t m_t over the TEXTS t of a step, m_t the mean of l_i over text t, p the largest value that weights
            of at most 1 / (alpha T) each can give: the mean over the worst share alpha of T texts.
chi_square  the same with p from a chi-square ball of radius rho around uniform (both Levy et al. 2020, arXiv 2010.05893).

The last two are DRO without groups: they need no lexicon, and groups serve for the report alone.

All but group_dro run on disjoint cells: the rows of equal membership, and of one text where texts count. Over cells,
every objective is a coefficient for each, and the statistics of any group are sums over its cells.

A step over several batches at once goes through ``window``; what it computes stands in :class:`TrainConfig`.

Letters: M labelled rows, G groups, C cells, B texts of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

import rd_kernels as rd
from robustdebias.config import TrainConfig
from robustdebias.corpus import OTHER
from robustdebias.modeling import HeadInputs

__all__ = ["Apply", "GroupLoss", "Rows", "TextLoss", "TokenMean", "build_loss"]

Apply = Callable[[int, Callable[[HeadInputs], Any]], Any]
"""``apply(k, function)``: ``function`` of the inputs of batch k of a step, with that batch's dropout masks."""


class Rows(NamedTuple):
    """What is known of a batch's labelled rows before the model has run."""

    groups: Tensor  # [M, G] bool
    texts: Tensor  # [M] int64: which text of the batch

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Rows:
        """From what :class:`robustdebias.collate.MLMCollator` gives."""
        groups, positions = batch["groups"], batch["positions"]
        texts = positions // batch["labels"].shape[1]
        return cls(groups.flatten(0, 1)[positions] if groups.dim() == 3 else groups[texts], texts)


def build_loss(
    config: TrainConfig,
    group_names: Sequence[str],
    group_counts: Sequence[int],
    *,
    linear: bool,
    process_group: Any = None,
) -> GroupLoss | TokenMean | TextLoss:
    """The loss of a run with this configuration, its ``step_size`` resolved.

    Each is called with a batch's :class:`HeadInputs`, and with ``share``, what the batch is of its step (default 1),
    which multiplies the loss. ``report()`` tells of the last batch: the weight of a group is its q with Group DRO, else
    its part in the step's loss, so that weights of overlapping groups may sum to more than 1.

    Args:
        group_counts: number of training examples in each group [G].
        linear: whether the inputs are decoder inputs (the linear op) or full logits (the logits op).
        process_group: of torch.distributed, for data-parallel training: the loss is that of the joined batches.
            Gradients are those of a mean over the processes, as DistributedDataParallel takes it.

    Raises: ValueError for a group without examples, and what the objectives of rd, the losses and
    ``rd.use_backend`` raise.
    """
    if config.backend != "auto":
        try:  # an unknown or missing one is an error now, not at the first batch
            with rd.use_backend(config.backend):
                pass
        except ValueError as error:
            raise ValueError(f"backend: {error}") from None
    if empty := [name for name, count in zip(group_names, group_counts, strict=True) if count < 1]:
        raise ValueError(f"group_counts: no training example is in {', '.join(empty)}")
    op_class = partial(rd.LinearGroupDROLoss if linear else rd.GroupDROLoss, process_group=process_group)
    if config.objective == "group_dro":
        policy = cast(Literal["decay", "hold"], config.absent_groups)
        counts = tuple(group_counts) if config.adjustment else None
        rule = rd.GroupDRO(config.step_size or 0.0, config.adjustment, counts, policy)
        return GroupLoss(
            op_class(len(group_names), objective=rule, group_names=group_names, backend=config.backend)
        )
    if config.objective == "cvar":
        return TextLoss(
            op_class, group_names, config.backend, process_group, rd.CVaR(config.alpha, base="groups")
        )
    if config.objective == "chi_square":
        return TextLoss(
            op_class, group_names, config.backend, process_group, rd.ChiSquare(config.radius, base="groups")
        )
    inverse = 1 / torch.tensor(group_counts, dtype=torch.float64) if config.objective == "reweight" else None
    return TokenMean(op_class, group_names, config.backend, process_group, inverse)


class GroupLoss(nn.Module):
    """Group DRO; its ``group_weights`` q [G] are updated before they weight the batch."""

    def __init__(self, op: Any):
        super().__init__()
        self.op = op

    @property
    def group_weights(self) -> Tensor:
        return self.op.group_weights

    def forward(self, inputs: HeadInputs, share: float = 1.0) -> Tensor:
        return share * self.op(*_arguments(inputs, inputs.groups))

    def window(self, rows: Sequence[Rows], apply: Apply) -> Iterator[Tensor]:
        """The losses of batches whose sum is the loss of all in one; each is to be differentiated before the next.

        The model runs twice: first for the statistics of the whole, from which q is updated once.
        """
        with self.op.accumulate() as window:
            for k in range(len(rows)):
                with torch.no_grad():
                    apply(k, lambda inputs: window.observe(*_arguments(inputs, inputs.groups)))
            for k in range(len(rows)):
                yield apply(k, self)

    def report(self) -> rd.GroupReport:
        return self.op.report()

    def weights_of(self, reports: Sequence[rd.GroupReport]) -> dict[str, float]:
        """The groups' weights after a step, from the reports of its batches: the last q."""
        return {name: stats.weight for name, stats in reports[-1].by_group.items()}


class _CellLoss(nn.Module):
    """What the objectives over cells share. They have no state from one step to the next."""

    def __init__(self, op_class: Any, group_names: Sequence[str], backend: str, process_group: Any):
        super().__init__()
        self._op_class, self._names, self._backend = op_class, tuple(group_names), backend
        self._process_group = process_group
        self._last: tuple[rd.GroupReport, list[list[bool]], float] | None = None

    def _cells(self, rows: Rows | HeadInputs) -> _Cells:
        """Of this process's rows, among the cells of all processes."""
        mine = self._own_cells(rows)
        if self._process_group is None:
            return mine
        ranks = torch.distributed.get_world_size(self._process_group)
        parts: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(
            parts, (mine.groups.cpu(), mine.texts.cpu()), group=self._process_group
        )
        none = torch.zeros(0, dtype=torch.int64)
        whole, _ = _Cells.joined([_Cells(groups, texts, none) for groups, texts in parts])
        before = sum(len(texts) for _, texts in parts[: torch.distributed.get_rank(self._process_group)])
        device = mine.groups.device
        return _Cells(whole.groups.to(device), whole.texts.to(device), mine.of_row + before)

    def _own_cells(self, rows: Rows | HeadInputs) -> _Cells:
        raise NotImplementedError

    def _objective(self, cells: _Cells) -> rd.Objective:
        raise NotImplementedError

    def _op(self, cells: _Cells) -> Any:
        return self._op_class(len(cells.texts), objective=self._objective(cells), backend=self._backend)

    def forward(self, inputs: HeadInputs, share: float = 1.0) -> Tensor:
        cells = self._cells(inputs)
        return self._run(self._op(cells), inputs, cells, share)

    def _run(self, op: Any, inputs: HeadInputs, cells: _Cells, share: float = 1.0) -> Tensor:
        loss = op(*_arguments(inputs, cells.of_row))
        self._last = op.report(), cells.groups.tolist(), share
        return share * loss

    def report(self) -> rd.GroupReport:
        """Statistics of the last batch by group."""
        if self._last is None:
            raise RuntimeError("report() needs a call of the loss first")
        report, cells, share = self._last
        members = list(zip(cells, report.by_group.values(), strict=False))
        return rd.GroupReport(
            report.overall,
            _merged([stats for cell, stats in members if not any(cell)], share),
            {
                name: _merged([stats for cell, stats in members if cell[group]], share)
                for group, name in enumerate(self._names)
            },
        )

    def weights_of(self, reports: Sequence[rd.GroupReport]) -> dict[str, float]:
        """The groups' weights in a step's loss, from the reports of its batches."""
        return {name: sum(report.by_group[name].weight for report in reports) for name in self._names}


class TokenMean(_CellLoss):
    """erm and reweight: a mean over labelled tokens.

    Args:
        inverse: 1 / N_g [G] float64, or None where all tokens count alike.
    """

    def __init__(
        self,
        op_class: Any,
        group_names: Sequence[str],
        backend: str,
        process_group: Any = None,
        inverse: Tensor | None = None,
    ):
        super().__init__(op_class, group_names, backend, process_group)
        self._inverse = inverse
        self._ungrouped = 0.0
        if inverse is not None and OTHER in group_names:
            self._ungrouped = float(inverse[self._names.index(OTHER)])

    def _own_cells(self, rows: Rows | HeadInputs) -> _Cells:
        return _Cells.of(rows.groups)

    def _objective(self, cells: _Cells) -> rd.Objective:
        return rd.ERM() if self._inverse is None else _RowWeights(self._weights(cells.groups))

    def _weights(self, groups: Tensor) -> Tensor:
        """w_i of rows with these memberships [., G] -> [.] float64."""
        if self._inverse is None:
            return torch.ones(len(groups), dtype=torch.float64, device=groups.device)
        inside = groups.double() @ self._inverse.to(groups.device)
        return torch.where(groups.any(dim=1), inside, self._ungrouped)

    def window(self, rows: Sequence[Rows], apply: Apply) -> Iterator[Tensor]:
        """As :meth:`GroupLoss.window`; the weights are known beforehand, so the model runs once."""
        of_batches = torch.stack([self._weights(each.groups).sum() for each in rows])
        if self._process_group is not None:
            torch.distributed.all_reduce(of_batches, group=self._process_group)
        masses = of_batches.tolist()
        for k, mass in enumerate(masses):
            share = mass / (sum(masses) or 1.0)
            yield apply(k, lambda inputs, share=share: self(inputs, share))


class TextLoss(_CellLoss):
    """cvar and chi_square: robust to the mixture of texts.

    Args:
        over_texts: the objective whose groups are texts.
    """

    def __init__(
        self,
        op_class: Any,
        group_names: Sequence[str],
        backend: str,
        process_group: Any,
        over_texts: rd.Objective,
    ):
        super().__init__(op_class, group_names, backend, process_group)
        self._over_texts = over_texts

    def _own_cells(self, rows: Rows | HeadInputs) -> _Cells:
        return _Cells.of(rows.groups, rows.texts)

    def _objective(self, cells: _Cells) -> rd.Objective:
        belongs = cells.texts.unique()[:, None] == cells.texts
        return _OverTexts(self._over_texts, belongs.double())

    def window(self, rows: Sequence[Rows], apply: Apply) -> Iterator[Tensor]:
        """As :meth:`GroupLoss.window`; the worst texts are those of all batches."""
        whole, of_row = _Cells.joined([self._cells(each) for each in rows])
        op = self._op(whole)
        parts = [whole._replace(of_row=each) for each in of_row]
        with op.accumulate() as window:
            for k, part in enumerate(parts):
                with torch.no_grad():
                    apply(k, lambda inputs, part=part: window.observe(*_arguments(inputs, part.of_row)))
            for k, part in enumerate(parts):
                yield apply(k, lambda inputs, part=part: self._run(op, inputs, part))


class _Cells(NamedTuple):
    """Labelled rows cut into disjoint cells."""

    groups: Tensor  # [C, G] bool: the groups of a cell's rows
    texts: Tensor  # [C] int64: the text of a cell's rows, 0 where texts do not count
    of_row: Tensor  # [M] int64

    @classmethod
    def of(cls, groups: Tensor, texts: Tensor | None = None) -> _Cells:
        """Rows with these memberships [M, G], of these texts [M]."""
        if texts is None:
            texts = torch.zeros(len(groups), dtype=torch.int64, device=groups.device)
        if not len(groups):  # one cell without rows
            return cls(groups.new_zeros(1, groups.shape[1]), texts.new_zeros(1), texts)
        cells, of_row = torch.cat([texts[:, None], groups], dim=1).unique(dim=0, return_inverse=True)
        return cls(cells[:, 1:].bool(), cells[:, 0], of_row)

    @classmethod
    def joined(cls, parts: Sequence[_Cells]) -> tuple[_Cells, list[Tensor]]:
        """The cells of several batches, of different texts, as those of one; and the cells of each batch's rows."""
        texts, of_row, texts_before, cells_before = [], [], 0, 0
        for part in parts:
            texts.append(part.texts + texts_before)
            of_row.append(part.of_row + cells_before)
            texts_before += max(part.texts.tolist(), default=-1) + 1
            cells_before += len(part.texts)
        return cls(torch.cat([part.groups for part in parts]), torch.cat(texts), torch.cat(of_row)), of_row


@dataclass(frozen=True, eq=False)
class _RowWeights(rd.Objective):
    """sum w_i l_i / sum w_i, the rows of a cell having the same w [C] float64."""

    weights: Tensor

    def update(self, batch: rd.Batch, q: Tensor, memory: Tensor) -> rd.Update:
        mass = self.weights @ batch.counts
        return rd.Update(torch.where(mass > 0, self.weights * batch.counts / mass, 0.0))


@dataclass(frozen=True, eq=False)
class _OverTexts(rd.Objective):
    """An objective without state whose groups are texts, for rows that are grouped by cells."""

    over_texts: rd.Objective
    belongs: (
        Tensor  # [B, C] float64: 1 where the cell is of the text. A product with it adds in a fixed order.
    )

    def update(self, batch: rd.Batch, q: Tensor, memory: Tensor) -> rd.Update:
        texts = rd.Batch(self.belongs @ batch.sums, self.belongs @ batch.counts)
        of_text = self.over_texts.update(texts, torch.ones_like(texts.sums), memory).weights
        return rd.Update((of_text / texts.counts.clamp(min=1)) @ self.belongs * batch.counts)


def _arguments(inputs: HeadInputs, groups: Tensor) -> tuple[Tensor | None, ...]:
    """Of the op."""
    if inputs.weight is None:
        return inputs.hidden, inputs.labels, groups
    return inputs.hidden, inputs.weight, inputs.labels, groups, inputs.bias


def _merged(parts: Sequence[rd.GroupStats], share: float) -> rd.GroupStats:
    parts = [part for part in parts if part.count]
    count = sum(part.count for part in parts)
    if not count:
        return rd.GroupStats(float("nan"), 0, 0.0, float("nan"))
    loss = sum(part.loss * part.count for part in parts) / count
    accuracy = sum(part.accuracy * part.count for part in parts) / count
    return rd.GroupStats(loss, count, share * sum(part.weight for part in parts), accuracy)
