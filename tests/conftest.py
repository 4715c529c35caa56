"""Shared fixtures. Without a GPU, Triton kernels run under Triton's interpreter, CUDA kernels in an emulation."""

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Read when torch is imported: torch.compile's caches do not see a change of an op's fake implementation.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
# Read when cuBLAS starts: the oracles' matrix products under the fixture `poisoned`.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from rd_kernels.backends.interface import Backend
from rd_kernels.backends.registry import BACKENDS, get
from tests.cuda_emulation import build
from tests.devices import device_of

if not torch.cuda.is_available():
    # Read by triton when it is first imported, so it must stand before any test module.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DATA_DIR = Path(os.environ.get("RD_KERNELS_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--online", action="store_true", help="also run the tests that need the Hugging Face hub"
    )


_ONE_IN = 5  # of a grid, where Triton's kernels are interpreted
# Minutes each: they come first, so that no process is left with one at the end.
_LONGEST = ("test_cuda_sanitized.py", "test_triton_aot.py")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONGEST)
    seen: Counter[str] = Counter()
    # RD_TESTS_ONE_IN: of every test's cases for a backend; what is left out is slow.
    of_all, interpreted = int(os.environ.get("RD_TESTS_ONE_IN", "1")), device_of("triton") == "cpu"
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        names = [value for value in params.values() if isinstance(value, str)]
        backend = next((name for name in names if name in ("triton", "cuda")), "")
        of_grid = backend == "triton" and interpreted and item.get_closest_marker("grid")
        one_in = max(of_all, _ONE_IN if of_grid else 1)
        test = backend + item.nodeid.split("[")[0]
        if params and seen[test] % one_in:
            item.add_marker(pytest.mark.slow)
        seen[test] += 1
    if not config.getoption("--online"):
        skip = pytest.mark.skip(reason="needs the Hugging Face hub; run with --online")
        for item in items:
            if item.get_closest_marker("online"):
                item.add_marker(skip)


_property_cases: Counter[str] = Counter()


@pytest.fixture(scope="session")
def property_cases() -> Counter[str]:
    """Random cases tried, by backend; a test adds its own, the summary at the end says how many there were."""
    return _property_cases


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # in a worker of xdist, which hands them on
        session.config.workeroutput["property_cases"] = dict(_property_cases)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    _property_cases.update(getattr(node, "workeroutput", {}).get("property_cases", {}))


def pytest_terminal_summary(terminalreporter) -> None:
    if _property_cases:
        by_backend = ", ".join(f"{backend} {count:,}" for backend, count in _property_cases.most_common())
        terminalreporter.write_line(f"properties: {_property_cases.total():,} cases ({by_backend})")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the public evaluation data (StereoSet, CrowS-Pairs, BOLD, ...), named by RD_KERNELS_DATA_DIR."""
    if not DATA_DIR.is_dir():
        pytest.skip(f"{DATA_DIR} is absent; point RD_KERNELS_DATA_DIR at a copy of the data")
    return DATA_DIR


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@functools.cache
def _emulate_cuda() -> None:
    """Put the kernels as g++ compiles them into the CUDA backend. RD_EMULATION_SANITIZE: with these sanitizers;
    RD_EMULATION_MODULE: this build of them."""
    if (reason := build.missing()) is not None:
        pytest.skip(reason)
    built = os.environ.get("RD_EMULATION_MODULE") or build.module(os.environ.get("RD_EMULATION_SANITIZE"))
    state = get("cuda").__dict__
    state["_loaded"] = build.load(Path(built))
    state.pop("_native", None)  # that of an earlier test, which asked whether the real one is there


@contextlib.contextmanager
def on_device_of(backend: str) -> Iterator[None]:
    """In this block torch's factory functions make tensors where ``backend`` is tested."""
    device = device_of(backend)
    if backend == "cuda" and device == "cpu":
        _emulate_cuda()
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, on its device: while the test runs, torch's factory functions make tensors there.

    So a test that uses this fixture makes its tensors inside, and names no device. A missing backend is a failure:
    `make test` builds and installs all of them.
    """
    with on_device_of(request.param):
        yield request.param


@pytest.fixture(params=["triton", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The launcher of each GPU backend in turn, on its device as above."""
    with on_device_of(request.param):
        yield get(request.param)


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN (integers: their maximum), so an element no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # oracles may use what a GPU adds in any order
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
