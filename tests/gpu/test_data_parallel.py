"""tests/test_data_parallel.py with NCCL: a process for each GPU, up to four. With one GPU there is one process, for which
the all-reduce, DDP and FSDP2 are there all the same."""

import pytest
import torch

from tests.devices import GPU
from tests.test_data_parallel import (
    AUTOCAST,
    CASES,
    check,
    check_again,
    check_autocast,
    spawn,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not GPU:
        pytest.skip("torch sees no GPU")
    count = max(size for size in (1, 2, 4) if size <= torch.cuda.device_count())
    found = spawn(count, tmp_path_factory.mktemp("ranks"), "cuda")
    assert found.codes == [0] * count
    return found


@pytest.fixture(autouse=True)
def _on_the_gpu(ranks):
    """The one process that the ranks are compared with."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_ranks_train_as_one_process_on_the_joined_batch(ranks, case):
    check(ranks, case)


@pytest.mark.parametrize("case", [case for case in CASES if case.split == "unequal"], ids="-".join)
def test_a_repeated_run_has_the_same_bits(ranks, case):
    check_again(ranks, case)


@pytest.mark.parametrize("case", AUTOCAST, ids="-".join)
def test_autocast_to_bfloat16(ranks, case):
    check_autocast(ranks, case)
