"""What a loss carries from batch to batch beside q, and what of it a checkpoint holds."""

from __future__ import annotations

import copy

import pytest
import torch

import rd_kernels as rd
from tests.oracles import PublishedGroupDRO

pytestmark = pytest.mark.grid

G, V = 3, 7


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, V, generator=generator) * 2
    labels, groups = (torch.randint(high, (20,), generator=generator) for high in (V, G))
    return logits, labels, groups


def test_what_a_checkpoint_holds():
    assert set(rd.GroupDROLoss(G).state_dict()) == {"group_weights"}
    assert set(rd.GroupDROLoss(G, rd.GroupDRO(loss_ema=0.1)).state_dict()) == {"group_weights", "memory"}
    assert set(rd.GroupDROLoss(G, rd.DoReMi()).state_dict()) == {"group_weights", "memory"}
    adjusted = rd.GroupDROLoss(G)
    adjusted.set_adjustment([0.1, 0.2, 0.3])
    assert set(adjusted.state_dict()) == {"group_weights", "adjustment"}


@pytest.mark.parametrize("objective", [rd.GroupDRO(0.5, loss_ema=0.3), rd.DoReMi()], ids=str)
def test_going_on_from_a_checkpoint_gives_the_same_numbers(backend, objective):
    def run(loss_fn, seeds):
        losses = []
        for seed in seeds:
            logits, labels, groups = (each.to(loss_fn.group_weights.device) for each in batch(seed))
            more = {"reference_losses": torch.full((20,), 0.7)} if objective.needs_reference else {}
            losses.append(loss_fn(logits, labels, groups, **more).item())
        return losses

    whole = rd.GroupDROLoss(G, objective, backend=backend)
    expected = run(whole, range(6))
    first, second = (rd.GroupDROLoss(G, objective, backend=backend) for _ in range(2))
    start = run(first, range(3))
    second.load_state_dict(first.state_dict())
    assert start + run(second, range(3, 6)) == expected
    assert torch.equal(second.memory, whole.memory)
    assert second.memory.dtype == torch.float64


def test_an_adjustment_set_while_training(backend):
    """The reference code's automatic adjustment: after an epoch, the measured gap between held-out and training loss."""
    loss_fn = rd.GroupDROLoss(G, rd.GroupDRO(0.5, adjustment=2.0, group_counts=[4, 9, 16]), backend=backend)
    gap = [0.5, 0.0, -0.25]
    loss_fn.set_adjustment(gap)
    logits, labels, groups = (each.to(loss_fn.group_weights.device) for each in batch())
    loss_fn(logits, labels, groups)
    # The published update adds C / sqrt(N_g): these N make the gap of it, but for its sign.
    rows = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    means = [rows[groups == g].mean().item() + gap[g] for g in range(G)]
    weights = torch.tensor(means, dtype=torch.float64).mul(0.5).softmax(0)
    torch.testing.assert_close(loss_fn.group_weights.double().cpu(), weights.cpu(), atol=1e-6, rtol=1e-6)
    other = rd.GroupDROLoss(G)
    other.load_state_dict(loss_fn.state_dict())
    assert other.adjustment.tolist() == gap
    assert copy.deepcopy(other).state_dict()["adjustment"].tolist() == gap


def test_the_size_adjustment_by_group():
    """One C for each group, as the reference code's generalization_adjustment takes it."""
    objective = rd.GroupDRO(0.5, adjustment=[1.0, 0.0, 3.0], group_counts=[4, 9, 16])
    loss_fn = rd.GroupDROLoss(G, objective)
    logits, labels, groups = batch()
    loss_fn(logits, labels, groups)
    published = PublishedGroupDRO(G, 0.5)
    rows = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    bonus = torch.tensor([1 / 2, 0, 3 / 4], dtype=torch.float64)
    published.step(rows + bonus[groups], [[int(g)] for g in groups])
    torch.testing.assert_close(
        loss_fn.group_weights, torch.tensor(published.probabilities), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.1, 0.2], r"adjustment must be 3 finite numbers, got \[0.1"),
        ([0.1, float("nan"), 0.0], "adjustment must be 3 finite numbers"),
    ],
)
def test_an_adjustment_that_does_not_fit(values, message):
    with pytest.raises(ValueError, match=message):
        rd.GroupDROLoss(G).set_adjustment(values)


