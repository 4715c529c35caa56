"""From a corpus to what a run needs: passages with groups, some documents held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from robustdebias.corpus import OTHER, Example, passages, split_documents
from robustdebias.coverage import Coverage
from robustdebias.folding import Combination, combine, fold, group_name
from robustdebias.grouping import Grouping
from robustdebias.groups import GroupAnnotator, collect_names

__all__ = ["ALL", "PreparedCorpus", "annotator_for", "prepare", "spread", "words_within"]

T = TypeVar("T")

ALL = "all"
"""The one group of a corpus without groups."""

_LISTED = 12  # names that a sentence lists before it counts the rest


@dataclass(frozen=True)
class PreparedCorpus:
    """Passages to train on and passages of other documents, their groups, and how much text each group has."""

    train: list[Example]
    held_out: list[Example]
    group_names: list[str]
    coverage: Coverage  # of all passages, before groups too small for training went into "other"
    folded: list[str]  # groups with text that is too little to stand alone, single ones before intersections

    def describe(self) -> str:
        """Coverage, split and what became of small groups, for a person."""
        lines = [str(self.coverage), ""]
        others = dict(zip(self.coverage.names, self.coverage.group_texts, strict=True)).get(OTHER, 0)
        if others:
            lines.append(f"{others:,} texts ({others / self.coverage.texts:.1%}) are in no group: {OTHER}")
        if self.folded:
            lines.append(
                f"too few training texts, so left to their other groups or {OTHER}: {_listed(self.folded)}"
            )
        if absent := [name for name in self.coverage.absent() if name != OTHER]:
            lines.append(f"no text at all: {_listed(absent)}")
        if len(self.group_names) == 1 and self.group_names != [ALL]:
            lines.append(f"only one group is left, {self.group_names[0]}: there is nothing to weigh")
        lines.append(
            f"{len(self.train):,} passages to train on, {len(self.held_out):,} held out (whole documents)"
        )
        return "\n".join(lines)

    def require(self, names: Iterable[str]) -> None:
        """Raises ValueError if one of `names` is no group to train on: it is unknown, without text, or was folded."""
        texts = dict(zip(self.coverage.names, self.coverage.group_texts, strict=True))
        for name in names:
            if name in self.group_names:
                continue
            why = "is not a group here"
            if texts.get(name) or name in self.folded:
                why = "has too few training passages and was folded"
            elif name in texts:
                why = "has no text"
            raise ValueError(f"require: {name!r} {why}; groups to train on: {', '.join(self.group_names)}")


def words_within(max_length: int) -> int:
    """Words of English that nearly always fit ``max_length`` tokens: 48 in 64."""
    return max(max_length * 3 // 4, 1)


def spread(examples: Sequence[T], limit: int) -> list[T]:
    """At most ``limit`` of them, evenly spread; always the same ones."""
    count = min(limit, len(examples))
    return [examples[place * len(examples) // count] for place in range(count)]


def annotator_for(names: str, lexicons: Sequence[str | Path] | None = None) -> GroupAnnotator:
    """From "gender,race:any" (of the lexicons that come with the package) and files with lexicons of one's own.

    Raises: ValueError as ``load_lexicon`` and ``GroupAnnotator`` do.
    """
    named = [name for name in (part.strip() for part in names.split(",")) if name]
    annotator = Grouping("lexicons", (*named, *map(str, lexicons or ()))).annotator()
    assert annotator is not None
    return annotator


def prepare(
    examples: Sequence[Example],
    grouping: Grouping | GroupAnnotator | None,
    *,
    max_words: int = 48,
    held_out: float = 0.1,
    min_texts: int | None = None,
    seed: int = 0,
    model: Any = None,
    tokenizer: Any = None,
) -> PreparedCorpus:
    """Cut into passages, hold documents out, find the groups of each passage, fold small groups.

    Args:
        grouping: where groups come from. An annotator fills in the groups of examples that have none, and None
            stands for ready-made labels.
        max_words: of a passage; about 3/4 of the tokens a sequence has.
        min_texts: instead of the grouping's own; see :class:`Grouping` for what becomes of smaller groups. Their loss
            in a batch, or on the held-out text, would be that of one or two sentences.
        model, tokenizer: what clusters need. With a tokenizer, the coverage counts tokens too.

    Raises: ValueError if labels are missing or, at the level of attributes, do not name their axis; if clusters have no
    model; and what ``split_documents``, ``Grouping.annotator`` and ``clusters.cluster`` raise.
    """
    if isinstance(grouping, Grouping):
        annotator = grouping.annotator()
        if annotator is not None:
            examples = [replace(example, groups=None) for example in examples]
    else:
        annotator = grouping
        grouping = Grouping("labels" if annotator is None else "lexicons")
    train, out = split_documents(passages(examples, max_words), held_out, seed)
    names: list[str] = []  # those that were looked for
    mentions: Counter[str] = Counter()
    fewest = grouping.min_texts if min_texts is None else max(min_texts, 1)
    level = grouping.level
    if grouping.source == "none":
        train, out = ([replace(piece, groups=(ALL,)) for piece in side] for side in (train, out))
        fewest = 1
    elif grouping.source == "clusters":
        train, out = _clustered(train, out, grouping, model, tokenizer)
    elif annotator is not None:
        if all(piece.groups is None for piece in (*train, *out)):
            names = annotator.names
        train, out = (_annotated(side, annotator, mentions) for side in (train, out))
        level = "value" if level == "attribute" else level  # its names are attributes already
    unlabelled = sum(piece.groups is None for piece in (*train, *out))
    if unlabelled:
        raise ValueError(f"groups: {unlabelled} texts have no labels; name lexicons or a label field")

    seen = {group for piece in (*train, *out) for group in piece.groups or ()}
    found = [combine(piece.groups or (), level) for piece in (*train, *out)]
    in_train, in_out = found[: len(train)], found[len(train) :]
    folded: list[str] = []
    for size in range(max((len(one) for text in found for one in text), default=1), 1, -1):
        folded = [*map(group_name, fold(in_train, in_out, size, fewest)), *folded]
    texts = [piece.text for piece in (*train, *out)]
    groups = [[group_name(one) for one in text] or [OTHER] for text in found]
    left = {name for listed in groups for name in listed}
    names = _in_order(left, [name for name in names if name in left or name not in seen])
    coverage = Coverage.of(texts, groups, names, mentions, _token_counts(texts, tokenizer))
    folded = [*map(group_name, fold(in_train, in_out, 1, fewest)), *folded]

    train, out = (_with_groups(*side, names) for side in ((train, in_train), (out, in_out)))
    kept = collect_names(train)
    # Only "other" can be new in what is held out: a text of a folded group, with none such to train on.
    out = [piece for piece in out if set(kept).issuperset(piece.groups or ())]
    return PreparedCorpus(train, out, kept, coverage, folded)


def _annotated(
    examples: Sequence[Example], annotator: GroupAnnotator, mentions: Counter[str]
) -> list[Example]:
    """As `GroupAnnotator.label`, and counts the mentions on the way."""
    labelled = []
    for example in examples:
        if example.groups is None:
            found = [mention.group for mention in annotator.spans(example.text)]
            mentions.update(found)
            example = replace(example, groups=tuple(dict.fromkeys(found)) or (OTHER,))
        labelled.append(example)
    return labelled


def _clustered(
    train: Sequence[Example], out: Sequence[Example], grouping: Grouping, model: Any, tokenizer: Any
) -> tuple[list[Example], list[Example]]:
    """The clusters are those of the training texts; what is held out goes to the nearest."""
    if model is None or tokenizer is None:
        raise ValueError("model: clusters need a model and its tokenizer")
    from robustdebias.clusters import cluster, embed

    texts = [piece.text for piece in train]
    embeddings = embed(model, tokenizer, texts)
    clusters = cluster(texts, embeddings, grouping.count, grouping.seed)
    assigned = clusters.assign(embeddings)
    if out:
        assigned += clusters.assign(embed(model, tokenizer, [piece.text for piece in out]))
    pieces = [replace(piece, groups=(name,)) for piece, name in zip((*train, *out), assigned, strict=True)]
    return pieces[: len(train)], pieces[len(train) :]


def _with_groups(
    examples: Sequence[Example], found: Sequence[set[Combination]], names: Sequence[str]
) -> list[Example]:
    place = {name: number for number, name in enumerate(names)}
    return [
        replace(piece, groups=tuple(sorted(map(group_name, combinations), key=place.__getitem__)) or (OTHER,))
        for piece, combinations in zip(examples, found, strict=True)
    ]


def _in_order(names: set[str], first: Sequence[str]) -> list[str]:
    """Those of `first` as they stand there, the others by name, "other" last."""
    rest = names.difference(first, [OTHER])
    return [name for name in first if name != OTHER] + sorted(rest) + [OTHER] * (OTHER in {*names, *first})


def _token_counts(texts: Sequence[str], tokenizer: Any) -> list[int] | None:
    if tokenizer is None:
        return None
    encoded = tokenizer(list(texts), add_special_tokens=False, padding=False, truncation=False)
    return [len(ids) for ids in encoded["input_ids"]]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
