"""The bias card: every number where it belongs, in both forms; nothing that a reader's browser could stumble over."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from card_reader import Page, pages, rows_below, trimmed
from markdown_it import MarkdownIt

from robustdebias.experiments.card import write_card
from robustdebias.experiments.card_text import number

FIXTURE = Path(__file__).parent / "fixtures" / "experiment_summary.json"
Summary = dict[str, Any]


@pytest.fixture(scope="module")
def original() -> Summary:
    summary: Summary = json.loads(FIXTURE.read_text(encoding="utf-8"))
    return summary


@pytest.fixture
def summary(original: Summary) -> Summary:
    """To be changed by a test."""
    return copy.deepcopy(original)


@pytest.fixture(scope="module")
def written(original: Summary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("card")
    assert write_card(out, original) == (out / "card.md", out / "card.html")
    return out


@pytest.fixture(scope="module")
def forms(written: Path) -> list[Page]:
    return pages(written)


def printed(value: float, digits: int, sign: bool = False) -> str:
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return "0." + "0" * digits if set(text) <= set("+-0.") else text.replace("-", "−")


# Numbers.


def test_numbers_as_people_read_them() -> None:
    assert number(1234.5, 1) == "1,234.5"
    assert number(-0.0304, 3, "+") == "−0.030"
    assert number(0.0304, 3, "+") == "+0.030"
    assert number(-0.0004, 3, "+") == number(0.0004, 3, "+") == "0.000"
    assert number(-1234, 0, "+") == "−1,234"


def test_both_forms_have_the_same_tables(forms: list[Page]) -> None:
    markdown, html = forms
    assert len(html.tables) == 13
    assert trimmed(markdown.tables) == trimmed(html.tables)


def test_every_score_and_change_is_in_its_place(original: Summary, forms: list[Page]) -> None:
    """All means, intervals and verdicts, calculated here from the summary's rows."""
    methods = ["start", *original["methods"]]
    labels = ["untouched model", *(method["label"] for method in original["methods"].values())]
    for name, metric in original["metrics"].items():
        ideal = {"low": "lower is better", "high": "higher is better"}.get(
            metric["ideal"], f"{metric['ideal']} is ideal"
        )
        label = f"{metric['label']} ({', '.join(filter(None, (metric['unit'], ideal)))})"
        expected = [["score"], ["against ERM"], ["against the untouched model"]]
        for method in methods:
            rows = [s for s in original["scores"] if (s["method"], s["metric"]) == (method, name)]
            assert len(rows) == (1 if method == "start" else 3)
            value, low, high = (
                printed(fmean(r[end] for r in rows), metric["digits"]) for end in ("value", "low", "high")
            )
            expected[0].append(f"{value} ({low} to {high})")
            for row, base in zip(expected[1:], ("erm", "start"), strict=True):
                found = [d for d in original["differences"]
                         if (d["method"], d["base"], d["metric"]) == (method, base, name)]  # fmt: skip
                row.append(change(found[0], metric["digits"]) if found else "–")
        for page in forms:
            assert rows_below(page, ["", *labels], label) == expected


def change(difference: Summary, digits: int, verdict: bool = True) -> str:
    # As many digits as show that an interval leaves out zero, two more at the most.
    ends = difference["low"], difference["high"]
    if ends[0] > 0 or ends[1] < 0:
        digits = next((d for d in (digits, digits + 1) if all(round(e, d) for e in ends)), digits + 2)
    value, low, high = (printed(difference[key], digits, sign=True) for key in ("mean", "low", "high"))
    symbol = {"better": "✓", "worse": "✗", "change": "≈"}[difference["verdict"].split()[-1]]
    return f"{value} ({low} to {high})" + f" {symbol} {difference['verdict']}" * verdict


