"""Tokenizing and masking: what is masked, how often, and that it depends on nothing but seed, epoch and index."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from robustdebias.collate import MLMCollator, encode
from robustdebias.corpus import Example
from robustdebias.groups import GroupAnnotator

WORDS = ["she", "he", "reads", "the", "letter", "garden", "breadgarden", "womanhouse", "at", "home", "xyz"]
SPECIAL_IDS = range(5)  # of the tiny tokenizer: padding, unknown, classification, separator, mask


def sentences(count: int, longest: int = 12) -> list[Example]:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]
    return [
        Example(text, str(number), ("a",) if number % 2 else ("a", "b")) for number, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def encoded(tiny_tokenizer):
    return encode(sentences(300), tiny_tokenizer, max_length=32)


@pytest.fixture
def collator(tiny_tokenizer):
    return MLMCollator(tiny_tokenizer, ["a", "b", "other"])


def rows(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Input ids and labels of each sequence, without its padding."""
    kept = batch["attention_mask"].bool()
    return [
        (ids[mask].tolist(), labels[mask].tolist())
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], kept, strict=True)
    ]


# Encoding


def test_encoding(tiny_tokenizer):
    (sequence,) = encode([Example("She likes xq.", "d", ("a",))], tiny_tokenizer, max_length=16)
    pieces = tiny_tokenizer.convert_ids_to_tokens(sequence.input_ids)
    assert pieces == ["[CLS]", "she", "likes", "x", "##q", ".", "[SEP]"]
    assert sequence.words.tolist() == [-1, 0, 1, 2, 2, 3, -1]
    assert (sequence.index, sequence.groups, sequence.mentions) == (0, ("a",), None)


def test_the_tokenizers_own_padding_and_truncation_play_no_part(tiny_tokenizer):
    backend = type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.enable_padding(length=40)
    backend.enable_truncation(4)
    padded = PreTrainedTokenizerFast(tokenizer_object=backend, **tiny_tokenizer.special_tokens_map)
    text = [Example("she reads the letter at home", "d", ("a",))]
    (plain,), (other,) = encode(text, tiny_tokenizer, 32), encode(text, padded, 32)
    assert plain.input_ids.tolist() == other.input_ids.tolist()


def test_long_texts_are_cut_and_lose_the_mentions_beyond(tiny_tokenizer):
    annotator = GroupAnnotator(["gender"])
    example = Example("he reads the letter she reads", "d")
    whole, cut = (encode([example], tiny_tokenizer, length, annotator)[0] for length in (16, 5))
    assert len(cut.input_ids) == 5
    assert whole.groups == cut.groups == ("gender:female", "gender:male")
    assert whole.mentions == ((1, 2, "gender:male"), (5, 6, "gender:female"))
    assert cut.mentions == ((1, 2, "gender:male"),)


def test_a_mention_covers_all_pieces_of_its_words(tiny_tokenizer):
    (sequence,) = encode(
        [Example("Her mother-in-law's", "d")], tiny_tokenizer, 32, GroupAnnotator(["gender"])
    )
    pieces = tiny_tokenizer.convert_ids_to_tokens(sequence.input_ids)
    spans = ["".join(pieces[first:last]).replace("##", "") for first, last, _ in sequence.mentions]
    assert spans == ["her", "mother-in-law"]


def test_bad_input_to_encode(tiny_tokenizer):
    with pytest.raises(ValueError, match="text 1 has no groups"):
        encode([Example("she", "d", ("a",)), Example("he", "d")], tiny_tokenizer, 16)
    with pytest.raises(ValueError, match=r"67% of the text's tokens are \[UNK\]"):
        encode([Example("\u4f60 \u597d she", "d", ("a",))], tiny_tokenizer, 16)
    with pytest.raises(TypeError, match="fast tokenizer"):
        encode([], object(), 16)
    assert encode([], tiny_tokenizer, 16) == []


# Masking


def test_labels_are_the_original_ids_and_the_rest_is_untouched(collator, encoded):
    for (ids, labels), sequence in zip(rows(collator(encoded)), encoded, strict=True):
        original = sequence.input_ids.tolist()
        assert any(label != -100 for label in labels)
        for new, label, old, word in zip(ids, labels, original, sequence.words, strict=True):
            assert label in (-100, old)
            if label == -100:
                assert new == old
            else:
                assert word >= 0
                assert new == collator._mask_id or new not in SPECIAL_IDS


