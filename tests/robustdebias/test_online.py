"""Published scores of published models, reproduced. Needs the Hugging Face hub, and about an hour without a GPU:

RD_KERNELS_DATA_DIR=... pytest --online tests/robustdebias/test_online.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from robustdebias.evaluation import crows_pairs, stereoset
from robustdebias.modeling import load, pick_device

pytestmark = pytest.mark.online


def test_stereoset_of_bert_base_cased(data_dir: Path) -> None:
    """Development set, intrasentence: what the authors' evaluation prints for the predictions they published."""
    model, tokenizer = load("bert-base-cased")
    model.to(pick_device("auto"))
    scores = stereoset.evaluate(model, tokenizer, data_dir / "stereoset" / "dev.jsonl", batch_size=64)[
        "overall"
    ]
    assert scores["count"] == 2106
    assert scores["lms"] == pytest.approx(83.019, abs=0.05)
    assert scores["ss"] == pytest.approx(58.680, abs=0.05)
    assert scores["icat"] == pytest.approx(68.607, abs=0.05)


def test_crows_pairs_of_bert_base_uncased(data_dir: Path) -> None:
    """Table 2 of Nangia et al. (2020): 60.5; their metric.py prints 60.48."""
    model, tokenizer = load("bert-base-uncased")
    model.to(pick_device("auto"))
    path = data_dir / "crows_pairs" / "crows_pairs_anonymized.csv"
    scores = crows_pairs.evaluate(model, tokenizer, path, batch_size=64)["overall"]
    assert scores["count"] == 1508
    assert scores["score"] == pytest.approx(60.48, abs=0.1)
