"""Machines that fail: full disks, folders that cannot be written, files that change, two processes, kill -9."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import LOCK_FILE, exclusive, exclusive_file
from mlx_rsgwm.core.safetensors_io import write_safetensors
from mlx_rsgwm.models import adapter as adapters
from mlx_rsgwm.models.adapter import Adapter
from tests.faults import catalogue
from tests.faults.small_work import run

PROGRAM = "import sys; from mlx_rsgwm.cli.main import main; sys.argv[0] = 'rsgwm'; main()"


def one_line(result):
    """The one line of a refusal; no traceback, nothing beside it."""
    assert result.exit_code == 2, (result.exit_code, result.stderr[-2000:])
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("rsgwm: error: ").strip()


def command_of(kind, work, base, out):
    """A command that writes the folder ``out`` (which is called that), and what must be the same whatever happened."""
    listed = catalogue.KINDS[kind]
    return listed.arguments(work, base, out.parent), [name.removeprefix("out/") for name in listed.written]


KINDS = ["train", "merge", "eval", "convert to-peft", "run"]
WHOLE = ("manifest.json", "report.json", "adapter_config.json", "summary.json")


@contextmanager
def disk_full_after(size):
    """No file may grow beyond ``size`` bytes: the system then fails writes half-way, as a full disk does.

    Python 3.11 keeps compiled modules without a look at how much was written: one that is first imported here must not
    be kept, or every later process that imports it fails.
    """
    keep, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
        sys.dont_write_bytecode = keep


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up(work, tiny_base, tmp_path, kind):
    out = tmp_path / "out"
    command, wanted = command_of(kind, work, tiny_base, out)
    size = 300 if kind == "eval" else 2000  # bytes: enough to begin, too few for the arrays or the items
    with disk_full_after(size):
        line = one_line(run(*command))
    assert "cannot write" in line or "too large for the disk" in line
    assert not any((out / name).exists() for name in wanted[:1])
    assert not (out / WHOLE[0]).exists()
    assert not list(out.rglob("*.tmp*"))
    assert run(*command).exit_code == 0
    assert not [name for name in wanted if not (out / name).is_file()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_cannot_be_made(work, tiny_base, tmp_path, kind):
    (tmp_path / "file").write_text("in the way")
    command, _ = command_of(kind, work, tiny_base, tmp_path / "file" / "out")
    line = one_line(run(*command))
    assert "cannot create folder" in line or "is a file, and a folder is to be there" in line
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_may_not_be_written(work, tiny_base, tmp_path, kind):
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    command, _ = command_of(kind, work, tiny_base, out)
    assert "cannot write" in one_line(run(*command)) or "permissions" in one_line(run(*command))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_every_way_a_write_fails_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, number):
    """Also where the tests run as root, whom no permission stops."""
    files.write_json(tmp_path / "a.json", {"old": True})

    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RsgwmError, match=r"cannot write .*a\.json"):
        files.write_json(tmp_path / "a.json", {})
    with pytest.raises(RsgwmError, match=r"cannot write .*b\.safetensors"):
        write_safetensors(tmp_path / "b.safetensors", {"a": mx.zeros(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert files.read_json(tmp_path / "a.json") == {"old": True}


def meddle(monkeypatch, name, act):
    """Call ``act`` once, right after the file called ``name`` was hashed and before it is read."""
    real, calls = files.sha256_file, []

    def hashed(path):
        found = real(path)
        if path.name == name and not calls:
            calls.append(path)
            act(path)
        return found

    monkeypatch.setattr(files, "sha256_file", hashed)
    return calls


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: os.truncate(path, 100), "not a sound safetensors file"),
        (lambda path: shutil.copy(path.parent.parent / "groups" / path.name, path), "changed while it was read"),
        (lambda path: path.write_bytes(b""), "not a sound safetensors file"),
    ],
    ids=["vanishes", "is cut", "is replaced", "is emptied"],
)
def test_a_file_that_changes_while_it_is_read(work, tmp_path, monkeypatch, act, expected):
    shutil.copytree(work / "pool", tmp_path / "pool")
    calls = meddle(monkeypatch, "adapters.safetensors", act)
    with pytest.raises(RsgwmError, match=expected):
        Adapter.load(tmp_path / "pool" / "change")
    assert calls


def test_arrays_cut_off_before_they_are_used(work, tmp_path, monkeypatch):
    """Lazy arrays are read when a merge needs them: MLX's own error becomes one line too."""
    from mlx_rsgwm.cli import main

    lazy = shutil.copytree(work / "pool" / "change", tmp_path / "change")
    found = Adapter.load(lazy, lazy=True)
    os.truncate(lazy / "adapters.safetensors", 1000)
    with pytest.raises(RuntimeError) as caught:
        mx.eval(found.weights)
    code, line = main.explain(caught.value)
    assert (code, "shorter while it was being read" in line) == (2, True)
    assert main.explain(OSError(errno.EIO, "Input/output error", "a/b"))[0] == 2