def test_padding(collator, encoded):
    batch = collator(encoded[:8])
    lengths = [len(sequence.input_ids) for sequence in encoded[:8]]
    assert len(set(lengths)) > 1
    assert {name: tensor.shape for name, tensor in batch.items()} == {
        "input_ids": (8, max(lengths)), "attention_mask": (8, max(lengths)), "labels": (8, max(lengths)),
        "groups": (8, 3), "positions": (int((batch["labels"] != -100).sum()),),
    }  # fmt: skip
    assert batch["attention_mask"].sum(1).tolist() == lengths
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == 0).all()
    assert (batch["labels"][padding] == -100).all()
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "attention_mask", "labels"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_are_those_of_the_labels(tiny_tokenizer, encoded, monkeypatch, side):
    monkeypatch.setattr(tiny_tokenizer, "padding_side", side)
    batch = MLMCollator(tiny_tokenizer, ["a", "b"])(encoded[:8])
    expected = [place for place, label in enumerate(batch["labels"].flatten().tolist()) if label != -100]
    assert batch["positions"].tolist() == expected
    assert batch["positions"].dtype == torch.int64
    nothing = MLMCollator(tiny_tokenizer, ["a"])(encode([Example("", "d", ("a",))], tiny_tokenizer, 16))
    assert nothing["positions"].tolist() == []


def test_token_types_for_the_models_that_take_them(tiny_tokenizer, encoded, monkeypatch):
    names = ["input_ids", "token_type_ids", "attention_mask"]
    monkeypatch.setattr(tiny_tokenizer, "model_input_names", names)
    batch = MLMCollator(tiny_tokenizer, ["a", "b"])(encoded[:4])
    assert torch.equal(batch["token_type_ids"], torch.zeros_like(batch["input_ids"]))


def test_padding_on_the_left(tiny_tokenizer, encoded, monkeypatch):
    right = MLMCollator(tiny_tokenizer, ["a", "b"])(encoded[:8])
    monkeypatch.setattr(tiny_tokenizer, "padding_side", "left")
    left = MLMCollator(tiny_tokenizer, ["a", "b"])(encoded[:8])
    assert left["attention_mask"][:, -1].all()
    assert rows(left) == rows(right)


def test_shares_are_berts(tiny_tokenizer):
    """Over n tokens a share's standard deviation is sqrt(p (1 - p) / n); five of them are allowed."""
    long = encode(
        [Example(" ".join(["letter"] * 200), str(i), ("a",)) for i in range(100)], tiny_tokenizer, 202
    )
    letter = tiny_tokenizer.convert_tokens_to_ids("letter")
    batch = MLMCollator(tiny_tokenizer, ["a"])(long)
    chosen = batch["labels"] != -100
    inputs = batch["input_ids"][chosen]
    n, vocabulary = 100 * 200, len(tiny_tokenizer)
    kept = 0.1 + 0.1 / (vocabulary - len(SPECIAL_IDS))  # a random token may be the token itself
    for count, total, share in (
        (chosen.sum(), n, 0.15),
        ((inputs == tiny_tokenizer.mask_token_id).sum(), len(inputs), 0.8),
        ((inputs == letter).sum(), len(inputs), kept),
    ):
        assert abs(float(count) / total - share) < 5 * (share * (1 - share) / total) ** 0.5
    # The random tokens reach over the whole vocabulary, special tokens left out.
    strange = inputs[(inputs != letter) & (inputs != tiny_tokenizer.mask_token_id)]
    assert strange.min() >= len(SPECIAL_IDS)
    assert strange.max() < vocabulary
    assert len(strange.unique()) > 0.7 * vocabulary


def test_short_sequences_get_exactly_one_label_at_a_tiny_probability(tiny_tokenizer, encoded):
    batch = MLMCollator(tiny_tokenizer, ["a", "b"], mask_probability=1e-9)(encoded)
    assert (batch["labels"] != -100).sum(1).tolist() == [1] * len(encoded)


def test_everything_is_chosen_at_probability_one(tiny_tokenizer, encoded):
    for (_, labels), sequence in zip(
        rows(MLMCollator(tiny_tokenizer, ["a", "b"], mask_probability=1.0)(encoded)), encoded, strict=True
    ):
        assert [label != -100 for label in labels] == (sequence.words >= 0).tolist()


@pytest.mark.parametrize("probability", [1e-9, 0.15, 0.5])
def test_whole_words_are_chosen_together(tiny_tokenizer, encoded, probability):
    collator = MLMCollator(tiny_tokenizer, ["a", "b"], mask_probability=probability, whole_word=True)
    several = 0
    for (_, labels), sequence in zip(rows(collator(encoded)), encoded, strict=True):
        chosen = np.array(labels) != -100
        assert chosen.any()
        for word in range(sequence.words.max() + 1):
            pieces = chosen[sequence.words == word]
            assert pieces.all() or not pieces.any()
            several += len(pieces) > 1 and bool(pieces.all())
    assert several > 5


