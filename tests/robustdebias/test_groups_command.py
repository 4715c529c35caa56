"""`robustdebias groups`: what it prints, writes and refuses, and its picture."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from robustdebias.commands.groups import groups
from robustdebias.corpus import Example
from robustdebias.coverage_plots import MOST_GROUPS, draw_coverage
from robustdebias.grouping import Grouping
from robustdebias.preparation import prepare

REPOSITORY = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"

app = typer.Typer()
app.command()(groups)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def refused(*arguments: object) -> str:
    result = call(*arguments)
    assert isinstance(result.exception, ValueError | FileNotFoundError), result.output
    return str(result.exception)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Four texts about women, two of them about men too, two about men alone, one about a Muslim woman, three others."""
    lines = [
        "She reads.", "A woman sings.", "She and he run.", "The girl met the boy.",
        "He sleeps.", "The man eats.", "The Muslim woman prays.", "It rains.", "Snow falls.", "Wind blows.",
    ]  # fmt: skip
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    rows = [("female", "muslim")] * 3 + [("female", "")] * 2 + [("male", "muslim")] + [("", "")] * 2
    path = tmp_path / "labels.csv"
    lines = ["text,gender,faith", *(f"Text {n}.,{gender},{faith}" for n, (gender, faith) in enumerate(rows))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# What it prints


def test_coverage_folding_and_what_is_absent(corpus: Path) -> None:
    result = call(corpus, "--groups", "gender,religion", "--held-out", 0, "--min-texts", 2)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "10 texts, 29 words"
    assert lines[2].split() == ["gender:female", "5", "50.0%", "18", "62.1%", "5"]
    assert lines[3].split() == ["gender:male", "4", "40.0%", "14", "48.3%", "4"]
    assert "3 texts (30.0%) are in no group: other" in lines
    assert "too few training texts, so left to their other groups or other: religion:muslim" in lines
    assert any(line.startswith("no text at all: religion:christian, ") for line in lines)
    assert lines[-2:] == ["10 passages to train on, 0 held out (whole documents)", "3 groups to train on"]


def test_labels_intersect_across_columns(labelled: Path) -> None:
    options = ["--label-field", "gender", "--label-field", "faith", "--held-out", 0, "--min-texts", 2]
    by_value = call(labelled, *options, "--label-axis").stdout.splitlines()
    assert by_value[2].split()[:2] == ["faith:muslim", "4"]
    result = call(labelled, *options, "--level", "intersection")
    table = {line.split("  ")[0]: line.split()[-5] for line in result.stdout.splitlines()[2:6]}
    assert table == {
        "faith:muslim": "1",
        "faith:muslim x gender:female": "3",
        "gender:female": "2",
        "gender:male": "1",
    }
    assert "other: faith:muslim, gender:male, faith:muslim x gender:male" in result.stdout


def test_the_corpus_own_labels_come_first(tmp_path: Path) -> None:
    bold = tmp_path / "gender_wiki.json"
    bold.write_text(json.dumps({"Actors": {"Bo": ["She sings."]}, "Actresses": {"Ada": ["He acts."]}}))
    options = ["--held-out", 0, "--min-texts", 1]
    assert call(bold, *options).stdout.splitlines()[2].startswith("Actors ")
    assert call(bold, *options, "--level", "attribute").stdout.splitlines()[2].startswith("gender ")
    assert call(bold, *options, "--groups", "gender").stdout.splitlines()[2].startswith("gender:female ")


def test_several_corpora(corpus: Path, labelled: Path) -> None:
    result = call(corpus, labelled, "--groups", "gender", "--held-out", 0)
    assert result.stdout.startswith("18 texts, ")


def test_tokens_and_clusters(tiny_corpus: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    counted = call(tiny_corpus, "--groups", "gender", "--tokenizer", tiny_model_dir, "--held-out", 0.2)
    assert counted.exit_code == 0, counted.output
    assert "tokens" in counted.stdout.splitlines()[0]
    out = tmp_path / "out"
    options = ["--clusters", 3, "--model", tiny_model_dir, "--device", "cpu", "--min-texts", 5]
    result = call(tiny_corpus, *options, "--out", out)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "groups.json").read_text(encoding="utf-8"))
    assert [name.split()[0] for name in report["group_names"]] == ["cluster:1", "cluster:2", "cluster:3"]
    assert sum(row["texts"] for row in report["groups"]) == report["coverage"]["texts"] == 240
    assert report["coverage"]["tokens"] == sum(report["coverage"]["group_tokens"])
    assert f"{report['coverage']['tokens']:,} tokens" in counted.stdout.splitlines()[0]


def test_bold_itself(data_dir: Path) -> None:
    result = call(data_dir / "bold", "--label-axis", "--limit", 4000)
    assert result.exit_code == 0, result.output
    assert "gender:American_actresses " in result.stdout
    assert "no text is in two groups" in result.stdout


# What it writes


