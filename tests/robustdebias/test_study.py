"""The committed study: its configuration is valid, and what the documents quote is what was measured."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from robustdebias.experiments.settings import load_settings

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "studies" / "wikipedia"


def summary():
    return json.loads((RESULTS / "summary.json").read_text(encoding="utf-8"))


def test_the_results_are_of_the_configuration_that_is_there():
    configuration = ROOT / "studies" / "wikipedia.toml"
    settings = load_settings(configuration)
    found = summary()
    assert found["config_text"] == configuration.read_text(encoding="utf-8")
    runs = {(run["method"], run["seed"]) for run in found["training"]}
    assert runs == {(method, seed) for method in settings.methods for seed in settings.seeds}
    assert not [caveat for caveat in found["caveats"] if "intermediate" in caveat]


def test_the_tables_hold_the_summarys_numbers():
    found = summary()
    with (RESULTS / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found["scores"])
    assert all(
        float(row["value"]) == score["value"] for row, score in zip(rows, found["scores"], strict=True)
    )


def test_the_page_quotes_what_was_measured():
    """Every cell of the page's table, from the means and differences of the summary."""
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    table = page.split("<!-- study: begin -->\n")[1].split("<!-- study: end -->")[0]
    found = summary()
    means = {(mean["method"], mean["metric"]): mean["value"] for mean in found["means"]}
    changes = {
        (change["method"], change["base"], change["metric"]): change for change in found["differences"]
    }
    by_label = {metric["label"]: name for name, metric in found["metrics"].items()}
    by_label["loss on GAP passages"] = "mlm:gap.overall"
    baseline, *others = found["methods"]
    lines = table.strip().splitlines()[2:]
    assert len(lines) == 9
    for line in lines:
        label, untouched, base, *cells = (
            cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))
        )
        name = by_label[label.replace("\\|", "|")]
        digits = found["metrics"][name]["digits"]
        assert untouched == f"{means['start', name]:.{digits}f}"
        assert base == f"{means[baseline, name]:.{digits}f}"
        for method, cell in zip(others, cells, strict=True):
            change = changes[method, baseline, name]
            low, high = change["low"], change["high"]
            text = f"{means[method, name]:.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            assert cell == (f"**{text}**" if low * high > 0 else text)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for metric in ("mlm.worst", "mlm.overall"):
        change = changes["group_dro", baseline, metric]
        assert f"[{change['low']:+.3f}, {change['high']:+.3f}]" in readme
