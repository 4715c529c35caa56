"""Ranks with a process group compute one process's loss, gradient and q on the joined batch."""

import socket

import pytest
import torch
import torch.multiprocessing as mp

import rd_kernels as rd


def batch():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, 9, generator=generator)
    labels = torch.randint(9, (12,), generator=generator)
    labels[4] = -100
    # Ranks are unequal, and group 2 lives on the second rank only.
    return logits, labels, torch.tensor([0, 1, 0, 0, 1, 1, 0, 2, 2, 1, 2, 0]), [0, 5, 12]


def worker(rank: int, port: int, results) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=rank
    )
    logits, labels, groups, cuts = batch()
    mine = slice(cuts[rank], cuts[rank + 1])
    leaf = logits[mine].clone().requires_grad_()
    loss_fn = rd.GroupDROLoss(3, rd.GroupDRO(0.5), process_group=torch.distributed.group.WORLD)
    loss = loss_fn(leaf, labels[mine], groups[mine])
    loss.backward()
    count = loss_fn.report().overall.count
    try:
        rd.GroupDROLoss(3)(leaf, labels[mine], groups[mine])
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    results[rank] = (loss.detach(), leaf.grad, loss_fn.group_weights, count, refused)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, args=(port, results), nprocs=2)
        return [results[0], results[1]]


def test_two_ranks_equal_one(ranks):
    logits, labels, groups, _ = batch()
    leaf = logits.clone().requires_grad_()
    loss_fn = rd.GroupDROLoss(3, rd.GroupDRO(0.5))
    loss = loss_fn(leaf, labels, groups)
    loss.backward()
    for rank in ranks:
        torch.testing.assert_close(rank[0], loss.detach())
        torch.testing.assert_close(rank[2], loss_fn.group_weights)
        assert rank[3] == 11
    # DDP takes the mean over ranks of the parameters' gradients, hence the factor 2.
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]) / 2, leaf.grad)


def test_ranks_without_a_process_group_are_refused(ranks):
    assert all("several ranks need process_group" in rank[4] for rank in ranks)
