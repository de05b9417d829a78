"""Fixed slices of test questions: which items, from where, in which order, so that another can ask the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_rsgwm import files
from mlx_rsgwm.data.families import FAMILIES, generate
from mlx_rsgwm.data.sources import SOURCES, Question, load_jsonl, load_questions
from mlx_rsgwm.errors import RsgwmError

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
    seed: int = 42
    split: str | None = None
    folder: Path | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.how not in SLICES:
            raise RsgwmError(f"slice must be one of {', '.join(SLICES)}, found {self.how!r}")
        if self.limit is not None and self.limit < 1:
            raise RsgwmError(f"--limit must be at least 1, found {self.limit}")


def read_slice(wanted: Slice) -> tuple[list[Question], dict[str, Any]]:
    """The questions, and where they come from with a hash of their text and gold answers.

    Raises:
        RsgwmError: an unknown task, a missing file, split or revision, bad rows, missing gold answers, ids given twice.
    """
    order = wanted.seed if wanted.how == "seeded" else None
    revision = None
    if wanted.task.endswith(".jsonl"):
        source = wanted.task
        questions = load_jsonl(Path(wanted.task), limit=wanted.limit, seed=order)
    elif wanted.task in FAMILIES:
        source = "embedded"
        questions = generate(wanted.task, wanted.limit or 100, wanted.seed, wanted.split or "test")
    elif wanted.task in SOURCES:
        if wanted.folder is None:
            source = SOURCES[wanted.task].hub
            revision = wanted.revision or newest_revision(source)
        else:
            source = str(wanted.folder)
        questions = load_questions(
            wanted.task, wanted.split, wanted.folder, limit=wanted.limit, seed=order, revision=revision
        )
    else:
        raise RsgwmError(
            f"unknown task {wanted.task!r}; known are {', '.join([*FAMILIES, *SOURCES])}, or a .jsonl file"
        )
    about = {
        "task": wanted.task,
        "source": source,
        "revision": revision,
        "split": wanted.split or (SOURCES[wanted.task].evaluation_split if wanted.task in SOURCES else "test"),
        "slice": wanted.how,
        "limit": wanted.limit,
        "seed": wanted.seed if wanted.how == "seeded" or wanted.task in FAMILIES else None,
        "items": len(questions),
        "sha256": files.sha256_json([asdict(question) for question in questions]),
    }
    return questions, about


def newest_revision(hub: str) -> str:
    """The commit a Hub data set stands at now, so that what is loaded can be named."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().dataset_info(hub).sha
    except Exception as error:  # the Hub client raises its own, httpx's and the disk's errors; all mean the same
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RsgwmError(f"cannot ask the Hub for {hub}: {reason}; give a local folder with --data") from error
    assert found is not None
    return found
