"""The configuration: what it refuses, and how it says so."""

from __future__ import annotations

import math
import re
from dataclasses import asdict

import pytest

from robustdebias.config import OBJECTIVES, RAISED_DROPOUT, TrainConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "objective",
            "dro",
            "objective must be one of erm, reweight, group_dro, cvar, chi_square, got 'dro'",
        ),
        ("step_size", -0.1, "step_size must be >= 0, got -0.1"),
        ("step_size", math.nan, "step_size must be >= 0, got nan"),
        ("lr", 0, "lr must be > 0, got 0"),
        ("lr", math.inf, "lr must be > 0, got inf"),
        ("warmup", 1.5, "warmup must be >= 0 and <= 1, got 1.5"),
        ("mask_probability", 0.0, "mask_probability must be > 0 and <= 1, got 0.0"),
        ("alpha", 0, "alpha must be > 0 and <= 1, got 0"),
        ("alpha", 1.01, "alpha must be > 0 and <= 1, got 1.01"),
        ("radius", -1, "radius must be >= 0, got -1"),
        ("dropout", 1.0, "dropout must be >= 0 and < 1, got 1.0"),
        ("attention_dropout", -0.1, "attention_dropout must be >= 0 and < 1, got -0.1"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("max_length", 2, "max_length must be at least 3, got 2"),
        ("max_steps", 0, "max_steps must be at least 1, got 0"),
        ("group_level", "word", "group_level must be one of sequence, token, got 'word'"),
        ("absent_groups", "drop", "absent_groups must be one of hold, decay, got 'drop'"),
        ("accumulation", "lazy", "accumulation must be one of exact, streaming, got 'lazy'"),
        ("cda_keep", "none", "cda_keep must be one of augmented, all, got 'none'"),
    ],
)
def test_bad_configuration_names_the_field(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 2.5), ("lr", "1e-4"), ("seed", True), ("cda", "yes"), ("bf16", 1), ("backend", None),
        ("dropout", "0.2"), ("alpha", True),
    ],
)  # fmt: skip
def test_configuration_of_another_type(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"^{field} must be"):
        TrainConfig(**{field: value})


def test_what_may_be_left_open() -> None:
    assert TrainConfig(dropout=0.0, attention_dropout=0, alpha=1, radius=0, step_size=0).alpha == 1
    assert TrainConfig(**RAISED_DROPOUT).dropout == 0.2
    assert TrainConfig(**RAISED_DROPOUT).attention_dropout == 0.15
    assert TrainConfig().dropout is TrainConfig().attention_dropout is TrainConfig().max_steps is None
    assert [TrainConfig(objective=name).objective for name in OBJECTIVES] == list(OBJECTIVES)


def test_a_table_of_settings() -> None:
    config = TrainConfig(objective="cvar", alpha=0.3, cda=True, dropout=0.1)
    assert TrainConfig.from_dict(asdict(config)) == config
    assert TrainConfig.from_dict({}) == TrainConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objectiv": "erm"}, "plan.toml: train: unknown key 'objectiv'; did you mean 'objective'?"),
        ({"lr": 0.1, "batchsize": 8}, "plan.toml: train: unknown key 'batchsize'; did you mean 'batch_size'?"),
        ({"learning-speed": 1}, "plan.toml: train: unknown key 'learning-speed'; allowed: objective, step_size, "),
        ({"lr": -1.0}, "plan.toml: train: lr must be > 0, got -1.0"),
    ],
)  # fmt: skip
def test_a_bad_table_names_place_and_key(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        TrainConfig.from_dict(settings, where="plan.toml: train")
    assert str(error.value).startswith(message)


def test_a_bad_type_in_a_table_stays_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"^train: max_steps must be an integer, got '500'$"):
        TrainConfig.from_dict({"max_steps": "500"})


def test_length_and_step_size_that_depend_on_the_data() -> None:
    config = TrainConfig(epochs=2.5, accumulate=4).resolved(batches_per_epoch=41)
    assert config.max_steps == 26  # 102.5 batches, 4 a step
    assert config.step_size == 5 / 26
    assert TrainConfig(max_steps=7, epochs=100, step_size=0.01).resolved(41).max_steps == 7
    assert TrainConfig(max_steps=7, step_size=0.0).resolved(41).step_size == 0.0