def test_a_text_without_tokens_has_no_label(collator, tiny_tokenizer):
    batch = collator(encode([Example("", "d", ("a",)), Example("she", "d", ("a",))], tiny_tokenizer, 16))
    assert (batch["labels"] != -100).sum(1).tolist() == [0, 1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(indices=st.lists(st.integers(0, 299), min_size=1, max_size=8), epoch=st.integers(0, 3))
def test_masks_do_not_depend_on_the_batch_or_on_any_state(collator, encoded, indices, epoch):
    np.random.seed(len(indices))  # noqa: NPY002 - state that must not matter
    torch.manual_seed(len(indices))
    together = rows(collator([encoded[index] for index in indices], epoch))
    alone = [rows(collator([encoded[index]], epoch))[0] for index in indices]
    assert together == alone


def test_masks_change_with_epoch_seed_and_index(tiny_tokenizer, encoded):
    def labels(seed: int = 0, epoch: int = 0) -> torch.Tensor:
        return MLMCollator(tiny_tokenizer, ["a", "b"], seed=seed)(encoded, epoch)["labels"]

    assert torch.equal(labels(), labels())
    assert not torch.equal(labels(), labels(epoch=1))
    assert not torch.equal(labels(), labels(seed=1))
    same_text = encode([Example("she reads the letter at home", "d", ("a",))] * 2, tiny_tokenizer, 16)
    masked = MLMCollator(tiny_tokenizer, ["a"])
    assert any(not torch.equal(*masked(same_text, epoch)["labels"]) for epoch in range(5))


def test_masks_are_the_same_on_every_machine(collator, tiny_tokenizer):
    """A run resumed elsewhere, or under another version of NumPy, must not see other masks."""
    sequence = encode(
        [Example("she reads the letter in the garden at home", "d", ("a",))], tiny_tokenizer, 16
    )
    places = [(collator(sequence, epoch)["labels"][0] != -100).nonzero()[:, 0].tolist() for epoch in range(6)]
    assert places == [[2, 3], [4, 7], [3, 4, 6], [8], [5], [4, 6, 8]]


# Groups


def test_sequence_level_groups(collator, encoded):
    groups = collator(encoded[:4])["groups"]
    assert groups.dtype == torch.bool
    assert groups.tolist() == [[True, True, False], [True, False, False]] * 2


def test_token_level_groups(tiny_tokenizer):
    annotator = GroupAnnotator(["gender"])
    texts = ["She reads.", "The woman likes his garden", "lamp"]
    encoded = encode([Example(text, "d") for text in texts], tiny_tokenizer, 16, annotator)
    names = ["gender:female", "gender:male", "other"]
    groups = MLMCollator(tiny_tokenizer, names, group_level="token")(encoded)["groups"]
    female, male, other, none = (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)
    assert [[tuple(map(int, token)) for token in sequence] for sequence in groups.tolist()] == [
        [none, female, other, other, none, none, none],
        [none, other, female, other, male, other, none],
        [none, other, none, none, none, none, none],
    ]
    # A group that is too small to stand alone is left to "other".
    folded = MLMCollator(tiny_tokenizer, ["gender:female", "other"], group_level="token")(encoded)["groups"]
    assert folded[1, 4].tolist() == [False, True]


def test_bad_input_to_the_collator(tiny_tokenizer, encoded):
    for options, message in (
        ({"mask_probability": 0.0}, "mask_probability"),
        ({"mask_probability": 1.1}, "mask_probability"),
        ({"mask_probability": float("nan")}, "mask_probability"),
        ({"group_level": "word"}, "group_level"),
        ({"seed": -1}, "seed"),
        ({"group_level": "token", "group_names": ["a"]}, "'other'"),
        ({"group_names": ["a", "a"]}, "distinct"),
    ):
        arguments = {"group_names": ["a", "other"], **options}
        with pytest.raises(ValueError, match=message):
            MLMCollator(tiny_tokenizer, **arguments)
    with pytest.raises(ValueError, match=r"'b' is not one of \['a'\]"):
        MLMCollator(tiny_tokenizer, ["a"])(encoded[:1])
    with pytest.raises(ValueError, match="encoded with an annotator"):
        MLMCollator(tiny_tokenizer, ["a", "other"], group_level="token")(encoded[:1])
    without_mask = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="[PAD]"
    )
    with pytest.raises(ValueError, match="needs a mask token"):
        MLMCollator(without_mask, ["a"])
