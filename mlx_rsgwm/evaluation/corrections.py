"""Where a text takes back the answer that it has just given, and what it says from there on.

Three things do so: words that call the answer wrong ("that is wrong", "12 is wrong", "me equivoqué"), words that both
interrupt and revoke ("oops", "scratch that"), and a hesitation or a "no" that puts a new value forward at once
("On second thought, 11", "No: 11"). A hesitation alone changes nothing: texts check their answers and stand by them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlx_rsgwm.data.numbers import parse_number
from mlx_rsgwm.evaluation.languages import words

_IS = rf"(?:{words('copula')}|['’]s)"
_RIGHT = rf"(?:{words('right')})"
_PREFERRED = rf"(?:{words('right')}|better|best|more (?:likely|accurate|suitable|appropriate)|the answer)"
_TOO = r"too (?:many|much|few|little|high|low|large|small|big|long|short)"
_WRONG_WORDS = words("wrong")
# "that is wrong", "it's way too small", "12} is wrong", ". Falsch", and what says so by itself ("I miscounted").
_DENIED = re.compile(
    rf"\b(?:{words('this')})(?:\s|(?<=['’])|(?=['’]s)){_IS}\s+(?:all |completely |quite |way |far |much )?"
    rf"(?:{_WRONG_WORDS}|{_TOO})\b"
    rf"|(?:^|[.,;:!\n]\s*)(?:es|è|é|está|era|это)\s+(?:{_WRONG_WORDS})\b|(?:^|[.,;:!\n]\s*)(?:falsch|неверно|"
    rf"неправильно)\b|\A[\s$)\]}}*]*(?:is|was) (?:wrong|incorrect|not (?:right|correct))\b"
    rf"|\b(?:{words('mistake', spaced=True)})\b|(?:{words('mistake', spaced=False)})",
    re.IGNORECASE,
)
_CUE = re.compile(
    rf"(?<![\w'’])(?:(?P<pause>{words('pause', spaced=True)})(?![\w'’])|(?P<nay>{words('no')})"
    rf"(?=\s?[,:;.!–—-]|\.\.\.)|(?P<noun>{words('correction')})\s?[:：])"
    rf"(?:[\s,:;!?…：]|\.(?![0-9])|[–—-](?=\s)){{0,8}}|(?:{words('pause', spaced=False)})[\s,，、。…]{{0,8}}",
    re.IGNORECASE,
)
# A pause that says by itself that something has to change, if a number or another denial follows.
_REVOKING = re.compile(
    r"\b(?:wrong|incorrect|mistake|error|not right|not correct|not sure|forgot|wait)\b", re.IGNORECASE
)
_PUT_FORWARD = re.compile(
    rf"(?:(?:{words('link', spaced=True)})\b[\s:,.]*|['’]s\s+|(?:{words('link', spaced=False)})\s?){{0,7}}"
    r"[\s(*$€£¥₹\"'“]*(?:[-–+]?\s?[$€£¥₹]?\s?\.?[0-9](?:[\d.,/ ]*\d)?|(?-i:[A-J])\b|yes\b|no\b|true\b|false\b|"
    r"\$[^$\n]{1,60}\$|\\[(b])(?P<rest>[^.!?;\n。]{0,40})(?:[.!?;\n。]|$)",
    re.IGNORECASE,
)
_WRONG = re.compile(rf"\b(?:{_WRONG_WORDS}|mistake|error)\b|\b(?:stimmt|klopt) (?:nicht|niet)\b", re.IGNORECASE)
# Any few words, in whatever language, and then a number alone: a new value, or something else that is counted.
_ANOTHER_VALUE = re.compile(
    r"\W*(?!(?:that is|in other words|in short|namely|i\.e\.)\W)(?:[^\W\d][\w'’]*\s){0,3}[^\W\d][\w'’]*"
    r"(?:\s?[,!…;–—-]|\s?\.\.\.)\s*(?:(?:it|that)(?:['’]s| is)\s)?(?P<number>[-–]?[$€£]?\.?[0-9](?:[\d.,/]*\d)?)"
    r"(?![\d%])(?:\s[^\W\d]+)?[)*\"']*(?:[.!;](?=\s|$)|\n|$)",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(
    r"\W*(?:or|but|however|alternatively|maybe|perhaps|possibly|(?:it|this|that|the answer) (?:could|might|may))\b"
    r"[^.!?\n\d]*(?P<number>[-–]?[$€£]?\.?[0-9](?:[\d.,/]*\d)?)",
    re.IGNORECASE,
)
_AGAIN = re.compile(
    r"\b(?:let me|i (?:should|need to|must)) re-?(?:compute|calculate|do|check|count|consider|evaluate)\b",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"\b(?:is|are|was|were|would|will|could|has|have|more|less|fewer|times|than|of|ist|sind|est|sont|es|son|è|é|wäre)\b"
    rf"(?!\s(?:the\s)?{_PREFERRED}\b)|[+*/×÷=<>]\s*[\w($]",
    re.IGNORECASE,
)
_CONDITIONAL = re.compile(r"\b(?:if|whether|unless|in case|wenn|falls|si|se|если|als)\b[^.!?;\n]*$", re.IGNORECASE)
_NUMBER = r"(?<![\w.,])[-–]?[$€£]?\.?[0-9](?:[\d.,/]*\d)?"
_VALUE = rf"(?:{_NUMBER}|(?-i:(?<![\w.,])\(?[A-J]\)?))"
_VALUE_DENIED = re.compile(
    rf"(?P<is>{_VALUE})(?:\s[^\W\d]+)?\s(?:{_IS}|would be)\s(?:{_WRONG_WORDS}|{_TOO})\b"
    rf"|(?P<cannot>{_VALUE})\s(?:can(?:['’]t|not| not) be|isn['’]t)\s{_RIGHT}\b"
    rf"|\bnot\s(?P<no>{_VALUE})(?:\s[^\W\d]+)?(?=[,;:.]|\s(?:but|sondern)\b)",
    re.IGNORECASE,
)
_NUMBER_RIGHT = re.compile(rf"(?P<number>{_NUMBER})(?:\s[^\W\d]+)?\s{_IS}\s(?:the\s)?{_RIGHT}\b", re.IGNORECASE)
_STANDS = re.compile(
    rf"(?<!in)\b{_RIGHT}\b(?!\s+(?:final\s+)?(?:answer|value|total|result|number|amount|"
    r"sum|one|figure|Antwort|Zahl|réponse|valeur|respuesta)\b)|\b(?:confirmed|consistent|checks out|matches|"
    r"as expected|makes sense|yes|ja|oui|sí|stimmt)\b",
    re.IGNORECASE,
)
_NEGATED = re.compile(rf"\b(?:{words('denial', spaced=True)})\s(?:[^\W\d]+\s){{0,2}}$", re.IGNORECASE)


@dataclass(frozen=True)
class Correction:
    """What a text says from a correction on. ``number`` is the value that it calls right, where it does."""

    text: str
    puts_forward: bool  # it goes on with a new value at once
    number: str | None = None


def find_correction(text: str, value: str | None = None) -> Correction | None:
    """The first correction in what follows an answer, or None where the text stands by it.

    ``value``: the number or the letter that was answered; only then can "30 is wrong" be told from "12 is wrong".
    """
    for start, end in _corrections(text, value):
        if not _CONDITIONAL.search(text[max(0, start - 80) : start]):
            right = [match["number"] for match in _NUMBER_RIGHT.finditer(text, start)]
            if not right:  # "11 is correct, 12 is wrong"
                before = (match["number"] for match in _NUMBER_RIGHT.finditer(text, 0, start + 1))
                right = [number for number in before if value is None or not _same(number, value)]
            return Correction(text[end:], _puts_forward(text, end), right[-1] if right else None)
    return None


def _corrections(text: str, value: str | None) -> list[tuple[int, int]]:
    """Start and end of each place that takes an answer back, in order; of two that start together the longer first."""
    places = [match.span() for match in _DENIED.finditer(text)]
    if value is not None:
        denied = _VALUE_DENIED.finditer(text)
        places += [match.span() for match in denied if _same(next(filter(None, match.groups())), value)]
    revoked = max((match.start() for match in _REVOKING.finditer(text)), default=-1)
    for cue in _CUE.finditer(text):
        counts = cue["pause"] and revoked >= cue.start()
        if counts or (cue["noun"] and re.search(r"[0-9]", text[cue.end() :])) or _puts_forward(text, cue.end()):
            places.append(cue.span())
    return sorted(places, key=lambda place: (place[0], -place[1]))


def _same(mentioned: str, value: str) -> bool:
    number = parse_number(mentioned)
    return number == parse_number(value) if number is not None else mentioned.strip("()") == value.strip("()")


def _puts_forward(text: str, position: int) -> bool:
    """Whether a text goes on with a new value and says nothing else about it ("it should be 11.")."""
    match = _PUT_FORWARD.match(text, position)
    return match is not None and _CLAUSE.search(match["rest"]) is None


def confirms(text: str) -> bool:
    """Whether a text calls something right ("Was that wrong? No, it is correct.")."""
    return any(
        not _NEGATED.search(text[max(0, match.start() - 24) : match.start()]) for match in _STANDS.finditer(text)
    )


def denies(text: str) -> bool:
    """Whether a text calls something wrong."""
    return _WRONG.search(text) is not None


def offers_another(text: str, value: str | None) -> bool:
    """Whether what follows an answer leaves it open: another number after a few words, or a second computation."""
    if value is None:
        return False
    other = _ALTERNATIVE.match(text) or _ANOTHER_VALUE.match(text)
    if other is not None:
        return not _same(other["number"], value)
    again = _AGAIN.search(text)
    mentioned = re.findall(_NUMBER, text[again.end() :]) if again else []
    return bool(mentioned) and not any(_same(number, value) for number in mentioned)


def interrupts(text: str) -> bool:
    """Whether a sentence begins with a pause or a correction ("Wait, no, green."); for answers in words."""
    return _CUE.match(text.lstrip(" *(\n")) is not None
