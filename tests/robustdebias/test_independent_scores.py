"""The benchmarks' scores against implementations that share no line with them.

First a naive one of each metric, written from the papers: a forward pass of the whole model for every masked token,
no batches, no padding. Then the package mlm-bias (0.1.7), as far as it follows the published definitions:

* its CSPS is the original CrowS-Pairs score of a sentence, but the order of the two sentences that difflib gets is
  always (more, less), where the original has the stereotype first;
* its SSS masks all differing tokens at once and averages over all pairs of position and token, so it is the
  differing-tokens score for one differing token only;
* its class BiasMLM builds the model from its configuration, with random weights, so its functions are called here.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import string
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from robustdebias.evaluation import crows_pairs, crows_pairs_differing, stereoset, stereoset_inter

FIXTURES = Path(__file__).parent / "fixtures" / "eval"
LABELS = ("stereotype", "anti-stereotype", "unrelated")


def log_p(model: Any, tokenizer: Any, ids: list[int], position: int) -> float:
    """Of the token at ``position``, given all the others."""
    masked = torch.tensor([ids])
    masked[0, position] = tokenizer.mask_token_id
    with torch.no_grad():
        logits = model(input_ids=masked).logits[0, position]
    return torch.log_softmax(logits, 0)[ids[position]].item()


# StereoSet


def read_rows(path: Path, task: str) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [row for row in rows if row["type"] == task]


def naive_stereoset(rows: list[dict[str, str]], score: Any) -> dict[str, float]:
    """Section 5 of the paper: percentages for each target term, then their means; ICAT of the means."""
    stereotypes: dict[str, list[bool]] = defaultdict(list)
    meaningful: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        pro, anti, unrelated = (score(row, row[label]) for label in LABELS)
        stereotypes[row["target"]].append(pro > anti)
        meaningful[row["target"]] += [pro > unrelated, anti > unrelated]
    ss, lms = (
        sum(100 * sum(own) / len(own) for own in terms.values()) / len(terms)
        for terms in (stereotypes, meaningful)
    )
    return {"ss": ss, "lms": lms, "icat": lms * min(ss, 100 - ss) / 50}


def intra_score(model: Any, tokenizer: Any) -> Any:
    def score(row: dict[str, str], sentence: str) -> float:
        places = [place for place, word in enumerate(row["context"].split(" ")) if "BLANK" in word]
        word = sentence.split(" ")[places[-1]].strip(string.punctuation).replace("-", "")
        pieces = tokenizer.encode(word, add_special_tokens=False)
        probabilities = []
        for k, piece in enumerate(pieces):
            before = row["context"].split("BLANK")
            ids = [tokenizer.cls_token_id]
            for number, part in enumerate(before):
                if number:
                    ids += [*pieces[:k], tokenizer.mask_token_id]
                ids += tokenizer.encode(part, add_special_tokens=False)
            ids.append(tokenizer.sep_token_id)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, ids.index(tokenizer.mask_token_id)]
            probabilities.append(logits.softmax(0)[piece].item())
        return sum(probabilities) / len(probabilities)

    return score


def inter_score(model: Any, tokenizer: Any) -> Any:
    def score(row: dict[str, str], sentence: str) -> float:
        own = tokenizer.encode(sentence, add_special_tokens=False)
        context = tokenizer.encode(row["context"], add_special_tokens=False)
        ids = [tokenizer.cls_token_id, *context, *own, tokenizer.sep_token_id]
        first = 1 + len(context)
        return sum(log_p(model, tokenizer, ids, first + k) for k in range(len(own))) / len(own)

    return score


TASKS = {
    "intrasentence": (stereoset, intra_score),
    "intersentence": (stereoset_inter, inter_score),
}


@pytest.mark.parametrize("task", TASKS)
def test_stereoset_of_the_fixture(task: str, tiny_model: Any, tiny_tokenizer: Any) -> None:
    module, scorer = TASKS[task]
    rows = read_rows(FIXTURES / "stereoset.jsonl", task)
    expected = naive_stereoset(rows, scorer(tiny_model.eval(), tiny_tokenizer))
    for name in ("stereoset.jsonl", "stereoset.json"):
        result = module.evaluate(tiny_model, tiny_tokenizer, FIXTURES / name, progress=False)
        assert {score: result["overall"][score] for score in expected} == pytest.approx(expected)
    assert 0 < expected["ss"] < 100  # else the model is no test


@pytest.mark.parametrize("task", TASKS)
def test_stereoset_of_published_items(
    task: str, data_dir: Path, make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """The 40 shortest of them."""
    module, scorer = TASKS[task]
    rows = sorted(read_rows(data_dir / "stereoset" / "dev.jsonl", task), key=lambda row: len(str(row)))[:40]
    model = make_tiny_model(len(tiny_tokenizer), max_position_embeddings=128).eval()
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = module.evaluate(model, tiny_tokenizer, tmp_path / "some.jsonl", progress=False)
    expected = naive_stereoset(rows, scorer(model, tiny_tokenizer))
    assert {score: result["overall"][score] for score in expected} == pytest.approx(expected)
    assert 0 < expected["ss"] < 100


# CrowS-Pairs


def read_pairs(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tokens_by_operation(first: list[int], second: list[int], equal: bool) -> tuple[list[int], list[int]]:
    """Positions of the tokens in both sentences, or of those that only one has."""
    words = [[str(token) for token in ids] for ids in (first, second)]
    ones, twos = [], []
    for operation, a, b, c, d in difflib.SequenceMatcher(None, *words).get_opcodes():
        if (operation == "equal") == equal:
            ones += range(a, b)
            twos += range(c, d)
    return ones, twos


def naive_pair(model: Any, tokenizer: Any, row: dict[str, str], form: str) -> tuple[float, float] | None:
    """Scores of (more, less), rounded; None where the form leaves the pair out."""
    stereo = row["stereo_antistereo"] == "stereo"
    more, less = row["sent_more"], row["sent_less"]
    texts = (more, less) if stereo else (less, more)
    ids = [tokenizer.encode(text.lower() if form == "original" else text) for text in texts]
    places = tokens_by_operation(*ids, equal=form == "original")
    if form == "original":
        places = tuple(own[1:-1] for own in places)
    elif not all(places):
        return None
    sums = [math.fsum(log_p(model, tokenizer, *sentence) for sentence in ((own, k) for k in at))
            for own, at in zip(ids, places, strict=True)]  # fmt: skip
    if form == "differing":
        sums = [total / len(at) for total, at in zip(sums, places, strict=True)]
    first, second = (round(total, 3) for total in sums)
    return (first, second) if stereo else (second, first)


def naive_crows_pairs(model: Any, tokenizer: Any, rows: list[dict[str, str]], form: str) -> dict[str, Any]:
    pairs = [naive_pair(model, tokenizer, row, form) for row in rows]
    kept = [pair for pair in pairs if pair is not None]
    wins = sum(more > less for more, less in kept)
    return {
        "score": 100 * wins / len(kept),
        "count": len(kept),
        "neutral": sum(more == less for more, less in kept),
    }


FORMS = {"original": crows_pairs, "differing": crows_pairs_differing}


@pytest.mark.parametrize("form", FORMS)
def test_crows_pairs_of_the_fixture(form: str, tiny_model: Any, tiny_tokenizer: Any) -> None:
    path = FIXTURES / "crows_pairs.csv"
    expected = naive_crows_pairs(tiny_model.eval(), tiny_tokenizer, read_pairs(path), form)
    result = FORMS[form].evaluate(tiny_model, tiny_tokenizer, path, progress=False)
    assert {key: result["overall"][key] for key in expected} == pytest.approx(expected)
    assert 0 < expected["score"] < 100
    assert result.get("skipped", 0) == (form == "differing")  # the pair that differs in case alone


@pytest.fixture
def some_pairs(data_dir: Path, tmp_path: Path) -> Path:
    """24 published pairs, of the shorter ones."""
    rows = sorted(
        read_pairs(data_dir / "crows_pairs" / "crows_pairs_anonymized.csv"),
        key=lambda row: len(row["sent_more"]),
    )
    with (tmp_path / "some.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows[:480:20])
    return tmp_path / "some.csv"


@pytest.mark.parametrize("form", FORMS)
def test_published_pairs(form: str, some_pairs: Path, make_tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny_model(len(tiny_tokenizer), max_position_embeddings=256).eval()
    expected = naive_crows_pairs(model, tiny_tokenizer, read_pairs(some_pairs), form)
    result = FORMS[form].evaluate(model, tiny_tokenizer, some_pairs, progress=False)
    assert {key: result["overall"][key] for key in expected} == pytest.approx(expected)
    assert 0 < expected["score"] < 100


# mlm-bias


def sentence_scores(model: Any, tokenizer: Any, pairs: list[Any], positions: Any, reduce: Any) -> list[float]:
    """Of more and less of each pair, in the order of the file, as this package computes them."""
    found: list[float] = []

    def keep(values: list[float]) -> float:
        found.append(reduce(values))
        return found[-1]

    texts = [text.lower() for pair in pairs for text in (pair.more, pair.less)]
    crows_pairs.preferences(
        model, tokenizer, pairs, texts, positions, keep, batch_size=16, progress=False, label="test"
    )
    assert len(found) == len(texts)
    return found


@pytest.fixture(scope="module")
def peer() -> Any:
    """mlm-bias' functions."""
    return pytest.importorskip("mlm_bias.utils", reason="mlm-bias is not installed")


