"""These questions, for this purpose: an embedded family, a public data set, or a user's own file.

Families and public data sets have splits of their own. A file that serves several purposes is split by the content of
its rows (``row_hashes.share_of``): whatever the order, the number of files or duplicates, a row is on one side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.nearest import nearest
from mlx_rsgwm.data.disputed import AnsweredRow, describe_disputes, find_disputes
from mlx_rsgwm.data.public_sets import SOURCES
from mlx_rsgwm.data.question_files import SUFFIXES, is_question_file
from mlx_rsgwm.data.questions import Question, load_questions, read_own, select
from mlx_rsgwm.data.row_hashes import RowRecord, row_hash, share_of
from mlx_rsgwm.data.synthetic import FAMILIES, SPLITS, generate

EMBEDDED_LIMIT = 100
EVERY_ROW = "all"


@dataclass(frozen=True)
class Selection:
    """Questions and how they were chosen.

    ``split``: the data set's, or for a user's own file the share of its rows, or ``all``. ``file_questions`` are the
    texts of all rows of that file, ``rows`` their number; empty and None for everything else. ``disputes`` says which
    of the rows to train on answer the same question in two ways.
    """

    questions: list[Question]
    split: str
    rows: int | None = None
    file_questions: tuple[str, ...] = ()
    disputes: str = ""

    def note(self, task: str) -> str:
        """One line on what was taken of a user's own file, and what is odd about it; empty where nothing is to say."""
        disputed = f"{task}: {self.disputes}, and all of them are trained" if self.disputes else ""
        return "; ".join(line for line in (self._share(task), disputed) if line)

    def _share(self, task: str) -> str:
        if self.rows is None or self.split == EVERY_ROW:
            return ""
        return (
            f"{task}: {len(self.questions)} of {self.rows} rows, from its {self.split} share "
            f"(rows go by their content: train 6, calibration 2, test 2 in ten; --split {EVERY_ROW} takes every row)"
        )


def select_questions(
    task: str,
    purpose: str,
    limit: int | None,
    seed: int,
    data: Path | None = None,
    offset: int = 0,
    split: str | None = None,
    *,
    seen: RowRecord | None = None,
    shuffled: bool = False,
    revision: str | None = None,
) -> Selection:
    """Questions of a task for one ``purpose``: ``train``, ``calibration`` or ``test``.

    Embedded families have these three splits and use ``seed``. Public data sets take ``train`` for the first two
    (calibration questions from the end of it, training ones from its start, so that they do not meet) and their
    evaluation split for ``test``. Of a user's own file training and calibration get their shares. A test gets the
    whole file, unless the adapters have ``seen`` all of it (trained on, or left for another purpose): then it has
    served before, and the test gets its share. ``split`` overrides the choice; for a file it is a purpose or ``all``.
    ``shuffled`` orders files and data sets by ``seed``.

    Raises:
        RsgwmError: an unknown task or split, no rows for the purpose, whatever reading raises; rows of a file to
            calibrate or test on that answer the same question in two ways.
    """
    order = seed if shuffled else None
    if is_question_file(task):
        return _of_file(task, purpose, limit, offset, order, split, seen or RowRecord())
    if task in FAMILIES:
        wanted = generate(task, (limit or EMBEDDED_LIMIT) + offset, seed, split or purpose)
        return Selection(wanted[offset:], split or purpose)
    if task not in SOURCES:
        raise RsgwmError(unknown_task(task))
    if purpose == "test" or split is not None:
        chosen = load_questions(task, split, data, limit=limit, offset=offset, seed=order, revision=revision)
        return Selection(chosen, split or SOURCES[task].evaluation_split)
    everything = load_questions(task, "train", data)
    chosen = everything[::-1] if purpose == "calibration" else everything
    return Selection(chosen[offset : None if limit is None else offset + limit], "train")


def _of_file(
    task: str, purpose: str, limit: int | None, offset: int, order: int | None, split: str | None, seen: RowRecord
) -> Selection:
    if split not in (None, EVERY_ROW, *SPLITS):
        raise RsgwmError(f"{task}: the split of a file is {', '.join(SPLITS)} or {EVERY_ROW}, found {split!r}")
    questions, numbers, unit = read_own(Path(task))
    texts = tuple(question.question for question in questions)
    share = split or (purpose if purpose != "test" else _share_for_test(texts, seen))
    chosen = [question for question in questions if share in (EVERY_ROW, share_of(question.question))]
    if not chosen:
        raise RsgwmError(
            f"{task}: none of its {len(questions)} rows falls into its {share} share; give more rows, "
            f"or --split {EVERY_ROW} where the file serves nothing else"
        )
    rows = (AnsweredRow(number, each.question, each.gold) for number, each in zip(numbers, questions, strict=True))
    asked_twice = find_disputes(row for row in rows if share in (EVERY_ROW, share_of(row.question)))
    disputes = describe_disputes(asked_twice, unit) if asked_twice else ""
    if disputes and purpose != "train":
        raise RsgwmError(f"{task}: {disputes}; only one can be right: correct one row of each, or remove it")
    taken = select(chosen, limit=limit, offset=offset, seed=order)
    return Selection(taken, share, len(questions), texts, disputes)


def _share_for_test(texts: Sequence[str], seen: RowRecord) -> str:
    """A file whose rows are all known, used or left for another purpose, has served before; any other is a test."""
    return "test" if all(row_hash(text) in seen.in_files for text in texts) else EVERY_ROW


def unknown_task(task: str) -> str:
    """What is told of a task that there is not: the one that was likely meant, else all there are."""
    near = nearest(task, [*FAMILIES, *SOURCES])
    known = f"known are {', '.join([*FAMILIES, *SOURCES])}, or a file: {', '.join(SUFFIXES)}"
    return f"unknown task {task!r}; " + (f"did you mean {near!r}?" if near else known)
