"""``python -m rd_kernels.info``: versions, devices, backends, and what to do about a missing one."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import rd_kernels
from rd_kernels.backends.registry import ENVIRONMENT_VARIABLE, available, explain

__all__ = ["describe"]


def describe() -> str:
    """What :mod:`rd_kernels` found on this machine, as text. Loads every backend."""
    lines = [
        f"rd_kernels {rd_kernels.__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__} (CUDA {torch.version.cuda or 'no'}, ROCm {torch.version.hip or 'no'}), "
        f"triton {_version('triton')}, transformers {_version('transformers')}",
        f"CPU: {torch.get_num_threads()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}",
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            lines.append(f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        lines.append("GPU: none that torch can use")
    lines.append("backends:")
    for name, reason in available().items():
        lines.append(f"  {name:<10} {'available' if reason is None else f'missing: {reason}'}")
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    lines.append(
        f"{ENVIRONMENT_VARIABLE}={forced}" if forced else f"{ENVIRONMENT_VARIABLE} is not set (auto)"
    )
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            lines.append(f"  auto on {device}, {str(dtype).removeprefix('torch.')}: {_chosen(device, dtype)}")
    return "\n".join(lines)


def _chosen(device: str, dtype: torch.dtype) -> str:
    try:
        choice = explain(torch.empty((1, 1), dtype=dtype, device=device).expand(1024, 30522))
    except (RuntimeError, ValueError) as error:  # what the environment variable asks for cannot be had
        return str(error)
    return f"{choice.name}, {choice.reason}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(describe())
