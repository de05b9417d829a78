"""The lettered option, or the yes or no, that a text gives as its answer.

Two letters side by side ("A or B"), both verdicts at once ("yes and no"), a denied letter: no answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

from mlx_rsgwm.data.digits import fold
from mlx_rsgwm.evaluation.final_text import AMBIGUOUS, NOTHING, Reading, Statement, marked_lines, sentences, statements
from mlx_rsgwm.evaluation.languages import words
from mlx_rsgwm.evaluation.number_reading import taken_back

LONGEST = 4000  # characters at the end of a text in which a label is looked for that nothing states

_QUOTES = r"\s*\"'“”‘’(\[{$*:\\`"
_LEADING_LETTER = re.compile(
    rf"[{_QUOTES}]*(?:(?:option|choice|letter|answer|is|la|le|el|die|der|opción|lettre|letra)\s+[{_QUOTES}]*){{0,3}}"
    r"(?P<letter>[A-Ja-j])(?![\w'’])(?P<after>[ \t]*)(?P<next>\W?)",
    re.IGNORECASE,
)
_MENTION = re.compile(r"(?<![\w'’\\-])(?P<open>[(\[{]?)(?P<letter>[A-J])(?P<close>[)\]}]?)(?![\w'’-])")
_DENIED_BEFORE = re.compile(
    rf"\b(?:{words('denial')})\s+(?:be |option |choice |a |an |the )*[(\[\"'“]*$", re.IGNORECASE
)
_CONCEDED = re.compile(r"\b(?:(?:al)?though|even if|whereas|despite)\b[^.!?\n,]*$", re.IGNORECASE)
_DENIED_AFTER = re.compile(
    r"[)\]\"'”.]*\s*(?:[^\W\d][\w'’]*\s+){0,2}?(?:is|are|was|were|can|could|would be|seems)\s*"
    r"(?:n['’]t|not|wrong|incorrect|false|out\b)|"
    r"[)\]\"'”.]*\s*(?:cannot|doesn['’]t|does not|don['’]t|do not)\b|[^.\n?]{0,30}\?\s*(?:no|nope|wrong)\b",
    re.IGNORECASE,
)
_BESIDE = re.compile(
    r"[)\]\"'”*]*\s*(?:,|/|&|and|or|nor|und|oder|et|ou|y|o|,\s*(?:and|or))\s*(?:(?:option|choice)\s)?[(\[\"'“*]*",
    re.IGNORECASE,
)
_WORD_AFTER_A = re.compile(r"[ \t]+[a-z]")
_AFTER_LETTER = re.compile(
    r"[ \t]+(?:because|since|as|is|was|for|due|\(|with|based|would|seems|and|or|but|,)\b", re.IGNORECASE
)
_CHOOSE = re.compile(
    r"\b(?:pick|choose|chose|select|go with|going with|opt for|it['’]s|it is|must be|should be|would be|option|choice|"
    r"so|hence|therefore|thus|left with)\s+(?:option\s+|choice\s+|answer\s+)?$",
    re.IGNORECASE,
)

_VERDICT = re.compile(r"\b(?:(?P<yes>yes|true)|no|false)\b", re.IGNORECASE)
_LEADING_VERDICT = re.compile(
    rf"[{_QUOTES}]*(?P<word>(?P<yes>{words('yes')})|{words('no')}|false|incorrect)(?![\w'’])"
    rf"(?=[{_QUOTES}]*(?:[,.:;!…–—\n\"'”)}}\]$。、،，]|-\s|$))",
    re.IGNORECASE,
)
_BOTH = re.compile(
    r"\b(?:neither\s+|both\s+|either\s+)?(?:yes|true)\W+(?:and|or|nor|&|/|\|)\W*(?:no|false)\b|"
    r"\b(?:neither\s+|both\s+|either\s+)?(?:no|false)\W+(?:and|or|nor|&|/|\|)\W*(?:yes|true)\b|\b(?:yes|true)/(?:no|false)\b",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"(?:\bnot|n['’]t|\bnever|\bhardly|\buntrue)"
    r"(?:\s+(?:be|entirely|really|actually|at all|necessarily|quite))?\s+[\"'“*]*$",
    re.IGNORECASE,
)
_DOUBT = re.compile(
    r"\b(?:no|if|whether|might|may|could|would|unclear|doubt\w*|evidence|prove\w*|unless|unknown)\b[^.!?;,\n]*$",
    re.IGNORECASE,
)
_DETERMINER = re.compile(r"\s+(?:[a-z]|one\b|[A-Z][a-z])")
_INTERRUPTED = re.compile(
    r"[,;.…–—-]\s*(?:no,?\s+)?(?:wait|oops|scratch that|hold on|i mean|or rather)\b|"
    rf"[,;…–—-]\s*(?:{words('no')})\s?[,:]",
    re.IGNORECASE,
)
_DOUBTED = r"(?<!no )(?<!without )doubt\w*|unclear|unsure|uncertain|unlikely|not (?:sure|certain|clear)"
# Somebody may say so, or nobody would: no verdict. "if the answer is yes", "I doubt that it is no".
_NOT_SAID = re.compile(
    r"(?:\b(?:not|never|nobody|no one|none|cannot|hard|difficult|hesitate|could|might|may|some|many|most|people|others|"
    r"anyone|who|one)\b|n['’]t\b)[^.!?;\n]{0,40}\b(?:say|says|said|saying|answer|answered|reply|claim|think|call it)\s"
    r"(?:that\s|it is\s|either\s|both\s)?[\"'“*]*$"
    rf"|\b(?:whether|{_DOUBTED})\b[^.!?;,\n]*$",
    re.IGNORECASE,
)
_NOT_STATED = re.compile(
    rf"(?:\b(?:whether|if|{_DOUBTED}|not (?:true|the case))\b|"
    r"(?:n['’]t|\bnot) (?:think|believe|say|mean|know|sure)\b)[^.!?;\n]*$",
    re.IGNORECASE,
)
# What names an option before its letter: "the correct option is b", "I would go with c)".
_OPTION_SAID = re.compile(
    r"\b(?:(?:correct|right|best|chosen|final|my|most [^\W\d]+)\s(?:option|choice|alternative|letter)\b[^.:=?\n]{0,30}?"
    r"(?:\bis\b|\bwould be\b|[:=])|option that [^.:=?\n]{1,30}?\sis"
    r"|(?:i|we)(?:['’]d| would|['’]ll| will)? (?:choose|pick|select|go with|opt for)(?:\s(?:option|choice|answer))?"
    r"|richtige\s(?:option|antwort|wahl)\sist|(?:opción|respuesta|alternativa)\scorrecta\ses"
    r"|(?:bonne|meilleure)\s(?:option|réponse)\sest)[\s*]*|正[确確](?:选项|選項|答案)(?:是|为|為|[：:])\s?",
    re.IGNORECASE,
)
_LETTER_AFTER = re.compile(r"[\s\"'“‘(\[{*]*(?:(?:option|choice|letter|not)\s[(\[]?)?[A-Ja-j](?![\w'’])")
# "b)" and "(b)" are letters of options whatever their case; "f(a)" is none.
_BRACKETED = re.compile(r"(?:(?<![\w'’\\)])|(?<![\w'’\\)])\()[a-j](?=\))")
# "Vitamin A", "Plan B": the letter belongs to a name.
_NAME_BEFORE = re.compile(
    r"(?:\b(?:vitamins?|plan|hepatitis|type|group|team|grade|class|section|room|model|phase|train|company|machine|"
    r"city|town|product|drug|store|influenza|schedule|exhibit|appendix|figure|vertex|blood type)|"
    r"\b(?!(?:Option|Choice|Answer|Letter|Correct|So|Hence|Therefore|Thus|Choose|Pick|Select|Probably|Definitely|Maybe|Is|"
    r"It|Ans|Antwort|Respuesta|Only|And|Or|Not|Both|Final|Either|Neither|Also|But|Because|Since|While)\b)"
    r"[A-Z][a-z]+)[ \t]+$",
)
_CORRECTION = re.compile(
    r"(?:\bwait\b|\bactually\b|\bsorry\b|\bcorrection\b|\boops\b|\.\.\.|…)[,:;.\s]*", re.IGNORECASE
)


def options_of(question: str) -> dict[str, str]:
    """Lettered options of a question, by letter: lines like ``B. library``."""
    return {match[1]: match[2].strip() for match in re.finditer(r"(?m)^[ \t]*\(?([A-J])[.):][ \t]+(.+)$", question)}


def read_choice(text: str, options: Mapping[str, str], finished: bool = True) -> Reading:
    """The letter that is marked, boxed, stated, opens the text or ends it; else the one option whose words are said."""
    text = _BRACKETED.sub(lambda match: match[0].upper(), text)
    for line in reversed(marked_lines(text)):
        if line:
            reading = _scope_letter(
                re.sub(
                    r"^[\s*]*(?:the\s+)?(?:final\s+)?(?:correct\s+)?answer\b[\s*]*(?:is\b|[:=.])?",
                    "",
                    fold(_unbox(line)),
                    flags=re.IGNORECASE,
                ),
                options,
            )
            return AMBIGUOUS if reading is NOTHING else reading
    for place in reversed(statements(text, finished)):
        if place.kind == "subject":
            continue
        if place.kind == "box" and (len(set(place.boxes)) > 1 or not place.text):
            return AMBIGUOUS
        reading = _scope_letter(fold(_unbox(place.text)), options)
        if reading is not NOTHING:
            instead = _instead(text, place, reading.value)
            return reading if instead is None else _decided(_mentioned(instead, options, stated=True))
    text = fold(text)
    for match in reversed(list(_OPTION_SAID.finditer(text[-LONGEST:]))):
        scope = text[-LONGEST:][match.end() :].split("\n", 1)[0]
        reading = _scope_letter(scope, options) if _LETTER_AFTER.match(scope) else NOTHING
        if reading is not NOTHING:
            place = Statement(0, scope, "said", end=len(text) - len(text[-LONGEST:]) + match.end())
            instead = _instead(text, place, reading.value)
            return reading if instead is None else _decided(_mentioned(instead, options, stated=True))
    named = list(
        re.finditer(
            r"(?:\b[Oo]ption\s[(\[]?(?=[a-jA-J]\b)|\b(?:option|choice|answer)\s+(?:is\s+)?[(\[\"'“*]*|[(\[\"'“*]*)((?<=ption\s)[a-j]|(?<=ption\s.)[a-j]|[A-J])[)\]\"'”*]*\s+(?:is|as)\s+(?:the\s+)?(?:\w+\s+)?(?:correct|right|best|answer)\b",
            text,
        )
    )
    named = [match for match in named if not _NAME_BEFORE.search(text[max(0, match.start() - 24) : match.start()])]
    if named:
        return Reading(named[-1][1].upper())
    opening = re.findall(r"(?m)^[ \t*(\[\"']*([A-J])(?:[).:\]]|[ \t]*\**[ \t]*$)", text)
    if (
        len(opening) == 1
        and re.match(r"[\s*(\[\"']*[A-J](?:[).:\]]|\s*\**\s*$)", text)
        and not _denied_at(text, opening[0])
    ):
        return Reading(opening[0])
    if len(opening) > 1:
        return NOTHING  # a list of the options
    alone = re.fullmatch(r"[\s*(\[{\"'$]*([A-Ja-j])[).:\]}\"'*$]*\s*", text)
    if alone:
        return Reading(alone[1].upper())
    comma = re.match(r"[\s*(\"']*([A-J])(?:\s?[,–—-]\s(?![A-J]\b)|\s(?:because|since)\b)", text)
    if comma:
        return Reading(comma[1])
    return _mentioned(text[-LONGEST:], options)


def _instead(text: str, place: Statement, value: str | None = None) -> str | None:
    """What a text gives in place of a label that it takes back, in the same sentence or a later one."""
    within = _INTERRUPTED.search(next(iter(sentences(fold(place.text))), ""))
    if within is not None and place.kind == "said":
        return fold(place.text)[within.end() :]
    return taken_back(text, place, value)


def _decided(reading: Reading) -> Reading:
    return AMBIGUOUS if reading.value is None else Reading(reading.value, stated=False)


def _unbox(text: str) -> str:
    return re.sub(r"\\(?:boxed|fbox)\s*\{", "{", text)


def _denied_at(text: str, letter: str) -> bool:
    match = re.search(rf"(?<![\w]){letter}(?![\w])", text)
    return match is not None and bool(_DENIED_AFTER.match(text, match.end()))


def _scope_letter(scope: str, options: Mapping[str, str]) -> Reading:
    """The letter of a stated answer: the one it begins with, else the only one not denied, else by its words."""
    said = next(iter(sentences(scope)), "")
    leading = _LEADING_LETTER.match(said)
    if leading is not None:
        letter, end = leading["letter"], leading.end("letter")
        article = letter in "aAI" and _WORD_AFTER_A.match(said, end) and not _AFTER_LETTER.match(said, end)
        word = letter.islower() and _WORD_AFTER_A.match(said, end) and letter.upper() not in options
        if article or word:
            by_words = _by_option(said[leading.start("letter") :], options)
            if by_words is not NOTHING or letter != "A" or not options:
                return by_words if options or letter != "A" else NOTHING
            return NOTHING
        if _denied(said, leading.start("letter"), end):
            return _mentioned(scope, options, stated=True)
        beside = _BESIDE.match(said, end)
        other = _MENTION.match(said.upper() if letter.islower() else said, beside.end()) if beside else None
        if other and other["letter"].upper() != letter.upper() and not _WORD_AFTER_A.match(said, other.end()):
            return AMBIGUOUS
        return Reading(letter.upper())
    return _mentioned(said, options, stated=True)


def _denied(text: str, start: int, end: int) -> bool:
    before = text[max(0, start - 80) : start]
    return bool(_DENIED_BEFORE.search(before[-40:]) or _CONCEDED.search(before) or _DENIED_AFTER.match(text, end))


def _mentioned(text: str, options: Mapping[str, str], stated: bool = False) -> Reading:
    """The only letter that a text leaves undenied; of several the one that it chooses; else the option by its words."""
    standing: list[re.Match[str]] = []
    for match in _MENTION.finditer(text):
        bare = not (match["open"] or match["close"])
        if (
            bare
            and match["letter"] in "AI"
            and _WORD_AFTER_A.match(text, match.end())
            and not _AFTER_LETTER.match(text, match.end())
        ):
            continue  # an article or a pronoun
        if bare and (match["letter"] == "I" or _NAME_BEFORE.search(text[max(0, match.start() - 24) : match.start()])):
            continue
        standing.append(match)
    denied = [_denied(text, match.start(), match.end()) for match in standing]
    for index in range(len(standing) - 2, -1, -1):  # "A and B are not"
        if denied[index + 1] and _DENIED_AFTER.match(text, standing[index + 1].end()):
            gap = text[standing[index].end() : standing[index + 1].start()]
            denied[index] = denied[index] or bool(_BESIDE.fullmatch(gap))
    affirmed = [match for match, no in zip(standing, denied, strict=True) if not no]
    if affirmed and len({match["letter"] for match in affirmed}) == 1:
        last = affirmed[-1]
        if (
            stated
            or last["open"]
            or last["close"]
            or _CHOOSE.search(text[max(0, last.start() - 40) : last.start()])
            or not text[last.end() :].strip(" .!*\"')\n")
        ):
            return Reading(last["letter"], stated=stated or bool(last["open"]))
    for before, after in pairwise(affirmed):
        if (
            _BESIDE.fullmatch(text[before.end() : after.start()])
            and before["letter"] != after["letter"]
            and after is affirmed[-1]
        ):
            return AMBIGUOUS
    if len(affirmed) > 1:
        if stated:
            return AMBIGUOUS
        last = affirmed[-1]
        chosen = _CHOOSE.search(text[max(0, last.start() - 40) : last.start()])
        ends = _ends_with(text, last, options)
        return Reading(last["letter"], stated=False) if chosen or ends else NOTHING
    return _by_option(text, options)


def _ends_with(text: str, mention: re.Match[str], options: Mapping[str, str]) -> bool:
    """Whether a text ends with a letter, or names it last with its option's words ("so it is B. whale")."""
    after = text[mention.end() :].strip(" .:!*\"')\n").casefold()
    named = re.search(r"\b(?:is|be|answer|option|choice)\W*$", text[: mention.start()][-20:])
    return not after or bool(named and after == options.get(mention["letter"], "").strip(" .").casefold())


