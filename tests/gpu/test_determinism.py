"""1,000 runs, one result: thread blocks finish in any order, sums are taken in one."""

import pytest
import torch

from rd_kernels.backends.registry import get
from tests.gpu.problems import DTYPES, make_batch, make_loss, step

pytestmark = pytest.mark.gpu

RUNS = 1000


def assert_always_the_same(run) -> None:
    """``run`` -> tensors, the same bits each time; compared on the GPU, which is asked once."""
    first = [tensor.clone() for tensor in run()]
    different = torch.zeros((), dtype=torch.int64)
    for _ in range(RUNS - 1):
        for tensor, expected in zip(run(), first, strict=True):
            different += (tensor != expected).sum()
    assert different.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [False, True], ids=["ids", "mask"])
def test_the_op(backend, dtype, mask):
    logits, labels, groups = make_batch(300, 5003, dtype, mask=mask)
    logits.requires_grad_()
    loss_fn = make_loss(backend)
    start = loss_fn.group_weights.clone()

    def run():
        loss_fn.group_weights.copy_(start)
        return (*step(loss_fn, logits, labels, groups), loss_fn.group_weights)

    assert_always_the_same(run)


@pytest.mark.parametrize(
    ("rows", "num_groups", "mask"), [(50_000, 3, False), (50_000, 1000, False), (20_000, 64, True)]
)
def test_group_sums(backend, rows, num_groups, mask):
    """Few groups, many groups, masks that overlap."""
    kernels = get(backend)
    losses = torch.rand(rows) * 8
    outcome = torch.randint(3, (rows,)).to(torch.uint8)
    groups = torch.randint(-1, num_groups, (rows,))
    member = torch.rand(rows, num_groups) < 0.3 if mask else groups[:, None] == torch.arange(num_groups)
    groups = kernels.pack_mask(member) if mask else groups
    q = torch.full((num_groups,), 1 / num_groups)

    def run():
        state = q.clone()
        loss, stats, _, scale = kernels.reduce_and_update(
            losses, outcome, groups, state, "group_dro", 0.1, None
        )
        return loss, stats, scale, state

    _, stats, _, _ = run()
    counted = (outcome < 2)[:, None] & member
    exact = torch.where(counted, losses.double()[:, None], 0).sum(0)
    torch.testing.assert_close(stats[0, :num_groups].double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(stats[1, :num_groups].double(), counted.sum(0).double())
    assert_always_the_same(run)
