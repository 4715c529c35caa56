"""Runs of the tiny model, and what they leave."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from robustdebias.config import TrainConfig
from robustdebias.modeling import load
from robustdebias.preparation import PreparedCorpus
from robustdebias.training import train

CONFIG = TrainConfig(
    objective="group_dro",
    step_size=0.1,
    lr=3e-3,
    batch_size=16,
    max_length=24,
    max_steps=12,
    save_every=3,
    seed=5,
)
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}


def run(config: TrainConfig, model_dir: Path, corpus: PreparedCorpus, out: Path, **options: object) -> dict:
    model, tokenizer = load(model_dir)
    return train(config, model, tokenizer, corpus.train, corpus.group_names, out, **options)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights bit for bit, and the same history: losses, group losses and q of every step."""
    expected = weights(one)
    assert expected.keys() == weights(other).keys()
    for name, value in weights(other).items():
        assert torch.equal(value, expected[name]), name
    assert (one / "history.jsonl").read_text() == (other / "history.jsonl").read_text()
