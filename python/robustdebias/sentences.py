"""Where sentences begin: one small rule, shared by the passage cutter and the case-aware group matcher.

English, rule-based and deliberately plain. A wrong cut costs a little context, never text.
"""

from __future__ import annotations

import re

# A full stop after one of these (or after a single letter: initials, "U.S.", "e.g.") ends no sentence ...
_ABBREVIATION = re.compile(
    r"[^\W\d_]|mrs?|ms|dr|prof|st|[sj]r|rev|fr|hon|gov|sen|rep|gen|col|lt|sgt|capt|cpl|maj|cmdr|adm|supt|insp|mt|ft"
    r"|vs|etc|cf|approx|inc|ltd|corp?|co|dept",
    re.IGNORECASE,
)
# ... nor after one of these before a number.
_NUMBERED = re.compile(r"nos?|fig|vol|pp|ch|sec|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec", re.IGNORECASE)
_OPENING = "\"'“”‘’(["
_LAST_WORD = re.compile(r"(?<!['’])\b(\w+)\.$")
# What must stand before a word for it to open a sentence: the start of the text or line, an end mark, or a comma
# that leads into direct speech; then any opening quotes, brackets and bullets.
_BEFORE_START = re.compile(r"(?P<mark>^|\n|[.!?…:]|,\s*(?=[\"'“‘]))[\"'“”‘’()\[\]\s•*–—-]*$")
_BREAK = re.compile(r"\s*\n\s*|(?<=[.!?…])[\"'”’)\]]*(\s+)")
_LONGEST_LEAD = 40  # characters looked at before a word; quotes and spaces before it are few


def starts_sentence(text: str, offset: int) -> bool:
    """Whether the word at `offset` of `text` opens a sentence, so that its capital letter says nothing."""
    lead = _BEFORE_START.search(text, max(0, offset - _LONGEST_LEAD), offset)
    if lead is None:
        return False
    return lead["mark"] != "." or "\n" in lead[0] or not _is_abbreviation(text, lead.start() + 1)


def split_sentences(text: str) -> list[str]:
    """The sentences of `text`, stripped; a line break always ends one. Joined again, they hold every word."""
    sentences: list[str] = []
    begin = 0
    for gap in _BREAK.finditer(text):
        if "\n" not in gap[0] and not _ends_sentence(text, gap):
            continue
        stop = gap.end() if gap[1] is not None else gap.start()
        sentences.append(text[begin:stop].strip())
        begin = gap.end()
    sentences.append(text[begin:].strip())
    return [sentence for sentence in sentences if sentence]


def _ends_sentence(text: str, gap: re.Match[str]) -> bool:
    following = text[gap.end() : gap.end() + 1]
    if not (following.isupper() or following.isdigit() or (following and following in _OPENING)):
        return False
    return text[gap.start() - 1] != "." or not _is_abbreviation(text, gap.start())


def _is_abbreviation(text: str, end: int) -> bool:
    """Whether the full stop before `end` belongs to an abbreviation."""
    last = _LAST_WORD.search(text, max(0, end - _LONGEST_LEAD), end)
    if last is None:
        return False
    if _NUMBERED.fullmatch(last[1]):
        return text[end : end + 3].lstrip()[:1].isdigit()
    return _ABBREVIATION.fullmatch(last[1]) is not None
