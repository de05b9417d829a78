"""Two commands at once on one folder: one wins, the other says so in one line; what both write is kept whole.

Started together they meet in any order: the second may find the first at work, or done.
"""

from __future__ import annotations

import shutil

import pytest

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sidecars import put_beside
from tests.faults import small_work
from tests.faults.catalogue import SMALL, judged

TIMES = 16


def rivals(work, base, out):
    """Pairs of commands that want the same name, and the file by which their results differ."""
    pool = [work / "pool/change", work / "pool/groups"]
    build = ["data", "build", "--draft-rows", 8, "--verify-rows", 4, "--out", out, "--task"]
    train = ["train", "--base", base, "--out", out, *SMALL, "--corpus"]
    merge = ["merge", *pool, "--out", out, "--role"]
    evaluate = ["eval", "--base", base, *judged(work), "--task", work / "mine.jsonl", "--timed", 0, "--out", out]
    negatives = ["data", "negatives", "--base", base, "--task", "change", "--verify-rows", 4, "--offset", 20,
                 "--max-tokens", 4, "--out", out, "--adapter"]  # fmt: skip
    peft = ["convert", "from-peft", work / "draft-peft", "--base", base, "--out", out]
    ask = ["ask", "--file", work / "mine.jsonl", "--base", base, *judged(work), "--out", out / "answers.jsonl"]
    return {
        "merge": ([*merge, "draft"], [*merge, "verify"], "adapters.safetensors"),
        "train": ([*train, work / "corpus/change"], [*train, work / "corpus/groups"], "adapters.safetensors"),
        "data build": ([*build, "change"], [*build, "groups"], "rows.jsonl"),
        "data negatives": ([*negatives, pool[0]], [*negatives, pool[1]], "rows.jsonl"),
        "convert to-peft": of_each(pool, out, "convert", "to-peft", file="adapter_model.safetensors"),
        "convert from-mlx": of_each(pool, out, "convert", "from-mlx"),
        "convert from-peft and merge": (peft, [*merge, "verify"], "adapters.safetensors"),
        "fuse": of_each(pool, out, "fuse", more=["--force"], file="model.safetensors"),
        "eval": ([*evaluate, "--temperature", 0.4], [*evaluate, "--temperature", 0.9], "items.jsonl"),
        "adapter importance": of_each(pool, out, "adapter", "importance", more=["--corpus", work / "corpus/change"]),
        "convert to-gguf": of_each(pool, out / "a.gguf", "convert", "to-gguf", file="a.gguf"),
        "recipe init": of_each(
            [work / "questions.jsonl", work / "others.jsonl"], out / "a.yaml", "recipe", "init", file="a.yaml"
        ),
        "ask": ([*ask, "--temperature", 0.4], [*ask, "--temperature", 0.9], "answers.jsonl"),
    }  # fmt: skip


def of_each(sources, out, *command, more=(), file="adapters.safetensors"):
    """The same command of two sources."""
    return (*([*command, source, *more, "--out", out] for source in sources), file)


RIVALS = [
    "merge", "train", "data build", "data negatives", "convert to-peft", "convert from-mlx",
    "convert from-peft and merge", "fuse", "eval", "adapter importance", "convert to-gguf", "recipe init", "ask",
]  # fmt: skip


def raced(server, commands, place, name, expected):
    """How one race ended: ``again`` is right, as in ``tally``."""
    (place / "out").mkdir(parents=True)
    ended = server.together(commands, place)
    codes = [one.code for one in ended]
    if sorted(codes) != [0, 2]:
        return f"wrong: exits {codes}: {[one.stderr[-300:] for one in ended]}"
    winner = codes.index(0)
    if len(ended[1 - winner].stderr.strip().splitlines()) != 1:
        return f"wrong: the loser said {ended[1 - winner].stderr[-300:]}"
    if not (place / "out" / name).is_file():
        return f"lost: {winner} won, and there is no result"
    if files.sha256_file(place / "out" / name) != expected[winner]:
        return f"wrong: {winner} won, and the result is another's"
    left_over = [path.name for path in place.rglob(".*")]
    shutil.rmtree(place)
    return f"left over: {left_over}" if left_over else "again"


