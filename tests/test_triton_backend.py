"""What the Triton backend says about itself: where it runs, what it refuses, what to do."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from rd_kernels.backends.interface import Backend
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


@pytest.fixture
def started(monkeypatch):
    """A backend, and the names of the kernels that it starts."""
    backend, names = TritonBackend(), []
    launch = backend._launch

    def note(kernel, *arguments, **options):
        names.append(kernel)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(backend, "_launch", note)
    return backend, names


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
def test_where_the_forward_stays_apart(started, monkeypatch, case):
    """It launches the kernels of each step then, with the same results."""
    (backend, names), device = started, device_of("triton")
    if case == "AMD":
        monkeypatch.setattr(backend, "_architecture_of", lambda device: "gfx942")
    rows, count = (0 if case == "no rows" else 3), (63 if case == "many groups" else 62)
    logits, labels = torch.randn(rows, 9, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    q = torch.full((count,), 1 / count, device=device)
    loss, *_ = backend.grouped_forward(logits, labels, labels, q, "erm", 0.0, None, -100)
    assert names == ["row_forward", "group_partials", "group_totals", "group_update", "row_scale"]
    expected = torch.nn.functional.cross_entropy(logits, labels) if rows else torch.zeros((), device=device)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("count", [1, 32, 33, 100])
def test_a_mask_is_packed_in_one_launch(started, count):
    backend, names = started
    mask = torch.rand(70, count, device=device_of("triton")) < 0.5
    packed = backend.pack_mask(mask)
    assert names == ["pack_mask"]
    assert torch.equal(packed, Backend.pack_mask(backend, mask))


def test_details_change_no_bit_of_the_rest(started):
    backend, names = started
    logits, labels = (
        torch.randn(3, 5000, device=device_of("triton")).bfloat16(),
        torch.tensor([3, -100, 4999]),
    )
    labels, details = labels.to(logits.device), torch.empty(2, 2, 3, device=logits.device)
    rows = [backend.row_forward(logits, labels, None, 0.0, -100, given) for given in (None, details[0])]
    overwritten = [logits.clone(), logits.clone()]
    whole = [
        (*backend.softmax_minus_onehot_(z, labels, -100, given), z)
        for z, given in zip(overwritten, (None, details[1]), strict=True)
    ]
    assert names == ["row_forward"] * 2 + ["softmax_minus_onehot"] * 2
    for with_details, without in (rows, whole):
        assert all(torch.equal(a, b) for a, b in zip(with_details, without, strict=True))
    torch.testing.assert_close(details[0], details[1], rtol=2.0**-21, atol=0)


def test_the_longest_rows_have_details_in_two_passes(started, monkeypatch):
    """AMD's registers hold a row of this length, but not what its entropy takes beside it."""
    backend, names = started
    monkeypatch.setattr(backend, "_architecture_of", lambda device: "gfx942")
    logits = torch.randn(2, 40000, device=device_of("triton")).bfloat16()
    labels, details = torch.tensor([3, 39999], device=logits.device), torch.empty(2, 2, device=logits.device)
    assert backend._config("softmax_minus_onehot", logits) is not None
    expected = torch.special.entr(logits.double().softmax(1)).sum(1)
    backend.softmax_minus_onehot_(logits, labels, -100, details)
    assert names == ["row_forward", "row_backward"]
    torch.testing.assert_close(details[0].double(), expected, rtol=1e-6, atol=0)
