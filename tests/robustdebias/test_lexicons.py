"""The lexicons that come with the package: what they find and leave alone, and how precise they were found to be."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

from robustdebias.groups import LEXICON_DIR, GroupAnnotator, builtin_lexicons, load_lexicon
from scripts.sample_mentions import (
    TRIGGERS,
    Item,
    app,
    fingerprint,
    read_items,
    sample_mentions,
    sample_sentences,
)

FIXTURES = Path(__file__).parent / "fixtures"
DOCS = Path(__file__).parents[2] / "docs" / "lexicons.md"
LEXICONS = builtin_lexicons()


def read_rows(name: str) -> list[list[str]]:
    lines = (FIXTURES / name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if not line.startswith("#")]


def sentences(lexicon: str) -> list[tuple[set[str], str]]:
    """Sentences written for the tests, with the classes that `lexicon` should find."""
    return [
        (set(classes.split(",")) - {"none"}, sentence)
        for classes, sentence in read_rows(f"mentions_{lexicon}.tsv")
    ]


@pytest.fixture(scope="module")
def annotators() -> dict[str, GroupAnnotator]:
    return {lexicon: GroupAnnotator([lexicon]) for lexicon in LEXICONS}


# What they find


@pytest.mark.parametrize(
    ("lexicon", "classes", "sentence"),
    [(lexicon, *row) for lexicon in LEXICONS for row in sentences(lexicon)],
)
def test_mentions_and_false_friends(annotators, lexicon, classes, sentence):
    found = {mention.group for mention in annotators[lexicon].spans(sentence)}
    assert found == {f"{lexicon}:{value}" for value in classes}


def test_the_eight_demographics():
    assert LEXICONS == [
        "age", "disability", "gender", "nationality", "orientation", "profession", "race", "religion",
    ]  # fmt: skip


@pytest.mark.parametrize("lexicon", LEXICONS)
def test_every_class_has_a_sentence_and_false_friends_are_many(lexicon):
    written = sentences(lexicon)
    assert set().union(*(classes for classes, _ in written)) == set(load_lexicon(lexicon).classes)
    assert sum(not classes for classes, _ in written) >= 12


# How they are made


@pytest.mark.parametrize("lexicon", LEXICONS)
def test_no_term_is_in_two_classes_whatever_its_capitals(lexicon):
    classes = defaultdict(set)
    for term, value in load_lexicon(lexicon).terms.items():
        if value is not None:
            classes[" ".join(term).lower()].add(value)
    assert {term: values for term, values in classes.items() if len(values) > 1} == {}


@pytest.mark.parametrize("lexicon", LEXICONS)
def test_every_class_has_eight_terms(lexicon):
    loaded = load_lexicon(lexicon)
    values = list(loaded.terms.values())
    for value in loaded.classes:
        assert values.count(value) >= 16, value  # each term counts twice, with its plural


def test_nationalities_share_their_words_for_people():
    """A noun that is added to one region and not to the others would make the regions differ by their trades."""
    lines = (LEXICON_DIR / "nationality.txt").read_text(encoding="utf-8").splitlines()
    nouns = [line.split()[1] for line in lines if " " in line and len(line) > 300]
    classes = load_lexicon("nationality").classes
    assert len(nouns) == len(classes)
    assert len(set(nouns)) == 1


# How precise they are: mentions and sentences of public corpora, read and judged; the texts stay where they are


def precision_table() -> list[str]:
    """The rows of the table in docs/lexicons.md, from the labels alone."""
    right, missed = defaultdict(list), defaultdict(list)
    for *_, group, verdict, _hash in read_rows("mention_labels.tsv"):
        right[group.split(":")[0]].append(verdict == "y")
    for *_, lexicon, how, verdict, _hash in read_rows("mentions_missed.tsv"):
        missed[lexicon, how].append(verdict == "y")
    rows = []
    for lexicon in LEXICONS:
        hits, total = sum(right[lexicon]), len(right[lexicon])
        low, high = binomtest(hits, total).proportion_ci(method="wilson")
        random, trigger = (missed[lexicon, how] for how in ("random", "trigger"))
        rows.append(
            f"| {lexicon} | {hits} of {total} | {hits / total:.1%} | {low:.1%} to {high:.1%} "
            f"| {sum(random)} of {len(random)} | {sum(trigger)} of {len(trigger)} |"
        )
    return rows


def test_the_documented_precision_is_that_of_the_labels():
    text = DOCS.read_text(encoding="utf-8")
    documented = [line for line in text.splitlines() if re.match(r"\| \w+ \| \d+ of \d+ \|", line)]
    assert documented == precision_table()


def test_enough_was_read():
    for lexicon, row in zip(LEXICONS, precision_table(), strict=True):
        hits, total = map(int, re.findall(r"(\d+) of (\d+)", row)[0])
        assert total >= 60, lexicon
        assert hits / total >= 0.9, lexicon
        assert row.count(" of 40 ") == 2, lexicon


def test_the_judged_mentions_are_still_found(data_dir, annotators):
    """Each is in the evaluation half of the corpora, unchanged, and the lexicon finds it; else the labels are stale."""
    items = evaluation_items(data_dir)
    for file, key, start, end, group, _verdict, expected in read_rows("mention_labels.tsv"):
        text, span = items[file, key], (int(start), int(end))
        assert fingerprint(text, *span) == expected
        assert (*span, group) in annotators[group.split(":")[0]].spans(text)


def test_the_judged_sentences_are_still_without_a_mention(data_dir, annotators):
    items = evaluation_items(data_dir)
    for file, key, start, end, lexicon, _how, _verdict, expected in read_rows("mentions_missed.tsv"):
        text, span = items[file, key], (int(start), int(end))
        assert fingerprint(text, *span) == expected
        assert annotators[lexicon].spans(text[slice(*span)]) == []


def evaluation_items(data_dir: Path) -> dict[tuple[str, str], str]:
    corpora = read_items(data_dir, "evaluation").values()
    return {(item.file, item.key): item.text for items in corpora for item in items}


# The script that draws them


@pytest.fixture
def corpora(tmp_path) -> Path:
    """A data folder with self-written texts in the three forms."""
    women = ", ".join(f'["The woman number {number} went home early today."]' for number in range(20))
    bold = ", ".join(f'"entity {number}": {value}' for number, value in enumerate(women.split(", ")))
    for folder, name, text in (
        ("bold", "mine_wiki.json", f'{{"group": {{{bold}}}}}'),
        ("wikitext2", "valid.txt", "\n".join(f" A man saw {number} queer clocks there . \n" for number in range(20))),
        ("gap", "mine.tsv", "ID\tText\n" + "".join(f'mine-{n}\tShe said "no to him again.\n' for n in range(20))),
    ):  # fmt: skip
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_halves_do_not_overlap(corpora):
    def keys(part: str | None) -> set[tuple[str, str]]:
        return {(item.file, item.key) for items in read_items(corpora, part).values() for item in items}

    tuning, evaluation = keys("tuning"), keys("evaluation")
    assert tuning
    assert evaluation
    assert not tuning & evaluation
    assert tuning | evaluation == keys(None)
    assert len(keys(None)) == 60
    assert {("gap/mine.tsv", "mine-3"), ("wikitext2/valid.txt", "1")} < keys(None)


def test_mentions_come_evenly_from_the_corpora(corpora):
    items = read_items(corpora)
    drawn = list(sample_mentions(items, "gender", 6, seed=1))
    assert drawn == list(sample_mentions(items, "gender", 6, seed=1))
    assert drawn != list(sample_mentions(items, "gender", 6, seed=2))
    files = [(group.split(":")[1], found.item.file.split("/")[0]) for group, found in drawn]
    expected = [("female", "bold"), ("female", "gap")] * 3 + [("male", "wikitext2"), ("male", "gap")] * 3
    assert sorted(files) == sorted(expected)


def test_sentences_without_a_mention():
    texts = [
        "The straight road ends at the lake.",
        "He is a gay man from the north.",
        "Rain fell all day in town.",
    ]
    items = {"mine": [Item("mine.txt", str(number), text) for number, text in enumerate(texts)]}

    def drawn(trigger: str) -> Iterator[str]:
        return (
            item.text[start:end] for item, start, end in sample_sentences(items, "orientation", 9, 0, trigger)
        )

    assert sorted(drawn("")) == [texts[2], texts[0]]
    assert list(drawn(TRIGGERS["orientation"])) == [texts[0]]


def test_the_script_prints_references_or_text(corpora):
    def lines(*options: str) -> list[list[str]]:
        result = CliRunner().invoke(app, [str(corpora), "gender", "--per-class", "3", *options])
        assert result.exit_code == 0, result.output
        return [line.split("\t") for line in result.output.splitlines()]

    shown, hashed = lines(), lines("--references")
    assert [row[:5] for row in shown] == [row[:5] for row in hashed]
    assert len(shown) == 6
    assert all(re.search(r"\[(woman|[Ss]he|man|him)\]", row[5]) for row in shown)
    assert all(re.fullmatch(r"[0-9a-f]{12}", row[5]) for row in hashed)


def test_the_script_says_what_is_missing(corpora):
    def message(*arguments: str) -> str:
        result = CliRunner().invoke(app, [str(corpora), *arguments])
        assert result.exit_code == 2
        return " ".join(re.sub(r"[│\n]", " ", result.output).split())

    assert "neither a file nor one" in message("height")
    own = corpora / "mine.txt"
    own.write_text("[a]\nclock\n", encoding="utf-8")
    assert "triggers: there are none for" in message(str(own), "--unmatched", "2", "--triggers")
    (corpora / "gap" / "mine.tsv").unlink()
    assert "data: no gap/*.tsv under" in message("gender")
