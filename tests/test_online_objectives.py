"""Learned weights, of Group DRO and DoReMi, against loops over the published updates."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax

import rd_kernels as rd
from tests.objective_cases import batch_of, start
from tests.oracles import PublishedDoReMi, PublishedGroupDRO

GROUPS = 4


def random_batch(generator, adjustment=None):
    """Row losses, references and groups with every other group rare, and their statistics."""
    rows = int(generator.integers(1, 9))
    losses, references = generator.gamma(2, size=rows), generator.gamma(2, size=rows)
    groups = generator.choice(GROUPS, size=rows, p=[0.6, 0.25, 0.1, 0.05])
    member = groups[:, None] == np.arange(GROUPS)
    excess = np.maximum(losses - references, 0) @ member
    statistics = [torch.from_numpy(each).double() for each in (losses @ member, member.sum(0), excess)]
    return losses, references, groups, rd.Batch(*statistics, adjustment)


@pytest.mark.parametrize("absent_groups", ["decay", "hold"])
@pytest.mark.parametrize("constant", [0.0, 2.0, [3.0, 0.0, 1.0, 2.0]], ids=str)
@pytest.mark.parametrize(
    ("loss_ema", "floor"), [(None, 0.0), (0.1, 0.0), (1.0, 0.0), (None, 0.04), (0.3, 0.25)]
)
def test_group_dro_follows_the_published_loop(absent_groups, constant, loss_ema, floor):
    sizes = [400, 100, 25, 9]
    objective = rd.GroupDRO(0.2, constant, sizes, absent_groups, loss_ema, floor)
    oracle = PublishedGroupDRO(
        GROUPS, 0.2, constant, sizes, hold_absent=absent_groups == "hold", loss_ema=loss_ema, floor=floor
    )
    generator = np.random.default_rng(0)
    q, memory = start(objective, GROUPS)
    assert memory.shape == (len(objective.memory), GROUPS)
    for _ in range(60):
        losses, _, groups, batch = random_batch(generator, objective.adjustment_for(GROUPS))
        expected = oracle.step(torch.from_numpy(losses), [[group] for group in groups])
        weights, q, learned = objective.update(batch, q, memory)
        memory = memory if learned is None else learned
        assert q.tolist() == pytest.approx(oracle.probabilities, rel=1e-6)  # the adjustment is float32
        assert (weights * batch.means).sum().item() == pytest.approx(expected, rel=1e-6)
        assert q.min() >= floor - 1e-15
        assert q.sum().item() == pytest.approx(1, abs=1e-12)
    if loss_ema is not None:
        seen = [oracle.averages.get(group, math.nan) for group in range(GROUPS)]
        assert memory[0].tolist() == pytest.approx(seen, rel=1e-12, nan_ok=True)


def test_a_measured_gap_is_added_as_it_is():
    """``batch.adjustment`` comes from outside: it need not be the objective's own, and may be negative."""
    gap = torch.tensor([0.5, -0.25, 0.0, 2.0])
    for options in ({}, {"floor": 1e-300}):
        objective = rd.GroupDRO(0.3, **options)
        batch = batch_of([3.0, 1.0, 2.0, 4.0], [1.0, 2.0, 0.5, 0.1], gap)
        q = objective.update(batch, *start(objective, 4)).q
        np.testing.assert_allclose(q, softmax(0.3 * (batch.means + gap).numpy()), rtol=1e-12)


