"""The parts of the loop, each against an independent statement of what it should be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from robustdebias.checkpoint import RunDirectory, write_json
from robustdebias.config import TrainConfig
from robustdebias.losses import build_loss
from robustdebias.modeling import HeadInputs
from robustdebias.sampling import BatchStream
from robustdebias.training import _schedule

M, V, D, G = 40, 23, 8, 3
NAMES = ["a", "b", "c"]
OPTIONS = {"step_size": 0.5, "adjustment": 0.0, "absent_groups": "hold"}


def make_inputs(linear: bool = True, present: tuple[int, ...] = (0, 1, 2), seed: int = 0) -> HeadInputs:
    """Overlapping groups, some rows in none; only the groups in ``present`` have rows."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, D if linear else V, generator=draw).requires_grad_()
    weight = torch.randn(V, D, generator=draw).requires_grad_() if linear else None
    groups = torch.rand(M, G, generator=draw) < 0.4
    groups[:, [g for g in range(G) if g not in present]] = False
    return HeadInputs(hidden, weight, torch.randint(0, V, (M,), generator=draw), groups, None)


def row_losses(inputs: HeadInputs) -> torch.Tensor:
    logits = inputs.hidden if inputs.weight is None else inputs.hidden @ inputs.weight.t()
    return functional.cross_entropy(logits, inputs.labels, reduction="none")


# ERM: the plain mean


@pytest.mark.parametrize("linear", [True, False])
def test_erm_is_the_mean_over_tokens_however_many_groups_they_are_in(linear: bool) -> None:
    inputs = make_inputs(linear)
    assert inputs.groups.sum(1).unique().tolist() == [0, 1, 2, 3]
    expected = row_losses(inputs)
    (expected_gradient,) = torch.autograd.grad(expected.mean(), inputs.hidden)
    loss_fn = build_loss("erm", NAMES, [1, 1, 1], linear=linear, **OPTIONS)
    loss = loss_fn(inputs)
    (gradient,) = torch.autograd.grad(loss, inputs.hidden)
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(gradient, expected_gradient)
    report = loss_fn.report()
    assert report.overall.count == M
    assert report.ungrouped.count == (~inputs.groups.any(1)).sum()
    for g, name in enumerate(NAMES):
        rows = inputs.groups[:, g]
        assert report.by_group[name].count == rows.sum()
        assert report.by_group[name].loss == pytest.approx(expected[rows].mean().item(), rel=1e-5)
        assert report.by_group[name].weight == pytest.approx(rows.float().mean().item())
    assert loss_fn.state_dict() == {}


def test_erm_of_an_empty_batch_is_zero() -> None:
    inputs = make_inputs()
    empty = HeadInputs(inputs.hidden[:0], inputs.weight, inputs.labels[:0], inputs.groups[:0], None)
    loss_fn = build_loss("erm", NAMES, [1, 1, 1], linear=True, **OPTIONS)
    assert loss_fn(empty).item() == 0
    assert loss_fn.report().by_group["a"].count == 0


# Group DRO: absent groups


def published_update(q: list[float], losses: dict[int, float], step_size: float) -> list[float]:
    """Sagawa et al. 2020, Algorithm 1, in plain Python."""
    raised = [weight * math.exp(step_size * losses.get(g, 0.0)) for g, weight in enumerate(q)]
    return [weight / sum(raised) for weight in raised]


@pytest.mark.parametrize("policy", ["hold", "decay"])
def test_weights_of_absent_groups(policy: str) -> None:
    loss_fn = build_loss("group_dro", NAMES, [1, 1, 1], linear=True, **{**OPTIONS, "absent_groups": policy})
    q = [1 / 3] * 3
    for step, present in enumerate([(0, 1), (0, 1), (2,), (0, 1, 2), (0,)]):
        inputs = make_inputs(present=present, seed=step)
        losses = row_losses(inputs)
        means = {g: losses[inputs.groups[:, g]].mean().item() for g in present}
        updated = published_update(q, means, 0.5)
        if policy == "hold":
            free = sum(q[g] for g in present)
            share = sum(updated[g] for g in present)
            updated = [updated[g] * free / share if g in present else q[g] for g in range(G)]
        q = updated
        expected_loss = sum(q[g] * means[g] for g in present)
        assert loss_fn(inputs).item() == pytest.approx(expected_loss, rel=1e-5)
        assert loss_fn.group_weights.tolist() == pytest.approx(q, rel=1e-5)
        weights = [stats.weight for stats in loss_fn.report().by_group.values()]
        assert weights == loss_fn.group_weights.tolist()


def test_evaluation_mode_leaves_the_weights() -> None:
    loss_fn = build_loss("group_dro", NAMES, [1, 1, 1], linear=True, **OPTIONS).eval()
    loss_fn(make_inputs())
    assert loss_fn.group_weights.tolist() == pytest.approx([1 / 3] * 3)


def test_weights_stay_finite_when_the_present_groups_have_none_left() -> None:
    loss_fn = build_loss("group_dro", NAMES, [1, 1, 1], linear=True, **OPTIONS)
    loss_fn.group_weights.copy_(torch.tensor([0.0, 0.0, 1.0]))
    loss_fn(make_inputs(present=(0, 1)))
    assert loss_fn.group_weights.tolist() == [0.0, 0.0, 1.0]


def test_size_adjustment_uses_the_training_counts() -> None:
    loss_fn = build_loss("group_dro", NAMES, [1, 100, 10000], linear=True, **{**OPTIONS, "adjustment": 2.0})
    inputs = make_inputs()
    losses = row_losses(inputs)
    adjusted = {
        g: losses[inputs.groups[:, g]].mean().item() + 2 / math.sqrt(count)
        for g, count in enumerate([1, 100, 10000])
    }
    loss_fn(inputs)
    assert loss_fn.group_weights.tolist() == pytest.approx(
        published_update([1 / 3] * 3, adjusted, 0.5), rel=1e-5
    )


