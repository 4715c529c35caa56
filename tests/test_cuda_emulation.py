"""The emulation of CUDA itself: right kernels pass, wrong ones are found. What it plays: tests/cuda_emulation."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from tests.cuda_emulation import build

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

KERNELS = ["row_sums", "transpose", "last_block", "cluster_sum", "copy_reversed"]
MEMORY = "address,undefined"
RACES = "thread"
SELFTEST_MODULE = build.EMULATION / "selftest_module"


def selftest(kernel: str, sanitize: str | None, *defines: str, launches: int = 9) -> tuple[int, str]:
    """Exit status and output of so many launches, each in another order."""
    command = [str(build.program(build.EMULATION / "selftest.cu", sanitize, defines)), kernel, str(launches)]
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=env)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("this thread sanitizer cannot start here: addresses are too random (vm.mmap_rnd_bits)")
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("sanitize", [None, MEMORY, RACES])
@pytest.mark.parametrize("kernel", KERNELS)
def test_right_kernels_pass(kernel, sanitize):
    assert selftest(kernel, sanitize) == (0, "right\n")


# What the scheduler says, or the sanitizer, or the wrong result.
@pytest.mark.parametrize(
    ("bug", "kernel", "sanitize", "message"),
    [
        ("READ_PAST_END", "row_sums", MEMORY, "heap-buffer-overflow"),
        ("WRITE_PAST_END", "row_sums", MEMORY, "WRITE of size 4"),
        ("SHARED_OVERFLOW", "transpose", MEMORY, "heap-buffer-overflow"),
        ("SHARED_OVERFLOW", "transpose", None, "past the end of its shared memory"),
        ("TOO_MUCH_SHARED", "row_sums", None, "cudaErrorInvalidValue: invalid argument"),
        ("MISALIGNED", "row_sums", None, "block (1,0,0) thread (0,0,0) runs: misaligned access of 16 bytes"),
        ("MISALIGNED_PLAIN_LOAD", "row_sums", MEMORY, "misaligned address"),
        ("MISSING_BARRIER", "row_sums", RACES, "data race"),
        ("MISSING_BARRIER", "row_sums", None, "wrong"),
        ("MISSING_BARRIER", "transpose", RACES, "data race"),
        ("MISSING_BARRIER", "transpose", None, "wrong"),
        ("MISSING_BARRIER", "last_block", RACES, "data race"),
        ("MISSING_BARRIER", "cluster_sum", RACES, "data race"),
        ("MISSING_BARRIER", "cluster_sum", None, "wrong"),
        ("MISSING_FENCE", "last_block", RACES, "data race"),
        ("MISSING_ACQUIRE", "last_block", RACES, "data race"),
        ("NOT_ALL_AT_BARRIER", "row_sums", None, "thread (0,0,0) waits at __syncthreads"),
        ("SHUFFLE_OFFSET", "row_sums", None, "wrong"),
        (
            "EXITED_LANE",
            "row_sums",
            None,
            "__shfl_xor_sync with mask 0xffffffff: lane 31 of its mask has exited",
        ),
        ("DIFFERENT_MASKS", "row_sums", None, "thread (1,0,0) waits at __syncwarp with mask 0xffffffff"),
        (
            "DIFFERENT_COLLECTIVES",
            "row_sums",
            None,
            "but block (0,0,0) thread (0,0,0) waits at __ballot_sync",
        ),
        ("EXIT_BEFORE_READ", "cluster_sum", None, "cluster_read of a block that has exited"),
        ("NO_AWAIT", "copy_reversed", None, "wrong"),
        ("NO_INIT", "copy_reversed", None, "a copy barrier that nobody has initialised"),
    ],
)
def test_bugs_are_found(bug, kernel, sanitize, message):
    status, output = selftest(kernel, sanitize, f"BUG_{bug}")
    assert status != 0
    assert message in output
    assert f"{kernel}(" in output or "wrong" in message or sanitize or bug == "TOO_MUCH_SHARED"


def test_module_runs_in_a_seeded_order(monkeypatch):
    cuda = build.load(build.module(csrc=SELFTEST_MODULE))

    def orders(seed: int) -> list[list[int]]:
        monkeypatch.setenv(
            "RD_EMULATION_SEED", str(seed + 1000)
        )  # another seed: the count of launches restarts
        cuda.tickets(1, 1)
        monkeypatch.setenv("RD_EMULATION_SEED", str(seed))
        return [cuda.tickets(5, 64) for _ in range(3)]

    ascending, descending, first = orders(0)
    assert ascending[:64] == list(range(64))
    assert descending[-64:] == list(range(63, -1, -1))
    assert first not in (ascending, descending)
    assert sorted(first) == list(range(320))
    assert orders(0) == [ascending, descending, first]
    assert orders(3)[2] != first


def test_module_raises_and_goes_on():
    source = (SELFTEST_MODULE / "cuda" / "tickets.cu").read_text()
    cuda = build.load(
        build.module(
            csrc=SELFTEST_MODULE,
            replace={
                "cuda/tickets.cu": source.replace("__syncthreads()", "if (blockDim.x > 32) __syncwarp(1)")
            },
        )
    )
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"tickets.*its mask leaves out the thread itself"):
            cuda.tickets(2, 64)
        assert sorted(cuda.tickets(2, 32)) == list(range(64))


@pytest.mark.parametrize(("blocks", "threads"), [(0, 32), (1, 0), (1, 1025)])
def test_launch_limits(blocks, threads):
    cuda = build.load(build.module(csrc=SELFTEST_MODULE))
    with pytest.raises(RuntimeError, match="cudaErrorInvalidConfiguration"):
        cuda.tickets(blocks, threads)


def test_device_attributes(monkeypatch):
    cuda = build.load(build.module(csrc=SELFTEST_MODULE))
    attributes = [16, 75, 76, 97, 81]
    assert [cuda.attribute(which) for which in attributes] == [132, 9, 0, 232448, 233472]
    monkeypatch.setenv("RD_EMULATION_DEVICE", "108,8,0,166912,167936")
    assert [cuda.attribute(which) for which in attributes] == [108, 8, 0, 166912, 167936]


def test_sanitized_module():
    source = (SELFTEST_MODULE / "cuda" / "tickets.cu").read_text()
    broken = {"cuda/tickets.cu": source.replace("order[blockIdx", "order[1 + blockIdx")}
    for replace, message in (({}, None), (broken, "heap-buffer-overflow")):
        path = build.module(MEMORY, replace, SELFTEST_MODULE)
        code = f"import sys; sys.path.insert(0, {str(path.parent)!r}); import _cuda; _cuda.tickets(2, 64)"
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=build.sanitized_environment(),
            check=False,
            timeout=120,
        )
        assert (result.returncode == 0) == (message is None), result.stderr
        assert message is None or message in result.stderr


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_conversions(name, dtype):
    library = ctypes.CDLL(str(build.library(build.EMULATION / "conversions.cpp")))

    def convert(function: str, source: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        getattr(library, function)(
            ctypes.c_void_p(source.data_ptr()),
            ctypes.c_void_p(result.data_ptr()),
            ctypes.c_int64(len(source)),
        )
        return result

    every = torch.arange(1 << 16).to(torch.int16).view(dtype)
    wide = convert(f"float_from_{name}", every, torch.empty(len(every)))
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    # Random bits, and what lies halfway between two neighbours.
    floats = torch.randint(-(2**31), 2**31, (1 << 20,)).to(torch.int32).view(torch.float32)
    halfway = (wide[:-1].double() + wide[1:].double()).div(2).float()
    floats = torch.cat([floats, wide, halfway])
    narrow = convert(f"{name}_from_float", floats, torch.empty(len(floats), dtype=dtype))
    torch.testing.assert_close(narrow, floats.to(dtype), rtol=0, atol=0, equal_nan=True)
