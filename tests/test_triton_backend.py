"""What the Triton backend says about itself: where it runs, what it refuses, what to do."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from rd_kernels.backends.triton_backend import TritonBackend
from tests.devices import device_of


def with_kernels(version="3.9.0", interpreted=False):
    """A backend that finds this version of triton, imported with or without TRITON_INTERPRET."""
    backend = TritonBackend()
    backend._kernels = {
        "triton": SimpleNamespace(__version__=version),
        "INTERPRETED": SimpleNamespace(value=interpreted),
    }
    return backend


def test_refuses_what_it_cannot_serve():
    backend = TritonBackend()
    assert backend.missing() is None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert backend.refuses(torch.zeros(1, 1, device=device_of("triton"), dtype=dtype)) is None
    assert "float64" in backend.refuses(torch.zeros(1, 1, device=device_of("triton"), dtype=torch.float64))
    assert "meta" in backend.refuses(torch.zeros(1, 1, device="meta"))


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("interpreted", [False, True])
def test_runs_on_a_gpu_or_under_the_interpreter(monkeypatch, gpu, interpreted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    backend = with_kernels(interpreted=interpreted)
    missing, refuses = backend.missing(), backend.refuses(torch.zeros(1, 1))
    assert missing is None if gpu or interpreted else "TRITON_INTERPRET=1" in missing
    assert refuses is None if interpreted else "TRITON_INTERPRET=1" in refuses


@pytest.mark.parametrize(("version", "usable"), [("3.5.1+rocm7", False), ("3.6.0", True), ("4.0.0", True)])
def test_an_old_triton_is_named(version, usable):
    missing = with_kernels(version, interpreted=True).missing()
    assert missing is None if usable else version in missing and "pip install" in missing


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in TritonBackend().missing()


def test_a_broken_triton_is_reported_not_raised(monkeypatch):
    def fail(name):
        raise OSError("libtriton.so: wrong ELF class")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert "wrong ELF class" in TritonBackend().missing()
