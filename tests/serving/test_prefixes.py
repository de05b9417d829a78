"""Texts that were read are read on, by the adapter that read them, and say the same."""

import mlx.core as mx
import pytest

from mlx_rsgwm.inference.prefix_cache import prefill
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.serving.events import Ended
from mlx_rsgwm.serving.prefixes import FEWEST, PrefixStore, common

LONG = "A question that is long enough to be kept, with words and words in it. "
SECONDS = 60


def cached(told):
    told.wait()
    return [event.cached for event in told.events if isinstance(event, Ended)]


def test_a_conversation_is_read_on(make_engine, ask):
    engine, fresh = make_engine({"a": 1, "b": 2}), make_engine({"a": 1, "b": 2})
    first = ask(engine, "a", LONG)[1]
    assert cached(first) == [0]
    text = LONG + first.texts()[0] + "\nAnd then?"
    (expected,) = ask(fresh, "a", text)[1].texts()
    before = engine.counts.prompt_tokens
    turn = ask(engine, "a", text, n=2)[1]
    assert turn.texts() == [expected] * 2
    assert cached(turn)[0] >= len(LONG)
    assert engine.counts.prompt_tokens - before < len(text) / 2
    again = ask(engine, "a", text)[1]  # the whole prompt is known: its last token is read again
    assert again.texts() == [expected]
    other = ask(engine, "b", text)[1]  # nothing is shared between adapters
    assert cached(other) == [0]
    assert other.texts() == ask(fresh, "b", text)[1].texts() != [expected]


def test_texts_beside_each_other_are_kept_each_for_itself(make_engine, ask):
    engine, fresh = make_engine({"a": 1, "b": 2}), make_engine({"a": 1, "b": 2})
    starts = [(name, f"{word} {LONG * count}") for name in "ab" for word, count in (("One", 1), ("Two", 2))]
    for told in [ask(engine, name, text)[1] for name, text in starts]:
        told.texts()
    for name, text in starts:
        turn = ask(engine, name, text + "More?")[1]
        assert turn.texts() == ask(fresh, name, text + "More?")[1].texts()
        assert cached(turn)[0] >= len(text) - 1


@pytest.fixture
def read(base):
    """Caches of rows of ids."""
    return lambda rows: prefill(base.model, split_head(base.model)[0], rows).caches


def test_what_is_least_recently_used_goes_first(read):
    texts = [tuple(range(start, start + FEWEST + 8)) for start in (1, 60, 120)]
    caches = read(texts)
    store = PrefixStore(1 << 30)
    store.keep("a", texts[0], caches, 0)
    size = store.nbytes
    store = PrefixStore(2 * size)
    for place in (0, 1):
        store.keep("a", texts[place], caches, place)
    assert store.nbytes == 2 * size
    assert store.longest("a", (*texts[0], 7))[0] == len(texts[0])
    store.keep("a", texts[2], caches, 2)
    assert [store.longest("a", (*text, 7)) is not None for text in texts] == [True, False, True]
    assert store.nbytes == 2 * size
    assert store.longest("b", texts[0]) is None
    PrefixStore(size - 1).keep("a", texts[0], caches, 0)  # larger than all that may be kept


def test_nothing_is_left_of_a_slot_whose_texts_are_gone(read):
    text = tuple(range(FEWEST))
    caches = read([text])
    store = PrefixStore(1 << 30)
    store.keep("a", text, caches, 0)
    store._most = store.nbytes  # room for one
    for slot in ("b", "c"):
        store.keep(slot, text, caches, 0)
    assert list(store._texts) == ["c"]


def test_a_longer_text_takes_the_place_of_its_beginning(read):
    short, long = tuple(range(1, 1 + FEWEST)), tuple(range(1, 1 + 2 * FEWEST))
    store = PrefixStore(1 << 30)
    store.keep(None, short, read([short]), 0)
    size = store.nbytes
    store.keep(None, long, read([long]), 0)
    assert store.nbytes == 2 * size
    count, caches = store.longest(None, short[: FEWEST - 4] + (300,) * 9) or (0, [])
    assert count == 0  # too little in common
    count, caches = store.longest(None, long[: FEWEST + 3] + (300,) * 9)
    assert count == FEWEST + 3
    assert {cache._idx for cache in caches} == {count}
    fresh = read([long[:count]])
    for kept, expected in zip(caches, fresh, strict=True):
        assert mx.allclose(kept.keys, expected.keys[:, :, :count], atol=1e-5)
    store.keep(None, short[:5], read([short]), 0)  # not worth it
    assert store.nbytes == 2 * size


def test_the_common_beginning_of_two_texts():
    for first, second, expected in (((), (1,), 0), ((1, 2), (1, 2), 2), ((1, 2, 3), (1, 2, 4, 5), 2), ((2,), (1,), 0)):
        assert common(first, second) == expected
