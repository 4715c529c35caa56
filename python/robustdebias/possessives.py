"""Whether a word belongs to the noun behind it: what tells "her book" from "saw her", "Jewish school" from "is Jewish".

A small rule on the words around, no parser; `tests/robustdebias/fixtures/possessives.tsv` says what it gets right.
"""

from __future__ import annotations

import re

__all__ = ["stands_before_noun"]

# No noun phrase goes on with one of these: they begin what comes after it.
_NO_NOUN = """
    a an the this that these those some any each every both either neither no another enough I you he
    she it we they me him us them himself herself itself themselves who whom whose which what where why
    how and or but nor so yet if because although though while whereas when whenever before after since
    until unless than about above across against along among amongst around as at behind below beneath
    beside besides between beyond by despite during except for from in inside into like near of off on
    onto out over per through throughout to toward towards under underneath up upon via with within
    without am is are was were be been has have had do does did would shall should could must not never
    also again away too there here instead alone together already soon yesterday today tonight tomorrow
    afraid alive alone asleep awake aware dearly due now one unable well my your his her its our their
    become come feel get go know let make realise realize take think understand back down forward
"""
# "won her fame" is not "her fame", nor "made her famous" her famous something: after such a verb, what it brought her.
_GIVING = re.compile(
    r"\b(award|bring|brought|cost|earn|gain|garner|gave|give|grant|ma[dk]e|making|offer|take|taught|teach|took|won)"
    r"(s|ed|ing|en)?\s+\w+$",
    re.IGNORECASE,
)
_GIFT = """
    acclaim attention credit critical fame famous international money more much national nationwide
    permission popular praise recognition several three two universal wide widespread worldwide
"""
_no_noun, _gift = frozenset(_NO_NOUN.split()), frozenset(_GIFT.split())
_NEXT = re.compile(r"\]*[ \t\n]+[\"“‘'`(]*((?:\w|[-‐‑'’](?=\w))+)")
# "his or her book", "her and Ann's book": both belong to the noun.
_COORDINATED = re.compile(r"(?:\s+(?:and|or)\s+|\s*/\s*)(?:her|his|its|our|their|[\w-]+['’]s)\b", re.I)
_LONGEST_LEAD = 30  # characters looked at for the verb before


def stands_before_noun(text: str, end: int) -> bool:
    """Whether the word that ends at `end` of `text` is followed by the noun that it belongs to, or by its adjective."""
    while (other := _COORDINATED.match(text, end)) is not None:
        end = other.end()
    following = _NEXT.match(text, end)
    if following is None or following[1] in _no_noun:  # in small letters: "her In the Rain" is a title
        return False
    return following[1] not in _gift or not _GIVING.search(text, max(0, end - _LONGEST_LEAD), end)
