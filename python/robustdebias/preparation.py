"""From a corpus to what a run needs: passages with groups, some documents held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from robustdebias.corpus import OTHER, Example, passages, split_documents
from robustdebias.groups import Coverage, GroupAnnotator, collect_names, load_lexicon

__all__ = ["PreparedCorpus", "annotator_for", "prepare", "spread", "words_within"]


@dataclass(frozen=True)
class PreparedCorpus:
    """Passages to train on and passages of other documents, their groups, and how much text each group has."""

    train: list[Example]
    held_out: list[Example]
    group_names: list[str]
    coverage: Coverage  # of all passages, before small groups were folded
    folded: list[str]  # groups too small to stand alone

    def describe(self) -> str:
        """Coverage and split, for a person."""
        lines = [str(self.coverage), ""]
        if self.folded:
            lines.append(
                f"too few training texts, so left to their other groups or {OTHER}: {', '.join(self.folded)}"
            )
        lines.append(
            f"{len(self.train):,} passages to train on, {len(self.held_out):,} held out (whole documents)"
        )
        return "\n".join(lines)


def words_within(max_length: int) -> int:
    """Words of English that nearly always fit ``max_length`` tokens: 48 in 64."""
    return max(max_length * 3 // 4, 1)


def spread(examples: Sequence[Example], limit: int) -> list[Example]:
    """At most ``limit`` of them, evenly spread; always the same ones."""
    count = min(limit, len(examples))
    return [examples[place * len(examples) // count] for place in range(count)]


def annotator_for(names: str, lexicons: Sequence[str | Path] | None = None) -> GroupAnnotator:
    """From "gender,race:any" (of the lexicons that come with the package) and files with lexicons of one's own.

    Raises: ValueError as ``load_lexicon`` and ``GroupAnnotator`` do.
    """
    loaded = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        lexicon = load_lexicon(name.removesuffix(":any"))
        loaded.append(lexicon.merged() if name.endswith(":any") else lexicon)
    return GroupAnnotator([*loaded, *(lexicons or [])])


def prepare(
    examples: Sequence[Example],
    annotator: GroupAnnotator | None,
    *,
    max_words: int = 48,
    held_out: float = 0.1,
    min_texts: int = 20,
    seed: int = 0,
) -> PreparedCorpus:
    """Cut into passages, annotate those without ready-made groups, hold documents out, fold small groups.

    Args:
        annotator: needed unless every example brings its groups.
        max_words: of a passage; about 3/4 of the tokens a sequence has.
        min_texts: a group with fewer training passages is folded: its loss in a batch, or on the held-out
            text, would be that of one or two sentences. Its passages stay in their other groups, or in "other".

    Raises: ValueError if groups are missing and there is no annotator, or no group is left; and what
    ``split_documents`` raises.
    """
    pieces = passages(examples, max_words)
    texts = [piece.text for piece in pieces]
    if annotator is not None and all(piece.groups is None for piece in pieces):
        pieces = annotator.label(pieces)
        coverage = annotator.coverage(texts)
    else:
        pieces = annotator.label(pieces) if annotator is not None else pieces
        unlabelled = sum(piece.groups is None for piece in pieces)
        if unlabelled:
            raise ValueError(f"groups: {unlabelled} texts have no labels; name lexicons or a label field")
        coverage = Coverage.of(texts, [piece.groups or () for piece in pieces], collect_names(pieces))
    train, out = split_documents(pieces, held_out, seed)
    counts = Counter(group for piece in train for group in piece.groups or ())
    folded = [name for name in coverage.names if name != OTHER and counts[name] < max(min_texts, 1)]
    train, out = _fold(train, set(folded)), _fold(out, set(folded))
    names = collect_names(train)
    known = set(names)
    if any(not known.issuperset(piece.groups or ()) for piece in out):
        # Only "other" can be new here: a held-out text of a folded group, with none such to train on.
        out = [piece for piece in out if known.issuperset(piece.groups or ())]
    return PreparedCorpus(train, out, names, coverage, folded)


def _fold(examples: Sequence[Example], folded: set[str]) -> list[Example]:
    return [
        replace(
            example, groups=tuple(group for group in example.groups or () if group not in folded) or (OTHER,)
        )
        for example in examples
    ]
