"""Questions of public data sets for studies that train on them, those published with a single split, too."""

from __future__ import annotations

from pathlib import Path

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.public_sets import SOURCES
from mlx_rsgwm.data.questions import Question, load_questions, select
from mlx_rsgwm.data.row_hashes import share_of

# Data sets without a file to train on: these splits are taken together, and shared out by the content of their rows.
SHARED_OUT = {"mawps": ("addsub", "multiarith", "singleeq", "singleop"), "svamp": ("test",)}


def public_questions(task: str, purpose: str, count: int, seed: int, data: Path | None) -> list[Question]:
    """At most ``count`` questions to ``train`` on or to ``test`` with, in an order of ``seed``; the two never meet.

    ``data`` is a folder of ``<task>/<split>.jsonl``; None asks the Hub.

    Raises:
        RsgwmError: a task that is no public data set, and whatever reading raises.
    """
    if task not in SOURCES:
        raise RsgwmError(f"{task!r} is no public data set; known are {', '.join(SOURCES)}")
    if task not in SHARED_OUT:
        split = "train" if purpose == "train" else None
        return load_questions(task, split, data, limit=count, seed=seed)
    everything = [each for split in SHARED_OUT[task] for each in load_questions(task, split, data)]
    chosen = {each.question: each for each in everything if share_of(each.question) == purpose}
    return select(list(chosen.values()), limit=count, seed=seed)
