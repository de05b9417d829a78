"""Over a thousand damaged files, by number and kept: each is read or refused in one line, within seconds and memory."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PATIENCE = 1800  # seconds for all of them, of which a quiet machine takes a fortieth; each read has its own limit


def load(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


readers = load("readers")
READERS, STANDING = readers.READERS, readers.STANDING


def read_all(lines, seconds):
    """What came of each line, in children: one that a reader kills or holds up is followed by another."""
    found, waiting = [], list(lines)
    while waiting:
        child = subprocess.Popen(
            [sys.executable, str(HERE / "readers.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            output, errors = child.communicate("\n".join(waiting), timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            output, errors = child.communicate()
        printed = output.splitlines()
        done = [json.loads(line) for line in printed if line.startswith("{")]
        found += done
        begun = [line.removeprefix("begin ") for line in printed if line.startswith("begin ")]
        if len(begun) == len(done):
            assert len(done) == len(waiting), f"a sound file could not be read:\n{errors[-2000:]}"
            break
        reader, chosen = begun[-1].split()
        text = f"the process ended with {child.returncode}: {errors[-300:]}"
        found.append({"reader": reader, "input": chosen, "verdict": "failed", "text": text, "sha256": ""})
        waiting = waiting[len(begun) :]
    return found


KEPT = sorted((HERE / "seeds").glob("*/*"))


@pytest.fixture(scope="module")
def everything():
    numbered = [f"{name} {number}" for name, reader in READERS.items() for number in range(reader.count)]
    standing = [f"{name} {what}" for name in READERS for what in STANDING]
    return read_all([*numbered, *standing, *(f"{file.parent.name} {file.name}" for file in KEPT)], PATIENCE)


@pytest.fixture(scope="module")
def mutants(everything):
    return [one for one in everything if one["input"].isdigit()]


def failures(found):
    return [f"{one['reader']} {one['input']}: {one['text']}" for one in found if one["verdict"] == "failed"]


@pytest.mark.parametrize("name", READERS)
def test_mutants_are_read_or_refused_in_one_line(mutants, name):
    mine = [one for one in mutants if one["reader"] == name]
    assert failures(mine) == []
    assert len(mine) == READERS[name].count
    counts = Counter(one["verdict"] for one in mine)
    # Damage that always or never shows would mean that the mutants do not reach the reader.
    assert counts["refused"] >= len(mine) / 4
    assert counts["read"] > 0


def test_enough_mutants_differ(mutants):
    assert len({one["sha256"] for one in mutants if one["verdict"] == "refused"}) >= 500


def test_kept_files_are_read_or_refused_in_one_line(everything):
    """Made by hand, or once got through: ``seeds/<reader>/<what is wrong>``."""
    assert {file.parent.name for file in KEPT} <= set(READERS)
    found = [one for one in everything if not one["input"].isdigit() and one["input"] not in STANDING]
    assert len(found) == len(KEPT) >= 90
    assert failures(found) == []
    assert Counter(one["verdict"] for one in found)["refused"] >= 80


# What is read all the same, besides a mark before text: a journal that holds nothing yet; a GGUF file is padded, and a
# byte too many may fall between its arrays. A checkpoint that is not whole is passed over for an older one, or none.
STILL_READ = {("journal", "@empty"), ("held-out-drafts", "@empty"), ("gguf", "@nul")}


@pytest.mark.parametrize("what", STANDING)
def test_what_stands_in_a_files_place_is_refused_in_one_line(everything, what):
    mine = [one for one in everything if one["input"] == what]
    assert len(mine) == len(READERS)
    assert failures(mine) == []
    still = {one["reader"] for one in mine if one["verdict"] == "read"}
    text = {name for name, reader in READERS.items() if reader.kind in ("json", "jsonl", "yaml")}
    allowed = text if what == "@mark" else {name for name, standing in STILL_READ if standing == what}
    assert still <= allowed | {"checkpoint-manifest"}
    assert max(one["grown"] for one in mine) < 300 << 20
    assert max(one["busy"] for one in mine) < 5  # seconds of processor time; beside another heavy process 2 become 3.5


def test_a_reader_that_crashes_or_hangs_would_be_seen(tmp_path):
    """The judge of the judge: a child that dies, one that loops, one that raises what it must not."""
    script = f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import readers
readers.SECONDS = 0.3
def crash(folder):
    os.abort()
def loop(folder):
    while True:
        pass
def slip(folder):
    return {{}}["missing"]
for read, seen in ((loop, "TooLong"), (slip, "KeyError")):
    verdict, text = readers.outcome(read, None)
    assert verdict == "failed" and seen in text, (verdict, text)
print("begin crash", flush=True)
readers.outcome(crash, None)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "begin crash\n", done.stderr
    assert done.returncode < 0
    assert readers.outcome(lambda folder: None, tmp_path) == ("read", "")


@pytest.mark.slow
def test_many_more_mutants():
    chosen = {name: 60 if name in ("base-loaded", "gguf-converted") else 600 for name in READERS}
    found = read_all(
        [f"{name} {1000 + number}" for name, count in chosen.items() for number in range(count)], 4 * PATIENCE
    )
    assert failures(found) == []
    assert len({one["sha256"] for one in found}) >= 8000
