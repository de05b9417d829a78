"""Conversions killed between any two steps: nothing stands at the final name, and the same command redoes it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.converters.convert import convert
from mlx_rsgwm.core import files, temporary
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import new_folder
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
            patch.setattr(shutil, "rmtree", lambda path, *a, left=left, **o: left[0] and clean(path, *a, **o))
            patch.setattr(Path, "unlink", lambda path, *a, left=left, **o: left[0] and unlink(path, *a, **o))
            patch.setattr(temporary, "START", f"{limit:04x}")  # the next one is another process
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
        monkeypatch, ("convert", "to-peft", pool, "--out", out, "--base", tiny_base, *extra), whole_or_absent
    )
    assert run("convert", "to-peft", pool, "--out", tmp_path / "once", "--base", tiny_base).exit_code == 0
    assert tree(out) == tree(tmp_path / "once")


def test_a_pool_from_peft_killed_anywhere(pool, tiny_base, tmp_path, monkeypatch):
    assert run("convert", "to-peft", pool, "--out", tmp_path / "peft", "--base", tiny_base).exit_code == 0
    out = tmp_path / "out"

    def whole_or_absent():
        for folder in (out / "a", out / "b"):
            assert not folder.exists() or Adapter.load(folder).manifest

    assert steps_until_done(
        monkeypatch, ("convert", "from-peft", tmp_path / "peft", "--out", out, "--base", tiny_base), whole_or_absent
    )
    assert {one.name for one in out.iterdir()} == {"a", "b"}
    before, after = Adapter.load(pool / "a"), Adapter.load(out / "a")
    assert all(mx.array_equal(before.weights[name], after.weights[name]) for name in before.weights)


@pytest.mark.parametrize(
    "command",
    [("convert", "from-mlx", "pool/a", "--out", "out"), ("fuse", "pool/a", "--out", "out", "--base", "BASE")],
)
def test_single_folders_killed_anywhere(command, pool, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [tiny_base if one == "BASE" else one for one in command]
    assert steps_until_done(monkeypatch, arguments, lambda: _absent(tmp_path / "out"))
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


def test_an_adapter_from_gguf_killed_anywhere(pool, tiny_base, tmp_path, monkeypatch):
    (tmp_path / "gguf").mkdir()
    assert run("convert", "to-gguf", pool / "a", "--out", tmp_path / "gguf/a.gguf", "--base", tiny_base).exit_code == 0
    command = ("convert", "from-gguf", tmp_path / "gguf/a.gguf", "--out", tmp_path / "out", "--base", tiny_base)
    assert steps_until_done(monkeypatch, command, lambda: _absent(tmp_path / "out"))
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


def test_a_conversion_by_the_library_is_whole_or_absent(pool, tiny_base, tmp_path, monkeypatch):
    real = files.write_json

    def killing(path, value):
        if path.name == "manifest.json":
            raise Killed
        real(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", killing)
        with pytest.raises(Killed):
            convert(pool / "a", tmp_path / "out", "mlx", str(tiny_base))
    _absent(tmp_path / "out")
    assert convert(pool / "a", tmp_path / "out", "mlx", str(tiny_base)) == tmp_path / "out"


def _absent(folder):
    assert not folder.exists()


def test_a_half_written_peft_folder_is_not_there_already(pool, tiny_base, tmp_path):
    """As an earlier version left it: weights without their configuration."""
    (tmp_path / "peft" / "a").mkdir(parents=True)
    (tmp_path / "peft" / "a" / "adapter_model.safetensors").write_bytes(b"x")
    result = run("convert", "to-peft", pool, "--out", tmp_path / "peft", "--base", tiny_base)
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
    with pytest.raises(RsgwmError, match="File exists"), new_folder(out) as work:
        work.mkdir()
    assert not list(tmp_path.iterdir())
    out.mkdir()
    with new_folder(out) as work, new_folder(work) as inner:
        (inner / "file").write_text("all")
    assert (out / "file").read_text() == "all"
    with pytest.raises(RsgwmError, match="cannot write"), new_folder(out):
        pass
    assert (out / "file").read_text() == "all"
    assert [one.name for one in tmp_path.iterdir()] == ["x"]


def test_only_what_an_ended_process_left_is_removed(tmp_path):
    boot, gone = temporary.boot(), next(pid for pid in range(2**22 - 1, 1, -1) if not Path(f"/proc/{pid}").exists())
    me, parent = os.getpid(), os.getppid()
    here = f"{gone}-{boot}0000-0"
    ended = [f".x.{here}.part", f"..x.{here}.part.{here}.part", f".y.{here}.part", f".a.{here}.tmp.safetensors"]
    ended += [
        f".x.{me}-{boot}{'1' if temporary.START == '0000' else '0'}000-1.part",
        f".x.{parent}-00000000ffff-2.part",
    ]
    others = [f".z.{me}-{boot}{temporary.START}-3.tmp", f".x.{parent}-{boot}0000-4.part", ".x.part", f".x.{gone}.part"]
    for write in (lambda: files.write_text(tmp_path / "x", ""), lambda: _enter(new_folder(tmp_path / "y"))):
        for name in (*ended, *others):
            (tmp_path / name).mkdir(exist_ok=True)
        write()
    assert {one.name for one in tmp_path.iterdir()} == {"x", "y", *others}


def _enter(context):
    with context:
        pass


def test_temporary_names_fit_wherever_the_final_one_does(tmp_path):
    for name in ("ä" * 127, "a" * 250, "a.safetensors"):
        files.write_text(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name
        assert len(os.fsencode(temporary.temporary_file(tmp_path / name).name)) < 255
    assert temporary.temporary_file(tmp_path / "a.safetensors").suffix == ".safetensors"


def write_beside_another(path):
    with files.new_file(path, replace=False) as temporary:
        temporary.write_text("mine")
        path.write_text("other")


def test_a_file_that_came_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    for link in (os.link, lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links"))):
        monkeypatch.setattr(os, "link", link)
        with files.new_file(tmp_path / "b", replace=False) as new:
            new.write_text("first")
        with pytest.raises(RsgwmError, match="File exists"):
            write_beside_another(tmp_path / "a")
        assert [(tmp_path / name).read_text() for name in "ab"] == ["other", "first"]
        (tmp_path / "a").unlink()
        (tmp_path / "b").unlink()
    assert list(tmp_path.iterdir()) == []
