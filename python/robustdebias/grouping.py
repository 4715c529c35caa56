"""Where groups come from: the one description that every command and every experiment shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from robustdebias.corpus import Example
from robustdebias.groups import GroupAnnotator, Lexicon, load_lexicon

__all__ = ["DEFAULT_LEXICONS", "Grouping", "Level", "Source", "grouping_for"]

Source = Literal["lexicons", "labels", "clusters", "none"]
Level = Literal["attribute", "value", "intersection"]

DEFAULT_LEXICONS = ("gender", "race", "religion")


@dataclass(frozen=True)
class Grouping:
    """Which groups the passages of a corpus are in.

    Args:
        source: "lexicons": the groups whose words a passage holds, whatever labels it brings; "labels": ready-made ones
            (a column, BOLD's own); "clusters": passages that are alike to a model, see :mod:`robustdebias.clusters`;
            "none": all are in the one group "all", for ERM and for objectives that need no groups.
        lexicons: names of lexicons that come with the package or files; "religion:any" merges a lexicon's classes.
        level: what is a group, of lexicons and of labels of the form "axis:value": "attribute": the axis ("gender");
            "value": ("gender:female"); "intersection": the values of a passage together ("gender:female x
            religion:muslim"), for a passage with one axis its value alone.
        min_texts: a group with fewer training passages is folded: an intersection into the next smaller ones that a
            passage is in, down to single values, those into "other".
        count, seed: how many clusters, and from which start they are sought.

    Raises ValueError, naming the argument, for values out of these.
    """

    source: Source = "lexicons"
    lexicons: tuple[str, ...] = DEFAULT_LEXICONS
    level: Level = "value"
    min_texts: int = 20
    count: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (("source", self.source, Source), ("level", self.level, Level)):
            if value not in get_args(allowed):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(allowed))}, got {value!r}")
        if self.level != "value" and self.source not in ("lexicons", "labels"):
            raise ValueError(
                f"level: {self.level!r} needs lexicons or labels, but the source is {self.source!r}"
            )
        if isinstance(self.lexicons, str):
            raise ValueError(f"lexicons: expected a sequence of names, got the text {self.lexicons!r}")
        object.__setattr__(self, "lexicons", tuple(self.lexicons))  # a list, as configuration files have them
        if self.source == "lexicons" and not self.lexicons:
            raise ValueError("lexicons: expected at least one")
        if self.min_texts < 1:
            raise ValueError(f"min_texts: expected at least 1, got {self.min_texts}")
        if self.source == "clusters" and self.count < 2:
            raise ValueError(f"count: expected at least 2 clusters, got {self.count}")
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")

    def annotator(self) -> GroupAnnotator | None:
        """What finds the groups' words in a text; None unless the source is lexicons.

        At the level of intersections it finds the values that they are made of. Raises ValueError as `load_lexicon` and
        `GroupAnnotator` do.
        """
        if self.source != "lexicons":
            return None
        lexicons = [_lexicon(name) for name in self.lexicons]
        return GroupAnnotator([x.merged("") for x in lexicons] if self.level == "attribute" else lexicons)


def grouping_for(
    examples: Sequence[Example],
    *,
    groups: str | None = None,
    lexicons: Sequence[str | Path] | None = None,
    label_field: str | Sequence[str] | None = None,
    clusters: int | None = None,
    level: Level = "value",
    min_texts: int = 20,
    seed: int = 0,
) -> Grouping:
    """What the options of a command ask for.

    `clusters` (their number), `label_field` and lexicons (`groups`: "gender,religion:any", `lexicons`: files that are
    added to these, or to the usual ones) exclude each other; without any, the labels that the corpus brings along are
    the groups, and where it brings none, the words of the lexicons for gender, race and religion. Raises ValueError for
    options that exclude each other, and as `Grouping`.
    """
    asked = {
        "clusters": clusters is not None,
        "labels": bool(label_field),
        "lexicons": groups is not None or bool(lexicons),
    }
    chosen = [source for source, given in asked.items() if given]
    if len(chosen) > 1:
        raise ValueError(f"groups: they come from one source, but {' and '.join(chosen)} were asked for")
    labelled = bool(examples) and all(example.groups is not None for example in examples)
    source = chosen[0] if chosen else "labels" if labelled else "lexicons"
    named = DEFAULT_LEXICONS if groups is None else [part.strip() for part in groups.split(",")]
    return Grouping(
        source=source,  # type: ignore[arg-type]  # a key of `asked`
        lexicons=(*filter(None, named), *map(str, lexicons or ())),
        level=level,
        min_texts=min_texts,
        count=8 if clusters is None else clusters,
        seed=seed,
    )


def _lexicon(name: str) -> Lexicon:
    lexicon = load_lexicon(name.removesuffix(":any"))
    return lexicon.merged() if name.endswith(":any") else lexicon