def test_findings_name_every_headline_metric_under_its_verdict(original: Summary, forms: list[Page]) -> None:
    units = {"nats": " nats", "%": " points", "": ""}
    labels = {name: method["label"] for name, method in original["methods"].items()}
    expected: dict[str, dict[str, set[str]]] = {}
    for difference in original["differences"]:
        metric = original["metrics"][difference["metric"]]
        pair = difference["method"], difference["base"]
        if not metric["headline"] or (pair[1] == "start" and pair[0] != "erm"):
            continue
        text = change(difference, metric["digits"], verdict=False).replace(" (", f"{units[metric['unit']]} (")
        title = f"{labels[pair[0]]} against {'ERM' if pair[1] == 'erm' else 'the untouched model'}"
        verdicts = expected.setdefault(title, {})
        verdicts.setdefault(difference["verdict"], set()).add(f"{metric['label']} {text}")
    assert {verdict for verdicts in expected.values() for verdict in verdicts} == {
        "better", "slightly better", "no significant change", "worse",
    }  # fmt: skip
    for page in forms:
        found: dict[str, dict[str, set[str]]] = {}
        for place, item in enumerate(page.items):
            if matched := re.match(
                r"[✓≈✗] (better|slightly better|no significant change|worse) ?:? (.*)", item
            ):
                told = {re.sub(r" ?;$", "", text) for text in re.split(r"(?<=\))\s*; ", matched[2])}
                found.setdefault(page.titles[place], {})[matched[1]] = told
        assert found == expected


def test_a_clear_difference_never_looks_as_if_it_touched_zero(forms: list[Page]) -> None:
    """Its interval ends at -0.04, which one digit would show as 0.0."""
    for page in forms:
        row = rows_below(page, page.tables[4][0], "StereoSet SS (%, 50 is ideal)")[1]
        assert row[3] == "−0.87 (−1.70 to −0.04) ✓ slightly better"


def test_means_of_the_summary_go_before_our_own(summary: Summary, tmp_path: Path) -> None:
    summary["means"] = [
        {"grouping": "labels", "method": "erm", "metric": "seat.overall", "value": 0.9, "low": 0.25, "high": 1.75}
    ]  # fmt: skip
    write_card(tmp_path, summary)
    for page in pages(tmp_path):
        table = next(table for table in page.tables if ["SEAT, mean |d| (0 is ideal)"] in trimmed([table])[0])
        assert table[2][2] == "0.900 (0.250 to 1.750)"
        assert table[2][1].startswith("0.3")


def test_seed_by_seed(original: Summary, forms: list[Page]) -> None:
    losses = [s["value"] for s in original["scores"] if (s["method"], s["metric"]) == ("cda", "mlm.worst")]
    changes = next(d["per_seed"] for d in original["differences"]
                   if (d["method"], d["base"], d["metric"]) == ("cda", "erm", "mlm.worst"))  # fmt: skip
    head = ["", "seed 0", "seed 1", "seed 2", "standard deviation"]
    for page in forms:
        rows = rows_below(page, head, "loss of the worst group (nats, lower is better)")
        assert rows[1] == ["CDA", *(printed(v, 3) for v in losses), printed(float(np.std(losses, ddof=1)), 3)]
        spread = printed(float(np.std(changes, ddof=1)), 3)
        assert rows[4] == ["CDA − ERM", *(printed(v, 3, sign=True) for v in changes), spread]


def test_groups_and_methods(original: Summary, forms: list[Page]) -> None:
    for page in forms:
        assert page.tables[2][1] == ["all texts", "14,056", "100.0%", "2,810", "–"]
        # 287 of 14,056 texts
        assert ["religion: muslim", "287", "2.0%", "58", "6,612"] in page.tables[2]
        assert page.tables[3][1][:4] == [
            "ERM (baseline)",
            "plain mean over masked tokens",
            "objective erm",
            "400",
        ]
        seconds = [run["seconds"] for run in original["training"] if run["method"] == "group_dro"]
        assert page.tables[3][4][4] == f"{fmean(seconds) / 60:.1f}"


# What may be missing, hostile or wrong.


