"""StereoSet's intersentence task: ranks by hand, the next-sentence head, and what may be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from neighbour_model import NeighbourModel
from transformers import BertConfig, BertForMaskedLM, BertForNextSentencePrediction, BertForPreTraining

from robustdebias.evaluation import bootstrap, metric_of, stereoset_inter
from robustdebias.evaluation.stereoset_items import read_items

FIXTURES = Path(__file__).parent / "fixtures" / "eval"


def row(context: str, *sentences: str, term: str = "visitor", domain: str = "profession") -> dict[str, str]:
    labels = ("stereotype", "anti-stereotype", "unrelated")
    item = {"type": "intersentence", "target": term, "bias_type": domain, "context": context}
    return {**item, **dict(zip(labels, sentences, strict=True))}


def evaluate(model: torch.nn.Module, tokenizer: Any, *rows: dict[str, str], folder: Path) -> dict[str, Any]:
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return stereoset_inter.evaluate(model, tokenizer, path, progress=False)


def with_head(tokenizer: Any) -> BertForPreTraining:
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return BertForPreTraining(config).eval()


def test_pll_by_hand(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """A token depends on its left neighbour alone, the first one of a sentence on the end of the context."""
    model = NeighbourModel(
        tiny_tokenizer,
        {
            ".": {"he": 0.4, "she": 0.4},
            "he": {"likes": 0.2, "reads": 0.05},
            "likes": {"bread": 0.4},
            "she": {"sells": 0.3},
        },
    )
    # exp of the means: he likes bread (0.4 * 0.2 * 0.4)^(1/3) = 0.317; she sells (0.4 * 0.3)^(1/2) = 0.346;
    # he reads (0.4 * 0.05)^(1/2) = 0.141.
    result = evaluate(
        model, tiny_tokenizer,
        row("The man is here.", "He likes bread", "She sells", "He reads", term="a"),
        row("The man is here.", "She sells", "He likes bread", "He reads", term="b", domain="gender"),
        row("The man is here.", "He reads", "He likes bread", "She sells", term="c", domain="gender"),
        folder=tmp_path,
    )  # fmt: skip
    assert result["variant"] == "pll"
    outcomes = {term["term"]: (term["pro"], term["related"]) for term in result["per_term"]}
    assert outcomes == {"a": ([0], [2]), "b": ([1], [2]), "c": ([0], [0])}
    third = 100 / 3
    assert result["overall"] == pytest.approx(
        {"ss": third, "lms": 2 * third, "icat": 2 * third * third / 50, "count": 3, "terms": 3}
    )
    assert result["by_domain"]["gender"]["ss"] == 50
    assert "not comparable with published numbers" in result["definition"]


def test_a_mean_not_a_sum_ranks(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """He likes bread: sum ln 0.0576, mean ln 0.386. She sells: sum ln 0.12, mean ln 0.346."""
    model = NeighbourModel(
        tiny_tokenizer,
        {".": {"he": 0.4, "she": 0.4}, "he": {"likes": 0.36}, "likes": {"bread": 0.4}, "she": {"sells": 0.3}},
    )
    result = evaluate(
        model, tiny_tokenizer, row("Here.", "He likes bread", "She sells", "Xylol"), folder=tmp_path
    )
    assert result["per_term"][0]["pro"] == [1]


def test_each_token_of_the_sentence_is_masked_behind_the_whole_context(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = NeighbourModel(tiny_tokenizer, {})
    evaluate(model, tiny_tokenizer, row(" She reads. ", "He sells", "He keeps", "Bread"), folder=tmp_path)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tiny_tokenizer.convert_tokens_to_ids(text.split()))

    assert sorted(model.seen) == sorted(
        [
            ids("[CLS] she reads . [MASK] sells [SEP]"),
            ids("[CLS] she reads . he [MASK] [SEP]"),  # the same for both sentences that begin with "he"
            ids("[CLS] she reads . [MASK] keeps [SEP]"),
            ids("[CLS] she reads . [MASK] [SEP]"),
        ]
    )


def test_nsp_as_transformers_own_model(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Against BertForNextSentencePrediction with the same weights, a pair at a time without padding."""
    both = with_head(tiny_tokenizer)
    both.save_pretrained(tmp_path / "both")
    plain = BertForNextSentencePrediction.from_pretrained(tmp_path / "both").eval()
    items = read_items(FIXTURES / "stereoset.jsonl", "intersentence")
    expected = []
    for item in items:
        scores = []
        for choice in item.choices:
            pair = tiny_tokenizer(item.context, choice, return_tensors="pt", return_token_type_ids=True)
            assert pair["token_type_ids"][0, -1] == 1
            with torch.no_grad():
                logits = plain(**pair).logits
            scores.append(logits.softmax(-1)[0, 0].item())
        expected.append(scores)
    assert len({round(score, 4) for scores in expected for score in scores}) > 10  # else the model is no test
    for model in (both, plain):
        for batch_size in (1, 4, 64):
            ranks = stereoset_inter._next_sentence(model, tiny_tokenizer, items, batch_size, False)
            assert ranks == pytest.approx(torch.tensor(expected).numpy(), rel=1e-5)
    result = stereoset_inter.evaluate(
        both.train(), tiny_tokenizer, FIXTURES / "stereoset.json", progress=False
    )
    assert both.training
    assert result["variant"] == "nsp"
    pro = [int(one > two) for one, two, _ in expected]
    assert {term["term"]: term["pro"] for term in result["per_term"]} == {
        "teacher": pro[:2], "she": pro[2:4], "Christian": pro[4:],
    }  # fmt: skip
    assert 0 < sum(pro) < len(pro)
    flat = stereoset_inter.evaluate(both, tiny_tokenizer, FIXTURES / "stereoset.jsonl", progress=False)
    assert flat == result


