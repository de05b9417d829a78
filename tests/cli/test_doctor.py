"""``rsgwm doctor``: facts that are facts, problems that are found, fixes that say what to type."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.core import machine as doctor

HEALTHY = doctor.Machine(
    system="Linux 6.1 x86_64",
    chip="A chip",
    device="cpu",
    memory=16 * 10**9,
    memory_free=8 * 10**9,
    wired_limit=None,
    cache="cache",
    disk_free=50 * 10**9,
    openblas=False,
)

VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            400000.
Pages inactive:                           20000.
Pages speculative:                          500.
Pages throttled:                              0.
Pages wired down:                        150000.
Pages purgeable:                            100.
"""


@pytest.fixture
def machine(monkeypatch):
    """Makes ``diagnose`` see the given machine and speed, without timing anything."""

    def pretend(gflops=180.0, **changes):
        monkeypatch.setattr(doctor, "examine_machine", lambda cache: dataclasses.replace(HEALTHY, **changes))
        monkeypatch.setattr(doctor, "matmul_gflops", lambda: gflops)

    return pretend


def run(*arguments):
    return CliRunner().invoke(rsgwm, ["doctor", *arguments])


def test_a_healthy_machine_has_nothing_to_fix(machine):
    machine()
    result = run("--exit-code")
    assert result.exit_code == 0
    assert "nothing to fix" in result.stdout
    assert "180 GFLOP/s" in result.stdout


@pytest.mark.parametrize(
    ("gflops", "changes", "part"),
    [
        (4.0, {}, "slow BLAS"),
        (180.0, {"memory_free": 10**9}, "1.0 GB of memory free"),
        (180.0, {"disk_free": 10**8}, "0.1 GB free on the disk of cache"),
        (180.0, {"system": "Darwin 24.0 arm64"}, "does not use the GPU"),
    ],
)
def test_a_problem_is_shown_and_only_exit_code_fails(machine, gflops, changes, part):
    machine(gflops, **changes)
    shown, checked = run(), run("--exit-code", "--json")
    assert shown.exit_code == 0
    assert part in shown.stdout
    assert "fix: " in shown.stdout
    assert checked.exit_code == 3
    assert len(checked.stderr.split("rsgwm: error: ")[1].splitlines()) == 1
    report = json.loads(checked.stdout)
    assert len(report["problems"]) == 1
    assert part in report["problems"][0]["what"]


def test_a_gpu_is_not_blamed_for_its_blas(machine):
    machine(gflops=4.0, device="Metal GPU", system="Darwin 24.0 arm64", wired_limit=10**10)
    result = run("--exit-code")
    assert result.exit_code == 0
    assert "wired limit 10.0 GB" in result.stdout


def test_a_busy_machine_is_not_blamed_for_its_blas(machine):
    machine(gflops=12.0, openblas=True)
    result = run("--exit-code")
    assert result.exit_code == 0
    assert "12 GFLOP/s with OpenBLAS" in result.stdout


def test_a_preload_that_does_not_exist_is_not_believed(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "")
    assert not doctor.openblas_preloaded()
    monkeypatch.setenv("LD_PRELOAD", "nowhere/libopenblas.so.0")
    maps = "7f00-7f01 r-xp 0 /usr/lib/libm.so.6\n"
    monkeypatch.setattr(Path, "read_text", lambda path: maps)
    assert not doctor.openblas_preloaded()
    maps += "7f02-7f03 r-xp 0 /usr/lib/openblas-pthread/libopenblasp-r0.3.21.so\n"
    assert doctor.openblas_preloaded()


def test_unknown_memory_is_no_problem(machine):
    machine(memory=None, memory_free=None)
    result = run("--exit-code")
    assert result.exit_code == 0
    assert "unknown" in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="OpenBLAS is preloaded on Linux only")
@pytest.mark.parametrize("core", ["", "HASWELL"])
@pytest.mark.parametrize("installed", [True, False])
def test_the_fix_of_a_slow_blas_is_the_whole_fix(monkeypatch, installed, core):
    monkeypatch.setattr(Path, "exists", lambda path: installed)
    asked = []
    monkeypatch.setattr(doctor, "missed_core", lambda library: asked.append(library) or core)
    fix = doctor.blas_fix()
    preload = next(word for word in fix.replace(";", " ").split() if word.startswith("LD_PRELOAD=")).partition("=")[2]
    blis, library = preload.split(":")
    assert blis.endswith("-linux-gnu/blis-openmp/libblis.so.4")
    assert library.endswith("-linux-gnu/openblas-pthread/libopenblas.so.0")
    export = f"export BLIS_NUM_THREADS={os.cpu_count()} LD_PRELOAD={preload}"
    if installed:
        assert asked == [library]
        assert fix == export + (" OPENBLAS_CORETYPE=HASWELL" if core else "")
    else:
        assert fix == f"apt-get install libopenblas0-pthread libblis4-openmp; {export}; then rsgwm doctor once more"


def test_blis_on_one_core_is_told(machine, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libblis.so.4:/usr/lib/libopenblas.so.0")
    for name in ("BLIS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert doctor.single_threaded_blis()
    monkeypatch.setenv("BLIS_NUM_THREADS", "8")
    assert not doctor.single_threaded_blis()
    machine(single_threaded_blis=True)
    result = run("--exit-code")
    assert result.exit_code == 3
    assert "export BLIS_NUM_THREADS=8" in result.output


def test_this_machine_is_measured(tmp_path):
    machine = doctor.examine_machine(tmp_path / "not" / "there")
    assert machine.memory is None or machine.memory > 10**8
    assert machine.memory_free is None or machine.memory is None or 0 < machine.memory_free <= machine.memory
    assert machine.disk_free > 0
    assert machine.chip
    assert doctor.matmul_gflops(size=128, seconds=0.01) > 0.01
    assert {"mlx", "mlx-lm", "python", "torch", "peft"} <= set(doctor.all_versions())


def test_free_memory_as_linux_tells_it():
    assert doctor.free_in_meminfo("MemTotal: 100 kB\nMemFree:   5 kB\nMemAvailable:   20 kB\n") == 20 * 1024
    assert doctor.free_in_meminfo("MemTotal: 100 kB\n") is None


def test_free_memory_as_macos_tells_it():
    assert doctor.free_in_vm_stat(VM_STAT) == 16384 * 30600
    assert doctor.free_in_vm_stat("") is None
