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

from rd_kernels.backends.native import NativeBackend, address

__all__ = ["CPUBackend"]

_DTYPES = (torch.float32, torch.bfloat16)
_DEVICE = torch.device("cpu")

CACHE_VARIABLE = "RD_KERNELS_CACHE_BYTES"

# From this size on malloc takes fresh memory for each tensor, so tensors get a Block that is used again.
_LARGE = 32 << 20


class CPUBackend(NativeBackend):
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

    def row_forward(self, logits, labels, class_weight, label_smoothing, ignore_index, details=None):
        native = self._native
        results, addresses = self._row_results(logits.shape[0], _DEVICE, details)
        native.row_forward(
            self._rows(logits, labels, ignore_index),
            native.Target(address(class_weight), label_smoothing),
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
        native.row_backward(
            self._rows(logits, labels, ignore_index),
            native.Target(address(class_weight), label_smoothing),
            self._row_gradient(grad_out, row_scale, normaliser, out, stream),
            torch.get_num_threads(),
        )
        return out

    def empty(self, shape, dtype, device, stride=None):
        return self._allocate(shape, dtype, stride)[0]

    def softmax_minus_onehot_(self, logits, labels, ignore_index, details=None):
        results, addresses = self._row_results(logits.shape[0], _DEVICE, details)
        self._native.softmax_minus_onehot(
            self._rows(logits, labels, ignore_index), addresses, torch.get_num_threads()
        )
        return results

    def pack_mask(self, mask):
        rows, num_groups = mask.shape
        words = torch.empty((rows, (num_groups + 31) // 32), dtype=torch.int32)
        self._native.pack_mask(mask.data_ptr(), rows, num_groups, words.data_ptr())
        return words

    def group_reduce(self, row_loss, outcome, groups, num_groups):
        stats, status, addresses = self._statistics(num_groups, _DEVICE)
        self._native.group_reduce(
            row_loss.data_ptr(),
            outcome.data_ptr(),
            row_loss.numel(),
            self._groups(groups, num_groups),
            addresses,
        )
        return stats, status

    def group_update(self, stats, status, q, rule, rate, adjustment):
        native = self._native
        loss = torch.empty((), dtype=torch.float32)
        coefficients = torch.empty(q.numel(), dtype=torch.float32)
        native.group_update(
            native.Statistics(stats.data_ptr(), status.data_ptr()),
            q.numel(),
            self._update(rule, rate, adjustment, q),
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

    def grouped_forward(self, logits, labels, groups, q, rule, rate, adjustment, ignore_index):
        native = self._native
        rows, num_groups = logits.shape[0], q.numel()
        # q is float32 as these are, and that saves naming the dtype, which takes torch a microsecond each time.
        loss, scale, normaliser = q.new_empty(()), q.new_empty(rows), q.new_empty((2, rows))
        stats, status, addresses = self._statistics(num_groups, _DEVICE)
        native.grouped_forward(
            self._rows(logits, labels, ignore_index),
            self._groups(groups, num_groups),
            self._update(rule, rate, adjustment, q),
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
            return super().empty(shape, dtype, _DEVICE, stride), True
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
