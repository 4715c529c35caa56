"""The suite: what it measures, what it measures again, and the shape that all metrics share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import BertConfig, BertForPreTraining
from typer.testing import CliRunner

from robustdebias import report
from robustdebias.cli import app
from robustdebias.comparison import compare
from robustdebias.corpus import Example
from robustdebias.evaluation import PARTS, bootstrap, metric_of, module_of
from robustdebias.evaluation.metric import Metric
from robustdebias.modeling import load
from robustdebias.suite import Suite, benchmark_files, find_benchmarks, headline

FIXTURES = Path(__file__).parent / "fixtures" / "eval"
TEXTS = [
    Example(text, str(number), groups)
    for number, (text, groups) in enumerate(
        [
            ("She reads her book.", ("female",)),
            ("He sells bread.", ("male",)),
            ("The visitor keeps the lamp.", ("other",)),
        ]
        * 5
    )
]
EVERYTHING: dict[str, Any] = {
    "stereoset": FIXTURES / "stereoset.jsonl", "crows_pairs": FIXTURES / "crows_pairs.csv",
    "stereoset_tasks": ["intrasentence", "intersentence"], "crows_pairs_forms": ["original", "differing"],
    "neutral": ["The house is near the river.", "After work at home."] * 6,
    "text_sets": {"gap": [Example("The woman finds her letter.", str(n), ("pronoun",)) for n in range(12)]},
}  # fmt: skip
ALL_PARTS = [
    "mlm", "mlm:gap", "stereoset", "stereoset_inter", "crows_pairs", "crows_pairs_differing", "pseudo_perplexity",
]  # fmt: skip


def suite(**changes: Any) -> Suite:
    return Suite(TEXTS, ["female", "male", "other"], **{**EVERYTHING, **changes})


@pytest.fixture(scope="module")
def measured(make_tiny_model: Any, tiny_tokenizer: Any) -> dict[str, Any]:
    return suite().measure(make_tiny_model(len(tiny_tokenizer)), tiny_tokenizer)


class Counter:
    """Wraps a part's ``evaluate`` and counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[str] = []
        for name, module in PARTS.items():
            monkeypatch.setattr(module, "evaluate", self._counting(name, module.evaluate))

    def _counting(self, name: str, evaluate: Any) -> Any:
        def wrapper(*args: Any, **options: Any) -> Any:
            self.calls.append(name)
            return evaluate(*args, **options)

        return wrapper


# Every metric has one shape


def test_everything_is_measured(measured: dict[str, Any]) -> None:
    assert list(measured) == ALL_PARTS
    for part, result in measured.items():
        assert result["definition"].startswith(module_of(part).DEFINITION)
        assert len(result["items"]) == 16
    assert measured["mlm:gap"]["by_group"].keys() == {"pronoun"}


def test_scores_and_draws_survive_json(measured: dict[str, Any]) -> None:
    kept = json.loads(json.dumps(measured, allow_nan=False))
    values, draws = bootstrap.values(kept), bootstrap.draws(kept)
    assert values == bootstrap.values(measured)
    assert {name.partition(".")[0] for name in values} == set(ALL_PARTS)
    assert set(draws) < set(values)  # some have too few items
    for name, sample in draws.items():
        assert sample.shape == (bootstrap.DRAWS,)
        assert sample.min() <= values[name] <= sample.max()
    labels = [metric_of(name).label for name in values]
    assert len(set(labels)) == len(labels)
    assert all(metric_of(name).name == name for name in values)


def test_draws_need_the_outcomes_of_items(measured: dict[str, Any]) -> None:
    bulky = ("per_text", "per_term", "outcomes")
    bare = {part: {k: v for k, v in result.items() if k not in bulky} for part, result in measured.items()}
    assert bootstrap.draws(bare) == {}
    assert bootstrap.values(bare) == bootstrap.values(measured)


def test_names_of_further_texts() -> None:
    assert metric_of("mlm.worst").label == "loss of the worst group"
    found = metric_of("mlm:gap.group.female")
    assert (found.label, found.name, found.headline) == ("gap: loss of female", "mlm:gap.group.female", False)
    for name in ("stereoset:gap.overall.ss", "perplexity.overall"):
        with pytest.raises(
            ValueError, match=r"part: must be one of mlm, .* got '(stereoset:gap|perplexity)'"
        ):
            metric_of(name)


