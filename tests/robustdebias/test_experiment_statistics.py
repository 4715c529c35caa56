"""Means, differences and verdicts of an experiment: by hand, and by how often an interval holds the truth."""

from __future__ import annotations

import numpy as np
import pytest

from robustdebias.experiments.statistics import NO_CHANGE, Measured, compare, mean_scores

R = 2000


def model(
    value: float, *, spread: float = 0.0, metric: str = "mlm.overall", draw: int = 0, items: str = "x"
) -> Measured:
    noise = np.random.default_rng(draw).standard_normal(R)
    return Measured({metric: value}, {metric: value + spread * noise}, {metric.partition(".")[0]: items})


def test_the_two_spreads_are_joined():
    """Seeds 1.0, 1.2, 1.4: half-width t(2) * 0.2 / sqrt(3) = 4.3027 * 0.11547; items: the quantiles of the draws."""
    (score,) = mean_scores("g", "m", [model(value, spread=0.1) for value in (1.0, 1.2, 1.4)])
    low, high = np.percentile(0.1 * np.random.default_rng(0).standard_normal(R), [2.5, 97.5])
    by_seed = 4.302652729911275 * 0.2 / np.sqrt(3)
    assert score.value == pytest.approx(1.2)
    assert score.low == pytest.approx(1.2 - np.hypot(low, by_seed))
    assert score.high == pytest.approx(1.2 + np.hypot(high, by_seed))
    assert score.seeds == 3


def test_one_seed_has_the_items_alone():
    (score,) = mean_scores("g", "m", [model(3.0, spread=0.1)])
    low, high = np.percentile(0.1 * np.random.default_rng(0).standard_normal(R), [2.5, 97.5])
    assert (score.low, score.high) == (pytest.approx(3 + low), pytest.approx(3 + high))


def test_differences_are_paired():
    """Both models see the same items: what they share in their draws is no uncertainty of the difference."""
    base = [model(4.0 + seed, spread=1.0, draw=seed) for seed in range(3)]
    other = [model(3.5 + seed, spread=1.0, draw=seed) for seed in range(3)]
    (difference,) = compare("g", "m", other, "erm", base)
    assert difference.mean == pytest.approx(-0.5)
    assert (difference.low, difference.high) == (pytest.approx(-0.5), pytest.approx(-0.5))
    assert difference.per_seed == pytest.approx([-0.5] * 3)
    assert difference.verdict == "better"


@pytest.mark.parametrize(
    ("metric", "before", "after", "verdict"),
    [
        ("mlm.overall", 4.0, 3.9, "better"),
        ("mlm.overall", 4.0, 3.99, "slightly better"),  # less than a hundredth of the loss
        ("mlm.overall", 4.0, 4.1, "worse"),
        ("stereoset.overall.lms", 80.0, 82.0, "better"),
        ("stereoset.overall.lms", 80.0, 79.5, "slightly worse"),
        ("stereoset.overall.ss", 60.0, 55.0, "better"),
        ("stereoset.overall.ss", 45.0, 40.0, "worse"),
        ("stereoset.overall.ss", 45.0, 53.0, "better"),  # five from the ideal, then three
        ("stereoset.overall.ss", 55.0, 45.0, NO_CHANGE),  # as far from it on the other side
    ],
)
def test_verdicts_follow_the_ideal(metric, before, after, verdict):
    runs = [model(after, metric=metric), model(after, metric=metric)]
    base = [model(before, metric=metric), model(before, metric=metric)]
    (difference,) = compare("g", "m", runs, "erm", base)
    assert difference.verdict == verdict


def test_what_the_seeds_do_not_agree_on_is_no_change():
    runs = [model(4.0 + step, spread=0.001) for step in (-0.2, 0.1, -0.15)]
    (difference,) = compare("g", "m", runs, "start", [model(4.0, spread=0.001)])
    assert difference.verdict == NO_CHANGE
    assert difference.low < 0 < difference.high


def test_other_items_are_not_compared_and_few_items_not_judged():
    assert compare("g", "m", [model(1.0)], "erm", [model(1.0, items="y")]) == []
    bare = Measured({"mlm.overall": 1.0}, {}, {"mlm": "x"})
    (difference,) = compare("g", "m", [bare], "erm", [model(2.0)])
    assert (difference.mean, difference.low, difference.verdict) == (-1.0, None, "no interval")
    (score,) = mean_scores("g", "m", [bare])
    assert (score.low, score.high) == (None, None)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_hold_the_truth(seeds):
    """400 simulated comparisons with noise of items and of seeds: 95% or more of the intervals hold the true difference."""
    draw, truth, items, held = np.random.default_rng(seeds), -0.3, 200, 0
    for _ in range(400):
        effect = draw.normal(truth, 1.0, items)  # of each item, the same for every seed
        chosen = draw.multinomial(items, np.full(items, 1 / items), size=500)
        by_seed = draw.normal(0, 0.08, seeds)
        runs = [
            Measured(
                {"mlm.overall": 4 + (effect + shift).mean()},
                {"mlm.overall": 4 + chosen @ (effect + shift) / items},
                {},
            )
            for shift in by_seed
        ]
        base = Measured({"mlm.overall": 4.0}, {"mlm.overall": np.full(500, 4.0)}, {})
        (difference,) = compare("g", "m", runs, "start", [base])
        held += difference.low <= truth <= difference.high
    assert held >= 0.95 * 400 - 2 * np.sqrt(400 * 0.95 * 0.05)  # two standard errors of the count
