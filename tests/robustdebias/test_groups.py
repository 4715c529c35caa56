"""Lexicons, the annotator, coverage, masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustdebias.corpus import Example, load_corpus
from robustdebias.groups import (
    Coverage,
    GroupAnnotator,
    builtin_lexicons,
    collect_names,
    group_mask,
    load_lexicon,
)

GENDER = GroupAnnotator(["gender"])
MENTIONS = Path(__file__).parent / "fixtures" / "mentions.tsv"


def labelled_sentences() -> list[tuple[set[str], str]]:
    lines = MENTIONS.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines if not line.startswith("#")]
    return [(set(groups.split(",")), sentence) for groups, sentence in pairs]


@pytest.fixture(scope="module")
def annotator() -> GroupAnnotator:
    return GroupAnnotator(["gender", "race", "religion"])


@pytest.fixture
def make(tmp_path):
    """make(content, name) -> a lexicon file."""

    def write(content: str, name: str = "mine") -> Path:
        path = tmp_path / f"{name}.txt"
        path.write_text(content, encoding="utf-8")
        return path

    return write


def found(annotator: GroupAnnotator, text: str) -> list[tuple[str, str]]:
    return [(text[mention.start : mention.end], mention.group) for mention in annotator.spans(text)]


# The built-in lexicons


@pytest.mark.parametrize(("groups", "sentence"), labelled_sentences())
def test_mentions_and_false_friends(annotator, groups, sentence):
    assert set(annotator.annotate(sentence)) == groups


def test_names(annotator):
    assert annotator.names[:2] == ["gender:female", "gender:male"]
    assert {"race:black", "race:white", "religion:muslim"} < set(annotator.names)
    assert annotator.names[-1] == "other"
    assert {"gender", "race", "religion"} <= set(builtin_lexicons())
    assert builtin_lexicons() == sorted(builtin_lexicons())


def test_every_class_of_the_usual_lexicons_has_a_sentence():
    covered = set().union(*(groups for groups, _ in labelled_sentences()))
    assert covered == set(GroupAnnotator(["gender", "race", "religion"]).names)


def test_groups_come_in_the_order_of_the_names(annotator):
    text = "The Muslim woman and the black man"
    assert annotator.annotate(text) == ("gender:female", "gender:male", "race:black", "religion:muslim")


def test_agreement_with_bolds_own_labels(data_dir):
    """BOLD's sentences are sorted by the person they are about; the annotator knows only the words."""
    examples = load_corpus(data_dir / "bold" / "gender_wiki.json")
    expected = {"American_actors": "gender:male", "American_actresses": "gender:female"}
    decided = [(GENDER.annotate(example.text), expected[example.groups[0]]) for example in examples]
    decided = [(groups, right) for groups, right in decided if len(groups) == 1 and groups != ("other",)]
    assert len(decided) > 1000
    assert sum(groups == (right,) for groups, right in decided) / len(decided) > 0.95


# The rules, on small lexicons


def test_whole_words_plurals_possessives(make):
    annotator = GroupAnnotator([make("[job]\nnurse\nbaby sitter\nspy\nwatch\n")])
    text = "Nurses' nurse's nursed NURSE nursery spies, watches; baby-sitters baby\nsitter baby, sitter"
    assert [word for word, _ in found(annotator, text)] == [
        "Nurses", "nurse", "spies", "watches", "baby-sitters", "baby\nsitter",
    ]  # fmt: skip


def test_capitals(make):
    annotator = GroupAnnotator([make("[a]\nrose\nJordan\nmcDonald\n")])
    assert found(annotator, "A rose. Rose petals. Meet Rose Tyler, ROSE.") == [
        ("rose", "mine:a"),
        ("Rose", "mine:a"),
    ]
    assert found(annotator, "Jordan, jordan, JORDAN") == [("Jordan", "mine:a")]
    assert found(annotator, 'He said: "Rose or McDonald." Mr. Rose') == [("Rose", "mine:a")]


def test_text_without_capitals(make):
    path = make("[a]\nJordan River\nrose\n")
    assert found(GroupAnnotator([path], cased=False), "the jordan river, a ROSE") == [
        ("jordan river", "mine:a"),
        ("ROSE", "mine:a"),
    ]
    assert found(GroupAnnotator([path]), "the jordan river") == []


