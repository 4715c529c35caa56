"""The CUDA kernels in the emulation under the sanitizers, and whether a mistake in them would be noticed."""

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rd_kernels.backends.cuda import CUDABackend
from tests.cuda_emulation import build
from tests.gpu_oracles import IGNORE, cross_entropy, gradient, make

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

MEMORY = "address,undefined"
SUITES = [  # two processes
    ("tests/test_conformance.py", "tests/test_gpu_groups.py", "tests/test_gpu_rules.py"),
    ("tests/test_cuda_kernels.py", "tests/test_gpu_kernels.py", "tests/test_gpu_details.py"),
]


def memory_errors(*tests: str, **env: str) -> subprocess.CompletedProcess:
    """The tests of the CUDA backend in these files, in a process with the address and undefined behaviour sanitizers."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "-m", "not slow"]
    env = {**build.sanitized_environment(), "RD_EMULATION_SANITIZE": MEMORY, **env}
    command += ["-k", "cuda", *tests]
    return subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=False, env=env)


def races(replace: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output of every kernel under the thread sanitizer."""
    program = build.program(build.EMULATION / "races.cu", "thread", with_kernels=True, replace=replace)
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False, env=env)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("this thread sanitizer cannot start here: addresses are too random (vm.mmap_rnd_bits)")
    return result.returncode, result.stdout + result.stderr


def results_are_right(replace: dict[str, str]) -> bool:
    """Loss, group sums and gradients of a few rows with these sources, against float64."""
    cuda = CUDABackend()
    cuda.__dict__["_loaded"] = build.load(build.module(replace=replace))
    with contextlib.suppress(RuntimeError):  # the emulation's own complaint
        return _results_are_right(cuda)
    return False


def _results_are_right(cuda: CUDABackend) -> bool:
    right = True
    for vocabulary in (9, 3001):
        logits, labels = make(150, vocabulary, torch.float32)
        groups, q = torch.arange(150) % 3, torch.full((3,), 1 / 3)
        loss, stats, _, scale, normaliser = cuda.grouped_forward(
            logits, labels, groups, q, "erm", 0.0, None, IGNORE
        )
        row_loss = cross_entropy(logits, labels, torch.float64)
        sums = torch.stack([row_loss[groups == group].sum() for group in range(3)])
        result = cuda.row_backward(None, scale, logits, labels, normaliser, None, 0.0, IGNORE)
        truth = gradient(logits, labels, torch.full((150,), 1 / 150), torch.float64)
        right &= bool(torch.isclose(loss.double(), row_loss.mean(), rtol=1e-5))
        right &= bool(torch.isclose(stats[0, :3].double(), sums, rtol=1e-5).all())
        right &= bool(torch.isclose(result.double(), truth, rtol=1e-4, atol=1e-8).all())
    return right


@pytest.mark.parametrize("one_in", [3, pytest.param(1, marks=pytest.mark.slow)], ids="one case in {}".format)
def test_no_access_outside_a_tensor_and_nothing_undefined(one_in):
    build.module(MEMORY)
    env = {"RD_TESTS_ONE_IN": str(one_in)}
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(lambda suites: memory_errors(*suites, **env), SUITES):
            assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def test_no_race():
    assert races() == (0, "done\n")


def planted(file: str, old: str, new: str) -> dict[str, str]:
    text = (build.ROOT / "csrc" / file).read_text()
    assert old in text, f"{file} has changed: {old}"
    return {file: text.replace(old, new, 1)}


def test_results_are_right_without_a_planted_bug():
    assert results_are_right({})


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        # Wrong shuffles: a step left out, lanes left out of the mask. A wrong index.
        ("cuda/rows.cuh", "for (int lanes = 16; lanes > 0; lanes /= 2)", "for (int lanes = 16; lanes > 1; lanes /= 2)"),
        ("cuda/rows.cuh", "__shfl_xor_sync(~0u, mine, lanes)", "__shfl_xor_sync(0xffffu, mine, lanes)"),
        ("cuda/groups.cuh", "thread += width", "thread += 2 * width"),
    ],
)  # fmt: skip
def test_a_planted_bug_gives_wrong_results(file, old, new):
    assert not results_are_right(planted(file, old, new))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("cuda/rows.cuh", "blocks > 1 ? cluster_sync() : __syncthreads();", "if (blocks > 1) cluster_sync();"),
        ("cuda/groups.cuh", "  __syncthreads();\n  Sums<T> sums;", "  Sums<T> sums;"),
        ("cuda/groups.cuh", "    __threadfence();\n    const uint32_t arrived", "    const uint32_t arrived"),
    ],
)  # fmt: skip
def test_a_missing_barrier_or_fence_is_a_race(file, old, new):
    status, output = races(planted(file, old, new))
    assert status != 0
    assert "data race" in output


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("cuda/gradient.cuh", "piece < out.pieces - 1; piece", "piece < out.pieces; piece", "heap-buffer-overflow"),
        ("cuda/rows.cuh", "before = missing < size ? missing : size;", "before = 0;", "misaligned"),
    ],
)  # fmt: skip
def test_an_access_outside_a_tensor_or_misaligned_is_found(file, old, new, message):
    module = build.module(MEMORY, replace=planted(file, old, new))
    tests = "tests/test_cuda_kernels.py::test_rows_at_the_end_of_their_memory"
    assert memory_errors(tests).returncode == 0
    result = memory_errors(tests, RD_EMULATION_MODULE=str(module))
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
