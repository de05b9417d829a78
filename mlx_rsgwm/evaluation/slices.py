"""Fixed slices of test questions: which items, from where, in which order, so that another can ask the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.data.public_sets import SOURCES
from mlx_rsgwm.data.question_files import is_question_file
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.row_hashes import RowRecord
from mlx_rsgwm.data.select import select_questions
from mlx_rsgwm.data.synthetic import FAMILIES
from mlx_rsgwm.models.hub_files import readable

SLICES = ("first", "seeded")


@dataclass(frozen=True)
class Slice:
    """The first ``limit`` questions of a task, or of its order shuffled by ``seed``.

    ``folder`` holds ``<task>/<split>.jsonl``; without one public data sets come from the Hub at ``revision`` (None: its
    newest, which is looked up and recorded). Embedded families are drawn with ``seed`` either way.
    """

    task: str
    limit: int | None = 100
    how: str = "first"
    seed: int = DEFAULT_SEED
    split: str | None = None
    folder: Path | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.how not in SLICES:
            raise RsgwmError(f"slice must be one of {', '.join(SLICES)}, found {self.how!r}")
        if self.limit is not None and self.limit < 1:
            raise RsgwmError(f"items must be at least 1, found {self.limit}")


def read_slice(wanted: Slice, seen: RowRecord | None = None) -> tuple[list[Question], dict[str, Any]]:
    """The questions, and where they come from with a hash of their text and gold answers.

    ``seen``: what the adapters were trained and calibrated on; see :func:`~mlx_rsgwm.data.select.select_questions`.

    Raises:
        RsgwmError: an unknown task, a missing file, split or revision, bad rows, missing gold answers, ids given twice.
    """
    revision = None
    source = wanted.task if wanted.task not in FAMILIES else "embedded"
    if wanted.task in SOURCES:
        source = str(wanted.folder) if wanted.folder else SOURCES[wanted.task].hub
        if wanted.folder is None:
            revision = wanted.revision or newest_revision(source)
    chosen = select_questions(
        wanted.task, "test", wanted.limit, wanted.seed, wanted.folder, split=wanted.split,
        seen=seen, shuffled=wanted.how == "seeded", revision=revision,
    )  # fmt: skip
    about = {
        "task": wanted.task,
        "source": source,
        "revision": revision,
        "split": chosen.split,
        "slice": wanted.how,
        "limit": wanted.limit,
        "seed": wanted.seed if wanted.how == "seeded" or wanted.task in FAMILIES else None,
        "items": len(chosen.questions),
        **({"rows_in_file": chosen.rows, "note": chosen.note(wanted.task)} if chosen.rows is not None else {}),
        "sha256": files.sha256_json([asdict(question) for question in chosen.questions]),
    }
    return chosen.questions, about


def with_own_ids(slices: Sequence[tuple[Sequence[Question], Mapping[str, Any]]]) -> list[Question]:
    """All questions; an id that two files use gets its file's path before it."""
    counts = Counter(question.id for questions, _ in slices for question in questions)
    asked = []
    for questions, told in slices:
        for question in questions:
            shared = counts[question.id] > 1 and is_question_file(told["task"])
            asked.append(replace(question, id=f"{told['task']}:{question.id}") if shared else question)
    return asked


def newest_revision(hub: str) -> str:
    """The commit a Hub data set stands at now, so that what is loaded can be named."""
    from huggingface_hub import HfApi

    with readable(f"cannot ask the Hub for {hub}", "give a local folder with --questions"):
        revision = HfApi().dataset_info(hub).sha
    assert revision is not None
    return revision
