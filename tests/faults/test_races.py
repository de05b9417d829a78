"""Two commands at once on one folder: one wins, the other says so in one line; what both write is kept whole.

Started together they meet in any order: the second may find the first at work, or done.
"""

from __future__ import annotations

import shutil

import pytest

from mlx_rsgwm.core import files
from tests.faults.catalogue import SMALL, judged

TIMES = 16


def rivals(work, base, out):
    """Pairs of commands that want the same name, and the file by which their results differ."""
    pool = [work / "pool/change", work / "pool/groups"]
    build = ["data", "build", "--draft-rows", 8, "--verify-rows", 4, "--out", out, "--task"]
    train = ["train", "--base", base, "--out", out, *SMALL, "--corpus"]
    merge = ["merge", *pool, "--out", out, "--role"]
    evaluate = ["eval", "--base", base, *judged(work), "--task", work / "mine.jsonl", "--timed", 0, "--out", out]
    return {
        "merge": ([*merge, "draft"], [*merge, "verify"], "adapters.safetensors"),
        "train": ([*train, work / "corpus/change"], [*train, work / "corpus/groups"], "adapters.safetensors"),
        "data build": ([*build, "change"], [*build, "groups"], "rows.jsonl"),
        "to-peft": (*(["convert", "to-peft", source, "--out", out] for source in pool), "adapter_model.safetensors"),
        "from-peft and merge": (
            ["convert", "from-peft", work / "draft-peft", "--base", base, "--out", out],
            [*merge, "verify"],
            "adapters.safetensors",
        ),
        "fuse": (*(["fuse", source, "--force", "--out", out] for source in pool), "model.safetensors"),
        "eval": ([*evaluate, "--temperature", 0.4], [*evaluate, "--temperature", 0.9], "items.jsonl"),
        "importance": (
            *(["adapter", "importance", source, "--corpus", work / "corpus/change", "--out", out] for source in pool),
            "adapters.safetensors",
        ),
    }


RIVALS = ["merge", "train", "data build", "to-peft", "from-peft and merge", "fuse", "eval", "importance"]


def raced(server, commands, place, name, expected):
    """What was wrong with one race, and who won it."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    ended = server.together(commands, place)
    codes = [one.code for one in ended]
    if sorted(codes) != [0, 2]:
        return f"exits {codes}: {[one.stderr[-300:] for one in ended]}"
    winner = codes.index(0)
    if len(ended[1 - winner].stderr.strip().splitlines()) != 1:
        return f"the loser said {ended[1 - winner].stderr[-300:]}"
    if files.sha256_file(place / "out" / name) != expected[winner]:
        return f"{winner} won, and the result is another's"
    left_over = [path.name for path in place.rglob(".*")]
    return f"left over {left_over}" if left_over else ""


def race(server, work, base, place, rival, times):
    first, second, name = rivals(work, base, place / "out")[rival]
    expected = []
    for command in (first, second):
        place.mkdir()
        alone = server.run(command, place)
        assert alone.code == 0, alone.stderr
        expected.append(files.sha256_file(place / "out" / name))
        shutil.rmtree(place)
    assert expected[0] != expected[1]
    commands = [[first, second], [second, first]]
    order = [expected, expected[::-1]]
    return [raced(server, commands[turn % 2], place, name, order[turn % 2]) for turn in range(times)]


@pytest.mark.parametrize("rival", ["merge", "data build"])
def test_two_commands_for_one_folder(server, work, tiny_base, tmp_path, rival):
    assert race(server, work, tiny_base, tmp_path / "place", rival, 2) == [""] * 2


@pytest.mark.slow
@pytest.mark.parametrize("rival", RIVALS)
def test_many_races_for_one_folder(server, work, tiny_base, tmp_path, rival):
    assert race(server, work, tiny_base, tmp_path / "place", rival, TIMES) == [""] * TIMES


@pytest.mark.slow
def test_what_several_commands_keep_beside_one_adapter(server, work, tmp_path):
    """Directions and importance of one adapter, collected at once: each there, or its command said that it is not."""
    corpus = ["--corpus", work / "corpus/change", "--replace"]
    for _ in range(TIMES):
        adapter = tmp_path / "place" / "adapter"
        shutil.rmtree(adapter.parent, ignore_errors=True)
        shutil.copytree(work / "pool/change", adapter)
        for name in ("importance.safetensors", "directions.safetensors"):
            (adapter / name).unlink()
        ended = server.together(
            [["adapter", "importance", adapter, *corpus], ["directions", "collect", adapter, *corpus]], adapter.parent
        )
        assert {one.code for one in ended} <= {0, 2}
        for one, name in zip(ended, ("importance.safetensors", "directions.safetensors"), strict=True):
            assert (adapter / name).exists() == (one.code == 0), one.stderr
        assert 0 in [one.code for one in ended]
