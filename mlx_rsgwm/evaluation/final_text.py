r"""What of a generated text is the answer: no reasoning block, no further turn, no question of its own.

Also where a text says that something is its answer: a marker (``####``), a box, an ``<answer>`` tag, or words for it in
the languages that people ask in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlx_rsgwm.data.boxes import find_boxes
from mlx_rsgwm.evaluation.languages import words

_TAGS = r"think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad|analysis|seed:think"
_THOUGHT = re.compile(
    rf"(?P<open><(?:{_TAGS})>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>|<\|channel>thought)"
    rf"|(?P<close></(?:{_TAGS})>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>|<channel\|>)",
    re.IGNORECASE,
)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<\n]{0,80}<\|message\|>")
_END_OF_TURN = re.compile(
    r"<\|(?:im_end|eot_id|end_of_text|endoftext|end|return|end_of_turn|eom_id|user|im_start)\|>|</s>|<end_of_turn>|<eos>"
    r"|<turn\|>|<｜end▁of▁sentence｜>"
)
_SPECIAL = re.compile(r"<[|｜][^<>|\n]{1,40}[|｜]>|<(?:/?s|bos|eos|pad|unk|start_of_turn)>|\[/?INST\]")
_DRESS = re.compile(
    r"</?(?:b|i|u|p|strong|em|br|span|div|center|sub)\b[^<>]{0,40}>|<<[^<>\n]*>>|~~[^~\n]{1,80}~~|`+|(?<![0-9*])\*\*"
    r"|\*\*(?![0-9*])"
)
# A model that got stuck: no answer is a word of 600 signs, and every later pattern may take its time over those.
_RUNAWAY = re.compile(r"[!-~]{600,}")
_GAPS = re.compile(r"[ \t]{100,}|\n{20,}")
MOST = 40  # places or sentences that are looked at from the end of a text
LONGEST = 1000  # characters of a sentence
_ANOTHER_QUESTION = re.compile(
    r"\n[ \t#*]*(?:Q[ \t]*\d*[ \t]*:|(?:Question|Problem|Exercise)(?:[ \t]*\d+)?[ \t]*[:.])", re.IGNORECASE
)
_LETTERED = re.compile(r"[\s*]*[B-PR-Z]\s*[:.)]")
_EMPTY_MARKER = re.compile(r"#{4,}(?:answer)?[.:]*", re.IGNORECASE)
_MARKER = re.compile(r"(?<!#)#{4,}")
_ANSWER_TAG = re.compile(r"<answer>(.{0,2000}?)</answer>", re.IGNORECASE | re.DOTALL)
_SAID = re.compile(
    r"(?<!/)(?<!wrong )(?<!incorrect )(?<!false )\banswers?\b"
    r"(?:\s+(?:to|of|for)\s+(?:the\s+)?(?:question|problem|part|exercise)\s*\(?\w{0,4}\)?)?[^.:=\n\d]{0,50}?"
    r"(?:\b(?:is|are)\b(?!\s(?:to|based|found|obtained|calculated|derived|determined|given by)\b)|"
    r"\b(?:would|will|must|should) be\b|\bequals\b|(?<!answers)(?<!answers )[:=]|\s[-–—](?=\s))"
    r"|\b(?:final|end)\s+result\b[^.:=\n\d]{0,20}?(?:\bis\b|\bequals\b|[:=])"
    rf"|\b(?:{words('answer', spaced=True)})(?=\s*(?:[:=]|est|[-–—]\s)|(?<=[a-zéèêûлäöår])\s)\s*[:=]?"
    rf"|(?:{words('answer', spaced=False)})\s?(?:是|为|為|は|：|:|هي|هو|है)?\s?[:：]?",
    re.IGNORECASE,
)
_HEADING = re.compile(r"(?m)^[ \t#*_]*(?:final[ \t]+)?answer[ \t#*_:]*$", re.IGNORECASE)
_IS_THE_ANSWER = re.compile(
    r"[^\n.!?]{1,80}?\s(?:is|are)\s(?:the|our|my)\s(?:final\s|correct\s|right\s)*answers?\b", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]*]*\s+(?=[\"'(*\\$\[]*[A-Z0-9\u0080-\uffff])|\n+")
_ABBREVIATION = re.compile(
    r"\b(?:approx|no|vs|mr|mrs|ms|dr|st|e\.g|i\.e|ca|bzw|mio|mrd|oz|lb|lbs|ft|hr|hrs|min|sq|руб|коп|zł|kr)\.$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Statement:
    """A place where a text gives its answer. ``boxes`` of one statement stand beside each other ("… or …")."""

    start: int
    text: str
    kind: str  # box, tag, said ("the answer is …"), subject ("… is the answer")
    boxes: tuple[str, ...] = ()
    end: int = 0


@dataclass(frozen=True)
class Reading:
    """What was read as the answer: its text, None for nothing, or ambiguous; ``stated``: as the text's own answer."""

    value: str | None = None
    ambiguous: bool = False
    stated: bool = True
    end: int = 0  # where the number ends in the text that was read; for texts that were cut off


