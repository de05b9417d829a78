"""Odd values in every key of every YAML file that a command reads, and odd files: taken, or refused in one line.

Reading is tried in this process; of what is read, the command that is given it is tried as a whole.
"""

from __future__ import annotations

import dataclasses
import math
import random
import shutil
import time
from collections import Counter
from typing import Any

import pytest
import yaml

from mlx_rsgwm.core.config import parse_yaml
from mlx_rsgwm.core.errors import RsgwmError
from tests.outside import fed
from tests.outside.odd_yaml import ODD_YAML, odd_files
from tests.outside.yaml_documents import KINDS, MODULE, text_with

READ, RUN, MANY = 160, 5, 300  # of each kind: files read and commands in the sample, and commands of all
LARGEST = 2**32  # of whole numbers: seeds are the largest there are
SECONDS = 2.0  # of processor time
MOST_OF_A_LINE = 2000
LONG = {"steps", "epochs", "rank", "iters"}  # work that was asked for: it is stopped, and says so
SOFT = {
    "itself merged",
    "a mark",
    "two marks",
    "windows",
    "an old mac",
    "a directive",
    "an end",
    "another tag",
    "an unknown directive",
}


def cases(kind: str):
    """Document, key and value, every one of each."""
    return [(document, steps, value) for steps, document in KINDS[kind].places() for value in ODD_YAML]


