"""The rules in the epilogue of both GPU backends against rd_kernels.rules in float64, and the papers' formulas in loops.

Inputs are a batch's statistics. Of the corner cases each rule's own definition says what is right.
"""

import math

import pytest
import torch

from rd_kernels.backends.registry import get
from rd_kernels.rules import RULES
from tests.gpu_oracles import QUIET

pytestmark = [pytest.mark.filterwarnings(QUIET), pytest.mark.usefixtures("poisoned"), pytest.mark.grid]

EVERY = pytest.mark.parametrize("rule", RULES)
WITH_STATE = ("group_dro", "group_dro_hold")
# One rounding to float32; what is subnormal there may be 0.
CLOSE = {"rtol": 2.0**-22, "atol": 2.0**-126}


def make_stats(sums, counts):
    stats = torch.full((4, len(sums) + 2), 9.0)
    stats[0, :-2], stats[1, :-2] = torch.tensor(sums), torch.tensor(counts)
    return stats, torch.zeros(2, dtype=torch.int64)


def random_stats(count):
    """-> sums, counts, q: some groups absent, the first one there."""
    counts = torch.randint(0, 5, (count,)).float()
    counts[0] = 2
    return torch.rand(count) * 4 * counts, counts, torch.softmax(torch.randn(count), 0)


@EVERY
@pytest.mark.parametrize("count", [1, 3, 17, 300, 700])  # at once, and in turns
@pytest.mark.parametrize("rate", [0.0, 0.01, 3.0, -2.0])
def test_every_rule_is_as_defined(kernels, rule, count, rate):
    sums, counts, q = random_stats(count)
    adjustment = torch.rand(count) if rule in WITH_STATE and rate > 0 else None
    wide = [t.double() for t in (sums, counts, q)]
    expected, new_q, weights = RULES[rule](*wide, rate, None if adjustment is None else adjustment.double())
    stats, status = make_stats(sums.tolist(), counts.tolist())
    before, old_q = stats[:3].clone(), q.clone()
    loss, coefficients = kernels.group_update(stats, status, q, rule, rate, adjustment)
    assert loss.shape == ()
    torch.testing.assert_close(coefficients.double(), expected, **CLOSE)
    torch.testing.assert_close(stats[3, :count].double(), weights, **CLOSE)
    torch.testing.assert_close(loss.double(), (expected * wide[0]).sum(), rtol=2.0**-21, atol=0)
    assert torch.equal(stats[:3], before)
    assert stats[3, count] == 0
    torch.testing.assert_close(stats[3, count + 1].item(), 1.0, rtol=2.0**-21, atol=0)
    if rule in WITH_STATE:
        torch.testing.assert_close(q.double(), new_q, **CLOSE)
        assert torch.equal(stats[3, :count], q)
    else:
        assert torch.equal(q, old_q)


def published_update(sums, counts, q, step_size, adjustment):
    """Sagawa et al. 2020, Algorithm 1, as it stands there: multiply, then normalise."""
    present = counts > 0
    means = torch.where(present, sums / counts.clamp(min=1), 0.0)
    q = q * torch.where(present, (step_size * (means + adjustment)).exp(), 1.0)
    return q / q.sum()


@pytest.mark.parametrize("count", [1, 3, 17, 300])
@pytest.mark.parametrize("step_size", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("adjusted", [False, True])
def test_group_dro_is_the_published_update(kernels, count, step_size, adjusted):
    sums, counts, q = random_stats(count)
    adjustment = torch.rand(count) if adjusted else None
    given = (t.double().cpu() for t in (sums, counts, q, adjustment if adjusted else torch.zeros(count)))
    sums64, counts64, q64, adjustment64 = given
    expected = published_update(sums64, counts64, q64, step_size, adjustment64)
    kernels.group_update(*make_stats(sums.tolist(), counts.tolist()), q, "group_dro", step_size, adjustment)
    torch.testing.assert_close(q.double().cpu(), expected, **CLOSE)


@pytest.mark.parametrize("rate", [-1.5, 0.0, 0.7])
def test_rules_without_state_in_loops(kernels, rate):
    """ERM: n_g. TERM (Li et al. 2020): n_g exp(t m_g), hierarchical exp(t m_g). The worst group: two share it."""
    sums, counts = [6.0, 0.0, 3.0, 4.0, 16.0], [3.0, 0.0, 2.0, 1.0, 4.0]
    means = [s / n if n else 0.0 for s, n in zip(sums, counts, strict=True)]
    raw = {
        "erm": counts,
        "tilted_rows": [n * math.exp(rate * m) for m, n in zip(means, counts, strict=True)],
        "tilted_groups": [math.exp(rate * m) if n else 0.0 for m, n in zip(means, counts, strict=True)],
        "worst_group": [0.0, 0.0, 0.0, 1.0, 1.0],
    }
    for rule, weights in raw.items():
        weights = [weight / sum(weights) for weight in weights]
        stats, status = make_stats(sums, counts)
        loss, coefficients = kernels.group_update(stats, status, torch.full((5,), 0.2), rule, rate, None)
        torch.testing.assert_close(stats[3, :5].tolist(), weights, rtol=1e-6, atol=0)
        expected = [w / n if n else 0.0 for w, n in zip(weights, counts, strict=True)]
        torch.testing.assert_close(coefficients.tolist(), expected, rtol=1e-6, atol=0)
        robust = sum(w * m for w, m in zip(weights, means, strict=True))
        torch.testing.assert_close(loss.item(), robust, rtol=1e-6, atol=0)


def test_group_dro_does_not_overflow(kernels):
    stats, status = make_stats([11.0, 700.0, 1.0], [1.0, 1.0, 1.0])
    q = torch.tensor([0.5, 0.25, 0.25])
    loss, _ = kernels.group_update(stats, status, q, "group_dro", 10.0, None)
    assert q.tolist() == [0, 1, 0]
    assert loss == 700


@EVERY
@pytest.mark.parametrize("rate", [0.3, 3e30, 1e38, 1e150, -1e38])
def test_any_rate_as_in_the_reference(kernels, rule, rate):
    """The rate times a loss may exceed what float32 holds: nothing is NaN."""
    sums, counts = [40.0, 8.0, 0.0, 2e9, 40.0], [4.0, 2.0, 0.0, 1e8, 4.0]
    results = []
    for backend in (get("reference"), kernels):
        stats, status = make_stats(sums, counts)
        q = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2])
        loss, coefficients = backend.group_update(stats, status, q, rule, rate, None)
        results.append((loss, coefficients, q, stats[3]))
    assert all(result.isfinite().all() for result in results[0])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2.0**-22, atol=0)


