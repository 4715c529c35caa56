"""What the bias card's pictures show, and how a browser shows the card."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.text import Text

from robustdebias.experiments import card_plots
from robustdebias.experiments.card import write_card
from robustdebias.experiments.card_input import read
from robustdebias.plots import RUN_COLOURS, START_COLOUR

FIXTURE = Path(__file__).parent / "fixtures" / "experiment_summary.json"
COLOURS = dict(zip(("erm", "cda", "reweight", "group_dro"), RUN_COLOURS, strict=False)) | {
    "start": START_COLOUR
}
Summary = dict[str, Any]


@pytest.fixture(scope="module")
def original() -> Summary:
    summary: Summary = json.loads(FIXTURE.read_text(encoding="utf-8"))
    return summary


@pytest.fixture
def summary(original: Summary) -> Summary:
    """To be changed by a test."""
    return copy.deepcopy(original)


def draw(name: str, summary: Summary) -> Figure:
    figures = {picture.stem: picture.figure for picture in card_plots.draw_all(read(summary))}
    FigureCanvasAgg(figures[name]).draw()
    return figures[name]


def rows_of(axes: Axes) -> list[str]:
    return [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]


def marks(axes: Axes, method: str) -> dict[str, Line2D]:
    """Row -> the method's mark."""
    return {
        _row(line): line for line in axes.get_lines() if _is(line, method) and line.get_marker() != "None"
    }


def whiskers(axes: Axes, method: str) -> dict[str, list[float]]:
    """Row -> the ends of the method's interval."""
    found = [line for line in axes.get_lines() if _is(line, method) and line.get_marker() == "None"]
    return {_row(line): [float(end) for end in np.asarray(line.get_xdata())] for line in found}


def _is(line: Line2D, method: str) -> bool:
    return line.get_color() == COLOURS[method]


def _row(line: Line2D) -> str:
    """The first panel has the rows' names."""
    assert isinstance(line.figure, Figure)
    axes = line.axes
    rows = rows_of(axes) or rows_of(line.figure.axes[0])
    return rows[round(float(np.asarray(line.get_ydata())[0]))]


def mean_of(summary: Summary, method: str, metric: str, key: str = "value") -> float:
    return fmean(s[key] for s in summary["scores"] if (s["method"], s["metric"]) == (method, metric))


def test_loss_by_group(original: Summary) -> None:
    methods, start = draw("group_loss", original).axes
    groups = original["groupings"]["labels"]["names"]
    by_loss = sorted(groups, key=lambda group: -mean_of(original, "erm", f"mlm.group.{group}"))
    assert rows_of(methods) == ["all tokens", *by_loss]
    for axes, shown in ((methods, ["erm", "cda", "reweight", "group_dro"]), (start, ["start"])):
        for method in COLOURS:
            dots, ends = marks(axes, method), whiskers(axes, method)
            assert len(dots) == (9 if method in shown else 0)
            for row, dot in dots.items():
                name = "mlm.overall" if row == "all tokens" else f"mlm.group.{row}"
                assert dot.get_xdata() == pytest.approx([mean_of(original, method, name)])
                assert ends[row] == pytest.approx(
                    [mean_of(original, method, name, end) for end in ("low", "high")]
                )


def test_changes_and_which_are_significant(original: Summary) -> None:
    panels = draw("differences", original).axes
    assert [axes.get_xlabel() for axes in panels] == ["change in nats", "change in points", "change"]
    assert [len(rows_of(axes)) for axes in panels] == [3, 3, 1]
    labels = {metric["label"]: name for name, metric in original["metrics"].items()}
    filled = 0
    for axes in panels:
        for method in ("cda", "reweight", "group_dro"):
            for row, dot in marks(axes, method).items():
                name = labels[row.rpartition(" (")[0]]
                difference = next(d for d in original["differences"]
                                  if (d["method"], d["base"], d["metric"]) == (method, "erm", name))  # fmt: skip
                assert dot.get_xdata() == pytest.approx([difference["mean"]])
                assert whiskers(axes, method)[row] == pytest.approx([difference["low"], difference["high"]])
                hollow = dot.get_markerfacecolor() == "white"
                assert hollow == (difference["verdict"] == "no significant change")
                filled += not hollow
    assert filled == 7


