"""What RobustDebiasTrainer logs, and that the callbacks of transformers hand it on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from tiny_trainer import (
    NAMES,
    make_trainer,
    published_step,
    quiet_model,
    row_losses,
    texts,
)
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from robustdebias.collate import MLMCollator

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make_model(make_tiny_model: Callable, tiny_tokenizer: Any) -> Callable[..., Any]:
    return partial(quiet_model, make_tiny_model, len(tiny_tokenizer))


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("objective", ["group_dro", "cvar"])
def test_logs_have_the_groups_losses_since_the_last_log_and_their_weights(
    objective: str, make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """With a rate of 0 every loss is the first model's, so the means over all batches are known."""
    recorder, model = Recorder(), make_model()
    train = texts(300, len(tiny_tokenizer))
    trainer = make_trainer(
        model, tiny_tokenizer, tmp_path, objective, train=train, learning_rate=0.0, max_steps=75,
        logging_strategy="steps", logging_steps=70, config_changes={"step_size": 0.02},
        options={"callbacks": [recorder]},
    )  # fmt: skip
    trainer.train()
    (record, *_), end = recorder.logs, recorder.logs[-1]
    collator = MLMCollator(tiny_tokenizer, NAMES, mask_probability=0.3)
    parts = [row_losses(model.eval(), collator(train[4 * k : 4 * k + 4])) for k in range(70)]
    losses, groups = (torch.cat(column) for column in zip(*parts, strict=True))
    means = [losses[groups[:, g]].mean().item() for g in range(3)]
    assert [record[f"group_loss/{name}"] for name in NAMES] == pytest.approx(means, rel=1e-5)
    assert record["worst_group_loss"] == max(record[f"group_loss/{name}"] for name in NAMES)
    weights = [record[f"group_weight/{name}"] for name in NAMES]
    if objective == "group_dro":
        q = torch.full((3,), 1 / 3, dtype=torch.float64)
        for part in parts:
            _, q = published_step(q, *part, step_size=0.02)
        assert weights == pytest.approx(q.tolist(), rel=1e-4)
    assert "train_loss" in end
    assert not any(key.startswith("group") for key in end)


@pytest.mark.parametrize("kind", ["TensorBoard", "Wandb", "Trackio"])
def test_the_callbacks_of_transformers_hand_them_on(
    kind: str, make_model: Callable, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each callback is transformers' own; the package that it writes to is a stand-in that records the calls."""
    package = MagicMock()
    module = {"TensorBoard": "tensorboardX", "Wandb": "wandb", "Trackio": "trackio"}[kind]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, module, package)
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", package)
    monkeypatch.setattr(integration_utils, f"is_{kind.lower()}_available", lambda: True)
    callback = getattr(integration_utils, f"{kind}Callback")()
    trainer = make_trainer(
        make_model(), tiny_tokenizer, tmp_path, max_steps=2, logging_strategy="steps", logging_steps=1,
        trackio_static_space_id=False, options={"callbacks": [callback]},
    )  # fmt: skip
    trainer.train()
    if kind == "TensorBoard":
        written = {call.args[0]: call.args[1] for call in package.SummaryWriter().add_scalar.call_args_list}
    else:
        written = {key: value for call in package.log.call_args_list for key, value in call.args[0].items()}
    for name, weight in zip(NAMES, trainer.loss_fn.group_weights.tolist(), strict=True):
        assert written[f"train/group_weight/{name}"] == pytest.approx(weight)
        assert f"train/group_loss/{name}" in written
    assert written["train/worst_group_loss"] > 0