def _by_option(text: str, options: Mapping[str, str]) -> Reading:
    """The letter of the one option whose words are said and not denied; of several none."""
    said = []
    for letter, option in options.items():
        plain = re.sub(r"^(?:an?|the)\s+", "", option.strip(), flags=re.IGNORECASE)
        if not plain:
            continue
        mentions = list(re.finditer(rf"(?<!\w){re.escape(plain)}(?!\w)", text, re.IGNORECASE))
        if any(not _denied(text, match.start(), match.end()) for match in mentions):
            said.append(letter)
    return Reading(said[0], stated=False) if len(said) == 1 else NOTHING


def read_verdict(text: str, finished: bool = True) -> Reading:
    """Yes or no: marked, boxed, stated, as the first word, or as the last verdict of the text."""
    for line in reversed(marked_lines(text)):
        if line:
            reading = _scope_verdict(
                re.sub(
                    r"^[\s*]*(?:the\s+)?(?:final\s+)?answer\b[\s*]*(?:is\b|[:=.])?",
                    "",
                    fold(_unbox(line)),
                    flags=re.IGNORECASE,
                ),
                at_start=True,
            )
            return AMBIGUOUS if reading is NOTHING else reading
    for place in reversed(statements(text, finished)):
        if place.kind == "subject":
            continue
        if place.kind == "box" and len(set(place.boxes)) > 1:
            return AMBIGUOUS
        scope = next(iter(sentences(fold(_unbox(place.text)))), "")
        if place.kind == "said" and _NOT_STATED.search(text[max(0, place.start - 80) : place.start]):
            return AMBIGUOUS
        reading = _scope_verdict(scope, at_start=place.kind != "said")
        if reading is not NOTHING:
            instead = _instead(text, place)
            return reading if instead is None else _decided(_last_verdict(instead))
    text = fold(text)
    leading = _LEADING_VERDICT.match(text)
    if leading is not None and not _BOTH.match(text[leading.start("word") :]):
        if _both_verdicts(text, leading):
            return AMBIGUOUS
        correction = _CORRECTION.search(text[: leading.end() + 60], leading.end())
        later = _last_verdict(text[correction.end() :]) if correction else NOTHING
        return later if later.value is not None else _verdict(leading)
    return _last_verdict(text)


