"""The linear op: logits = hidden @ weight.T + bias, never kept as logits; GEMMs by torch.

Row scaling commutes out of the gradient GEMMs. With U = softmax - onehot (unweighted) and r the row
weights, known only after the whole batch was reduced,

    d hidden = diag(r) (U W),   d weight = U^T (diag(r) H),   d bias = U^T r.

So the forward stores U once, before r is known, and the weights are folded in late: exact for any row
weights, 3 GEMMs, nothing recomputed. Where the memory budget holds only a fraction f of the rows, the
others' logits are computed again in the backward: 4 - f GEMMs. N rows, V vocabulary, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rd_kernels.backends.registry import Backend

__all__ = ["DEFAULT_MEMORY_BUDGET", "backward", "forward", "plan"]

DEFAULT_MEMORY_BUDGET = 1 << 30  # bytes


def plan(rows: int, vocabulary: int, width: int, itemsize: int, memory_budget: int) -> tuple[int, int]:
    """How many rows to store and how many to work on at a time, within ``memory_budget`` bytes.

    The budget covers what grows with the rows: a row's logits (or U), and its weighted hidden state in the
    backward with float32 intermediates. It does not cover the gradients; while several blocks are summed, a
    16-bit weight gradient is held twice, in float32 and as the block's share.
    Raises ValueError if the budget holds not even one row.
    """
    row_bytes = vocabulary * itemsize + width * (itemsize + 2 * max(itemsize, 4))
    affordable = memory_budget // row_bytes
    if affordable < 1:
        raise ValueError(f"memory_budget is {memory_budget} bytes, but a single row needs {row_bytes}")
    if affordable >= rows:
        return rows, max(rows, 1)
    # GEMMs on fewer than a few hundred rows are slow, so the working block comes before the store.
    block = min(affordable, max(256, affordable // 4))
    return affordable - block, block


def forward(
    backend: Backend,
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N]
    ignore_index: int,
    stored_rows: int,
    block_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> ``row_loss`` [N], ``normaliser`` [2, N], ``outcome`` [N] and U [stored_rows, V] in hidden's dtype."""
    rows = hidden.shape[0]
    unweighted = hidden.new_empty((stored_rows, weight.shape[0]))
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):  # the caller chose the dtypes
        _logits(hidden[:stored_rows], weight, bias, out=unweighted)
        parts.append(backend.softmax_minus_onehot_(unweighted, labels[:stored_rows], ignore_index))
        buffer = hidden.new_empty((min(block_rows, rows - stored_rows), weight.shape[0]))
        for start in range(stored_rows, rows, block_rows):
            block = slice(start, min(start + block_rows, rows))
            logits = _logits(hidden[block], weight, bias, out=buffer[: block.stop - start])
            parts.append(backend.row_forward(logits, labels[block], None, 0.0, ignore_index))
    if len(parts) == 1:
        return *parts[0], unweighted
    row_loss, normaliser, outcome = (torch.cat(column, dim=-1) for column in zip(*parts, strict=True))
    return row_loss, normaliser, outcome, unweighted


def backward(
    backend: Backend,
    grad_out: Tensor,  # [] acc
    row_scale: Tensor,  # [N] acc
    unweighted: Tensor,  # [stored_rows, V]
    normaliser: Tensor,  # [2, N] acc
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N]
    ignore_index: int,
    block_rows: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of hidden, weight, bias in hidden's dtype; an empty tensor where not needed."""
    rows, stored_rows = hidden.shape[0], unweighted.shape[0]
    scale = (row_scale * grad_out)[:, None]  # [N, 1]
    grad_hidden = hidden.new_empty(hidden.shape if needs[0] else (0,))
    # One block: its GEMM writes the result. Several: they are added up in acc, so that bf16 is rounded once.
    several = stored_rows < rows
    total_dtype = normaliser.dtype if several else hidden.dtype
    grad_weight = hidden.new_zeros(weight.shape if needs[1] else (0,), dtype=total_dtype)
    grad_bias = hidden.new_zeros(weight.shape[:1] if needs[2] else (0,), dtype=normaliser.dtype)

    def accumulate(block: slice, unweighted_block: Tensor) -> None:
        block_scale = scale[block]
        if needs[0]:
            rows_gradient = torch.mm(unweighted_block, weight, out=grad_hidden[block])
            rows_gradient.mul_(block_scale).masked_fill_(block_scale == 0, 0)
        if needs[1]:
            weighted = torch.where(block_scale == 0, 0, hidden[block] * block_scale).to(hidden.dtype)
            if total_dtype == hidden.dtype:
                grad_weight.addmm_(unweighted_block.t(), weighted)
            else:
                grad_weight.add_(unweighted_block.t() @ weighted)
        if needs[2]:
            grad_bias.add_(unweighted_block.t() @ block_scale[:, 0].to(hidden.dtype))

    with torch.autocast(hidden.device.type, enabled=False):
        if stored_rows:
            accumulate(slice(0, stored_rows), unweighted)
        buffer = hidden.new_empty((min(block_rows, rows - stored_rows), weight.shape[0]))
        for start in range(stored_rows, rows, block_rows):
            block = slice(start, min(start + block_rows, rows))
            logits = _logits(hidden[block], weight, bias, out=buffer[: block.stop - start])
            backend.row_backward(
                None, None, logits, labels[block], normaliser[:, block], None, 0.0, ignore_index, out=logits
            )
            accumulate(block, logits)
    return grad_hidden, grad_weight.to(hidden.dtype), grad_bias.to(hidden.dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)
