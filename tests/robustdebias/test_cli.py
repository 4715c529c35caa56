"""The command line: help that teaches, errors in one line, exit codes, and the commands on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from robustdebias import demo, training
from robustdebias.checkpoint import RunDirectory
from robustdebias.cli import app

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, a wide terminal, and no way to the network."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")

    def no_fetch(*_: object) -> None:
        raise AssertionError("nothing is to be downloaded")

    monkeypatch.setattr(demo, "fetch", no_fetch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_line(result: Result) -> str:
    """The last line on stderr of a command that failed, after checking that it says it in one line."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines, result.output
    assert "Traceback" not in result.output
    return lines[-1]


@pytest.fixture
def finetune_options(tiny_corpus: Path, tiny_model_dir: Path) -> list[object]:
    return [
        "finetune", "--corpus", tiny_corpus, "--model", tiny_model_dir, "--groups", "gender,religion",
        "--max-steps", 4, "--batch-size", 8, "--max-length", 24, "--held-out", 0.2, "--min-texts", 5,
    ]  # fmt: skip


# Help


@pytest.mark.parametrize("command", ["demo", "finetune", "evaluate", "compare"])
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"robustdebias {command} " in result.stdout
    assert "--out" in result.stdout


def test_help_is_quick_because_torch_stays_out() -> None:
    code = (
        "import sys\nfrom robustdebias.cli import app\n"
        "try: app(['finetune', '--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "python")])},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"


def test_version_and_no_arguments() -> None:
    assert call("--version").stdout.startswith("robustdebias 0.")
    assert "Commands" in call().output


# Errors


def test_unknown_options_and_choices_are_usage_errors(finetune_options: list[object], tmp_path: Path) -> None:
    assert call("finetune", "--colour", "red").exit_code == 2
    assert call("finetune").exit_code == 2
    result = call(*finetune_options, "--out", tmp_path / "run", "--objective", "sgd")
    assert result.exit_code == 2
    assert "'erm', 'reweight', 'group_dro', 'cvar', 'chi_square'" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corpus", "nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["--model", "./nowhere"], "model: ./nowhere is not a directory"),
        (["--model", "nobody/no-such-model"], "model: cannot load nobody/no-such-model"),
        (
            ["--groups", "gender,colour"],
            "lexicon 'colour': neither a file nor one of those that come with the package",
        ),
        (["--groups", ""], "lexicons: expected at least one"),
        (["--step-size", "-1"], "step_size must be >= 0, got -1.0"),
        (["--lr", "nan"], "lr must be > 0, got nan"),
        (["--objective", "cvar", "--alpha", "0"], "alpha must be > 0 and <= 1, got 0.0"),
        (["--objective", "chi_square", "--radius", "-1"], "radius must be >= 0, got -1.0"),
        (
            ["--cda", "--groups", "age"],
            "cda: none of the lexicons age has counterparts; those that have: ",
        ),
        (["--stereoset", "nowhere.json"], "stereoset: there is no file nowhere.json"),
        (["--data-dir", "nowhere"], "data_dir: there is no folder nowhere"),
        (["--device", "abacus"], "device: 'abacus' can't be used here"),
        (["--backend", "abacus"], "backend: "),
        (["--resume"], "out: nothing to resume"),
        (["--resume", "--overwrite"], "resume and overwrite exclude each other"),
        (["--min-texts", "10000"], None),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    options: list[str], message: str | None, finetune_options: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = call(*finetune_options, *options, "--out", out)
    if message is None:  # all groups fold into "other": not an error
        assert result.exit_code == 0
        return
    assert result.exit_code == 2, result.output
    assert error_line(result).startswith(f"error: {message}")
    assert not out.exists()


def test_a_missing_label_field_names_file_and_line(finetune_options: list[object], tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "The man reads."}\n{"text": "She reads."}\n')
    result = call(
        *finetune_options,
        "--corpus",
        tmp_path / "texts.jsonl",
        "--label-field",
        "group",
        "--out",
        tmp_path / "run",
    )
    assert result.exit_code == 2
    assert "texts.jsonl:1: no field 'group'" in error_line(result)


