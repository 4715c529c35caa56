"""`robustdebias experiment`: all runs and what is written of them, interruptions, and files that do not fit."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from robustdebias.cli import app
from robustdebias.experiments.runner import open_experiment
from robustdebias.experiments.summary import summarise
from robustdebias.finetuning import read_run
from robustdebias.interrupts import Interrupted

SETTINGS = """
title = "A tiny experiment"
seeds = [0, 1]
[model]
name = "MODEL"
[data]
held_out = 0.3
corpora = [{ source = "sentences.txt", name = "Sentences", licence = "own" }]
[groupings.words]
lexicons = ["gender", "religion:any"]
min_texts = 5
[train]
max_steps = 4
batch_size = 16
max_length = 32
lr = 1e-3
[methods.erm]
objective = "erm"
[methods.dro]
label = "DRO <b>"
objective = "group_dro"
step_size = 0.5
[evaluation]
texts = 40
"""
METHODS = ("erm", "dro")


@pytest.fixture
def study(tmp_path, tiny_model_dir, tiny_corpus) -> Path:
    """An experiment's file with its text beside it."""
    shutil.copy(tiny_corpus, tmp_path / "sentences.txt")
    path = tmp_path / "study.toml"
    path.write_text(SETTINGS.replace("MODEL", str(tiny_model_dir)), encoding="utf-8")
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["experiment", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["experiment", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    return result.output


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_everything_it_writes(study, tmp_path):
    run(study)
    out = tmp_path / "study"  # the file's name, beside it
    assert (out / "experiment.toml").read_text() == study.read_text()
    scores = rows(out / "results.csv")
    assert {(row["method"], row["seed"]) for row in scores} == {
        ("start", ""), *((method, seed) for method in METHODS for seed in "01")
    }  # fmt: skip
    for method in METHODS:
        for seed in (0, 1):
            evaluation = read_run(out / "words" / method / f"seed-{seed}")["evaluation"]
            (row,) = (
                row
                for row in scores
                if (row["method"], row["seed"], row["metric"]) == (method, str(seed), "mlm.overall")
            )
            assert float(row["value"]) == evaluation["mlm"]["overall"]["loss"]
            assert float(row["low"]) < float(row["value"]) < float(row["high"])
    differences = rows(out / "differences.csv")
    assert {(row["method"], row["base"]) for row in differences} == {
        ("erm", "start"), ("dro", "start"), ("dro", "erm")
    }  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["methods"]["dro"]["settings"] == {"objective": "group_dro", "step_size": 0.5}
    assert [record["steps"] for record in summary["training"]] == [4] * 4
    (corpus,) = summary["data"]["corpora"]
    assert (corpus["texts"], corpus["license"]) == (240, "own")
    card = (out / "card.html").read_text()
    assert "DRO &lt;b&gt;" in card
    assert "loss of the worst group" in card
    assert (out / "card.md").is_file()


def test_the_methods_of_a_seed_start_alike_and_differ(study, tmp_path):
    run(study)
    history = {
        (method, seed): read_run(tmp_path / "study" / "words" / method / f"seed-{seed}")["history"]
        for method in METHODS
        for seed in (0, 1)
    }
    for seed in (0, 1):  # the same weights, batches, masks and dropout: the first step's loss is the same
        assert history["erm", seed][0]["loss"] == pytest.approx(history["dro", seed][0]["loss"], rel=1e-6)
        assert history["erm", seed][-1]["loss"] != history["dro", seed][-1]["loss"]
    assert history["erm", 0][0]["loss"] != history["erm", 1][0]["loss"]


def test_an_interrupted_experiment_goes_on_to_the_same_numbers(study, tmp_path, monkeypatch):
    run(study, "--out", tmp_path / "whole")
    opened = open_experiment(study, tmp_path / "broken")
    trained = 0

    def stop_in_the_third(cell, start, genuine=opened._run):
        nonlocal trained
        trained += 1
        if trained == 3:
            raise Interrupted(2, 1, tmp_path)
        genuine(cell, start)

    monkeypatch.setattr(opened, "_run", stop_in_the_third)
    with pytest.raises(Interrupted):
        opened.run(lambda line: None)
    assert "Only 2 of 4 runs are finished" in " ".join(summarise(opened)["caveats"])
    shutil.rmtree(tmp_path / "broken" / "words" / "dro" / "seed-0" / "model")  # nobody needs it again
    output = run(study, "--out", tmp_path / "broken")
    assert output.count("(trained before)") == 2
    for name in ("results.csv", "differences.csv"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_metric_added_later_is_measured_on_the_models_that_are_there(study, tmp_path, stereoset_file):
    run(study)
    before = (tmp_path / "study" / "words" / "dro" / "seed-1" / "history.jsonl").read_bytes()
    shutil.copy(stereoset_file, tmp_path / "stereoset.jsonl")
    study.write_text(study.read_text() + 'stereoset = "stereoset.jsonl"\n')
    run(study)
    measured = {row["metric"] for row in rows(tmp_path / "study" / "results.csv") if row["method"] == "dro"}
    assert {"mlm.overall", "stereoset.overall.ss"} <= measured
    assert (tmp_path / "study" / "words" / "dro" / "seed-1" / "history.jsonl").read_bytes() == before


def test_training_settings_do_not_change_under_way(study, tmp_path):
    run(study)
    study.write_text(study.read_text().replace("lr = 1e-3", "lr = 1e-2"))
    assert "train.lr was 0.001, now 0.01" in refused(study)


def test_plan_and_report_train_nothing(study, tmp_path):
    output = run(study, "--plan")
    assert "4 runs: 1 groupings x 2 seeds x 2 methods (erm, dro); 0 done" in output
    assert "gender:female" in output
    assert not (tmp_path / "study").exists()
    assert "holds no evaluation of the start" in refused(study, "--report")
    run(study)
    (tmp_path / "study" / "card.html").unlink()
    assert "training" not in run(study, "--report")
    assert (tmp_path / "study" / "card.html").is_file()


def test_models_need_not_be_kept(study, tmp_path):
    study.write_text(study.read_text().replace("seeds = [0, 1]", "seeds = [0]\nkeep_models = false"))
    run(study)
    assert not list((tmp_path / "study").rglob("model.safetensors"))
    run(study)  # and nothing of it is missed
    study.write_text(study.read_text().replace("texts = 40", "texts = 30"))
    assert "was not kept and cannot be measured again" in " ".join(refused(study).split())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('source = "sentences.txt"', 'source = "nothing.txt"', "nothing.txt"),
        ('lexicons = ["gender", "religion:any"]', 'lexicons = ["height"]', "groupings.words: lexicon 'height'"),
        ("texts = 40", 'texts = 40\nstereoset = "none.json"', "stereoset: there is no file"),
        ("max_length = 32", "max_length = 300", "max_length: 300 tokens, but the model has 64"),
        ("step_size = 0.5", "step_size = 0.5\nmax_length = 16", "max_length differs between methods"),
        ("max_steps = 4", "max_stepps = 4", "did you mean 'max_steps'?"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_is_written(study, tmp_path, old, new, message):
    assert old in study.read_text()
    study.write_text(study.read_text().replace(old, new))
    output = refused(study)
    assert message.replace(" ", "") in "".join(output.split())
    assert not (tmp_path / "study").exists()


def test_another_folder_is_not_overwritten(study, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.txt").write_text("mine")
    assert "holds something else than an experiment" in refused(study)
    assert (tmp_path / "study" / "thesis.txt").read_text() == "mine"
