"""RobustDebiasTrainer against the plain Trainer, against the published rule, and against itself on larger batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trainer import (
    COUNTS,
    NAMES,
    arguments,
    assert_same,
    make_trainer,
    parameters,
    published_step,
    quiet_model,
    row_losses,
    texts,
)
from torch import nn
from transformers import Trainer, TrainerCallback

from robustdebias.collate import MLMCollator
from robustdebias.config import OBJECTIVES
from robustdebias.in_forward import in_forward
from robustdebias.trainer import GROUP_WEIGHTS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make_model(make_tiny_model: Callable, tiny_tokenizer: Any) -> Callable[..., Any]:
    return partial(quiet_model, make_tiny_model, len(tiny_tokenizer))


# The loss


@pytest.mark.parametrize("adapted", [True, False])
def test_erm_is_the_plain_trainer(
    adapted: bool, make_model: Callable, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters after some steps and the logged losses, for a model with and for one without an adapter."""
    if not adapted:
        monkeypatch.setattr("robustdebias.modeling.adapter_of", lambda model: None)
    model, plain = make_model(), make_model()
    collator = MLMCollator(tiny_tokenizer, NAMES, mask_probability=0.3)
    train = texts(24, len(tiny_tokenizer))
    log = {"logging_strategy": "steps", "logging_steps": 1}
    trainer = make_trainer(model, tiny_tokenizer, tmp_path / "one", "erm", train=train, **log)
    with pytest.warns(UserWarning, match="logits") if not adapted else nullcontext():
        trainer.train()
    reference = Trainer(
        plain,
        arguments(tmp_path / "other", **log),
        lambda batch: {k: v for k, v in collator(batch).items() if k not in ("groups", "positions")},
        train,
    )
    reference.train()
    before = parameters(make_model())
    assert any(not torch.equal(before[name], value) for name, value in parameters(model).items())
    assert_same(parameters(model), parameters(plain), rtol=1e-9, atol=1e-12)
    losses = [
        [record["loss"] for record in each.state.log_history if "loss" in record]
        for each in (trainer, reference)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(losses[0]) == 6


@pytest.mark.parametrize(("accumulate", "older"), [(1, False), (3, False), (3, True)])
def test_group_dro_is_the_published_rule(
    accumulate: int, older: bool, make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """SGD on the loss of the joined batch by the model's own forward, q from its group means; two steps."""
    model, plain = make_model(), make_model()
    if older:  # a Trainer that only asks whether the model normalises its loss, and a model that does not
        model.accepts_loss_kwargs = False
    train = texts(24, len(tiny_tokenizer))
    trainer = make_trainer(
        model, tiny_tokenizer, tmp_path, train=train, max_steps=2, gradient_accumulation_steps=accumulate
    )
    if older:
        trainer.loss_is_scaled_for_ga = None
    trainer.train()
    collator = MLMCollator(tiny_tokenizer, NAMES, mask_probability=0.3)
    q = torch.full((3,), 1 / 3, dtype=torch.float64)
    size = 4 * accumulate
    for step in range(2):
        loss, q = published_step(q, *row_losses(plain, collator(train[step * size : (step + 1) * size])))
        for parameter, gradient in zip(
            plain.parameters(), torch.autograd.grad(loss, list(plain.parameters())), strict=True
        ):
            parameter.data -= 0.1 * gradient
    torch.testing.assert_close(trainer.loss_fn.group_weights, q.float(), rtol=1e-6, atol=0)
    assert_same(
        parameters(model), parameters(plain), rtol=1e-5, atol=1e-7
    )  # the coefficients come of a float32 q


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_accumulation_is_one_large_batch(
    objective: str, make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Of 4 x 4 texts, and at the end of an epoch of 44 of 3 x 4; over an epoch and a step."""
    train = texts(44, len(tiny_tokenizer))
    results = []
    for size, accumulate in ((4, 4), (16, 1)):
        model = make_model()
        trainer = make_trainer(
            model, tiny_tokenizer, tmp_path, objective, train=train, max_steps=4, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate, logging_strategy="steps", logging_steps=1,
        )  # fmt: skip
        trainer.train()
        results.append((trainer, parameters(model)))
    (small, found), (large, expected) = results
    assert_same(found, expected, rtol=1e-5, atol=1e-7)
    records = [[record for record in each.state.log_history if "loss" in record] for each in (small, large)]
    assert len(records[0]) == 4
    for one, other in zip(*records, strict=True):
        for key in (one.keys() | other.keys()) - {"epoch"}:  # Trainer counts batches
            assert one[key] == pytest.approx(other[key], rel=1e-4), key
    if objective == "group_dro":
        torch.testing.assert_close(
            small.loss_fn.group_weights, large.loss_fn.group_weights, rtol=1e-6, atol=1e-8
        )


def test_streaming_updates_the_weights_in_every_batch_and_takes_the_mean(
    make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, plain = make_model(), make_model()
    train = texts(24, len(tiny_tokenizer))
    trainer = make_trainer(
        model, tiny_tokenizer, tmp_path, train=train, max_steps=1, gradient_accumulation_steps=3,
        config_changes={"accumulation": "streaming"},
    )  # fmt: skip
    trainer.train()
    collator = MLMCollator(tiny_tokenizer, NAMES, mask_probability=0.3)
    q, total = torch.full((3,), 1 / 3, dtype=torch.float64), 0
    for k in range(3):
        loss, q = published_step(q, *row_losses(plain, collator(train[4 * k : 4 * k + 4])))
        total = total + loss / 3
    gradients = torch.autograd.grad(total, list(plain.parameters()))
    expected = {
        name: (parameter - 0.1 * gradient).detach()
        for (name, parameter), gradient in zip(plain.named_parameters(), gradients, strict=True)
    }
    torch.testing.assert_close(trainer.loss_fn.group_weights, q.float(), rtol=1e-6, atol=0)
    assert_same(parameters(model), expected, rtol=1e-5, atol=1e-7)


def test_both_passes_over_a_batch_draw_the_same_dropout(
    make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model(torch.float32, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    dropped: list[torch.Tensor] = []
    model.bert.embeddings.dropout.register_forward_hook(
        lambda module, inputs, output: dropped.append(output == 0)
    )
    trainer = make_trainer(model, tiny_tokenizer, tmp_path, max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    assert len(dropped) == 8
    for first, second, again_first, again_second in (dropped[:4], dropped[4:]):
        assert torch.equal(first, again_first)
        assert torch.equal(second, again_second)
        shape = tuple(slice(min(sizes)) for sizes in zip(first.shape, second.shape, strict=True))
        assert not torch.equal(first[shape], second[shape])
    assert dropped[0].float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_step_that_is_left_before_its_end_leaves_nothing_open(
    make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        asked = False

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop, self.asked = not self.asked, True

    held_out = texts(5, len(tiny_tokenizer), seed=1)
    trainer = make_trainer(
        make_model(), tiny_tokenizer, tmp_path, max_steps=3, gradient_accumulation_steps=2,
        options={"callbacks": [Stop()], "eval_dataset": held_out},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 0
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.evaluate()["eval_loss"] > 0


def test_bf16_reaches_the_parts_of_the_model_that_are_called(
    make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model(torch.float32)
    seen = []
    trainer = make_trainer(
        model, tiny_tokenizer, tmp_path, bf16=True, gradient_accumulation_steps=2, max_steps=3
    )
    trainer.loss_fn.register_forward_pre_hook(lambda module, args: seen.append(args[0].hidden.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    full = make_model(torch.float32)
    make_trainer(full, tiny_tokenizer, tmp_path, gradient_accumulation_steps=2, max_steps=3).train()
    assert_same(parameters(model), parameters(full), rtol=0.1, atol=0.02)


def test_the_step_size_by_default_is_five_over_the_steps(
    make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(
        make_model(), tiny_tokenizer, tmp_path, config_changes={"step_size": None}, max_steps=8
    )
    trainer.train()
    assert trainer.loss_fn.op.objective.step_size == 5 / 8


def test_each_epoch_has_masks_of_its_own_and_evaluation_those_of_epoch_0(
    make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    epochs: list[tuple[int, int]] = []

    class Recording(MLMCollator):
        def __call__(self, batch: Any, epoch: int = 0) -> Any:
            epochs.append((len(batch), epoch))
            return super().__call__(batch, epoch)

    train = texts(24, len(tiny_tokenizer))
    trainer = make_trainer(
        make_model(), tiny_tokenizer, tmp_path, train=train, max_steps=-1, num_train_epochs=2, eval_strategy="epoch",
        per_device_train_batch_size=12, options={
            "data_collator": Recording(tiny_tokenizer, NAMES), "eval_dataset": train[:5],
        },
    )  # fmt: skip
    trainer.train()
    assert epochs == [(12, 0), (12, 0), (4, 0), (1, 0), (12, 1), (12, 1), (4, 0), (1, 0)]


def test_a_function_runs_in_place_of_a_wrapped_forward_and_may_call_it() -> None:
    class Wrapper(nn.Module):
        calls = 0

        def __init__(self, module: nn.Module):
            super().__init__()
            self.module = module

        def forward(self, *inputs: Any) -> Any:
            self.calls += 1
            return self.module(*inputs)

    inner = nn.Linear(2, 2)
    wrapped = Wrapper(inner)
    x = torch.ones(2)
    assert torch.equal(in_forward(wrapped, inner, lambda x: 2 * inner(x), x), 2 * inner(x))
    assert wrapped.calls == 1
    assert "forward" not in inner.__dict__
    with pytest.raises(ZeroDivisionError):
        in_forward(wrapped, inner, lambda x: 1 // 0, x)
    assert torch.equal(wrapped(x), inner(x))
    own = inner.forward = lambda x: x + 1  # as accelerate does for autocast
    assert torch.equal(in_forward(wrapped, inner, lambda x: 2 * inner(x), x), 2 * (x + 1))
    assert inner.forward is own


def test_positions_may_be_missing(make_model: Callable, tiny_tokenizer: Any, tmp_path: Path) -> None:
    collator = MLMCollator(tiny_tokenizer, NAMES, mask_probability=0.3)

    def without(texts: Any) -> Any:
        return {key: value for key, value in collator(texts).items() if key != "positions"}

    models = [make_model(), make_model()]
    for model, options in zip(models, ({}, {"data_collator": without}), strict=True):
        make_trainer(model, tiny_tokenizer, tmp_path, gradient_accumulation_steps=2, options=options).train()
    # The second collator gives no epochs: two epochs of 3 steps have the same masks, the first epoch is the same.
    first = [make_model(), make_model()]
    for model, options in zip(first, ({}, {"data_collator": without}), strict=True):
        make_trainer(
            model, tiny_tokenizer, tmp_path, gradient_accumulation_steps=2, max_steps=3, options=options
        ).train()
    assert_same(parameters(first[0]), parameters(first[1]), rtol=0, atol=0)
    assert not torch.equal(
        parameters(models[0])["cls.predictions.bias"], parameters(models[1])["cls.predictions.bias"]
    )


def test_the_loss_of_a_batch_outside_of_training(
    make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model().train()
    trainer = make_trainer(model, tiny_tokenizer, tmp_path, options={"group_counts": None})
    batch = MLMCollator(tiny_tokenizer, NAMES)(texts(6, len(tiny_tokenizer)))
    expected, q = published_step(torch.full((3,), 1 / 3, dtype=torch.float64), *row_losses(model, batch))
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(trainer.loss_fn.group_weights, q.float())
    assert outputs["logits"].shape == (*batch["labels"].shape, len(tiny_tokenizer))
    assert COUNTS != [1, 1, 1]


# Evaluation


def test_evaluation_is_the_mean_over_tokens_by_group_and_leaves_the_weights(
    make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    held_out = texts(11, len(tiny_tokenizer), seed=1)
    model = make_model()
    seen: list[Any] = []
    trainer = make_trainer(
        model, tiny_tokenizer, tmp_path, per_device_eval_batch_size=3, options={"eval_dataset": held_out}
    )
    trainer.train()
    q = trainer.loss_fn.group_weights.clone()
    metrics = trainer.evaluate()
    collator = MLMCollator(tiny_tokenizer, NAMES, mask_probability=0.3)
    with torch.no_grad():
        losses, groups = row_losses(model.eval(), collator(held_out))
    means = {f"eval_loss_{name}": losses[groups[:, g]].mean().item() for g, name in enumerate(NAMES)}
    assert metrics["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert {key: metrics[key] for key in means} == pytest.approx(means, rel=1e-6)
    assert metrics["eval_worst_group_loss"] == pytest.approx(max(means.values()), rel=1e-6)
    assert torch.equal(trainer.loss_fn.group_weights, q)

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"texts": len(prediction.label_ids)}

    trainer.compute_metrics = compute_metrics  # now the logits are wanted too
    with_logits = trainer.evaluate()
    for key in ("eval_loss", "eval_worst_group_loss", *means):
        assert with_logits[key] == pytest.approx(metrics[key], rel=1e-9)
    assert with_logits["eval_texts"] == 11
    assert seen[0].predictions.shape == (*seen[0].label_ids.shape, len(tiny_tokenizer))
    output = trainer.predict(held_out)
    assert output.metrics["test_worst_group_loss"] == pytest.approx(metrics["eval_worst_group_loss"])
    assert torch.equal(trainer.loss_fn.group_weights, q)


def test_a_group_that_is_not_held_out_has_no_loss(
    make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    held_out = [text for text in texts(24, len(tiny_tokenizer)) if "b" not in text.groups]
    trainer = make_trainer(make_model(), tiny_tokenizer, tmp_path, options={"eval_dataset": held_out})
    assert {key for key in trainer.evaluate() if "loss" in key} == {
        "eval_loss", "eval_loss_a", "eval_loss_c", "eval_worst_group_loss",
    }  # fmt: skip


# Checkpoints


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """With dropout, AdamW, a schedule, accumulation; the checkpoint lies inside the second epoch."""
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    settings = {
        "gradient_accumulation_steps": 2, "max_steps": 7, "save_strategy": "steps", "save_steps": 4,
        "optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "linear", "max_grad_norm": 1.0,
        "train_sampling_strategy": "random", "logging_strategy": "steps", "logging_steps": 1,
    }  # fmt: skip
    whole = make_trainer(make_model(torch.float32, **dropout), tiny_tokenizer, tmp_path / "run", **settings)
    whole.train()
    whole.save_model()
    torch.manual_seed(123)
    rest = make_trainer(make_model(torch.float32, **dropout), tiny_tokenizer, tmp_path / "run", **settings)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert not torch.equal(rest.loss_fn.group_weights, whole.loss_fn.group_weights)
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(rest.loss_fn.group_weights, whole.loss_fn.group_weights)
    for name, value in parameters(rest.model).items():
        assert torch.equal(value, parameters(whole.model)[name]), name
    assert (checkpoint / GROUP_WEIGHTS).is_file()
    assert (tmp_path / "run" / GROUP_WEIGHTS).read_text() != (checkpoint / GROUP_WEIGHTS).read_text()
    logged = [[record for record in each.state.log_history if "loss" in record] for each in (rest, whole)]
    assert logged[0] == logged[1]


def test_the_best_model_brings_its_weights(make_model: Callable, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """These texts are random: what is learnt of them makes the held-out loss worse, so the first model is the best."""
    held_out = texts(8, len(tiny_tokenizer), seed=1)
    trainer = make_trainer(
        make_model(), tiny_tokenizer, tmp_path, learning_rate=1e-3, max_steps=4, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="worst_group_loss",
        options={"eval_dataset": held_out},
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    saved = (Path(best) / GROUP_WEIGHTS).read_text()
    trainer.save_model(str(tmp_path / "best"))
    assert (tmp_path / "best" / GROUP_WEIGHTS).read_text() == saved
    assert (tmp_path / "checkpoint-4" / GROUP_WEIGHTS).read_text() != saved


def test_a_checkpoint_of_something_else_is_refused(
    make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    save = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(make_model(), tiny_tokenizer, tmp_path, "erm", **save).train()
    again = make_trainer(make_model(), tiny_tokenizer, tmp_path, **save)
    checkpoint = tmp_path / "checkpoint-2"
    with pytest.raises(
        ValueError, match=r"group_weights\.json is missing; the checkpoint is not of Group DRO"
    ):
        again.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / GROUP_WEIGHTS).write_text('{"a": 0.5, "d": 0.5}')
    with pytest.raises(ValueError, match=r"has groups \['a', 'd'\], not \['a', 'b', 'c'\]"):
        again.train(resume_from_checkpoint=str(checkpoint))
