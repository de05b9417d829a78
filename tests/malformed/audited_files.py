"""Sound files of a pool for an audit, and of the plan that it writes."""

from __future__ import annotations

from pathlib import Path

from sound_files import Reader, make_pool


def audit_pool(folder: Path) -> None:
    from mlx_rsgwm.audit.audit_adapters import audit_adapters

    audit_adapters([folder / "a", folder / "b"])


def make_plan(folder: Path) -> None:
    from mlx_rsgwm.audit.audit_adapters import audit_adapters

    make_pool(folder)
    audit_adapters([folder / "a", folder / "b"], plan=folder / "plan.yaml")


def read_merge_plan(folder: Path) -> None:
    from mlx_rsgwm.audit.plan import read_plan

    read_plan(folder / "plan.yaml")


AUDITED = {
    "audited": Reader("safetensors", "a/adapters.safetensors", make_pool, audit_pool),
    "merge-plan": Reader("yaml", "plan.yaml", make_plan, read_merge_plan),
}