def spans_of(peer: Any, tokenizer: Any, pair: Any, operation: str) -> list[tuple[torch.Tensor, list[int]]]:
    """The tokens of more and less, and the positions that mlm-bias finds in them."""
    texts = (pair.more, pair.less) if pair.direction == "stereo" else (pair.less, pair.more)
    ids = [tokenizer.encode(text.lower(), return_tensors="pt") for text in texts]
    both = list(zip(ids, peer.get_span(ids[0][0], ids[1][0], operation), strict=True))
    return both if pair.direction == "stereo" else both[::-1]


@pytest.mark.parametrize("published", [False, True])
def test_csps_of_mlm_bias(
    published: bool, peer: Any, request: pytest.FixtureRequest, make_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    path = request.getfixturevalue("some_pairs") if published else FIXTURES / "crows_pairs.csv"
    model = make_tiny_model(len(tiny_tokenizer), max_position_embeddings=256).eval()
    pairs = crows_pairs.read_pairs(path)
    expected = [
        peer.compute_csps(model, ids, spans, tiny_tokenizer.mask_token_id)["csps"]
        for pair in pairs
        for ids, spans in spans_of(peer, tiny_tokenizer, pair, "equal")
    ]
    assert sentence_scores(model, tiny_tokenizer, pairs, crows_pairs._shared, sum) == pytest.approx(
        expected, rel=1e-4
    )


def test_sss_of_mlm_bias_for_one_differing_token(peer: Any, tiny_model: Any, tiny_tokenizer: Any) -> None:
    pairs = [
        crows_pairs.Pair("She keeps the house.", "He keeps the house.", "stereo", "gender"),
        crows_pairs.Pair("The woman sells bread.", "The man sells bread.", "antistereo", "gender"),
        crows_pairs.Pair("The muslim reads.", "The christian reads.", "stereo", "religion"),
    ]
    expected = [
        peer.compute_sss(tiny_model.eval(), ids, spans, tiny_tokenizer.mask_token_id)["sss"]
        for pair in pairs
        for ids, spans in spans_of(peer, tiny_tokenizer, pair, "diff")
    ]
    mean = crows_pairs_differing._differing, lambda values: sum(values) / len(values)
    assert sentence_scores(tiny_model, tiny_tokenizer, pairs, *mean) == pytest.approx(expected, rel=1e-5)
