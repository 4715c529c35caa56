"""The table of configurations, and the tool that measures it, with a clock that needs no GPU."""

import dataclasses

import pytest
import torch

from rd_kernels.backends import triton_configs
from rd_kernels.backends.triton_configs import TABLE, Config, architecture_of, choose
from tools import tune_triton
from tools.tune_triton import LIMITS, candidates, main, tune, updated

MACHINE = {"gpu": "G", "driver": "1", "torch": "2", "triton": "3", "date": "2030-01-01"}


def test_nothing_in_the_table_passes_for_measured_without_a_machine():
    keys = [*MACHINE, "seconds"]
    assert all(entry.measured is None or [key for key, _ in entry.measured] == keys for entry in TABLE)


@pytest.mark.parametrize(
    "architecture", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx1100"]
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_row_has_a_shape(architecture, itemsize):
    for vocabulary in (1, 1000, 1024, 1025, 30522, 10**6):
        for kernel in ("row_forward", "row_backward"):
            config = choose(kernel, architecture, itemsize, vocabulary)
            assert config.vocabulary is None or config.vocabulary >= vocabulary
            assert config.architecture[:2] == architecture[:2]
        whole = choose("softmax_minus_onehot", architecture, itemsize, vocabulary)
        assert whole is None or whole.block >= vocabulary


def test_the_nearest_older_architecture_serves(monkeypatch):
    entries = [
        Config("k", name, 2, None, block, 4) for name, block in (("sm_80", 1), ("sm_90", 2), ("gfx942", 3))
    ]
    monkeypatch.setattr(triton_configs, "TABLE", entries)
    served = {
        "sm_75": 1,
        "sm_80": 1,
        "sm_89": 1,
        "sm_90": 2,
        "sm_120": 2,
        "gfx90a": 3,
        "gfx942": 3,
        "gfx950": 3,
    }
    for name, block in served.items():
        assert choose.__wrapped__("k", name, 2, 7).block == block, name


def test_too_long_a_row_has_no_shape():
    assert choose("softmax_minus_onehot", "sm_90", 2, 32768).block == 32768
    assert choose("softmax_minus_onehot", "sm_90", 2, 32769) is None


def test_the_interpreter_passes_for_an_nvidia_gpu():
    assert architecture_of(torch.device("cpu")) == "sm_80"


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_candidates_can_be_launched(architecture):
    for kernel, sizes in LIMITS.items():
        for itemsize, limits in sizes.items():
            for limit in limits:
                shapes = list(candidates(kernel, architecture, itemsize, limit))
                assert len(shapes) == len(set(shapes)) > 1
                for shape in shapes:
                    assert shape.warps * (64 if architecture == "gfx942" else 32) <= 1024
                    assert shape.vocabulary == limit
                    if kernel == "softmax_minus_onehot":
                        assert shape.block in (0, limit)


def test_what_the_table_has_is_among_the_candidates():
    for entry in TABLE:
        plain = dataclasses.replace(entry, measured=None)
        shapes = candidates(entry.kernel, entry.architecture, entry.itemsize, entry.vocabulary)
        assert entry.measured is not None or plain in list(shapes)


def clock(config):
    """Eight warps are best, a row of 65536 cannot be held, and one of 4 bytes and 32768 had better not be."""
    if config.block == 65536:
        return None
    if config.block == 0:
        return 0.5 if (config.itemsize, config.vocabulary) == (4, 32768) else 99.0
    return 1 + abs(config.warps - 8) + config.block / 1e6


def test_the_fastest_usable_shape_is_chosen():
    entries = list(tune("sm_90", clock, MACHINE))
    kinds = {(entry.kernel, entry.itemsize, entry.vocabulary) for entry in entries}
    expected = {
        (k, size, limit) for k, sizes in LIMITS.items() for size, limits in sizes.items() for limit in limits
    }
    assert expected - kinds == {("softmax_minus_onehot", 2, 65536), ("softmax_minus_onehot", 4, 32768)}
    assert len(entries) == len(kinds)
    for entry in entries:
        shapes = candidates(entry.kernel, "sm_90", entry.itemsize, entry.vocabulary)
        seconds = min(clock(shape) for shape in shapes)
        assert entry.measured == tuple({**MACHINE, "seconds": seconds}.items())


def test_the_table_is_written_and_read_again(tmp_path):
    with open(triton_configs.__file__) as file:
        before = file.read()
    assert updated(before, []) == before
    entries = list(tune("sm_90", clock, MACHINE))
    namespace: dict = {"__name__": "triton_configs"}
    text = updated(before, entries)
    exec(
        compile(text.replace("from __future__ import annotations", ""), "triton_configs.py", "exec"),
        namespace,
    )
    written = [dataclasses.astuple(entry) for entry in namespace["TABLE"]]
    assert sorted(map(repr, written)) == sorted(repr(dataclasses.astuple(e)) for e in [*TABLE, *entries])
    assert updated(text, entries) == text


@pytest.mark.parametrize("kernel", LIMITS)
def test_only_what_agrees_with_the_reference_is_timed(kernel, capsys, monkeypatch):
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 100), torch.tensor([3, -100, 99])
    *_, config = candidates(kernel, "sm_80", 4, 2048 if kernel == "softmax_minus_onehot" else None)
    assert tune_triton.agrees(config, logits, labels)
    monkeypatch.setattr(tune_triton.Tuned, "_launch", lambda *arguments, **options: None)
    assert not tune_triton.agrees(config, logits, labels)
    assert "left out" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path / "table.py")]) == 2
    assert "no CUDA or ROCm device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
