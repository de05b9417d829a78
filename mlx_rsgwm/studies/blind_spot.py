"""What sampling never finds: questions that six samples all miss, and what grafted chains find there at equal compute.

A stratum of questions that sampling missed shrinks by itself when it is asked again. So the control is six fresh
samples on the same questions: what chains find beyond that is theirs (arXiv 2606.19636 has no such control).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.resume import Journal
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.evaluation.judging import judge
from mlx_rsgwm.evaluation.stats.intervals import share
from mlx_rsgwm.evaluation.stats.paired import mcnemar
from mlx_rsgwm.inference.draft import Draft
from mlx_rsgwm.inference.grafting import GREEDY, KINDS, SIX, graft_many
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.studies.blind_spot_report import render_page

SAMPLES = 6
JOURNAL_FILE, PAGE_FILE, RESULT_FILE = "journal.jsonl", "blindspot.html", "blindspot.json"
SAMPLED, FRESH, GRAFTED = "sampled", "fresh", "grafted"
CHAINS = (GREEDY, *KINDS)
# R_k: the chains of which any may be right.
SETS: Mapping[str, tuple[str, ...]] = {f"R_{k}": CHAINS[:k] for k in range(1, len(CHAINS) + 1)}


@dataclass(frozen=True)
class Tried:
    """One draft: which chain or sample it is, whether it is right, its text and its number of tokens."""

    kind: str
    correct: bool
    text: str
    tokens: int


Arm = dict[str, tuple[Tried, ...]]  # by the question's id


def find_blind_spot(
    pipeline: DraftVerify,
    questions: Sequence[Question],
    out: Path,
    about: Mapping[str, Any],
    layer: int | None = None,
    batch_rows: int = 32,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Draft all arms, which go on where they were cut off, and write ``blindspot.json`` and a page.

    ``about``: what the drafts depend on.

    Raises:
        RsgwmError: ``out`` has another run's drafts, and as :func:`~mlx_rsgwm.inference.grafting.grafted_drafts`.
    """
    sampling = pipeline.config.sampling
    arms: dict[str, Arm] = {name: {} for name in (SAMPLED, FRESH, GRAFTED)}

    def take(row: Any, _: str) -> None:
        arms[row["arm"]][row["id"]] = tuple(Tried(**draft) for draft in row["drafts"])

    journal = Journal(out / JOURNAL_FILE, {**about, "layer": layer, "samples": SAMPLES}, take)
    fresh = pipeline.with_config(replace(pipeline.config, sampling=replace(sampling, seed=sampling.seed + 1)))

    def fill(arm: str, asked: Sequence[Question], drafted: Any) -> None:
        missing = [question for question in asked if question.id not in arms[arm]]
        for start in range(0, len(missing), batch_rows):
            block = missing[start : start + batch_rows]
            drafts = drafted([question.question for question in block])
            tried = {
                question.id: tuple(_tried(question, draft) for draft in row)
                for question, row in zip(block, drafts, strict=True)
            }
            journal.append(
                {"arm": arm, "id": name, "drafts": [asdict(draft) for draft in row]} for name, row in tried.items()
            )
            arms[arm].update(tried)

    fill(SAMPLED, questions, lambda texts: pipeline.draft_many(texts, SAMPLES, batch_rows, progress))
    stratum = [q for q in questions if not any(draft.correct for draft in arms[SAMPLED][q.id])]
    fill(GRAFTED, stratum, lambda texts: graft_many(pipeline, texts, CHAINS, layer, batch_rows, progress))
    fill(FRESH, stratum, lambda texts: fresh.draft_many(texts, SAMPLES, batch_rows, progress))
    summary = {**summarise([q.id for q in questions], [q.id for q in stratum], arms), "about": dict(about)}
    summary["items"] = [_shown(question, arms) for question in stratum]
    files.write_text(out / PAGE_FILE, render_page(summary))
    files.write_json(out / RESULT_FILE, summary)
    return summary


def summarise(questions: Sequence[str], stratum: Sequence[str], arms: Mapping[str, Arm]) -> dict[str, Any]:
    """Sizes, recoveries with intervals, the paired test against fresh samples, Jaccard indices, tokens spent."""
    right = {kind: {name for name in stratum if _right(arms[GRAFTED][name], (kind,))} for kind in CHAINS}
    chains = [_right(arms[GRAFTED][name], SIX) for name in stratum]
    again = [any(draft.correct for draft in arms[FRESH][name]) for name in stratum]
    pairs = jaccards(right, set(stratum))
    told: dict[str, Any] = {
        "questions": len(questions),
        "stratum": share(len(stratum), len(questions)).to_dict(),
        "recovery": {
            name: share(sum(_right(arms[GRAFTED][item], kinds) for item in stratum), len(stratum)).to_dict()
            for name, kinds in SETS.items()
        }
        if stratum
        else {},
        "by_kind": {kind: len(items) for kind, items in right.items()},
        "tokens": {
            SAMPLED: sum(draft.tokens for row in arms[SAMPLED].values() for draft in row),
            FRESH: sum(draft.tokens for name in stratum for draft in arms[FRESH][name]),
            GRAFTED: sum(draft.tokens for name in stratum for draft in arms[GRAFTED][name] if draft.kind in SIX),
        },
        "jaccard": {name: max(indices.values(), default=None) for name, indices in pairs.items()},
        "jaccard_pairs": pairs,
    }
    if stratum:
        told["fresh"] = share(sum(again), len(stratum)).to_dict()
        test = mcnemar(again, chains)
        told["chains_over_fresh"] = {  # difference: of shares, chains minus fresh samples
            "n": test.n, "only_fresh": test.only_first, "only_chains": test.only_second,
            "difference": test.difference, "p_value": test.p_value,
        }  # fmt: skip
    return told


def jaccards(right: Mapping[str, set[str]], stratum: set[str]) -> dict[str, dict[str, float]]:
    """Jaccard indices of every two kinds, as ``a, b``: of what they get right and greedy does not (``fixed``), and of
    what they get wrong (``errors``, what the source's script computes); without pairs of empty sets.
    """
    fixed = {kind: items - right[GREEDY] for kind, items in right.items() if kind != GREEDY}
    errors = {kind: stratum - items for kind, items in right.items() if kind != GREEDY}
    return {name: _by_pair(sets) for name, sets in (("fixed", fixed), ("errors", errors))}


def _by_pair(sets: Mapping[str, set[str]]) -> dict[str, float]:
    pairs = combinations(sets.items(), 2)
    return {
        f"{a}, {b}": len(first & second) / len(first | second) for (a, first), (b, second) in pairs if first | second
    }


def _right(drafts: Sequence[Tried], kinds: Sequence[str]) -> bool:
    return any(draft.correct for draft in drafts if draft.kind in kinds)


def _tried(question: Question, draft: Draft) -> Tried:
    return Tried(draft.kind, judge(question, draft, {}).correct, draft.text, len(draft.tokens))


def _shown(question: Question, arms: Mapping[str, Arm]) -> dict[str, Any]:
    chains = arms[GRAFTED][question.id]
    return {
        "id": question.id,
        "question": question.question,
        "gold": question.gold,
        "fresh": any(draft.correct for draft in arms[FRESH][question.id]),
        "chains": {draft.kind: {"text": draft.text, "correct": draft.correct} for draft in chains},
    }
