"""What the CUDA backend says about itself: whether its module is there, and what a machine lacks."""

import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch

import rd_kernels as rd
from rd_kernels.backends.cuda import CUDABackend
from tests.devices import GPU
from tests.test_native_build import run_python

MODULE = Path(__file__).resolve().parents[1] / "rd_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
built = pytest.mark.skipif(not MODULE.exists(), reason="rd_kernels._cuda was not built: no nvcc")


def backend_with(**module: object) -> CUDABackend:
    backend = CUDABackend()
    backend.__dict__["_loaded"] = types.SimpleNamespace(**module) if module else ImportError("no such module")
    return backend


@built
@pytest.mark.skipif(GPU, reason="there is a driver here")
def test_the_module_loads_without_a_driver_and_says_what_is_missing():
    """As nvcc built it, in a process of its own: this one may have the emulation in its place."""
    code = """
import rd_kernels as rd, torch
from rd_kernels import _cuda
assert _cuda.device_type == "cuda" and _cuda.chunk_rows == 128
print(_cuda.missing())
try:
    _cuda.row_scale(_cuda.Queue(0, 0), 0, 0, 1, _cuda.Groups(0, 0, 1, 1), 0)
except RuntimeError as error:
    print(error)
print(rd.backends.available()["cuda"])
try:
    rd.functional.cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]), backend="cuda")
except RuntimeError as error:
    print(error)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    missing, call, available, forced = result.stdout.splitlines()
    assert "CUDA cannot be used on this machine: " in missing
    assert "cudaError" in missing
    assert call.startswith("CUDA kernel row_scale: ")
    assert ("built without CUDA" in available) == (torch.version.cuda is None)
    assert forced == f"backend 'cuda' cannot serve this call: {available}"


def test_a_module_that_is_not_there_says_how_to_build_it():
    backend = backend_with()
    assert "nvcc" in backend.missing()
    with pytest.raises(RuntimeError, match="install CUDA's compiler"):
        _ = backend._native


def test_the_choice_of_programmatic_launch_is_checked(monkeypatch):
    chosen = []
    fake = types.ModuleType("rd_kernels._cuda")
    fake.set_programmatic_launch = chosen.append
    monkeypatch.setitem(sys.modules, "rd_kernels._cuda", fake)
    for value in ("0", "1"):
        monkeypatch.setenv("RD_KERNELS_PDL", value)
        assert CUDABackend()._loaded is fake
    assert chosen == [False, True]
    monkeypatch.setenv("RD_KERNELS_PDL", "yes")
    with pytest.raises(ValueError, match="RD_KERNELS_PDL must be 0 or 1, got 'yes'"):
        _ = CUDABackend()._loaded


@pytest.mark.parametrize(
    ("capability", "refusal"), [((7, 5), "compute capability 8.0 or newer, not 7.5"), ((8, 0), None), ((12, 0), None)]
)  # fmt: skip
def test_old_gpus_are_refused(monkeypatch, capability, refusal):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    logits = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    found = backend_with(device_type="cuda").refuses(logits)
    assert found is None if refusal is None else refusal in found


def test_auto_does_not_load_it_for_tensors_on_a_cpu(monkeypatch):
    monkeypatch.setattr(CUDABackend, "missing", lambda self: pytest.fail("asked"))
    logits = torch.randn(2, 3, dtype=torch.float32)
    assert rd.backends.registry.select("auto", logits) in ("cpu", "reference")
