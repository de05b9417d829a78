"""Merging by a plan, and what came of it in the merge's manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_rsgwm.audit.outcomes import structure_of
from mlx_rsgwm.audit.plan import Plan
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.merging.pool import PoolAdapter
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapters


def merge_by_plan(
    plan: Plan,
    adapters: Sequence[AdapterSource] = (),
    options: MergeOptions | None = None,
    progress: Progress = SILENT,
    base: str | Path | None = None,
) -> Adapter:
    """Merge as a plan says, streaming; without ``adapters`` those that it names, where it names them.

    ``options`` give role, rank, seed and the limit of growth; method, parameters and weights are the plan's. The
    manifest's ``merge`` gains ``plan`` (reasons by module) and ``outcome`` (Q_min and D).

    Raises:
        RsgwmError: adapters other than the plan's (by fingerprint), a module that none of them adapts, and what
            :func:`~mlx_rsgwm.merging.merge.merge` refuses.
    """
    sources: list[AdapterSource] = [*adapters] or [adapter.adapter for adapter in plan.adapters]
    loaded = load_adapters(sources, base, lazy=True, hashes=False, progress=progress)
    known = [PoolAdapter.of(adapter) for adapter in loaded]
    order = plan.ordered([each.content_hash() for each in known], [each.label for each in known])
    ordered = [loaded[index] for index in order]
    merged = merge(ordered, plan.options(options or MergeOptions()), progress, base=base)
    described: dict[str, Any] = merged.manifest["merge"]
    described["plan"] = {name: module.reason for name, module in plan.modules.items()}
    described["outcome"] = structure_of(merged, ordered).to_dict()
    return merged
