"""What is told of a text as it comes is the text, up to a stop text, whatever the pieces."""

import random

import pytest

from mlx_rsgwm.serving.text import TextStream


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
