"""An audit as tables and as lines: what a terminal and a page show, the worst first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import PurePath
from typing import Any

from mlx_rsgwm.audit.adapter_audit import AdapterAudit
from mlx_rsgwm.audit.advice import Advice, word_of, worst_first
from mlx_rsgwm.audit.eligibility import UNKNOWN, WEAK, Eligibility
from mlx_rsgwm.audit.outcomes import WORST_DOMINANCE, WORST_QUALITY, Outcome, Structure
from mlx_rsgwm.audit.pair_audit import ModulePair, PairAudit
from mlx_rsgwm.audit.pool_audit import PoolAudit
from mlx_rsgwm.audit.retention import Behaviour, Retention
from mlx_rsgwm.audit.verdicts import SEVERITY
from mlx_rsgwm.core.tables import ABSENT, Rows, Section, aligned, show

MODULES_SHOWN = 10
FLAGS = {
    "low_utilisation": "uses less than a quarter of its rank",
    "high_rank_waste": "a smaller rank would hold the same",
    "concentrated_spectrum": "nearly all of it lies in one or two directions",
    "underutilised_capacity": "its stable rank is below a fifth of its rank",
}
ADAPTERS, MATRIX, PAIRS, MODULES = (
    "Adapters",
    "What to do with each pair",
    "Pairs, the worst first",
    "Modules of the worst pair",
)
STRUCTURE, RETENTION = "What of each is in the merge", "What the merge keeps of each, on rows that are new to it"
# What the heads of a table mean.
LEADS = {
    ADAPTERS: "norm: of the whole update; stable rank: directions that carry it; used: that over the rank; effective "
    "rank: small directions counted more; rank for 90 %: singular values with 90 % of the energy",
    MATRIX: "by the worst module of the pair",
    PAIRS: "overlap: of the directions that both write to, 0 to 1, and what chance would show; agreement: the same way "
    "(+1) or the opposite (−1); norms: how many times as large one is; cosine: between the updates",
    MODULES: "sure: how far from where the verdict would change, 0 to 1; inputs: overlap of the directions that both "
    "read; ranks for 90 %: how many directions of each were compared",
    STRUCTURE: "mean cosine of each to the merge; Q_min: the least; D: how unequal, above 0.2 one drowns another",
    RETENTION: "base, alone, merged: nats a token of the answers; kept: 1 as alone, 0 as the base, with 95 % intervals",
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
    tables: list[Section] = [(ADAPTERS, adapter_rows(audited, judged))]
    if len(audited.adapters) > 2:
        tables.append((MATRIX, matrix_rows(audited)))
    if audited.pairs:
        tables.append((PAIRS, pair_rows(audited)))
        worst = worst_first(audited)[0]
        tables.append((MODULES, module_rows(worst, 0 if every_module else MODULES_SHOWN)))
    return tables


def notes(audited: PoolAudit, judged: Sequence[Eligibility]) -> list[str]:
    """What must be said below the tables."""
    said = list(audited.warnings)
    for name, adapter, modules in zip(short_names(audited.labels), audited.adapters, audited.only_here, strict=True):
        said += [f"{name}: {FLAGS[flag]} ({flag})" for flag in adapter.flags]
        if modules:
            shown = ", ".join(modules[:2]) + (", …" if len(modules) > 2 else "")
            said.append(
                f"{name}: no other adapter has {len(modules)} of its {len(adapter.modules)} modules ({shown}), so that "
                "no pair was judged by them"
            )
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


def merge_sections(structure: Structure | None, behaviour: Behaviour | None, labels: Sequence[str]) -> list[Section]:
    """The tables of a finished merge."""
    tables: list[Section] = []
    if structure is not None:
        tables.append((STRUCTURE, structure_rows(structure, labels)))
    if behaviour is not None:
        tables.append((RETENTION, retention_rows(behaviour, labels)))
    return tables


def retention_rows(behaviour: Behaviour, labels: Sequence[str]) -> Rows:
    """One line a source, and what they come to."""
    head = ["adapter", "data", "rows", "base", "alone", "merged", "kept"]
    rows = [_retention_row(*each) for each in zip(short_names(labels), behaviour.sources, strict=True)]
    quality, dominance = (ABSENT if v is None else f"{v:.3f}" for v in (behaviour.quality, behaviour.dominance))
    return [head, *rows, ["", "", "", "", "", "", f"Q_min {quality}, D {dominance}"]]


def _retention_row(name: str, source: Retention) -> list[str]:
    return [
        *(name, source.data, str(source.rows)),
        *(f"{nll:.3f}" for nll in (source.base_nll, source.alone_nll, source.merged_nll)),
        share_of(source),
    ]


def share_of(source: Retention) -> str:
    """What is kept of a source, with its interval."""
    if source.share is None:
        return f"{ABSENT} (alone not clearly better than the base)"
    return show({"value": source.share, "low": source.low, "high": source.high})


def merge_notes(structure: Structure | None, behaviour: Behaviour | None, labels: Sequence[str]) -> list[str]:
    """What must be said of a finished merge."""
    said = []
    if structure is not None and structure.dominated:
        said.append(f"in its weights one of them drowns another: D is above {WORST_DOMINANCE}")
    if behaviour is None:
        return said
    names = short_names(labels)
    if "q_min" in behaviour.flags:
        known = {
            name: each.share for name, each in zip(names, behaviour.sources, strict=True) if each.share is not None
        }
        worst = min(known, key=lambda name: known[name])
        said.append(f"of {worst} it keeps {known[worst]:.0%}: Q_min is below {WORST_QUALITY}")
    if "dominance" in behaviour.flags:
        said.append(f"it keeps much more of one than of another: D is above {WORST_DOMINANCE}")
    if behaviour.quality is not None and not behaviour.flags:
        said.append(f"it keeps at least {WORST_QUALITY:.0%} of each that is better than the base")
    return said


def text(tables: Sequence[Section], said: Sequence[str]) -> str:
    """Titled tables for a terminal, what their heads mean in a line below each, and the notes."""
    blocks = [f"{title}\n{aligned(rows)}\n({LEADS[title]})" for title, rows in tables]
    return "\n\n".join([*blocks, *(["\n".join(said)] if said else [])])


def to_json(audited: PoolAudit, judged: Sequence[Eligibility], advice: Advice | None) -> dict[str, Any]:
    """JSON object of an audit: ``adapters`` (each with its ``eligibility``), ``pairs`` and ``recommendation``."""
    adapters: list[Mapping[str, Any]] = [
        {**adapter.to_dict(), "only_here": modules, "eligibility": each.to_dict()}
        for adapter, modules, each in zip(audited.adapters, audited.only_here, judged, strict=True)
    ]
    return {
        "adapters": adapters,
        "pairs": [pair.to_dict(audited.labels) for pair in worst_first(audited)],
        "recommendation": advice and advice.to_dict(audited.labels),
        "thresholds": vars(audited.thresholds),
        "warnings": list(audited.warnings),
    }
