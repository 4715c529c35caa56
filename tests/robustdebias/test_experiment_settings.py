"""An experiment's file: what it says, and what is said of what it should not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustdebias.experiments.settings import load_settings

MINIMAL = """
title = "A title"
seeds = [0, 1]
[model]
name = "demo"
[data]
corpora = [{ source = "text.txt" }]
[groupings.words]
lexicons = ["gender", "race:any"]
[train]
max_steps = 5
[methods.erm]
objective = "erm"
[methods.dro]
label = "DRO"
objective = "group_dro"
step_size = 0.1
"""


@pytest.fixture
def write(tmp_path: Path):
    def make(text: str) -> Path:
        path = tmp_path / "study.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


def test_reads_what_stands_there(write):
    settings = load_settings(write(MINIMAL))
    assert settings.seeds == (0, 1)
    assert list(settings.methods) == ["erm", "dro"]
    assert settings.methods["dro"].label == "DRO"
    assert settings.groupings["words"].grouping().lexicons == ("gender", "race:any")
    config = settings.train_config("dro", 7)
    assert (config.objective, config.step_size, config.max_steps, config.seed) == ("group_dro", 0.1, 5, 7)
    assert settings.train_config("erm", 0).objective == "erm"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[model]", "[modle]", r"study.toml: model: missing; modle: no such key; did you mean 'model'\?"),
        ('name = "demo"', 'nmae = "demo"', r"model.nmae: no such key; did you mean 'name'\?"),
        ('source = "text.txt"', 'source = "t", text_feld = "x"', r"data.corpora.0.text_feld: .*'text_field'"),
        ("max_steps = 5", "max_step = 5", r"train: unknown key 'max_step'; did you mean 'max_steps'\?"),
        ("step_size = 0.1", "step_sise = 0.1", r"methods.dro: unknown key 'step_sise'; did you mean 'step_size'\?"),
        ("step_size = 0.1", "step_size = -1.0", r"methods.dro: step_size must be >= 0"),
        ("step_size = 0.1", 'step_size = "fast"', r"methods.dro: step_size must be a number, got 'fast'"),
        ("max_steps = 5", "seed = 5", r"train: seed: .* seeds"),
        ('objective = "erm"', 'objective = "irm"', r"methods.erm: objective must be one of erm, .*got 'irm'"),
        ("seeds = [0, 1]", "seeds = []", r"seeds: tuple should have at least 1 item"),
        ("seeds = [0, 1]", "seeds = [1, 1]", r"seeds: \[1\] stand there twice"),
        ("seeds = [0, 1]", "seeds = [0, -1]", r"seeds.1: input should be greater than or equal to 0, got -1"),
        ('lexicons = ["gender", "race:any"]', 'source = "tea leaves"', r"groupings.words.source: .*'lexicons'.*got 'tea"),
        ("[methods.erm]", '[methods."../erm"]', r"methods.../erm: a name of letters"),
        ("[methods.erm]", "[methods.start]", r"methods.start: a name of letters"),
        ("[train]", "[train", r"study.toml: not readable as TOML: .*line 10"),
    ],
)  # fmt: skip
def test_mistakes_are_named(write, old, new, message):
    assert old in MINIMAL
    with pytest.raises(ValueError, match=message):
        load_settings(write(MINIMAL.replace(old, new)))


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "study.toml"
    path.write_bytes(b'title = "caf\xe9"')
    with pytest.raises(ValueError, match=r"study.toml: not UTF-8 \(byte 12\)"):
        load_settings(path)
