"""What a group's mean loss is the mean of, tokens or sequences; and objectives that weight these themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import rd_kernels as rd
from tests.float64_oracle import Oracle, assert_agrees

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.grid]

B, T, V, D, G = 6, 5, 9, 4, 3
LENGTHS = [5, 1, 0, 3, 2, 4]  # labelled tokens of the sequences
OBJECTIVES = [
    rd.ERM(),
    rd.Tilted(0.7),
    rd.KL(0.2, "groups"),
    rd.GroupDRO(0.5, loss_ema=0.3),
    rd.GroupDRO(0.5, 2.0, [4, 7, 2], "hold"),
    rd.DoReMi(),
]
OVER_ROWS = [
    rd.CVaR(0.3, over="rows"),
    rd.ChiSquare(0.3, over="rows"),
    rd.KL(0.3, over="rows"),
    rd.Tilted(-1.5, over="rows"),
]


def batch():
    """Logits, labels, groups of the sequences, reference losses."""
    logits, labels = 2 * torch.randn(B, T, V), torch.full((B, T), -100)
    for sequence, length in enumerate(LENGTHS):
        labels[sequence, torch.randperm(T)[:length]] = torch.randint(V, (length,))
    return logits, labels, torch.tensor([0, 1, 1, 0, -1, 1]), torch.rand(B, T) * 3


def losses(logits, labels):
    """[B, T] float64, 0 without a label."""
    return F.cross_entropy(logits.double().movedim(-1, 1), labels, reduction="none")


def sequence_means(logits, labels):
    return [
        row.sum().item() / max(int((y != -100).sum()), 1)
        for row, y in zip(losses(logits, labels), labels, strict=True)
    ]


def grouped(form, ids):
    if form == "ids":
        return ids
    if form == "mask":  # the first sequence in two groups
        return (ids[:, None] == torch.arange(G)) | ((torch.arange(B) == 0)[:, None] & (torch.arange(G) == 2))
    lists = torch.stack([ids, torch.full_like(ids, -1), ids], dim=1)  # named twice, counted once
    lists[0, 1] = 2
    return lists


def test_a_groups_loss_is_the_mean_of_its_sequences_means(backend):
    logits, labels, groups, _ = batch()
    loss_fn = rd.GroupDROLoss(G, rd.GroupDRO(0.5), backend=backend, level="sequence")
    loss = loss_fn(logits, labels, groups)
    means = sequence_means(logits, labels)
    by_group = [(means[0] + means[3]) / 2, (means[1] + means[5]) / 2]  # the third sequence has no label
    report = loss_fn.report()
    assert [stats.count for stats in report.by_group.values()] == [2, 2, 0]
    assert (report.ungrouped.count, report.overall.count) == (1, 5)
    assert [report.by_group[name].loss for name in "01"] == pytest.approx(by_group, rel=1e-6)
    assert report.overall.loss == pytest.approx(sum(means) / 5, rel=1e-6)

    # Sagawa et al. 2020, Algorithm 1, on these means.
    powers = torch.tensor([*by_group, 0.0], dtype=torch.float64).mul(0.5).exp()
    q = powers / powers.sum()
    assert loss_fn.group_weights.tolist() == pytest.approx(q.tolist(), rel=1e-6)
    assert loss.item() == pytest.approx(float(q[0] * by_group[0] + q[1] * by_group[1]), rel=1e-6)


def test_the_levels_differ(backend):
    logits, labels, groups, _ = batch()
    by_level = {
        level: rd.GroupDROLoss(G, rd.ERM(), backend=backend, level=level) for level in ("token", "sequence")
    }
    loss = {level: loss_fn(logits, labels, groups).item() for level, loss_fn in by_level.items()}
    labelled, rows = (labels != -100) & (groups >= 0)[:, None], losses(logits, labels)
    assert loss["token"] == pytest.approx(rows[labelled].mean().item(), rel=1e-6)
    assert abs(loss["sequence"] - loss["token"]) > 0.01
    assert by_level["token"].report().overall.count == sum(LENGTHS)


def test_a_rows_gradient_is_its_sequences_weight_shared(backend):
    logits, labels, groups, _ = batch()
    logits.requires_grad_()
    loss_fn = rd.GroupDROLoss(G, rd.GroupDRO(0.5), backend=backend, level="sequence")
    (gradient,) = torch.autograd.grad(loss_fn(logits, labels, groups), logits)
    q = loss_fn.group_weights.double().tolist()
    unweighted = logits.detach().double().softmax(-1) - F.one_hot(labels.clamp(min=0), V)
    for sequence, (group, length) in enumerate(zip(groups.tolist(), LENGTHS, strict=True)):
        for token in range(T):
            counts = group >= 0 and labels[sequence, token] != -100
            weight = q[group] / 2 / length if counts else 0.0  # two sequences in either group
            torch.testing.assert_close(
                gradient[sequence, token].double(), weight * unweighted[sequence, token], atol=1e-7, rtol=1e-5
            )


@pytest.mark.parametrize(("op", "forms"), [("logits", ["ids", "mask"]), ("linear", ["lists", "ids"])])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_against_the_oracle(backend, objective, op, forms):
    make = rd.GroupDROLoss if op == "logits" else rd.LinearGroupDROLoss
    loss_fn = make(G, objective, backend=backend, level="sequence", entropy=True, top_k=2)
    oracle = Oracle(objective, G, "sequence", top_k=2)
    for form in forms:  # and the state goes on
        logits, labels, ids, reference = batch()
        inputs = [logits] if op == "logits" else [torch.randn(B, T, D), torch.randn(V, D), torch.randn(V)]
        if not objective.needs_reference:
            reference = None
        assert_agrees(loss_fn, oracle, inputs, labels, grouped(form, ids), reference)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("op", "form"), [("logits", "mask"), ("linear", "ids"), ("linear", "none")])
@pytest.mark.parametrize("objective", OVER_ROWS, ids=str)
def test_objectives_over_rows(backend, objective, op, form, level):
    """The rows are tokens, or sequences; those in no group do not count, and the groups are for the report only."""
    logits, labels, ids, _ = batch()
    groups, num_groups = (None, 1) if form == "none" else (grouped(form, ids), G)
    make, inputs = rd.GroupDROLoss, [logits]
    if op == "linear":
        make, inputs = rd.LinearGroupDROLoss, [torch.randn(B, T, D), torch.randn(V, D)]
    loss_fn = make(num_groups, objective, backend=backend, level=level)
    assert_agrees(loss_fn, Oracle(objective, num_groups, level), inputs, labels, groups)
    assert loss_fn.report().overall.weight == pytest.approx(1, rel=1e-6)
    assert loss_fn.report().ungrouped.weight == 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_cvar_over_rows_is_the_mean_of_the_worst(backend, level):
    """Rockafellar and Uryasev 2000; sorted here, not in the oracle."""
    logits, labels, _, _ = batch()
    loss = rd.GroupDROLoss(1, rd.CVaR(0.2, over="rows"), backend=backend, level=level)(logits, labels)
    rows = (
        losses(logits, labels)[labels != -100].tolist()
        if level == "token"
        else sequence_means(logits, labels)
    )
    worst = sorted(rows, reverse=True)[: 3 if level == "token" else 1]  # a fifth of 15 tokens, of 5 sequences
    assert loss.item() == pytest.approx(sum(worst) / len(worst), rel=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("sequences", "length", "form"), [(0, T, "ids"), (B, 0, "mask"), (0, T, "mask"), (0, 0, "lists")]
)
@pytest.mark.parametrize(
    "objective",
    [rd.GroupDRO(0.5, loss_ema=0.3), rd.DoReMi(), rd.WorstGroup(), rd.KL(0.2), rd.CVaR(0.3, over="rows")],
    ids=str,
)
def test_nothing_to_count(backend, objective, sequences, length, form, level):
    """No sequences, or none with a token: loss 0, gradients of the right shapes, the state as it was."""
    labels = torch.zeros(sequences, length, dtype=torch.int64)
    reference = torch.zeros(sequences, length) if objective.needs_reference else None
    hidden, weight = torch.randn(sequences, length, D).requires_grad_(), torch.randn(V, D).requires_grad_()
    groups = grouped(form, torch.zeros(B, dtype=torch.int64))[:sequences]
    if level == "token" and form == "lists":
        groups = groups[:, None]
    linear = rd.LinearGroupDROLoss(G, objective, backend=backend, level=level)
    loss = linear(hidden, weight, labels, groups, None, reference)
    of_hidden, of_weight = torch.autograd.grad(loss, (hidden, weight))
    logits = torch.randn(sequences, length, V).requires_grad_()
    plain = rd.GroupDROLoss(G, objective, backend=backend, level=level)
    (of_logits,) = torch.autograd.grad(plain(logits, labels, groups, reference), logits)
    assert loss.item() == 0
    assert (of_hidden.shape, of_logits.shape) == (hidden.shape, logits.shape)
    assert torch.equal(of_weight, torch.zeros_like(weight))
    for loss_fn in (linear, plain):
        assert loss_fn.group_weights.tolist() == [pytest.approx(1 / G)] * G
        torch.testing.assert_close(loss_fn.memory, objective.initial_memory(G), equal_nan=True)
        assert loss_fn.report().overall.count == 0


def test_more_axes_than_two(backend):
    """[B, T1, T2]: a sequence is all that has the same first index."""
    logits, labels, groups, _ = batch()
    loss_fn = rd.GroupDROLoss(G, backend=backend, level="sequence")
    cubes = [each.reshape(B, T, 1, *each.shape[2:]) for each in (logits, labels)]
    loss = loss_fn(*cubes, groups)
    torch.testing.assert_close(
        loss, rd.GroupDROLoss(G, backend=backend, level="sequence")(logits, labels, groups)
    )


def test_errors():
    logits, labels, groups, _ = batch()
    loss_fn = rd.GroupDROLoss(G, level="sequence")
    with pytest.raises(ValueError, match=r"level 'sequence' needs labels \[B, T\], got \[30\]"):
        loss_fn(logits.reshape(-1, V), labels.reshape(-1), groups)
    with pytest.raises(ValueError, match=r"groups, ids, must have shape \[6\] or \[6, K\], got \[5\]"):
        loss_fn(logits, labels, groups[:-1])
    with pytest.raises(ValueError, match=r"groups, a bool mask, must have shape \[6, 3\], got \[6, 5, 3\]"):
        loss_fn(logits, labels, torch.zeros(B, T, G, dtype=torch.bool))
    with pytest.raises(ValueError, match="groups may only be left out for one group, not for 3"):
        loss_fn(logits, labels)
    with pytest.raises(ValueError, match="level must be 'token' or 'sequence', got 'word'"):
        rd.GroupDROLoss(G, level="word")
    with pytest.raises(ValueError, match="groups: 1 labelled rows have an id outside"):
        loss_fn(logits, labels, torch.tensor([0, 1, 1, 0, 3, 1]))
    loss_fn(logits, labels, torch.tensor([0, 1, 77, 0, -1, 1]))  # a sequence without a label: nobody looks
    labels[0, 0] = V
    with pytest.raises(ValueError, match="labels: 1 of them are neither ignore_index nor in"):
        loss_fn(logits, labels, groups)


def test_ids_of_the_tokens_are_lists_at_the_sequence_level(backend):
    """[B, T] ids: a sequence is in all groups that its tokens name, each once, so equal ones are the sequence's id."""
    logits, labels, groups, _ = batch()
    first, second = (rd.GroupDROLoss(G, backend=backend, level="sequence") for _ in range(2))
    loss = first(logits, labels, groups[:, None].expand(B, T))
    torch.testing.assert_close(loss, second(logits, labels, groups), rtol=0, atol=0)
