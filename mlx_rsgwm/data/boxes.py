r"""What ``\boxed{…}`` and ``\fbox{…}`` hold in a solution: one value, or several that stand beside each other.

"$x = \boxed{1}$ or $x = \boxed{-1}$" answers with both; two boxes in different places are a correction, and the last
one holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MOST = 100  # boxes that are looked at, from the end
LONGEST = 4000  # characters in a box; beyond that a brace is missing

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a printed one (a set), not grammar
_WORD = re.compile(r"-?[\w.]+")
_JOIN = re.compile(
    r"[\s$\\()\[\].]*(?:[a-zA-Z]+\s){0,2}(?:,|;|and|or|und|oder|et|ou|\\text\s*\{\s*(?:and|or),?\s*\}|\\q?quad|&)(?:\s*(?:and|or)\b)?"
    r"[\s$\\()\[\],.]*(?:[a-zA-Z]\w{0,3}\s*=\s*)?"
)


@dataclass(frozen=True)
class Boxes:
    """Boxes that give one answer together, with where the first begins and the last ends.

    A content is empty where a box holds nothing or never closes.
    """

    start: int
    end: int
    contents: tuple[str, ...]

    @property
    def answer(self) -> str:
        """What they hold, as a list where they differ; empty when one of them is."""
        return ", ".join(dict.fromkeys(self.contents)) if all(self.contents) else ""


def find_boxes(text: str, finished: bool = True) -> Iterator[Boxes]:
    """The boxes of a text in order. ``finished`` False: it was cut, and a box that never closes is left out."""
    contents: list[str] = []
    start = end = 0
    for match in list(_BOX.finditer(text))[-MOST:]:
        content, after = _content(text, match.end())
        if content is None and not finished:
            continue
        if contents and not _joined(text[end : match.start()]):
            yield Boxes(start, end, tuple(contents))
            contents = []
        if not contents:
            start = match.start()
        contents.append((content or "").strip())
        end = after
    if contents:
        yield Boxes(start, end, tuple(contents))


def _content(text: str, position: int) -> tuple[str | None, int]:
    if text[position : position + 1] != "{":
        word = _WORD.match(text, position)
        return (word[0].rstrip("."), word.end()) if word else (None, position)
    depth = 0
    for match in _BRACES.finditer(text, position, position + LONGEST):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[position + 1 : match.start()], match.end()
    return None, position


def _joined(gap: str) -> bool:
    return len(gap) <= 60 and (_JOIN.fullmatch(gap) is not None or not gap.strip(" \t\n$"))
