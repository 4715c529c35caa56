"""Whole runs on a tiny model: they learn, survive being killed, and go on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_runs import CONFIG, assert_same_run, run, weights

from robustdebias.checkpoint import RunDirectory
from robustdebias.config import OBJECTIVES
from robustdebias.corpus import load_corpus
from robustdebias.finetuning import swapper_for
from robustdebias.groups import GroupAnnotator
from robustdebias.interrupts import Interrupted
from robustdebias.modeling import load
from robustdebias.preparation import PreparedCorpus, prepare
from robustdebias.training import train

PYTHON_PATH = os.pathsep.join(str(Path(__file__).parents[2] / folder) for folder in (".", "python"))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def annotator() -> GroupAnnotator:
    return GroupAnnotator(["gender", "religion"])


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path, annotator: GroupAnnotator) -> PreparedCorpus:
    return prepare(load_corpus(tiny_corpus), annotator, held_out=0.2, min_texts=5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_training_lowers_the_loss(
    objective: str,
    level: str,
    tiny_model_dir: Path,
    corpus: PreparedCorpus,
    annotator: GroupAnnotator,
    tmp_path: Path,
) -> None:
    config = replace(CONFIG, objective=objective, group_level=level, max_steps=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run(config, tiny_model_dir, corpus, tmp_path / "run", annotator=annotator)
    history = result["history"]
    assert [record["step"] for record in history] == list(range(1, 41))
    first, last = (sum(record["loss"] for record in part) / 5 for part in (history[:5], history[-5:]))
    assert last < first - 1
    assert set(history[0]["group_weight"]) == set(corpus.group_names)
    if objective == "group_dro":
        assert sum(history[-1]["group_weight"].values()) == pytest.approx(1, abs=1e-5)
    saved, _ = load(tmp_path / "run" / "model")
    assert not torch.equal(saved.cls.predictions.bias, torch.zeros_like(saved.cls.predictions.bias))
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"config.json", "history.jsonl", "model", "result.json"}
    assert RunDirectory(tmp_path / "run").read_result() == result


def test_all_objectives_see_the_same_batches(
    tiny_model_dir: Path, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    """At a rate of zero (but for the first step) the plain loss of each step is the same number."""
    config = replace(CONFIG, lr=1e-12, max_steps=5, weight_decay=0.0)
    histories = [
        run(replace(config, objective=objective), tiny_model_dir, corpus, tmp_path / objective)["history"]
        for objective in OBJECTIVES
    ]
    for erm, *others in zip(*histories, strict=True):
        for other in others:
            assert erm["loss"] == pytest.approx(other["loss"], rel=1e-6)
            assert erm["group_loss"] == pytest.approx(other["group_loss"], rel=1e-5)
            assert erm["group_count"] == other["group_count"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bf16_trains(objective: str, tiny_model_dir: Path, corpus: PreparedCorpus, tmp_path: Path) -> None:
    config = replace(CONFIG, objective=objective, bf16=True, max_steps=30, accumulate=2, batch_size=8)
    history = run(config, tiny_model_dir, corpus, tmp_path / "run")["history"]
    assert history[-1]["loss"] < history[0]["loss"] - 0.5


def test_evaluation_happens_on_time_and_moves_nothing(
    tiny_model_dir: Path, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    calls = []

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        assert not model.training
        calls.append(torch.rand(3).tolist())  # draws from the global generator, as an evaluation might
        return {"number": float(len(calls))}

    run(replace(CONFIG, eval_every=0), tiny_model_dir, corpus, tmp_path / "plain")
    result = run(replace(CONFIG, eval_every=5), tiny_model_dir, corpus, tmp_path / "run", evaluate=evaluate)
    assert [record["step"] for record in result["history"] if "evaluation" in record] == [5, 10]
    assert result["history"][9]["evaluation"] == {"number": 2.0}
    for name, value in weights(tmp_path / "plain").items():
        assert torch.equal(value, weights(tmp_path / "run")[name]), name


KILLED_RUN = """
import json, os, signal, sys
from pathlib import Path
import torch
from robustdebias import checkpoint
from robustdebias.config import TrainConfig
from robustdebias.corpus import load_corpus
from robustdebias.groups import GroupAnnotator
from robustdebias.modeling import load
from robustdebias.preparation import prepare
from robustdebias.training import train
torch.set_num_threads(1)
config = TrainConfig(**json.loads(sys.argv[1]))
corpus = prepare(load_corpus(sys.argv[2]), GroupAnnotator(["gender", "religion"]), held_out=0.2, min_texts=5)
append = checkpoint.RunDirectory.append_history
def append_and_die(self, record):
    append(self, record)
    if record["step"] == int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.RunDirectory.append_history = append_and_die
