"""An audit as tables and as lines: what a terminal and a page show, the worst first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import PurePath
from typing import Any

from mlx_rsgwm.audit.adapter_audit import AdapterAudit
from mlx_rsgwm.audit.advice import advise, word_of, worst_first
from mlx_rsgwm.audit.eligibility import UNKNOWN, WEAK, Eligibility
from mlx_rsgwm.audit.outcomes import Outcome, Structure
from mlx_rsgwm.audit.pair_audit import ModulePair, PairAudit
from mlx_rsgwm.audit.pool_audit import PoolAudit
from mlx_rsgwm.audit.verdicts import SEVERITY
from mlx_rsgwm.core.tables import Rows, Section, show

MODULES_SHOWN = 10
FLAGS = {
    "low_utilisation": "uses less than a quarter of its rank",
    "high_rank_waste": "a smaller rank would hold the same",
    "concentrated_spectrum": "nearly all of it lies in one or two directions",
    "underutilised_capacity": "its stable rank is below a fifth of its rank",
}


def short_names(labels: Sequence[str]) -> list[str]:
    """Labels without the folder that all of them are in, where they stay apart."""
    parents = {str(PurePath(label).parent) for label in labels}
    names = [PurePath(label).name for label in labels]
    return names if len(parents) == 1 and len(set(names)) == len(labels) else list(labels)


def adapter_rows(audited: PoolAudit, judged: Sequence[Eligibility]) -> Rows:
    """One line an adapter."""
    head = ["adapter", "norm", "rank", "stable rank", "used", "effective rank", "rank for 90 %", "on its data"]
    return [
        head,
        *(_adapter_row(*each) for each in zip(short_names(audited.labels), audited.adapters, judged, strict=True)),
    ]


def _adapter_row(name: str, adapter: AdapterAudit, judged: Eligibility) -> list[str]:
    measures = adapter.to_dict()
    gain = "" if judged.gain is None else f" ({judged.gain:+.3f} ± {judged.margin:.3f} nats)"
    return [
        *(name, f"{adapter.norm:.3g}", str(adapter.rank), f"{adapter.stable_rank_mean:.2f}"),
        *(f"{adapter.utilisation_mean:.0%}", f"{measures['effective_rank_mean']:.1f}"),
        *(f"{measures['energy_rank_90_p50']:g}", judged.verdict + gain),
    ]


def pair_rows(audited: PoolAudit) -> Rows:
    """One line a pair, the worst first."""
    names = short_names(audited.labels)
    head = ["pair", "verdict", "risk", "overlap", "by chance", "agreement", "norms", "cosine", "modules"]
    return [head, *(_pair_row(names, pair) for pair in worst_first(audited))]


def _pair_row(names: Sequence[str], pair: PairAudit) -> list[str]:
    counts = {name: sum(module.verdict.name == name for module in pair.modules) for name in reversed(SEVERITY)}
    average = [
        sum(getattr(module, measure) for module in pair.modules) / len(pair.modules)
        for measure in ("random", "agreement")
    ]
    return [
        *(f"{names[pair.first]}, {names[pair.second]}", f"{pair.verdict} ({word_of(pair)})", pair.risk),
        *(f"{pair.mean_overlap:.2f}", f"{average[0]:.2f}", f"{average[1]:+.2f}"),
        *(_times(pair.frobenius_ratio), f"{pair.cosine:+.2f}"),
        ", ".join(f"{count} {name}" for name, count in counts.items() if count),
    ]


def module_rows(pair: PairAudit, limit: int = MODULES_SHOWN) -> Rows:
    """The modules of a pair to worry about most."""
    head = ["module", "verdict", "sure", "overlap", "by chance", "inputs", "agreement", "norms", "ranks for 90 %"]
    worst = sorted(pair.modules, key=lambda module: (SEVERITY.index(module.verdict.name), module.verdict.confidence))
    return [head, *(_module_row(module) for module in reversed(worst[-limit:] if limit else worst))]


def _module_row(module: ModulePair) -> list[str]:
    return [
        *(module.name, module.verdict.name, f"{module.verdict.confidence:.2f}", f"{module.mean_overlap:.2f}"),
        *(f"{module.random:.2f}", f"{module.mean_input_overlap:.2f}", f"{module.agreement:+.2f}"),
        *(_times(module.frobenius_ratio), " and ".join(map(str, module.energy_ranks))),
    ]


def _times(ratio: float) -> str:
    """A ratio of norms, which is infinite where an update is nothing."""
    return f"{ratio:.3g} ×" if ratio < inf else "nothing in one"


def matrix_rows(audited: PoolAudit) -> Rows:
    """Every adapter by every other: what to do with the pair."""
    names = short_names(audited.labels)
    words = {(pair.first, pair.second): word_of(pair) for pair in audited.pairs}
    return [
        ["", *names],
        *(
            [name, *(words.get((min(row, column), max(row, column)), "") for column in range(len(names)))]
            for row, name in enumerate(names)
        ),
    ]


def sections(audited: PoolAudit, judged: Sequence[Eligibility], every_module: bool = False) -> list[Section]:
    """The tables of an audit."""
    tables: list[Section] = [("Adapters", adapter_rows(audited, judged))]
    if len(audited.adapters) > 2:
        tables.append(("What to do with each pair", matrix_rows(audited)))
    if audited.pairs:
        tables.append(("Pairs, the worst first", pair_rows(audited)))
        worst = worst_first(audited)[0]
        tables.append(("Modules of the worst pair", module_rows(worst, 0 if every_module else MODULES_SHOWN)))
    return tables


def notes(audited: PoolAudit, judged: Sequence[Eligibility]) -> list[str]:
    """What must be said below the tables."""
    said = []
    for name, adapter in zip(short_names(audited.labels), audited.adapters, strict=True):
        said += [f"{name}: {FLAGS[flag]} ({flag})" for flag in adapter.flags]
    said += [
        f"{name}: worse than the base on its own rows"
        for name, each in zip(short_names(audited.labels), judged, strict=True)
        if each.verdict == WEAK
    ]
    if all(each.verdict == UNKNOWN for each in judged):
        said.append(
            "Whether an adapter is any good its weights do not say: --data TASK-or-FILE, once for each, measures it."
        )
    return said


def structure_rows(structure: Structure, labels: Sequence[str]) -> Rows:
    """What a merge is made of: as saved, before it was cut to its rank, and as the spectra predict."""
    head = ["", *short_names(labels), "Q_min", "D"]
    kinds = {"as saved": structure.truncated, "before the cut": structure.untruncated, "predicted": structure.predicted}
    return [head, *(_outcome_row(name, outcome, len(labels)) for name, outcome in kinds.items())]


def _outcome_row(name: str, outcome: Outcome | None, count: int) -> list[str]:
    if outcome is None:
        return [name, *(show(None) for _ in range(count + 2))]
    return [name, *(f"{share:+.3f}" for share in outcome.shares), f"{outcome.quality:.3f}", f"{outcome.dominance:.3f}"]


def to_json(audited: PoolAudit, judged: Sequence[Eligibility]) -> dict[str, Any]:
    """JSON object of an audit: ``adapters`` (each with its ``eligibility``), ``pairs`` and ``recommendation``."""
    weak = [index for index, each in enumerate(judged) if each.verdict == WEAK]
    adapters: list[Mapping[str, Any]] = [
        {**adapter.to_dict(), "eligibility": each.to_dict()}
        for adapter, each in zip(audited.adapters, judged, strict=True)
    ]
    recommendation = advise(audited, weak).to_dict(audited.labels) if audited.pairs else None
    return {
        "adapters": adapters,
        "pairs": [pair.to_dict(audited.labels) for pair in worst_first(audited)],
        "recommendation": recommendation,
        "thresholds": vars(audited.thresholds),
    }
