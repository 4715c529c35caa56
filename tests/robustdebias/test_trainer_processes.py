"""RobustDebiasTrainer in two processes, and the examples as they are started by hand."""

from __future__ import annotations

import copy
import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from tiny_trainer import make_trainer, parameters, texts

from robustdebias.checkpoint import read_json
from robustdebias.config import OBJECTIVES
from robustdebias.trainer import GROUP_WEIGHTS

ROOT = Path(__file__).parents[2]
EVALUATED = ("eval_loss", "eval_loss_a", "eval_loss_b", "eval_loss_c", "eval_worst_group_loss")
LOGGED = ("loss", "group_loss/a", "group_loss/b", "group_loss/c", "group_weight/b", "worst_group_loss")


pytestmark = pytest.mark.usefixtures("one_thread")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def outcome(model: Any, tokenizer: Any, out: Path, objective: str, size: int) -> dict[str, Any]:
    """Two epochs of two steps of two batches each; then 7 held-out texts, which no number of batches fits."""
    trainer = make_trainer(
        model, tokenizer, out, train=texts(32, len(tokenizer)), max_steps=4, per_device_train_batch_size=size,
        gradient_accumulation_steps=2, per_device_eval_batch_size=2, logging_strategy="steps", logging_steps=4,
        options={"eval_dataset": texts(7, len(tokenizer), seed=1)},
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    record = trainer.state.log_history[0]
    return {
        "parameters": parameters(model),
        "q": getattr(trainer.loss_fn, "group_weights", torch.zeros(3)),
        "metrics": [metrics[key] for key in EVALUATED],
        "logs": [record[key] for key in LOGGED],
        "processes": trainer.accelerator.num_processes,
    }


def worker(rank: int, port: int, model: Any, tokenizer: Any, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    for objective in OBJECTIVES:
        # A copy: what one objective has trained, another must not start with.
        result = outcome(copy.deepcopy(model), tokenizer, out, objective, size=4)
        torch.save(result, out / f"{objective}{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_the_joined_batches(
    make_tiny_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    def make_model() -> Any:
        settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return make_tiny_model(len(tiny_tokenizer), **settings).double()

    mp.spawn(worker, args=(free_port(), make_model(), tiny_tokenizer, tmp_path), nprocs=2)
    for objective in OBJECTIVES:
        ranks = [torch.load(tmp_path / f"{objective}{rank}.pt") for rank in range(2)]
        one = outcome(make_model(), tiny_tokenizer, tmp_path / "one", objective, size=8)
        assert (one["processes"], ranks[0]["processes"]) == (1, 2)
        assert torch.equal(ranks[0]["q"], ranks[1]["q"])
        torch.testing.assert_close(ranks[0]["q"], one["q"], rtol=1e-6, atol=1e-8)
        for name, value in one["parameters"].items():
            assert torch.equal(ranks[0]["parameters"][name], ranks[1]["parameters"][name]), (objective, name)
            torch.testing.assert_close(ranks[0]["parameters"][name], value, rtol=1e-5, atol=1e-7)
        for rank in ranks:
            assert rank["metrics"] == pytest.approx(one["metrics"], rel=1e-5), objective
            assert rank["logs"] == pytest.approx(one["logs"], rel=1e-5), objective


@pytest.fixture(scope="module")
def quiet_model_dir(
    make_tiny_model: Callable, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model without dropout, whose masks would differ between one process and two."""
    directory = tmp_path_factory.mktemp("quiet-bert")
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    make_tiny_model(len(tiny_tokenizer), **settings).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


def test_the_example_as_it_is_launched(quiet_model_dir: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    """By torchrun in two processes with batches of 8, and by accelerate in one with batches of 16. Not to the end of the
    epoch: its last batches are filled up in two processes."""
    launchers = {
        "two": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())],
        "one": ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no"],
    }  # fmt: skip
    for name, size in (("two", 8), ("one", 16)):
        subprocess.run(
            [
                sys.executable, "-m", *launchers[name], str(ROOT / "examples" / "finetune_with_trainer.py"), "--cpu",
                "--model", str(quiet_model_dir), "--corpus", str(tiny_corpus), "--out", str(tmp_path / name),
                "--min-texts", "5", "--epochs", "0.9", "--batch-size", str(size),
            ],
            check=True, timeout=300, env={
                **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
            },
        )  # fmt: skip
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    start = load_file(quiet_model_dir / "model.safetensors")
    assert one.keys() == two.keys()
    moved, apart = 0.0, 0.0
    for name, value in one.items():
        if not name.endswith("key.bias"):  # their gradient is nothing but rounding, of which Adam makes steps
            moved = max(moved, (value - start[name]).abs().max().item())
            apart = max(apart, (value - two[name]).abs().max().item())
    assert moved > 5e-4
    assert apart < moved / 50
    weights = [read_json(tmp_path / name / GROUP_WEIGHTS) for name in ("two", "one")]
    assert weights[0] == pytest.approx(weights[1], rel=1e-4)
    assert max(weights[1].values()) > 1.1 * min(weights[1].values())


def test_the_own_loop_example(tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path, capsys: Any) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "own_loop.py"))
    options = [
        "--model",
        str(tiny_model_dir),
        "--corpus",
        str(tiny_corpus),
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    loss_fn = example["main"]([*options, "--epochs", "8"])
    weights = loss_fn.group_weights
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)
    assert weights.max() > weights.min()
    printed = [float(loss) for loss in re.findall(r"^overall +([\d.]+)", capsys.readouterr().out, re.M)]
    assert len(printed) == 8
    assert printed[-1] < printed[0]
    assert (tmp_path / "model.safetensors").is_file()


def test_the_snippets_of_the_documentation(
    tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand there, one after the other, in a folder that has the files that they name."""
    snippets = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "trainer.md").read_text("utf-8"), re.M | re.S
    )
    assert len(snippets) == 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "my-bert").symlink_to(tiny_model_dir)
    (tmp_path / "news.txt").write_text(tiny_corpus.read_text())
    names: dict[str, Any] = {}
    exec(snippets[0], names)
    trained = names["trainer"].loss_fn.group_weights
    assert trained.max() > trained.min()
    gradient = names["model"].cls.predictions.bias.grad
    assert gradient is None or not gradient.any()
    exec(snippets[1], names)
    assert names["model"].cls.predictions.bias.grad.any()
    assert names["loss_fn"].group_weights.sum().item() == pytest.approx(1, abs=1e-5)