def test_the_longest_term_wins_and_may_be_ignored(make):
    path = make("[a]\nnew\n[b]\nnew york\n[ignore]\nnew york times\n")
    annotator = GroupAnnotator([path])
    assert annotator.names == ["mine:a", "mine:b", "other"]
    assert found(annotator, "new york new york times new") == [("new york", "mine:b"), ("new", "mine:a")]


def test_lexicons_do_not_hide_each_others_terms(make):
    annotator = GroupAnnotator([make("[a]\nblack woman\n", "one"), make("[b]\nwoman\n", "two")])
    assert found(annotator, "a black woman") == [("black woman", "one:a"), ("woman", "two:b")]


def test_alternatives_and_comments(make):
    lexicon = load_lexicon(make("# no term\n\n[a]\nred|Red man|men\n"))
    listed = {" ".join(term) for term in lexicon.terms}
    assert {"red man", "red men", "Red man", "Red men"} <= listed
    assert not any("#" in term for term in listed)


def test_a_listed_term_goes_before_a_derived_plural(make):
    annotator = GroupAnnotator([make("[m]\nMr\n[f]\nMrs\n")])
    assert annotator.annotate("Dear Mrs Lee") == ("mine:f",)


def test_accents_compare_in_any_normal_form(make):
    annotator = GroupAnnotator([make("[a]\nM\u0101ori\n")])
    text = "the Ma\u0304ori people"
    assert found(annotator, text) == [("Ma\u0304ori", "mine:a")]


def test_merged_classes():
    annotator = GroupAnnotator([load_lexicon("religion").merged(), "gender"])
    assert annotator.names == ["religion:any", "gender:female", "gender:male", "other"]
    assert annotator.annotate("Sikhs, Hindus and Christian Democrats") == ("religion:any",)
    assert annotator.annotate("Christian Democrats") == ("other",)
    named = GroupAnnotator([load_lexicon("religion").merged("")])
    assert named.names == ["religion", "other"]
    assert found(named, "Sikhs, not Christian Democrats") == [("Sikhs", "religion")]


WORDS = [
    "she",
    "She",
    "man",
    "men's",
    "mother-in-law",
    "in",
    "law",
    "king",
    "size",
    "the",
    "Man",
    "Utd",
    "x",
    ".",
]


@given(st.lists(st.sampled_from(WORDS)), st.sampled_from([" ", "-", "", "\n", ", "]))
def test_spans_are_whole_words_in_order(words, joint):
    text = joint.join(words)
    last = 0
    for start, end, group in GENDER.spans(text):
        assert last <= start < end <= len(text)
        assert not text[max(start - 1, 0) : start].isalnum()
        assert not text[end : end + 1].isalnum()
        assert group in GENDER.names
        last = end


# Errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[a]\nx\ny\nx\n", r"mine\.txt:4: duplicate term 'x', listed before at line 2"),
        ("[a]\nx\n[b]\ny|x\n", r"mine\.txt:4: duplicate term 'x', listed before at line 2"),
        ("[a]\n# none\n[b]\nx\n", r"mine\.txt:1: class 'a' has no terms"),
        ("[a]\nx\n[ignore]\n", r"mine\.txt:3: class 'ignore' has no terms"),
        ("[a]\nx\n[a]\ny\n", r"mine\.txt:3: class 'a' was opened before, at line 1"),
        ("x\n[a]\ny\n", r"mine\.txt:1: term 'x' stands before the first \[class\]"),
        ("[a\nx\n", r"mine\.txt:1: expected a class"),
        ("[]\nx\n", r"mine\.txt:1: expected a class"),
        ("[a]\n--\n", r"mine\.txt:2: no word"),
        ("[a]\nx|\n", r"mine\.txt:2: no word in 'x\|', or an empty alternative"),
        ("[ignore]\nx\n", r"no \[class\]"),
        ("", r"no \[class\]"),
    ],
)
def test_bad_lexicons_are_refused_with_file_and_line(make, content, message):
    with pytest.raises(ValueError, match=message):
        load_lexicon(make(content))


def test_unknown_and_repeated_lexicons(make):
    with pytest.raises(ValueError, match=r"'colour': neither a file nor .*gender.*race.*religion"):
        load_lexicon("colour")
    with pytest.raises(ValueError, match="distinct names"):
        GroupAnnotator(["gender", make("[a]\nx\n", "gender")])
    with pytest.raises(ValueError, match="at least one"):
        GroupAnnotator([])


def test_a_lexicon_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_bytes(b"[a]\nM\xe9tis\n")
    with pytest.raises(ValueError, match=r"mine\.txt:2: not UTF-8"):
        load_lexicon(tmp_path / "mine.txt")


