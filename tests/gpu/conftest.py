"""The backends that run on a GPU, on it. Without one every test of this folder is skipped."""

from collections.abc import Iterator

import pytest
import torch

from rd_kernels.backends.registry import BACKENDS, get
from tests.devices import GPU


@pytest.fixture(params=[name for name in ("triton", "cuda") if name in BACKENDS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """As the suite's fixture of that name. With a GPU, a backend that is missing is a failure."""
    if not GPU:
        pytest.skip("torch sees no GPU")
    assert get(request.param).missing() is None
    torch.set_default_device("cuda")
    yield request.param
    torch.set_default_device(None)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the next test may need the whole memory
