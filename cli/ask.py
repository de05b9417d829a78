"""``rsgwm ask`` and ``rsgwm chat``: questions, with the drafts and their scores as they come."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_rsgwm.cli.console import Console, check_text, common_options, read_standard_input
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import PATH
from mlx_rsgwm.cli.options.loop import build_pipeline, loop_options

if TYPE_CHECKING:
    from mlx_rsgwm.inference.loop import DraftVerify

Asked = tuple[str, str]  # id, question


@click.command()
@click.argument("question", required=False)
@click.option(
    "--file",
    "path",
    type=PATH,
    help="Questions, one a line, or a .jsonl, .json, .csv or .tsv file with a question (or prompt) in every row; - for "
    "standard input.",
)
@shared.batch_rows()
@loop_options(experiments=False)
@common_options
def ask(console: Console, question: str | None, path: Path | None, batch_rows: int, **loop: Any) -> None:
    """Answer QUESTION: draft, score, accept or draft again, and return the best with its score.

    \b
    Examples, after `rsgwm demo`:
      rsgwm ask "Ada has 12 pens and gets 7 more. How many pens does Ada have now?"
      echo "Tom has 3 boxes of 8 pens. How many pens?" | rsgwm ask -
      rsgwm ask --file questions.txt --json
      rsgwm ask --abstain "…"
    """
    from mlx_rsgwm.core.errors import RsgwmError

    if (question is None) == (path is None):
        raise RsgwmError("give either a question or --file; a question of - reads it from standard input")
    if path is not None:
        asked = _questions(path)
        _answer_all(console, build_pipeline(console, loop), asked, batch_rows)
        return
    text = read_standard_input() if question == "-" else str(question)
    if not text.strip():
        raise RsgwmError("the question is empty")
    console.result(_answer_one(console, build_pipeline(console, loop), text.strip()))


@click.command()
@loop_options(experiments=False)
@common_options
def chat(console: Console, **loop: Any) -> None:
    """Load base and adapters once and answer question after question, until an empty line or end of file.

    Every question stands alone: drafter and verifier were trained on single questions.

    Example, after `rsgwm demo`: rsgwm chat
    """
    from mlx_rsgwm.core.errors import RsgwmError

    pipeline = build_pipeline(console, loop)
    console.line("Ask; an empty line ends.")
    asked = accepted = 0
    while True:
        try:
            text = click.prompt(">", prompt_suffix=" ", default="", show_default=False).strip()
        except click.Abort:
            break
        if not text:
            break
        try:
            check_text(text, "the question")
            answer = _answer_one(console, pipeline, text)
        except (RsgwmError, click.UsageError) as error:
            console.line(str(error))
            continue
        except KeyboardInterrupt:
            console.line("(stopped)")
            continue
        asked, accepted = asked + 1, accepted + bool(answer["accepted"])
    console.line(f"{asked} questions, {accepted} answers accepted")
    console.result({"asked": asked, "accepted": accepted})


def _answer_one(console: Console, pipeline: DraftVerify, question: str) -> dict[str, Any]:
    from mlx_rsgwm.inference.draft import Answer
    from mlx_rsgwm.inference.pool import winner

    steps: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for step in pipeline.steps(question):
        if isinstance(step, Answer):
            state = "" if step.accepted else " (not accepted: the best of the drafts)"
            if step.text is None:
                console.line(f"no answer: no draft reached {pipeline.config.threshold:.3f}")
            elif step.false_equation is not None:
                console.line(f"answer (not accepted: every draft states a false equation):\n{step.text.strip()}")
            else:
                console.line(f"answer, score {step.score:.3f}{state}:\n{step.text.strip()}")
            result = {**_row(pipeline, step), "steps": steps}
        elif step.state == "drafted":
            console.line(f"draft {step.attempt}: {' / '.join(step.text.strip().splitlines())}")
            steps.append({"attempt": step.attempt, "text": step.text})
        elif step.false_equation is not None:
            console.line(f"  {step.false_equation} is false: not verified")
            steps[-1] |= {"score": None, "accepted": False, "false_equation": step.false_equation}
        else:
            verdict = "accepted" if step.accepted else f"below {pipeline.config.threshold:.3f}"
            each = {} if step.signals is None else pipeline.by_adapter(step.signals, pipeline.config.score)
            console.line(f"  {pipeline.config.score} {step.score:.3f}, {verdict}{_said_by(each)}")
            steps[-1] |= {"score": step.score, "accepted": step.accepted}
            if each:
                steps[-1] |= {"adapters": each, "won": winner(each)}
    return result


def _said_by(each: dict[str, float]) -> str:
    """What the adapters of a pool gave a draft, the highest first; nothing for a single verifier."""
    ranked = sorted(each.items(), key=lambda entry: -entry[1])
    return " (" + ", ".join(f"{name} {score:.3f}" for name, score in ranked) + ")" if ranked else ""


def _answer_all(console: Console, pipeline: DraftVerify, asked: list[Asked], batch_rows: int) -> None:
    """Answers in the questions' order, one JSON object a line, or question and answer as text."""
    questions = [question for _, question in asked]
    if batch_rows == 1:
        answers = [pipeline.answer(question) for question in questions]
    else:
        answers = pipeline.answer_many(questions, batch_rows, console.progress)
    rows = [
        {**({"id": row_id} if row_id else {}), "question": question, **_row(pipeline, answer)}
        for (row_id, question), answer in zip(asked, answers, strict=True)
    ]
    for row in rows:
        shown = "no answer" if row["answer"] is None else " / ".join(row["answer"].splitlines())
        state = "accepted" if row["accepted"] else "not accepted"
        why = f"{row['false_equation']} is false" if "false_equation" in row else f"score {row['score']:.3f}"
        console.line(f"{row['question']}\n  {shown} ({why}, {state}, {row['attempts']} attempts)")
    console.result({"answers": rows, "batch_size": batch_rows})


def _row(pipeline: DraftVerify, answer: Any) -> dict[str, Any]:
    return {
        "answer": None if answer.text is None else answer.text.strip(),
        "score": answer.score,
        "score_name": pipeline.config.score,
        "threshold": pipeline.config.threshold,
        "accepted": answer.accepted,
        "attempts": answer.attempts,
        **({"false_equation": answer.false_equation} if answer.false_equation is not None else {}),
    }


def _questions(path: Path) -> list[Asked]:
    """Ids (empty where there are none) and questions of a file."""
    from mlx_rsgwm.core.errors import RsgwmError, grouped, raise_problems
    from mlx_rsgwm.core.files import read_text
    from mlx_rsgwm.data.question_files import is_question_file, read_question_rows

    if str(path) == "-" or not is_question_file(path.name):
        text = read_standard_input() if str(path) == "-" else read_text(path)
        if text.lstrip().startswith(("{", "[{")):
            raise RsgwmError(f"{path} holds JSON, not one question a line; name it .jsonl or .json")
        asked = [("", line.strip()) for line in text.split("\n") if line.strip()]
    else:
        asked, problems = [], []
        unit, rows = read_question_rows(path)
        for number, row in rows:
            question = row.get("question", row.get("prompt")) if isinstance(row, dict) else None
            if isinstance(row, ValueError) or not isinstance(question, str) or not question.strip():
                reason = str(row) if isinstance(row, ValueError) else "no text under question or prompt"
                problems.append((f"{unit} {number}", reason))
                continue
            asked.append(("" if row.get("id") is None else str(row["id"]), question.strip()))
        raise_problems(str(path), grouped(problems))
    if not asked:
        raise RsgwmError(f"{path} holds no question")
    return asked
