"""Held-out loss by group: cases computed by hand, and the model's own loss."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from neighbour_model import NeighbourModel

from robustdebias.collate import MLMCollator, encode
from robustdebias.corpus import Example
from robustdebias.evaluation import bootstrap, mlm

NAMES = ["female", "male", "muslim"]


def batch(tokenizer: Any, *texts: str, groups: Sequence[Sequence[Any]]) -> dict[str, torch.Tensor]:
    """`_word` is masked. All texts of a batch have the same number of words."""
    ids, labels = [], []
    for text in texts:
        words = text.split()
        ids.append(tokenizer.convert_tokens_to_ids(["[MASK]" if word[0] == "_" else word for word in words]))
        targets = tokenizer.convert_tokens_to_ids([word.removeprefix("_") for word in words])
        labels.append([t if word[0] == "_" else -100 for t, word in zip(targets, words, strict=True)])
    input_ids = torch.tensor(ids)
    return {
        "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": torch.tensor(labels),
        "groups": torch.tensor(groups, dtype=torch.bool),
    }  # fmt: skip


@pytest.fixture
def model(tiny_tokenizer: Any) -> NeighbourModel:
    return NeighbourModel(
        tiny_tokenizer,
        {
            "likes": {"book": 0.5, "lamp": 0.25, "house": 0.125},
            "the": {"book": 0.5, "house": 0.25, "lamp": 0.0625},
        },
    )


def test_by_hand(model: NeighbourModel, tiny_tokenizer: Any) -> None:
    """Losses in units of ln 2. A text in two groups counts in both, but once overall; one in none only overall."""
    batches = [
        batch(
            tiny_tokenizer,
            "she likes _book the _house",  # 1, 2
            "he likes _lamp the book",  # 2
            groups=[[1, 0, 1], [0, 1, 0]],
        ),
        batch(
            tiny_tokenizer,
            "likes _house the _lamp",  # 3, 4
            "he likes the _book",  # 1
            "she likes the book",  # nothing masked
            groups=[[0, 0, 1], [0, 0, 0], [1, 0, 0]],
        ),
    ]
    model.train()
    result = mlm.evaluate(model, batches, NAMES, progress=False)
    assert model.dropout.training
    bit = math.log(2)
    assert result["by_group"]["female"] == pytest.approx(
        {"loss": 1.5 * bit, "perplexity": 2**1.5, "accuracy": 0.5, "count": 2}
    )
    assert result["by_group"]["male"] == pytest.approx(
        {"loss": 2 * bit, "perplexity": 4, "accuracy": 0, "count": 1}
    )
    assert result["by_group"]["muslim"] == pytest.approx(
        {"loss": 2.5 * bit, "perplexity": 2**2.5, "accuracy": 0.25, "count": 4}
    )
    overall = 13 / 6
    assert result["overall"] == pytest.approx(
        {"loss": overall * bit, "perplexity": 2**overall, "accuracy": 2 / 6, "count": 6}
    )
    assert result["worst_group"] == "muslim"
    assert result["gap"] == pytest.approx(
        {"worst_minus_best": 1 * bit, "worst_minus_overall": (2.5 - overall) * bit}
    )
    assert result["per_text"]["overall"] == [
        pytest.approx([total * bit, count], abs=1e-6)
        for total, count in ((3, 2), (2, 1), (7, 2), (1, 1), (0, 0))
    ]
    assert result["per_text"]["by_group"] == [
        pytest.approx([text, group, total * bit, count], abs=1e-6)
        for text, group, total, count in ((0, 0, 3, 2), (0, 2, 3, 2), (1, 1, 2, 1), (2, 2, 7, 2))
    ]
    json.dumps(result, allow_nan=False)


def test_groups_of_tokens(model: NeighbourModel, tiny_tokenizer: Any) -> None:
    tokens = [[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0]]
    result = mlm.evaluate(
        model, [batch(tiny_tokenizer, "she likes _book the _house", groups=[tokens])], NAMES, progress=False
    )
    assert {name: (stats["loss"], stats["count"]) for name, stats in result["by_group"].items()} == {
        "female": (pytest.approx(math.log(2)), 1), "male": (pytest.approx(math.log(4)), 1), "muslim": (None, 0),
    }  # fmt: skip
    assert result["by_group"]["muslim"] == {"loss": None, "perplexity": None, "accuracy": None, "count": 0}
    assert result["worst_group"] == "male"
    assert [entry[:2] for entry in result["per_text"]["by_group"]] == [[0, 0], [0, 1]]


def test_nothing_masked(model: NeighbourModel, tiny_tokenizer: Any) -> None:
    result = mlm.evaluate(
        model, [batch(tiny_tokenizer, "she likes", groups=[[1, 0, 0]])], NAMES, per_text=False, progress=False
    )
    assert result["overall"] == {"loss": None, "perplexity": None, "accuracy": None, "count": 0}
    assert result["worst_group"] is None
    assert "per_text" not in result
    assert mlm.evaluate(model, [], NAMES, progress=False)["overall"]["count"] == 0


def test_as_the_models_own_loss(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """Real batches of the collator, their sizes uneven, through the adapter that gathers positions first."""
    texts = ["The woman reads her letter at home.", "He sells.", "The visitor keeps their bread near the river.",
             "She finds the garden.", "The muslim opens the house after work."]  # fmt: skip
    groups = [("female",), ("male",), (), ("female",), ("muslim", "male")]
    examples = [Example(text, str(i), g) for i, (text, g) in enumerate(zip(texts, groups, strict=True))]
    encoded = encode(examples, tiny_tokenizer, 32)
    collator = MLMCollator(tiny_tokenizer, [*NAMES, "other"], mask_probability=0.4, seed=3)
    batches = [collator(encoded[start : start + 2]) for start in (0, 2, 4)]
    result = mlm.evaluate(tiny_model, batches, [*NAMES, "other"], progress=False)
    losses, hits, members = [], [], []
    for tensors in batches:
        with torch.no_grad():
            logits = tiny_model.eval()(
                **{k: tensors[k] for k in ("input_ids", "attention_mask")}
            ).logits.double()
        for row in range(len(logits)):
            for position in range(logits.shape[1]):
                label = tensors["labels"][row, position].item()
                if label != -100:
                    losses.append((logits[row, position].logsumexp(0) - logits[row, position, label]).item())
                    hits.append(logits[row, position].argmax().item() == label)
                    members.append(tensors["groups"][row].tolist())
    assert result["overall"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert result["overall"]["accuracy"] == sum(hits) / len(hits)
    for group, name in enumerate([*NAMES, "other"]):
        own = [loss for loss, member in zip(losses, members, strict=True) if member[group]]
        assert result["by_group"][name]["count"] == len(own)
        assert result["by_group"][name]["loss"] == (
            pytest.approx(sum(own) / len(own), rel=1e-6) if own else None
        )


def test_the_fingerprint_tells_texts_masks_and_groups_apart(
    model: NeighbourModel, tiny_tokenizer: Any
) -> None:
    def items(text: str, groups: list[int], names: list[str] = NAMES) -> str:
        batches = [batch(tiny_tokenizer, text, groups=[groups])]
        return mlm.evaluate(model, batches, names, progress=False)["items"]

    first = items("she likes _book", [1, 0, 0])
    assert first == items("she likes _book", [1, 0, 0])
    others = [
        items("he likes _book", [1, 0, 0]),
        items("she likes _lamp", [1, 0, 0]),
        items("she _likes book", [1, 0, 0]),
        items("she likes _book", [0, 1, 0]),
        items("she likes _book", [1, 0, 0], ["a", "b", "c"]),
    ]
    assert len({first, *others}) == 6


def test_bad_input(model: NeighbourModel, tiny_tokenizer: Any, tmp_path: Path) -> None:
    batches = [batch(tiny_tokenizer, "she likes _book", groups=[[1, 0, 0]])]
    with pytest.raises(ValueError, match=r"groups: expected .*B, T = \(1, 3\) and G = 2 names, got \(1, 3\)"):
        mlm.evaluate(model, batches, ["one", "two"], progress=False)
    model.table.data[:] = float("nan")
    with pytest.raises(RuntimeError, match="the loss of 1 of 1 tokens of a batch is not finite"):
        mlm.evaluate(model, batches, NAMES, progress=False)


def test_a_handful_of_texts_is_neither_worst_nor_best(tiny_tokenizer, make_tiny_model):
    """Nine texts of a group that the model is worst at, and twelve of each of two others."""
    model = make_tiny_model(len(tiny_tokenizer))
    sentences = ["The teacher reads their book at home."] * 12 + ["He sells his lamp near the river."] * 12
    examples = [Example(text, f"{n}", ("a" if n < 12 else "b",)) for n, text in enumerate(sentences)]
    few = [Example("zq xj vw kq", f"few {n}", ("few",)) for n in range(9)]
    names = ["a", "b", "few"]

    def measured(texts):
        encoded = encode(texts, tiny_tokenizer, 32)
        return mlm.evaluate(model, [MLMCollator(tiny_tokenizer, names)(encoded)], names, progress=False)

    result = measured([*examples, *few])
    losses = {name: stats["loss"] for name, stats in result["by_group"].items()}
    judged = sorted((losses["a"], losses["b"]))
    assert mlm.scores(result)["worst"] == judged[1]
    assert mlm.scores(result)["gap"] == pytest.approx(judged[1] - judged[0])
    assert result["worst_group"] in ("a", "b")
    drawn = bootstrap.draws({"mlm": result})
    assert {"mlm.worst", "mlm.gap", "mlm.group.a"} <= set(drawn)
    assert "mlm.group.few" not in drawn
    ten = measured([*examples, *few, few[0]])
    assert mlm.scores(ten)["worst"] == max(stats["loss"] for stats in ten["by_group"].values())
    alone = measured(few)  # then there is nothing else to go by
    assert alone["worst_group"] == "few"
    assert "mlm.worst" not in bootstrap.draws({"mlm": alone})
