"""Reading text: files, folders, BOLD's sentences and hub data sets all become a list of `Example`s.

`load_corpus` reads, `split_documents` holds documents out, `passages` cuts long texts to a model's length.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from robustdebias.sentences import split_sentences

__all__ = ["OTHER", "Example", "load_corpus", "passages", "read_lines", "split_documents"]

OTHER = "other"
"""The group of every text that no label and no lexicon places elsewhere, so that no text is thrown away."""

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SAVED_DATASET = ("dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Example:
    """A text, the document it was taken from, and its groups (None: still to be annotated)."""

    text: str
    document: str
    groups: tuple[str, ...] | None = None


def load_corpus(
    source: str | Path,
    *,
    text_field: str = "text",
    label_field: str | None = None,
    document_field: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> list[Example]:
    """Read a corpus; blank texts are left out.

    Args:
        source: one of
            - a text file: each line is a text, blank lines separate documents (in a file without blank lines,
              every line is a document of its own);
            - a `.jsonl` file: one object a line, the text under `text_field`;
            - a `.json` file of BOLD's form `{subgroup: {entity: [sentences]}}` (Dhamala et al. 2021): the subgroup
              is the label, the entity the document;
            - a folder of such files, read in the order of their names;
            - a folder that the `datasets` package wrote or can load, or a data set id on the Hugging Face hub,
              `owner/name` or `owner/name:configuration`, of which `split` is read. Needs that package.
        label_field: the column with ready-made group labels, a string or a list of strings; an absent or empty
            label becomes "other". None: the texts are still to be annotated (BOLD's always have their labels).
        document_field: the column that names the document; None: each record is a document.
        limit: keep the first `limit` texts, in the corpus's own order.

    Raises:
        ValueError: naming file and line, for text that is not UTF-8, malformed JSON, a missing field or one of the
            wrong type; for a corpus without text; for a data set that cannot be loaded.
        FileNotFoundError, ModuleNotFoundError: there is no such source, or no package to read it with.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a positive number of texts, got {limit}")
    fields = _Fields(text_field, label_field, document_field)
    found = (example for example in _read(source, fields, split, limit) if example.text)
    examples = list(islice(found, limit))
    if not examples:
        raise ValueError(f"{source}: no text in this corpus")
    return examples


def split_documents(
    examples: Sequence[Example], held_out: float = 0.1, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Split into (train, held out), whole documents at a time.

    A document's side depends on its name and `seed` alone, so it stays where it is when others are added. About a
    share `held_out` (in [0, 1)) of the documents is held out; at least one is on each side, unless `held_out` is 0.
    Raises ValueError for a share outside [0, 1) or a corpus of one document.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out: expected a share in [0, 1), got {held_out}")
    if held_out == 0:
        return list(examples), []
    draw = {document: _uniform(document, seed) for document in {example.document for example in examples}}
    if len(draw) < 2:
        raise ValueError(f"held_out: {held_out} of a corpus with {len(draw)} document(s) cannot be held out")
    ranked = sorted(draw, key=draw.__getitem__)
    out = {document for document in ranked[:-1] if draw[document] < held_out} or {ranked[0]}
    train = [example for example in examples if example.document not in out]
    return train, [example for example in examples if example.document in out]


def passages(examples: Iterable[Example], max_words: int = 40) -> list[Example]:
    """Cut each text into passages of whole sentences, each as many consecutive ones as `max_words` words hold.

    40 words fit BERT's 64 tokens in 99% of the passages of English news (48: in 92%). A longer sentence is cut between words into equal parts. A
    passage never joins two examples and keeps its example's document and groups; no word is dropped.
    """
    if max_words < 1:
        raise ValueError(f"max_words: expected at least 1, got {max_words}")
    return [replace(example, text=text) for example in examples for text in _pack(example.text, max_words)]


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers, without line ends. Raises ValueError naming the first bad line."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1}); "
                    "convert the file to UTF-8"
                ) from None
            yield number, line.rstrip("\r\n")


@dataclass(frozen=True)
class _Fields:
    """Which columns of a record hold what."""

    text: str
    label: str | None
    document: str | None

    def example(self, record: Any, where: str, default_document: str) -> Example:
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object with fields, got {type(record).__name__}")
        for field in filter(None, (self.text, self.label, self.document)):
            if field not in record:
                raise ValueError(
                    f"{where}: no field {field!r}; this record has {', '.join(map(repr, record))}"
                )
        text = record[self.text]
        if not isinstance(text, str):
            raise ValueError(f"{where}: field {self.text!r} should hold a text, got {type(text).__name__}")
        if _SURROGATE.search(text):
            raise ValueError(
                f"{where}: field {self.text!r} holds half a surrogate pair, which is no character"
            )
        document = default_document if self.document is None else str(record[self.document])
        groups = None if self.label is None else self._labels(record[self.label], where)
        return Example(text.strip(), document, groups)

    def _labels(self, value: Any, where: str) -> tuple[str, ...]:
        labels = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ValueError(
                f"{where}: field {self.label!r} should hold a string or a list of strings, got {value!r}"
            )
        return tuple(dict.fromkeys(label for label in labels if label)) or (OTHER,)


def _read(source: str | Path, fields: _Fields, split: str, limit: int | None) -> Iterator[Example]:
    path = Path(source)
    if path.is_file():
        return _reader(path)(path, fields)
    if path.is_dir() and not any((path / name).exists() for name in _SAVED_DATASET):
        files = [file for file in sorted(path.iterdir()) if file.is_file() and file.suffix in _READERS]
        if files:
            return (example for file in files for example in _reader(file)(file, fields))
    if path.is_dir() or (_HUB_ID.fullmatch(str(source)) and path.suffix not in _READERS):
        return _read_dataset(str(source), fields, split, limit)
    raise FileNotFoundError(f"{source}: no such file or folder, nor a data set id such as 'owner/name'")


def _read_text(path: Path, fields: _Fields) -> Iterator[Example]:
    lines = list(read_lines(path))
    while lines and not lines[-1][1].strip():
        lines.pop()
    one_per_line = all(line.strip() for _, line in lines)
    document = 1
    for number, line in lines:
        if line.strip():
            yield Example(line.strip(), f"{path.name}:{number if one_per_line else document}")
        else:
            document = number + 1


def _read_jsonl(path: Path, fields: _Fields) -> Iterator[Example]:
    for number, line in read_lines(path):
        if line.strip():
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not a JSON object: {error}") from None
            yield fields.example(record, where, default_document=f"{path.name}:{number}")


def _read_bold(path: Path, fields: _Fields) -> Iterator[Example]:
    try:
        subgroups = json.loads("\n".join(line for _, line in read_lines(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    form = "expected BOLD's form {subgroup: {entity: [sentences]}}; other records go into a .jsonl file, one a line"
    if not isinstance(subgroups, dict):
        raise ValueError(f"{path}: {form}")
    for subgroup, entities in subgroups.items():
        if not isinstance(entities, dict):
            raise ValueError(f"{path}: {subgroup!r}: {form}")
        for entity, sentences in entities.items():
            if not isinstance(sentences, list) or not all(
                isinstance(sentence, str) for sentence in sentences
            ):
                raise ValueError(f"{path}: {subgroup!r}, {entity!r}: {form}")
            for sentence in sentences:
                yield Example(sentence.strip(), entity, (subgroup,))


_READERS: dict[str, Callable[[Path, _Fields], Iterator[Example]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_bold,
}


def _reader(path: Path) -> Callable[[Path, _Fields], Iterator[Example]]:
    return _READERS.get(path.suffix, _read_text)


def _read_dataset(source: str, fields: _Fields, split: str, limit: int | None) -> Iterator[Example]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{source}: no text, .jsonl or BOLD file is there; reading it as a data set of the Hugging Face hub needs "
            "the datasets package: pip install datasets"
        ) from None
    try:
        if any((Path(source) / name).exists() for name in _SAVED_DATASET):
            data = datasets.load_from_disk(source)
            data = data[split] if isinstance(data, dict) else data
        else:
            name, _, configuration = (source, "", "") if Path(source).exists() else source.partition(":")
            # Streamed when only a beginning is wanted: some data sets are larger than any disk.
            data = datasets.load_dataset(
                name, configuration or None, split=split, streaming=limit is not None
            )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source}, {split}: the datasets package cannot load it: {error}") from error
    names = _label_names(data.features, fields.label)
    for number, row in enumerate(data):
        record = dict(row)
        if names is not None:  # then the label is stored as its number; -1 stands for "none given"
            numbers = (
                record[fields.label] if isinstance(record[fields.label], list) else [record[fields.label]]
            )
            record[fields.label] = [names[label] for label in numbers if label is not None and label >= 0]
        yield fields.example(record, f"{source}, {split} row {number}", default_document=f"{split}:{number}")


def _label_names(features: Any, label_field: str | None) -> list[str] | None:
    """The names of a ClassLabel column (or of a list of them), None for any other column."""
    feature = (features or {}).get(label_field)
    feature = getattr(feature, "feature", feature)
    return getattr(feature, "names", None)


def _uniform(document: str, seed: int) -> float:
    """A number in [0, 1) that depends on the document's name and the seed alone."""
    digest = hashlib.blake2b(f"{seed}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _pack(text: str, max_words: int) -> Iterator[str]:
    packed: list[str] = []
    for sentence in split_sentences(text):
        words = sentence.split()
        if packed and len(packed) + len(words) > max_words:
            yield " ".join(packed)
            packed = []
        parts = -(-len(words) // max_words)
        for part in range(1, parts):
            cut = len(words) // (parts - part + 1)
            yield " ".join(words[:cut])
            words = words[cut:]
        packed += words
    if packed:
        yield " ".join(packed)