def _both_verdicts(text: str, leading: re.Match[str]) -> bool:
    """Whether the other verdict follows the first one at once, or stands alone at the end ("Yes. No.")."""
    after = text[leading.end() :].lstrip("\t\n .,;:!|/-–—)]}\"'”*")
    others = (_LEADING_VERDICT.match(after), _LEADING_VERDICT.fullmatch(text.rstrip().splitlines()[-1].strip(" .!*")))
    return any(other is not None and bool(other["yes"]) != bool(leading["yes"]) for other in others)


def _scope_verdict(scope: str, at_start: bool) -> Reading:
    if _BOTH.search(scope) and not _VERDICT.search(_BOTH.sub(" ", scope)):
        return AMBIGUOUS
    leading = _LEADING_VERDICT.match(scope) or re.match(
        rf"[{_QUOTES}]*(?:(?P<yes>yes|true)|no|false)\b", scope, re.IGNORECASE
    )
    if leading is not None:
        return AMBIGUOUS if _both_verdicts(scope, leading) else _verdict(leading)
    if at_start:
        return NOTHING
    for match in _VERDICT.finditer(scope):
        reading = _verdict_at(scope, match)
        if reading is not NOTHING:
            return reading
    return NOTHING


def _verdict_at(text: str, match: re.Match[str]) -> Reading:
    """What one "yes", "no", "true" or "false" says, with a negation before it; NOTHING for "no" before a noun."""
    sentence = text[max(0, match.start() - 200) : match.start()]
    if match[0].lower() in ("true", "false") and _DOUBT.search(sentence):
        return NOTHING
    word, before = match[0].lower(), text[max(0, match.start() - 40) : match.start()]
    if word == "no" and _DETERMINER.match(text, match.end()):
        return NOTHING
    if word in ("yes", "no") and _NOT_SAID.search(sentence):
        return NOTHING
    if _NEGATED.search(before):
        return AMBIGUOUS if word in ("yes", "no") else Reading("no" if word == "true" else "yes")
    return _verdict(match)


def _verdict(match: re.Match[str]) -> Reading:
    return Reading("yes" if match["yes"] else "no")


def _last_verdict(text: str) -> Reading:
    plain = _BOTH.sub(lambda match: " " * len(match[0]), text[-LONGEST:])
    result = NOTHING
    for match in _VERDICT.finditer(plain):
        reading = _verdict_at(plain, match)
        if reading is not NOTHING:
            result = reading
    return result if result.value is None else Reading(result.value, stated=False)
