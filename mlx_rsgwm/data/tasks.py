"""One way to name questions: an embedded family, a public data set, or a JSONL file."""

from __future__ import annotations

from pathlib import Path

from mlx_rsgwm.data.families import FAMILIES, generate
from mlx_rsgwm.data.sources import SOURCES, Question, load_jsonl, load_questions
from mlx_rsgwm.errors import RsgwmError

EMBEDDED_LIMIT = 100


def questions_for(
    task: str,
    purpose: str,
    limit: int | None,
    seed: int,
    data: Path | None = None,
    offset: int = 0,
    split: str | None = None,
) -> list[Question]:
    """Questions of a task for one ``purpose``: ``train``, ``calibration`` or ``test``.

    Embedded families have these three splits and use ``seed``. Public data sets take ``train`` for the first two
    (calibration questions from the end of it, training ones from its start, so that they do not meet) and their
    evaluation split for ``test``; a JSONL file is what it is. ``split`` overrides the choice.
    """
    if task.endswith(".jsonl"):
        return load_jsonl(Path(task), limit=limit, offset=offset)
    if task in FAMILIES:
        wanted = generate(task, (limit or EMBEDDED_LIMIT) + offset, seed, split or purpose)
        return wanted[offset:]
    if task not in SOURCES:
        raise RsgwmError(f"unknown task {task!r}; known are {', '.join([*FAMILIES, *SOURCES])}, or a .jsonl file")
    if purpose == "test" or split is not None:
        return load_questions(task, split, data, limit=limit, offset=offset)
    everything = load_questions(task, "train", data)
    chosen = everything[::-1] if purpose == "calibration" else everything
    return chosen[offset : None if limit is None else offset + limit]
