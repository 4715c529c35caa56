"""From a corpus to passages with groups: nothing is lost, small groups are folded, documents stay whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from robustdebias.corpus import Example
from robustdebias.grouping import Grouping, grouping_for
from robustdebias.groups import GroupAnnotator
from robustdebias.preparation import PreparedCorpus, annotator_for, prepare, spread, words_within


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


# Where groups come from


def names_of(corpus: PreparedCorpus) -> list[tuple[str, ...] | None]:
    return [piece.groups for piece in corpus.train]


def labelled(*rows: tuple[str, ...] | None) -> list[Example]:
    return [Example(f"Text {number}.", f"d{number}", groups) for number, groups in enumerate(rows)]


def whole(examples: list[Example], grouping: Grouping, **options: Any) -> PreparedCorpus:
    return prepare(examples, grouping, held_out=0.0, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "words"}, "source: expected one of lexicons, labels, clusters, none, got 'words'"),
        ({"level": "token"}, "level: expected one of attribute, value, intersection, got 'token'"),
        ({"source": "clusters", "level": "intersection"}, "level: 'intersection' needs lexicons or labels"),
        ({"source": "none", "level": "attribute"}, "level: 'attribute' needs lexicons or labels"),
        ({"lexicons": ()}, "lexicons: expected at least one"),
        ({"lexicons": "gender"}, "lexicons: expected a sequence of names, got the text 'gender'"),
        ({"min_texts": 0}, "min_texts: expected at least 1, got 0"),
        ({"source": "clusters", "count": 1}, "count: expected at least 2 clusters, got 1"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
    ],
)
def test_an_impossible_grouping_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grouping(**options)


def test_the_annotator_of_a_grouping(tmp_path: Path) -> None:
    (tmp_path / "trade.txt").write_text("[craft]\nbaker\n[land]\nfarmer\n")
    lexicons = ("gender", "religion:any", str(tmp_path / "trade.txt"))
    by_value = Grouping(lexicons=lexicons).annotator()
    assert by_value is not None
    assert by_value.names == [
        "gender:female", "gender:male", "religion:any", "trade:craft", "trade:land", "other",
    ]  # fmt: skip
    by_attribute = Grouping(lexicons=lexicons, level="attribute").annotator()
    assert by_attribute is not None
    assert by_attribute.names == ["gender", "religion", "trade", "other"]
    assert by_attribute.annotate("The Muslim baker reads.") == ("religion", "trade")
    assert Grouping("labels").annotator() is Grouping("none").annotator() is None


def test_lexicons_find_groups_whatever_labels_there_are() -> None:
    examples = [Example("She reads.", "a", ("mine",)), Example("It rains.", "b", ("mine",))]
    corpus = whole(examples, Grouping(lexicons=("gender",), min_texts=1))
    assert names_of(corpus) == [("gender:female",), ("other",)]
    assert corpus.coverage.names == ["gender:female", "gender:male", "other"]
    assert corpus.coverage.mentions == [1, 0, 0]
    assert "no text at all: gender:male\n" in corpus.describe()
    assert "1 texts (50.0%) are in no group" in corpus.describe()


def test_one_group_of_all_texts() -> None:
    corpus = whole(make_examples(4), Grouping("none", min_texts=1000))
    assert names_of(corpus) == [("all",)] * 4
    assert (corpus.group_names, corpus.folded) == (["all"], [])
    assert corpus.coverage.group_texts == [4]


def test_attributes() -> None:
    rows = [("gender:female", "faith:muslim"), ("gender:male",), ("gender:female", "gender:male"), ("other",)]
    corpus = whole(labelled(*rows), Grouping("labels", level="attribute", min_texts=1))
    assert names_of(corpus) == [("faith", "gender"), ("gender",), ("gender",), ("other",)]
    words = [Example("The Muslim woman reads.", "a"), Example("She and he read.", "b"), Example("Rain.", "c")]
    found = whole(words, Grouping(lexicons=("gender", "religion"), level="attribute", min_texts=1))
    assert names_of(found) == [("gender", "religion"), ("gender",), ("other",)]
    assert found.coverage.mentions == [3, 1, 0]
    with pytest.raises(
        ValueError, match=r"level: 'attribute' needs labels of the form axis:value, got 'women'"
    ):
        whole(labelled(("women",)), Grouping("labels", level="attribute"))


def test_intersections() -> None:
    rows = [
        ("gender:female", "faith:muslim"),
        ("gender:female",),
        ("gender:female", "gender:male", "faith:muslim"),
        ("women", "men"),  # without a colon they are of one axis
        ("women", "gender:male"),
        ("other",),
    ]
    corpus = whole(labelled(*rows), Grouping("labels", level="intersection", min_texts=1))
    assert [set(groups or ()) for groups in names_of(corpus)] == [
        {"faith:muslim x gender:female"},
        {"gender:female"},
        {"faith:muslim x gender:female", "faith:muslim x gender:male"},
        {"women", "men"},
        {"women x gender:male"},
        {"other"},
    ]


def test_small_intersections_fold_into_smaller_ones_and_these_into_other() -> None:
    """Counted by hand, groups need 3 texts: a:1 x b:1 has them, a:2 x b:1 has not; of its parts b:1 has, a:2 has not."""
    rows = [
        *[("a:1", "b:1")] * 3,
        ("a:2", "b:1"),
        *[("b:1",)] * 2,
        ("a:2",),
        ("a:1", "a:2", "b:1"),  # b:1 is in the intersection that it keeps
        ("c:1",),
    ]
    corpus = whole(labelled(*rows), Grouping("labels", level="intersection", min_texts=3))
    both = ("a:1 x b:1",)
    # a:2 is what is left of rows 3, 6 and 7: three texts, enough.
    assert names_of(corpus) == [
        *[both] * 3, ("a:2", "b:1"), *[("b:1",)] * 2, ("a:2",), ("a:1 x b:1", "a:2"), ("other",),
    ]  # fmt: skip
    assert corpus.folded == ["c:1", "a:2 x b:1"]
    assert dict(zip(corpus.coverage.names, corpus.coverage.group_texts, strict=True)) == {
        "a:1 x b:1": 4, "a:2": 3, "b:1": 3, "c:1": 1,
    }  # fmt: skip
    fewer = whole(labelled(*rows[:6], *rows[7:]), Grouping("labels", level="intersection", min_texts=3))
    assert names_of(fewer)[3] == ("b:1",)  # now a:2 has two
    assert fewer.folded == ["a:2", "c:1", "a:2 x b:1"]


def test_triples_fold_into_pairs_first() -> None:
    rows = [("a:1", "b:1", "c:1"), *[("a:1", "b:1")] * 2, *[("c:1",)] * 2]
    corpus = whole(labelled(*rows), Grouping("labels", level="intersection", min_texts=3))
    # Of the triple's pairs only a:1 x b:1 reaches 3; c:1 is not in it and stands alone, a:1 and b:1 are.
    assert names_of(corpus) == [("a:1 x b:1", "c:1"), *[("a:1 x b:1",)] * 2, *[("c:1",)] * 2]
    assert corpus.folded == ["a:1 x c:1", "b:1 x c:1", "a:1 x b:1 x c:1"]


@settings(deadline=None)
@given(
    st.lists(st.sets(st.sampled_from(["a:1", "a:2", "b:1", "b:2", "c:1"])), min_size=2, max_size=30),
    st.integers(1, 6),
    st.sampled_from(["attribute", "value", "intersection"]),
)
def test_every_group_to_train_on_is_large_enough_and_true_of_its_texts(rows, fewest, level) -> None:
    examples = labelled(*(tuple(sorted(row)) or ("other",) for row in rows))
    corpus = prepare(examples, Grouping("labels", level=level, min_texts=fewest), held_out=0.3)
    counts = Counter(group for piece in corpus.train for group in piece.groups or ())
    assert all(count >= fewest for group, count in counts.items() if group != "other")
    assert set(counts) == set(corpus.group_names)
    assert not set(corpus.folded) & set(corpus.group_names)
    given = {example.text: set(example.groups or ()) for example in examples}
    for piece in corpus.train + corpus.held_out:
        assert piece.groups
        assert set(piece.groups) <= set(corpus.group_names)
        for group in set(piece.groups) - {"other"}:
            members = group.split(" x ")
            mine = (
                {label.split(":")[0] for label in given[piece.text]}
                if level == "attribute"
                else given[piece.text]
            )
            assert set(members) <= mine


def test_required_groups() -> None:
    rows = [*[("a:1",)] * 3, ("a:2",), ("a:1",)]
    corpus = whole(labelled(*rows), Grouping("labels", min_texts=2))
    corpus.require(["a:1", "other"])
    with pytest.raises(ValueError, match="require: 'a:2' has too few training passages and was folded"):
        corpus.require(["a:2"])
    with pytest.raises(ValueError, match="require: 'b' is not a group here; groups to train on: a:1, other"):
        corpus.require(["a:1", "b"])
    words = whole(make_examples(4), Grouping(lexicons=("gender",), min_texts=1))
    with pytest.raises(ValueError, match="require: 'gender:male' has no text"):
        words.require(["gender:male"])


def test_tokens_are_counted_with_a_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [Example("the woman likes bread", "a"), Example("at home", "b")]
    corpus = whole(examples, Grouping(lexicons=("gender",), min_texts=1), tokenizer=tiny_tokenizer)
    assert corpus.coverage.tokens == 6
    assert corpus.coverage.group_tokens == [4, 0, 2]


def test_no_text_at_all() -> None:
    corpus = whole([], Grouping(lexicons=("gender",)))
    assert (corpus.train, corpus.group_names) == ([], [])
    assert "0 texts, 0 words" in corpus.describe()
    assert "0 texts" in str(whole([], Grouping("labels")).coverage)


def test_clusters_need_a_model() -> None:
    with pytest.raises(ValueError, match="model: clusters need a model and its tokenizer"):
        whole(make_examples(4), Grouping("clusters"))


def test_what_the_options_of_a_command_ask_for() -> None:
    plain, marked = make_examples(2), labelled(("x",))
    assert grouping_for(plain) == Grouping()
    assert grouping_for(marked) == Grouping("labels")
    assert grouping_for(marked, groups="gender, religion:any") == Grouping(
        lexicons=("gender", "religion:any")
    )
    assert grouping_for(plain, groups="", lexicons=[Path("x.txt")]) == Grouping(lexicons=("x.txt",))
    assert grouping_for(plain, lexicons=["x.txt"]) == Grouping(
        lexicons=("gender", "race", "religion", "x.txt")
    )
    assert grouping_for(plain, label_field=["who"], level="intersection", min_texts=3) == Grouping(
        "labels", level="intersection", min_texts=3
    )
    assert grouping_for(marked, clusters=5, seed=7) == Grouping("clusters", count=5, seed=7)
    with pytest.raises(ValueError, match=r"groups: .* labels and lexicons were asked for"):
        grouping_for(plain, groups="gender", label_field="who")
    with pytest.raises(ValueError, match="lexicons: expected at least one"):
        grouping_for(plain, groups="")