def test_names_are_shown_as_written(summary: Summary, tmp_path: Path) -> None:
    script, marks = "<script>alert(1)</script>", "a|b*c_"
    text = json.dumps(summary).replace("religion: muslim", script).replace("religion: jewish", marks)
    summary = json.loads(text)
    summary["title"] = "<b>*bold*</b> & $x_1$ `code`"
    summary["description"] = "# no heading\n\n- no list\n\n1. no list"
    summary["config_text"] = "```\n</code></pre><script>alert(2)</script>\n````\n"
    summary["methods"]["cda"]["label"] = "[C](DA)|_"
    summary["caveats"] = ["![x](y.png) <img src=x>"]
    write_card(tmp_path, summary)
    markdown, html = pages(tmp_path)
    assert trimmed(markdown.tables) == trimmed(html.tables)
    for page in (markdown, html):
        assert not page.has("script", "b", "ol", "em", "i")
        assert {script, marks} <= {row[0] for row in page.tables[2]}
        assert page.tables[3][2][0] == "[C](DA)|_"
        assert f"loss of {script} (nats, lower is better)" in {row[0] for t in page.tables for row in t}
        assert "h1 <b>*bold*</b> & $x_1$ `code`" in " ".join(page.outline)
        assert "![x](y.png) <img src=x>" in page.items
        assert len(page.has("img")) == 5
    tokens = (
        MarkdownIt("commonmark").enable("table").parse((tmp_path / "card.md").read_text(encoding="utf-8"))
    )
    kinds = {inner.type for token in tokens for inner in (token, *(token.children or ()))}
    assert not kinds & {"html_block", "html_inline"}
    fences = [token.content for token in tokens if token.type == "fence"]
    assert fences == [summary["command"] + "\n", summary["config_text"]]


def empty(summary: Summary) -> None:
    summary |= {
        "scores": [], "differences": [], "training": [], "definitions": {}, "warnings": [], "caveats": [],
        "environment": {}, "interval_rule": "", "description": "", "command": "",
    }  # fmt: skip
    summary["data"] |= {"corpora": [], "text_sets": []}


def start_only(summary: Summary) -> None:
    summary["scores"] = [score for score in summary["scores"] if score["method"] == "start"]
    summary |= {"differences": [], "training": []}


def one_run(summary: Summary) -> None:
    """One method, one seed, nothing before it, no intervals."""
    summary["scores"] = [{**s, "low": None, "high": None} for s in summary["scores"]
                         if (s["method"], s["seed"]) == ("erm", 0)]  # fmt: skip
    summary |= {
        "differences": [],
        "seeds": [0],
        "methods": {"erm": summary["methods"]["erm"]},
        "training": [],
    }


def no_intervals(summary: Summary) -> None:
    for row in summary["differences"]:
        row |= {"low": None, "high": float("nan"), "verdict": "no interval"}


def no_groups(summary: Summary) -> None:
    summary["groupings"]["labels"] |= {"names": [], "folded": []}
    gone = [name for name in summary["metrics"] if name.startswith("mlm.")]
    for rows in ("scores", "differences"):
        summary[rows] = [row for row in summary[rows] if row["metric"] not in gone]


@pytest.mark.parametrize(
    ("change_it", "pictures"),
    [
        (empty, set()),
        (start_only, {"group_loss", "bias"}),
        (one_run, {"group_loss", "bias"}),
        (no_intervals, {"differences", "group_loss", "bias", "trade_off", "group_weights"}),
        (no_groups, {"differences", "bias"}),
    ],
)
def test_missing_parts_leave_no_empty_section(
    summary: Summary, tmp_path: Path, change_it: Callable[[Summary], None], pictures: set[str]
) -> None:
    change_it(summary)
    write_card(tmp_path, summary)
    assert {path.stem for path in (tmp_path / "plots").glob("*.png")} == pictures
    for page in pages(tmp_path):
        assert all(len(table) > 1 for table in page.tables)
        assert len(page.has("img")) == len(pictures)
        for heading, following in zip(page.outline, [*page.outline[1:], "h1"], strict=True):
            if heading != ".":  # text, or a heading one level down
                assert following == "." or following[1] > heading[1], (
                    f"{heading!r} is followed by {following!r}"
                )
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "None" not in text
    assert "nan" not in re.sub(r"finan|\w+nan\w*", "", text)


