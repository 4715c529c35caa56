"""The objectives of a run, each against its formula written down again in plain PyTorch, NumPy or SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch.nn import functional

from robustdebias.config import OBJECTIVES, TrainConfig
from robustdebias.losses import Rows, build_loss
from robustdebias.modeling import HeadInputs

M, V, D, G, B = 40, 23, 8, 3, 7
NAMES = ["a", "b", "c"]
COUNTS = [4, 10, 400]


def make_loss(
    objective: str,
    *,
    names: Sequence[str] = NAMES,
    counts: Sequence[int] = COUNTS,
    linear: bool = True,
    **options: Any,
) -> Any:
    config = TrainConfig(**{"objective": objective, "step_size": 0.5, **options})
    return build_loss(config, names, counts, linear=linear)


def make_inputs(
    linear: bool = True,
    present: tuple[int, ...] = (0, 1, 2),
    seed: int = 0,
    rows: int = M,
    dtype: torch.dtype = torch.float32,
) -> HeadInputs:
    """Overlapping groups, some rows in none; only the groups in ``present`` have rows. Texts of uneven length, of
    which number 2 has no row; the rows of one text are in different groups."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, D if linear else V, generator=draw, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=draw, dtype=dtype).requires_grad_() if linear else None
    groups = torch.rand(rows, G, generator=draw) < 0.4
    groups[:, [g for g in range(G) if g not in present]] = False
    labels = torch.randint(0, V, (rows,), generator=draw)
    texts = torch.randint(0, B - 1, (rows,), generator=draw).sort().values
    texts[texts >= 2] += 1
    return HeadInputs(hidden=hidden, weight=weight, labels=labels, groups=groups, texts=texts)


def row_losses(inputs: HeadInputs) -> torch.Tensor:
    logits = inputs.hidden if inputs.weight is None else inputs.hidden @ inputs.weight.t()
    return functional.cross_entropy(logits, inputs.labels, reduction="none")


def check(loss_fn: Any, inputs: HeadInputs, row_weights: torch.Tensor) -> None:
    """The loss is sum_i r_i l_i with these constant ``row_weights``; so are its gradient and report."""
    expected = row_losses(inputs)
    (expected_gradient,) = torch.autograd.grad((row_weights * expected).sum(), inputs.hidden)
    loss = loss_fn(inputs)
    (gradient,) = torch.autograd.grad(loss, inputs.hidden)
    torch.testing.assert_close(loss, (row_weights * row_losses(inputs)).sum())
    torch.testing.assert_close(gradient, expected_gradient)
    report = loss_fn.report()
    assert report.overall.count == len(expected)
    assert report.overall.loss == pytest.approx(expected.mean().item(), rel=1e-5)
    assert report.ungrouped.count == (~inputs.groups.any(1)).sum()
    hits = (inputs.hidden if inputs.weight is None else inputs.hidden @ inputs.weight.t()).argmax(
        1
    ) == inputs.labels
    for g, name in enumerate(loss_fn.report().by_group):
        rows = inputs.groups[:, g]
        stats = report.by_group[name]
        assert stats.count == rows.sum()
        assert stats.loss == pytest.approx(expected[rows].mean().item(), rel=1e-5)
        assert stats.accuracy == pytest.approx(hits[rows].float().mean().item())
        assert stats.weight == pytest.approx(row_weights[rows].sum().item(), rel=1e-5, abs=1e-7)
    assert loss_fn.state_dict() == {}


# Means over tokens


@pytest.mark.parametrize("linear", [True, False])
def test_erm_is_the_mean_over_tokens_however_many_groups_they_are_in(linear: bool) -> None:
    inputs = make_inputs(linear)
    assert inputs.groups.sum(1).unique().tolist() == [0, 1, 2, 3]
    check(make_loss("erm", linear=linear), inputs, torch.full((M,), 1 / M))


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(("last", "ungrouped"), [("c", 0.0), ("other", 1 / 400)])
def test_reweighting_by_inverse_group_size(linear: bool, last: str, ungrouped: float) -> None:
    inputs = make_inputs(linear)
    inverse = [1 / 4, 1 / 10, 1 / 400]
    weights = [
        sum(inverse[g] for g in range(G) if member[g]) if any(member) else ungrouped
        for member in inputs.groups.tolist()
    ]
    row_weights = torch.tensor([weight / sum(weights) for weight in weights])
    assert row_weights.max() > 100 * row_weights[row_weights > 0].min()
    check(make_loss("reweight", names=["a", "b", last], linear=linear), inputs, row_weights)


