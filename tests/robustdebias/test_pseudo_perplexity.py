"""Pseudo-perplexity: by hand, against a token-by-token loop, its sample of texts, its bootstrap."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from neighbour_model import NeighbourModel

from robustdebias.evaluation import bootstrap, metric_of, pseudo_perplexity


def evaluate(model: torch.nn.Module, tokenizer: Any, texts: Any, **options: Any) -> dict[str, Any]:
    return pseudo_perplexity.evaluate(model, tokenizer, texts, progress=False, **options)


@pytest.fixture
def model(tiny_tokenizer: Any) -> NeighbourModel:
    return NeighbourModel(
        tiny_tokenizer,
        {"[CLS]": {"she": 0.5, "he": 0.25}, "she": {"likes": 0.125, "reads": 0.25}, "likes": {"bread": 0.5}},
    )


def test_by_hand(model: NeighbourModel, tiny_tokenizer: Any) -> None:
    """She likes bread: 1 + 3 + 1 bits; he: 2 bits; she reads: 1 + 2 bits. All tokens count the same: 10 bits of 6."""
    result = evaluate(model.train(), tiny_tokenizer, ["She likes bread", "He", "She reads"])
    bit = math.log(2)
    assert result["overall"] == pytest.approx(
        {"perplexity": 2 ** (10 / 6), "loss": 10 / 6 * bit, "count": 6, "texts": 3}
    )
    assert result["per_text"] == [
        [pytest.approx(-bits * bit, abs=1e-6), count] for bits, count in ((5, 3), (2, 1), (3, 2))
    ]
    assert (result["cut"], result["unknown"]) == (0, 0)
    assert model.dropout.training
    assert bootstrap.values({"pseudo_perplexity": result}) == {
        "pseudo_perplexity.overall": pytest.approx(2 ** (10 / 6))
    }
    json.dumps(result, allow_nan=False)


def test_tokens_are_masked_one_at_a_time(model: NeighbourModel, tiny_tokenizer: Any) -> None:
    evaluate(model, tiny_tokenizer, ["she likes bread"])

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tiny_tokenizer.convert_tokens_to_ids(text.split()))

    assert sorted(model.seen) == sorted(
        ids(f"[CLS] {text} [SEP]") for text in ("[MASK] likes bread", "she [MASK] bread", "she likes [MASK]")
    )


def test_as_a_loop_over_tokens(tiny_model: Any, tiny_tokenizer: Any, tiny_corpus: Path) -> None:
    texts = tiny_corpus.read_text().splitlines()[:12]
    total, count = 0.0, 0
    for text in texts:
        whole = tiny_tokenizer(text, return_tensors="pt")["input_ids"]
        for position in range(1, whole.shape[1] - 1):
            masked = whole.clone()
            masked[0, position] = tiny_tokenizer.mask_token_id
            with torch.no_grad():
                logits = tiny_model.eval()(input_ids=masked).logits[0, position].double()
            total += (logits[whole[0, position]] - logits.logsumexp(0)).item()
            count += 1
    for batch_size in (1, 7, 128):
        result = evaluate(tiny_model, tiny_tokenizer, texts, batch_size=batch_size)
        assert result["overall"]["count"] == count
        assert result["overall"]["perplexity"] == pytest.approx(math.exp(-total / count), rel=1e-5)


def test_long_texts_are_cut_and_the_sample_is_even(model: NeighbourModel, tiny_tokenizer: Any) -> None:
    result = evaluate(model, tiny_tokenizer, ["she likes bread", "he"], max_length=4)
    assert result["cut"] == 1
    assert result["per_text"][0] == [pytest.approx(-4 * math.log(2), abs=1e-6), 2]  # she likes
    texts = ["she", "he", "he", "she", "he", "he", "she", "he"]
    some = evaluate(model, tiny_tokenizer, texts, limit=3)  # places 0, 2, 5
    assert [round(total / -math.log(2)) for total, _ in some["per_text"]] == [1, 2, 2]
    assert some["items"] == evaluate(model, tiny_tokenizer, texts, limit=3)["items"]
    assert some["items"] != evaluate(model, tiny_tokenizer, texts, limit=4)["items"]
    assert some["items"] != evaluate(model, tiny_tokenizer, texts, limit=3, max_length=5)["items"]


def test_unknown_tokens_are_counted(model: NeighbourModel, tiny_tokenizer: Any) -> None:
    result = evaluate(model, tiny_tokenizer, ["she \N{SNOWMAN} likes \N{SNOWMAN}"])
    assert (result["unknown"], result["overall"]["count"]) == (2, 4)


def test_a_file_is_read_as_a_corpus(model: NeighbourModel, tiny_tokenizer: Any, tmp_path: Path) -> None:
    expected = evaluate(model, tiny_tokenizer, ["she likes bread", "he"])
    (tmp_path / "neutral.txt").write_text("she likes bread\n\nhe\n")
    (tmp_path / "neutral.jsonl").write_text('{"text": "she likes bread"}\n{"text": "he"}\n')
    for name in ("neutral.txt", "neutral.jsonl"):
        assert evaluate(model, tiny_tokenizer, tmp_path / name) == expected


def test_its_interval_is_as_wide_as_theory_says(tiny_tokenizer: Any) -> None:
    """Half of 400 one-token texts have 1 bit, half 2: the standard deviation of the mean is 0.5 / 20 bits."""
    model = NeighbourModel(tiny_tokenizer, {"[CLS]": {"she": 0.5, "he": 0.25}})
    result = {"pseudo_perplexity": evaluate(model, tiny_tokenizer, ["she", "he"] * 200)}
    draws = bootstrap.draws(json.loads(json.dumps(result)))["pseudo_perplexity.overall"]
    bits = np.log2(draws)
    assert bits.mean() == pytest.approx(1.5, abs=0.002)
    assert bits.std() == pytest.approx(0.025, rel=0.06)
    assert bootstrap.draws({"pseudo_perplexity": evaluate(model, tiny_tokenizer, ["she"] * 9)}) == {}
    metric = metric_of("pseudo_perplexity.overall")
    assert (metric.ideal, metric.headline) == ("low", True)


def test_bad_input(model: NeighbourModel, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neutral texts: no token in the 0 texts"):
        evaluate(model, tiny_tokenizer, [])
    with pytest.raises(ValueError, match="max_length: 2 tokens leave no room"):
        evaluate(model, tiny_tokenizer, ["she"], max_length=2)
    with pytest.raises(ValueError, match="limit: expected a positive number of texts, got 0"):
        evaluate(model, tiny_tokenizer, ["she"], limit=0)
    with pytest.raises(ValueError, match="a sentence has 82 tokens, but the model reads at most 64"):
        evaluate(tiny_model, tiny_tokenizer, ["she " * 80])
    (tmp_path / "neutral.jsonl").write_text('{"text": "she"}\n{"body": "he"}\n')
    with pytest.raises(ValueError, match=r"neutral\.jsonl:2: no field 'text'"):
        evaluate(model, tiny_tokenizer, tmp_path / "neutral.jsonl")
