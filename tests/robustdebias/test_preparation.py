"""From a corpus to passages with groups: nothing is lost, small groups are folded, documents stay whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustdebias.corpus import Example
from robustdebias.groups import GroupAnnotator
from robustdebias.preparation import annotator_for, prepare, spread, words_within


def make_examples(count: int = 40) -> list[Example]:
    """Documents of two sentences; every second one about a woman, every tenth also about a Muslim."""
    texts = []
    for number in range(count):
        person = "The woman" if number % 2 else "The visitor"
        faith = "A Muslim prays." if number % 10 == 3 else "The rain stops."
        texts.append(Example(f"{person} reads letter {number}. {faith}", f"document {number}"))
    return texts


@pytest.fixture(scope="module")
def annotator() -> GroupAnnotator:
    return GroupAnnotator(["gender", "religion"])


def test_no_text_is_lost_and_documents_stay_whole(annotator: GroupAnnotator) -> None:
    examples = make_examples()
    corpus = prepare(examples, annotator, max_words=5, held_out=0.3, min_texts=1)
    pieces = corpus.train + corpus.held_out
    assert len(pieces) == 80
    assert sorted(" ".join(piece.text for piece in pieces).split()) == sorted(
        " ".join(example.text for example in examples).split()
    )
    assert not {piece.document for piece in corpus.train} & {piece.document for piece in corpus.held_out}
    assert corpus.held_out
    assert corpus.group_names == ["gender:female", "religion:muslim", "other"]
    assert "80 texts" in corpus.describe()
    assert f"{len(corpus.train)} passages to train on" in corpus.describe()


def test_small_groups_are_folded_into_their_other_groups_or_other(annotator: GroupAnnotator) -> None:
    whole = prepare(make_examples(), annotator, max_words=50, held_out=0.0, min_texts=1)
    folded = prepare(make_examples(), annotator, max_words=50, held_out=0.0, min_texts=5)
    assert "religion:muslim" in whole.group_names
    assert folded.group_names == ["gender:female", "other"]
    assert "religion:muslim" in folded.folded
    assert "religion:muslim" in folded.describe().split("left to their other groups")[1]
    before = {piece.text: piece.groups for piece in whole.train}
    for piece in folded.train:
        kept = tuple(group for group in before[piece.text] if group != "religion:muslim")
        assert piece.groups == (kept or ("other",))


def test_a_group_that_only_the_held_out_text_has_is_folded(annotator: GroupAnnotator) -> None:
    examples = make_examples()
    for seed in range(200):  # a seed whose split holds out the only document about a Muslim
        lonely = [*examples[:3], Example("A Muslim prays.", "lonely"), *examples[4:13]]
        corpus = prepare(lonely, annotator, held_out=0.3, min_texts=1, seed=seed)
        if any(piece.document == "lonely" for piece in corpus.held_out):
            break
    else:
        pytest.fail("no split held it out")
    assert corpus.group_names == ["gender:female", "other"]
    assert [piece.groups for piece in corpus.held_out if piece.document == "lonely"] == [("other",)]


def test_ready_made_labels_stay_and_missing_ones_are_an_error(annotator: GroupAnnotator) -> None:
    labelled = [Example("The woman reads.", str(number), ("nurse",)) for number in range(30)]
    corpus = prepare(labelled, None, held_out=0.2)
    assert corpus.group_names == ["nurse"]
    mixed = [*labelled, *make_examples(2)]
    assert prepare(mixed, annotator, held_out=0.0, min_texts=1).group_names == [
        "gender:female",
        "nurse",
        "other",
    ]
    with pytest.raises(ValueError, match="groups: 2 texts have no labels"):
        prepare(mixed, None)


def test_annotator_from_names_and_files(tmp_path: Path) -> None:
    (tmp_path / "trade.txt").write_text("[craft]\nbaker\n")
    annotator = annotator_for("gender, religion:any", [tmp_path / "trade.txt"])
    assert annotator.names[-3:] == ["religion:any", "trade:craft", "other"]
    assert annotator.annotate("The Muslim baker reads.") == ("religion:any", "trade:craft")
    with pytest.raises(ValueError, match="colour"):
        annotator_for("gender,colour")


def test_spread_is_even_and_bounded() -> None:
    examples = make_examples(10)
    assert spread(examples, 5) == examples[::2]
    assert spread(examples, 10) == spread(examples, 99) == examples
    assert spread(examples, 0) == spread([], 5) == []


def test_words_within() -> None:
    assert (words_within(64), words_within(3), words_within(128)) == (48, 2, 96)