def numbers_in(value: Any):
    """Whole numbers, and those that are not finite, in a mapping, list or dataclass."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from numbers_in(each)
    elif isinstance(value, int) or (isinstance(value, float) and not math.isfinite(value)):
        yield value


def read(kind: str, data: bytes, folder) -> tuple[str, str]:
    """How the reading of a file ended (``read``, ``refused``), and what is wrong with that."""
    (folder / "odd.yaml").write_bytes(data)
    started = time.process_time()
    try:
        made = KINDS[kind].read(folder / "odd.yaml")
    except RsgwmError as error:
        text = str(error)
        wrong = "\n" in text or not text.strip() or len(text) > MOST_OF_A_LINE
        return "refused", f"{len(text)} characters: {text[:300]}" if wrong else late(started)
    except BaseException as error:
        return "raised", repr(error)[:300]
    if beyond := [number for number in numbers_in(made) if not abs(number) <= LARGEST]:
        return "read", f"{str(beyond[0])[:40]} is taken"
    return "read", late(started)


def late(started: float) -> str:
    busy = time.process_time() - started
    return f"{busy:.1f} s" if busy > SECONDS else ""


def readings(kind, tried, folder):
    """What was wrong with any of the cases, those that were read, and how many were refused."""
    wrong, taken, refused = [], [], 0
    for document, steps, value in tried:
        data = text_with(document, steps, value).encode("utf-8", "surrogatepass")
        ended, told = read(kind, data, folder)
        if told:
            wrong.append((kind, steps, value[:80], told))
        refused += ended == "refused"
        if ended == "read":
            taken.append((kind, steps, value, data))
    return wrong, taken, refused


def commands(taken, work, outcomes, problems):
    """What was wrong with whole commands that are given files that can be read, and their exit codes."""
    wrong, ends = [], Counter()
    (work / "odd").mkdir(exist_ok=True)
    lines = []
    for number, (kind, _, _, data) in enumerate(taken):
        (work / f"odd/{number}.yaml").write_bytes(data)
        lines.append([word.replace("odd.yaml", f"odd/{number}.yaml") for word in KINDS[kind].words])
    for (kind, steps, value, _), (_, ended) in zip(taken, outcomes(lines), strict=True):
        ends[ended["code"]] += 1
        late = (130,) if steps[-1] in LONG else ()
        if told := problems(ended, codes=(0, 2, 3, *late)):
            wrong.append((kind, steps, value[:80], *told))
    shutil.rmtree(work / "odd")
    assert not (work / "new/ran").exists()
    return wrong, ends


def test_what_only_begins_like_a_number_is_text():
    for text in ("503e72aa231172cb", "1e5x", "2e-3 m", "1e", "7E2_"):
        assert parse_yaml(f"fingerprint: {text}", "x") == {"fingerprint": text}
    assert parse_yaml("[1e5, 2.5e-3, +1E2, 0x10, 1_000]", "x") == [1e5, 2.5e-3, 1e2, 16, 1000]


def told_of(wrong):
    return "\n".join(map(str, wrong))


def test_there_are_enough_odd_values_and_keys():
    assert len(ODD_YAML) >= 200
    counts = {kind: len({steps for steps, _ in KINDS[kind].places()}) for kind in KINDS}
    assert counts["training"] >= 40
    assert counts["recipe"] >= 90
    assert ("train", "lr_schedule", "arguments") in {steps for steps, _ in KINDS["recipe"].places()}
    assert ("modules", MODULE, "ranks") in {steps for steps, _ in KINDS["plan"].places()}


@pytest.mark.parametrize("kind", KINDS)
def test_sound_documents_are_read(kind, work, tmp_path, monkeypatch):
    """Or the odd ones would be refused for something else; every key that has a document has a sound one."""
    monkeypatch.chdir(work)
    documents = [KINDS[kind].sound, *(document for _, document in KINDS[kind].places())]
    unique = {yaml.safe_dump(document): document for document in documents}
    assert {text: read(kind, text.encode(), tmp_path) for text in unique} == dict.fromkeys(unique, ("read", ""))


@pytest.mark.parametrize("kind", KINDS)
def test_odd_files(kind, work, tmp_path, monkeypatch):
    monkeypatch.chdir(work)
    files = odd_files(yaml.safe_dump(KINDS[kind].sound, sort_keys=False))
    ended = {what: read(kind, data, tmp_path) for what, data in files.items()}
    assert {what: told for what, (_, told) in ended.items() if told} == {}
    soft = {what for what, (how, _) in ended.items() if how == "read"}
    assert {"a mark", "windows"} <= soft, soft
    assert soft <= SOFT, soft - SOFT
    assert not (work / "new/ran").exists()


def test_a_sample_of_odd_values_in_every_key(work, outcomes, problems, tmp_path, monkeypatch):
    monkeypatch.chdir(work)
    tried = []
    for kind in KINDS:
        wrong, taken, refused = readings(kind, random.Random(5).sample(cases(kind), READ), tmp_path)
        assert not wrong, told_of(wrong)
        assert refused > READ / 3
        assert len(taken) >= RUN
        tried += taken[:RUN]
    wrong, ends = commands(tried, work, outcomes, problems)
    assert not wrong, told_of(wrong)
    assert ends[0] > 0


@pytest.mark.slow
def test_no_more_is_read_than_settings_have(work, tmp_path, monkeypatch):
    """The largest file that is opened at all, of many small values: it is left once there are too many."""
    monkeypatch.chdir(work)
    data = b"a: [" + b"1," * (7 << 20) + b"1]\n"
    for kind in KINDS:
        started = time.process_time()
        assert read(kind, data, tmp_path)[0] == "refused"
        assert time.process_time() - started < 30
        with pytest.raises(RsgwmError, match="more than 100000 values"):
            KINDS[kind].read(tmp_path / "odd.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_odd_values_in_every_key(kind, work, outcomes, problems, tmp_path, monkeypatch):
    monkeypatch.chdir(work)
    there = cases(kind)
    wrong, taken, refused = readings(kind, tried := fed.share(there, kind), tmp_path)
    print(kind, len(taken), "read,", refused, "refused")
    fed.keep("odd values in keys of YAML", kind, len(tried), len(there), len(wrong))
    assert not wrong, told_of(wrong)
    given = fed.share(random.Random(3).sample(taken, min(len(taken), MANY)), kind)
    wrong, ends = commands(given, work, outcomes, problems)
    print(kind, "whole commands:", dict(ends))
    fed.keep("odd YAML that is read, to whole commands", kind, len(given), min(len(taken), MANY), len(wrong))
    assert not wrong, told_of(wrong)
