"""What is told of a text as it comes is the text, up to a stop text, whatever the pieces."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlx_rsgwm.serving.text import HALF, TextStream, bytes_of


def told(pieces, stop=(), trim=False):
    stream = TextStream("".join, stop, trim)
    parts = []
    for piece in pieces:
        parts.append(stream.add(piece))
        if stream.stopped:
            return parts
    return [*parts, stream.end()]


def expected(text, stop, trim):
    places = [text.find(word) for word in stop if word in text]
    text = text[: min(places)] if places else text
    return text.strip() if trim else text


@pytest.mark.parametrize("trim", [False, True])
def test_any_cut_into_pieces_tells_the_same(trim):
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choice("ab \n") for _ in range(draw.randrange(12)))
        stop = ["".join(draw.choice("ab ") for _ in range(draw.randrange(1, 4))) for _ in range(draw.randrange(3))]
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(draw.randrange(4)))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        first = next((n for n in range(len(text) + 1) if any(word in text[:n] for word in stop)), None)
        seen = text if first is None else text[:first]  # a stop text ends it where its last letter came
        whole = told(list(text), stop, trim)
        assert "".join(whole) == expected(seen, stop, trim)
        if not stop:
            assert "".join(told(pieces, stop, trim)) == expected(text, stop, trim)


def test_only_what_may_be_a_stop_text_is_held_back():
    assert told(["ab", "c", "d"], ["cde"]) == ["ab", "", "", "cd"]
    assert told(["ab", "cd", "e", "f"], ["cde"]) == ["ab", "", ""]
    assert told([" ", "a ", " b", "\n"], trim=True) == ["", "a", "  b", "", ""]


def test_characters_come_whole_and_together_they_are_the_decoded_text(base):
    decode = base.tokenizer.decode
    for text in ["Grüße, 世界 🎉!", "a\u0301b", "🎉🎉"]:
        tokens = base.tokenizer.encode(text)
        stream = TextStream(decode)
        parts = [stream.add(token) for token in tokens]
        assert "\ufffd" not in "".join(parts)
        assert "".join(parts) + stream.end() == text
        stream = TextStream(decode)
        assert "".join(stream.add(token) for token in tokens[:-1]) + stream.end() == decode(tokens[:-1])
    draw = random.Random(1)
    for _ in range(50):  # bytes that are no text
        tokens = [draw.randrange(1, 260) for _ in range(30)]
        stream = TextStream(decode)
        assert "".join([stream.add(token) for token in tokens]) + stream.end() == decode(tokens)


def test_the_bytes_of_tokens_are_those_of_the_text():
    """By a vocabulary of single bytes of the tokenizers library, whose letters for them are GPT-2's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    text = "a 🙂 in the café\t" + "".join(map(chr, range(0x20, 0x250)))
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    shown = [tokenizer.decode([token]) for token in ids]
    assert any(HALF in each for each in shown)
    parts = [bytes_of(each, tokenizer.id_to_token(token)) for each, token in zip(shown, ids, strict=True)]
    assert bytes(byte for part in parts for byte in part).decode() == text


def test_pieces_in_hexadecimal_are_bytes_and_unknown_ones_are_none():
    assert bytes_of(HALF, "<0xF0>") == (0xF0,)
    assert bytes_of(HALF, "<0xF>") == tuple(b"<0xF>")
    assert bytes_of(HALF, "数") is None
    assert bytes_of(HALF, None) is None
    assert bytes_of("é", None) == (0xC3, 0xA9)
