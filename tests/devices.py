"""Where a backend's tests run: on the GPU if there is one, else on the CPU, where Triton interprets its kernels and
those written in CUDA are compiled for an emulation (tests/cuda_emulation)."""

import os

import torch

GPU = torch.cuda.is_available()
# Someone may want the interpreter although there is a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def device_of(backend: str) -> str:
    """The device on which ``backend`` is tested here."""
    on_gpu = GPU and (backend == "cuda" or (backend == "triton" and not INTERPRETED))
    return "cuda" if on_gpu else "cpu"
