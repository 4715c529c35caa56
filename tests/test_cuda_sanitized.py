"""The CUDA kernels in the emulation under the sanitizers, and whether those would notice a mistake in them."""

import os
import subprocess
import sys

import pytest
import torch

from rd_kernels.backends.cuda import CUDABackend
from tests.cuda_emulation import build
from tests.gpu_oracles import IGNORE, cross_entropy, gradient, make

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

SUITES = ["conformance", "cuda_kernels", "gpu_kernels", "gpu_groups"]


def run_suites(replace_memory="", *arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={})


def test_no_access_outside_a_tensor_and_nothing_undefined():
    """The suites that the other backends pass, with the address and undefined behaviour sanitizers."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda", "-m", "not slow"]
    command += [f"tests/test_{suite}.py" for suite in SUITES]
    env = {**build.sanitized_environment(), "RD_EMULATION_SANITIZE": "address,undefined"}
    result = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def races(replace=None):
    program = build.program(build.EMULATION / "races.cu", "thread", with_kernels=True, replace=replace)
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False, env=env)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("this thread sanitizer cannot start here: addresses are too random (vm.mmap_rnd_bits)")
    return result.returncode, result.stdout + result.stderr


def test_no_race():
    assert races() == (0, "done\n")