def test_an_adjustment_for_another_objective():
    with pytest.raises(ValueError, match="set_adjustment is for GroupDRO, not for ERM"):
        rd.GroupDROLoss(G, rd.ERM()).set_adjustment([0.0] * G)
    saved = rd.GroupDROLoss(G)
    saved.set_adjustment([0.0] * G)
    with pytest.raises(RuntimeError, match="set_adjustment is for GroupDRO"):
        rd.GroupDROLoss(G, rd.CVaR(0.5)).load_state_dict(saved.state_dict())


def test_stateless_calls_take_and_change_the_memory(backend):
    logits, labels, groups = batch()
    device = torch.get_default_device()
    logits, labels, groups = (each.to(device) for each in (logits, labels, groups))
    objective, reference = rd.DoReMi(), torch.full((20,), 0.7)
    module = rd.GroupDROLoss(G, objective, backend=backend)
    expected = module(logits, labels, groups, reference)
    q, memory = torch.full((G,), 1 / G), objective.initial_memory(G).to(device)
    loss = rd.functional.group_dro_cross_entropy(
        logits, labels, groups, q, objective, reference_losses=reference, memory=memory, backend=backend
    )
    assert torch.equal(loss, expected)
    assert torch.equal(memory, module.memory)
    assert torch.equal(q, module.group_weights)
    assert memory[2].tolist() == [1] * G


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({}, ValueError, "DoReMi remembers excess, average, updates: pass memory="),
        (
            {"memory": torch.zeros(3, G)},
            ValueError,
            r"memory must be DoReMi's initial_memory, float64 \[3, 3\]",
        ),
        ({"memory": torch.zeros(3, G).double()}, ValueError, "DoReMi needs reference_losses"),
        (
            {"memory": torch.zeros(3, G).double(), "reference_losses": torch.zeros(19)},
            ValueError,
            r"reference_losses must have labels' shape \[20\], got \[19\]",
        ),
        (
            {"memory": torch.zeros(3, G).double(), "reference_losses": torch.zeros(20, dtype=torch.int64)},
            TypeError,
            "reference_losses must be floating point",
        ),
    ],
)
def test_memory_and_reference_losses_that_do_not_fit(more, error, message):
    q = torch.full((G,), 1 / G)
    with pytest.raises(error, match=message):
        rd.functional.group_dro_cross_entropy(*batch(), q, rd.DoReMi(), **more)
    assert q.tolist() == pytest.approx([1 / G] * G)


def test_reference_losses_nobody_asked_for():
    with pytest.raises(ValueError, match="reference_losses were given, but GroupDRO does not use them"):
        rd.GroupDROLoss(G)(*batch(), torch.zeros(20))


def test_groups_may_be_left_out_for_one_group(backend):
    logits, labels, _ = (each.to(torch.get_default_device()) for each in batch())
    loss = rd.GroupDROLoss(1, rd.CVaR(0.2, over="rows"), backend=backend)(logits, labels)
    worst = (
        torch.nn.functional.cross_entropy(logits, labels, reduction="none").sort(descending=True).values[:4]
    )
    torch.testing.assert_close(loss, worst.mean())
    with pytest.raises(ValueError, match="groups may only be left out for one group, not for 3"):
        rd.GroupDROLoss(G, backend=backend)(logits, labels)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"level": "word"}, ValueError, "level must be 'token' or 'sequence', got 'word'"),
        ({"top_k": 0}, ValueError, "top_k must be None or an integer >= 1, got 0"),
        ({"top_k": True}, ValueError, "top_k"),
        ({"entropy": "yes"}, TypeError, "entropy must be True or False, got 'yes'"),
        ({"objective": rd.GroupDRO(floor=0.5)}, ValueError, "floor must be <= 1 / 3"),
    ],
)
def test_settings_that_do_not_fit(more, error, message):
    with pytest.raises(error, match=message):
        rd.GroupDROLoss(G, **more)
