"""Recipes as text: a commented one for a user's own files of questions, sized by what is in them, and any in full."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import yaml

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.data.corpus import make_rows
from mlx_rsgwm.data.select import select_questions
from mlx_rsgwm.recipes.schema import Recipe

VERIFY_SHARE = 0.18  # as in the demo
MOST_ROWS, MOST_CALIBRATION, MOST_TEST = 800, 24, 50

TEXT = """\
# A whole job on your own questions: train, {merging}calibrate, evaluate, export.
#   rsgwm run {name} --dry-run      what would run, and for how long
#   rsgwm run {name} --out runs/own run it; the same command resumes
#   rsgwm run {name} --show         every setting, defaults too
base: {base}  # a Hub id, a folder, a .gguf file, or smollm2-135m
template: plain  # or chat, for the model's own chat format; rsgwm help train lists them
data:
  tasks:  # one adapter each; of a file 6 rows in 10 train, 2 calibrate, 2 test
{tasks}
  rows: {rows}  # to train on, over all files
  verify_share: {share}  # of them for the verifier: right and wrong answers{why}
  calibration_items: {calibration}  # questions of each file that settle score and threshold
train:
  epochs: 2  # times that each row is trained on
  learning_rate: 5.0e-4  # too high: the loss jumps; too low: it hardly falls
  rank: 16  # size of the adapter
  batch_size: 8  # less where memory is short
{merge}# own_mistakes:  # without the "# ": train a verifier on the drafter's mistakes, too; it has a report of its own
#   items: 48  # training questions of each file that are drafted on
#   attempts: 2  # drafts of each
#   rows: 48  # right and wrong drafts of each file to train on
#   epochs: 1  # times that each is trained on
loop:
  attempts: 3  # drafts of a question at most
  threshold: auto  # a number in [0, 1] accepts by that
  max_tokens: 256  # of an answer; shorter is faster
evaluate:
  items: {items}  # questions of each file
  timed: 8  # of them timed one by one
export:
  peft: true  # also write both adapters for PEFT
  parity: false  # true compares with torch: pip install 'mlx-rsgwm[torch]'
"""
MERGE = """\
merge:
  method: regmean  # rsgwm merge --list names the others
"""


def own_recipe(sources: Sequence[str], base: str, name: str) -> str:
    """The recipe's text; ``name`` is the file that it will be in.

    Raises:
        RsgwmError: a file that cannot be read, or that has too few questions to train, calibrate and test on.
    """
    purposes: dict[str, list[int]] = {"train": [], "calibration": [], "test": []}
    share = VERIFY_SHARE
    for source in sources:
        for purpose, counts in purposes.items():
            split = None if purpose != "test" else "test"
            counts.append(len(select_questions(source, purpose, None, DEFAULT_SEED, split=split).questions))
        share = min(share, _verify_share(source))
    rows = min(MOST_ROWS, int(len(sources) * min(purposes["train"]) / (1 - share)))
    if rows < 2 * len(sources):
        raise RsgwmError(
            f"{', '.join(sources)}: too few questions to train on; a recipe needs at least two of each file"
        )
    several = len(sources) > 1
    return TEXT.format(
        merging="merge, " if several else "",
        name=name,
        base=_quoted(base),
        tasks="\n".join(f"    - {_quoted(source)}" for source in sources),
        rows=rows,
        share=share,
        why="" if share else " (none: no wrong answers can be made from yours, as there are no numbers in them)",
        calibration=min(MOST_CALIBRATION, *purposes["calibration"]),
        merge=MERGE if several else "",
        items=min(MOST_TEST, *purposes["test"]),
    )


def written_out(recipe: Recipe) -> str:
    """The recipe as YAML with every setting, defaults too; ``load_recipe`` reads it back equal."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(recipe))), sort_keys=False, allow_unicode=True)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # which is YAML, too


def _verify_share(source: str) -> float:
    """The share of verifier rows that the questions of a file allow: none where no wrong answer can be made."""
    questions = select_questions(source, "train", None, DEFAULT_SEED).questions
    wanted = 2 * round(len(questions) / (1 - VERIFY_SHARE) * VERIFY_SHARE / 2)
    made = sum(row.role == "verify" for row in make_rows(questions, 0, wanted, DEFAULT_SEED, at_most=True))
    return VERIFY_SHARE if wanted and made >= wanted else 0.0