# Labels, names, masks, coverage


def test_ready_made_labels_stay(annotator):
    examples = [Example("She left.", "d"), Example("She left.", "d", ("mine",)), Example("Rain.", "d")]
    assert [example.groups for example in annotator.label(examples)] == [
        ("gender:female",),
        ("mine",),
        ("other",),
    ]


def test_collected_names_do_not_depend_on_the_order():
    examples = [Example("", "d", groups) for groups in (("other",), ("b", "a"), ("c",))]
    assert collect_names(examples) == collect_names(examples[::-1]) == ["a", "b", "c", "other"]
    assert collect_names(examples[1:]) == ["a", "b", "c"]
    assert collect_names([Example("", "d")]) == []


def test_group_mask():
    mask = group_mask([("b", "a"), (), ("c",)], ["a", "b", "c"])
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, False], [False, False, False], [False, False, True]]
    assert group_mask([], ["a"]).shape == (0, 1)
    with pytest.raises(ValueError, match=r"'d' is not one of \['a', 'b'\]"):
        group_mask([("d",)], ["a", "b"])
    with pytest.raises(ValueError, match="distinct"):
        group_mask([], ["a", "a"])


def test_coverage():
    coverage = GENDER.coverage(["She saw her.", "He saw her.", "It rained all day."])
    assert coverage == Coverage(
        names=["gender:female", "gender:male", "other"],
        texts=3,
        words=10,
        group_texts=[2, 1, 1],
        group_words=[6, 3, 4],
        mentions=[3, 1, 0],
        overlap=[[2, 1, 0], [1, 1, 0], [0, 0, 1]],
    )
    table = str(coverage).splitlines()
    assert table[0] == "3 texts, 10 words"
    assert table[2].split() == ["gender:female", "2", "66.7%", "6", "60.0%", "3"]
    assert table[-1].split() == ["3", "other", "0", "0", "1"]


def test_coverage_of_nothing_and_of_labels():
    assert "0 texts" in str(GENDER.coverage([]))
    coverage = Coverage.of(["a b", "c"], [("x",), ("x", "y")], ["x", "y"])
    assert (coverage.group_texts, coverage.group_words, coverage.mentions) == ([2, 1], [3, 1], [0, 0])


def test_coverage_counts_tokens_and_names_what_is_absent():
    coverage = Coverage.of(["a b", "c"], [("x",), ("x", "y")], ["x", "y", "z"], tokens=[5, 7])
    assert (coverage.tokens, coverage.group_tokens) == (12, [12, 7, 0])
    assert coverage.absent() == ["z"]
    assert coverage.rows()[1] == {
        "group": "y", "texts": 1, "text_share": 0.5, "words": 1, "word_share": 1 / 3,
        "tokens": 7, "token_share": 7 / 12, "mentions": 0,
    }  # fmt: skip
    table = str(coverage).splitlines()
    assert table[0] == "2 texts, 3 words, 12 tokens"
    assert table[3].split() == ["y", "1", "50.0%", "1", "33.3%", "7", "58.3%", "0"]


def test_coverage_is_counted_in_parts(monkeypatch):
    texts = [f"word {number}" for number in range(10)]
    groups = [("x",) if number % 3 else ("x", "y") for number in range(10)]
    whole = Coverage.of(texts, groups, ["x", "y"], tokens=list(range(10)))
    monkeypatch.setattr("robustdebias.coverage._CHUNK", 3)
    assert Coverage.of(texts, groups, ["x", "y"], tokens=list(range(10))) == whole
    assert whole.overlap == [[10, 4], [4, 4]]


def test_overlaps_of_many_groups_are_listed_by_size():
    names = [f"g{number:02}" for number in range(20)]
    groups = [("g03", "g07"), ("g03", "g07"), ("g03",), ("g00", "g19"), *((name,) for name in names)]
    lines = str(Coverage.of(["x"] * len(groups), groups, names)).splitlines()
    assert lines[-3] == "texts in both groups, the 2 largest of 2 overlaps"
    assert lines[-2].split() == ["2", "50.0%", "of", "g03,", "66.7%", "of", "g07"]  # of 4 texts and of 3
    assert lines[-1].split() == ["1", "50.0%", "of", "g00,", "50.0%", "of", "g19"]
    alone = Coverage.of(["x"] * 20, [(name,) for name in names], names)
    assert str(alone).endswith("no text is in two groups")
