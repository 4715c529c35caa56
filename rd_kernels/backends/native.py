"""What the launchers of compiled kernels share: tensors as the addresses, sizes and strides that csrc takes.

Letters: N rows, V vocabulary, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rd_kernels.backends.interface import Backend

__all__ = ["NativeBackend", "address", "dtype_name"]


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def dtype_name(dtype: torch.dtype) -> str:
    return _NAMES[dtype]


_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class NativeBackend(Backend):
    """``_native`` is the compiled module, with the classes of csrc/common/bindings.h."""

    _native: Any

    def _rows(self, logits: Tensor, labels: Tensor, ignore_index: int) -> Any:
        rows, vocabulary = logits.shape
        return self._native.Rows(
            logits.data_ptr(),
            _NAMES[logits.dtype],
            rows,
            vocabulary,
            logits.stride(0),
            labels.data_ptr(),
            ignore_index,
        )

    def _row_results(
        self, rows: int, device: torch.device, details: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Any]:
        """-> row_loss [N], normaliser [2, N] and outcome [N], unwritten, and their addresses with those of details."""
        row_loss = torch.empty(rows, dtype=torch.float32, device=device)
        normaliser = torch.empty((2, rows), dtype=torch.float32, device=device)
        outcome = torch.empty(rows, dtype=torch.uint8, device=device)
        addresses = self._native.RowResults(
            row_loss.data_ptr(),
            self._normaliser(normaliser),
            outcome.data_ptr(),
            self._native.Details(address(details), 0 if details is None else details.stride(0)),
        )
        return (row_loss, normaliser, outcome), addresses

    def _normaliser(self, normaliser: Tensor) -> Any:
        return self._native.Normaliser(normaliser.data_ptr(), normaliser.stride(0))

    def _row_gradient(
        self,
        grad_out: Tensor | None,
        row_scale: Tensor | None,
        normaliser: Tensor,
        out: Tensor,
        stream: bool,
    ) -> Any:
        return self._native.RowGradient(
            address(grad_out),
            0 if grad_out is None or grad_out.dim() == 0 else grad_out.stride(0),
            address(row_scale),
            self._normaliser(normaliser),
            out.data_ptr(),
            out.stride(0),
            stream,
        )

    def _statistics(self, num_groups: int, device: torch.device) -> tuple[Tensor, Tensor, Any]:
        """-> stats [4, G+2] and status [2], unwritten, and their addresses."""
        stats = torch.empty((4, num_groups + 2), dtype=torch.float32, device=device)
        status = torch.empty(2, dtype=torch.int64, device=device)
        return stats, status, self._native.Statistics(stats.data_ptr(), status.data_ptr())

    def _groups(self, groups: Tensor, num_groups: int) -> Any:
        width = 1 if groups.dim() == 1 else groups.shape[1]
        lists, bits = (0, groups.data_ptr()) if groups.dtype == torch.int32 else (groups.data_ptr(), 0)
        return self._native.Groups(lists, bits, width, num_groups)

    def _update(self, objective: str, rate: float, adjustment: Tensor | None, q: Tensor) -> Any:
        return self._native.Update(objective, rate, address(adjustment), q.data_ptr())
