"""A decision carried out: every group of several adapters merged, the rest left where they are, and a list of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_rsgwm.audit.carry_out import merge_by_plan
from mlx_rsgwm.audit.plan import plan_of
from mlx_rsgwm.audit.pool_audit import audit
from mlx_rsgwm.core import files
from mlx_rsgwm.core.folders import new_folder
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.probe.decide import PLAN, Choice, Decision, variant

DECISION_FILE = "decision.json"


def apply(decision: Decision, adapters: Mapping[str, Adapter], out: Path, progress: Progress = SILENT) -> list[str]:
    """Merge every group into a folder below ``out``, which is new; returns where each group's adapter is.

    ``adapters``: those of the decision by their names, finished. Adapters by themselves stay where they are.
    ``decision.json`` says of every group its members, its adapter and the reason.

    Raises:
        RsgwmError: whatever the merge refuses; nothing is left then.
    """
    places = []
    with new_folder(out) as work:
        for number, choice in enumerate(decision.groups, 1):
            if len(choice.members) == 1:
                places.append(choice.members[0])
                continue
            name = "merged" if len(decision.groups) == 1 else f"group-{number}"
            _merged(choice, adapters, progress).save(work / name)
            places.append(name)
        told: list[dict[str, Any]] = [
            {**choice.to_dict(), "adapter": place} for choice, place in zip(decision.groups, places, strict=True)
        ]
        files.write_json(
            work / DECISION_FILE, {"predicted": decision.predicted, "reason": decision.reason, "groups": told}
        )
    sizes = [len(choice.members) for choice in decision.groups]
    return [place if size == 1 else str(out / place) for size, place in zip(sizes, places, strict=True)]


def _merged(choice: Choice, adapters: Mapping[str, Adapter], progress: Progress) -> Adapter:
    sources = [adapters[name] for name in choice.members]
    if choice.method == PLAN:
        return merge_by_plan(plan_of(audit(sources)), sources, progress=progress)
    method, parameters = variant(choice.method)
    return merge(sources, MergeOptions(method, "draft", parameters), progress)