def test_a_failure_has_exit_code_one(
    finetune_options: list[object], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = shutil.copytree(tiny_model_dir, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["bert.encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    options = [*finetune_options, "--model", broken, "--out", tmp_path / "run"]
    result = call(*options)
    assert result.exit_code == 1
    assert error_line(result).startswith("failed (RuntimeError): step 1: the loss is nan")
    monkeypatch.setenv("ROBUSTDEBIAS_TRACEBACK", "1")
    assert isinstance(call(*options, "--overwrite").exception, RuntimeError)


def test_evaluate_and_compare_want_something_to_work_on(tiny_model_dir: Path, tmp_path: Path) -> None:
    result = call("evaluate", tiny_model_dir, "--out", tmp_path / "metrics.json")
    assert result.exit_code == 2
    assert error_line(result).startswith("error: nothing to measure on")
    result = call("compare", tmp_path, "--out", tmp_path / "report")
    assert (result.exit_code, error_line(result)) == (2, f"error: {tmp_path} holds no run")
    assert list(tmp_path.iterdir()) == []


# The commands


def test_finetune_evaluate_compare(
    finetune_options: list[object], tiny_corpus: Path, tmp_path: Path, stereoset_file: Path
) -> None:
    dro, erm = tmp_path / "dro", tmp_path / "erm"
    result = call(*finetune_options, "--out", dro, "--stereoset", stereoset_file)
    assert result.exit_code == 0, result.output
    assert result.stdout.index("gender:female") < result.stdout.index("the model is in")
    metrics = json.loads((dro / "metrics.json").read_text())
    assert set(metrics["evaluation"]) == set(metrics["start"]["evaluation"]) == {"mlm", "stereoset"}
    assert metrics["evaluation"]["mlm"]["items"] == metrics["start"]["evaluation"]["mlm"]["items"]

    again = call(*finetune_options, "--out", dro, "--stereoset", stereoset_file)
    assert again.exit_code == 2
    assert "is not empty" in error_line(again)
    assert call(*finetune_options, "--out", dro, "--stereoset", stereoset_file, "--resume").exit_code == 0
    other = call(*finetune_options, "--out", dro, "--resume", "--lr", "0.5")
    assert other.exit_code == 2
    assert "train.lr was 0.0001, now 0.5" in error_line(other)
    assert (
        call(*finetune_options, "--out", erm, "--objective", "erm", "--stereoset", stereoset_file).exit_code
        == 0
    )
    assert call(*finetune_options, "--out", erm, "--objective", "erm", "--overwrite", "--stereoset",
                stereoset_file).exit_code == 0  # fmt: skip

    # What evaluate measures on the same held-out text is what finetune measured.
    result = call(
        "evaluate", dro, "--corpus", tiny_corpus, "--groups", "gender,religion", "--held-out", 0.2, "--min-texts", 5,
        "--max-length", 24, "--stereoset", stereoset_file, "--out", tmp_path / "again" / "metrics.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (
        json.loads((tmp_path / "again" / "metrics.json").read_text())["evaluation"] == metrics["evaluation"]
    )

    result = call("compare", erm, dro, "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    into_a_run = call("compare", erm, dro, "--out", dro)
    assert into_a_run.exit_code == 2
    assert "is the directory of a run" in error_line(into_a_run)
    report = (tmp_path / "report" / "report.md").read_text()
    assert "erm" in report
    assert "dro" in report


def test_every_method_is_a_flag(finetune_options: list[object], tmp_path: Path) -> None:
    methods: list[tuple[list[object], dict[str, object]]] = [
        (["--objective", "erm"], {"objective": "erm", "accumulation": "exact"}),
        (["--objective", "reweight"], {"objective": "reweight"}),
        (["--adjustment", 2], {"objective": "group_dro", "adjustment": 2.0}),
        (["--objective", "cvar", "--alpha", 0.5], {"objective": "cvar", "alpha": 0.5}),
        (["--objective", "chi_square", "--radius", 0.5], {"objective": "chi_square", "radius": 0.5}),
        (["--objective", "erm", "--cda"], {"objective": "erm", "cda": True}),
        (["--objective", "erm", "--raised-dropout"], {"dropout": 0.2, "attention_dropout": 0.15}),
        (["--accumulate", 2, "--accumulation", "streaming"], {"accumulate": 2, "accumulation": "streaming"}),
    ]
    items = set()
    for number, (flags, expected) in enumerate(methods):
        out = tmp_path / str(number)
        result = call(*finetune_options, *flags, "--max-steps", 2, "--out", out)
        assert result.exit_code == 0, result.output
        recorded = json.loads((out / "config.json").read_text())
        assert recorded["train"] == {**recorded["train"], **expected}
        assert (recorded["data"]["counterfactuals"] is not None) == ("--cda" in flags)
        assert len(RunDirectory(out).read_history()) == 2
        items.add(json.loads((out / "metrics.json").read_text())["evaluation"]["mlm"]["items"])
    assert len(items) == 1  # all are measured on the same text, which is never augmented


def test_an_interrupt_saves_and_exits_with_130(
    finetune_options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = training._show

    def interrupt_at_two(bar: object, record: dict) -> None:
        show(bar, record)
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with monkeypatch.context() as patched:
        patched.setattr(training, "_show", interrupt_at_two)
        result = call(*finetune_options, "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert error_line(result).startswith("stopped after step 2; the state is saved in ")
    assert call(*finetune_options, "--out", tmp_path / "run", "--resume").exit_code == 0
    assert call(*finetune_options, "--out", tmp_path / "whole").exit_code == 0
    assert (tmp_path / "run" / "history.jsonl").read_text() == (
        tmp_path / "whole" / "history.jsonl"
    ).read_text()


def test_the_demo_runs_offline_and_goes_on_where_it_stopped(
    tiny_corpus: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    stereoset_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tmp_path / "data" / "stereoset"
    data.mkdir(parents=True)
    shutil.copy(stereoset_file, data / "dev.jsonl")
    out = tmp_path / "demo"
    options = [
        "demo", "--model", tiny_model_dir, "--corpus", tiny_corpus, "--steps", 3, "--out", out, "--data-dir",
        tmp_path / "data",
    ]  # fmt: skip
    show = training._show

    def interrupt_the_second_run(bar: object, record: dict) -> None:
        show(bar, record)
        if record["step"] == 1 and (out / "erm" / "result.json").exists():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with monkeypatch.context() as patched:
        patched.setattr(training, "_show", interrupt_the_second_run)
        assert call(*options).exit_code == 130
    erm_model = out / "erm" / "model" / "model.safetensors"
    made = erm_model.stat().st_mtime_ns
    assert not (out / "report.md").exists()
    result = call(*options)
    assert result.exit_code == 0, result.output
    assert erm_model.stat().st_mtime_ns == made
    report = (out / "report.md").read_text()
    assert "group_dro" in report
    histories = [RunDirectory(out / name).read_history() for name in ("erm", "group_dro")]
    assert [len(history) for history in histories] == [3, 3]
    assert histories[0][0]["loss"] == pytest.approx(
        histories[1][0]["loss"], rel=1e-6
    )  # the same start and batch
    assert histories[0][0]["group_count"] == histories[1][0]["group_count"]

    other = call(*options, "--steps", 4)
    assert other.exit_code == 2
    assert "train.max_steps was 3, now 4" in error_line(other)


def test_the_demo_does_not_write_into_a_directory_of_something_else(
    tiny_corpus: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    result = call("demo", "--model", tiny_model_dir, "--corpus", tiny_corpus, "--out", tmp_path)
    assert result.exit_code == 2
    assert "holds something else than a demo" in error_line(result)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
