"""Groups that nobody named: embeddings, clusters, their names."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from robustdebias.clusters import Clusters, cluster, embed, top_words
from robustdebias.corpus import Example
from robustdebias.grouping import Grouping
from robustdebias.preparation import prepare

RIVER = ["The river carries water.", "Water fills the lake.", "A lake and a river.", "River water is cold."]
BREAD = [
    "He bakes bread.",
    "Bread needs flour and an oven.",
    "The oven is hot, flour is white.",
    "Bread, flour, salt.",
]


def points(*sizes: int, seed: int = 0) -> np.ndarray:
    """Unit vectors [sum(sizes), 8], one bundle for each size, around orthogonal axes."""
    draw = np.random.default_rng(seed)
    rows = [
        np.eye(8)[axis] + 0.05 * draw.standard_normal(8)
        for axis, size in enumerate(sizes)
        for _ in range(size)
    ]
    return np.array([row / np.linalg.norm(row) for row in rows], dtype=np.float32)


# Embeddings


def test_embeddings_are_masked_means_of_length_one(tiny_model, tiny_tokenizer) -> None:
    texts = ["the woman likes bread", "at home", "she reads her book in the morning after work"]
    found = embed(tiny_model, tiny_tokenizer, texts, batch_size=3, progress=False)
    assert found.dtype == np.float32
    tiny_model.eval()
    for row, text in zip(found, texts, strict=True):  # alone, so without padding, in float64
        inputs = tiny_tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = tiny_model.double().bert(**inputs).last_hidden_state[0].mean(0)
        tiny_model.float()
        np.testing.assert_allclose(row, hidden / hidden.norm(), atol=1e-5)


def test_embeddings_do_not_depend_on_the_batch_and_leave_the_model_as_it_was(
    tiny_model, tiny_tokenizer
) -> None:
    texts = [f"the man keeps {number} letters" + " at home" * (number % 5) for number in range(23)]
    tiny_model.train()
    one = embed(tiny_model, tiny_tokenizer, texts, batch_size=1, progress=False)
    many = embed(tiny_model, tiny_tokenizer, texts, batch_size=8, progress=False)
    np.testing.assert_allclose(one, many, atol=1e-5)
    assert tiny_model.training
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_a_text_longer_than_the_model_reads_is_cut(tiny_model, tiny_tokenizer) -> None:
    texts = ["she reads " * 200, "she reads " * 100]
    first, second = embed(tiny_model, tiny_tokenizer, texts, progress=False)
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_what_cannot_be_embedded(tiny_model, tiny_tokenizer) -> None:
    assert embed(tiny_model, tiny_tokenizer, [], progress=False).shape == (0, 32)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        embed(tiny_model, tiny_tokenizer, ["x"], batch_size=0)
    with torch.no_grad():
        tiny_model.bert.embeddings.word_embeddings.weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match="embedding: the model gives NaN or infinity"):
        embed(tiny_model, tiny_tokenizer, ["she reads"], progress=False)


# Clusters


def test_two_topics_part_and_are_named_by_their_words() -> None:
    found = cluster(RIVER + BREAD[:3], points(4, 3), 2)
    assert found.names == ["cluster:1 river-water-lake", "cluster:2 bread-flour-oven"]
    assert found.assign(points(2, 2, seed=1)) == [found.names[0]] * 2 + [found.names[1]] * 2


def test_clusters_are_the_same_every_time_and_come_in_the_order_of_their_sizes() -> None:
    texts, embeddings = [f"word{'abcdefghij'[n % 10]}" for n in range(60)], points(7, 30, 3, 20)
    one, two = (cluster(texts, embeddings, 4, seed=3) for _ in range(2))
    assert one.names == two.names
    assert (one.centres == two.centres).all()
    sizes = [one.assign(embeddings).count(name) for name in one.names]
    assert sizes == [30, 20, 7, 3]
    assert len(set(one.names)) == 4


def test_names_sort_by_number() -> None:
    names = cluster([f"text {n}" for n in range(40)], points(*[5] * 8), 12).names
    assert names == sorted(names)
    assert names[0].startswith("cluster:01")


def test_no_cluster_is_empty() -> None:
    same = np.repeat(points(1, 1), 10, axis=0)  # two different passages, ten times each
    found = cluster(["a"] * 20, same, 5)
    assert len(found.names) == 2
    assert set(found.assign(same)) == set(found.names)


@pytest.mark.parametrize("count", [1, 9])
def test_impossible_numbers_of_clusters(count: int) -> None:
    with pytest.raises(ValueError, match=f"count: expected 2 to 8 clusters, .* got {count}"):
        cluster(RIVER + BREAD, points(4, 4), count)


def test_the_nearest_centre_takes_a_passage() -> None:
    """Against distances worked out one by one, with centres that are not of length one."""
    draw = np.random.default_rng(0)
    centres, embeddings = draw.standard_normal((5, 8)), points(6, 6, 6)
    found = Clusters(list("abcde"), centres.astype(np.float32)).assign(embeddings)
    distances = [[float(np.sum((row - centre) ** 2)) for centre in centres] for row in embeddings]
    assert found == ["abcde"[int(np.argmin(row))] for row in distances]


# Names


def strength(texts: list[str], labels: list[int], cluster: int, word: str) -> float:
    """The z-score of Monroe et al., equations 16, 19 and 22, word by word from the texts."""

    def texts_with(one: str, inside: bool) -> int:
        return sum(
            one in text.split()
            for text, label in zip(texts, labels, strict=True)
            if (label == cluster) == inside
        )

    vocabulary = {one for text in texts for one in text.split()}
    prior = {one: texts_with(one, True) + texts_with(one, False) for one in vocabulary}
    odds, variance = [], 0.0
    for inside in (True, False):
        counts = {one: texts_with(one, inside) + prior[one] for one in vocabulary}
        odds.append(counts[word] / (sum(counts.values()) - counts[word]))
        variance += 1 / counts[word]
    return (math.log(odds[0]) - math.log(odds[1])) / math.sqrt(variance)


def test_the_words_with_the_largest_log_odds_give_the_name() -> None:
    draw = random.Random(0)
    words = ["www", "xxx", "yyy", "zzz", "uuu", "vvv"]
    labels = [number % 2 for number in range(60)]
    texts = [
        " ".join(sorted({*draw.choices(words, weights=range(1, 7) if label else range(6, 0, -1), k=3)}))
        for label in labels
    ]
    found = top_words(texts, labels, 2, count=6)
    for number in range(2):
        scores = {word: strength(texts, labels, number, word) for word in words}
        assert found[number] == [word for word in sorted(words, key=lambda w: -scores[w]) if scores[word] > 0]
    assert len(found[0] + found[1]) == 6


def test_what_names_no_cluster() -> None:
    """Stop words, short words, numbers, words of one text alone, and words that most clusters share."""
    fruits = ["apple", "pear", "plum", "quince"]
    texts = [f"the {fruit} her 12 ab" for fruit in fruits for _ in range(2)]
    texts = [f"{text} common" if number < 6 else text for number, text in enumerate(texts)]
    texts[0] += " once"
    labels = [number // 2 for number in range(8)]
    assert top_words(texts, labels, 4) == [[fruit] for fruit in fruits]
    assert top_words(["the", "a"], [0, 1], 2) == [[], []]


# In a corpus


def test_a_corpus_of_clusters(tiny_model, tiny_tokenizer) -> None:
    """The tiny model is random, but sentences of different words are far apart in it even so."""
    texts = [f"she reads her book {n}" for n in range(30)] + [f"bread bread lamp {n}" for n in range(20)]
    examples = [Example(text, f"d{number}", ("ignored",)) for number, text in enumerate(texts)]
    grouping = Grouping("clusters", count=2, min_texts=5)
    one, two = (
        prepare(examples, grouping, held_out=0.2, model=tiny_model, tokenizer=tiny_tokenizer)
        for _ in range(2)
    )
    assert one == two
    larger, smaller = one.group_names
    assert larger == "cluster:1 book-reads"
    assert smaller == "cluster:2 bread-lamp"
    assert one.coverage.group_texts == [30, 20]
    for piece in one.train + one.held_out:
        assert piece.groups == ((smaller if "bread" in piece.text else larger),)
    assert one.held_out
    lonely = Grouping("clusters", count=2, min_texts=25)
    folded = prepare(examples, lonely, held_out=0.0, model=tiny_model, tokenizer=tiny_tokenizer)
    assert folded.group_names == [larger, "other"]
    assert folded.folded == [smaller]
