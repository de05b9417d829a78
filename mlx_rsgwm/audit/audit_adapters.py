"""The audit as the command and the library offer it: all that is said of adapters, alone, in pairs, and merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_rsgwm.audit.adapter_audit import AdapterAudit
from mlx_rsgwm.audit.advice import Advice, advise
from mlx_rsgwm.audit.eligibility import WEAK, Eligibility
from mlx_rsgwm.audit.outcomes import Structure, structure_of
from mlx_rsgwm.audit.pair_audit import ENERGY, PairAudit
from mlx_rsgwm.audit.plan import plan_of
from mlx_rsgwm.audit.pool_audit import PoolAudit, audit
from mlx_rsgwm.audit.report import merge_notes, merge_sections, notes, sections, text, to_json
from mlx_rsgwm.audit.retention import Behaviour, judge_on_data
from mlx_rsgwm.audit.verdicts import PRESETS
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.nearest import advice as nearest_advice
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapter, load_adapters

DATA_ROWS = 64


@dataclass(frozen=True)
class Audit:
    """``pool``: what the weights say; ``judged``: of every adapter on its data, UNKNOWN without.

    ``structure``: what of each is in a finished merge, and ``behaviour``: what that keeps of each on its data; None
    where it was not asked for. ``merged``: where the merge is.
    """

    pool: PoolAudit
    judged: tuple[Eligibility, ...]
    structure: Structure | None = None
    behaviour: Behaviour | None = None
    merged: str = ""

    @property
    def adapters(self) -> tuple[AdapterAudit, ...]:
        """The adapters by their spectra, in their order."""
        return self.pool.adapters

    @property
    def pairs(self) -> tuple[PairAudit, ...]:
        """Every two adapters with a common module."""
        return self.pool.pairs

    @property
    def weak(self) -> list[int]:
        """Positions of the adapters that are worse than the base on their data."""
        return [index for index, each in enumerate(self.judged) if each.verdict == WEAK]

    @property
    def advice(self) -> Advice | None:
        """The verdict in a word, its reason, and what to type; None of one adapter."""
        return advise(self.pool, self.weak) if self.pairs else None

    def text(self, every_module: bool = False) -> str:
        """Tables for a terminal and what must be said below them; all modules of the worst pair, or the worst ten."""
        labels = self.pool.labels
        said = text(sections(self.pool, self.judged, every_module), notes(self.pool, self.judged))
        if self.structure is None:
            return said
        of_merge = merge_sections(self.structure, self.behaviour, labels)
        return f"{said}\n\n{self.merged}\n\n{text(of_merge, merge_notes(self.structure, self.behaviour, labels))}"

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that ``rsgwm audit --json`` ends in."""
        result = to_json(self.pool, self.judged, self.advice)
        if self.structure is not None:
            retained = self.behaviour and self.behaviour.to_dict()
            result["merged"] = {"adapter": self.merged, **self.structure.to_dict(), "retention": retained}
        return result


def audit_adapters(
    adapters: AdapterSource | Sequence[AdapterSource],
    *,
    data: str | Sequence[str] = (),
    data_rows: int = DATA_ROWS,
    merged: AdapterSource | None = None,
    plan: str | Path | None = None,
    plan_compat: bool = False,
    page: str | Path | None = None,
    preset: str = "post",
    energy: float = ENERGY,
    base: str | Path | None = None,
    seed: int = DEFAULT_SEED,
    progress: Progress = SILENT,
) -> Audit:
    """Say before any inference how adapters use their ranks, and how every pair of them lies to each other.

    Args:
        adapters: one or more, each as for :func:`load_adapter`, or a folder of them.
        data: rows to judge the adapters by, one name for all or one for each: a task, a file of questions or of rows, a
            corpus. The base is loaded for them.
        data_rows: how many rows of each are taken, at most; those that an adapter was trained on are left out.
        merged: a finished merge of the adapters, to say what of each is in it, and with ``data`` what it keeps of each.
        plan: the merge plan to write, a YAML file; ``rs.merge(plan=…)`` carries it out.
        plan_compat: plan as gradience's ``plan_audit_aware`` does.
        page: the HTML page to write.
        preset: where verdicts change: ``post``, ``later``, ``conservative``, ``permissive``.
        energy: the share of the squared singular values whose directions count as an adapter's.
        base: the base that adapters of other formats are read for; None for the one that they name.
        seed: of the choice of rows and of resampling.
        progress: told of modules and adapters.

    Returns:
        ``adapters``, each with its spectra, ``pairs``, each with ``verdict``, ``mean_overlap``, ``frobenius_ratio`` and
        ``modules``, and ``advice``; with ``data`` also ``judged``, and with ``merged`` ``structure`` and ``behaviour``.
        ``to_dict()`` has every number.

    Raises:
        RsgwmError: an unknown preset, adapters of different bases or without a common module, values that are not
            finite, a plan for one adapter, data that cannot be read or are not new to an adapter.

    Example::

        audited = rs.audit_adapters(["pool/change", "pool/prices"], plan="plan.yaml")
        assert audited.pairs[0].verdict == "safe"
        rs.merge(plan="plan.yaml", out="merged")
    """
    if preset not in PRESETS:
        raise RsgwmError(f"preset {preset!r} is unknown; {nearest_advice(preset, PRESETS)}")
    sources: list[AdapterSource] = [adapters] if isinstance(adapters, AdapterSource) else [*adapters]
    loaded = load_adapters(sources, base, lazy=True, hashes=False, progress=progress)
    merge = None if merged is None else load_adapter(merged, base, lazy=True, progress=progress)
    pool = audit(loaded, PRESETS[preset], energy, progress)
    planned = None if plan is None else plan_of(pool, plan_compat)
    structure = None if merge is None else structure_of(merge, loaded)
    judged, behaviour = [Eligibility()] * len(loaded), None
    if names := [data] if isinstance(data, str) else [*data]:
        judged, behaviour = judge_on_data(
            loaded, names, data_rows, merge, None if base is None else str(base), seed, progress
        )
    result = Audit(pool, tuple(judged), structure, behaviour, "" if merge is None else merge.where)
    if planned is not None and plan is not None:
        planned.save(Path(plan))
    if page is not None:
        from mlx_rsgwm.audit.page import write_page  # imports matplotlib's renderer

        write_page(pool, judged, Path(page), merge_sections(structure, behaviour, pool.labels))
    return result
