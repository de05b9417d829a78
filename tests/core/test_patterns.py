"""Expressions from outside: the same answers as Python's ``re``, and none that takes time without end."""

from __future__ import annotations

import random
import re
import time

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.patterns import LONGEST_NAME, Pattern, _Run, compile_pattern

# Made to go back and try again: nested, overlapping, ambiguous and long repetitions, and what hides them.
RUNAWAYS = [
    "(a+)+$", "(a|a)*$", "(a*)*$", "(a|aa)+$", "(a|a?)+$", "(.*)*x", "(.*.*)*x", "(.*a){20}x", "(.*){1,32000}[bc]",
    ".*.*.*.*.*.*x", r"(\w+\.?)+!", r"(.+)+\.x", "(?:(?:.*a)*b)*c", "((.*){1,100}){1,100}x", "(?=(.*)*x)a",
    "(?!(a+)+$)x", r"(\w*_?)*-", r"([a-z]+)*\d\d\d", r"(\d|\w)+!", "(?:a?){40}a{40}b", "a?" * 40 + "a" * 40 + "b",
    r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(.*)(.*)(.*)(.*)(.*)!", "(x*)*y|(a*)*b", "(?i:(A+)+$)", "(?s:(.+)+)!",
    r"(?<!b)(a+)+(?<!a)", r"([^.]+\.?)+x$", "(((((a+)+)+)+)+)+$", "(a{1,20}){1,20}b", "(?:a+a+)+b", "(a+?)+?b",
    r"(?:.*?a.*?a.*?a.*?)x", r"(.*\.)*(.*\.)*(.*\.)*x", r"\b(\w+\b\.?)+!", "(|a)+b", "(()|a)+b", "(a?|b?)*c",
    "(?:.|a)*b", "[a-z]*[a-y]*[a-x]*[a-w]*[a-v]*!", r"(\.|_|\w)*-", r"(?:(?:\w+)\.)*(?:\w+\.)*\d+$",
]  # fmt: skip
# Names of a model, and names made for the expressions above.
NAMES = ["model.layers.31.self_attn.q_proj", "a" * 60, "a" * 300, "a." * 150, "a_a." * 30 + "1", "model.layers." * 30]


def test_the_corpus_is_large_enough():
    assert len(set(RUNAWAYS)) == len(RUNAWAYS) >= 40


@pytest.mark.parametrize("text", RUNAWAYS)
def test_a_runaway_is_answered_or_refused_at_once(text):
    started, told = time.process_time(), []
    for name in NAMES:
        try:
            told += [compile_pattern(text).match(name), compile_pattern(rf"(.*\.)?({text})$").match(name)]
        except (ValueError, RsgwmError) as error:
            told.append("could take" in str(error) or "takes too long" in str(error))
    assert set(told) <= {True, False}
    assert time.process_time() - started < 2


def test_one_of_them_would_hang_without():
    """What the corpus is for: ``re`` needs twice the time for every letter more."""

    def seconds(count):
        started = time.process_time()
        re.match("(a+)+$", "a" * count + "!")
        return time.process_time() - started

    assert seconds(21) > 4 * seconds(17)


ATOMS = ["a", "b", ".", "[ab]", "[^a]", r"\.", r"\d", r"\w", r"[\d_]", r"\b", r"\B", "$", "^", "(?=a)", "(?!b)",
         "(?<=a)", "(?<!b)", "(?i:A)", r"[^\W\d]", "c"]  # fmt: skip
REPEATS = ["*", "+", "?", "{2}", "{1,3}", "*?", "+?", "{0,2}?"]


def expression(rng, depth):
    if depth == 0:
        return rng.choice(ATOMS)
    parts = [expression(rng, depth - 1) for _ in range(2)]
    forms = [f"{parts[0]}{parts[1]}", f"({parts[0]}|{parts[1]})", f"(?:{parts[0]}){rng.choice(REPEATS)}",
             f"(?={parts[0]}){parts[1]}", f"({parts[0]}){parts[1]}"]  # fmt: skip
    return rng.choice(forms)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_ways_followed_at_once_are_those_that_re_tries(seed):
    """Random expressions and names: full, at the start, anywhere."""
    rng, compared = random.Random(seed), 0
    while compared < (60_000 if seed else 3000):
        try:
            pattern = Pattern(expression(rng, rng.randrange(1, 4)))
        except ValueError:
            continue
        name = "".join(rng.choice("abcA.1_") for _ in range(rng.randrange(7)))
        from_start, anywhere = _Run(pattern, name).ends({0}), _Run(pattern, name).ends(set(range(len(name) + 1)))
        answers = (len(name) in from_start, bool(from_start), bool(anywhere))
        compiled = pattern.compiled
        expected = tuple(tried(name) is not None for tried in (compiled.fullmatch, compiled.match, compiled.search))
        assert answers == expected, (compiled.pattern, name)
        compared += 1


def test_what_is_no_expression_or_too_long_is_said():
    for text, told in (("(", "not a regular expression"), ("(" * 5000, "not a regular"), ("a" * 300_000, "characters")):
        with pytest.raises(ValueError, match=told):
            compile_pattern(text)
    for text, told in ((r"(a+)\1+b(a+)+", "groupref"), ("(?:(?:" + "(?:" * 90 + ".*" + ")*" * 92 + "x", "")):
        with pytest.raises((ValueError, RsgwmError), match=told):
            assert compile_pattern(text).match("a" * 400) is None
    with pytest.raises(RsgwmError, match="which no module's name has"):
        compile_pattern("a").match("a" * (LONGEST_NAME + 1))


def test_a_list_of_every_module_stays_quick():
    """As ms-swift writes for models whose parts it cannot name otherwise."""
    names = [
        f"model.layers.{n}.{part}.{leaf}" for n in range(80) for part in ("mlp", "self_attn") for leaf in "abcdefg"
    ]
    pattern, started = compile_pattern("^(" + "|".join(map(re.escape, names)) + ")$"), time.process_time()
    assert all(pattern.fullmatch(name) for name in names)
    assert not any(pattern.fullmatch(f"{name}.x") for name in names)
    assert time.process_time() - started < 2
