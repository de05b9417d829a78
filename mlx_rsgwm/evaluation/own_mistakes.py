"""A corpus whose wrong answers are mistakes that adapters made themselves, for verifiers of their drafts.

Adapters draft on training questions alone; gold says which drafts are right. How rows are made of labelled drafts is
:mod:`mlx_rsgwm.data.hard_negatives`'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.files import is_present
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.data.corpus import MANIFEST_FILE, Corpus, CorpusRow, require_no_other, save_corpus
from mlx_rsgwm.data.hard_negatives import MixedRows, make_mixed_rows
from mlx_rsgwm.data.select import Selection, select_questions
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.evaluation.judging import label_drafts
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.open import load_base_for, slots_of, template_of
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import load_adapters

Source = str | Path


@dataclass(frozen=True)
class MistakePlan:
    """What to draft on and how: ``items`` questions of each task (None: ``verify_rows``) after the first ``offset``.

    Of each task come ``verify_rows`` rows in pairs of a right and a wrong answer, ``share`` of the wrong ones drafts,
    and ``draft_rows`` gold rows before them. Every adapter drafts ``attempts`` times. With ``true_equations`` no wrong
    answer states a false equation. ``at_most``: fewer rows where there are too few wrong answers, and no error.
    ``folder`` holds ``<task>/<split>.jsonl``; ``template`` is by default the adapters'.
    """

    tasks: tuple[str, ...]
    verify_rows: int = 100
    draft_rows: int = 0
    share: float = 0.75
    items: int | None = None
    offset: int = 0
    attempts: int = 2
    sampling: Sampling = field(default_factory=Sampling)
    batch_rows: int = 32
    folder: Path | None = None
    template: str | None = None
    seed: int = DEFAULT_SEED
    true_equations: bool = False
    at_most: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.verify_rows < 2 or self.verify_rows % 2:
            problems.append(
                f"verify_rows must be even and at least 2, for they come in pairs, found {self.verify_rows}"
            )
        if not 0 <= self.share <= 1:
            problems.append(f"share must be in [0, 1], found {self.share}")
        raise_problems("verifier pairs", problems, RsgwmError)

    @property
    def drafted_on(self) -> int:
        """Questions of each task that are drafted on."""
        return self.items or self.verify_rows


def build_from_mistakes(
    sources: Sequence[Source],
    base: str | None,
    plan: MistakePlan,
    out: Path,
    tell: Callable[[str], None] = lambda text: None,
    progress: Progress = SILENT,
    replace: bool = False,
) -> tuple[Corpus, dict[str, dict[str, int]]]:
    """Draft with the adapters ``sources`` and write the corpus; ``tell`` hears of every task.

    Returns:
        The corpus, and for each task the numbers of drafts, of right ones, and of pairs of either kind.

    Raises:
        RsgwmError: adapters that do not fit, no template, too few questions or mistakes, a corpus in ``out``
            without ``replace``.
    """
    require_no_other(out)  # before minutes of drafting
    if not replace and is_present(out / MANIFEST_FILE):
        raise RsgwmError(f"{out} already holds a corpus; --replace it, or choose another folder")
    count = max(plan.drafted_on, plan.draft_rows)
    chosen = {task: select_questions(task, "train", count, plan.seed, plan.folder, plan.offset) for task in plan.tasks}
    for task, selection in chosen.items():
        if selection.note(task):
            tell(selection.note(task))
    adapters = load_adapters(sources, base, progress=progress)
    template = template_of(adapters, plan.template)
    pipelines = _drafters(adapters, base, template, plan, progress)
    rows, counts = mistake_rows(pipelines, chosen, plan, tell, progress)
    about = mistakes_about(plan, adapters, counts)
    return save_corpus(out, rows, template, about, texts_of(chosen), replace), counts


def mistake_rows(
    pipelines: Sequence[DraftVerify],
    chosen: Mapping[str, Selection],
    plan: MistakePlan,
    tell: Callable[[str], None] = lambda text: None,
    progress: Progress = SILENT,
) -> tuple[list[CorpusRow], dict[str, dict[str, int]]]:
    """The rows that ``pipelines`` give by drafting on the questions ``chosen`` for each task; ``tell`` hears of each.

    Returns:
        The rows of a corpus, and for each task the numbers of drafts, of right ones, and of pairs of either kind.

    Raises:
        RsgwmError: too few mistakes, unless ``plan.at_most``.
    """
    rows: list[CorpusRow] = []
    counts = {}
    for task, selection in chosen.items():
        questions = selection.questions
        asked = questions[: plan.drafted_on]
        drafts = label_drafts(pipelines, asked, plan.batch_rows, progress)
        mixed = make_mixed_rows(
            asked, drafts, plan.verify_rows // 2, plan.share, plan.seed, plan.true_equations, plan.at_most
        )
        rows += [
            CorpusRow(f"{question.id}/draft", question.task, "draft", question.question, question.answer)
            for question in questions[: plan.draft_rows]
        ]
        rows += mixed.rows
        counts[task] = _counts([correct for item in drafts for _, correct in item], mixed)
        _tell_task(tell, task, counts[task], mixed.missing)
    return rows, counts


def _drafters(
    adapters: Sequence[Adapter], base: str | None, template: Template, plan: MistakePlan, progress: Progress
) -> list[DraftVerify]:
    slots = slots_of(
        load_base_for(adapters, base, progress), {f"from-{index}": adapter for index, adapter in enumerate(adapters)}
    )
    config = LoopConfig(plan.attempts, sampling=plan.sampling)
    return [DraftVerify(slots, template, name, None, config) for name in slots.names()]


def _counts(labels: Sequence[bool], mixed: MixedRows) -> dict[str, int]:
    return {
        "drafts": len(labels),
        "right": sum(labels),
        "drafted_pairs": mixed.drafted_pairs,
        "perturbed_pairs": mixed.perturbed_pairs,
    }


def _tell_task(tell: Callable[[str], None], task: str, counts: dict[str, int], missing: int) -> None:
    tell(
        f"{task}: {counts['right']} of {counts['drafts']} drafts right; {counts['drafted_pairs']} pairs with a wrong "
        f"draft, {counts['perturbed_pairs']} with perturbed gold"
    )
    if missing:
        tell(
            f"{task}: {missing} more were to have a wrong draft, but there are no more; more questions, or more drafts "
            "of each, give more"
        )


def mistakes_about(
    plan: MistakePlan, adapters: Sequence[Adapter], counts: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """What the corpus records of its making: JSON values."""
    origin = [{"name": adapter.name, "files": adapter.manifest.get("files", {})} for adapter in adapters]
    sampling = {name: value for name, value in asdict(plan.sampling).items() if name != "seed"}
    negatives = {
        "from": origin,
        "share": plan.share,
        "offset": plan.offset,
        **sampling,
        "attempts": plan.attempts,
        "counts": counts,
    }
    about = {"seed": plan.seed, "tasks": list(plan.tasks), "split": "train", "negatives": negatives}
    return about | ({"true_equations": True} if plan.true_equations else {})


def texts_of(chosen: Mapping[str, Selection]) -> list[str]:
    """All questions of the user's own files that the rows come from."""
    return [text for selection in chosen.values() for text in selection.file_questions]
