"""Launches the Triton kernels for rows that rarely carry a label. No mathematics here.

Letters: N rows, V vocabulary, D hidden, K rows asked for, M rows of the overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rd_kernels.backends.interface import with_unit_stride
from rd_kernels.backends.triton_launcher import Launcher

__all__ = ["TritonSparse"]

_CHUNK = 1024  # labels that one program counts and places
_WIDEST = 1024  # elements of a row that one program gathers

# By bytes of an element, no tuning at run time: few programs to start in vain, and every value in registers on all
# targets. float32 has no matrix instructions on NVIDIA GPUs that are exact: its operands take registers as well.
_FORWARD = {
    2: {"ROWS": 64, "VOCABULARY": 128, "DEPTH": 64, "num_warps": 8},
    4: {"ROWS": 32, "VOCABULARY": 32, "DEPTH": 16, "num_warps": 4},
}
_GRAD_HIDDEN = {
    2: {"ROWS": 64, "VOCABULARY": 64, "DEPTH": 64, "WIDTH": 128, "num_warps": 8},
    4: {"ROWS": 32, "VOCABULARY": 32, "DEPTH": 16, "WIDTH": 64, "num_warps": 4},
}
_GRAD_WEIGHT = {
    2: {"ROWS": 32, "VOCABULARY": 64, "DEPTH": 32, "WIDTH": 64, "num_warps": 8},
    4: {"ROWS": 32, "VOCABULARY": 32, "DEPTH": 16, "WIDTH": 64, "num_warps": 8},
}


class TritonSparse(Launcher):
    """The part of the Triton backend that packs labelled rows and computes those that do not fit."""

    _tiles = (_FORWARD, _GRAD_HIDDEN, _GRAD_WEIGHT)
    _chunk = _CHUNK

    def compact(self, labels: Tensor, ignore_index: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, device, chunk = labels.numel(), labels.device, self._chunk
        chunks = -(-rows // chunk)
        counts = torch.empty(chunks, dtype=torch.int32, device=device)
        index = torch.empty(capacity, dtype=torch.int64, device=device)
        position = torch.empty(rows, dtype=torch.int64, device=device)
        count = torch.empty((), dtype=torch.int64, device=device)
        self._launch("compact_counts", (chunks,), (labels, counts), (rows, ignore_index), ROWS=chunk)
        self._launch(
            "compact_places",
            (max(1, chunks, -(-capacity // chunk)),),
            (labels, counts, index, position, count),
            (rows, chunks, capacity, ignore_index),
            ROWS=chunk,
        )
        return index, position, count

    def gather_rows(self, x: Tensor, index: Tensor) -> Tensor:
        x = with_unit_stride(x)
        width, warp = x.shape[1], 64 if self._architecture_of(x.device).startswith("gfx") else 32
        out = torch.empty((index.numel(), width), dtype=x.dtype, device=x.device)
        columns = min(_WIDEST, max(32, 1 << (width - 1).bit_length()))
        self._launch(
            "gather_rows",
            (index.numel(), -(-width // columns)),
            (x, index, out),
            (x.stride(0), x.shape[0], width),
            COLUMNS=columns,
            num_warps=max(1, columns * x.element_size() // (16 * warp)),  # 16 bytes a thread
        )
        return out

    def overflow_forward(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        labels: Tensor,  # [M] int64
        ignore_index: int,
        index: Tensor,  # [M] int64
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight, bias = _operands(hidden, weight, bias)
        rows, device = index.numel(), hidden.device
        row_loss = torch.empty(rows, dtype=torch.float32, device=device)
        normaliser = torch.empty((2, rows), dtype=torch.float32, device=device)
        outcome = torch.empty(rows, dtype=torch.uint8, device=device)
        tile = self._tiles[0][hidden.element_size()]
        self._launch(
            "overflow_forward",
            (-(-rows // tile["ROWS"]),),
            (hidden, weight, bias, labels, index, row_loss, normaliser, outcome),
            (hidden.stride(0), weight.stride(0), normaliser.stride(0), rows, *weight.shape, ignore_index),
            **tile,
        )
        return row_loss, normaliser, outcome

    def overflow_backward(
        self,
        scale: Tensor,  # [M] acc
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        labels: Tensor,  # [M] int64
        normaliser: Tensor,  # [2, M] acc, unit stride along M
        ignore_index: int,
        index: Tensor,  # [M] int64
        grad_hidden: Tensor | None,  # [N, D], unit stride along D
        grad_weight: Tensor | None,  # [V, D], unit stride along D
        grad_bias: Tensor | None,  # [V] acc
    ) -> None:
        if index.numel() == 0:
            return
        hidden, weight, bias = _operands(hidden, weight, bias)
        rows, (vocabulary, width) = index.numel(), weight.shape
        inputs = (scale, hidden, weight, bias, labels, normaliser, index)
        strides = (hidden.stride(0), weight.stride(0), normaliser.stride(0))
        if grad_hidden is not None:
            tile = self._tiles[1][hidden.element_size()]
            self._launch(
                "overflow_grad_hidden",
                (-(-rows // tile["ROWS"]), -(-width // tile["WIDTH"])),
                (*inputs, grad_hidden),
                (*strides, grad_hidden.stride(0), rows, vocabulary, width, ignore_index),
                **tile,
            )
        if grad_weight is not None or grad_bias is not None:
            tile = self._tiles[2][hidden.element_size()]
            grad_stride = 0 if grad_weight is None else grad_weight.stride(0)
            blocks = 1 if grad_weight is None else -(-width // tile["WIDTH"])
            self._launch(
                "overflow_grad_weight",
                (-(-vocabulary // tile["VOCABULARY"]), blocks),
                (*inputs, grad_weight, grad_bias),
                (*strides, grad_stride, rows, vocabulary, width, ignore_index),
                **tile,
            )


def _operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return with_unit_stride(hidden), with_unit_stride(weight), None if bias is None else bias.contiguous()
