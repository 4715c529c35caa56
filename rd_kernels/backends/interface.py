"""The interface that every backend implements.

A backend is a launcher: it allocates outputs and starts kernels; the mathematics lives in the kernels and is defined
by :mod:`rd_kernels.reference`. Letters: N rows, V vocabulary, D hidden, G groups. ``acc`` is the accumulation dtype:
float32, or float64 for float64 logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BAD_LABEL", "HIT", "IGNORED", "MISS", "Backend", "Counters", "with_unit_stride"]

# What became of a row in the row pass.
MISS, HIT, IGNORED, BAD_LABEL = 0, 1, 2, 3


class Backend:
    """One way to run the op. All tensors are on one device.

    ``logits`` [N, V] have unit stride along V and any row stride (0 included); ``labels`` [N] are
    contiguous int64; ``groups`` are contiguous and say each row's groups in one of two forms: int64 ids [N] or lists
    of them [N, K] (-1: none; a group that a row names twice counts once), or int32 words of bits [N, W], W = G / 32
    rounded up, bit g % 32 of word g / 32 set where the row is in group g. Every output element is written.
    """

    name: str
    on_gpu = False  # its kernels are made for one, wherever they run: no choices by values, padded products

    def fusable(self, dtype: torch.dtype) -> bool:
        """Whether the linear op's first product can be ``exponentials`` for hidden states of this dtype."""
        return False

    def missing(self) -> str | None:
        """Why this backend cannot run on this machine and what to do about it; None if it can."""
        raise NotImplementedError

    def refuses(self, logits: Tensor) -> str | None:
        """Why this backend cannot serve these logits (device, dtype); None if it can."""
        raise NotImplementedError

    def row_forward(
        self,
        logits: Tensor,  # [N, V]
        labels: Tensor,  # [N]
        class_weight: Tensor | None,  # [V] acc
        label_smoothing: float,
        ignore_index: int,
        details: Tensor | None = None,  # [2, N] acc, unit stride along N; written
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One read of the logits -> ``row_loss`` [N] acc, ``normaliser`` [2, N] acc, ``outcome`` [N] uint8.

        ``normaliser`` holds each row's largest logit m and log sum_j exp(z_j - m). Their sum, the log-sum-exp,
        would be rounded to the precision of m, and every probability with it. Ignored rows: loss 0,
        normaliser 0. A label outside [0, V): loss and normaliser NaN, outcome ``BAD_LABEL``.

        ``details``, where wanted: the softmax's entropy -sum_j p_j log p_j in nats (p_j = 0 adds 0; NaN where the
        normaliser is or is infinite), and how many logits are not <= the label's, NaN included: 0 for a HIT, and below
        k where the label is among the top k. Neither depends on class weights or smoothing. 0 for ignored rows, NaN
        for bad labels.
        """
        raise NotImplementedError

    def row_backward(
        self,
        grad_out: Tensor | None,  # [] or [N] acc, any stride; None: 1
        row_scale: Tensor | None,  # [N] acc; None: 1
        logits: Tensor,  # [N, V]
        labels: Tensor,  # [N]
        normaliser: Tensor,  # [2, N] acc, unit stride along N
        class_weight: Tensor | None,  # [V] acc
        label_smoothing: float,
        ignore_index: int,
        out: Tensor | None = None,  # [N, V]; may be ``logits`` itself
    ) -> Tensor:
        """d(sum_i grad_out_i row_scale_i row_loss_i) / d logits, with p = exp((z - m) - log_sum).

        Zeros where the factor is 0 or no label counts, whatever the logits.
        """
        raise NotImplementedError

    def empty(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        stride: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Unwritten memory for a large result; contiguous without ``stride``."""
        if stride is None:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    def softmax_minus_onehot_(
        self, logits: Tensor, labels: Tensor, ignore_index: int, details: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``row_forward``, and ``logits`` overwritten by softmax - onehot(label), zeros on rows not counted."""
        row_loss, normaliser, outcome = self.row_forward(logits, labels, None, 0.0, ignore_index, details)
        self.row_backward(None, None, logits, labels, normaliser, None, 0.0, ignore_index, out=logits)
        return row_loss, normaliser, outcome

    def scale_rows(self, x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        """``out`` [N, D] = scale [N] acc times x [N, D], rounded once; 0 where the scale is 0, whatever x.

        ``out`` may be ``x``.
        """
        column = scale[:, None]
        if out is x:
            return out.mul_(column).masked_fill_(column == 0, 0)
        return out.copy_(torch.where(column == 0, 0, x * column))

    def tile_count(self, vocabulary: int, device: torch.device) -> int:
        """T, the number of tiles into which ``exponentials`` cuts this many entries."""
        raise NotImplementedError

    def exponentials(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [Vp, D]
        bias: Tensor | None,  # [Vp]
        labels: Tensor,  # [N]
        ignore_index: int,
        num_classes: int,  # V: entries from there on are padding
        out: Tensor,  # [N, Vp] contiguous, overwritten with E
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Logits of the linear op, turned within their product into E, with diag(factor) E = softmax - onehot.

        -> ``row_loss``, ``normaliser``, ``outcome`` as of ``row_forward``; ``factor`` [N] acc, 0 for a row that does
        not count, NaN where its loss is; ``tile_sums`` [T, N] acc, which add up to 1 / factor. E is 0 in the padding
        and in rows of factor 0 or NaN. Only for ``fusable`` dtypes.
        """
        raise NotImplementedError

    def filtered_gradients(
        self,
        exponentials: Tensor,  # [N, Vp]
        tile_sums: Tensor,  # [T, N] acc
        labels: Tensor,  # [N]
        scale: Tensor,  # [N] acc: what multiplies E
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [Vp, D]
        filter_eps: float,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """-> d hidden and d weight without the tiles of E that together weigh at most ``filter_eps`` of all of it."""
        raise NotImplementedError

    def add_column_sums(self, x: Tensor, scale: Tensor, total: Tensor) -> None:
        """``total`` [V] acc += sum_i scale_i x_i for scale [N] acc and x [N, V], which is finite where it counts."""
        total.add_(torch.mv(x.t(), scale.to(x.dtype)))

    def compact(self, labels: Tensor, ignore_index: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows with a label, in order, without the host learning how many: all int64.

        -> ``index`` [capacity]: the first ones, then -1; ``position`` [N]: each row's place among all of them, -1
        without label; ``count`` []: all of them, which may exceed the capacity.
        """
        labelled = labels != ignore_index
        position = torch.where(labelled, labelled.cumsum(0) - 1, -1)
        places = torch.where(labelled & (position < capacity), position, capacity)
        index = torch.full((capacity + 1,), -1, dtype=torch.int64, device=labels.device)
        index.scatter_(0, places, torch.arange(labels.numel(), device=labels.device))
        return index[:capacity], position, labelled.sum()

    def gather_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """``x`` [M, D] at ``index`` [K] int64 -> [K, D], zeros where the index is not in [0, M).

        With ``compact``'s index it gathers the labelled rows, with its position it puts them back.
        """
        inside = (index >= 0) & (index < x.shape[0])
        if x.shape[0] == 0:
            return x.new_zeros((index.numel(), x.shape[1]))
        picked = x.index_select(0, torch.where(inside, index, 0))
        return torch.where(inside[:, None], picked, 0)

    def overflow_forward(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        labels: Tensor,  # [M]
        ignore_index: int,
        index: Tensor,  # [M] int64: rows of hidden, then -1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``row_forward``'s results [M] for hidden[index] @ weight.T + bias; an index of -1: an ignored row.

        For the rows that ``compact`` left out. Here in blocks of at most 2^24 logits in acc, or one row, and with
        a copy of the weight in acc; on a CPU only for the rows there are, elsewhere, unseen, for all M.
        """
        rows, acc = index.numel(), torch.promote_types(hidden.dtype, torch.float32)
        row_loss, normaliser = weight.new_zeros(rows, dtype=acc), weight.new_zeros((2, rows), dtype=acc)
        outcome = torch.full_like(index, IGNORED, dtype=torch.uint8)
        labels = torch.where(index < 0, ignore_index, labels)
        for block in self._overflow_blocks(index, weight.shape[0]):
            logits = self._overflow_logits(hidden, weight, bias, index[block])
            results = self.row_forward(logits, labels[block], None, 0.0, ignore_index)
            row_loss[block], normaliser[:, block], outcome[block] = results
        return row_loss, normaliser, outcome

    def overflow_backward(
        self,
        scale: Tensor,  # [M] acc
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        labels: Tensor,  # [M]
        normaliser: Tensor,  # [2, M] acc, unit stride along M
        ignore_index: int,
        index: Tensor,  # [M] int64: rows of hidden, then -1
        grad_hidden: Tensor | None,  # [N, D], unit stride along D: overwritten at index
        grad_weight: Tensor | None,  # [V, D], unit stride along D: added to
        grad_bias: Tensor | None,  # [V] acc: added to
    ) -> None:
        """With U = softmax - onehot of those logits: diag(scale) U W, U^T diag(scale) H and U^T scale.

        Summed in acc, rounded once. Rows of scale 0 or whose label does not count: 0, whatever U and H are. No
        index but -1: nothing changes. Blocks as in ``overflow_forward``, and grad_weight's sum in acc.
        """
        if not (blocks := self._overflow_blocks(index, weight.shape[0])):
            return
        counted = (index >= 0) & (labels != ignore_index) & (labels >= 0) & (labels < weight.shape[0])
        scale = torch.where(counted, scale, 0)
        weight_sum = None if grad_weight is None else grad_weight.to(scale.dtype, copy=True)
        bias_sum = None if grad_bias is None else grad_bias.clone()
        with torch.autocast(hidden.device.type, enabled=False):
            for block in blocks:
                rows, factor, absent = index[block], scale[block], index[block, None] < 0
                logits = self._overflow_logits(hidden, weight, bias, rows)
                weighted = self.row_backward(  # diag(scale) U
                    None, factor, logits, labels[block], normaliser[:, block], None, 0.0, ignore_index, logits
                )
                unused = factor[:, None] == 0  # what they are multiplied by may be NaN
                if grad_hidden is not None:
                    product = (weighted @ weight.to(scale.dtype)).masked_fill_(unused, 0).to(hidden.dtype)
                    # An index of -1 repeats the block's first row, or, where that is one too, changes nothing.
                    repeated = torch.where(absent[0], grad_hidden[0], product[0])
                    places = torch.where(rows < 0, rows[:1].clamp(min=0), rows)
                    grad_hidden.index_copy_(0, places, torch.where(absent, repeated, product))
                if weight_sum is not None:
                    states = self.gather_rows(hidden, rows).to(scale.dtype).masked_fill_(unused, 0)
                    weight_sum.addmm_(weighted.t(), states)
                if bias_sum is not None:
                    bias_sum.add_(weighted.sum(dim=0))
        for total, grad in ((weight_sum, grad_weight), (bias_sum, grad_bias)):
            if total is not None and grad is not None:
                grad.copy_(torch.where(index[0] < 0, grad, total.to(grad.dtype)))

    def _overflow_blocks(self, index: Tensor, vocabulary: int) -> list[slice]:
        """Of [M]: on a CPU up to the first -1, elsewhere, where looking would wait for the device, all."""
        rows = int((index >= 0).sum()) if index.device.type == "cpu" else index.numel()
        step = max(1, (1 << 24) // vocabulary)
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _overflow_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
        """hidden[rows] @ weight.T + bias in acc."""
        acc = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.gather_rows(hidden, rows).to(acc) @ weight.to(acc).t()
            return logits if bias is None else logits.add_(bias.to(acc))

    def pack_mask(self, mask: Tensor) -> Tensor:
        """A bool mask [M, G], contiguous -> int32 words of bits [M, W], W = G / 32 rounded up, zeros beyond G."""
        rows, num_groups = mask.shape
        padded = mask.new_zeros((rows, -(-num_groups // 32) * 32))
        padded[:, :num_groups] = mask
        # The bytes, each 0 or 1, eight at a time: one product moves them to the top byte.
        eights = padded.view(torch.int64)
        return ((eights * 0x0102040810204080) >> 56).to(torch.uint8).view(torch.int32)

    def group_reduce(
        self, row_loss: Tensor, outcome: Tensor, groups: Tensor, num_groups: int
    ) -> tuple[Tensor, Tensor]:
        """-> ``stats`` [4, G+2] acc, ``status`` [2] int64.

        Rows of ``stats``: loss sum, row count, hits, weight (left to ``group_update``). Columns: the G
        groups, labelled rows in no group, all labelled rows. ``status``: the number of labels out of range,
        and of group ids out of range (looked at on labelled rows only).
        """
        raise NotImplementedError

    def group_update(
        self,
        stats: Tensor,  # [4, G+2] acc, its row 3 is written
        status: Tensor,  # [2] int64
        q: Tensor,  # [G] float32, updated in place
        rule: str,  # one of rd_kernels.rules.RULES
        rate: float,  # its step size or tilt
        adjustment: Tensor | None,  # [G] float32; of Group DRO
    ) -> tuple[Tensor, Tensor]:
        """-> ``loss`` [] acc, ``coefficients`` [G] acc. A non-zero status: loss NaN, coefficients 0, q kept."""
        raise NotImplementedError

    def row_scale(self, coefficients: Tensor, outcome: Tensor, groups: Tensor) -> Tensor:
        """-> [N] acc: the sum of the coefficients of a row's groups; 0 for rows without label or group."""
        raise NotImplementedError

    def grouped_forward(
        self,
        logits: Tensor,
        labels: Tensor,
        groups: Tensor,
        q: Tensor,
        rule: str,
        rate: float,
        adjustment: Tensor | None,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Steps 1-3 -> ``loss`` [], ``stats``, ``status``, ``row_scale`` [N], ``normaliser`` [2, N]."""
        row_loss, normaliser, outcome = self.row_forward(logits, labels, None, 0.0, ignore_index)
        loss, stats, status, scale = self.reduce_and_update(
            row_loss, outcome, groups, q, rule, rate, adjustment
        )
        return loss, stats, status, scale, normaliser

    def reduce_and_update(
        self,
        row_loss: Tensor,
        outcome: Tensor,
        groups: Tensor,
        q: Tensor,
        rule: str,
        rate: float,
        adjustment: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Steps 2 and 3 on finished row losses -> ``loss``, ``stats``, ``status``, ``row_scale``."""
        stats, status = self.group_reduce(row_loss, outcome, groups, q.numel())
        loss, coefficients = self.group_update(stats, status, q, rule, rate, adjustment)
        return loss, stats, status, self.row_scale(coefficients, outcome, groups)


class Counters(dict[tuple[torch.device, int], Tensor]):
    """Those by which blocks or programs of a kernel find out that they are the last: zero between kernels, one set for
    each device and stream, because kernels of different streams run at the same time."""

    def zeros(self, size: int, device: torch.device) -> Tensor:
        """``size`` int32 counters that are 0 now, and that the kernel leaves so."""
        stream = 0
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                # A graph may run at the same time as the stream it was captured on, so it has its own.
                return torch.zeros(size, dtype=torch.int32, device=device)
            stream = torch._C._cuda_getCurrentRawStream(device.index)
        counters = self.get((device, stream))
        if counters is None or counters.numel() < size:
            counters = torch.zeros(max(1024, 2 * size), dtype=torch.int32, device=device)
            self[device, stream] = counters
        return counters


def with_unit_stride(x: Tensor) -> Tensor:
    """``x`` [N, D] with unit stride along D."""
    return x if x.stride(1) == 1 else x.contiguous()
