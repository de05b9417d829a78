"""Facts about this machine that decide whether work here is fast, fits in memory, or fails; and what to fix."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rsgwm.core.versions import versions

SLOW_GFLOPS = 20.0  # reference BLAS: 4 on two cores; OpenBLAS: 180; any Metal GPU: above 1000
DISK_NEEDED = 3 * 10**9  # bytes: the default base model, unpacked and converted, and a demo run
MEMORY_NEEDED = 3 * 10**9  # bytes: training the default base model in float32


@dataclass(frozen=True)
class Machine:
    """Memory and disk sizes in bytes; ``None`` where the system does not tell."""

    system: str
    chip: str
    device: str
    memory: int | None
    memory_free: int | None
    wired_limit: int | None  # Metal's recommended working set: what mlx-lm wires a model into
    cache: str
    disk_free: int
    openblas: bool  # preloaded, so that MLX's matrix products on the CPU run in it
    single_threaded_blis: bool = False  # BLIS takes one core unless BLIS_NUM_THREADS says otherwise
    generic_kernels: str = ""  # the OPENBLAS_CORETYPE to set where OpenBLAS takes this processor for an ancient one


@dataclass(frozen=True)
class Problem:
    """Something to fix: what was found, and the command or action that helps."""

    what: str
    fix: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything ``rsgwm doctor`` reports."""

    machine: Machine
    versions: dict[str, str]
    matmul_gflops: float
    problems: list[Problem] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """The diagnosis as plain JSON values."""
        return asdict(self)


def diagnose(cache: Path) -> Diagnosis:
    """Examine this machine; takes seconds. ``cache`` is the folder base models are kept in, which may not exist."""
    machine = examine_machine(cache)
    installed = all_versions()
    gflops = matmul_gflops()
    return Diagnosis(machine, installed, gflops, find_problems(machine, gflops))


def examine_machine(cache: Path) -> Machine:
    """Ask the system and MLX what there is."""
    info = mx.device_info()
    device = mx.default_device()
    on_metal = mx.metal.is_available()
    existing = cache.absolute()
    while not existing.exists():
        existing = existing.parent
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        chip=str(info.get("device_name", platform.processor() or "unknown")),
        device="Metal GPU" if on_metal and device.type == mx.DeviceType.gpu else str(device.type).split(".")[-1],
        memory=total_memory(),
        memory_free=free_memory(),
        wired_limit=int(info["max_recommended_working_set_size"]) if on_metal else None,
        cache=str(cache),
        disk_free=shutil.disk_usage(existing).free,
        openblas=openblas_preloaded(),
        single_threaded_blis=single_threaded_blis(),
        generic_kernels=missed_core(),
    )


def total_memory() -> int | None:
    """Physical memory in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def openblas_preloaded() -> bool:
    """Whether ``LD_PRELOAD`` names an OpenBLAS that really was loaded: the loader passes over a missing file."""
    if "openblas" not in os.environ.get("LD_PRELOAD", ""):
        return False
    try:
        return "/libopenblas" in Path("/proc/self/maps").read_text()
    except OSError:
        return False


def single_threaded_blis() -> bool:
    """Whether BLIS is preloaded on a machine of several cores, and nobody told it to use them."""
    told = os.environ.get("BLIS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    return "libblis" in os.environ.get("LD_PRELOAD", "") and not told and (os.cpu_count() or 1) > 1


def free_memory() -> int | None:
    """Bytes that new work can take without swapping, as the system estimates it."""
    try:
        if sys.platform == "darwin":
            return free_in_vm_stat(subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout)
        return free_in_meminfo(Path("/proc/meminfo").read_text())
    except (OSError, subprocess.SubprocessError):
        return None


def free_in_meminfo(text: str) -> int | None:
    """``MemAvailable`` of Linux's ``/proc/meminfo``, in bytes."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def free_in_vm_stat(text: str) -> int | None:
    """Free, inactive, speculative and purgeable pages of macOS's ``vm_stat``, in bytes."""
    size = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", text, re.MULTILINE)
    return int(size[1]) * sum(map(int, pages)) if size and pages else None


