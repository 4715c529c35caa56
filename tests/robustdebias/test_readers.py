"""File formats: tables, what is no UTF-8 text, WikiText."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustdebias.corpus import Example, load_corpus, read_lines
from robustdebias.wikitext import detokenize, wikitext_lines


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Tables


def test_a_tsv_with_a_header(tmp_path):
    path = write(
        tmp_path / "gap.tsv", 'ID\tText\tURL\r\nd-1\t"Hers," she said.\tu1\r\n\r\nd-2\t He left. \tu2\r\n'
    )
    assert load_corpus(path, text_field="Text", document_field="URL") == [
        Example('"Hers," she said.', "u1"),
        Example("He left.", "u2"),
    ]
    assert [example.document for example in load_corpus(path, text_field="Text")] == [
        "gap.tsv:2",
        "gap.tsv:4",
    ]


def test_a_csv_with_quoted_fields_over_several_lines(tmp_path):
    path = write(tmp_path / "a.csv", 'text,who\n"One, ""two""\nthree.",women\nFour.,\n')
    assert load_corpus(path, label_field="who") == [
        Example('One, "two"\nthree.', "a.csv:2", ("women",)),
        Example("Four.", "a.csv:4", ("other",)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "body,who\nx,y\n", r"a\.csv:1: no column 'text'; the header has 'body', 'who'"),
        ("a.tsv", "text\nx\n", r"a\.tsv:1: no column 'who'; the header has 'text'"),
        ("a.tsv", "text\twho\nx\ty\nx\n", r"a\.tsv:3: 1 fields, but the header has 2 columns"),
        ("a.csv", "text,who\nx,y,z\n", r"a\.csv:2: 3 fields, but the header has 2 columns"),
        ("a.csv", "text,who,text\nx,y,z\n", r"a\.csv:1: column 'text' occurs more than once"),
        ("a.csv", 'text,who\na,b\n"x" y,z\n', r"a\.csv:3: not a row of the table"),
        ("a.csv", 'text,who\n"x,z\n', r"a\.csv:2: not a row of the table"),
        ("a.csv", "text,who\n", "no text"),
        ("a.csv", b"text,who\ncaf\xe9,y\n", r"a\.csv:2: not UTF-8 \(byte 0xe9 at column 4\)"),
    ],
)
def test_bad_tables_are_refused_with_file_and_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(write(tmp_path / name, content), label_field="who")


def test_a_text_may_be_long_and_a_suffix_in_capitals(tmp_path):
    text = "word " * 40_000
    assert load_corpus(write(tmp_path / "A.TSV", f"text\n{text}\n"))[0].text == text.strip()


def test_gap_itself(data_dir):
    examples = load_corpus(data_dir / "gap" / "gap-development.tsv", text_field="Text", document_field="URL")
    assert len(examples) == 2000  # as its authors count
    assert all(example.document.startswith("http://en.wikipedia.org/") for example in examples)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('"text"\n"One."\n'.encode("utf-16"), r":1: not UTF-8 \(byte 0xff at column 1: the file is UTF-16\)"),
        ('"text"\n"One."\n'.encode("utf-16-le"), r":1: NUL character at column 2: UTF-16, or no text file"),
        (b'"text"\n"O\0ne."\n', r":2: NUL character at column 3"),
        (b'"text"\r"One."\r"Two."\r', r":1: carriage return without line feed at column 7"),
        (b'"text"\n"One."\n"Z\xfcrich"\n', r":3: not UTF-8 \(byte 0xfc at column 3\)"),
    ],
    ids=["UTF-16", "UTF-16 without mark", "NUL", "CR", "mixed"],
)
def test_what_is_no_utf8_text_is_refused_in_every_format(tmp_path, suffix, content, message):
    path = write(tmp_path / f"a{suffix}", content)
    with pytest.raises(ValueError, match=rf"a\{suffix}{message}"):
        list(read_lines(path))
    with pytest.raises(ValueError, match=rf"a\{suffix}:\d"):
        load_corpus(path)


# WikiText


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("Blue @-@ water , 1 @,@ 500 @.@ 5 km ; $ 3 million", "Blue-water, 1,500.5 km; $3 million"),
        ('said , " It is ( not ) red . " Then', 'said, "It is (not) red." Then'),
        ("Lester 's ships ' guns don 't fire !", "Lester's ships' guns don't fire!"),
        ("<unk> 's [ ... ] 34 % – so : what ?", "<unk>'s [...] 34% – so: what?"),
        ("1 @-@ 2 @-@ 3", "1-2-3"),
        ("Nothing to do", "Nothing to do"),
    ],
)
def test_detokenize(tokens, text):
    assert detokenize(tokens) == text


def test_wikitext_lines(tmp_path):
    content = " \n = A Lobster = \n \n It lives , and eats . \n \n = = Size = = \n \n Big . \n \n = B = \n \n x = 2 \n"
    assert wikitext_lines(write(tmp_path / "w.txt", content)) == [
        Example("It lives, and eats.", "w.txt:2"),
        Example("Big.", "w.txt:2"),
        Example("x = 2", "w.txt:10"),
    ]
    with pytest.raises(ValueError, match=r"w\.txt: no text"):
        wikitext_lines(write(tmp_path / "w.txt", " = A = \n"))


def test_wikitext_itself(data_dir):
    examples = wikitext_lines(data_dir / "wikitext2" / "test.txt")
    assert len({example.document for example in examples}) == 60  # articles, as its authors count
    text = "\n".join(example.text for example in examples)
    assert not [mark for mark in ("@-@", "@,@", "@.@", " ,", "( ") if mark in text]