def race(server, work, base, place, rival, times):
    small_work.make("questions.jsonl", work, base)
    small_work.make("others.jsonl", work, base)
    first, second, name = rivals(work, base, place / "out")[rival]
    expected = []
    for command in (first, second):
        (place / "out").mkdir(parents=True)
        alone = server.run(command, place)
        assert alone.code == 0, alone.stderr
        expected.append(files.sha256_file(place / "out" / name))
        shutil.rmtree(place)
    assert expected[0] != expected[1]
    commands = [[first, second], [second, first]]
    order = [expected, expected[::-1]]
    return [raced(server, commands[turn % 2], place, name, order[turn % 2]) for turn in range(times)]


@pytest.mark.parametrize("rival", ["merge", "data build", "recipe init", "ask"])
def test_two_commands_for_one_folder(server, work, tiny_base, tmp_path, rival):
    assert race(server, work, tiny_base, tmp_path / "place", rival, 2) == ["again"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("rival", RIVALS)
def test_many_races_for_one_folder(server, work, tiny_base, tmp_path, tally, rival):
    outcomes = race(server, work, tiny_base, tmp_path / "place", rival, TIMES)
    tally.keep(rival, "races", outcomes)
    assert [outcome for outcome in outcomes if outcome != "again"] == []


def kept_beside(server, work, base, adapter):
    """Directions and importance of one adapter, collected at once: each there, or its command said that it is not."""
    corpus = ["--corpus", work / "corpus/change", "--base", base]
    shutil.rmtree(adapter.parent, ignore_errors=True)
    bare = Adapter.load(work / "pool/change")
    Adapter(bare.spec, bare.weights, manifest={"kind": "source"}).save(adapter)
    ended = server.together(
        [["adapter", "importance", adapter, *corpus], ["directions", "collect", adapter, *corpus]], adapter.parent
    )
    codes = [one.code for one in ended]
    if 0 not in codes or not {*codes} <= {0, 2}:
        return f"wrong: exits {codes}: {[one.stderr[-300:] for one in ended]}"
    for one, name in zip(ended, ("importance.safetensors", "directions.safetensors"), strict=True):
        if (adapter / name).exists() != (one.code == 0):
            return f"lost: {name}, exit {one.code}: {one.stderr[-300:]}"
    kept = Adapter.load(adapter)  # what the manifest does not name is refused
    assert (bool(kept.importance), bool(kept.directions)) == (codes[0] == 0, codes[1] == 0)
    left_over = [path.name for path in adapter.rglob(".*")]
    return f"left over: {left_over}" if left_over else "again"


def test_what_was_put_beside_an_adapter_since_it_was_loaded_stays(work, tmp_path):
    pool = Adapter.load(work / "pool/change")
    Adapter(pool.spec, pool.weights).save(tmp_path)
    first, second = Adapter.load(tmp_path), Adapter.load(tmp_path)
    put_beside(first, "importance.safetensors", pool.importance, pool.importance_metadata, {}, {"importance": {}})
    put_beside(second, "init.safetensors", pool.init, {}, {}, {})
    kept = Adapter.load(tmp_path)
    assert kept.importance.keys() == pool.importance.keys()
    assert kept.init.keys() == pool.init.keys()
    third = Adapter.load(tmp_path)
    Adapter(pool.spec, {name: 2 * value for name, value in pool.weights.items()}).save(tmp_path)
    with pytest.raises(RsgwmError, match="was written anew meanwhile"):
        put_beside(third, "importance.safetensors", pool.importance, pool.importance_metadata, {}, {})


@pytest.mark.slow
def test_what_several_commands_keep_beside_one_adapter(server, work, tiny_base, tmp_path, tally):
    outcomes = [kept_beside(server, work, tiny_base, tmp_path / "place/adapter") for _ in range(TIMES)]
    tally.keep("directions collect and adapter importance", "races", outcomes)
    assert [outcome for outcome in outcomes if outcome != "again"] == []