HOLDER = """
import sys, time
from pathlib import Path
from mlx_rsgwm.core import files
from mlx_rsgwm.core.folders import LOCK_FILE, exclusive, exclusive_file
from mlx_rsgwm.core.safetensors_io import write_safetensors
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """A folder that another process is writing."""
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    yield out, holder
    holder.kill()
    holder.wait()


def test_two_processes_cannot_write_one_folder(work, tiny_base, held):
    out, holder = held
    for kind in ("train", "merge", "eval", "run"):
        assert "another process is writing" in one_line(run(*command_of(kind, work, tiny_base, out)[0]))
    assert [file.name for file in out.iterdir()] == [LOCK_FILE]
    holder.kill()  # a killed process holds nothing, whatever it left behind
    holder.wait()
    assert run(*command_of("merge", work, tiny_base, out)[0]).exit_code == 0
    assert not (out / LOCK_FILE).exists()
    Adapter.load(out)


@pytest.mark.parametrize("kind", ["train", "merge"])
def test_what_a_process_killed_at_its_very_end_left_goes_with_the_next_command(work, tiny_base, tmp_path, kind):
    out = tmp_path / "out"
    command, _ = command_of(kind, work, tiny_base, out)
    assert run(*command).exit_code == 0
    finished = sorted(file.relative_to(out) for file in out.rglob("*"))
    (out / LOCK_FILE).touch()
    (out / adapters.UNFINISHED_FILE).touch()
    (out / ".x.1-00000000ffff-0.tmp.safetensors").touch()
    for step in out.glob("checkpoints/step-*"):
        (step / "state.safetensors").touch()
    assert "already holds a finished adapter" in one_line(run(*command))
    assert sorted(file.relative_to(out) for file in out.rglob("*")) == finished


def test_of_two_commands_that_write_one_folder_one_wins(work, tiny_base, tmp_path):
    """The other is refused, whichever came first, or finds the finished one: never are both content."""
    pool = [work / "pool" / "change", work / "pool" / "groups"]
    started = [start(["merge", *pool, "--role", role, "--out", tmp_path / "out"]) for role in ("draft", "verify")]
    codes = [child.wait() for child in started]
    assert sorted(codes) == [0, 2], [child.stderr.read() for child in started]
    winner = ("draft", "verify")[codes.index(0)]
    assert files.read_json(tmp_path / "out" / "manifest.json")["merge"]["role"] == winner


def test_a_lock_is_for_one_at_a_time_and_leaves_nothing(tmp_path):
    inside, most, refused = [], [], []

    def enter():
        for _ in range(100):
            try:
                with exclusive(tmp_path / "new"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except RsgwmError:
                refused.append(1)

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) + len(refused) == 400
    assert not (tmp_path / "new" / LOCK_FILE).exists()


def test_the_lock_of_a_file_keeps_others_from_that_file_alone(tmp_path):
    out, said = tmp_path / "new" / f"{'long' * 60}.jsonl", []

    def enter(path):
        try:
            with exclusive_file(path):
                said.append("entered")
        except RsgwmError as error:
            said.append(str(error))

    with exclusive_file(out), exclusive_file(out):  # its holder may enter again
        for path in (out, out.with_name("other.jsonl")):
            thread = threading.Thread(target=enter, args=(path,))
            thread.start()
            thread.join()
    assert "another process is writing" in said[0]
    assert said[1] == "entered"
    assert list(out.parent.iterdir()) == []


def test_a_name_that_is_taken_is_refused_and_what_a_kill_left_beside_it_goes(tmp_path):
    out = tmp_path / "a.gguf"
    files.require_absent(out)
    files.write_text(out, "finished", replace=False)
    os.link(out, tmp_path / ".a.1-00000000ffff-0.tmp.gguf")  # killed between its two names
    with pytest.raises(RsgwmError, match=r"a\.gguf exists already; choose another file or remove it"):
        files.require_absent(out)
    with pytest.raises(RsgwmError, match=r"cannot write .*a\.gguf"):
        files.write_text(out, "another's", replace=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    assert out.read_text() == "finished"


def test_what_a_killed_process_left_half_written_is_cleared_away(work, tmp_path):
    out = shutil.copytree(work / "pool" / "change", tmp_path / "out")
    (out / ".adapters.123-00000000ffff-0.tmp.safetensors").write_bytes(b"half")
    (out / ".mine.txt").write_text("kept")
    Adapter.load(out).save(out)
    assert not list(out.glob(".*.tmp*"))
    assert (out / ".mine.txt").exists()


def test_no_measurement_follows_the_clock_on_the_wall():
    """Durations come from clocks that no one sets: a jump of the system's time changes nothing that is written."""
    root = Path(__file__).parents[2]
    sources = [file for top in ("mlx_rsgwm", "converters", "cli", "bench") for file in (root / top).rglob("*.py")]
    assert len(sources) > 100
    follow = [file for file in sources if re.search(r"time\.time\(|datetime\.|time\.localtime", file.read_text())]
    assert [str(file.relative_to(root)) for file in follow] == ["mlx_rsgwm/serving/events.py"]  # as OpenAI's API tells


