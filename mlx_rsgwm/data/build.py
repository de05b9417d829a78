"""Corpora from the names of tasks: choosing questions, making rows, writing the folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.data.corpus import Corpus, CorpusRow, make_rows, save_corpus
from mlx_rsgwm.data.question_files import is_question_file
from mlx_rsgwm.data.select import select_questions
from mlx_rsgwm.data.template import find_template

DRAFT_ROWS, VERIFY_ROWS = 102, 100


def build_corpus(
    tasks: str | Sequence[str],
    out: str | Path,
    *,
    draft_rows: int = DRAFT_ROWS,
    verify_rows: int = VERIFY_ROWS,
    data: str | Path | None = None,
    split: str | None = None,
    offset: int = 0,
    template: str = "plain",
    seed: int = DEFAULT_SEED,
    true_equations: bool = False,
    replace: bool = False,
    progress: Progress = SILENT,
) -> Corpus:
    """Write the corpus folder ``out``: rows that teach to answer and rows that teach to judge answers.

    Args:
        tasks: embedded families (``change``, ``groups``, …), public data sets, or files of questions.
        draft_rows: rows per task that teach to answer.
        verify_rows: rows per task that teach to judge, half of them with a wrong answer.
        data: folder with ``<task>/<split>.jsonl`` for public data sets; None fetches them from the Hub.
        split: the split to take instead of the training one; of a file of one's own also ``all``.
        offset: questions of each task to pass over first.
        template: ``plain`` or ``chat``.
        seed: of the embedded families and of the wrong answers.
        true_equations: wrong answers state no false equation, so that a calculator cannot find them.
        replace: write over another corpus that is in the folder.
        progress: told what is taken of a file, and where there are fewer verify rows than asked for.

    Returns:
        The corpus as read back from the folder; ``rs.train`` takes it, or its folder.

    Raises:
        RsgwmError: an unknown task, template or split, numbers of rows out of range, rows that cannot be read,
            or another corpus in the folder.

    Example::

        rs.build_corpus("change", "corpus/change", draft_rows=200)
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if draft_rows < 0 or verify_rows < 0 or draft_rows + verify_rows == 0:
        raise RsgwmError("draft rows and verify rows must not be negative, and not both 0")
    if offset < 0:
        raise RsgwmError(f"the offset must not be negative, found {offset}")
    prompts = find_template(template)
    rows: list[CorpusRow] = []
    file_questions: list[str] = []
    splits: dict[str, str] = {}
    for task in names:
        own_file = is_question_file(task)
        wanted = None if own_file else max(draft_rows, 2 * verify_rows, 1)
        chosen = select_questions(task, "train", wanted, seed, None if data is None else Path(data), offset, split)
        made = make_rows(chosen.questions, draft_rows, verify_rows, seed, own_file, true_equations)
        judged = sum(row.role == "verify" for row in made)
        if chosen.note(task):
            progress.message(chosen.note(task))
        if judged < min(verify_rows, len(chosen.questions)):
            progress.message(
                f"{task}: {judged} verify rows instead of {verify_rows}: no wrong answer can be made for the others"
            )
        rows += made
        file_questions += chosen.file_questions
        splits[task] = chosen.split
    about = {"seed": seed, "tasks": names, "split": split or "train", "splits": splits}
    if true_equations:
        about["true_equations"] = True
    return save_corpus(Path(out), rows, prompts, about, file_questions, replace)