def test_a_metric_of_each_ideal() -> None:
    values = np.array([-3.0, 0.0, 50.0, 60.0])
    badness = {
        "low": [-3, 0, 50, 60], "high": [3, 0, -50, -60], "100": [3, 0, -50, -60], "0": [3, 0, 50, 60],
        "50": [53, 50, 0, 10],
    }  # fmt: skip
    for ideal, expected in badness.items():
        assert Metric("a.b", "label", ideal).badness(values).tolist() == expected
    with pytest.raises(ValueError, match="ideal must be one of"):
        Metric("a.b", "label", "51")


def test_verdicts_where_zero_and_much_are_ideal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of which the means of its items are the scores."""

    def draws(result: Mapping[str, Any], weights: bootstrap.Resampler) -> dict[str, np.ndarray]:
        items = np.array(result["values"])[:, None]
        return {name: weights.apply(items)[:, 0] / len(items) for name in ("effect", "share", "percentage")}

    fake = SimpleNamespace(
        DEFINITION="means",
        scores=lambda result: dict.fromkeys(
            ("effect", "share", "percentage"), float(np.mean(result["values"]))
        ),
        draws=draws,
        metric=lambda name: {
            "effect": Metric(name, "effect size", "0", unit="", digits=2),
            "share": Metric(name, "share", "high", unit=""),
            "percentage": Metric(name, "percentage", "high"),
        }[name],
    )
    monkeypatch.setitem(PARTS, "fake", fake)

    def verdicts(first: float, second: float) -> list[str]:
        runs = {
            name: {"evaluation": {"fake": {"values": [value] * 20, "items": "same"}}}
            for name, value in (("one", first), ("two", second))
        }
        found = compare({"runs": runs})
        return [d.verdict for d in found.differences]

    assert verdicts(-0.5, 0.2) == ["better", "better", "slightly better"]
    assert verdicts(0.2, 0.24) == ["slightly worse", "better", "slightly better"]
    assert verdicts(0.2, 0.205) == ["slightly worse", "slightly better", "slightly better"]
    assert verdicts(0.2, -0.7) == ["worse", "worse", "slightly worse"]


# What is measured again


def test_only_what_is_missing_is_measured(
    measured: dict[str, Any], tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(monkeypatch)
    known = json.loads(json.dumps({"suite": suite().describe(), "evaluation": measured}))
    assert suite().measure(tiny_model, tiny_tokenizer, known=known) == json.loads(json.dumps(measured))
    assert counter.calls == []
    # Other neutral texts, and a part that was not there.
    known["evaluation"].pop("crows_pairs")
    result = suite(neutral=["She reads."]).measure(tiny_model, tiny_tokenizer, known=known)
    assert counter.calls == ["crows_pairs", "pseudo_perplexity"]
    assert result["crows_pairs"] == measured["crows_pairs"]
    assert result["pseudo_perplexity"]["overall"]["count"] == 3
    assert list(result) == ALL_PARTS


def test_an_interrupted_evaluation_goes_on(
    measured: dict[str, Any], tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []

    def save(record: dict[str, Any]) -> None:
        saved.append(json.dumps(record))
        if len(saved) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite().measure(tiny_model, tiny_tokenizer, save=save)
    known = json.loads(saved[-1])
    assert list(known["evaluation"]) == list(known["suite"]) == ALL_PARTS[:3]
    counter = Counter(monkeypatch)
    result = suite().measure(tiny_model, tiny_tokenizer, known=known)
    assert json.loads(json.dumps(result)) == json.loads(json.dumps(measured))
    assert counter.calls == ALL_PARTS[3:]


def test_parts_by_name(tiny_model: Any, tiny_tokenizer: Any, measured: dict[str, Any]) -> None:
    assert suite().measure(tiny_model, tiny_tokenizer, ["crows_pairs"]) == {
        "crows_pairs": measured["crows_pairs"]
    }
    with pytest.raises(ValueError, match=r"parts: must be among mlm, .*, got seat"):
        suite().measure(tiny_model, tiny_tokenizer, ["seat"])


def test_each_part_is_described_by_what_it_depends_on(tmp_path: Path) -> None:
    described = suite().describe()
    assert json.loads(json.dumps(described)) == described
    bare = Suite(
        TEXTS, ["female", "male", "other"], FIXTURES / "stereoset.jsonl", FIXTURES / "crows_pairs.csv"
    )
    assert list(bare.describe()) == ["mlm", "stereoset", "crows_pairs"]
    assert bare.describe().items() <= described.items()  # further parts leave these as they are
    moved = tmp_path / "stereoset.jsonl"
    shutil.copy(FIXTURES / "stereoset.jsonl", moved)
    assert suite(stereoset=moved).describe() == described

    def changed(**changes: Any) -> set[str]:
        other = suite(**changes).describe()
        return {name for name in described if other[name] != described[name]}

    moved.write_text(moved.read_text().replace("bread", "lamp"))
    assert changed(stereoset=moved) == {"stereoset", "stereoset_inter"}
    assert changed(seed=1) == {"mlm", "mlm:gap"}
    assert changed(max_length=32) == {"mlm", "mlm:gap", "pseudo_perplexity"}
    assert changed(neutral=["She reads."]) == {"pseudo_perplexity"}
    assert changed(text_sets={"gap": TEXTS}) == {"mlm:gap"}


def test_folders_are_described_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def evaluate(model: Any, tokenizer: Any, path: Path, **options: Any) -> dict[str, Any]:
        calls.append((path, options))
        return {"items": "x"}

    fake = SimpleNamespace(DEFINITION="d", evaluate=evaluate)
    for name in ("seat", "downstream"):
        monkeypatch.setitem(PARTS, name, fake)
        (tmp_path / name).mkdir()
    (tmp_path / "seat" / "sent-weat6.jsonl").write_text("{}")
    both = Suite([], [], seat=tmp_path / "seat", downstream=tmp_path / "downstream")
    before = both.describe()
    assert list(before) == ["seat", "downstream"]
    assert both.measure(None, None) == {"seat": {"items": "x"}, "downstream": {"items": "x"}}
    assert calls == [(tmp_path / "seat", {}), (tmp_path / "downstream", {"max_length": 64, "seed": 0})]
    (tmp_path / "seat" / "sent-weat6.jsonl").rename(tmp_path / "seat" / "sent-weat7.jsonl")
    assert both.describe()["seat"] != before["seat"]
    assert both.describe()["downstream"] == before["downstream"]


def test_the_quick_part(tiny_model: Any, tiny_tokenizer: Any, measured: dict[str, Any]) -> None:
    quick = suite().held_out(tiny_model, tiny_tokenizer, detailed=False)
    assert quick.keys() == {"mlm"}
    assert quick["mlm"] == {k: v for k, v in measured["mlm"].items() if k != "per_text"}
    assert Suite([], []).held_out(tiny_model, tiny_tokenizer) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stereoset": Path("nowhere.json")}, "stereoset: there is no file nowhere.json"),
        ({"neutral": Path("nowhere.txt")}, "neutral: there is no file nowhere.txt"),
        ({"seat": FIXTURES / "stereoset.json"}, "seat: there is no folder .*stereoset.json"),
        ({"downstream": Path("nowhere")}, "downstream: there is no folder nowhere"),
        (
            {"stereoset_tasks": ["both"]},
            "stereoset_tasks: must be among intrasentence, intersentence, got both",
        ),
        ({"crows_pairs_forms": ["x", "y"]}, "crows_pairs_forms: must be among original, differing, got x, y"),
        (
            {"text_sets": {"a.b": TEXTS}},
            "text_sets: a name needs a letter and neither '.' nor ':', got 'a.b'",
        ),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suite(**changes)


def test_files_of_a_data_directory(tmp_path: Path) -> None:
    assert find_benchmarks(None, seat=None, neutral=Path("a")) == {"seat": None, "neutral": Path("a")}
    for name in ("stereoset/dev.jsonl", "neutral.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "seat").mkdir()
    assert find_benchmarks(tmp_path, stereoset=None, seat=None, neutral=Path("a"), downstream=None) == {
        "stereoset": tmp_path / "stereoset" / "dev.jsonl", "seat": tmp_path / "seat", "neutral": Path("a"),
        "downstream": None,
    }  # fmt: skip
    assert benchmark_files(None, Path("b"), tmp_path) == (tmp_path / "stereoset" / "dev.jsonl", Path("b"))
    with pytest.raises(ValueError, match="data_dir: there is no folder nowhere"):
        find_benchmarks(Path("nowhere"))


# What people read


def test_the_headline(measured: dict[str, Any]) -> None:
    lines = headline(measured).splitlines()
    assert f"{'StereoSet SS':<44} {measured['stereoset']['overall']['ss']:.1f} %" in lines
    assert (
        f"{'StereoSet intersentence (pll) SS':<44} {measured['stereoset_inter']['overall']['ss']:.1f} %"
        in lines
    )
    assert (
        f"{'loss of the worst group':<44} {measured['mlm']['by_group'][measured['mlm']['worst_group']]['loss']:.3f} nats"
        in lines
    )
    assert sum("Blodgett" in line for line in lines) == 1
    assert headline({}) == ""


def test_the_report_has_every_part(measured: dict[str, Any], tmp_path: Path) -> None:
    results = {"start": {"evaluation": measured}, "runs": {"erm": {"evaluation": measured}}}
    text = report.write_report(tmp_path, results).read_text()
    further = text[text.index("## Further measures") : text.index("## How differences are judged")]
    for words in (
        "**mlm:gap**", "| gap: loss of pronoun |", "**stereoset_inter**: StereoSet intersentence", "pll variant",
        "**crows_pairs_differing**", "> **Warning.** Blodgett", "| pseudo-perplexity of neutral text |",
    ):  # fmt: skip
        assert words in further
    assert "pseudo-perplexity" in report.comparison_table(results)


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_reads_a_next_sentence_head(tiny_tokenizer: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    BertForPreTraining(BertConfig(vocab_size=len(tiny_tokenizer), **sizes)).save_pretrained(tmp_path / "both")
    tiny_tokenizer.save_pretrained(tmp_path / "both")
    out = tmp_path / "metrics.json"
    result = call("evaluate", tmp_path / "both", "--stereoset", FIXTURES / "stereoset.json", "--stereoset-tasks", "both",
                  "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["evaluation"]
    assert found["stereoset_inter"]["variant"] == "nsp"
    # The rest is what the masked language model alone gives.
    model, tokenizer = load(tmp_path / "both")
    assert suite().measure(model, tokenizer, ["stereoset"])["stereoset"] == found["stereoset"]


def test_the_command(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_tiny_model: Any,
    tiny_tokenizer: Any,
) -> None:
    out = tmp_path / "metrics.json"
    (tmp_path / "neutral.txt").write_text("The house is near the river.\n\nAfter work at home.\n")
    common = [
        "evaluate",
        tiny_model_dir,
        "--stereoset",
        FIXTURES / "stereoset.json",
        "--out",
        out,
        "--device",
        "cpu",
    ]
    result = call(*common, "--stereoset-tasks", "both")
    assert result.exit_code == 0, result.output
    assert list(json.loads(out.read_text())["evaluation"]) == ["stereoset", "stereoset_inter"]

    counter = Counter(monkeypatch)
    more = ["--stereoset-tasks", "both", "--crows-pairs", FIXTURES / "crows_pairs.csv", "--crows-pairs-form", "differing",
            "--neutral", tmp_path / "neutral.txt", "--resume"]  # fmt: skip
    result = call(*common, *more)
    assert result.exit_code == 0, result.output
    assert counter.calls == ["crows_pairs_differing", "pseudo_perplexity"]
    record = json.loads(out.read_text())
    assert (
        list(record["suite"])
        == list(record["evaluation"])
        == ["stereoset", "stereoset_inter", *counter.calls]
    )
    assert "pseudo-perplexity of neutral text" in result.stdout
    assert "Blodgett" in result.stdout
    model, tokenizer = load(tiny_model_dir)
    expected = suite(neutral=tmp_path / "neutral.txt").measure(model, tokenizer, ["crows_pairs_differing"])
    assert record["evaluation"]["crows_pairs_differing"] == expected["crows_pairs_differing"]

    make_tiny_model(len(tiny_tokenizer), num_hidden_layers=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    other = call(
        "evaluate", tmp_path / "other", "--stereoset", FIXTURES / "stereoset.json", "--out", out, "--resume"
    )
    assert other.exit_code == 2
    assert "is not of this model; leave --resume out to replace it" in other.stderr
    assert json.loads(out.read_text()) == record