def start(command):
    arguments = [sys.executable, "-c", PROGRAM, *map(str, command), "--quiet"]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def writing_starts(child, out):
    """Wait until the child has made its folder or ended."""
    while child.poll() is None and not out.exists():
        time.sleep(0.002)
    return time.monotonic()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kill_harness(work, tiny_base, tmp_path, kind):
    """kill -9 at ten random moments of each command's writing; the same command then ends in the same bytes."""
    whole, out = tmp_path / "whole" / "out", tmp_path / "out"
    command, wanted = command_of(kind, work, tiny_base, whole)
    started = time.monotonic()
    child = start(command)
    began = writing_starts(child, whole)
    assert child.wait() == 0, child.stderr.read()
    startup, length = began - started, time.monotonic() - began
    expected = {name: files.sha256_file(whole / name) for name in wanted}
    command, _ = command_of(kind, work, tiny_base, out)
    rng = random.Random(f"kill {kind}")
    kills = attempts = 0
    while kills < 10:
        attempts += 1
        assert attempts < 60, "the command is too quick to be caught"
        child = start(command)
        if attempts % 3 == 0:  # anywhere, most of it before anything is written
            time.sleep(rng.uniform(0.3, 1) * startup)
        else:
            writing_starts(child, out)
            time.sleep(rng.uniform(0, 0.7) * length)
        child.send_signal(signal.SIGKILL)
        if child.wait() != -signal.SIGKILL:  # it was through before the signal came
            assert child.returncode in (0, 2), child.stderr.read()
            shutil.rmtree(out)
            continue
        kills += 1
        check_nothing_half_believed(out)
        complete = kind in ("train", "merge") and (out / "manifest.json").exists()
        if complete:  # killed when all was written: these commands leave a finished adapter alone
            assert {name: files.sha256_file(out / name) for name in wanted} == expected
        if complete or kind == "convert to-peft":  # which writes into empty folders only
            shutil.rmtree(out, ignore_errors=True)
    child = start(command)
    assert child.wait() == 0, child.stderr.read()
    assert {name: files.sha256_file(out / name) for name in wanted} == expected
    assert not list(out.glob(".*"))


def check_nothing_half_believed(out):
    """Every folder that says it is whole is whole."""
    for manifest in out.rglob("manifest.json"):
        if manifest.parent.name.startswith(".") or "snapshots" in manifest.parts:
            continue
        described = files.read_json_object(manifest)
        present = {
            name: digest for name, digest in described.get("state", {}).items() if (manifest.parent / name).exists()
        }
        for name, digest in {**described.get("files", {}), **present}.items():  # old checkpoints lose their state
            assert files.sha256_file(manifest.parent / name) == digest, manifest
    for report in out.rglob("report.json"):
        for name, digest in files.read_json_object(report)["files"].items():
            assert files.sha256_file(report.parent / name) == digest
    for config in out.rglob("*-peft/adapter_config.json"):
        assert (config.parent / "adapter_model.safetensors").is_file()
