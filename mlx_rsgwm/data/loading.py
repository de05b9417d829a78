"""Training data from a path: a corpus folder, or mlx-lm's JSON lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.nearest import nearest_path
from mlx_rsgwm.data.corpus import Corpus, load_corpus
from mlx_rsgwm.data.mlx_lm_rows import Examples, example_files, is_examples, load_examples
from mlx_rsgwm.models.base import HUB_ID


def load_data(
    path: Path,
    held_out: Path | None,
    mask_prompt: bool = False,
    all_turns: bool = False,
    features: Mapping[str, str] | None = None,
) -> tuple[Corpus | Examples, Corpus | Examples | None]:
    """Training and held-out rows; without ``held_out`` those of ``valid.jsonl`` beside the training rows, if any.

    Raises:
        RsgwmError: what :func:`load_corpus` or :func:`load_examples` raises; held-out rows that are the training rows.
    """
    if held_out is not None and held_out.exists() and path.exists() and held_out.samefile(path):
        raise RsgwmError(f"held-out rows and training rows are the same: {path}")
    data: Corpus | Examples
    if not path.exists() and HUB_ID.fullmatch(str(path)):
        raise RsgwmError(
            f"{path} does not exist; where it is a data set of the Hub, write its rows to train.jsonl in a folder first"
        )
    if not path.exists():
        raise RsgwmError(f"{path} does not exist{nearest_path(path)}")
    if not is_examples(path):
        data, beside = load_corpus(path), None
    else:
        train_file, beside = example_files(path)
        data = load_examples(train_file, mask_prompt, all_turns, features)
    if held_out is None and beside is None:
        return data, None
    chosen = held_out or beside
    assert chosen is not None
    held: Corpus | Examples
    if not is_examples(chosen):
        held = load_corpus(chosen)
    else:
        file = example_files(chosen)[0] if held_out else chosen
        held = load_examples(file, mask_prompt, all_turns, features)
    # A valid.jsonl that repeats train.jsonl is told by training: mlx-lm wants one, and people copy it.
    if held_out is not None and held.contents() <= data.contents():
        raise RsgwmError(f"held-out rows and training rows are the same: every row of {held_out} stands in {path}, too")
    return data, held


def load_test(
    path: Path, mask_prompt: bool = False, all_turns: bool = False, features: Mapping[str, str] | None = None
) -> Examples:
    """The rows of ``test.jsonl`` in the folder ``path``, or beside the file ``path``.

    Raises:
        RsgwmError: there is none; what :func:`load_examples` raises.
    """
    file = (path if path.is_dir() else path.parent) / "test.jsonl"
    if not file.is_file():
        raise RsgwmError(f"there is no {file} to test on; leave test off, or write it")
    if path.is_file() and path.samefile(file):
        raise RsgwmError(f"test rows and training rows are the same: {path}")
    return load_examples(file, mask_prompt, all_turns, features)
