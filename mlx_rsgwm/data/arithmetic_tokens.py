r"""Text as tokens of arithmetic: numbers, operators, brackets, signs of equality, units; and what ends an equation.

LaTeX (``\frac``, ``\times``, ``\boxed``, ``\text``), Markdown, other scripts' digits and operators in words ("21 minus
4 equals") are brought to one spelling first. A comma or a point in a number has several readings; each is a way of
cutting the text into tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from mlx_rsgwm.data.digits import MAX_DIGITS, fold_digits

MAX_TEXT = 10_000  # characters that are read; what stands further back in a draft is no longer looked at
OPENING = {"(": ")", "[": "]", "{": "}"}

# How digits are grouped: by commas, by points, or (in "2+3=5,3+4=7") by neither.
READINGS = ("point", "separate", "comma")
_GAPS = r"[1-9]\d{0,2}(?:(?:\u00a0\d{3})+|(?: \d{3})+|(?:'\d{3})+|(?:’\d{3})+|(?:_\d{3})+)(?!\d)"
_NUMBERS = {
    "point": rf"(?:(?:{_GAPS}|\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d{{1,2}}(?:,\d{{2}})+,\d{{3}}(?!\d)|\d+)(?:\.\d+)?|\.\d+)",
    "separate": rf"(?:(?:{_GAPS}|\d+)(?:\.\d+)?|\.\d+)",
    "comma": rf"(?:{_GAPS}|\d{{1,3}}(?:\.\d{{3}})+(?!\d)|\d+)(?:,\d+)?",
}
_GLUED_ON = {"point": r"[.,]\d", "separate": r"\.\d|,\d{3}(?!\d)", "comma": r"[.,]\d"}

_WORD = r"[^\W\d_]+(?:['’.-][^\W\d_]+)*\.?"
_TOKEN = {
    reading: re.compile(
        rf"(?P<number>{number})(?P<glued>{_GLUED_ON[reading]})?|(?P<percent>%)"
        r"|(?P<compare>[<>:!=]=+|=+>|->|[<>≤≥≠≈≡~→⇒])|(?P<equals>=)|(?P<op>[+\-–*×÷/^]|√)|(?P<command>\\[a-zA-Z]+)"
        r"|(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<money>[$€£¥₹₩₽₺₫₴₦₱¢฿])"
        rf"|(?P<newline>\n)|(?P<space>[ \t\u00a0]+)|(?P<word>{_WORD}|°(?:[CF]\b)?)"
        r"|(?P<stop>[.,;:!?\"'“”„«»‘’—•·*`#|。，；：！？（）、]|\.\.\.)|(?P<other>.)",
        re.DOTALL,
    )
    for reading, number in _NUMBERS.items()
}


@dataclass(frozen=True)
class Token:
    """``kind`` is a group's name of the pattern; ``space``: whether white space stood before. ``value`` of a number."""

    kind: str
    text: str
    start: int
    end: int
    space: bool
    value: Fraction | None = None


