"""Intervals, verdicts, and what a report says and draws."""

from __future__ import annotations

import json
import math
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustdebias import plots, report
from robustdebias.comparison import Metric, compare
from robustdebias.evaluation import bootstrap
from robustdebias.evaluation.stereoset import Term, score_terms

GROUPS = ["gender:female", "gender:male", "religion:muslim", "other"]
PNG = b"\x89PNG\r\n\x1a\n"


def mlm(shift: float = 0.0, seed: int = 0, texts: int = 120, names: list[str] = GROUPS) -> dict[str, Any]:
    """As ``mlm.evaluate`` returns it: the texts differ in difficulty, and ``shift`` moves all of them alike."""
    draw = random.Random(7)
    noise = random.Random(seed)
    rows, by_group = [], []
    for text in range(texts):
        count = draw.randint(3, 9)
        own = [group for group in range(len(names)) if draw.random() < 0.4 / (1 + group)] or [len(names) - 1]
        loss = draw.gauss(3, 0.5) + 0.1 * own[0] + shift + noise.gauss(0, 0.01)
        rows.append([loss * count, count])
        by_group += [[text, group, loss * count, count] for group in own]
    scores = {name: _loss([r[2:] for r in by_group if r[1] == group]) for group, name in enumerate(names)}
    losses = {name: stats["loss"] for name, stats in scores.items()}
    overall, worst = _loss(rows), max(losses, key=losses.__getitem__)
    return {
        "overall": overall, "by_group": scores, "worst_group": worst, "items": "texts",
        "gap": {
            "worst_minus_best": losses[worst] - min(losses.values()),
            "worst_minus_overall": losses[worst] - overall["loss"],
        },
        "per_text": {"overall": rows, "by_group": by_group}, "definition": "",
    }  # fmt: skip


def _loss(rows: list[list[float]]) -> dict[str, Any]:
    mean = sum(row[0] for row in rows) / sum(row[1] for row in rows)
    return {
        "loss": mean,
        "perplexity": math.exp(mean),
        "accuracy": 0.3,
        "count": sum(int(r[1]) for r in rows),
    }


def stereoset(rate: float, seed: int = 0) -> dict[str, Any]:
    """``rate``: share of stereotypes preferred. The same items are close calls whatever the rate."""
    draw = random.Random(3)
    noise = random.Random(seed)
    terms = []
    for number in range(20):
        domain = ("gender", "race")[number % 2]
        pro = [int(draw.random() + noise.gauss(0, 0.02) < rate) for _ in range(25)]
        terms.append(Term(domain, f"term {number}", pro, [draw.choice((0, 1, 2, 2)) for _ in range(25)]))
    domains = {domain: score_terms([t for t in terms if t.domain == domain]) for domain in ("gender", "race")}
    return {
        "overall": score_terms(terms), "by_domain": domains, "per_term": [vars(term) for term in terms],
        "items": "items", "definition": "",
    }  # fmt: skip


def crows_pairs() -> dict[str, Any]:
    outcomes = {"gender": [1, 0, 1, 1] * 5, "age": [0, 1] * 5}

    def scores(won: list[int]) -> dict[str, Any]:
        return {
            "score": 100 * sum(won) / len(won),
            "stereo": None,
            "antistereo": None,
            "count": len(won),
            "neutral": 0,
        }

    return {
        "variant": "original", "overall": scores([*outcomes["gender"], *outcomes["age"]]), "outcomes": outcomes,
        "by_type": {kind: scores(won) for kind, won in outcomes.items()}, "items": "pairs",
    }  # fmt: skip


def history(objective: str, steps: int = 20) -> list[dict[str, Any]]:
    records = []
    for step in range(1, steps + 1):
        weights = (
            [0.25, 0.25, 0.25, 0.25] if objective == "erm" else [0.2, 0.2, 0.2 + step / 100, 0.4 - step / 100]
        )
        record: dict[str, Any] = {
            "step": step, "loss": 4 - step / 20,
            "group_loss": {name: 4 - step / 20 + g / 10 for g, name in enumerate(GROUPS) if step % (g + 1) == 0},
            "group_count": {name: 10 for g, name in enumerate(GROUPS) if step % (g + 1) == 0},
            "group_weight": dict(zip(GROUPS, weights, strict=True)),
        }  # fmt: skip
        if step % 5 == 0:
            record["evaluation"] = {"mlm": mlm(1 - step / 20)}
        records.append(record)
    return records