NOTHING, AMBIGUOUS = Reading(), Reading(ambiguous=True)


def without_reasoning(text: str) -> str:
    """``text`` without its reasoning blocks; an unclosed one ends with it, an unopened one begins with it."""
    channels = list(_CHANNEL.finditer(text))
    if channels:
        final = [match for match in channels if match[1] == "final"]
        text = text[final[-1].end() :] if final else ""
    pieces: list[str] = []
    position, depth = 0, 0
    for match in _THOUGHT.finditer(text):
        if match["open"]:
            if not depth:
                pieces.append(text[position : match.start()])
            depth = 1
        else:
            if not depth:
                pieces.clear()  # the template had opened it
            depth = 0
        position = match.end()
    if not depth:
        pieces.append(text[position:])
    return "\n".join(pieces)


def final_text(text: str) -> tuple[str, bool]:
    """The part of a generated text that can hold its answer, and whether more than that part had been written.

    More was written where the text goes on to another turn or question, or got stuck in empty markers: then that part
    is complete, even if the text as a whole was cut.
    """
    text = _RUNAWAY.sub(" \ufffd ", without_reasoning(text))
    text = _GAPS.sub(lambda match: "\n\n" if "\n" in match[0] else " ", text)
    complete = False
    for match in _END_OF_TURN.finditer(text):
        if text[: match.start()].strip():
            text, complete = text[: match.start()], True
        break
    text = _DRESS.sub(lambda match: " " if match[0][0] in "<~" else "", _SPECIAL.sub(" ", text))
    further = _further_question(text)
    if further is not None:
        text, complete = text[:further], True
    stuck = _stuck_from(text)
    if stuck is not None:
        text, complete = text[:stuck], True
    return text, complete


def _further_question(text: str) -> int | None:
    """Where the text goes on to ask another question; the Q between the lines P and R of a list is none."""
    for match in _ANOTHER_QUESTION.finditer(text):
        before = text[: match.start()]
        if before.strip() and not _LETTERED.match(before.rstrip().rpartition("\n")[2]):
            return match.start()
    return None


def _stuck_from(text: str) -> int | None:
    """Where three or more empty markers at the end begin: the model has said what it had to say and cannot stop."""
    start, markers = None, 0
    words = list(re.finditer(r"\S+", text[-4000:] if len(text) > 4000 else text))
    for word in reversed(words):
        if not _EMPTY_MARKER.fullmatch(word[0]) and word[0].lower().strip(".:") != "answer":
            break
        markers += word[0].startswith("####")
        start = word.start() if word[0].startswith("####") else start
    return None if markers < 3 or start is None else start + max(0, len(text) - 4000)


def marked_lines(text: str) -> list[str]:
    """What follows each ``####`` (four or more) on its line, or on the next one where nothing does."""
    lines = []
    for match in list(_MARKER.finditer(text))[-MOST:]:
        line, _, after = text[match.end() : match.end() + 1000].partition("\n")
        if not line.strip() or line.strip().lower().endswith("answer:"):  # and the answer stands below
            line = after.lstrip("\n").split("\n", 1)[0]
        lines.append("" if _MARKER.match(line.strip()) else line.strip())
    return lines


def statements(text: str, finished: bool = True) -> list[Statement]:
    r"""Every box, tag and phrase that gives an answer, in order. A last box that is empty or open holds none."""
    stated = [
        Statement(boxes.start, boxes.contents[-1], "box", boxes.contents, boxes.end)
        for boxes in find_boxes(text, finished)
    ]
    stated += [
        Statement(match.start(), match[1].strip(), "tag", end=match.end()) for match in _ANSWER_TAG.finditer(text)
    ]
    subjects = [match for match in list(_IS_THE_ANSWER.finditer(text))[-MOST:] if re.search(r"[0-9]", match[0])]
    stated += [Statement(match.start(), match[0], "subject", end=match.end()) for match in subjects]
    for pattern in (_SAID, _HEADING):
        for match in list(pattern.finditer(text))[-MOST:]:
            if not any(subject.start() <= match.start() < subject.end() for subject in subjects[-20:]):
                stated.append(Statement(match.start(), _line_after(text, match.end()), "said", end=match.end()))
    return sorted(stated, key=lambda statement: statement.start)[-MOST:]


def _line_after(text: str, position: int) -> str:
    """The rest of the line, or the next line that has words where that one holds nothing but dress."""
    for line in text[position : position + 1000].split("\n")[:4]:
        if line.strip(" \t*_:=$[](){}\\`\"'"):
            return line
    return ""


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text; a point after an abbreviation or inside a number ends none."""
    pieces: list[str] = []
    position = 0
    for match in _SENTENCE_END.finditer(text):
        if "\n" not in match[0] and _ABBREVIATION.search(text[max(0, match.start() - 8) : match.start()]):
            continue
        pieces.append(text[position : match.start()])
        position = match.end()
    pieces.append(text[position:])
    return [piece for piece in pieces if piece.strip()]
