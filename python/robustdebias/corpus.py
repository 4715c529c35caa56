"""Reading text: files, folders, BOLD's sentences and hub data sets all become a list of `Example`s.

`load_corpus` and `load_corpora` read (`readers.py` has the file formats), `split_documents` holds documents out,
`passages` cuts long texts to a model's length.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from robustdebias.readers import OTHER, READERS, Example, Fields, read_file, read_lines
from robustdebias.sentences import split_sentences

__all__ = [
    "OTHER", "Example", "load_corpora", "load_corpus", "passages", "read_lines", "split_documents",
]  # fmt: skip

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_SAVED_DATASET = ("dataset_info.json", "dataset_dict.json", "state.json")


def load_corpus(
    source: str | Path,
    *,
    text_field: str = "text",
    label_field: str | Sequence[str] | None = None,
    label_axis: bool = False,
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
            - a `.csv` or `.tsv` table with a header, the text in the column `text_field` (GAP: "Text"); fields of a
              `.csv` may be quoted, in a `.tsv` a quotation mark is one;
            - a `.json` file of BOLD's form `{subgroup: {entity: [sentences]}}` (Dhamala et al. 2021): the subgroup
              is the label, the entity the document;
            - a folder of such files, read in the order of their names;
            - a folder that the `datasets` package wrote or can load, or a data set id on the Hugging Face hub,
              `owner/name` or `owner/name:configuration`, of which `split` is read. Needs that package.
        label_field: the column with ready-made group labels, a string or a list of strings, or several such columns;
            an absent or empty label becomes "other". None: the texts are still to be annotated (BOLD's always have
            their labels).
        label_axis: say of which axis a label is, "gender:female", where it does not itself: the axis is the column's
            name, in BOLD the file's without "_wiki" ("gender:American_actors"). Groups at the level of attributes or
            intersections need it.
        document_field: the column that names the document; None: each record is a document.
        limit: keep the first `limit` texts, in the corpus's own order.

    Raises:
        ValueError: naming file and line, for text that is not UTF-8, malformed JSON or tables, a missing field or one
            of the wrong type; for a corpus without text; for a data set that cannot be loaded.
        FileNotFoundError, ModuleNotFoundError: there is no such source, or no package to read it with.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a positive number of texts, got {limit}")
    labels = (label_field,) if isinstance(label_field, str) else tuple(label_field or ())
    fields = Fields(text_field, labels, document_field, label_axis)
    found = (example for example in _read(source, fields, split, limit) if example.text)
    examples = list(islice(found, limit))
    if not examples:
        raise ValueError(f"{source}: no text in this corpus")
    return examples


def load_corpora(sources: Sequence[str | Path], **options: Any) -> list[Example]:
    """Read several corpora, one after the other; `options` are those of `load_corpus`, the limit is each one's.

    Documents of the same name are one document, whatever their corpora, so they are held out together. Raises
    ValueError for no corpus and for one that is listed twice, and what `load_corpus` raises.
    """
    if not sources:
        raise ValueError("sources: expected at least one corpus")
    repeated = [source for number, source in enumerate(sources) if source in sources[:number]]
    if repeated:
        raise ValueError(f"sources: {repeated[0]} is listed twice")
    return [example for source in sources for example in load_corpus(source, **options)]


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

    40 words fit BERT's 64 tokens in 99% of the passages of English news (48: in 92%). A longer sentence is cut between
    words into equal parts. A passage never joins two examples and keeps its example's document and groups; no word is dropped.
    """
    if max_words < 1:
        raise ValueError(f"max_words: expected at least 1, got {max_words}")
    return [replace(example, text=text) for example in examples for text in _pack(example.text, max_words)]


def _read(source: str | Path, fields: Fields, split: str, limit: int | None) -> Iterator[Example]:
    path = Path(source)
    if path.is_file():
        return read_file(path, fields)
    if path.is_dir() and not any((path / name).exists() for name in _SAVED_DATASET):
        files = [file for file in sorted(path.iterdir()) if file.is_file() and file.suffix.lower() in READERS]
        if files:
            return (example for file in files for example in read_file(file, fields))
    if path.is_dir() or (_HUB_ID.fullmatch(str(source)) and path.suffix.lower() not in READERS):
        return _read_dataset(str(source), fields, split, limit)
    raise FileNotFoundError(f"{source}: no such file or folder, nor a data set id such as 'owner/name'")


def _read_dataset(source: str, fields: Fields, split: str, limit: int | None) -> Iterator[Example]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{source}: no text, .jsonl, .csv, .tsv or BOLD file is there; reading it as a data set of the Hugging Face hub needs "
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
    names = {field: _label_names(data.features, field) for field in fields.labels}
    for number, row in enumerate(data):
        record = dict(row)
        for field, known in names.items():
            if known is not None:  # then the label is stored as its number; -1 stands for "none given"
                numbers = record[field] if isinstance(record[field], list) else [record[field]]
                record[field] = [known[label] for label in numbers if label is not None and label >= 0]
        yield fields.example(record, f"{source}, {split} row {number}", default_document=f"{split}:{number}")


def _label_names(features: Any, label_field: str) -> list[str] | None:
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
