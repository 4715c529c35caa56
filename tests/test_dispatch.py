"""Which backend serves a call, why, and what says so. GPUs are played by monkeypatching where none is needed to decide."""

import dataclasses

import pytest
import torch

import rd_kernels as rd
from rd_kernels.backends import registry
from rd_kernels.backends.interface import Backend
from tests.test_package import run_python

ORDER = ["cuda", "triton", "cpu", "reference"]


@pytest.fixture
def every_backend(monkeypatch):
    """On a machine where nothing is missing and every backend serves every device: only order and sizes decide."""

    class Willing(Backend):
        def missing(self):
            return None

        def refuses(self, logits):
            return None

    monkeypatch.setattr(registry, "get", lambda name: Willing())
    registry._chosen_name.cache_clear()
    yield
    registry._chosen_name.cache_clear()


def huge(rows: int, vocabulary: int, dtype=torch.float32, device="meta") -> torch.Tensor:
    """Logits of any size without memory."""
    return torch.empty((1, 1), dtype=dtype, device=device).expand(rows, vocabulary)


def test_the_choice_names_its_reason_and_why_not_the_others():
    choice = rd.backends.explain(torch.randn(2, 3, 5))
    assert choice.name == "cpu"
    assert choice.reason == "first in order for cpu that serves float32, 6 x 5"
    assert list(choice.rejected) == ["cuda", "triton", "reference"]
    assert "CPU tensors must ask for it by name" in choice.rejected["triton"]
    assert choice.rejected["reference"] == "it comes after cpu"
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.name = "reference"


def test_a_dtype_without_a_kernel_is_the_reason():
    choice = rd.backends.explain(torch.randn(2, 3, dtype=torch.float64))
    assert choice.name == "reference"
    assert choice.rejected["cpu"] == "it serves float32 and bfloat16 logits, not torch.float64"


def test_printed_it_is_a_line_for_each_backend():
    lines = str(rd.backends.explain(torch.randn(2, 3))).splitlines()
    assert [line.split()[0] for line in lines] == ORDER
    assert lines[2] == "cpu        serves: first in order for cpu that serves float32, 2 x 3"
    assert lines[3] == "reference  not used: it comes after cpu"


def test_who_asked_is_the_reason(monkeypatch):
    logits = torch.randn(2, 3)
    monkeypatch.setenv("RD_KERNELS_BACKEND", "reference")
    choice = rd.backends.explain(logits)
    assert (choice.name, choice.reason) == ("reference", "asked for by RD_KERNELS_BACKEND")
    with rd.use_backend("cpu"):
        choice = rd.backends.explain(logits)
        assert (choice.name, choice.reason) == ("cpu", "asked for by use_backend")
        choice = rd.backends.explain(logits, "reference")
        assert (choice.name, choice.reason) == ("reference", "asked for by argument backend")
    assert choice.rejected == dict.fromkeys(ORDER[:3], "reference is asked for by argument backend")


def test_what_cannot_be_had_raises_as_the_call_does(monkeypatch):
    logits = torch.randn(2, 3, dtype=torch.float64)
    for ask in (registry.select, lambda name, logits: rd.backends.explain(logits, name)):
        with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot serve this call: .*float64"):
            ask("cpu", logits)
        with pytest.raises(ValueError, match=r"argument backend must be one of .* got 'gpu'"):
            ask("gpu", logits)
        monkeypatch.setenv("RD_KERNELS_BACKEND", "gpu")
        with pytest.raises(ValueError, match=r"RD_KERNELS_BACKEND must be one of .* got 'gpu'"):
            ask("auto", logits)
        monkeypatch.delenv("RD_KERNELS_BACKEND")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (2**29 + 1, 1), (1, 2**31)])
def test_select_and_explain_agree(dtype, shape):
    logits = huge(*shape, dtype, "cpu")
    assert registry.select("auto", logits) == rd.backends.explain(logits).name


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize(
    ("dtype", "shape", "groups", "served_by", "refusal"),
    [
        (torch.float32, (4096, 128256), 8, "cuda", None),
        (torch.float32, (2**33, 1000), 2**24, "cuda", None),
        (torch.float32, (1, 65535 * 2**14), 1, "cuda", None),
        (torch.float32, (1, 65535 * 2**14 + 1), 1, "triton", "at most 1073725440 classes, not 1073725441"),
        (torch.bfloat16, (1, 65535 * 2**14 + 1), 1, "cuda", None),
        (torch.bfloat16, (1, 2**31), 1, "cpu", "at most 2147450880 classes, not 2147483648"),
    ],
)
def test_sizes_that_kernels_cannot_address_go_to_the_next(dtype, shape, groups, served_by, refusal):
    logits = huge(*shape, dtype)
    choice = rd.backends.explain(logits, num_groups=groups)
    assert choice.name == served_by == registry.select("auto", logits, groups)
    assert refusal is None or refusal in choice.rejected["cuda"]


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize(
    ("shape", "groups", "what"),
    [
        ((2**31, 1), 1, "2147483647 rows, not 2147483648"),
        ((1, 2**31 - 2**13 + 1), 1, "2147475456 classes, not 2147475457"),
        ((1, 5), 2**20 + 1, "1048576 groups, not 1048577"),
    ],
)
def test_triton_refuses_what_it_cannot_address(shape, groups, what):
    with pytest.raises(RuntimeError, match=rf"backend 'triton' cannot serve this call: .* at most {what}"):
        registry.select("triton", huge(*shape), groups)
    assert registry.select("triton", huge(2**29, 2**29), 2**20) == "triton"


def test_the_limit_of_groups_is_tritons_own():
    triton = pytest.importorskip("triton")
    from triton._utils import TRITON_MAX_TENSOR_NUMEL

    assert triton.next_power_of_2(2**20) == TRITON_MAX_TENSOR_NUMEL == 2**20


def test_a_choice_is_made_once_for_all_usual_sizes(monkeypatch):
    asked = []
    monkeypatch.setattr(
        registry, "_choose", lambda *call: asked.append(call) or rd.backends.Choice("cpu", "", {})
    )
    registry._chosen_name.cache_clear()
    for rows in (1, 2, 4096):
        assert registry.select("auto", huge(rows, 128256, device="cpu"), 7) == "cpu"
    assert len(asked) == 1
    registry._chosen_name.cache_clear()


def test_explaining_for_a_cpu_loads_no_triton():
    code = (
        "import sys, torch, rd_kernels as rd; rd.backends.explain(torch.randn(2, 3));"
        "print('rd_kernels.backends.triton_backend' in sys.modules)"
    )
    assert run_python(code).stdout.strip() == "False"


def test_info_prints_the_choice_with_its_reason():
    def info(**env):
        return run_python("from rd_kernels.info import describe; print(describe())", **env).stdout

    assert "auto on cpu, float32: cpu, first in order for cpu that serves float32" in info()
    assert "auto on cpu, float16: reference, first in order" in info()
    assert "auto on cpu, float32: reference, asked for by RD_KERNELS_BACKEND" in info(
        RD_KERNELS_BACKEND="reference"
    )
    assert "auto on cpu, float16: backend 'cpu' cannot serve" in info(RD_KERNELS_BACKEND="cpu")
    assert "RD_KERNELS_BACKEND must be one of" in info(RD_KERNELS_BACKEND="gpu")
