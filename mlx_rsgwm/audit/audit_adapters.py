"""The audit as the library offers it: everything that ``rsgwm audit`` says of adapters alone, and its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_rsgwm.audit.eligibility import Eligibility
from mlx_rsgwm.audit.pair_audit import ENERGY
from mlx_rsgwm.audit.plan import plan_of
from mlx_rsgwm.audit.pool_audit import PoolAudit, audit
from mlx_rsgwm.audit.verdicts import PRESETS
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.nearest import advice
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapters


def audit_adapters(
    adapters: AdapterSource | Sequence[AdapterSource],
    *,
    plan: str | Path | None = None,
    page: str | Path | None = None,
    preset: str = "post",
    energy: float = ENERGY,
    base: str | Path | None = None,
    progress: Progress = SILENT,
) -> PoolAudit:
    """Say before any inference how adapters use their ranks, and how every pair of them lies to each other.

    Args:
        adapters: one or more, each as for :func:`load_adapter`, or a folder of them.
        plan: the merge plan to write, a YAML file; ``rs.merge(plan=…)`` carries it out.
        page: the HTML page to write.
        preset: where verdicts change: ``post``, ``later``, ``conservative``, ``permissive``.
        energy: the share of the squared singular values whose directions count as an adapter's.
        base: the base that adapters of other formats are read for; None for the one that they name.
        progress: told of modules.

    Returns:
        ``adapters``, each with its spectra, and ``pairs``, each with ``verdict``, ``mean_overlap``,
        ``frobenius_ratio`` and ``modules``; ``to_dict()`` of either has every number.

    Raises:
        RsgwmError: an unknown preset, adapters of different bases or without a common module, values that are not
            finite, a plan for one adapter.

    Example::

        audited = rs.audit_adapters(["pool/change", "pool/prices"], plan="plan.yaml")
        assert audited.pairs[0].verdict == "safe"
        rs.merge(plan="plan.yaml", out="merged")
    """
    if preset not in PRESETS:
        raise RsgwmError(f"preset {preset!r} is unknown; {advice(preset, PRESETS)}")
    sources: list[AdapterSource] = [adapters] if isinstance(adapters, AdapterSource) else [*adapters]
    loaded = load_adapters(sources, base, lazy=True, hashes=False, progress=progress)
    audited = audit(loaded, PRESETS[preset], energy, progress)
    if plan is not None:
        plan_of(audited).save(Path(plan))
    if page is not None:
        from mlx_rsgwm.audit.page import write_page  # imports matplotlib's renderer

        write_page(audited, [Eligibility()] * len(audited.adapters), Path(page))
    return audited
