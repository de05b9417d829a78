"""Recipes as people write them: what is odd but valid is read as it is meant, what is wrong is one line."""

from dataclasses import asdict

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.recipes.schema import LoopSection, load_recipe

PLAIN = "name: r\ndata: {tasks: [change, compare], rows: 40}\n"
DATA = "name: r\ndata: "

# Text, a setting by its dotted name, and its value.
VALID = {
    "minimal": (PLAIN, "data.rows", 40),
    "byte order mark": ("\ufeff" + PLAIN, "name", "r"),
    "windows": (PLAIN.replace("\n", "\r\n"), "data.tasks", ("change", "compare")),
    "document marks": (f"%YAML 1.1\n---\n{PLAIN}...\n", "name", "r"),
    "comments": (f"# mine\n{PLAIN}# train:\n", "train.rank", 16),
    "json": ('{"name": "r", "data": {"tasks": ["change", "compare"]}, "seed": 3}', "seed", 3),
    "all of a section is comments": (f"{PLAIN}train:\n#  rank: 4\nloop:\n", "train.rank", 16),
    "null for what may be none": (f"{PLAIN}merge: {{rank: null}}\n", "merge.rank", None),
    "empty section": (f"{PLAIN}loop: {{}}\n", "loop.attempts", 3),
    "quoted number": (f"{PLAIN}seed: '7'\n", "seed", 7),
    "whole float": (f"{DATA}{{tasks: [change, compare], rows: 40.0}}\n", "data.rows", 40),
    "exponent without a point": (f"{PLAIN}train: {{learning_rate: 1e-4}}\n", "train.learning_rate", 1e-4),
    "underscores": (f"{PLAIN}seed: 1_000\n", "seed", 1000),
    "words for truth": (f"{PLAIN}export: {{peft: off, parity: no}}\n", "export.peft", False),
    "a name that is a number": (PLAIN.replace("name: r", "name: 2024"), "name", "2024"),
    "a name that is a word for truth": (PLAIN.replace("name: r", "name: no"), "name", "no"),
    "a base that is a number": (f"{PLAIN}base: 0123\n", "base", "0123"),
    "anchor and merge": (f"{PLAIN}evaluate: {{<<: &e {{items: 3, timed: 1}}, items: 5}}\n", "evaluate.items", 5),
    "file of another name": (f"{DATA}{{tasks: [ä b.jsonl, change]}}\n", "data.tasks", ("ä b.jsonl", "change")),
    "file from home": (f"{DATA}{{tasks: ['~/t.csv', change]}}\n", "data.tasks", ("HOME/t.csv", "change")),
    "tested on files from home": (f"{PLAIN}evaluate: {{tasks: ['~/t.csv']}}\n", "evaluate.tasks", ("HOME/t.csv",)),
    "threshold of one": (f"{PLAIN}loop: {{threshold: 1}}\n", "loop.threshold", 1),
    "greedy": (f"{PLAIN}loop: {{temperature: 0}}\n", "loop.temperature", 0),
}  # fmt: skip

