"""Settings and batches that RobustDebiasTrainer refuses, and with which words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_trainer import (
    NAMES,
    arguments,
    assert_same,
    make_trainer,
    parameters,
    quiet_model,
)

from robustdebias.collate import MLMCollator
from robustdebias.trainer import RobustDebiasTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make_model(make_tiny_model: Callable, tiny_tokenizer: Any) -> Callable[..., Any]:
    return partial(quiet_model, make_tiny_model, len(tiny_tokenizer))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        (
            {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
            "dataloader_persistent_workers",
        ),
        ({"options": {"compute_loss_func": print}}, "compute_loss_func: not supported"),
        ({"options": {"model_init": print}}, "model_init: not supported"),
        ({"config_changes": {"lr": 1e-5}}, r"lr plays no part in a Trainer; set args\.learning_rate"),
        ({"config_changes": {"accumulate": 4}}, r"set args\.gradient_accumulation_steps"),
        ({"config_changes": {"cda": True}}, "cda plays no part in a Trainer; change the data"),
        ({"options": {"group_names": ["a", "c", "b"]}}, r"data_collator's are \['a', 'b', 'c'\]"),
        ({"options": {"group_counts": [1, 2]}}, "2 counts for 3 groups"),
        ({"options": {"group_counts": [1, 2, 0]}}, "no training example is in c"),
        (
            {"options": {"group_counts": None}, "objective": "reweight"},
            "reweight and adjustment need the size",
        ),
    ],
)
def test_settings_that_would_mean_something_else_are_refused(
    changes: dict[str, Any], message: str, make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(make_model(), tiny_tokenizer, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value"), [("torch_compile", True), ("_n_gpu", 2)])
def test_compilation_and_threads_of_gpus_are_refused(
    name: str, value: Any, make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    args = arguments(tmp_path)
    assert args.n_gpu == 0
    setattr(args, name, value)
    collator = MLMCollator(tiny_tokenizer, NAMES)
    with pytest.raises(ValueError, match=r"torch_compile must be False|2 GPUs in one process"):
        RobustDebiasTrainer(make_model(), args, data_collator=collator, group_names=NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.pop("groups"), "batch: no 'groups', only input_ids"),
        (lambda batch: batch.pop("labels"), "batch: no 'labels'"),
        (
            lambda batch: batch.update(groups=batch["groups"][:, :2]),
            r"groups \[4, 2\], but there are 3 group_names",
        ),
    ],
)
def test_batches_without_groups_are_refused(
    change: Callable, message: str, make_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    collator = MLMCollator(tiny_tokenizer, NAMES)

    def changed(texts: Any) -> Any:
        batch = collator(texts)
        change(batch)
        return batch

    model = make_model()
    before = copy.deepcopy(parameters(model))
    trainer = make_trainer(model, tiny_tokenizer, tmp_path, options={"data_collator": changed})
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert_same(parameters(model), before, rtol=0, atol=0)
