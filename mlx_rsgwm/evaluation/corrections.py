"""Where a text takes back the answer that it has just given, and what it says from there on.

Three things do so: words that call the answer wrong ("that is wrong", "12 is wrong", "me equivoqué"), words that both
interrupt and revoke ("oops", "scratch that"), and a hesitation or a "no" that puts a new value forward at once
("On second thought, 11", "No: 11"). A hesitation alone changes nothing: texts check their answers and stand by them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlx_rsgwm.data.numbers import parse_number

_HESITATIONS = (
    r"wait(?!\s(?:until|till|for|times?|at|in|to|on)\b)|hmm+|hm|actually|i mean|i meant|not quite|i stand corrected|"
    r"apologies|halt|entschuldigung|désolée?|lo siento|corrijo|scusate|scusi|"
    r"извините|ой|hold on|hang on|on (?:second|"
    r"further) thought|on reflection|"
    r"(?:let me|i (?:should|need to|must)) (?:re-?(?:check|count|compute|calculate|consider|think|do|read|examine|"
    r"evaluate)|"
    r"double[- ]check|check|correct|fix)[^.:!?\n]{0,30}|"
    r"um+|uh+|rather|i take (?:that|it) back|(?:it|that|this) (?:should|must|ought to) (?:have been|be)|moment|warte|"
    r"eigentlich|vielmehr|attend(?:s|ez)|en fait|plutôt|pardon|espera|perdón|en realidad|mejor dicho|"
    r"aspetta|anzi|in realtà|scusa|espere?|na verdade|aliás|desculpe?|wacht|eigenlijk|vänta|chwila|подожди(?:те)?|"
    r"точнее|"
    r"вернее|стоп"
)
_NAYS = r"no|nope|nein|non|nee|nej|нет|não|nie|hayır|لا|नहीं|いいえ|아니(?:요|다)?"
_NOUNS = (
    r"correction|erreur|error|fehler|edit|korrektur|berichtigung|corrección|corrige|correzione|errata|correção|"
    r"correctie|korekta|"
    r"исправление|"
    r"поправка|更正|訂正|정정"
)
_WRONG_WORDS = (
    r"wrong|incorrect|mistaken|not (?:right|correct)|falsch|nicht (?:richtig|korrekt|wahr)|verkehrt|faux|fausse|"
    r"incorrecte?|erron[ée]e?|pas (?:correcte?|juste|bon(?:ne)?|vrai)|incorrect[oa]|falso|erróne[oa]|sbagliat[oa]|"
    r"errat[oa]|errad[oa]|incorret[oa]|fout|onjuist|niet (?:juist|goed|correct)|fel|błędn[ea]|yanlış|неверно|"
    r"неправильно|ошибка"
)
_IS = r"(?:is|was|['’]s|seems|looks|ist|war|est|était|es|era|è|é|está|estaba|to)"
_RIGHT_WORDS = (
    r"right|correct|richtig|korrekt|juste|bonne?|correcte?|correct[oa]|giust[oa]|corrett[oa]|cert[oa]|corret[oa]|juist|"
    r"goed|rätt|верно|правильно"
)
_DENIED = re.compile(
    rf"\b(?:that|this|it|which|(?:the|my|this|that) (?:first |previous |last )?(?:answer|result|number|value)|das|dies|"
    rf"es|ce(?:la)?|ça|c['’]|eso|esto|questo|isso|dat|det|это)(?:\s|(?<=['’])|(?=['’]s)){_IS}\s+(?:all |completely |"
    rf"quite )?(?:{_WRONG_WORDS})\b"
    rf"|(?:^|[.,;:!\n]\s*)(?:es|è|é|está|era|это)\s+(?:{_WRONG_WORDS})\b|(?:^|[.,;:!\n]\s*)(?:falsch|неверно|"
    rf"неправильно)\b"
    r"|\b(?:that|this|it) (?:can(?:['’]t|not| not)|isn['’]t|is not|wasn['’]t|does(?:n['’]t| not) (?:look|seem)) (?:be |"
    r"quite )?(?:right|correct|true)\b"
    r"|\b(?:no es|non è|não é|não está|no está) (?:correct[oa]|corrett[oa]|corret[oa]|cert[oa]|giust[oa])\b"
    r"|\b(?:stimmt|klopt) (?:so )?(?:nicht|niet)\b"
    r"|\bI (?:have )?(?:was (?:wrong|mistaken)|ma(?:d|k)e an? (?:\w+ )?(?:mistake|error)|mis(?:read|counted|calculated|"
    r"took|understood|added)|forgot)\b|\bmy (?:mistake|bad|error)\b|\ban? (?:mistake|error)(?=[:!])"
    r"|\b(?:habe|hab) mich (?:verrechnet|vertan|geirrt)|\bme suis trompée?\b|\bme (?:equivoqué|he equivocado|confundí)|"
    r"\b(?:ho|mi sono) sbagliato\b|\bme enganei\b|\berrei\b|\bheb me vergist\b|\bя ошиб\w+|\bэто не так\b|\bне так\b"
    r"|(?:不对|不對|不正确|算错|算錯|错了|錯了|間違え|間違い|違います|틀렸|잘못)"
    r"|\b(?:actually|wait|hmm+),? I(?:['’]m| am) not (?:sure|certain)(?: (?:that |if |whether )?(?:this|that|it) is "
    r"(?:right|correct))?"
    r"|\A[\s$)\]}*]*(?:is|was) (?:wrong|incorrect|not (?:right|correct))\b|\blet me (?:redo|fix|correct)\b"
    r"|\b(?:scrap|forget|disregard|ignore|scratch|strike) (?:that|this)\b|\b(?:or rather|make that)\b|\b(?:oops|"
    r"sorry)\b",
    re.IGNORECASE,
)
_CUE = re.compile(
    rf"(?<![\w'’])(?:(?P<pause>{_HESITATIONS})(?![\w'’])|(?P<nay>{_NAYS})(?=\s?[,:;.!–—-]|\.\.\.)|"
    rf"(?P<noun>{_NOUNS})\s?[:：])"
    r"(?:[\s,:;!?…：]|\.(?![0-9])|[–—-](?=\s)){0,8}|(?:等等|等一下|其实|其實|待って|いや|잠깐)[\s,，、。…]{0,8}",
    re.IGNORECASE,
)
# A pause that says by itself that something has to change, if a number or another denial follows.
_REVOKING = re.compile(
    r"\b(?:wrong|incorrect|mistake|error|not right|not correct|not sure|forgot|wait)\b", re.IGNORECASE
)
_LINK = (
    r"it|that|this|so|then|the|my|final|new|correct|right|answer|value|total|result|number|should|must|would|will|has|"
    r"to|be|is|are|was|['’]s|i|get|got|mean|meant|rather|say|make|about|equals|actually|wait|no|sorry|es|ist|sind|"
    r"sollte|das|richtig|antwort|die|c['’]est|ce|sont|la|le|réponse|son|es|serían?|respuesta|sono|è|risposta|é|são|"
    r"resposta|het|antwoord|zijn|это|ответ|будет|det|är|svaret|perdón|sein|on"
)
_PUT_FORWARD = re.compile(
    rf"(?:(?:{_LINK})\b[\s:,.]*|['’]s\s+|(?:应该是|应为|應該是|答案是|是|正解は)\s?){{0,7}}[\s(*$€£¥₹\"'“]*"
    r"(?:[-–+]?\s?[$€£¥₹]?\s?\.?[0-9](?:[\d.,/ ]*\d)?|(?-i:[A-J])\b|yes\b|no\b|true\b|"
    r"false\b)(?P<rest>[^.!?;\n。]{0,40})(?:[.!?;\n。]|$)",
    re.IGNORECASE,
)
_WRONG = re.compile(rf"\b(?:{_WRONG_WORDS}|mistake|error)\b|\b(?:stimmt|klopt) (?:nicht|niet)\b", re.IGNORECASE)
# Any few words, in whatever language, and then a number alone: a new value, or something else that is counted.
_ANOTHER_VALUE = re.compile(
    r"\W*(?!(?:that is|in other words|in short|namely|"
    r"i\.e\.)\W)(?:[^\W\d][\w'’]*\s){0,3}[^\W\d][\w'’]*(?:\s?[,!…;–—-]|\s?\.\.\.)\s*(?:(?:it|that)(?:['’]s| is)\s)?"
    r"(?P<number>[-–]?[$€£]?\.?[0-9](?:[\d.,/]*\d)?)(?![\d%])(?:\s[^\W\d]+)?[)*\"']*(?:[.!;](?=\s|$)|\n|$)",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"\b(?:is|are|was|were|would|will|could|has|have|more|less|fewer|times|than|of|ist|sind|est|sont|es|son|è|é|wäre)\b"
    rf"(?!\s(?:the\s)?(?:{_RIGHT_WORDS})\b)|[+*/×÷=<>]\s*[\w($]",
    re.IGNORECASE,
)
_CONDITIONAL = re.compile(r"\b(?:if|whether|unless|in case|wenn|falls|si|se|если|als)\b[^.!?;\n]*$", re.IGNORECASE)
_VALUE = r"(?<![\w.,])(?:[-–]?[$€£]?\.?[0-9](?:[\d.,/]*\d)?|(?-i:\(?[A-J]\)?))"
_VALUE_DENIED = re.compile(
    rf"(?P<is>{_VALUE})(?:\s[^\W\d]+)?\s(?:{_IS}|would be)\s(?:{_WRONG_WORDS}|too (?:many|much|few|little|high|low|"
    rf"large|small|big))\b|(?P<cannot>{_VALUE})\s(?:can(?:['’]t|not| not) be|isn['’]t)\s(?:{_RIGHT_WORDS})\b"
    rf"|\bnot\s(?P<no>{_VALUE})(?:\s[^\W\d]+)?(?=[,;:.]|\s(?:but|sondern)\b)",
    re.IGNORECASE,
)
_NUMBER_RIGHT = re.compile(
    rf"(?<![\w.,])(?P<number>[-–]?[$€£]?\.?[0-9](?:[\d.,/]*\d)?)(?:\s[^\W\d]+)?\s{_IS}\s(?:the\s)?(?:{_RIGHT_WORDS})\b",
    re.IGNORECASE,
)
_STANDS = re.compile(
    rf"(?<!not )(?<!nicht )(?<!pas )(?<!in)\b(?:{_RIGHT_WORDS})\b(?!\s+(?:final\s+)?(?:answer|value|total|result|"
    rf"number|amount|sum|one|"
    r"figure|Antwort|Zahl|réponse|valeur|respuesta)\b)|\b(?:confirmed|consistent|checks out|matches|as expected|"
    r"makes sense|yes|"
    r"ja|oui|sí|stimmt)\b",
    re.IGNORECASE,
)


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
        if (cue["pause"] and revoked >= cue.start()) or _puts_forward(text, cue.end()):
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
    return _STANDS.search(text) is not None


def denies(text: str) -> bool:
    """Whether a text calls something wrong."""
    return _WRONG.search(text) is not None


def offers_another(text: str, value: str | None) -> bool:
    """Whether what follows an answer is a few words, which may mean anything, and another number alone."""
    match = _ANOTHER_VALUE.match(text)
    return match is not None and value is not None and not _same(match["number"], value)
