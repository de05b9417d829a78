"""An answer as it comes: tokens of one that answers alone; of a pair the draft, then what became of it.

The answer stands there once: an accepted draft is the answer, and one that is returned although it was not accepted is
named by its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlx_rsgwm.cli.console import Console
from mlx_rsgwm.inference.draft import SAMPLED

if TYPE_CHECKING:
    from mlx_rsgwm.inference.draft import Answer, Draft
    from mlx_rsgwm.inference.loop import DraftVerify
    from mlx_rsgwm.inference.speaker import Exchange, Speaker

HALF = "\ufffd"  # what a decoder shows of a character whose other bytes are still to come


def tell_alone(console: Console, speaker: Speaker, question: str, before: Sequence[Exchange] = ()) -> dict[str, Any]:
    """Print the answer of one that answers alone as it comes; returns its row."""
    text, begun = "", False
    for piece in speaker.say(question, before):
        text += piece
        shown = piece if begun else piece.lstrip()
        begun = begun or bool(shown)
        console.piece(shown)
    console.line()
    return {"answer": text.strip(), "by": speaker.name}


def tell_pair(console: Console, pipeline: DraftVerify, question: str) -> dict[str, Any]:
    """Print drafts as they come, and what became of each; returns the answer's row with its ``steps``."""
    from mlx_rsgwm.inference.draft import Draft

    steps: list[dict[str, Any]] = []
    drafts: list[Draft] = []
    line = _DraftLine(console, pipeline)
    routed = _tell_route(console, pipeline, question)
    for step in pipeline.steps(question, line.watch):
        if not isinstance(step, Draft):
            _tell_end(console, pipeline, step, drafts)
            return {**row_of(pipeline, step), **routed, "steps": steps}
        if step.state == "drafted":
            line.end(step)
            steps.append({"attempt": step.attempt, "kind": step.kind, "text": step.text})
        else:
            drafts.append(step)
            steps[-1] |= _tell_verdict(console, pipeline, step)
    raise AssertionError("the last step is the answer")


def _tell_route(console: Console, pipeline: DraftVerify, question: str) -> dict[str, Any]:
    """Print which adapter drafts, where a router chooses."""
    from mlx_rsgwm.inference.routed import RoutedDraftVerify

    if not isinstance(pipeline, RoutedDraftVerify):
        return {}
    (drafter,), (route,) = pipeline.drafters_of([question]), pipeline.routes([question])
    console.line(f"drafted by {drafter} (the router's choice {route.name}, {route.margin:.2f} above the next)")
    return {"drafted_by": drafter, "route": route.name, "margin": route.margin}


class _DraftLine:
    """A draft while it is written."""

    def __init__(self, console: Console, pipeline: DraftVerify) -> None:
        self._console, self._tokenizer = console, pipeline.tokenizer
        self._attempt, self._shown = 0, ""

    def watch(self, attempt: int, tokens: Sequence[int]) -> None:
        """Show what has come since; see :meth:`DraftVerify.steps`."""
        text = self._tokenizer.decode(list(tokens)).lstrip()
        if not text.endswith(HALF):
            self._show(attempt, text)

    def end(self, draft: Draft) -> None:
        """The draft is whole."""
        self._show(draft.attempt, draft.text.strip(), draft.kind)
        self._console.line()

    def _show(self, attempt: int, text: str, kind: str = SAMPLED) -> None:
        if attempt != self._attempt:
            self._attempt, self._shown = attempt, ""
            self._console.piece(f"draft {attempt}: " if kind == SAMPLED else f"draft {attempt} ({kind}): ")
        if text.startswith(self._shown):
            self._console.piece(text[len(self._shown) :].rstrip())
            self._shown = text.rstrip()


def _tell_verdict(console: Console, pipeline: DraftVerify, draft: Draft) -> dict[str, Any]:
    from mlx_rsgwm.inference.pool import winner

    config = pipeline.config
    state = "accepted" if draft.accepted else "replaced" if draft.attempt < config.most else "not accepted"
    if draft.false_equation is not None:
        console.line(f"  {state}: {draft.false_equation} is false; not verified")
        return {"score": None, "accepted": False, "false_equation": draft.false_equation}
    each = {} if draft.signals is None else pipeline.by_adapter(draft.signals, config.score)
    below = "" if draft.accepted else f", below {config.threshold:.3f}"
    console.line(f"  {state}: {config.score} {draft.score:.3f}{below}{_said_by(each)}")
    judged = {"score": draft.score, "accepted": draft.accepted}
    return {**judged, "adapters": each, "won": winner(each)} if each else judged


def _tell_end(console: Console, pipeline: DraftVerify, answer: Answer, drafts: Sequence[Draft]) -> None:
    if answer.accepted:
        return
    if answer.text is None:
        console.line(f"no answer: no draft reached {pipeline.config.threshold:.3f}")
        return
    number = next(draft.attempt for draft in drafts if draft.text == answer.text)
    why = (
        f"its score, {answer.score:.3f}, is the highest"
        if answer.false_equation is None
        else "every draft states a false equation"
    )
    console.line(f"the answer is draft {number}, not accepted: {why}")


def _said_by(each: dict[str, float]) -> str:
    """What the adapters of a pool gave a draft, the highest first; nothing for a single verifier."""
    ranked = sorted(each.items(), key=lambda entry: -entry[1])
    return " (" + ", ".join(f"{name} {score:.3f}" for name, score in ranked) + ")" if ranked else ""


def row_of(pipeline: DraftVerify, answer: Answer) -> dict[str, Any]:
    """What is kept of a pair's answer."""
    return {
        "answer": None if answer.text is None else answer.text.strip(),
        "score": answer.score,
        "score_name": pipeline.config.score,
        "threshold": pipeline.config.threshold,
        "accepted": answer.accepted,
        "attempts": answer.attempts,
        **({"kind": answer.kind} if pipeline.config.drafts != SAMPLED else {}),
        **({"false_equation": answer.false_equation} if answer.false_equation is not None else {}),
    }