def run(objective: str, **evaluation: Any) -> dict[str, Any]:
    return {
        "config": {"train": {"objective": objective, "lr": 1e-4, "seed": 0}, "data": {"texts": 100}},
        "history": history(objective), "evaluation": evaluation,
        "train_seconds": 90.0, "tokens_per_second": 1234.5,
    }  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return {
        "title": "A trial",
        "start": {"evaluation": {"mlm": mlm(1.5), "stereoset": stereoset(0.60)}},
        "runs": {
            "erm": run("erm", mlm=mlm(0.0), stereoset=stereoset(0.72, seed=1)),
            "group_dro": run("group_dro", mlm=mlm(-0.1, seed=2), stereoset=stereoset(0.60, seed=2)),
        },
        "groups": {
            "names": GROUPS, "texts": 100, "words": 2000, "group_texts": [40, 30, 5, 25],
            "group_words": [800, 600, 100, 500], "mentions": [50, 40, 6, 0], "overlap": [],
        },
        "environment": {
            "torch": "2.13", "undefined": math.nan, "numpy": np.float32(0.5), "several": (1, np.int64(2), math.inf),
            "path": Path("x"),
        },
        "notes": ["The texts are made up."],
    }  # fmt: skip


@pytest.fixture(scope="module")
def written(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report."""
    return report.write_report(tmp_path_factory.mktemp("report") / "out", results).parent


# Intervals


def test_draws_are_centred_on_the_scores(results: dict[str, Any]) -> None:
    evaluation = {**results["runs"]["erm"]["evaluation"], "crows_pairs": crows_pairs()}
    values, draws = bootstrap.values(evaluation), bootstrap.draws(evaluation)
    assert values.keys() == draws.keys()
    assert values["stereoset.overall.ss"] == evaluation["stereoset"]["overall"]["ss"]
    assert values["mlm.worst"] == evaluation["mlm"]["by_group"][evaluation["mlm"]["worst_group"]]["loss"]
    for name, value in values.items():
        assert draws[name].shape == (bootstrap.DRAWS,)
        if name not in ("mlm.worst", "mlm.gap") and not name.endswith(
            "icat"
        ):  # maxima and minima are not unbiased
            assert draws[name].mean() == pytest.approx(value, abs=0.1 * draws[name].std())


def test_an_interval_is_as_wide_as_theory_says() -> None:
    """One term with 100 items of which 70 are pro: the standard deviation of the mean is sqrt(0.7 * 0.3 / 100)."""
    term = Term("race", "one", [1] * 70 + [0] * 30, [2] * 50 + [1] * 50)
    evaluation = {"stereoset": {"overall": score_terms([term]), "by_domain": {}, "per_term": [vars(term)]}}
    low, high = bootstrap.interval(bootstrap.draws(evaluation)["stereoset.overall.ss"])
    half = 1.96 * 100 * math.sqrt(0.7 * 0.3 / 100)
    assert (low, high) == pytest.approx((70 - half, 70 + half), abs=0.6)
    low, high = bootstrap.interval(bootstrap.draws(evaluation)["stereoset.overall.lms"])
    half = 1.96 * 50 * math.sqrt(0.25 / 100)
    assert (low, high) == pytest.approx((75 - half, 75 + half), abs=0.6)


def test_a_term_of_two_domains_is_one_term() -> None:
    terms = [
        Term("race", "one", [1] * 30, [2] * 30),
        Term("gender", "one", [0] * 10, [2] * 10),
        Term("race", "two", [0] * 10, [0] * 10),
    ]
    evaluation = {
        "stereoset": {"overall": score_terms(terms), "by_domain": {}, "per_term": [vars(t) for t in terms]}
    }
    assert evaluation["stereoset"]["overall"]["ss"] == 37.5  # (3/4 + 0) / 2
    draws = bootstrap.draws(evaluation)
    # Within each domain and term all items agree, so every draw is the same.
    assert set(draws["stereoset.overall.ss"]) == {37.5}
    assert set(draws["stereoset.race.ss"]) == {50}


def test_losses_as_a_slow_bootstrap() -> None:
    """Texts drawn one by one from another generator: the intervals agree, but for chance."""
    evaluation = mlm(texts=60)
    names, texts = list(evaluation["by_group"]), evaluation["per_text"]
    own: dict[int, list[tuple[int, float, int]]] = {}
    for text, group, total, count in texts["by_group"]:
        own.setdefault(text, []).append((group, total, count))
    draw = random.Random(11)
    found: dict[str, list[float]] = {}
    for _ in range(3000):
        sums = [[0.0, 0] for _ in [*names, "overall"]]
        for text in draw.choices(range(60), k=60):
            for group, total, count in [*own[text], (len(names), *texts["overall"][text])]:
                sums[group][0] += total
                sums[group][1] += count
        losses = [total / count for total, count in sums if count]
        found.setdefault("mlm.overall", []).append(losses[-1])
        found.setdefault("mlm.worst", []).append(max(losses[:-1]))
        found.setdefault("mlm.gap", []).append(max(losses[:-1]) - min(losses[:-1]))
        found.setdefault(f"mlm.group.{names[0]}", []).append(losses[0])
    draws = bootstrap.draws({"mlm": evaluation})
    for name, values in found.items():
        ends = np.percentile(values, [2.5, 97.5])
        assert bootstrap.interval(draws[name]) == pytest.approx(
            tuple(ends), abs=0.12 * (ends[1] - ends[0])
        ), name


def test_a_group_that_is_rarely_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is undefined in draws without it; that neither spreads nor stops anything."""
    monkeypatch.setattr(bootstrap, "FEWEST", 1)
    draws = bootstrap.draws({"mlm": three_texts()})
    undefined = np.isnan(draws["mlm.group.a"])
    assert 0.2 < undefined.mean() < 0.4  # (2/3)^3
    assert np.isfinite(draws["mlm.overall"]).all()
    assert 0 < np.isnan(draws["mlm.worst"]).mean() < 0.1  # neither was drawn
    assert all(map(math.isfinite, bootstrap.interval(draws["mlm.worst"])))


def three_texts() -> dict[str, Any]:
    """The second text's group is the worst; the third is in no group."""
    evaluation = mlm(texts=3, names=["a", "b"])
    evaluation["per_text"] = {
        "overall": [[9.0, 9], [12.0, 3], [2.0, 1]], "by_group": [[0, 0, 9.0, 9], [1, 1, 12.0, 3]],
    }  # fmt: skip
    return evaluation


def test_few_items_get_no_interval() -> None:
    """A single text, drawn again and again, would have an interval of no width."""
    assert bootstrap.draws({"mlm": three_texts()}) == {}
    few = mlm(texts=40)
    few["per_text"]["by_group"] = [row for row in few["per_text"]["by_group"] if row[1] == 0 or row[0] < 3]
    few["per_text"]["by_group"].append([39, 3, 100.0, 1])  # a group of few texts is not the worst one
    drawn = bootstrap.draws({"mlm": few})
    assert drawn.keys() == {"mlm.overall", "mlm.group.gender:female", "mlm.worst"}  # and one group has no gap
    np.testing.assert_array_equal(drawn["mlm.worst"], drawn["mlm.group.gender:female"])
    terms = [Term("race", "one", [1] * 9, [2] * 9), Term("gender", "two", [0], [2])]
    part = {"overall": score_terms(terms), "by_domain": {}, "per_term": [vars(term) for term in terms]}
    assert {name.split(".")[1] for name in bootstrap.draws({"stereoset": part})} == {"overall"}
    pairs = {"crows_pairs": {"outcomes": {"age": [1] * 9, "gender": [0, 1] * 5}}}
    assert bootstrap.draws(pairs).keys() == {"crows_pairs.overall", "crows_pairs.gender"}


# Verdicts


def test_verdicts(results: dict[str, Any]) -> None:
    comparison = compare(results)
    assert comparison.names == ["start", "erm", "group_dro"]
    assert comparison.baseline == "erm"
    assert {(d.base, d.other) for d in comparison.differences} == {
        ("start", "erm"), ("start", "group_dro"), ("erm", "group_dro"),
    }  # fmt: skip
    loss = comparison.difference("erm", "group_dro", "mlm.overall")
    assert loss is not None
    assert (loss.value, loss.low, loss.high) == pytest.approx(
        (-0.1, -0.1, -0.1), abs=0.01
    )  # paired: hardly any width
    assert loss.verdict == "better"
    verdict = {
        (d.base, d.other): d.verdict
        for d in comparison.differences
        if d.metric.name == "stereoset.overall.ss"
    }
    assert verdict == {
        ("start", "erm"): "worse", ("start", "group_dro"): "no clear difference", ("erm", "group_dro"): "better",
    }  # fmt: skip


def two_runs(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {"runs": {"one": {"evaluation": first}, "two": {"evaluation": second}}}


def verdict(first: dict[str, Any], second: dict[str, Any], metric: str) -> str | None:
    found = compare(two_runs(first, second)).difference("one", "two", metric)
    return found.verdict if found else None


def test_a_sure_but_small_difference_is_slight() -> None:
    first, same, lower, higher = mlm(), mlm(), mlm(-0.02), mlm(0.02)
    assert verdict({"mlm": first}, {"mlm": same}, "mlm.overall") == "no clear difference"
    assert verdict({"mlm": first}, {"mlm": lower}, "mlm.overall") == "slightly better"
    assert verdict({"mlm": first}, {"mlm": higher}, "mlm.overall") == "slightly worse"
    assert verdict({"mlm": first}, {"mlm": mlm(0.2)}, "mlm.overall") == "worse"


def test_where_fifty_is_ideal_the_distance_is_judged() -> None:
    above, below, even = ({"stereoset": stereoset(rate)} for rate in (0.85, 0.15, 0.5))
    metric = "stereoset.overall.ss"
    assert verdict(above, even, metric) == verdict(below, even, metric) == "better"
    assert verdict(even, below, metric) == "worse"
    assert Metric.of(metric).badness(np.array([40.0, 50.0, 62.0])).tolist() == [10, 0, 12]
    assert [Metric.of(m).ideal for m in ("mlm.gap", "stereoset.race.ss", "stereoset.race.lms", "crows_pairs.age")] == [
        "low", "50", "100", "50",
    ]  # fmt: skip


def test_runs_on_other_items_are_not_compared() -> None:
    other = {**mlm(-0.2), "items": "others"}
    assert verdict({"mlm": mlm()}, {"mlm": other}, "mlm.overall") is None
    bare = {key: value for key, value in mlm(-0.2).items() if key != "per_text"}
    found = compare(two_runs({"mlm": mlm()}, {"mlm": bare})).difference("one", "two", "mlm.overall")
    assert found is not None
    assert (found.low, found.verdict) == (None, "no interval")
    assert found.value == pytest.approx(-0.2)


# The report


def test_the_report(results: dict[str, Any], written: Path) -> None:
    path = written / "report.md"
    text = path.read_text()
    assert text.startswith("# A trial\n")
    for words in (
        "ERM is plain fine-tuning", "50 is ideal", "lower the better", "one in twenty", "The texts are made up.",
        "StereoSet", "worst group", "religion:muslim", "| steps | 20 | 20 |", "- torch: 2.13", "| 40.0% |",
    ):  # fmt: skip
        assert words in text
    assert "CrowS" not in text
    ss = results["runs"]["group_dro"]["evaluation"]["stereoset"]["overall"]["ss"]
    assert re.search(rf"\| StereoSet SS \| 50 \|.*\| {ss:.1f} \|.*closer to 50 \|", text)
    pictures = re.findall(r"\]\((\w+\.png)\)", text)
    assert pictures == [
        "overview.png",
        "held_out_loss.png",
        "bias.png",
        "group_weights.png",
        "group_losses.png",
    ]
    assert {file.name for file in written.iterdir()} == {"report.md", "metrics.json", *pictures}
    assert all((written / name).read_bytes().startswith(PNG) for name in pictures)
    for line in text.splitlines():  # every table row has as many cells as its heading
        if line.startswith("| ") and "ideal" in line:
            columns = line.count("|")
        if line.startswith(("| StereoSet", "| loss of")):
            assert line.count("|") == columns


def test_metrics_json(written: Path) -> None:
    """Sorted keys, finite numbers or null, no outcomes of single items; scores with their intervals and verdicts."""
    text = (written / "metrics.json").read_text()
    metrics = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert metrics["environment"] == {
        "torch": "2.13", "undefined": None, "numpy": 0.5, "several": [1, 2, None], "path": "x",
    }  # fmt: skip
    assert text == json.dumps(metrics, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    assert not re.search(r'"(per_text|per_term|history)"', text)
    assert metrics["runs"]["erm"]["evaluation"]["mlm"]["worst_group"] in GROUPS
    score = metrics["scores"]["erm"]["stereoset.overall.ss"]
    assert score["interval"][0] < score["value"] < score["interval"][1]
    found = [
        d
        for d in metrics["differences"]
        if (d["base"], d["other"], d["score"]) == ("erm", "group_dro", "mlm.overall")
    ]
    assert [d["verdict"] for d in found] == ["better"]


def test_the_same_results_give_the_same_bytes(results: dict[str, Any], written: Path, tmp_path: Path) -> None:
    report.write_report(tmp_path, results)
    for file in written.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


def test_crows_pairs_comes_with_its_warning(tmp_path: Path) -> None:
    results = two_runs({"crows_pairs": crows_pairs()}, {"crows_pairs": crows_pairs()})
    text = report.write_report(tmp_path, results, svg=True).read_text()
    assert (tmp_path / "bias.svg").read_text().count("CrowS-Pairs (unreliable)") == 1
    assert "> **Warning.** Blodgett et al. (2021" in text
    assert "Warning: Blodgett et al. (2021" in report.comparison_table(results)


@pytest.mark.parametrize(
    "results",
    [
        {"runs": {"only": {}}},
        {"runs": {"only": {"config": {"objective": "group_dro"}, "history": history("group_dro")[:1]}}},
        {"runs": {"a|b": {"evaluation": {"stereoset": stereoset(0.5)}}}, "start": {"evaluation": {"mlm": mlm()}}},
        {"runs": {"r": {"history": [{"step": 1, "loss": math.nan, "group_loss": {"x": math.nan}, "group_weight": {"x": 1.0}}]}}},
    ],
)  # fmt: skip
def test_what_is_missing_is_left_out(results: dict[str, Any], tmp_path: Path) -> None:
    text = report.write_report(tmp_path, results).read_text()
    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert (tmp_path / name).is_file()
    assert "nan" not in text
    json.loads((tmp_path / "metrics.json").read_text())
    report.comparison_table(results)


def test_no_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="results: there are no runs to report"):
        report.write_report(tmp_path / "out", {"runs": {}})
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.md").write_text("old")
    (tmp_path / "metrics.json").write_text("old")

    def full_disk(self: Path, content: bytes) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        report.write_report(tmp_path, {"runs": {"r": {"history": history("erm")[:2]}}})
    assert (tmp_path / "report.md").read_text() == (tmp_path / "metrics.json").read_text() == "old"


def test_the_table_for_the_terminal(results: dict[str, Any]) -> None:
    table = report.comparison_table(results)
    heading, rule, first, *_ = table.splitlines()
    assert heading.split() == ["ideal", "start", "ERM", "Group", "DRO", "Group", "DRO", "-", "ERM"]
    assert set(rule) == {"-"}
    assert first.startswith("loss of all tokens")
    assert first.endswith("better")
    assert "gender:female" not in table  # groups are the report's
    assert "StereoSet SS, gender" in table
    assert table.isascii()


# Pictures


@pytest.mark.parametrize("count", [1, 2, 15])
def test_any_number_of_groups_is_drawn(count: int) -> None:
    names = [f"domain:${number}$" for number in range(count - 1)] + ["other"]
    weights = dict.fromkeys(names, 1 / count)
    records = [
        {"step": s, "loss": 3.0, "group_loss": dict.fromkeys(names, 3.0), "group_weight": weights}
        for s in (1, 2)
    ]
    results = {"runs": {
        "erm": {"config": {"objective": "erm"}, "evaluation": {"mlm": mlm(names=names)}, "history": records},
        "group_dro": {"evaluation": {"mlm": mlm(0.1, names=names)}, "history": records},
    }}  # fmt: skip
    figures = plots.draw_all(results, compare(results))
    assert list(figures) == ["overview", "held_out_loss", "group_weights", "group_losses"]
    labels = {text.get_text() for text in figures["group_weights"].axes[0].texts}
    assert labels == {*names, "(equal weights)"}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.001, 0.2))
