"""Running a function as if it were a model's forward, and running it again with the same random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["SameDraws", "in_forward"]


def in_forward(wrapped: Any, inner: Any, function: Callable[[Any], Any], argument: Any) -> Any:
    """``function(argument)``, called by ``wrapped`` in place of the forward of the model inside of it.

    DistributedDataParallel averages the gradients of what runs in there; parts of the model that are called past it
    would train each process by itself. The function may call the model.
    """
    if wrapped is inner:
        return function(argument)
    own = inner.__dict__.get("forward")  # accelerate may have put one over the class's

    def restore() -> None:
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = own

    def once(argument: Any) -> Any:
        restore()
        return function(argument)

    inner.forward = once
    try:
        return wrapped(argument)
    finally:
        restore()


class SameDraws:
    """``with draws.of(k)`` a second time: torch's generators, the CPU's and a GPU's, give what they gave the first time
    for this k, and go on afterwards as if nothing had been drawn."""

    def __init__(self, device: torch.device):
        self._gpus = [device] if device.type == "cuda" else []
        self._states: dict[int, tuple[Tensor, ...]] = {}

    @contextmanager
    def of(self, k: int) -> Iterator[None]:
        if k not in self._states:
            self._states[k] = torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._gpus)
            yield
            return
        with torch.random.fork_rng(self._gpus):
            state, *of_gpus = self._states[k]
            torch.set_rng_state(state)
            for device, state in zip(self._gpus, of_gpus, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