def test_saturated_probabilities_tie(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """In float32 both are 1, as in the authors' code, so the anti-stereotype is taken to be preferred."""
    model = with_head(tiny_tokenizer)
    with torch.no_grad():
        model.cls.seq_relationship.weight.mul_(0.1)
        model.cls.seq_relationship.bias.copy_(torch.tensor([40.0, -40.0]))
    result = evaluate(model, tiny_tokenizer, row("Here.", "He reads", "She sells", "Xylol"), folder=tmp_path)
    assert (result["per_term"][0]["pro"], result["per_term"][0]["related"]) == ([0], [0])


def test_the_head_is_read_from_the_checkpoint(
    tiny_tokenizer: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    both = with_head(tiny_tokenizer)
    both.save_pretrained(tmp_path)
    masked = BertForMaskedLM.from_pretrained(tmp_path).eval()
    found = stereoset_inter.with_next_sentence_head(tmp_path, masked)
    assert torch.equal(found.cls.seq_relationship.weight, both.cls.seq_relationship.weight)
    inputs = tiny_tokenizer("she reads the book", return_tensors="pt")
    with torch.no_grad():
        expected = masked(**inputs).logits
        assert torch.equal(found.eval()(**inputs).prediction_logits, expected)
    # The tiny model has none; it is given back as it is, rather than with a random head.
    plain = BertForMaskedLM.from_pretrained(tiny_model_dir)
    assert stereoset_inter.with_next_sentence_head(tiny_model_dir, plain) is plain


def test_variants_are_never_compared(tiny_tokenizer: Any, tiny_model: Any) -> None:
    path = FIXTURES / "stereoset.jsonl"
    results = [
        {"stereoset_inter": stereoset_inter.evaluate(model, tiny_tokenizer, path, progress=False)}
        for model in (tiny_model, with_head(tiny_tokenizer))
    ]
    pll, nsp = (bootstrap.values(result) for result in results)
    assert len(pll) == len(nsp) == 12  # three scores overall and of three domains
    assert not set(pll) & set(nsp)
    assert metric_of("stereoset_inter.nsp.overall.ss").label == "StereoSet intersentence (nsp) SS"
    assert metric_of("stereoset_inter.pll.gender.lms").label == "StereoSet intersentence (pll) LMS, gender"
    assert metric_of("stereoset_inter.pll.gender.lms").ideal == "100"
    assert metric_of("stereoset_inter.pll.overall.ss").ideal == "50"


def test_bad_input(tiny_tokenizer: Any, tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set\.jsonl: no intersentence items in it"):
        evaluate(tiny_model, tiny_tokenizer, {**row("A BLANK.", "A b.", "A c.", "A d."), "type": "intrasentence"},
                 folder=tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match=r"set\.jsonl:1: field 'unrelated' must be a text, got ' '"):
        evaluate(tiny_model, tiny_tokenizer, row("Here.", "a", "b", " "), folder=tmp_path)
    with pytest.raises(ValueError, match="a sentence has 83 tokens, but the model reads at most 64"):
        evaluate(tiny_model, tiny_tokenizer, row("the " * 80, "he", "she", "at"), folder=tmp_path)
    with pytest.raises(ValueError, match="task: must be one of"):
        read_items(FIXTURES / "stereoset.json", "both")
    with pytest.raises(ValueError, match=r"sees no second sentence in 'Here\. \\x00' behind 'Here\.'"):
        evaluate(tiny_model, tiny_tokenizer, row("Here.", "\x00", "b", "c"), folder=tmp_path)
    model = with_head(tiny_tokenizer)
    model.cls.seq_relationship.bias.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="the model gives NaN for 3 of 3 pairs"):
        evaluate(model, tiny_tokenizer, row("Here.", "a", "b", "c"), folder=tmp_path)


def test_the_published_set_is_read_whole(data_dir: Path) -> None:
    """2,123 intersentence items of the development set."""
    items = read_items(data_dir / "stereoset" / "dev.jsonl", "intersentence")
    assert len(items) == 2123
    domains = [item.domain for item in items]
    assert {domain: domains.count(domain) for domain in set(domains)} == {
        "gender": 242, "profession": 827, "race": 976, "religion": 78,
    }  # fmt: skip
