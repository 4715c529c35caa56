"""The package as a user meets it: import cost, info, the choice of backends."""

import json
import subprocess
import sys
import threading

import pytest
import torch

import rd_kernels as rd


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )


def test_import_loads_neither_triton_nor_native_code():
    code = (
        "import sys, torch; before = set(sys.modules); import rd_kernels;"
        "new = set(sys.modules) - before; import json; print(json.dumps(sorted(new)))"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    loaded = json.loads(result.stdout)
    assert "rd_kernels" in loaded
    assert not [name for name in loaded if name.split(".")[0] == "triton" or name == "rd_kernels._native"]
    assert "transformers" not in loaded


def test_info_lists_every_backend():
    result = subprocess.run(
        [sys.executable, "-m", "rd_kernels.info"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for name in ("triton", "cpu", "reference", torch.__version__):
        assert name in result.stdout
    assert "cpu        available" in result.stdout


def test_available_names_what_is_missing():
    result = run_python(
        "import rd_kernels as rd; print(rd.backends.available()['triton'])", TRITON_INTERPRET="0"
    )
    if not torch.cuda.is_available():
        assert "TRITON_INTERPRET" in result.stdout, result.stdout + result.stderr
    assert rd.backends.available()["reference"] is None
    assert rd.backends.available()["cpu"] is None, "make test builds the native backend"


def served_by(monkeypatch, **kwargs) -> list[str]:
    """The backends that the op was really started on."""
    from rd_kernels.backends import registry

    started = []
    original = registry.get.__wrapped__

    def spy(name):
        started.append(name)
        return original(name)

    monkeypatch.setattr("rd_kernels.ops.get", spy)
    rd.functional.cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]), **kwargs)
    return started


def test_auto_takes_the_native_backend_and_can_be_overruled(monkeypatch):
    assert served_by(monkeypatch) == ["cpu"]
    assert served_by(monkeypatch, backend="reference") == ["reference"]
    with rd.use_backend("reference"):
        assert served_by(monkeypatch) == ["reference"]
        assert served_by(monkeypatch, backend="cpu") == ["cpu"]
    assert served_by(monkeypatch) == ["cpu"]
    monkeypatch.setenv("RD_KERNELS_BACKEND", "reference")
    assert served_by(monkeypatch) == ["reference"]


def test_auto_falls_back_for_dtypes_without_a_kernel():
    logits = torch.randn(2, 3, dtype=torch.float64)
    loss = rd.functional.cross_entropy(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])))


def test_explicit_backend_that_cannot_serve_raises(monkeypatch):
    logits, target = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot serve this call: .*float64"):
        rd.functional.cross_entropy(logits, target, backend="cpu")
    with rd.use_backend("cpu"), pytest.raises(RuntimeError, match="cannot serve"):
        rd.functional.cross_entropy(logits, target)
    monkeypatch.setenv("RD_KERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match="RD_KERNELS_BACKEND must be one of"):
        rd.functional.cross_entropy(logits, target)
    with pytest.raises(ValueError, match="name must be one of"):
        rd.use_backend("gpu")


def test_many_threads_at_once():
    """The native call releases the GIL; results do not depend on who else is running."""
    logits, target = torch.randn(64, 2000), torch.randint(2000, (64,))
    expected = rd.functional.cross_entropy(logits, target, reduction="none", backend="cpu")
    results: list[torch.Tensor] = []

    def work():
        for _ in range(20):
            results.append(rd.functional.cross_entropy(logits, target, reduction="none", backend="cpu"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 160
    assert all(torch.equal(result, expected) for result in results)


def test_after_fork():
    """A forked worker (DataLoader) can use the op after the parent used it."""
    code = """
import os, torch, rd_kernels as rd
logits, target = torch.randn(64, 2000), torch.randint(2000, (64,))
expected = rd.functional.cross_entropy(logits, target, backend="cpu")
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    same = torch.equal(rd.functional.cross_entropy(logits, target, backend="cpu"), expected)
    os._exit(0 if same else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("limit", "expected"), [("0", "0"), ("100000000", "48")])
def test_the_gradient_cache_obeys_the_environment(limit, expected):
    code = """
import torch, rd_kernels as rd
logits = torch.randn(400, 30522, requires_grad=True)
rd.functional.cross_entropy(logits, torch.arange(400)).backward()
logits.grad = None
from rd_kernels import _native
print(_native.cpu.cached_bytes() >> 20)
"""
    assert run_python(code, RD_KERNELS_CACHE_BYTES=limit).stdout.strip() == expected


def test_a_cache_limit_that_is_no_number_is_named():
    code = "import torch, rd_kernels as rd; rd.functional.cross_entropy(torch.randn(2, 3), torch.arange(2))"
    result = run_python(code, RD_KERNELS_CACHE_BYTES="1GB")
    assert "RD_KERNELS_CACHE_BYTES must be a number of bytes, 0 for no cache, got '1GB'" in result.stderr
