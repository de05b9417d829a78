"""Gold answers of rows: what an answer marks as its final part, and answers that are JSON scalars."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from mlx_rsgwm.data.boxes import Boxes, find_boxes
from mlx_rsgwm.data.numbers import plain_number, write_number


def split_marked(answer: str) -> tuple[str, str] | None:
    """``(rationale, gold)`` of a GSM8K-style answer, calculator notes stripped; None without a ``####`` line."""
    marks = list(re.finditer(r"#{4,}", answer))
    if not marks:
        return None
    rationale, rest = answer[: marks[-1].start()], answer[marks[-1].end() :].strip()
    return re.sub(r"<<[^<>\n]*>>", "", rationale).strip(), plain_number(rest.split("\n")[0]) if rest else ""


def marked_answer(answer: str) -> tuple[str, str] | None:
    r"""``(rationale, gold)`` of an answer that marks its final part, gold as it is written; None where nothing does.

    A mark is a last line ``#### gold`` (a ``####`` above other lines is a heading; at the end of a line of words it
    marks a number only), a last line "The answer is gold.", or ``\boxed{gold}`` in mathematics or at the end; boxes
    that stand beside each other give one gold together. A box or ``####`` that a sentence only speaks of is none.
    """
    line = re.search(r"(^[ \t]*)?#{4,}(?!.*#{4})\s*([^\n]*)\Z", answer.rstrip(), re.MULTILINE)
    if line is not None and (line[1] is not None or _is_short_number(line[2])):
        return re.sub(r"<<[^<>\n]*>>", "", answer[: line.start()]).strip(), line[2].strip()
    boxes = list(find_boxes(answer))
    if boxes and boxes[-1].answer and _marks(answer, boxes[-1]):
        bare = re.fullmatch(r"[\s$.]*", answer[: boxes[-1].start] + answer[boxes[-1].end :])
        return ("" if bare else answer), boxes[-1].answer
    stated = _STATED.fullmatch(answer.rpartition("\n")[2].strip())
    return (answer, stated[1]) if stated else None


def _is_short_number(text: str) -> bool:
    return re.search(r"\d", text) is not None and len(text.split()) <= 3


def _marks(answer: str, box: Boxes) -> bool:
    """Whether a box gives the answer: it stands in mathematics, or at most two words (a unit) follow it."""
    before = answer[: box.start].replace("$$", "$").replace(r"\$", "")
    opened = max(before.rfind(mark) for mark in (r"\[", r"\(", r"\begin{"))
    closed = max(before.rfind(mark) for mark in (r"\]", r"\)", r"\end{"))
    return before.count("$") % 2 == 1 or opened > closed or len(re.findall(r"[^\W_]+", answer[box.end :])) <= 2


_STATED = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+)?answer\s*(?:is:?|:|=)\s*(\S.*?)\.?", re.IGNORECASE
)


def scalar_gold(value: Any, name: str) -> str:
    """A gold answer given as a JSON scalar: booleans become yes/no, numbers their exact short form."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"{name} is not finite: {value}")
        exact = Fraction(repr(value))
        # 0.6666666667 in MAWPS stands for 2/3; 0.35 stays 0.35.
        simple = exact.limit_denominator(1000)
        return write_number(simple if abs(exact - simple) < Fraction(1, 10**9) else exact)
    if isinstance(value, str) and value.strip():
        return plain_number(value)
    raise ValueError(f"no gold answer in {name}")


def written_scalar(value: Any, name: str) -> str:
    """A gold answer given as JSON true, false or number: yes, no, or the number in full, not rounded."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return write_number(Fraction(repr(value)))
    return scalar_gold(value, name)
