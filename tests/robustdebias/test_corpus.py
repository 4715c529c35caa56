"""Reading corpora, holding documents out, cutting passages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustdebias.corpus import Example, load_corpora, load_corpus, passages, split_documents
from robustdebias.sentences import split_sentences, starts_sentence


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Plain text


def test_lines_are_texts_and_blank_lines_part_documents(tmp_path):
    path = write(tmp_path / "a.txt", "One.\r\n  Two. \n\n\nThree.\n \nFour.\n\n")
    examples = load_corpus(str(path))
    assert [example.text for example in examples] == ["One.", "Two.", "Three.", "Four."]
    first, second, third, fourth = (example.document for example in examples)
    assert first == second
    assert len({first, third, fourth}) == 3
    assert all(example.groups is None for example in examples)


def test_without_blank_lines_every_line_is_a_document(tmp_path):
    examples = load_corpus(write(tmp_path / "a.txt", "One.\nTwo.\nThree.\n\n"))
    assert len({example.document for example in examples}) == 3


def test_documents_are_named_without_the_machines_folders(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    here = load_corpus(write(tmp_path / "x" / "a.txt", "One.\n\nTwo."))
    there = load_corpus(write(tmp_path / "y" / "a.txt", "One.\n\nTwo."))
    assert here == there


def test_a_byte_order_mark_is_no_text_and_odd_separators_end_no_line(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfOne\xe2\x80\xa8more.\x0band more.\nTwo.")
    assert [example.text for example in load_corpus(path)] == ["One\u2028more.\x0band more.", "Two."]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_text_that_is_not_utf8_is_refused_with_file_and_line(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", b'{"text": "one"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=rf"a{suffix}:2: not UTF-8 \(byte 0xe9 at column 14\)"):
        load_corpus(path)


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_an_empty_corpus_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match="no text"):
        load_corpus(write(tmp_path / "a.txt", content))


def test_limit(tmp_path):
    path = write(tmp_path / "a.txt", "One.\n\nTwo.\nThree.\n")
    assert [example.text for example in load_corpus(path, limit=2)] == ["One.", "Two."]
    with pytest.raises(ValueError, match="limit"):
        load_corpus(path, limit=0)


# JSON lines


def test_jsonl_fields(tmp_path):
    rows = [
        {"body": " One. ", "who": "women", "source": "p1"},
        {"body": "Two.", "who": ["women", "muslims", "women"], "source": "p1"},
        {"body": "Three.", "who": None, "source": 7},
        {"body": "Four.", "who": [], "source": 7},
        {"body": " ", "who": "women", "source": 8},
    ]
    path = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    assert load_corpus(path, text_field="body", label_field="who", document_field="source") == [
        Example("One.", "p1", ("women",)),
        Example("Two.", "p1", ("women", "muslims")),
        Example("Three.", "7", ("other",)),
        Example("Four.", "7", ("other",)),
    ]
    unlabelled = load_corpus(path, text_field="body")
    assert [example.groups for example in unlabelled] == [None] * 4
    assert len({example.document for example in unlabelled}) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "two"', "not a JSON object"),
        ('["two"]', "expected an object with fields, got list"),
        ('{"body": "two", "label": "x"}', "no field 'text'; this record has 'body', 'label'"),
        ('{"text": "two"}', "no field 'label'"),
        ('{"text": 2, "label": "x"}', "field 'text' should hold a text, got int"),
        ('{"text": "two", "label": 2}', "field 'label' should hold a string or a list of strings, got 2"),
        ('{"text": "two", "label": ["x", null]}', "field 'label'"),
        ('{"text": "\\ud83d", "label": "x"}', "surrogate"),
    ],
)
def test_bad_records_are_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", '{"text": "one", "label": "x"}\n' + line)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: ") as caught:
        load_corpus(path, label_field="label")
    assert message in str(caught.value)


# BOLD, folders, data sets


def test_bold_form(tmp_path):
    content = {"Actresses": {"Ada_Lin": ["She acts.", "She sings."]}, "Actors": {"Bo_Ek": ["He acts.", ""]}}
    path = write(tmp_path / "gender_wiki.json", json.dumps(content, indent=1))
    assert load_corpus(path) == [
        Example("She acts.", "Ada_Lin", ("Actresses",)),
        Example("She sings.", "Ada_Lin", ("Actresses",)),
        Example("He acts.", "Bo_Ek", ("Actors",)),
    ]


@pytest.mark.parametrize("content", ["[1]", '{"a": ["x"]}', '{"a": {"b": "x"}}', '{"a": {"b": [1]}}'])
def test_other_json_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"a.json: .*expected BOLD's form"):
        load_corpus(write(tmp_path / "a.json", content))


def test_malformed_json_is_refused_with_its_line(tmp_path):
    with pytest.raises(ValueError, match=r"a.json:2: not JSON"):
        load_corpus(write(tmp_path / "a.json", '{"a":\n}'))


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    write(tmp_path / "b.txt", "Second.\n")
    write(tmp_path / "a.jsonl", '{"text": "First."}\n')
    write(tmp_path / "notes.md", "Not a corpus.\n")
    assert [example.text for example in load_corpus(tmp_path)] == ["First.", "Second."]


@pytest.mark.parametrize("source", ["missing.txt", "missing.jsonl", "./missing", "a/b/c"])
def test_a_missing_file_is_refused(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_corpus(source)


def test_without_the_datasets_package_a_hub_id_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"owner/name.*pip install datasets"):
        load_corpus("owner/name")


def test_a_hub_id_is_loaded_through_the_datasets_package(monkeypatch):
    calls = []

    class Rows(list):
        def __init__(self, rows):
            super().__init__(rows)
            self.features = {"text": SimpleNamespace(), "topic": SimpleNamespace(names=["women", "men"])}

    def load_dataset(name, configuration, split, streaming):
        calls.append((name, configuration, split, streaming))
        if split == "missing":
            raise ValueError("Unknown split")
        return Rows(
            [{"text": "One.", "topic": 1}, {"text": "Two.", "topic": -1}, {"text": "Three.", "topic": 0}]
        )

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_corpus("owner/name:small", label_field="topic", limit=2) == [
        Example("One.", "train:0", ("men",)),
        Example("Two.", "train:1", ("other",)),
    ]
    load_corpus("owner/name", split="test")
    assert calls == [("owner/name", "small", "train", True), ("owner/name", None, "test", False)]
    with pytest.raises(ValueError, match=r"owner/name, missing: .*Unknown split"):
        load_corpus("owner/name", split="missing")


def test_a_saved_dataset_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "who": datasets.Sequence(datasets.ClassLabel(names=["women", "men"])),
        }
    )
    rows = {"text": ["One.", "Two."], "who": [[1, 0], []]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    examples = load_corpus(tmp_path / "saved", label_field="who")
    assert [example.groups for example in examples] == [("men", "women"), ("other",)]


def test_bold_itself(data_dir):
    examples = load_corpus(data_dir / "bold")
    assert len(examples) == 23_679  # as its authors count
    assert {"American_actors", "Asian_Americans", "islam"} <= {example.groups[0] for example in examples}


# Held-out documents

documents = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=2, max_size=60)


@given(documents, st.floats(0.01, 0.9), st.integers(0, 5))
def test_split_keeps_documents_whole_and_both_sides_filled(names, share, seed):
    examples = [Example(f"text {number}", name) for number, name in enumerate(names)]
    if len(set(names)) < 2:
        with pytest.raises(ValueError, match="held_out"):
            split_documents(examples, share, seed)
        return
    train, out = split_documents(examples, share, seed)
    assert train
    assert out
    assert not {example.document for example in train} & {example.document for example in out}
    assert sorted(train + out, key=examples.index) == examples


def test_a_document_stays_on_its_side_when_others_come():
    few = [Example("x", f"d{number}") for number in range(100)]
    many = [Example("x", f"d{number}") for number in range(5000)]
    held_out_of_few = {example.document for example in split_documents(few, 0.2)[1]}
    held_out_of_many = {example.document for example in split_documents(many, 0.2)[1]}
    assert held_out_of_few == held_out_of_many & {example.document for example in few}
    assert 900 < len(held_out_of_many) < 1100  # 0.2 of 5,000, give or take 3.5 standard deviations
    assert held_out_of_many != {example.document for example in split_documents(many, 0.2, seed=1)[1]}


def test_split_is_the_same_in_every_process():
    examples = [Example("x", f"d{number}") for number in range(12)]
    # The first 8 bytes of blake2b("0:d<n>", digest_size=8) over 2^64 are below 0.3 for these.
    assert [example.document for example in split_documents(examples, 0.3)[1]] == ["d1", "d9", "d10", "d11"]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_split_refuses_impossible_shares(share):
    with pytest.raises(ValueError, match="held_out"):
        split_documents([Example("x", "a"), Example("y", "b")], share)


def test_nothing_is_held_out_at_zero():
    examples = [Example("x", "a")]
    assert split_documents(examples, 0) == (examples, [])


# Sentences and passages


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One two. Three four! Five?", ["One two.", "Three four!", "Five?"]),
        ("Mr. Smith met Dr. J. R. Jones. They ate.", ["Mr. Smith met Dr. J. R. Jones.", "They ate."]),
        ("The U.S. Army paid $4.50. No. 5 won.", ["The U.S. Army paid $4.50.", "No. 5 won."]),
        ('He said: "Stop." Then he left.', ['He said: "Stop."', "Then he left."]),
        ('It isn\'t. "Really?" she asked.', ["It isn't.", '"Really?" she asked.']),
        ("Title line\nBody text", ["Title line", "Body text"]),
        ("e.g. this. and lower case", ["e.g. this. and lower case"]),
        ("  ", []),
    ],
)
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        ("King", True),
        ("the King", False),
        ("It ended. King", True),
        ("Mr. King", False),
        ("M. King", False),
        ('she said, "King', True),
        ('the so-called "King', False),
        ("list:\n  • King", True),
        ("the U.S.\nKing", True),
        ("(King", True),
    ],
)
def test_where_a_sentence_starts(text, starts):
    assert starts_sentence(text, text.index("King")) is starts


def test_passages_hold_whole_sentences_up_to_the_budget():
    text = "aa bb cc. Dd ee ff. Gg hh. Ii jj kk ll mm nn oo pp qq rr. Ss."
    # Budget 6: 3 + 3 words; then 2; then 10 words in two equal parts, the last sentence joining the second.
    cut = passages([Example(text, "doc", ("x",))], max_words=6)
    assert [passage.text for passage in cut] == [
        "aa bb cc. Dd ee ff.",
        "Gg hh.",
        "Ii jj kk ll mm",
        "nn oo pp qq rr. Ss.",
    ]
    assert all((passage.document, passage.groups) == ("doc", ("x",)) for passage in cut)


def test_passages_never_join_examples():
    cut = passages([Example("One.", "doc"), Example("Two.", "doc")])
    assert [passage.text for passage in cut] == ["One.", "Two."]


@given(st.text("ab .!?\n\"'A1", max_size=200), st.integers(1, 12))
def test_passages_keep_every_word_within_the_budget(text, budget):
    cut = [passage.text.split() for passage in passages([Example(text, "doc")], budget)]
    assert [word for words in cut for word in words] == text.split()
    assert all(1 <= len(words) <= budget for words in cut)


def test_passages_refuse_an_impossible_budget():
    with pytest.raises(ValueError, match="max_words"):
        passages([], max_words=0)


# Labels with their axis, several corpora


def test_labels_with_their_axis(tmp_path):
    bold = write(tmp_path / "gender_wiki.json", '{"Actresses": {"Ada": ["She acts."]}}')
    assert [example.groups for example in load_corpus(bold, label_axis=True)] == [("gender:Actresses",)]
    rows = [
        {"text": "One.", "gender": "female", "faith": ["muslim"]},
        {"text": "Two.", "gender": "", "faith": None},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    fields = ["gender", "faith"]
    labels = [example.groups for example in load_corpus(path, label_field=fields, label_axis=True)]
    assert labels == [("gender:female", "faith:muslim"), ("other",)]
    plain = [example.groups for example in load_corpus(path, label_field=fields)]
    assert plain == [("female", "muslim"), ("other",)]


def test_several_corpora(tmp_path):
    first = write(tmp_path / "a.txt", "One.\nTwo.\n")
    second = write(tmp_path / "b.jsonl", '{"text": "Three."}\n{"text": "Four."}\n')
    assert [example.text for example in load_corpora([second, first])] == ["Three.", "Four.", "One.", "Two."]
    assert [example.text for example in load_corpora([first, second], limit=1)] == ["One.", "Three."]
    with pytest.raises(ValueError, match=r"sources: .*a\.txt is listed twice"):
        load_corpora([first, second, first])
    with pytest.raises(ValueError, match="at least one"):
        load_corpora([])
