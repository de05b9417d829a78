"""Regular expressions without end in an adapter's configuration: a whole command answers or refuses in bounded time."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.core.test_patterns import RUNAWAYS
from tests.outside import fed
from tests.outside.commands import command_line

SECONDS = 5.0  # of processor time, for the two modules that the pattern is asked of, with all else that a command does
PLACES = {
    "target_modules": lambda text: {"target_modules": text},
    "rank_pattern": lambda text: {"rank_pattern": {text: 3}},
    "alpha_pattern": lambda text: {"alpha_pattern": {text: 3}},
    "exclude_modules": lambda text: {"exclude_modules": text},
    "layers_pattern": lambda text: {"layers_pattern": text, "layers_to_transform": [0]},
}


@pytest.fixture(scope="module")
def adapters(work):
    """``adapters(keys)``: an adapter of PEFT with these in its configuration, by its name below the work."""
    made = iter(range(10**6))

    def make(keys):
        name = f"runaway/{next(made)}"
        shutil.copytree(work / "draft-peft", work / name)
        shutil.rmtree(work / name / "mlx_rsgwm")
        file = work / name / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
        return name

    return make


def test_runaways_in_an_adapters_configuration(adapters, outcomes, problems):
    # Every pattern in one place, the places in turn; all of them in all places take five times as long.
    places = [list(PLACES.values())[number % len(PLACES)] for number in range(len(RUNAWAYS))]
    names = [adapters(place(text)) for place, text in zip(places, RUNAWAYS, strict=True)]
    tell = [command_line("convert from-peft", "folder", name) for name in names]
    for text, (_, ended) in zip(RUNAWAYS, outcomes(tell), strict=True):
        assert not problems(ended), text
        assert ended["busy"] < SECONDS, text


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_runaways_in_every_place(place, adapters, outcomes, problems):
    texts = fed.share(RUNAWAYS, place)
    tell = [command_line("convert from-peft", "folder", adapters(PLACES[place](text))) for text in texts]
    ends = [(text, problems(ended), ended["busy"]) for text, (_, ended) in zip(texts, outcomes(tell), strict=True)]
    wrong = [end for end in ends if end[1] or end[2] > SECONDS]
    fed.keep("regular expressions without end", place, len(texts), len(RUNAWAYS), len(wrong))
    assert not wrong
