"""Odd values in every option of every command, as whole commands: taken or refused in one line, and nothing left.

Commands and options come from click, so that a new one is tried, too; types are asked first, so that only values that
an option takes need a whole command (``tests/cli/test_options.py`` asks them all).
"""

from __future__ import annotations

import random
from collections import Counter

import click
import pytest

from mlx_rsgwm.cli.commands import COMMANDS
from mlx_rsgwm.core.errors import RsgwmError
from tests.outside import fed
from tests.outside.commands import SOUND, command_line, key_of, valued
from tests.outside.odd_values import ODD

SAMPLE = 80
# Long work that was asked for: it is stopped, and says so.
LONG = {(command, key) for command in ("train", "pool train") for key in ("--steps", "--epochs", "--rank")}
ENDLESS = {"serve"}  # until it is told to stop: tests/serving
# Their imports alone take longer than all others together; the last one writes where it stands.
SLOW = {*ENDLESS, "lm-eval", "report tables", "report controls", "demo", "parity", "bench latency"}
WRITES = {"directions collect"}
KEEPS = {("calibrate", "--drafts-file")}  # the drafts, so that nothing is drafted twice


def taken(parameter: click.Parameter, value: str) -> bool:
    try:
        parameter.type.convert(value, parameter, None)
    except (click.UsageError, RsgwmError):
        return False
    return True


def cases(commands) -> list[tuple[str, str, str]]:
    """Command, parameter and a value that its type takes."""
    return [
        (command, key_of(parameter), value)
        for command in commands
        for parameter in valued(command)
        for value in ODD
        if taken(parameter, value)
    ]


def failures(tried, outcomes, problems):
    """What is wrong with any of the cases, and the exit codes of all."""
    lines = [command_line(*case) for case in tried]
    wrong, codes = [], Counter()
    for case, (_, ended) in zip(tried, outcomes(lines), strict=True):
        codes[ended["code"]] += 1
        late = (130,) if case[:2] in LONG else ()
        ended["changed"] = [] if case[0] in WRITES else ended["changed"]
        ended["left"] = [] if case[:2] in KEEPS else ended["left"]
        if told := problems(ended, codes=(0, 2, 3, *late)):
            wrong.append((*case[:2], case[2][:80], *told))
    return wrong, codes


def test_every_command_has_a_sound_line():
    assert SOUND.keys() == COMMANDS.keys()


def test_there_are_enough_odd_values():
    assert len(ODD) >= 200


def test_sound_lines_are_sound(outcomes):
    """Or the odd ones would be refused for something else."""
    quick = [name for name in SOUND if name not in SLOW]
    codes = {tuple(words): ended for words, ended in outcomes([command_line(name) for name in quick], 30)}
    ended = dict(zip(quick, codes.values(), strict=True))
    # A random base gets every draft wrong, and no hub can be reached.
    allowed = {"calibrate", "hub pull"}
    assert {name: each["stderr"] for name, each in ended.items() if each["code"] and name not in allowed} == {}


def test_a_sample_of_odd_values(outcomes, problems):
    tried = random.Random(7).sample(cases([name for name in SOUND if name not in SLOW]), SAMPLE)
    wrong, codes = failures(tried, outcomes, problems)
    assert not wrong, "\n".join(map(str, wrong))
    assert codes[2] > SAMPLE / 4
    assert codes[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name in SOUND if name not in ("lm-eval", *ENDLESS)])
def test_all_odd_values(command, outcomes, problems):
    there = cases([command])
    wrong, codes = failures(tried := fed.share(there, command), outcomes, problems)
    print(command, dict(codes))
    fed.keep("odd values in options", command, len(tried), len(there), len(wrong))
    assert not wrong, "\n".join(map(str, wrong))