_TEXT_MACRO = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_LATEX = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:begin|end)\s*\{[^{}]*\}(?:\{[^{}]*\})?|\\\\(?:\[[^\]\n]{0,10}\])?|\\[\[\]]", "\n"),
        (r"(?<=\d)(?:\{,\}|,\\!)(?=\d)", ","),
        (r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))", "\u00a0"),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
        (r"\\[,;:! ()]|\\(?:displaystyle|q?quad|boxed|fbox|phantom)(?![a-zA-Z])|[&~]", " "),
        (r"(?<![\w.])\.\$(?=\d)", "$."),  # ".$500 = \\frac{1}{2}$": the point is the number's
        (r"(?<!\\)\$+", " "),
        (r"\\([$%#])", r"\1"),
        (r"\\(?:times|cdot|ast)(?![a-zA-Z])", "×"),
        (r"\\div(?![a-zA-Z])", "÷"),
        (r"\\sqrt(?![a-zA-Z])(?!\s*\[)", "√"),
        (r"\\(?:approx|neq?|leq?|geq?|equiv|implies|(?:Long)?[rR]ightarrow|to|iff)(?![a-zA-Z])", "→"),
        (r"\\[dtc]?frac(?![a-zA-Z])\s*", r"\\frac"),
        (r"\\frac(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\^\s?\{?\s?\\circ\s?\}?", "°"),
    )
)
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_BEFORE, _AFTER = r"(?<=[\d)\w%.])\s*", r"(?=\s*[-(]?\s?[$€£]?\d)"
_WORDS = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"(?<=\d)\s?(?:percent|per cent|prozent|pour cent|por ciento|процентов|процента)\b", "%"),
        (rf"(?<=\d)\s+(?:times|multiplied by|mal|fois|multiplié par|veces|por|умножить на)\b{_AFTER}", " × "),
        (
            rf"(?<=[\d\w])\s+(?:divided by|geteilt durch|divisé par|dividido (?:por|entre)|разделить на)\b{_AFTER}",
            " ÷ ",
        ),
        (rf"(?<=[\d\w])\s+(?:plus|más|mais|плюс)\b{_AFTER}", " + "),
        (rf"(?<=[\d\w])\s+(?:minus|moins|menos|meno|минус)\b{_AFTER}", " - "),
        (rf"(?<=\d)\s?[加]\s?{_AFTER}", "+"),
        (rf"(?<=\d)\s?[减減]\s?{_AFTER}", "-"),
        (rf"(?<=\d)\s?(?:乘以?|掛ける)\s?{_AFTER}", "×"),
        (rf"(?<=\d)\s?(?:除以|割る)\s?{_AFTER}", "÷"),
        (r"(?<=\d)\s?等于\s?(?=[-$]?\d)", " = "),
        (
            r"\b(?:(?:is|are) equal to|equals?|ist gleich|est égal à|égale(?:nt)?|fait|es igual a|é igual a|равно"
            rf"|равняется)\b{_AFTER}",
            " = ",
        ),
        # "6 times 7 is 42", where an operator was said in words.
        (rf"(?<=[+×÷-] )(\s*{_NUMBERS['point']}) (?:is|gives|makes|ist|macht|est|es|são|это){_AFTER}", r"\1 ="),
    )
)
_OF = re.compile(
    r"(?P<left>%|(?<![\d/.,])\d{1,6}/\d{1,6})\s+(?:of|de|del|von|di|от)\s+"
    r"(?:(?:the|her|his|their|its|all|those|these|los|las|den)\s+)?(?=[$€£]?\s?\d)",
    re.IGNORECASE,
)


def normalised(text: str) -> str:
    """``text`` in one spelling of digits, operators, LaTeX and Markdown; at most ``MAX_TEXT`` characters of it."""
    text = _VULGAR.sub(_vulgar, text[:MAX_TEXT])
    text = fold_digits(text)[:MAX_TEXT]
    if "\\" in text:
        for _ in range(2):
            text = _TEXT_MACRO.sub(r" \1 ", text)
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    text = re.sub(r"(?<=[\d)])\*\*(?=[\d(-])", "^", text)
    text = re.sub(r"\*\*|__|`", "", text)
    text = re.sub(r"(?<=[\d)]) ?[xX] ?(?=[$€£]?[\d(])|(?<=[\w)]) [xX] (?=[$€£]?[\d(])", " × ", text)
    for pattern, replacement in _WORDS:
        text = pattern.sub(replacement, text)
    return _OF.sub(r"\g<left> × ", text)


def _vulgar(match: re.Match[str]) -> str:
    top, bottom = fold_digits(match[0]).split("/")
    return rf" \frac{{{top}}}{{{bottom}}}"


def tokens_of(text: str, reading: str) -> list[Token]:
    """Tokens of a normalised text without its white space."""
    tokens: list[Token] = []
    space = True
    for match in _TOKEN[reading].finditer(text):
        kind = "number" if match["number"] else str(match.lastgroup)
        if kind == "space":
            space = True
            continue
        value = None
        if kind == "number":
            value = _value(match["number"], reading)
            point = reading == "comma" and "," in match[0] and text[match.start() - 1 : match.start()] in OPENING
            if value is None or match["glued"] or point or _in_a_name(text, match.start()):
                kind = "other"
        tokens.append(Token(kind, match[0], match.start(), match.end(), space, value))
        space = kind == "newline"
    return tokens


def _in_a_name(text: str, start: int) -> bool:
    """Whether a letter or underscore stands right before: "Q3", "a_1". Scripts without spaces name nothing so."""
    before = text[start - 1 : start]
    return before == "_" or (before.isalpha() and before < "\u0900")


def _value(text: str, reading: str) -> Fraction | None:
    """Exact value; None for too many digits and for codes ("007", "05")."""
    if len(text) > MAX_DIGITS or re.match(r"0\d", text) or (reading == "comma" and re.search(r",0{4,}$", text)):
        return None
    plain = re.sub(r"[ \u00a0'’_]", "", text)
    plain = plain.replace(".", "").replace(",", ".") if reading == "comma" else plain.replace(",", "")
    return Fraction(plain)