def test_reweighting_groups_of_one_size_is_erm_where_everyone_is_in_one() -> None:
    inputs = make_inputs()
    one_each = functional.one_hot(inputs.texts % G, G).bool()
    inputs = inputs._replace(groups=one_each)
    check(make_loss("reweight", counts=[50, 50, 50]), inputs, torch.full((M,), 1 / M))


# Worst texts


def text_means(inputs: HeadInputs) -> tuple[list[int], np.ndarray]:
    """The texts that have rows, and their mean losses."""
    texts = inputs.texts.unique().tolist()
    losses = row_losses(inputs).detach().double()
    return texts, np.array([losses[inputs.texts == text].mean().item() for text in texts])


def spread_over_rows(inputs: HeadInputs, texts: list[int], p: np.ndarray) -> torch.Tensor:
    weights = torch.zeros(len(inputs.texts))
    for text, share in zip(texts, p, strict=True):
        rows = inputs.texts == text
        weights[rows] = float(share) / int(rows.sum())
    return weights


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("alpha", [0.1, 0.4, 0.75, 1.0])
def test_cvar_is_the_linear_programme_over_texts(linear: bool, alpha: float) -> None:
    inputs = make_inputs(linear)
    texts, means = text_means(inputs)
    assert len(texts) == B - 1
    count = len(texts)
    solved = linprog(-means, A_eq=np.ones((1, count)), b_eq=[1.0], bounds=(0, min(1, 1 / (alpha * count))))
    loss_fn = make_loss("cvar", alpha=alpha, linear=linear)
    assert loss_fn(inputs).item() == pytest.approx(-solved.fun, rel=1e-5)
    check(loss_fn, inputs, spread_over_rows(inputs, texts, solved.x))


def chi_square_weights(means: np.ndarray, radius: float) -> np.ndarray:
    """p proportional to max(m - eta, 0) with mean((T p - 1)^2) / 2 = radius, eta by bisection."""
    count = len(means)

    def weights(eta: float) -> np.ndarray:
        excess = np.maximum(means - eta, 0)
        return excess / excess.sum()

    low, high = means.min() - 1e6, np.nextafter(means.max(), -np.inf)
    if ((count * weights(high) - 1) ** 2).mean() / 2 <= radius:
        return weights(high)
    for _ in range(200):
        middle = (low + high) / 2
        far = ((count * weights(middle) - 1) ** 2).mean() / 2 > radius
        low, high = (low, middle) if far else (middle, high)
    return weights(low)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("radius", [0.0, 0.05, 0.5, 1.5, 100.0])
def test_chi_square_is_the_worst_mixture_of_texts_in_the_ball(linear: bool, radius: float) -> None:
    inputs = make_inputs(linear)
    texts, means = text_means(inputs)
    p = chi_square_weights(means, radius)
    check(make_loss("chi_square", radius=radius, linear=linear), inputs, spread_over_rows(inputs, texts, p))


def test_texts_count_alike_however_long_they_are() -> None:
    """At alpha 1 it is the mean over texts of their means, not the mean over tokens."""
    inputs = make_inputs()
    _, means = text_means(inputs)
    loss = make_loss("cvar", alpha=1.0)(inputs).item()
    assert loss == pytest.approx(means.mean(), rel=1e-5)
    assert loss != pytest.approx(row_losses(inputs).mean().item(), rel=1e-3)


def test_the_groups_of_a_text_do_not_move_the_worst_texts() -> None:
    inputs = make_inputs()
    without = inputs._replace(groups=torch.ones(M, 1, dtype=torch.bool))
    for objective in ("cvar", "chi_square"):
        alone = make_loss(objective, names=["all"], counts=[9])(without)
        torch.testing.assert_close(make_loss(objective)(inputs), alone, rtol=1e-6, atol=0)


