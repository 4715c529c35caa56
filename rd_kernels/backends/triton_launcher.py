"""How a Triton kernel is found and started, whichever file it stands in."""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from rd_kernels.backends.triton_configs import architecture_of

__all__ = ["COMPILER_OPTIONS", "Launcher"]

# A multiplication and an addition become one instruction; newer versions of triton want to be asked.
COMPILER_OPTIONS = {"enable_fp_fusion": True}
_MODULES = (
    "triton_kernels",
    "triton_gemm_kernels",
    "triton_group_kernels",
    "triton_linear_kernels",
    "triton_rule_kernels",
    "triton_softmax_kernels",
    "triton_sparse_kernels",
)  # those that hold kernels; importing them imports triton


class Launcher:
    """Finds a kernel by its name and starts it."""

    @functools.cached_property
    def _kernels(self) -> dict[str, Any]:
        """Every name that a module of kernels defines."""
        modules = [importlib.import_module(f"rd_kernels.backends.{name}") for name in _MODULES]
        return {name: value for module in modules for name, value in vars(module).items()}

    def _architecture_of(self, device: torch.device) -> str:
        return architecture_of(device)

    def _launch(
        self,
        kernel: str,
        grid: tuple[int, ...],
        tensors: tuple[Tensor | None, ...],
        scalars: tuple[int | float | None, ...],
        **options: int | str | bool,  # the kernel's constants, and num_warps (default 4)
    ) -> None:
        """Start one kernel, on its tensors' device. A grid without programs starts nothing."""
        if 0 in grid:
            return
        device = next(tensor.device for tensor in tensors if tensor is not None)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self._kernels[kernel][grid](*tensors, *scalars, **options, **COMPILER_OPTIONS)