def test_unknown_objective() -> None:
    with pytest.raises(ValueError, match="objective must be 'erm' or 'group_dro', got 'sgd'"):
        build_loss("sgd", NAMES, [1, 1, 1], linear=True, **OPTIONS)


# The order of the data


def make_stream(seed: int = 0, examples: int = 500, batch_size: int = 20) -> tuple[BatchStream, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    groups = torch.rand(examples, 4, generator=draw) < torch.tensor([0.5, 0.2, 0.06, 0.0])
    return BatchStream(groups, batch_size, seed), groups


def test_an_epoch_holds_every_example_once() -> None:
    stream, _ = make_stream(examples=503)
    for epoch in range(2):
        numbers = range(epoch * stream.batches_per_epoch, (epoch + 1) * stream.batches_per_epoch)
        batches = [stream.batch(number) for number in numbers]
        assert {batch[0] for batch in batches} == {epoch}
        assert sorted(index for _, indices in batches for index in indices) == list(range(503))


def test_every_batch_is_a_small_picture_of_the_corpus() -> None:
    stream, groups = make_stream()
    for number in range(stream.batches_per_epoch):
        members = groups[stream.batch(number)[1]].sum(0)
        expected = groups.float().mean(0) * 20
        # The rarest group is laid out exactly; others also come along as members of rarer ones.
        assert abs(members[2] - expected[2]) < 1
        assert abs(members[1] - expected[1]) < 4


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    batches = [make_stream()[0].batch(number)[1] for number in range(50)]  # a new object for each
    stream, _ = make_stream()
    assert [stream.batch(number)[1] for number in reversed(range(50))] == batches[::-1]
    assert batches[:25] != batches[25:]
    assert make_stream(seed=1)[0].batch(0)[1] != batches[0]


# Configuration


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("objective", "dro", "objective must be one of erm, group_dro, got 'dro'"),
        ("step_size", -0.1, "step_size must be >= 0, got -0.1"),
        ("step_size", math.nan, "step_size must be >= 0, got nan"),
        ("lr", 0, "lr must be > 0, got 0"),
        ("lr", math.inf, "lr must be > 0, got inf"),
        ("warmup", 1.5, "warmup must be >= 0 and <= 1, got 1.5"),
        ("mask_probability", 0.0, "mask_probability must be > 0 and <= 1, got 0.0"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("max_length", 2, "max_length must be at least 3, got 2"),
        ("max_steps", 0, "max_steps must be at least 1, got 0"),
        ("group_level", "word", "group_level must be one of sequence, token, got 'word'"),
        ("absent_groups", "drop", "absent_groups must be one of hold, decay, got 'drop'"),
    ],
)
def test_bad_configuration_names_the_field(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("batch_size", 2.5), ("lr", "1e-4"), ("seed", True)])
def test_configuration_of_another_type(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{field} must be"):
        TrainConfig(**{field: value})


def test_length_and_step_size_that_depend_on_the_data() -> None:
    config = TrainConfig(epochs=2.5, accumulate=4).resolved(batches_per_epoch=41)
    assert config.max_steps == 26  # 102.5 batches, 4 a step
    assert config.step_size == 5 / 26
    assert TrainConfig(max_steps=7, epochs=100, step_size=0.01).resolved(41).max_steps == 7
    assert TrainConfig(max_steps=7, step_size=0.0).resolved(41).step_size == 0.0


def test_the_rate_rises_then_falls_to_zero() -> None:
    shares = [_schedule(step, 20, 0.25) for step in range(1, 21)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[5:] == pytest.approx([1 - k / 15 for k in range(15)])
    assert _schedule(1, 1, 0.0) == 1.0


# A run's directory


def test_an_occupied_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    run = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match="is not empty"):
        run.claim({}, resume=False, overwrite=False)
    with pytest.raises(ValueError, match="holds no run, so it is not overwritten"):
        run.claim({}, resume=False, overwrite=True)
    with pytest.raises(ValueError, match="nothing to resume"):
        run.claim({}, resume=True, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        RunDirectory(tmp_path / "out").claim({}, resume=False, overwrite=False)


def test_resuming_with_other_settings_names_each_difference(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.claim({"train": {"lr": 0.1, "seed": 0}, "model": "x"}, resume=False, overwrite=False)
    with pytest.raises(ValueError, match=r"model was 'x', now 'y'; train\.lr was 0\.1, now 0\.2$"):
        run.claim({"train": {"lr": 0.2, "seed": 0}, "model": "y"}, resume=True, overwrite=False)
    run.claim({"train": {"lr": 0.1, "seed": 0}, "model": "x"}, resume=True, overwrite=False)


def test_overwriting_removes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.claim({"seed": 0}, resume=False, overwrite=False)
    run.append_history({"step": 1})
    run.save_checkpoint({"step": 1})
    write_json(run.result, {})
    (tmp_path / "notes.txt").write_text("mine")
    run.claim({"seed": 1}, resume=False, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]
    assert json.loads(run.config.read_text()) == {"seed": 1}


def test_history_is_rewound_to_the_checkpoint_past_a_torn_line(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in range(1, 6):
        run.append_history({"step": step})
    with run.history.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [record["step"] for record in run.rewind_history(3)] == [1, 2, 3]
    run.append_history({"step": 4})
    assert [record["step"] for record in run.read_history()] == [1, 2, 3, 4]


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    torch.save({"step": Path("x")}, run.checkpoint)  # an object, not a plain tensor
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        run.load_checkpoint()


def test_json_without_a_word_for_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": math.nan})
    assert list(tmp_path.iterdir()) == []