# Any of them


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_empty_batch_is_zero(objective: str) -> None:
    inputs = make_inputs()
    empty = inputs._replace(
        hidden=inputs.hidden[:0], labels=inputs.labels[:0], groups=inputs.groups[:0], texts=inputs.texts[:0]
    )
    loss_fn = make_loss(objective)
    assert loss_fn(empty).item() == 0
    assert loss_fn.report().overall.count == 0
    assert loss_fn.report().by_group["a"].count == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_shows(objective: str, bad: float) -> None:
    """One row of one text: no objective may weight it away."""
    inputs = make_inputs(linear=False)
    row = int(inputs.groups.any(1).nonzero()[0])
    with torch.no_grad():
        inputs.hidden[row] = bad
    loss = make_loss(objective, linear=False)(inputs)
    assert not math.isfinite(loss.item())


@pytest.mark.parametrize("objective", ["erm", "cvar"])
def test_a_report_needs_a_call(objective: str) -> None:
    with pytest.raises(RuntimeError, match="needs a call"):
        make_loss(objective).report()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_group_without_examples_is_named(objective: str) -> None:
    with pytest.raises(ValueError, match="group_counts: no training example is in b, c"):
        make_loss(objective, counts=[3, 0, 0])


# Group DRO: absent groups


def published_update(q: list[float], losses: dict[int, float], step_size: float) -> list[float]:
    """Sagawa et al. 2020, Algorithm 1, in plain Python."""
    raised = [weight * math.exp(step_size * losses.get(g, 0.0)) for g, weight in enumerate(q)]
    return [weight / sum(raised) for weight in raised]


def group_means(inputs: HeadInputs) -> dict[int, float]:
    losses = row_losses(inputs)
    return {g: losses[inputs.groups[:, g]].mean().item() for g in range(G) if inputs.groups[:, g].any()}


@pytest.mark.parametrize("policy", ["hold", "decay"])
def test_weights_of_absent_groups(policy: str) -> None:
    loss_fn = make_loss("group_dro", absent_groups=policy)
    q = [1 / 3] * 3
    for step, present in enumerate([(0, 1), (0, 1), (2,), (0, 1, 2), (0,)]):
        inputs = make_inputs(present=present, seed=step)
        means = group_means(inputs)
        updated = published_update(q, means, 0.5)
        if policy == "hold":
            free = sum(q[g] for g in present)
            share = sum(updated[g] for g in present)
            updated = [updated[g] * free / share if g in present else q[g] for g in range(G)]
        q = updated
        expected_loss = sum(q[g] * means[g] for g in present)
        assert loss_fn(inputs).item() == pytest.approx(expected_loss, rel=1e-5)
        assert loss_fn.group_weights.tolist() == pytest.approx(q, rel=1e-5)
        report = loss_fn.report()
        assert list(loss_fn.weights_of([report]).values()) == loss_fn.group_weights.tolist()


def test_evaluation_mode_leaves_the_weights() -> None:
    loss_fn = make_loss("group_dro").eval()
    loss_fn(make_inputs())
    assert loss_fn.group_weights.tolist() == pytest.approx([1 / 3] * 3)


def test_weights_stay_finite_when_the_present_groups_have_none_left() -> None:
    loss_fn = make_loss("group_dro")
    loss_fn.group_weights.copy_(torch.tensor([0.0, 0.0, 1.0]))
    loss_fn(make_inputs(present=(0, 1)))
    assert loss_fn.group_weights.tolist() == [0.0, 0.0, 1.0]


def test_size_adjustment_uses_the_training_counts() -> None:
    loss_fn = make_loss("group_dro", adjustment=2.0)
    inputs = make_inputs()
    adjusted = {g: mean + 2 / math.sqrt(COUNTS[g]) for g, mean in group_means(inputs).items()}
    loss_fn(inputs)
    assert loss_fn.group_weights.tolist() == pytest.approx(
        published_update([1 / 3] * 3, adjusted, 0.5), rel=1e-5
    )


# A step over several batches


SIZES = [17, 40, 5, 23]
METHODS: dict[str, dict[str, Any]] = {
    "erm": {"objective": "erm"},
    "reweight": {"objective": "reweight"},
    "group_dro": {"objective": "group_dro"},
    "group_dro adjusted": {"objective": "group_dro", "adjustment": 2.0, "absent_groups": "decay"},
    "cvar": {"objective": "cvar", "alpha": 0.3},
    "chi_square": {"objective": "chi_square", "radius": 0.5},
}