@EVERY
def test_no_row_in_any_group(kernels, rule):
    stats, status = make_stats([0.0, 0.0], [0.0, 0.0])
    q = torch.tensor([0.3, 0.7])
    before = q.clone()
    loss, coefficients = kernels.group_update(stats, status, q, rule, 0.1, None)
    assert loss == 0
    assert coefficients.tolist() == [0, 0]
    assert torch.equal(q, before)
    assert torch.equal(stats[3, :2], before if rule in WITH_STATE else torch.zeros_like(before))


@EVERY
@pytest.mark.parametrize("bad", [[1, 0], [0, 3]])
def test_a_bad_input_leaves_the_state_alone(kernels, rule, bad):
    stats, status = make_stats([2.0, 3.0], [1.0, 2.0])
    status.copy_(torch.tensor(bad))
    q = torch.tensor([0.3, 0.7])
    before = q.clone()
    loss, coefficients = kernels.group_update(stats, status, q, rule, 0.1, None)
    assert loss.isnan()
    assert coefficients.tolist() == [0, 0]
    assert stats[3].count_nonzero() == 0
    assert torch.equal(q, before)


@EVERY
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_mean_that_is_not_finite(kernels, rule, bad):
    """q stays. The other rules: as with a rate of 0, the worst group's weight on all that are present."""
    stats, status = make_stats([2.0, bad, 0.0, 9.0], [1.0, 3.0, 0.0, 4.0])
    q = torch.tensor([0.25, 0.5, 0.125, 0.125])
    loss, coefficients = kernels.group_update(stats, status, q, rule, 0.1, None)
    by_rows, by_groups = [1 / 8, 3 / 8, 0.0, 4 / 8], [1 / 3, 1 / 3, 0.0, 1 / 3]
    weights = {
        "erm": by_rows, "group_dro": q.tolist(), "group_dro_hold": q.tolist(),
        "tilted_rows": by_rows, "tilted_groups": by_groups, "worst_group": by_groups,
    }[rule]  # fmt: skip
    assert not loss.isfinite()
    assert q.tolist() == [0.25, 0.5, 0.125, 0.125]
    torch.testing.assert_close(stats[3, :4].tolist(), weights, rtol=1e-6, atol=0)
    expected = [w / n if n else 0.0 for w, n in zip(weights, stats[1, :4].tolist(), strict=True)]
    torch.testing.assert_close(coefficients.tolist(), expected, rtol=1e-6, atol=0)


def test_held_groups_without_weight_to_share(kernels):
    """The groups present have a weight of 0 together: there are no proportions to update, and none are made up."""
    stats, status = make_stats([2.0, 3.0, 0.0], [1.0, 2.0, 0.0])
    q = torch.tensor([0.0, 0.0, 1.0])
    loss, coefficients = kernels.group_update(stats, status, q, "group_dro_hold", 0.1, None)
    assert loss == 0
    assert coefficients.tolist() == [0, 0, 0]
    assert q.tolist() == [0, 0, 1]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_worst_group_is_not_rounded_away(kernels, scale):
    """Two mean losses a part in 10^7 apart are not a tie; -0 and 0 are."""
    near = torch.tensor(scale * 3)
    sums = [near.item(), torch.nextafter(near, near * 2).item(), near.item()]
    stats, status = make_stats(sums, [7.0, 7.0, 7.0])
    kernels.group_update(stats, status, torch.full((3,), 1 / 3), "worst_group", 0.0, None)
    assert stats[3, :3].tolist() == [0, 1, 0]
    stats, status = make_stats([-0.0, 0.0, -scale], [1.0, 2.0, 3.0])
    kernels.group_update(stats, status, torch.full((3,), 1 / 3), "worst_group", 0.0, None)
    assert stats[3, :3].tolist() == [0.5, 0.5, 0]