def test_names_of_lines_keep_their_distance(heights: list[float], gap: float) -> None:
    wanted = sorted(heights)
    placed = plots._spread(wanted, gap)
    assert all(above - below >= gap - 1e-9 for below, above in pairwise(placed))
    assert placed[0] >= 0
    if (len(wanted) - 1) * gap <= 1:
        assert placed[-1] <= 1 + 1e-9
    if all(above - below >= gap for below, above in pairwise(wanted)):
        assert placed == wanted


def test_training_curves_are_a_moving_mean_by_tokens() -> None:
    records = [
        {"step": 1, "group_loss": {"a": 4.0}, "group_count": {"a": 10}},
        {"step": 2, "group_loss": {"a": 1.0, "b": 2.0}, "group_count": {"a": 20, "b": 5}},
        {"step": 3, "group_loss": {}, "group_count": {}},
    ]
    curves = plots._training_curves(records * 10)  # 30 steps: each step keeps 2/3 of what was
    assert curves["b"][0][0] == 2
    assert curves["b"][1] == pytest.approx([2.0] * 29)
    assert curves["a"][1][:3] == pytest.approx([4.0, 46.6667 / 26.6667, 46.6667 / 26.6667], rel=1e-4)
    assert plots._training_curves(records[:1])["a"] == ([1], [4.0])