def test_files(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    result = call(corpus, "--groups", "gender,religion", "--held-out", 0.3, "--min-texts", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["coverage.png", "groups.csv", "groups.json"]
    assert (out / "coverage.png").read_bytes().startswith(PNG)
    report = json.loads((out / "groups.json").read_text(encoding="utf-8"))
    assert report["corpora"] == [str(corpus)]
    assert report["grouping"]["lexicons"] == ["gender", "religion"]
    assert report["passages"]["train"] + report["passages"]["held_out"] == 10
    with (out / "groups.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["group"] for row in rows] == report["coverage"]["names"]
    states = {row["group"]: row["state"] for row in rows}
    assert (states["religion:muslim"], states["religion:sikh"], states["other"]) == (
        "folded",
        "absent",
        "kept",
    )
    female = next(row for row in rows if row["group"] == "gender:female")
    assert (female["texts"], female["text_share"], female["mentions"]) == ("5", "0.5", "5")
    assert int(female["train"]) + int(female["held_out"]) == 5
    assert report["groups"][0] == {
        key: json.loads(value) if value[0].isdigit() else value for key, value in female.items()
    }


def test_the_same_command_writes_the_same(corpus: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert call(corpus, "--min-texts", 1, "--out", tmp_path / name).exit_code == 0
    for file in ("groups.json", "groups.csv", "coverage.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


# What it refuses


def test_a_required_group_without_text_is_an_error_and_nothing_is_written(
    corpus: Path, tmp_path: Path
) -> None:
    options = [
        corpus,
        "--groups",
        "gender,religion",
        "--held-out",
        0,
        "--min-texts",
        2,
        "--out",
        tmp_path / "out",
    ]
    assert "require: 'religion:sikh' has no text" in refused(*options, "--require", "religion:sikh")
    assert "require: 'religion:muslim' has too few" in refused(*options, "--require", "religion:muslim")
    assert "require: 'colour:red' is not a group here" in refused(*options, "--require", "colour:red")
    assert not (tmp_path / "out").exists()
    assert call(*options, "--require", "gender:female", "--require", "gender:male").exit_code == 0


def test_impossible_options(corpus: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    assert "model: --clusters needs a --model" in refused(corpus, "--clusters", 3)
    both = ["--model", tiny_model_dir, "--tokenizer", tiny_model_dir]
    assert "tokenizer: --model brings its own" in refused(corpus, *both)
    assert "out: " in refused(corpus, "--out", corpus)
    assert "tokenizer: cannot load " in refused(corpus, "--tokenizer", tmp_path)
    assert "no column 'who'" in refused(_table(tmp_path), "--label-field", "who")
    assert "groups: " in refused(_table(tmp_path), "--label-field", "topic", "--groups", "gender")
    assert "lexicon 'colour': neither a file" in refused(corpus, "--groups", "colour")
    assert "nowhere.txt: no such file" in refused("nowhere.txt")
    assert "is listed twice" in refused(corpus, corpus)
    assert "count: expected 2 to " in refused(corpus, "--clusters", 99, "--model", tiny_model_dir)
    assert "level: 'intersection' needs lexicons or labels" in refused(
        corpus, "--clusters", 3, "--model", tiny_model_dir, "--level", "intersection"
    )


def _table(folder: Path) -> Path:
    path = folder / "a.csv"
    path.write_text("text,topic\nOne.,x\nTwo.,y\n")
    return path


def test_torch_stays_out_unless_it_is_needed(corpus: Path, tmp_path: Path) -> None:
    code = (
        "import sys, typer\nfrom robustdebias.commands.groups import groups\n"
        "app = typer.Typer()\napp.command()(groups)\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(corpus), "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "python")])},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 []"


# The picture


def test_the_picture_shows_the_counts_and_overlaps() -> None:
    rows = [("a", "b")] * 2 + [("a",)] * 6 + [("c",)] + [("other",)] * 3
    examples = [Example(f"Text {n}.", f"d{n}", groups) for n, groups in enumerate(rows)]
    corpus = prepare(examples, Grouping("labels", min_texts=2), held_out=0.0)
    figure = draw_coverage(corpus)
    bars, heat, _ = figure.axes
    assert [patch.get_width() for patch in bars.patches] == [8, 2, 1]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in bars.texts] == ["8   66.7%", "2   16.7%", "1   8.3%"]
    colours = [patch.get_facecolor() for patch in bars.patches]
    assert colours[0] == colours[1] != colours[2]
    shares = np.ma.filled(heat.images[0].get_array(), np.nan)
    np.testing.assert_allclose(shares, [[np.nan, 0.25, 0], [1, np.nan, 0], [0, 0, np.nan]])
    assert figure.texts[0].get_text() == "12 texts, 24 words; 3 texts (25.0%) in no group"


@pytest.mark.parametrize("count", [1, 2, 40, MOST_GROUPS + 30])
@pytest.mark.parametrize("letters", [5, 60])
def test_names_stay_inside_the_picture_and_apart(count: int, letters: int) -> None:
    names = [f"{number:03}" + "m" * (letters - 3) for number in range(count)]
    examples = [Example("Text.", f"d{n}", (name, names[0])) for n, name in enumerate(names)]
    corpus = prepare(examples, Grouping("labels", min_texts=1), held_out=0.0)
    figure = draw_coverage(corpus)
    figure.canvas.draw()
    labels = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == min(count, MOST_GROUPS)
    whole = figure.bbox
    columns = [label.get_window_extent() for axes in figure.axes[1:2] for label in axes.get_xticklabels()]
    numbers = [text.get_window_extent() for axes in figure.axes[:2] for text in axes.texts]
    assert len(columns) == (0 if count == 1 else len(labels))
    for box in (*labels, *columns, *numbers, figure.texts[0].get_window_extent()):
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    for upper, lower in pairwise(labels):
        assert lower.y1 <= upper.y0 + 2  # a letter's empty corners may touch


def test_a_picture_without_groups_and_without_overlaps() -> None:
    examples = [Example("It rains.", "a"), Example("Snow.", "b")]
    figure = draw_coverage(prepare(examples, Grouping("none"), held_out=0.0))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["all"]
    assert len(figure.axes) == 1
    unplaced = prepare(examples, Grouping(lexicons=("gender",)), held_out=0.0)
    assert draw_coverage(unplaced).axes[0].patches[0].get_width() == 0