model, tokenizer = load(sys.argv[3])
train(config, model, tokenizer, corpus.train, corpus.group_names, sys.argv[4])
"""


@pytest.mark.parametrize(
    ("options", "killed_at"),
    [
        ({"objective": "group_dro"}, 2),  # before the first checkpoint
        ({"objective": "group_dro", "accumulate": 2, "batch_size": 8}, 8),  # between two
        ({"objective": "erm"}, 8),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(
    options: dict,
    killed_at: int,
    tiny_model_dir: Path,
    tiny_corpus: Path,
    corpus: PreparedCorpus,
    tmp_path: Path,
) -> None:
    config = replace(CONFIG, **options)
    out = tmp_path / "killed"
    process = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, json.dumps(asdict(config)), str(tiny_corpus), str(tiny_model_dir),
         str(out), str(killed_at)],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (out / "result.json").exists()
    assert (out / "checkpoint.pt").exists() == (killed_at > 3)
    torch.manual_seed(99)  # whatever the process's generator holds, it plays no part
    run(config, tiny_model_dir, corpus, out, resume=True)
    run(config, tiny_model_dir, corpus, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "group_dro"},
        {"objective": "group_dro", "adjustment": 2.0, "accumulate": 2, "accumulation": "streaming"},
        {"objective": "erm", "cda": True, "accumulate": 2},
        {"objective": "reweight", "dropout": 0.3, "attention_dropout": 0.2},
        {"objective": "cvar", "accumulate": 2},
        {"objective": "chi_square"},
    ],
)
def test_an_interrupted_run_says_so_and_resumes_to_the_same_bits(
    options: dict,
    tiny_model_dir: Path,
    corpus: PreparedCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from robustdebias import training

    config = replace(CONFIG, **options, batch_size=8, save_every=0)
    swapper = swapper_for(["gender", "religion"])
    steps = []
    show = training._show

    def interrupt_at_seven(bar: object, record: dict) -> None:
        show(bar, record)
        steps.append(record["step"])
        if record["step"] == 7:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(training, "_show", interrupt_at_seven)
    with pytest.raises(Interrupted, match=r"stopped after step 7; the state is saved in .*run") as stop:
        run(config, tiny_model_dir, corpus, tmp_path / "run", swapper=swapper)
    assert stop.value.signum == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is handler
    run(config, tiny_model_dir, corpus, tmp_path / "run", resume=True, swapper=swapper)
    assert steps == list(range(1, 13))
    monkeypatch.undo()
    run(config, tiny_model_dir, corpus, tmp_path / "whole", swapper=swapper)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_finished_run_is_read_not_repeated(
    tiny_model_dir: Path, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    first = run(CONFIG, tiny_model_dir, corpus, tmp_path / "run")
    before = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    assert run(CONFIG, tiny_model_dir, corpus, tmp_path / "run", resume=True) == first
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_resuming_with_other_data_or_settings_is_an_error(
    tiny_model_dir: Path, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    run(CONFIG, tiny_model_dir, corpus, tmp_path / "run")
    with pytest.raises(ValueError, match=r"train\.lr was 0\.003, now 0\.5"):
        run(replace(CONFIG, lr=0.5), tiny_model_dir, corpus, tmp_path / "run", resume=True)
    fewer = replace(corpus, train=corpus.train[:-1])
    with pytest.raises(ValueError, match=r"data\.fingerprint was .*data\.texts was \d+, now \d+"):
        run(CONFIG, tiny_model_dir, fewer, tmp_path / "run", resume=True)


def test_nothing_is_written_for_bad_input(
    tiny_model_dir: Path, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="no training text is in unicorns"):
        run(CONFIG, tiny_model_dir, replace(corpus, group_names=[*corpus.group_names, "unicorns"]), out)
    with pytest.raises(ValueError, match="train_examples: there are none"):
        run(CONFIG, tiny_model_dir, replace(corpus, train=[]), out)
    with pytest.raises(ValueError, match="cda: needs a swapper"):
        run(replace(CONFIG, cda=True), tiny_model_dir, corpus, out)
    with pytest.raises(ValueError, match="group_level: 'token' needs lexicons"):
        run(replace(CONFIG, group_level="token"), tiny_model_dir, corpus, out)
    with pytest.raises(ValueError, match="max_length: 65 tokens, but the model has 64 positions"):
        run(replace(CONFIG, max_length=65), tiny_model_dir, corpus, out)
    with pytest.raises(ValueError, match="backend"):
        run(replace(CONFIG, backend="abacus"), tiny_model_dir, corpus, out)
    assert not out.exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny_model_dir: Path, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    model, tokenizer = load(tiny_model_dir)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="step 1: the loss is nan"):
        train(CONFIG, model, tokenizer, corpus.train, corpus.group_names, tmp_path / "run")
