"""Texts that were read are read on, by the adapter that read them, and say the same."""

from dataclasses import replace
from functools import partial

import mlx.core as mx
import pytest

from mlx_rsgwm.inference.prefix_cache import prefill
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.serving import rows
from mlx_rsgwm.serving.events import Ended
from mlx_rsgwm.serving.prefixes import FEWEST, FEWEST_SHARED, PrefixStore, common
from tests.serving.conftest import evaluated

LONG = "A question that is long enough to be kept, with words and words in it. "
SECONDS = 60


def add(name, adapter, library):
    library.add_adapter(name, adapter, adapter.content_hash())


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
def upper(make_adapter):
    """Maker of adapters that change the last layer alone."""

    def make(seed):
        adapter = make_adapter(seed)
        adapter.weights = {name: value for name, value in adapter.weights.items() if ".layers.1." in name}
        return evaluated(adapter)

    return make


@pytest.fixture
def positions(monkeypatch):
    """How many positions the lower layers read, and the upper ones, while the model is split."""
    read = {"lower": 0, "upper": 0}
    split_layers = rows.split_layers

    def counted(part, layers):
        def call(inputs, cache=None):
            read[part] += inputs.shape[1]
            return layers(inputs, cache=cache)

        return call

    def counting(model, count):
        split = split_layers(model, count)
        return split and replace(split, lower=counted("lower", split.lower), upper=counted("upper", split.upper))

    monkeypatch.setattr(rows, "split_layers", counting)
    return read


def test_what_no_adapter_changes_is_read_once_for_all(make_engine, ask, upper, positions):
    """Prompts at adapters of the last layer, at the base, and at an adapter that changes all layers."""
    adapters = {name: upper(seed) for seed, name in enumerate("abc", 1)}

    def start():
        engine = make_engine({"all": 4})
        for name, adapter in adapters.items():
            engine.call(partial(add, name, adapter)).result(SECONDS)
        return engine

    engine = start()

    def read(name, text):
        """Positions that were read of a text, whose answer is that of an engine which knows nothing."""
        before = dict(positions)
        (answer,) = ask(engine, name, text)[1].texts()
        counts = tuple(positions[part] - before[part] for part in ("lower", "upper"))
        assert [answer] == ask(start(), name, text)[1].texts()
        return counts, answer

    prompt = LONG * 2
    (length, _), answer = read("a", prompt)
    assert length > 2 * FEWEST_SHARED
    base = engine.library.base.name
    for name in ("b", base):
        counts, other = read(name, prompt)
        assert counts == (1, length)  # the last token is always read
        assert other != answer
    assert read("all", prompt)[0] == (length, length)  # nothing is shared with it
    turn = prompt + answer + "\nAnd then?"
    more = read("a", turn)[0][0]  # by itself, what was written included
    assert 0 < more < length
    (lower, all_of_it), _ = read("c", turn)
    assert lower == all_of_it - length  # of what "a" wrote the states are not kept
    assert read("b", prompt)[0] == (1, 1)


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
    assert store.longest("a", (*texts[0], 7)).count == len(texts[0])
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
    assert store.longest(None, short[: FEWEST - 4] + (300,) * 9) is None  # too little in common
    known = store.longest(None, long[: FEWEST + 3] + (300,) * 9)
    count, caches = known.count, known.caches
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
