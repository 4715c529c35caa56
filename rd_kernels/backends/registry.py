"""Which backend serves a call, and why. Letters: N rows, V vocabulary, G groups."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rd_kernels.backends.interface import Backend

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "FUSED_LOGITS_VARIABLE",
    "Choice",
    "available",
    "empty_cache",
    "explain",
    "get",
    "linear_form",
    "select",
    "use_backend",
]

ENVIRONMENT_VARIABLE = "RD_KERNELS_BACKEND"
FUSED_LOGITS_VARIABLE = "RD_KERNELS_FUSED_LOGITS"

# Tried in this order by "auto": the first that is usable and serves the tensors wins.
BACKENDS: dict[str, tuple[str, str]] = {
    "cuda": ("rd_kernels.backends.cuda", "CUDABackend"),
    "triton": ("rd_kernels.backends.triton_backend", "TritonBackend"),
    "cpu": ("rd_kernels.backends.cpu", "CPUBackend"),
    "reference": ("rd_kernels.reference", "ReferenceBackend"),
}


@functools.cache
def get(name: str) -> Backend:
    """The backend called ``name``, imported on first use. ValueError for an unknown name."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, got {name!r}")
    module, cls = BACKENDS[name]
    return getattr(importlib.import_module(module), cls)()


def linear_form(name: str, dtype: torch.dtype) -> tuple[bool, bool, bool]:
    """How a backend runs the linear op -> ``on_gpu``; whether it can fuse the logits; whether it shall, wherever it
    need not. Constants to a compiler. RD_KERNELS_FUSED_LOGITS=1 asks for it: not yet measured, so not the default.
    """
    backend, wish = get(name), os.environ.get(FUSED_LOGITS_VARIABLE, "0")
    if wish not in ("0", "1"):
        raise ValueError(f"{FUSED_LOGITS_VARIABLE} must be 0 or 1, got {wish!r}")
    # float16 has no room for the row weights' share of the normaliser.
    return backend.on_gpu, backend.fusable(dtype), wish == "1" and dtype != torch.float16


# What torch.compiler.assume_constant_result does; that imports torch._dynamo, which takes seconds and triton.
linear_form._dynamo_marked_constant = True  # type: ignore[attr-defined]


def available() -> dict[str, str | None]:
    """Each backend's name and what it lacks on this machine; None where it can be used."""
    return {name: get(name).missing() for name in BACKENDS}


def empty_cache() -> None:
    """Give the memory that the CPU backend keeps for later gradients back to the system.

    It keeps up to 1 GiB (RD_KERNELS_CACHE_BYTES), of which the system takes what it needs anyway. What a GPU
    keeps is torch's: ``torch.cuda.empty_cache()``.
    """
    cpu = get("cpu")
    if cpu.missing() is None:
        cpu.empty_cache()  # type: ignore[attr-defined]


_forced: ContextVar[str | None] = ContextVar("rd_kernels_backend", default=None)


def _check_name(name: str, source: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source} must be one of {['auto', *BACKENDS]}, got {name!r}")


class use_backend(contextlib.ContextDecorator):
    """Choose the backend for every later call that says ``backend="auto"``: a call or a context manager.

    ``rd.use_backend("cpu")`` holds until changed; ``with rd.use_backend("reference"): ...`` for the block.
    ``"auto"`` gives the choice back. Raises ValueError for an unknown name and RuntimeError, saying what is
    missing, for a backend that cannot run on this machine.
    """

    def __init__(self, name: str):
        _check_name(name, "name")
        if name != "auto" and (reason := get(name).missing()) is not None:
            raise RuntimeError(f"backend {name!r} is not available: {reason}")
        self._previous = _forced.get()
        _forced.set(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc_info: object) -> None:
        _forced.set(self._previous)


@dataclass(frozen=True)
class Choice:
    """The backend that serves a call, why, and why not each of the others. ``print`` it."""

    name: str
    reason: str
    rejected: dict[str, str]

    def __str__(self) -> str:
        lines = {self.name: f"serves: {self.reason}"}
        lines.update((name, f"not used: {why}") for name, why in self.rejected.items())
        return "\n".join(f"{name:<10} {lines[name]}" for name in BACKENDS)


def explain(logits: Tensor, requested: str = "auto", num_groups: int = 1) -> Choice:
    """Which backend serves a call with these logits [..., V] and G = ``num_groups``, and why.

    ``requested`` is what the call says as ``backend``. Raises as the call would: ValueError for an unknown name,
    RuntimeError for a named backend that cannot serve.
    """
    vocabulary = logits.shape[-1]
    size = (logits.shape[:-1].numel(), vocabulary, num_groups)
    return _choose(_asked(requested), logits.device, logits.dtype, size)


