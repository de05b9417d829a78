"""Conversions killed between any two steps: nothing stands at the final name, and the same command redoes it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.adapter import Adapter


class Killed(BaseException):
    """What no ``except Exception`` sees."""


@pytest.fixture
def pool(make_adapter, tmp_path):
    for seed, name in enumerate(("a", "b")):
        make_adapter(seed).save(tmp_path / "pool" / name)
    return tmp_path / "pool"


def run(*arguments):
    return CliRunner().invoke(rsgwm, [str(one) for one in arguments])


def steps_until_done(monkeypatch, command, after_kill):
    """Run ``command`` again and again, killed before its first step, its second and so on, until it comes through.

    A step is a rename or the removal of a lock; a kill leaves on disk what clean-up would have removed.
    """
    real = {name: getattr(os, name) for name in ("rename", "replace")}
    clean, unlink = shutil.rmtree, Path.unlink
    for limit in range(100):
        left = [limit]

        def stepping(name, left=left):
            def step(*arguments, **options):
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return real[name](*arguments, **options)

            return step

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, stepping(name))
            patch.setattr(files.shutil, "rmtree", lambda path, *a, left=left, **o: left[0] and clean(path, *a, **o))
            patch.setattr(Path, "unlink", lambda path, *a, left=left, **o: left[0] and unlink(path, *a, **o))
            patch.setattr(files, "_process_runs", lambda pid: False)
            try:
                result = run(*command)
            except Killed:
                result = None
        if result is not None and not isinstance(result.exception, Killed):
            assert result.exit_code == 0, result.output
            return limit
        after_kill()
    raise AssertionError("it never came through")


def tree(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("verify", [False, True])
def test_a_pool_to_peft_killed_anywhere(verify, pool, tiny_base, tmp_path, monkeypatch):
    extra = ("--verify",) if verify else ()
    out = tmp_path / "peft"

    def whole_or_absent():
        for folder in (out / "a", out / "b"):
            assert not folder.exists() or (folder / "adapter_config.json").is_file()

    assert steps_until_done(
        monkeypatch, ("convert", "to-peft", pool, out, "--base", tiny_base, *extra), whole_or_absent
    )
    assert run("convert", "to-peft", pool, tmp_path / "once", "--base", tiny_base).exit_code == 0
    assert tree(out) == tree(tmp_path / "once")


def test_a_pool_from_peft_killed_anywhere(pool, tiny_base, tmp_path, monkeypatch):
    assert run("convert", "to-peft", pool, tmp_path / "peft", "--base", tiny_base).exit_code == 0
    out = tmp_path / "out"

    def whole_or_absent():
        for folder in (out / "a", out / "b"):
            assert not folder.exists() or Adapter.load(folder).manifest

    assert steps_until_done(
        monkeypatch, ("convert", "from-peft", tmp_path / "peft", out, "--base", tiny_base), whole_or_absent
    )
    assert {one.name for one in out.iterdir()} == {"a", "b"}
    before, after = Adapter.load(pool / "a"), Adapter.load(out / "a")
    assert all(mx.array_equal(before.weights[name], after.weights[name]) for name in before.weights)


@pytest.mark.parametrize(
    "command",
    [("convert", "from-mlx", "pool/a", "out"), ("fuse", "pool/a", "out", "--base", "BASE")],
)
def test_single_folders_killed_anywhere(command, pool, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [tiny_base if one == "BASE" else one for one in command]
    assert steps_until_done(monkeypatch, arguments, lambda: _absent(tmp_path / "out"))
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


def _absent(folder):
    assert not folder.exists()


def test_a_half_written_peft_folder_is_not_there_already(pool, tiny_base, tmp_path):
    """As an earlier version left it: weights without their configuration."""
    (tmp_path / "peft" / "a").mkdir(parents=True)
    (tmp_path / "peft" / "a" / "adapter_model.safetensors").write_bytes(b"x")
    result = run("convert", "to-peft", pool, tmp_path / "peft", "--base", tiny_base)
    assert result.exit_code == 2
    assert "peft/a exists and is not an empty folder" in result.stderr
    assert (tmp_path / "peft" / "b" / "adapter_config.json").is_file()


def test_an_adapter_whose_saving_was_cut_short_is_refused(make_adapter, tmp_path, monkeypatch):
    real = files.write_json

    def killing(path, value):
        if path.name == "manifest.json":
            raise Killed
        real(path, value)

    monkeypatch.setattr(files, "write_json", killing)
    with pytest.raises(Killed):
        make_adapter(0).save(tmp_path / "one")
    with pytest.raises(RsgwmError, match="was not written to its end"):
        Adapter.load(tmp_path / "one")
    monkeypatch.setattr(files, "write_json", real)
    make_adapter(0).save(tmp_path / "one")
    assert Adapter.load(tmp_path / "one").weights


def test_a_new_folder_is_whole_or_absent(tmp_path):
    out = tmp_path / "x"
    with pytest.raises(RsgwmError, match="File exists"), files.new_folder(out) as work:
        work.mkdir()
    assert not list(tmp_path.iterdir())
    out.mkdir()
    with files.new_folder(out) as work, files.new_folder(work) as inner:
        (inner / "file").write_text("all")
    assert (out / "file").read_text() == "all"
    with pytest.raises(RsgwmError, match="cannot write"), files.new_folder(out):
        pass
    assert (out / "file").read_text() == "all"
    assert [one.name for one in tmp_path.iterdir()] == ["x"]


def test_only_what_an_ended_process_left_is_removed(tmp_path):
    gone = next(pid for pid in range(2**22 - 1, 1, -1) if not files._process_runs(pid))
    names = (f".x.{gone}.part", f"..x.{gone}.part.{gone}.part", f".x.{os.getppid()}.part", f".y.{gone}.part", ".x.part")
    for name in names:
        (tmp_path / name).mkdir()
    with files.new_folder(tmp_path / "x"):
        pass
    assert {one.name for one in tmp_path.iterdir()} == {"x", *names[2:]}
