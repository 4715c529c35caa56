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


def test_counters_are_kept_and_left_at_zero():
    """What the programs of a stream's kernels count themselves with."""
    backend, device = TritonBackend(), device_of("triton")
    logits = torch.randn(5, 9, device=device)
    labels = torch.arange(5, device=device)
    groups, q = labels % 2, torch.full((2,), 0.5, device=device)
    for _ in range(2):
        backend.grouped_forward(logits, labels, groups, q, "group_dro", 0.1, None, -100)
        (counters,) = backend._counters.values()
        assert counters.dtype == torch.int32
        assert counters.count_nonzero() == 0
    assert backend._counters.zeros(7, counters.device) is counters
    larger = backend._counters.zeros(counters.numel() + 1, counters.device)
    assert larger.numel() > counters.numel()
    assert larger.count_nonzero() == 0


@pytest.mark.parametrize("case", ["AMD", "many groups", "no rows"])
def test_where_the_forward_stays_apart(monkeypatch, case):
    """It launches the kernels of each step then, with the same results."""
    backend, device = TritonBackend(), device_of("triton")
    if case == "AMD":
        monkeypatch.setattr(backend, "_architecture_of", lambda device: "gfx942")
    started, launch = [], backend._launch

    def note(kernel, *arguments, **options):
        started.append(kernel)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(backend, "_launch", note)
    rows, count = (0 if case == "no rows" else 3), (63 if case == "many groups" else 62)
    logits, labels = torch.randn(rows, 9, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    q = torch.full((count,), 1 / count, device=device)
    loss, *_ = backend.grouped_forward(logits, labels, labels, q, "erm", 0.0, None, -100)
    assert started == ["row_forward", "group_partials", "group_totals", "group_update", "row_scale"]
    expected = torch.nn.functional.cross_entropy(logits, labels) if rows else torch.zeros((), device=device)
    torch.testing.assert_close(loss, expected)
