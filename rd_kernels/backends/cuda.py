"""Launches the CUDA kernels: allocates what they write and passes addresses. No mathematics here.

``rd_kernels._cuda`` is built where nvcc is; it is loaded when the backend is first asked whether it is there. Kernels
go to torch's current stream and nothing waits for them. Letters: N rows, V vocabulary, G groups.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rd_kernels.backends.interface import Backend, Counters, with_unit_stride
from rd_kernels.backends.native import NativeBackend, address, dtype_name
from rd_kernels.backends.registry import get

__all__ = ["CUDABackend"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # compute capability
PDL_VARIABLE = "RD_KERNELS_PDL"


class CUDABackend(NativeBackend):
    """CUDA C++ kernels for NVIDIA GPUs of compute capability 8.0 and newer.

    RD_KERNELS_PDL=1 lets a kernel start before the one ahead of it in the stream has ended (programmatic dependent
    launch; 9.0 and newer).
    """

    name = "cuda"
    on_gpu = True

    def __init__(self) -> None:
        self._counters = Counters()

    def missing(self) -> str | None:
        if not isinstance(self._loaded, ModuleType):
            return (
                f"the CUDA module cannot be loaded ({self._loaded}); it is built where nvcc is: "
                "install CUDA's compiler, then pip install -e . or python setup.py build_ext --inplace"
            )
        if self._native.device_type == "cuda":
            if torch.version.cuda is None:
                return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
            if not torch.cuda.is_available():
                return self._native.missing() or "torch sees no CUDA device"
        return None

    def refuses(self, logits: Tensor) -> str | None:
        device_type = self._native.device_type
        if logits.device.type != device_type:
            return f"it serves {device_type.upper()} tensors, not {logits.device}"
        if logits.dtype not in _DTYPES:
            return f"it serves float32, bfloat16 and float16 logits, not {logits.dtype}"
        if device_type == "cuda":
            capability = torch.cuda.get_device_capability(logits.device)
            if capability < _OLDEST:
                return (
                    f"it needs a GPU of compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
                )
        return None

    def row_forward(self, logits, labels, class_weight, label_smoothing, ignore_index, details=None):
        results, addresses = self._row_results(logits.shape[0], logits.device, details)
        weighting, _alive = self._weighting(class_weight, label_smoothing)
        self._native.row_forward(
            self._queue(logits), self._rows(logits, labels, ignore_index), weighting, addresses
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
        if out is None:
            out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        weighting, _alive = self._weighting(class_weight, label_smoothing)
        self._native.row_backward(
            self._queue(logits),
            self._rows(logits, labels, ignore_index),
            weighting,
            self._row_gradient(grad_out, row_scale, normaliser, out, True),
        )
        return out

    def softmax_minus_onehot_(self, logits, labels, ignore_index, details=None):
        results, addresses = self._row_results(logits.shape[0], logits.device, details)
        self._native.softmax_minus_onehot(
            self._queue(logits), self._rows(logits, labels, ignore_index), addresses
        )
        return results

    def group_reduce(self, row_loss, outcome, groups, num_groups):
        queue = self._queue(row_loss)
        stats, status, addresses = self._statistics(num_groups, row_loss.device)
        scratch, _alive = self._scratch(row_loss, num_groups)
        self._native.group_reduce(
            queue,
            row_loss.data_ptr(),
            outcome.data_ptr(),
            row_loss.numel(),
            self._groups(groups, num_groups),
            addresses,
            scratch,
        )
        return stats, status

    def group_update(self, stats, status, q, rule, rate, adjustment):
        loss = torch.empty((), dtype=torch.float32, device=q.device)
        coefficients = torch.empty(q.numel(), dtype=torch.float32, device=q.device)
        self._native.group_update(
            self._queue(q),
            self._native.Statistics(stats.data_ptr(), status.data_ptr()),
            q.numel(),
            self._update(rule, rate, adjustment, q),
            loss.data_ptr(),
            coefficients.data_ptr(),
        )
        return loss, coefficients

    def row_scale(self, coefficients, outcome, groups):
        scale = torch.empty(outcome.numel(), dtype=torch.float32, device=outcome.device)
        self._native.row_scale(
            self._queue(outcome),
            coefficients.data_ptr(),
            outcome.data_ptr(),
            outcome.numel(),
            self._groups(groups, coefficients.numel()),
            scale.data_ptr(),
        )
        return scale

    def pack_mask(self, mask):
        rows, num_groups = mask.shape
        bits = torch.empty((rows, -(-num_groups // 32)), dtype=torch.int32, device=mask.device)
        self._native.pack_mask(self._queue(mask), mask.data_ptr(), rows, num_groups, bits.data_ptr())
        return bits

    def grouped_forward(self, logits, labels, groups, q, rule, rate, adjustment, ignore_index):
        queue = self._queue(logits)
        (row_loss, normaliser, outcome), results = self._row_results(logits.shape[0], logits.device)
        stats, status, statistics = self._statistics(q.numel(), logits.device)
        loss = torch.empty((), dtype=torch.float32, device=logits.device)
        coefficients = torch.empty(q.numel(), dtype=torch.float32, device=logits.device)
        scratch, _alive = self._scratch(row_loss, q.numel())
        self._native.grouped_forward(
            queue,
            self._rows(logits, labels, ignore_index),
            results,
            self._groups(groups, q.numel()),
            self._update(rule, rate, adjustment, q),
            statistics,
            loss.data_ptr(),
            coefficients.data_ptr(),
            scratch,
        )
        return loss, stats, status, self.row_scale(coefficients, outcome, groups), normaliser

    def scale_rows(self, x, scale, out):
        x = with_unit_stride(x)
        self._native.scale_rows(self._queue(x), self._matrix(x), scale.data_ptr(), self._matrix(out))
        return out

    def compact(self, labels, ignore_index, capacity):
        index = torch.empty(capacity, dtype=torch.int64, device=labels.device)
        position = torch.empty_like(labels)
        count = torch.empty((), dtype=torch.int64, device=labels.device)
        self._native.compact(
            self._queue(labels),
            labels.data_ptr(),
            labels.numel(),
            ignore_index,
            capacity,
            index.data_ptr(),
            position.data_ptr(),
            count.data_ptr(),
        )
        return index, position, count

    def gather_rows(self, x, index):
        x = with_unit_stride(x)
        out = torch.empty((index.numel(), x.shape[1]), dtype=x.dtype, device=x.device)
        self._native.gather_rows(self._queue(x), self._matrix(x), index.data_ptr(), self._matrix(out))
        return out

    # Products of our own are Triton's, where it is installed. Without it nothing is fused, and the rows beyond a capacity
    # are computed by torch, also where there are none.

    def overflow_forward(self, *arguments):
        return self._triton.overflow_forward(*arguments)

    def overflow_backward(self, *arguments):
        self._triton.overflow_backward(*arguments)

    def fusable(self, dtype):
        return self._triton.fusable(dtype)

    def tile_count(self, vocabulary, device):
        return self._triton.tile_count(vocabulary, device)

    def exponentials(self, *arguments):
        return self._triton.exponentials(*arguments)

    def filtered_gradients(self, *arguments):
        return self._triton.filtered_gradients(*arguments)

    @functools.cached_property
    def _triton(self) -> Backend:
        triton = get("triton")
        return triton if triton.missing() is None else Backend()

    def _queue(self, tensor: Tensor) -> Any:
        """torch's current stream on the tensor's device."""
        device = tensor.device
        if device.type != "cuda":
            return self._native.Queue(0, 0)
        return self._native.Queue(device.index, torch._C._cuda_getCurrentRawStream(device.index))

    def _weighting(self, class_weight: Tensor | None, label_smoothing: float) -> tuple[Any, Tensor | None]:
        """-> the weights' addresses, and the tensor that must live until the kernel is in its stream."""
        weight_sum = class_weight.sum() if class_weight is not None and label_smoothing > 0 else None
        return self._native.Weighting(address(class_weight), address(weight_sum), label_smoothing), weight_sum

    def _scratch(self, row_loss: Tensor, num_groups: int) -> tuple[Any, tuple[Tensor, Tensor]]:
        """-> where blocks leave their sums, and the tensors that must live until the kernel is in its stream."""
        chunks = max(1, -(-row_loss.numel() // self._native.chunk_rows))
        sums = chunks * 3 * (num_groups + 2)
        partials = torch.empty(sums + 2 * chunks, dtype=torch.float32, device=row_loss.device)
        counters = self._counters.zeros(1 + chunks, row_loss.device)
        start = partials.data_ptr()
        return self._native.Scratch(start, start + 4 * sums, counters.data_ptr()), (partials, counters)

    def _matrix(self, x: Tensor) -> Any:  # [N, D], unit stride along D
        return self._native.Matrix(x.data_ptr(), dtype_name(x.dtype), *x.shape, x.stride(0))

    @functools.cached_property
    def _loaded(self) -> ModuleType | ImportError:
        try:
            native = importlib.import_module("rd_kernels._cuda")
        except ImportError as error:
            return error
        if (value := os.environ.get(PDL_VARIABLE, "0")) not in ("0", "1"):
            raise ValueError(f"{PDL_VARIABLE} must be 0 or 1, got {value!r}")
        native.set_programmatic_launch(os.environ.get(PDL_VARIABLE) == "1")
        return native

    @functools.cached_property
    def _native(self):
        if isinstance(self._loaded, ImportError):
            raise RuntimeError(self.missing()) from self._loaded
        return self._loaded