def make_window(dtype: torch.dtype) -> tuple[list[HeadInputs], HeadInputs]:
    """Batches of different sizes, group 1 in the third of them alone; and all of them in one batch."""
    batches = [
        make_inputs(present=(0, 1, 2) if k == 2 else (0, 2), seed=k, rows=size, dtype=dtype)
        for k, size in enumerate(SIZES)
    ]
    weight = batches[0].weight
    batches = [batch._replace(weight=weight) for batch in batches]
    whole = HeadInputs(
        hidden=torch.cat([batch.hidden for batch in batches]),
        weight=weight,
        labels=torch.cat([batch.labels for batch in batches]),
        groups=torch.cat([batch.groups for batch in batches]),
        texts=torch.cat([batch.texts + k * B for k, batch in enumerate(batches)]),
    )
    return batches, whole


def gradients(losses: Any, batches: Sequence[HeadInputs]) -> tuple[float, list[torch.Tensor]]:
    """The sum of the losses, each differentiated before the next is made, and the gradients that they add up to."""
    leaves = [batches[0].weight, *(batch.hidden for batch in batches)]
    for leaf in leaves:
        leaf.grad = None
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    return total, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_window_is_one_large_batch(method: str, dtype: torch.dtype) -> None:
    """For two steps, so that q has a past. q is a float32, and so are the coefficients that come of it."""
    batches, whole = make_window(dtype)
    large, small = make_loss(**METHODS[method]), make_loss(**METHODS[method])
    rows = [Rows(batch.groups, batch.texts) for batch in batches]
    drawn: list[int] = []

    def apply(k: int, function: Callable[[HeadInputs], Any]) -> Any:
        drawn.append(k)
        return function(batches[k])

    if dtype == torch.float32:
        close = {"rtol": 2e-5, "atol": 1e-6}
    elif "dro" in method:
        close = {"rtol": 1e-6, "atol": 1e-9}
    else:
        close = {"rtol": 1e-12, "atol": 1e-14}
    for _ in range(2):
        expected, expected_gradients = gradients([large(whole)], batches)
        reports = []

        def losses(reports: list = reports) -> Any:
            for loss in small.window(rows, apply):
                reports.append(small.report())
                yield loss

        total, found = gradients(losses(), batches)
        assert total == pytest.approx(expected, rel=close["rtol"])
        for one, other in zip(found, expected_gradients, strict=True):
            torch.testing.assert_close(one, other, **close)
        assert [report.overall.count for report in reports] == SIZES
        weights = {name: stats.weight for name, stats in large.report().by_group.items()}
        assert small.weights_of(reports) == pytest.approx(weights, rel=1e-5, abs=1e-7)
        if "dro" in method:
            torch.testing.assert_close(small.group_weights, large.group_weights, rtol=1e-6, atol=1e-7)
    once = method in ("erm", "reweight")
    assert drawn == 2 * ([0, 1, 2, 3] if once else [0, 1, 2, 3, 0, 1, 2, 3])


@pytest.mark.parametrize("method", METHODS)
def test_batches_by_themselves_are_not(method: str) -> None:
    batches, whole = make_window(torch.float64)
    loss_fn = make_loss(**METHODS[method])
    total, _ = gradients((loss_fn(batch, share=0.25) for batch in batches), batches)
    alone = make_loss(**METHODS[method])  # q goes on from batch to batch
    assert total == pytest.approx(sum(alone(batch).item() for batch in batches) / 4, rel=1e-6)
    assert total != pytest.approx(make_loss(**METHODS[method])(whole).item(), rel=1e-3)


def test_streaming_updates_the_weights_in_every_batch() -> None:
    batches, _ = make_window(torch.float64)
    loss_fn = make_loss("group_dro", absent_groups="decay")
    q = [1 / 3] * 3
    for batch in batches:
        loss_fn(batch, share=0.25)
        q = published_update(q, group_means(batch), 0.5)
    assert loss_fn.group_weights.tolist() == pytest.approx(q, rel=1e-5)
