"""Groups at the level that was asked for, and what becomes of those that are too small."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations, product

from robustdebias.grouping import Level
from robustdebias.readers import OTHER

__all__ = ["Combination", "combine", "fold", "group_name"]

Combination = tuple[str, ...]
"""Groups of different axes, in the order of the axes' names; most often one group alone."""


def combine(groups: Iterable[str], level: Level) -> set[Combination]:
    """The groups of a text at a level; nothing where it is in none but "other".

    Groups of one axis ("gender:female", "gender:male") are never combined, and those without a colon are of one axis.
    Raises ValueError for a group without a colon at the level of attributes.
    """
    named = [group for group in groups if group != OTHER]
    if level == "attribute":
        for group in named:
            if ":" not in group:
                raise ValueError(
                    f"level: 'attribute' needs labels of the form axis:value, got {group!r}; label_axis gives labels "
                    "the axis of their column or file"
                )
        return {(_axis(group),) for group in named}
    if level == "value" or not named:
        return {(group,) for group in named}
    axes: dict[str, list[str]] = {}
    for group in named:
        axes.setdefault(_axis(group), []).append(group)
    return set(product(*(axes[axis] for axis in sorted(axes))))


def fold(
    train: Sequence[set[Combination]], held_out: Sequence[set[Combination]], size: int, fewest: int
) -> list[Combination]:
    """Replace the combinations of `size` groups that fewer than `fewest` training texts are in; returns them, sorted.

    Their texts go to the combinations of one group less, unless a larger one that they keep holds these already; a
    single group is just left. Changes the sets in place.
    """
    counts = Counter(found for text in train for found in text if len(found) == size)
    large = {found for found, texts in counts.items() if texts >= fewest}
    small = {found for text in (*train, *held_out) for found in text if len(found) == size} - large
    for text in (*train, *held_out):
        left = text & small
        text -= left
        for part in {part for found in left for part in combinations(found, size - 1) if part}:
            if not any(set(part) < set(kept) for kept in text):
                text.add(part)
    return sorted(small)


def group_name(combination: Combination) -> str:
    """ "gender:female x religion:muslim"."""
    return " x ".join(combination)


def _axis(group: str) -> str:
    axis, colon, _ = group.partition(":")
    return axis if colon else ""