def test_weights_are_means_over_seeds(summary: Summary) -> None:
    for run in summary["training"]:  # shares of the batches, which are not the method's doing
        if run["method"] in ("erm", "cda"):
            for record in run["history"]:
                record["group_weight"] = dict.fromkeys(summary["groupings"]["labels"]["names"], 0.1)
    panels = draw("group_weights", summary).axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "Reweighting: weights of the groups", "Group DRO: weights of the groups",
    ]  # fmt: skip
    runs = [run["history"] for run in summary["training"] if run["method"] == "group_dro"]
    for group in summary["groupings"]["labels"]["names"]:
        lines = [line for line in panels[1].get_lines() if line.get_label() == group]
        assert list(lines[0].get_xdata()) == [record["step"] for record in runs[0]]
        expected = [
            fmean(record["group_weight"][group] for record in step) for step in zip(*runs, strict=True)
        ]
        assert lines[0].get_ydata() == pytest.approx(expected)
    thin = [line for line in panels[1].get_lines() if line.get_linewidth() < 1 and len(line.get_xdata()) > 2]
    assert len(thin) == 3 * 8


def test_trade_off(original: Summary) -> None:
    axes = draw("trade_off", original).axes[0]
    large = {line.get_color(): line for line in axes.get_lines() if line.get_markersize() > 8 and
             line.get_marker() != "None"}  # fmt: skip
    for method in ("erm", "cda", "reweight", "group_dro"):
        loss = mean_of(original, method, "mlm.overall") - mean_of(original, "erm", "mlm.overall")
        line = large[COLOURS[method]]
        assert line.get_xdata() == pytest.approx([loss])
        assert line.get_ydata() == pytest.approx(
            [abs(mean_of(original, method, "stereoset.overall.ss") - 50)]
        )
    assert axes.get_ylabel() == "distance of StereoSet SS from 50"


def test_of_many_bias_scores_the_general_ones_are_shown(summary: Summary) -> None:
    for number in range(17):
        name = f"seat.test.{number}"
        summary["metrics"][name] = {**summary["metrics"]["seat.race"], "label": f"test {number}"}
        summary["scores"].append(
            {**summary["scores"][0], "metric": name, "value": 0.3, "low": 0.2, "high": 0.4}
        )
    stereoset, crows, seat = draw("bias", summary).axes
    assert rows_of(stereoset)[0] == "StereoSet SS"
    assert "StereoSet LMS" not in rows_of(stereoset)
    assert len(rows_of(crows)) == 5
    assert seat.get_title(loc="left") == "SEAT (9 more in the tables)"
    assert rows_of(seat)[:4] == [f"SEAT, mean |d|{of}" for of in ("", ", gender", ", race", ", religion")]
    assert len(rows_of(seat)) == 12
    for axes, ideal in ((stereoset, 50), (crows, 50), (seat, 0)):
        assert any(list(line.get_xdata()) == [ideal, ideal] for line in axes.get_lines())


def crowded(summary: Summary) -> Summary:
    """12 groups and 6 methods."""
    for method, like, label in (
        ("dropout", "cda", "Raised dropout"),
        ("cvar", "group_dro", "CVaR, alpha 0.2"),
    ):
        summary["methods"][method] = {**summary["methods"][like], "label": label}
        for key in ("scores", "differences", "training"):
            summary[key] += [{**row, "method": method} for row in summary[key] if row["method"] == like]
    names = summary["groupings"]["labels"]["names"]
    for group, like in zip(["politics: left", "profession: a rather long name", "age: old", "age: young"], names[:4],
                           strict=True):  # fmt: skip
        names.append(group)
        metric = f"mlm.group.{group}"
        summary["metrics"][metric] = summary["metrics"][f"mlm.group.{like}"]
        summary["scores"] += [
            {**s, "metric": metric} for s in summary["scores"] if s["metric"] == f"mlm.group.{like}"
        ]
        for run in summary["training"]:
            for record in run["history"]:
                if record["group_weight"]:
                    record["group_weight"][group] = record["group_weight"][like]
    return summary