def all_versions() -> dict[str, str]:
    """Versions of what shapes results, then of Python and the optional packages."""
    installed = {**versions(), "python": platform.python_version()}
    for package in ("torch", "peft"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def matmul_gflops(size: int = 1024, seconds: float = 0.5) -> float:
    """Best rate of a float32 ``size`` × ``size`` matrix product on the default device, in 10^9 operations a second.

    Repeats for about ``seconds``, three times at least: the best of many is steady even while others use the machine.
    """
    a = mx.random.normal((size, size), key=mx.random.key(0))
    mx.eval(a, a[:64] @ a)  # starts the device and its threads before the clock does
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started = time.perf_counter()
        mx.eval(a @ a)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times) / 1e9


def find_problems(machine: Machine, gflops: float) -> list[Problem]:
    """Everything about a machine worth fixing before work starts."""
    problems = []
    if machine.device != "Metal GPU" and machine.system.startswith("Darwin"):
        problems.append(
            Problem(
                "MLX does not use the GPU", "run natively (not in a virtual machine or Rosetta) on macOS 14 or newer"
            )
        )
    # With OpenBLAS a low rate only says that other programs keep the processor busy.
    if machine.device == "cpu" and gflops < SLOW_GFLOPS and not machine.openblas:
        problems.append(Problem(f"float32 matrix products run at {gflops:.0f} GFLOP/s: a slow BLAS", blas_fix()))
    if machine.openblas and machine.generic_kernels:
        problems.append(
            Problem(
                "OpenBLAS does not know this processor and runs its oldest kernels, several times slower",
                f"export OPENBLAS_CORETYPE={machine.generic_kernels}",
            )
        )
    if machine.single_threaded_blis:
        problems.append(
            Problem("BLIS, which is preloaded, computes on one core", f"export BLIS_NUM_THREADS={os.cpu_count()}")
        )
    if machine.memory_free is not None and machine.memory_free < MEMORY_NEEDED:
        problems.append(
            Problem(
                f"{machine.memory_free / 1e9:.1f} GB of memory free; the default base model trains in about "
                f"{MEMORY_NEEDED / 1e9:.0f} GB",
                "close other programs",
            )
        )
    if machine.disk_free < DISK_NEEDED:
        problems.append(
            Problem(
                f"{machine.disk_free / 1e9:.1f} GB free on the disk of {machine.cache}; a demo needs "
                f"{DISK_NEEDED / 1e9:.0f} GB",
                "free some space",
            )
        )
    return problems


def missed_core(library: str = "") -> str:
    """The OPENBLAS_CORETYPE that fits a processor which OpenBLAS, at ``library`` or preloaded, does not recognise.

    Empty where it does. OpenBLAS 0.3.21 (Debian 12) picks kernels by model number and takes newer Intel server
    processors for a Prescott of 2004. The library is asked which core it chose; the processor's flags say which would
    fit.
    """
    if not library and openblas_preloaded():
        library = next(part for part in os.environ["LD_PRELOAD"].split(":") if "openblas" in part)
    if not library or os.environ.get("OPENBLAS_CORETYPE"):
        return ""
    try:
        blas = ctypes.CDLL(library)
        blas.openblas_get_corename.restype = ctypes.c_char_p
        core = blas.openblas_get_corename().decode()
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except (OSError, AttributeError):
        return ""
    if core.lower() not in ("prescott", "core2", "nehalem", "generic"):
        return ""
    return "SKYLAKEX" if "avx512f" in flags else "HASWELL" if "avx2" in flags else ""


def blas_fix() -> str:
    """What to type against a slow BLAS: on Linux, install BLIS and OpenBLAS where they are missing, preload them."""
    if sys.platform != "linux":
        return "close other programs and try again"
    folder = Path(f"/usr/lib/{platform.machine()}-linux-gnu")
    library, blis = folder / "openblas-pthread/libopenblas.so.0", folder / "blis-openmp/libblis.so.4"
    if not library.exists():
        threads = f"BLIS_NUM_THREADS={os.cpu_count()}"
        preload = f"export {threads} LD_PRELOAD={blis}:{library}"
        return f"apt-get install libopenblas0-pthread libblis4-openmp; {preload}; then rsgwm doctor once more"
    preload = f"export LD_PRELOAD={library}"
    if blis.exists():  # quicker in products of few rows, which decoding consists of
        preload = f"export BLIS_NUM_THREADS={os.cpu_count()} LD_PRELOAD={blis}:{library}"
    core = missed_core(str(library))
    return f"{preload} OPENBLAS_CORETYPE={core}" if core else preload