@pytest.mark.parametrize("absent_groups", ["decay", "hold"])
def test_the_rule_of_the_kernels_and_the_update_in_python_agree(absent_groups):
    """An average over one batch and a floor that float64 does not see change nothing but where the rule runs."""
    kernels = rd.GroupDRO(0.3, 1.0, [9, 8, 7, 6], absent_groups)
    python = replace(kernels, loss_ema=1.0, floor=1e-300)
    assert kernels.rule == {"decay": "group_dro", "hold": "group_dro_hold"}[absent_groups]
    assert python.rule is None
    generator = np.random.default_rng(2)
    (q, _), (other, memory) = start(kernels, GROUPS), start(python, GROUPS)
    for _ in range(20):
        *_, batch = random_batch(generator, kernels.adjustment_for(GROUPS))
        q = kernels.update(batch, q, memory[:0]).q
        _, other, memory = python.update(batch, other, memory)
        torch.testing.assert_close(other, q, rtol=1e-12, atol=0)


def test_hold_leaves_absent_groups_bit_for_bit_and_the_floor_brings_groups_back():
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    batch = batch_of([2.0, 0.0, 3.0, 0.0], [1.0, 0.0, 90.0, 0.0])
    held = rd.GroupDRO(1e200, absent_groups="hold", floor=0.05).update(batch, q, q[:0]).q
    torch.testing.assert_close(held, torch.tensor([0.05, 0.2, 0.35, 0.4], dtype=torch.float64))
    assert held[1] == q[1]
    assert held[3] == q[3]
    # A q from elsewhere that breaks the bound: as far up as what the groups present share allows, and still a simplex.
    short = torch.tensor([0.0, 0.5, 0.02, 0.48], dtype=torch.float64)
    held = rd.GroupDRO(1.0, absent_groups="hold", floor=0.05).update(batch, short, q[:0]).q
    torch.testing.assert_close(held, torch.tensor([0.01, 0.5, 0.01, 0.48], dtype=torch.float64))
    for options, expected in (({}, 0.0), ({"floor": 0.01}, 0.01)):
        objective = rd.GroupDRO(1e200, **options)
        first = objective.update(batch, q, q[:0]).q
        assert first.tolist() == pytest.approx([expected, expected, 1 - 3 * expected, expected])
        turned = objective.update(batch_of([2.0, 0.0, 3.0, 0.0], [90.0, 0.0, 1.0, 0.0]), first, q[:0]).q
        assert (turned[0] > 0.9) == bool(options)  # without a floor the group is lost for good


def test_doremi_follows_the_published_loop():
    objective = rd.DoReMi(0.7, 0.02)
    oracle = PublishedDoReMi([1 / GROUPS] * GROUPS, 0.7, 0.02)
    q, memory = start(objective, GROUPS)
    generator = np.random.default_rng(3)
    absent = 0
    for step in range(1, 61):
        losses, references, groups, batch = random_batch(generator)
        expected = oracle.step(losses.tolist(), references.tolist(), groups.tolist())
        weights, q, memory = objective.update(batch, q, memory)
        assert q.tolist() == pytest.approx(oracle.weights, rel=1e-10)
        assert (weights * batch.means).sum().item() == pytest.approx(expected, rel=1e-10)
        assert weights.sum().item() == pytest.approx(1)
        assert not weights[~batch.present].any()
        assert memory[0].tolist() == pytest.approx(oracle.excess, rel=1e-12)
        assert rd.DoReMi.average_weights(memory).tolist() == pytest.approx(oracle.average(), rel=1e-10)
        assert memory[2].tolist() == [step] * GROUPS
        absent += int((~batch.present).sum())
    assert absent > 60  # the loop saw what it is about


def test_doremi_at_its_limits():
    batch = batch_of([3.0, 2.0, 5.0, 0.0], [4.0, 1.0, 2.0, 0.0])
    uniform = rd.DoReMi(1.0, smoothing=1.0)
    weights, q, _ = uniform.update(batch, *start(uniform, 4))
    assert q.tolist() == [0.25] * 4
    np.testing.assert_allclose(weights, [0.3, 0.2, 0.5, 0.0])
    greedy = rd.DoReMi(1e200, smoothing=0.04)
    _, q, _ = greedy.update(batch, *start(greedy, 4))
    np.testing.assert_allclose(q, [0.97, 0.01, 0.01, 0.01])
