"""``rsgwm doctor``: what this machine is, and what to fix on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.core.errors import CheckFailed

if TYPE_CHECKING:
    from mlx_rsgwm.core.machine import Diagnosis


@click.command()
@common_options
@click.option("--exit-code", is_flag=True, help="Exit with 3 when there is something to fix.")
def doctor(console: Console, exit_code: bool) -> None:
    """Examine this machine: chip, memory, disk, versions, speed of a matrix product, and what to fix."""
    from mlx_rsgwm.core.machine import diagnose
    from mlx_rsgwm.models.base import cache_folder

    diagnosis = diagnose(cache_folder())
    console.line(describe(diagnosis))
    console.result(diagnosis.describe())
    if exit_code and diagnosis.problems:
        raise CheckFailed("; ".join(f"{problem.what}: {problem.fix}" for problem in diagnosis.problems))


def describe(diagnosis: Diagnosis) -> str:
    """The diagnosis for people: aligned facts, then each problem with its fix."""
    machine = diagnosis.machine
    memory = f"{gigabytes(machine.memory)}, {gigabytes(machine.memory_free)} free"
    if machine.wired_limit is not None:
        memory += f", wired limit {gigabytes(machine.wired_limit)}"
    facts = {
        "system": machine.system,
        "chip": machine.chip,
        "device": machine.device,
        "memory": memory,
        "disk": f"{gigabytes(machine.disk_free)} free for {machine.cache}",
        "float32 matmul": f"{diagnosis.matmul_gflops:.0f} GFLOP/s{' with OpenBLAS' if machine.openblas else ''}",
        **diagnosis.versions,
    }
    lines = [f"{name:<16}{value}" for name, value in facts.items()]
    for problem in diagnosis.problems:
        lines += ["", f"problem: {problem.what}", f"    fix: {problem.fix}"]
    return "\n".join(lines if diagnosis.problems else [*lines, "", "nothing to fix"])


def gigabytes(size: int | None) -> str:
    """A number of bytes as ``16.0 GB``."""
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"
