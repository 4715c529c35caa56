"""Launches the native CPU kernels: allocates what they write and passes addresses. No mathematics here.

``rd_kernels._native`` is loaded when the backend is first asked whether it is there. The number of threads is
torch's (``torch.set_num_threads``); results do not depend on it. Large gradients are put into memory that earlier
ones left, of which RD_KERNELS_CACHE_BYTES are kept (default 1 GiB). Letters: N rows, V vocabulary, G groups.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from types import ModuleType

import torch
from torch import Tensor

from rd_kernels.backends.registry import Backend

__all__ = ["CPUBackend"]

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

CACHE_VARIABLE = "RD_KERNELS_CACHE_BYTES"

# From this size on malloc takes fresh memory for each tensor, so tensors get a Block that is used again.
_LARGE = 32 << 20


class CPUBackend(Backend):
    """C++ kernels for AVX-512, AVX2 or any CPU, chosen at run time or by RD_KERNELS_CPU_ISA."""

    name = "cpu"

    def missing(self) -> str | None:
        loaded = self._loaded
        if isinstance(loaded, ModuleType):
            return None
        return (
            f"the native module cannot be loaded ({loaded}); build it with a C++17 compiler: "
            "pip install -e . or python setup.py build_ext --inplace"
        )

    def refuses(self, logits: Tensor) -> str | None:
        if logits.device.type != "cpu":
            return f"it serves CPU tensors, not {logits.device}"
        if logits.dtype not in _DTYPES:
            return f"it serves float32 and bfloat16 logits, not {logits.dtype}"
        return None

    def row_forward(self, logits, labels, class_weight, label_smoothing, ignore_index):
        native = self._native
        results, addresses = self._row_results(logits.shape[0])
        native.row_forward(
            self._rows(logits, labels, ignore_index),
            native.Target(_address(class_weight), label_smoothing),
            addresses,
            torch.get_num_threads(),
        )
        return results

    def row_backward(
        self,
        grad_out,
        row_scale,
        logits,
        labels,
        normaliser,
        class_weight,
        label_smoothing,
        ignore_index,
        out=None,
    ):
        native = self._native
        stream = False
        if out is None:
            out, fresh = self._allocate(logits.shape, logits.dtype)
            stream = not fresh
        grad_out_stride = 0 if grad_out is None or grad_out.dim() == 0 else grad_out.stride(0)
        native.row_backward(
            self._rows(logits, labels, ignore_index),
            native.Target(_address(class_weight), label_smoothing),
            native.RowGradient(
                _address(grad_out),
                grad_out_stride,
                _address(row_scale),
                self._normaliser(normaliser),
                out.data_ptr(),
                out.stride(0),
                stream,
            ),
            torch.get_num_threads(),
        )
        return out

    def empty(self, shape, dtype, device, stride=None):
        return self._allocate(shape, dtype, stride)[0]

    def softmax_minus_onehot_(self, logits, labels, ignore_index):
        results, addresses = self._row_results(logits.shape[0])
        self._native.softmax_minus_onehot(
            self._rows(logits, labels, ignore_index), addresses, torch.get_num_threads()
        )
        return results

    def group_reduce(self, row_loss, outcome, groups, num_groups):
        stats, status, addresses = self._statistics(num_groups)
        self._native.group_reduce(
            row_loss.data_ptr(),
            outcome.data_ptr(),
            row_loss.numel(),
            self._groups(groups, num_groups),
            addresses,
        )
        return stats, status

    def group_update(self, stats, status, q, objective, step_size, adjustment):
        native = self._native
        loss = torch.empty((), dtype=torch.float32)
        coefficients = torch.empty(q.numel(), dtype=torch.float32)
        native.group_update(
            native.Statistics(stats.data_ptr(), status.data_ptr()),
            q.numel(),
            native.Update(objective, step_size, _address(adjustment), q.data_ptr()),
            loss.data_ptr(),
            coefficients.data_ptr(),
        )
        return loss, coefficients

    def row_scale(self, coefficients, outcome, groups):
        scale = torch.empty(outcome.numel(), dtype=torch.float32)
        self._native.row_scale(
            coefficients.data_ptr(),
            outcome.data_ptr(),
            outcome.numel(),
            self._groups(groups, coefficients.numel()),
            scale.data_ptr(),
        )
        return scale

    def grouped_forward(self, logits, labels, groups, q, objective, step_size, adjustment, ignore_index):
        native = self._native
        rows, num_groups = logits.shape[0], q.numel()
        # q is float32 as these are, and that saves naming the dtype, which takes torch a microsecond each time.
        loss, scale, normaliser = q.new_empty(()), q.new_empty(rows), q.new_empty((2, rows))
        stats, status, addresses = self._statistics(num_groups)
        native.grouped_forward(
            self._rows(logits, labels, ignore_index),
            self._groups(groups, num_groups),
            native.Update(objective, step_size, _address(adjustment), q.data_ptr()),
            addresses,
            loss.data_ptr(),
            scale.data_ptr(),
            self._normaliser(normaliser),
            torch.get_num_threads(),
        )
        return loss, stats, status, scale, normaliser

    def _allocate(self, shape, dtype, stride=None) -> tuple[Tensor, bool]:
        """-> an unwritten tensor, and whether its pages may be fresh: those are best written through the cache."""
        if stride is None:
            elements = math.prod(shape)
        else:
            elements = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if 0 in shape or elements * dtype.itemsize < _LARGE:
            return super().empty(shape, dtype, torch.device("cpu"), stride), True
        block = self._native.Block(elements * dtype.itemsize)
        memory = torch.frombuffer(block, dtype=dtype, count=elements)
        tensor = memory.view(shape) if stride is None else memory.as_strided(shape, stride)
        return tensor, block.fresh

    def empty_cache(self) -> None:
        self._native.empty_cache()

    @functools.cached_property
    def _loaded(self) -> ModuleType | ImportError:
        try:
            native = importlib.import_module("rd_kernels._native").cpu
        except ImportError as error:
            return error
        if (limit := os.environ.get(CACHE_VARIABLE)) is not None:
            if not limit.isdecimal():
                raise ValueError(f"{CACHE_VARIABLE} must be a number of bytes, 0 for no cache, got {limit!r}")
            native.set_cache_limit(int(limit))
        return native

    @functools.cached_property
    def _native(self):
        if isinstance(self._loaded, ImportError):
            raise RuntimeError(self.missing()) from self._loaded
        return self._loaded

    def _rows(self, logits: Tensor, labels: Tensor, ignore_index: int):
        rows, vocabulary = logits.shape
        return self._native.Rows(
            logits.data_ptr(),
            _DTYPES[logits.dtype],
            rows,
            vocabulary,
            logits.stride(0),
            labels.data_ptr(),
            ignore_index,
        )

    def _row_results(self, rows: int):
        """-> row_loss [N], normaliser [2, N] and outcome [N], unwritten, and their addresses."""
        row_loss = torch.empty(rows, dtype=torch.float32)
        normaliser = torch.empty((2, rows), dtype=torch.float32)
        outcome = torch.empty(rows, dtype=torch.uint8)
        addresses = self._native.RowResults(
            row_loss.data_ptr(), self._normaliser(normaliser), outcome.data_ptr()
        )
        return (row_loss, normaliser, outcome), addresses

    def _normaliser(self, normaliser: Tensor):
        return self._native.Normaliser(normaliser.data_ptr(), normaliser.stride(0))

    def _statistics(self, num_groups: int):
        """-> stats [4, G+2] and status [2], unwritten, and their addresses."""
        stats = torch.empty((4, num_groups + 2), dtype=torch.float32)
        status = torch.empty(2, dtype=torch.int64)
        return stats, status, self._native.Statistics(stats.data_ptr(), status.data_ptr())

    def _groups(self, groups: Tensor, num_groups: int):
        is_mask = groups.dtype == torch.bool
        return self._native.Groups(
            0 if is_mask else groups.data_ptr(), groups.data_ptr() if is_mask else 0, num_groups
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
