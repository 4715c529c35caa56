"""Shared fixtures. Without a GPU, Triton kernels run under Triton's interpreter."""

import os
from pathlib import Path

# Read when torch is imported: torch.compile's caches do not see a change of an op's fake implementation.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Read by triton when it is first imported, so it must stand before any test module.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DATA_DIR = Path(os.environ.get("RD_KERNELS_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the public evaluation data (StereoSet, CrowS-Pairs, BOLD, ...), named by RD_KERNELS_DATA_DIR."""
    if not DATA_DIR.is_dir():
        pytest.skip(f"{DATA_DIR} is absent; point RD_KERNELS_DATA_DIR at a copy of the data")
    return DATA_DIR


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn. A missing one is a failure: `make test` builds and installs all of them."""
    return request.param


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN (integers: their maximum), so an element no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
