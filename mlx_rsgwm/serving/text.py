"""Text of a row as it comes: no half characters, nothing of a stop text, no space around it where it is trimmed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

HALF = "\ufffd"  # what a decoder shows of a character whose other bytes are still to come

# Vocabularies of bytes write each as a letter: printable ones as themselves, the others from U+0100 on (GPT-2), or in
# hexadecimal (SentencePiece).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTABLE]
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + place): byte for place, byte in enumerate(_OTHERS)}
HEXADECIMAL = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def bytes_of(text: str, piece: str | None) -> tuple[int, ...] | None:
    """A token's bytes, by its text, or where that is half a character by its ``piece`` in the vocabulary."""
    if HALF not in text:
        return tuple(text.encode())
    if piece is not None and (byte := HEXADECIMAL.fullmatch(piece)):
        return (int(byte[1], 16),)
    return tuple(BYTES[letter] for letter in piece) if piece and BYTES.keys() >= set(piece) else None


class Decoder:
    """Token ids in, text out as soon as its characters are whole; ``decode`` is the tokenizer's.

    A few tokens before those that are new are decoded with them, for a decoder may treat the first of a text in another
    way (a space before a word); so the cost of a token does not grow with the text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._start = self._told = 0  # of the tokens that are decoded again, and of those that are new

    def add(self, token: int) -> str:
        """The text that this token makes whole."""
        self._tokens.append(token)
        new = self._new()
        if new.endswith(HALF):
            return ""
        return self._tell(new) if new else ""

    def end(self) -> str:
        """The text that is left, half characters included."""
        return self._tell(self._new())

    def _new(self) -> str:
        before = self._decode(self._tokens[self._start : self._told])
        return self._decode(self._tokens[self._start :])[len(before) :]

    def _tell(self, new: str) -> str:
        self._start, self._told = self._told, len(self._tokens)
        return new


class TextStream:
    """Tokens in, text out; ``stopped`` once a stop text came, which is not part of the text.

    With ``trim`` the text has no white space at its ends, as answers of ``rsgwm ask``: what may still be its end is
    held back. So is what may be the beginning of a stop text.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = (), trim: bool = False) -> None:
        self._decoder = Decoder(decode)
        self._stop, self._trim = [text for text in stop if text], trim
        self._held, self._begun = "", False
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be told once this token is there."""
        return self._told(self._decoder.add(token), last=False)

    def end(self) -> str:
        """What is left once the last token is there."""
        return self._told(self._decoder.end(), last=True)

    def _told(self, piece: str, last: bool) -> str:
        if self.stopped:
            return ""
        self._held += piece
        stops = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if stops:
            self._held, self.stopped = self._held[: min(stops)], True
        return self._let_go(len(self._held) if last or self.stopped else len(self._held) - self._doubtful(), last)

    def _let_go(self, count: int, last: bool) -> str:
        told, held = self._held[:count], self._held[count:]
        if self._trim:
            told = told if self._begun else told.lstrip()
            kept_back = len(told) - len(told.rstrip())
            if not (last or self.stopped):
                held = told[len(told) - kept_back :] + held
            told = told.rstrip()
        self._held = held
        self._begun = self._begun or bool(told)
        return told

    def _doubtful(self) -> int:
        """Characters at the end that a stop text may begin with."""
        longest = max(map(len, self._stop), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-count:]) for text in self._stop):
                return count
        return 0