@pytest.mark.parametrize("crowd", [False, True])
def test_no_word_is_cut_off_or_covers_another(summary: Summary, crowd: bool) -> None:
    pictures = card_plots.draw_all(read(crowded(summary) if crowd else summary))
    assert [picture.stem for picture in pictures] == [
        "differences", "group_loss", "bias", "trade_off", "group_weights",
    ]  # fmt: skip
    for picture in pictures:
        canvas = FigureCanvasAgg(picture.figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        texts = set(picture.figure.findobj(Text)) - _not_drawn(picture.figure)
        boxes = {
            text: text.get_window_extent(renderer)
            for text in texts
            if isinstance(text, Text) and text.get_text()
        }
        width, height = canvas.get_width_height()
        for text, box in boxes.items():
            inside = min(box.x0, box.y0, width - box.x1, height - box.y1)
            assert inside >= -1, f"{picture.stem}: {text.get_text()!r} is cut off"
        for axes in picture.figure.axes:
            spans = sorted((boxes[t].y0, boxes[t].y1) for t in axes.get_yticklabels() if t in boxes)
            assert all(low[1] <= high[0] + 0.5 for low, high in pairwise(spans)), picture.stem


def _not_drawn(figure: Figure) -> set[Text]:
    """Labels of ticks outside the scale."""
    return {
        tick.label1
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }


# In a browser.


@pytest.fixture(scope="module")
def page(original: Summary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_card(tmp_path_factory.mktemp("card"), original)[1]


def chromium(profile: Path, *arguments: str) -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    command = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={profile}", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


def test_a_browser_shows_tables_and_pictures(page: Path, tmp_path: Path) -> None:
    dom = chromium(tmp_path / "profile", "--dump-dom", page.as_uri())
    source = page.read_text(encoding="utf-8")
    for tag in ("table", "tr", "td", "img", "details", "section"):
        assert len(re.findall(rf"<{tag}\b", dom)) == len(re.findall(rf"<{tag}\b", source)) > 0, tag


@pytest.mark.parametrize("width", [390, 1200])
def test_pictures_decode_and_the_page_is_not_wider_than_the_window(
    page: Path, tmp_path: Path, width: int
) -> None:
    """The page has no script, so it is measured from another one, in a frame of a phone's and of a desktop's width."""
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"<iframe id=card style='width:{width}px;height:900px;border:0' srcdoc=\""
        f'{html.escape(page.read_text(encoding="utf-8"))}"></iframe><pre id=measured></pre><script>'
        "onload = () => { const page = card.contentDocument, images = [...page.images];"
        "measured.textContent = JSON.stringify({images: images.map(image => image.complete && image.naturalWidth),"
        "width: page.documentElement.scrollWidth, tables: page.querySelectorAll('table').length}); }</script>",
        encoding="utf-8",
    )
    dom = chromium(tmp_path / "profile", "--virtual-time-budget=20000", "--dump-dom", probe.as_uri())
    found = re.search(r"<pre id=\"measured\">(.*?)</pre>", dom)
    assert found, "the probe did not finish"
    # 9 inches at 150 dots an inch
    assert json.loads(found[1]) == {"images": [1350] * 5, "width": width, "tables": 13}


@pytest.mark.parametrize(("scheme", "is_dark"), [(1, False), (0, True)])
def test_a_screenshot_is_not_blank(page: Path, tmp_path: Path, scheme: int, is_dark: bool) -> None:
    shot = tmp_path / "shot.png"
    chromium(
        tmp_path / "profile", f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1200,6000",
        f"--screenshot={shot}", page.as_uri(),
    )  # fmt: skip
    pixels = imread(shot)[..., :3].mean(axis=2)  # 0 is black
    assert pixels.shape == (6000, 1200)
    assert (np.median(pixels) < 0.2) == is_dark
    assert (np.median(pixels) > 0.9) != is_dark
    # Something stands in every stretch of 500 pixels, pictures included.
    assert all(stretch.std() > 0.02 for stretch in np.split(pixels, 12))
