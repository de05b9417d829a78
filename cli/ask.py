"""``rsgwm ask``: a question, or a file of them, answered as it comes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_rsgwm.cli.console import Console, common_options, read_standard_input
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import PATH
from mlx_rsgwm.cli.options.speaker import open_speaker_or_pair, speaker_options

if TYPE_CHECKING:
    from mlx_rsgwm.inference.loop import DraftVerify
    from mlx_rsgwm.inference.speaker import Speaker


@click.command()
@click.argument("question", required=False)
@click.option(
    "--file",
    "path",
    type=PATH,
    help="Questions: one a line, or rows with question (or prompt) as JSON lines, a JSON array or a table (CSV, TSV), "
    "whatever the file is called; - for standard input.",
)
@shared.out("the answers to --file, as JSON lines; a stopped run resumes there")
@shared.batch_rows()
@speaker_options
@common_options
def ask(
    console: Console, question: str | None, path: Path | None, out: Path | None, batch_rows: int, **who: Any
) -> None:
    """Answer QUESTION. One adapter or a base just answers; a pair drafts, scores, and accepts or drafts again.

    \b
    Examples:
      rsgwm ask "Why is the sky blue?" --base smollm2-135m
      rsgwm ask "Why is the sky blue?" --adapter owner/name
      rsgwm ask --file questions.jsonl --out answers.jsonl --adapter merged

    \b
    Examples, after `rsgwm demo`:
      rsgwm ask "Ada has 12 pens and gets 7 more. How many pens does Ada have now?"
      echo "Tom has 3 boxes of 8 pens. How many pens?" | rsgwm ask -
      rsgwm ask --abstain "…"
    """
    from mlx_rsgwm.core.errors import RsgwmError

    if (question is None) == (path is None):
        raise RsgwmError("give either a question or --file; a question of - reads it from standard input")
    if path is not None:
        _ask_file(console, path, out, batch_rows, who)
        return
    if out is not None:
        raise RsgwmError("--out keeps the answers to --file; redirect a single answer, or take --json")
    text = (read_standard_input() if question == "-" else str(question)).strip()
    if not text:
        raise RsgwmError("the question is empty")
    if question != "-" and " " not in text and os.path.isfile(text):
        raise RsgwmError(f"{text} is a file; what it asks is answered with --file {text}")
    from mlx_rsgwm.cli.answers import tell_alone, tell_pair
    from mlx_rsgwm.inference.speaker import Speaker

    voice = open_speaker_or_pair(console, who)
    console.result(tell_alone(console, voice, text) if isinstance(voice, Speaker) else tell_pair(console, voice, text))


def _ask_file(console: Console, path: Path, out: Path | None, batch_rows: int, who: dict[str, Any]) -> None:
    from mlx_rsgwm.cli.ask_file import answer_file, claimed, questions_of
    from mlx_rsgwm.inference.speaker import Speaker

    asked = questions_of(path)
    with claimed(out, path):
        voice = open_speaker_or_pair(console, who)
        if isinstance(voice, Speaker):
            rows = answer_file(console, asked, out, voice.loop, lambda texts: _alone(voice, texts, batch_rows))
        else:
            rows = answer_file(console, asked, out, voice, lambda texts: _paired(voice, texts, batch_rows))
    console.result({"answers": rows, "batch_size": batch_rows})


def _alone(speaker: Speaker, questions: Sequence[str], batch_rows: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, (draft,) in speaker.loop.drafts_as_they_end(questions, 1, batch_rows):
        yield index, {"answer": draft.text.strip(), "by": speaker.name}


def _paired(pipeline: DraftVerify, questions: Sequence[str], batch_rows: int) -> Iterator[tuple[int, dict[str, Any]]]:
    from mlx_rsgwm.cli.answers import row_of
    from mlx_rsgwm.inference.draft import Answer

    if batch_rows == 1:
        for index, question in enumerate(questions):
            yield index, row_of(pipeline, pipeline.answer(question))
        return
    for index, step in pipeline.steps_many(questions, batch_rows):
        if isinstance(step, Answer):
            yield index, row_of(pipeline, step)