def test_several_groupings_are_told_apart(summary: Summary, tmp_path: Path) -> None:
    summary["groupings"] |= {"labels/2": summary["groupings"]["labels"], "?": summary["groupings"]["labels"]}
    for rows in ("scores", "differences", "training"):
        summary[rows] += [{**row, "grouping": other} for row in summary[rows] for other in ("labels/2", "?")]
    write_card(tmp_path, summary)
    markdown, html = pages(tmp_path)
    assert trimmed(markdown.tables) == trimmed(html.tables)
    sources = [str(image["src"]) for image in markdown.has("img")]
    assert len(set(sources)) == 15
    assert "plots/group_loss-labels-2.png" in sources
    assert all((tmp_path / source).is_file() for source in sources)
    titles = {"Group DRO against ERM (groups: labels/2)", "Group DRO against ERM (groups: ?)"}
    assert titles <= set(markdown.titles.values()) & set(html.titles.values())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("title"), "title: Field required"),
        (lambda s: s["metrics"]["mlm.gap"].pop("digits"), "metrics.mlm.gap.digits: Field required"),
        (lambda s: s["metrics"]["mlm.gap"].update(ideal="51"), "metrics.mlm.gap.ideal: Input should be 'low', 'high'"),
        (lambda s: s["differences"][3].update(verdict="great"), "differences.3.verdict: Input should be 'better'"),
        (lambda s: s["scores"][2].update(method="adam"), "method: 'adam' in .* is none of cda, erm, group_dro"),
        (lambda s: s["scores"][2].update(metric="mlm.best"), "metric: 'mlm.best' in .* is none of crows_pairs.age"),
        (lambda s: s["differences"][2].update(base="sgd"), "base: 'sgd' in .* is none of cda, erm"),
        (lambda s: s["training"][0].update(grouping="x"), "grouping: 'x' in .* is none of labels"),
        (lambda s: s.update(methods={}, scores=[], differences=[], training=[]), "methods: there are none"),
    ],
)  # fmt: skip
def test_a_wrong_summary_is_refused_before_anything_is_overwritten(
    summary: Summary, tmp_path: Path, damage: Callable[[Summary], Any], message: str
) -> None:
    (tmp_path / "card.md").write_text("an earlier card")
    damage(summary)
    with pytest.raises(ValueError, match=f"^summary: .*{message}"):
        write_card(tmp_path, summary)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("card.md", "an earlier card")]


# Files.


def test_the_same_summary_gives_the_same_bytes(original: Summary, written: Path, tmp_path: Path) -> None:
    write_card(tmp_path, original)
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()) == files
    assert len(files) == 2 + 2 * 5  # and nothing partial
    for file in files:
        assert (tmp_path / file).read_bytes() == (written / file).read_bytes(), file


def test_the_page_needs_nothing_from_outside(written: Path, forms: list[Page]) -> None:
    text = (written / "card.html").read_text(encoding="utf-8")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    page = forms[1]
    assert not page.has("script", "link", "iframe", "object", "base", "form")
    targets = [value for _, attributes in page.tags for key, value in attributes.items()
               if key in ("src", "href", "srcset", "poster", "data", "action", "background")]  # fmt: skip
    assert len(targets) == 6
    assert all(str(target).startswith(("data:image/png;base64,", "#")) for target in targets)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {str(target)[1:] for target in targets if str(target)[0] == "#"} <= ids


def test_the_page_can_be_read_aloud(forms: list[Page]) -> None:
    page = forms[1]
    assert page.has("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.has("img"))
    assert {str(cell.get("scope")) for cell in page.has("th")} == {"col", "row", "rowgroup"}
    assert len(page.has("caption")) == len(page.tables)
    assert len(page.has("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_have_enough_contrast(written: Path, theme: str) -> None:
    """WCAG 2's level AA: 4.5 to 1."""
    text = (written / "card.html").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", blocks[["light", "dark"].index(theme)]))

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    for ground in ("paper", "box", "warn"):
        for letters in ("ink", "soft", "link", "good", "bad", "neutral"):
            bright, dim = sorted((luminance(colours[ground]), luminance(colours[letters])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, f"{letters} on {ground}"