WRONG = {
    "empty": ("", "expected keys and values at the top level"),
    "only comments": ("# name: r\n", "expected keys and values at the top level"),
    "a list": ("- name: r\n", "expected keys and values at the top level"),
    "tab": ("name: r\n\tdata: {}\n", "not valid YAML: line 2 is indented with a tab; use spaces"),
    "two documents": (f"{PLAIN}---\nname: s\n", "not valid YAML: expected a single document"),
    "key twice": (f"{PLAIN}seed: 1\nseed: 2\n", "seed is given twice, the second time in line 4"),
    "section twice": (f"{PLAIN}train: {{rank: 4}}\nloop: {{}}\ntrain: {{alpha: 8}}\n", "train is given twice"),
    "setting twice": (f"{PLAIN}train: {{rank: 4, alpha: 8, rank: 8}}\n", "rank is given twice"),
    "program": (f"{PLAIN}seed: !!python/object/apply:os.getcwd []\n", "not valid YAML: could not determine"),
    "list for a key": (f"{PLAIN}? [a]\n: 2\n", "not valid YAML: .*unhashable key"),
    "alias of itself": (f"{PLAIN}train: &t {{keys: [*t]}}\n", "unfolds to more than"),
    "number for a key": (f"{PLAIN}1: 2\n", "unknown key '1'"),
    "key of another section": (f"{PLAIN}rank: 4\n", "unknown key 'rank'"),
    "key in capitals": (f"{PLAIN}Train: {{rank: 4}}\n", "unknown key 'Train', did you mean 'train'"),
    "list for a section": (f"{PLAIN}train: [rank]\n", r"train: input should be keys and values, found \['rank'\]"),
    "text for a section": (f"{PLAIN}train: fast\n", "train: input should be keys and values, found 'fast'"),
    "date for a number": (f"{PLAIN}seed: 2024-01-01\n", "seed: input should be a valid integer"),
    "null for a number": (f"{PLAIN}seed: null\n", "seed: input should be a valid integer"),
    "no data": ("name: r\n", "data: field required"),
    "null for data": ("name: r\ndata:\n", "data: field required"),
    "text for tasks": (f"{DATA}{{tasks: change}}\n", "data.tasks: input should be a list"),
    "lists of lists": (f"{DATA}{{tasks: [[change], compare]}}\n", "data.tasks.0: input should be a valid string"),
    "empty name": (PLAIN.replace("name: r", "name: ''"), "name must be a name, found ''"),
    "zero byte": (f'{PLAIN}base: "a\\0b"\n', "base must be a name, found"),
    "seed of training too large": (f"{PLAIN}train: {{seed: 99999999999}}\n", "seed = 99999999999 is out of range"),
    "seed of layers below zero": (f"{PLAIN}train: {{init_seed: -1}}\n", "init_seed = -1 is out of range"),
}  # fmt: skip


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Load a recipe of that text in a folder that is home, too, and has two files of questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.csv").write_text("question,answer\na,b\n")
    (tmp_path / "ä b.jsonl").write_text('{"question": "a", "answer": "b"}\n')

    def load(text, settings=()):
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8", newline="")
        return load_recipe("recipe.yaml", settings)

    return load


@pytest.mark.parametrize("name", list(VALID))
def test_what_is_odd_is_read_as_it_is_meant(read, tmp_path, name):
    text, setting, expected = VALID[name]
    value = read(text)
    for part in setting.split("."):
        value = getattr(value, part)
    home = str(tmp_path)
    written = tuple(entry.replace("HOME", home) for entry in expected) if isinstance(expected, tuple) else expected
    assert value == written
    assert type(value) is type(written) or not isinstance(written, bool)


@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_wrong_is_one_line(read, name):
    text, message = WRONG[name]
    with pytest.raises(RsgwmError, match=message) as told:
        read(text)
    assert "\n" not in str(told.value)


def test_settings_are_laid_over_an_empty_section(read):
    assert read(f"{PLAIN}train:\n", ["train.rank=4"]).train.rank == 4


def test_which_folders_of_a_run_verify():
    pool = ("pool/change", "pool/groups")
    for given, folders in (
        ("verifier", ("verifier",)),
        ("pool/*", pool),
        ("pool", pool),
        (("pool/groups", "verifier"), ("pool/groups", "verifier")),
        (("pool/g*", "pool/*"), ("pool/groups", "pool/change")),
    ):
        assert LoopSection(verifier=given).verifiers_of(pool) == folders
    for given, message in (
        ("pool/x*", "'pool/x\\*' matches none of verifier, pool/change, pool/groups"),
        ((), "a list without a name"),
    ):
        with pytest.raises(RsgwmError, match=message):
            LoopSection(verifier=given).verifiers_of(pool)
    with pytest.raises(RsgwmError, match="combine mean takes a verifier of several adapters"):
        LoopSection(combine="mean").verifiers_of(pool)
    with pytest.raises(RsgwmError, match="combine must be one of max, mean, learned, found 'sum'"):
        LoopSection(verifier="pool", combine="sum").verifiers_of(pool)
    # The keys of runs that name no verifier are what they were before one could.
    assert LoopSection().describe().keys() == asdict(LoopSection()).keys() - {
        "verifier",
        "combine",
        "check",
        "drafts",
        "layer",
    }
    named = LoopSection(verifier="pool/*", combine="mean", check="none", drafts="mixed", layer=1)
    assert {**named.describe(), "check": "none"} == asdict(named)