def select(requested: str, logits: Tensor, num_groups: int = 1) -> str:
    """The name of the backend that will serve ``logits`` [N, V] with G = ``num_groups``.

    ``requested`` other than "auto" wins; then :func:`use_backend`; then the environment variable
    RD_KERNELS_BACKEND; then the first backend that can. Only "auto" chooses: a named backend that cannot
    serve raises RuntimeError with the reason. Under torch.compile the choice is made once, while tracing.
    """
    size = None
    # Up to here device and dtype alone decide, and torch.compile guards on nothing more.
    if logits.numel() > _USUAL_SIZE or num_groups > _USUAL_GROUPS:
        rows, vocabulary = logits.shape
        if rows > _USUAL_SIZE or vocabulary > _USUAL_SIZE or num_groups > _USUAL_GROUPS:
            size = rows, vocabulary, num_groups
    return _select(requested, logits.device, logits.dtype, size)


_USUAL_SIZE, _USUAL_GROUPS = 2**29, 2**20


def _too_large(name: str, dtype: torch.dtype, rows: int, vocabulary: int, groups: int) -> str | None:
    """Which size is beyond what the kernels of a backend can address; None if none is."""
    sizes = {"rows": rows, "classes": vocabulary, "groups": groups}
    limits: dict[str, dict[str, int]] = {
        # A launch has at most 65535 blocks for a row, each with 4096 pieces of 16 bytes (row_backward.cu).
        "cuda": {"classes": 65535 * 4096 * 16 // dtype.itemsize},
        # A launch has 2^31 - 1 blocks, one a row; columns are int32, with room for a step of the loop; and one
        # block holds all groups (group_update) in a tensor, which Triton limits.
        "triton": {"rows": 2**31 - 1, "classes": 2**31 - 2**13, "groups": 2**20},
    }
    for what, limit in limits.get(name, {}).items():
        if sizes[what] > limit:
            return f"it serves at most {limit} {what}, not {sizes[what]}"
    return None


def _asked(requested: str) -> tuple[str, str]:
    """-> the backend asked for, or "auto", and who asked."""
    if requested != "auto":
        return requested, "argument backend"
    if (forced := _forced.get() or "auto") != "auto":
        return forced, "use_backend"
    return os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE


def _select(
    requested: str, device: torch.device, dtype: torch.dtype, size: tuple[int, int, int] | None = None
) -> str:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "rd_kernels losses do not support torch.func transforms (grad, vjp, jvp, jacrev, vmap, ...): "
            "use torch.autograd.grad, and a loop instead of vmap"
        )
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "rd_kernels losses have no forward-mode derivative: call them outside torch.autograd.forward_ad.dual_level "
            "and use torch.autograd.grad"
        )
    return _chosen_name(_asked(requested), device, dtype, size)


# What torch.compiler.assume_constant_result does; that imports torch._dynamo, which takes seconds and triton.
_select._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def _chosen_name(
    asked: tuple[str, str], device: torch.device, dtype: torch.dtype, size: tuple[int, int, int] | None
) -> str:
    return _choose(asked, device, dtype, size).name


def _choose(
    asked: tuple[str, str], device: torch.device, dtype: torch.dtype, size: tuple[int, int, int] | None
) -> Choice:
    """The choice for N, V, G = ``size``; None: usual ones, which every backend serves."""
    name, who = asked
    _check_name(name, who)
    probe = torch.empty((1, 1), device=device, dtype=dtype)

    def refusal(name: str) -> str | None:
        backend = get(name)
        too_large = None if size is None else _too_large(name, dtype, *size)
        return backend.missing() or backend.refuses(probe) or too_large

    if name != "auto":
        if (why := refusal(name)) is not None:
            raise RuntimeError(f"backend {name!r} cannot serve this call: {why}")
        reason = f"asked for by {who}"
        return Choice(name, reason, {other: f"{name} is {reason}" for other in BACKENDS if other != name})
    rejected: dict[str, str] = {}
    for name in BACKENDS:
        # Those for GPUs are only worth loading for one; Triton's interpreter must be asked for by name.
        if name in ("cuda", "triton") and device.type == "cpu":
            rejected[name] = "it is for GPUs; CPU tensors must ask for it by name"
        elif (why := refusal(name)) is not None:
            rejected[name] = why
        else:
            shape = "" if size is None else f", {size[0]} x {size[1]}"
            reason = f"first in order for {device} that serves {str(dtype).removeprefix('torch.')}{shape}"
            later = [other for other in BACKENDS if other != name and other not in rejected]
            return Choice(name, reason, {**rejected, **dict.fromkeys(later, f"it comes after {name}")})
    raise RuntimeError(f"no backend serves {dtype} on {device}")  # pragma: no cover
