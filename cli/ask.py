"""``rsgwm ask``: one question, with the drafts and their scores as they come."""

from __future__ import annotations

from typing import Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.loop_options import build_pipeline, loop_options


@click.command()
@click.argument("question")
@loop_options
@common_options
def ask(console: Console, question: str, **loop: Any) -> None:
    """Answer QUESTION: draft, score, accept or draft again, and return the best with its score.

    Example, after `rsgwm demo`: rsgwm ask "Ada has 12 pens and gets 7 more. How many pens does Ada have now?"
    """
    from mlx_rsgwm.errors import RsgwmError
    from mlx_rsgwm.pipeline.loop import Answer, Drafted, Scored

    if not question.strip():
        raise RsgwmError("the question is empty")
    pipeline = build_pipeline(console, loop)
    steps = []
    for step in pipeline.steps(question):
        if isinstance(step, Drafted):
            console.line(f"draft {step.attempt}: {' / '.join(step.text.strip().splitlines())}")
            steps.append({"attempt": step.attempt, "text": step.text})
        elif isinstance(step, Scored):
            verdict = "accepted" if step.accepted else f"below {pipeline.config.threshold:.3f}"
            console.line(f"  {pipeline.config.score} {step.score:.3f}, {verdict}")
            steps[-1] |= {"score": step.score, "accepted": step.accepted}
        elif isinstance(step, Answer):
            state = "" if step.accepted else " (not accepted: the best of the drafts)"
            console.line(f"answer, score {step.score:.3f}{state}:\n{step.text.strip()}")
            console.result(
                {
                    "answer": step.text.strip(),
                    "score": step.score,
                    "score_name": pipeline.config.score,
                    "threshold": pipeline.config.threshold,
                    "accepted": step.accepted,
                    "attempts": step.attempts,
                    "steps": steps,
                }
            )
