"""The last lines of a run: what was trained, what checking did, one question, what to type next. No statistics needed.

At most 15 lines of 80 characters, but for paths and commands that are longer themselves.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_rsgwm.core.tables import shortened
from mlx_rsgwm.evaluation.report.folder import HTML_FILE, headline
from mlx_rsgwm.evaluation.report.outcome import Outcome, acceptance, cost, percent, verdict
from mlx_rsgwm.evaluation.stats.intervals import Rate

LINES, WIDTH = 15, 80
BAR = 44  # characters of a bar for 100 %


def ending(report: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    """The lines for what report.json and summary.json hold."""
    outcome = Outcome.of(report)
    alarm = headline(report)
    above = [
        *(textwrap.wrap(alarm, WIDTH) if alarm else []),
        *_trained(report, summary),
        f"  before checking  {bar(outcome.before)}",
        f"  after checking   {bar(outcome.after)}",
        verdict(outcome),
        acceptance(outcome),
        *_with_arithmetic(report),
        *_with_more_training(summary),
        cost(outcome),
        *_exchange(report),
    ]
    last = f"Report: {summary['report']}/{HTML_FILE} (its tables here: --verbose)"
    room = max(0, LINES - 1 - len(above))
    return [*above, *_next(summary)[:room], last]


def bar(rate: Rate) -> str:
    """A bar as long as the rate is large, and the rate."""
    filled = round(BAR * rate.value)
    return f"{'█' * filled}{'░' * (BAR - filled)} {percent(rate)}"


def _trained(report: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    tasks, base = summary["tasks"], shortened(str(summary["base"]["name"]), 20)
    if len(tasks) == 1:
        trained = f"One adapter trained on {base} drafts the answers and verifies them."
    else:
        trained = f"{len(tasks)} adapters trained on {base}, merged into drafter and verifier."
    questions = f"{report['n']} {'' if headline(report) else 'new '}questions ("
    end = "), right answers:"
    asked = ", ".join(report["by_task"])
    return [trained, f"{questions}{shortened(asked, WIDTH - len(questions) - len(end))}{end}"]


def _with_arithmetic(report: Mapping[str, Any]) -> list[str]:
    checked = report.get("draft_verify_arithmetic")
    if not checked:
        return []
    return [f"With false equations rejected, too, as ask does: {percent(Rate(**checked['accuracy']))} right."]


def _with_more_training(summary: Mapping[str, Any]) -> list[str]:
    trained = summary.get("draft_verify_own_mistakes")
    if not trained:
        return []
    return [f"With a verifier trained on the drafter's own mistakes: {percent(Rate(**trained['accuracy']))} right."]


def _exchange(report: Mapping[str, Any]) -> list[str]:
    """A question, its rejected draft and the accepted one; nothing where no later draft was accepted."""
    told = report.get("exchange")
    if told is None:
        return []
    lines = [shortened(f"“{told['question']}”", WIDTH)]
    for draft in told["drafts"]:
        mark = "right" if draft["correct"] else "wrong" if draft["value"] is not None else "no answer"
        before, after = f"  {draft['state']}  ", f"  ({mark}, score {draft['score']:.2f})"
        text = " ".join(draft["text"].replace("####", "→").split())
        lines.append(f"{before}{shortened(text, WIDTH - len(before) - len(after))}{after}")
    return lines


def _next(summary: Mapping[str, Any]) -> list[str]:
    pair = " ".join(f"--{role} {shlex.quote(folder)}" for role, folder in summary["adapters"].items())
    commands: Sequence[str] = (
        f"rsgwm chat {pair}",
        "rsgwm merge YOUR_A YOUR_B --out c && rsgwm chat --adapter c",
        "rsgwm recipe init YOUR.jsonl --out own.yaml && rsgwm run own.yaml",
    )
    return [f"{'Next:' if place == 0 else ''}".ljust(6) + command for place, command in enumerate(commands)]
