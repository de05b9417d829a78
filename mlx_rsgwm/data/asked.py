"""What a training row asks: its question without the labels and markers around it, and the parts that may be one.

Rows of mlx-lm's formats hold a question as a whole prompt, below an instruction, behind a label such as ``Question:``
or between the markers of a chat template. Evaluation asks the bare question, and must recognise it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_LABEL = (
    r"(?:Q|Question|Problem|User|Human|Instruction|Input|Prompt|Query"
    r"|A|Answer|Solution|Assistant|Response|Output|Completion)"
)
# Where a question or an answer begins or ends. A label may stand at the start of a line, as a heading, or end the text.
_BORDER = re.compile(
    rf"^[ \t]*[*_]*{_LABEL}[ \t]*[*_]*[:：][*_]*|^[ \t]*\#+[ \t]*{_LABEL}[ \t]*[:：]?[ \t]*$"
    rf"|\#\#+[ \t]*{_LABEL}[ \t]*[:：]|\s{_LABEL}[ \t]*[:：]\s*\Z"
    r"|^[ \t]*(?:\#{2,}|-{3,}|={3,}|\*{3,}|`{3,}\w*|\"{3})[ \t]*$"  # a line that only separates
    rf"|</?{_LABEL}>|\b(?-i:USER|HUMAN|SYSTEM|ASSISTANT):"
    # Markers of a chat template in text that was rendered before, with the role's name behind some of them.
    r"|(?:<[|｜][^<>\n]{1,40}[|｜]>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos)>)"
    r"(?:(?:user|assistant|model|system)\b(?=\s|<))?",
    re.IGNORECASE | re.MULTILINE,
)
# A number, or words in any language and a colon.
_LINE_LABEL = re.compile(r"\s*(?:\(?\d{1,4}[.)]\s+|[#*_\s]*[^\W\d_](?:[^\W_]|[ \t.-]){0,23}[*_]*[:：][*_]*\s*)")
_QUOTES = "\"'“”„«»「」`*_ \t\r\n"
SHORTEST_LINE = 16  # characters of a line that neither has a label nor ends as a question; shorter ones are headings
MOST_LINES = 64  # of a text; a longer one is a document, of which only what borders set off and what asks is taken


def bare(text: str) -> str:
    """The question alone, where labels and markers set off nothing else; else the text as it is."""
    segments = _segments(text)
    return segments[0] if len(segments) == 1 else text


def parts(text: str) -> Iterator[str]:
    """Parts of a text that may be a question: what borders set off, and its lines, with and without their labels."""
    segments = _segments(text)
    if len(segments) > 1:
        yield from segments
    lines = [line.strip() for segment in segments for line in segment.split("\n") if line.strip()]
    document = len(lines) > MOST_LINES
    for part in dict.fromkeys((*segments, *(() if document else lines))):
        plain = _LINE_LABEL.sub("", part, count=1) if _LINE_LABEL.match(part) else part
        if (unquoted := plain.strip(_QUOTES)) and unquoted != part:
            yield from dict.fromkeys((plain, unquoted))
    if len(lines) > 1:
        yield from (line for line in lines if line[-1] in "?？؟" or (len(line) >= SHORTEST_LINE and not document))


def _segments(text: str) -> list[str]:
    return [segment.strip() for segment in _BORDER.split(text) if segment.strip()]


def said_by(messages: Iterable[Mapping[str, Any]], role: str) -> list[str]:
    """The texts of one role's messages; content in parts gives its text parts."""
    texts = []
    for message in messages:
        content = message.get("content") if message.get("role") == role else None
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str) and text.strip():
                texts.append(text)
    return texts
