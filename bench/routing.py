"""Routing: the share of new questions that go to their own task's adapter, and what choosing costs.

    python bench/routing.py POOL --drafter FOLDER --verifier FOLDER [--items 50] [--timed 12]

POOL is a pool with a router (``rsgwm pool route``), its adapters named by the embedded families that they were
trained on. Routing accuracy is of test questions, by task. ``added_latency``: choosing a question's adapter over
answering it by draft and verify, one question at a time, both sides in turns, median; ``bytes``: what the pool's
adapters take in memory, and the pair's. ``accuracy``: of greedy drafts by the routed adapters and by the pair's
drafter. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.evaluation.judging import judge
from mlx_rsgwm.evaluation.stats.intervals import share
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.open import open_pipeline
from mlx_rsgwm.inference.pair import ROLES
from mlx_rsgwm.inference.routed import RoutedDraftVerify

BATCH_ROWS = 48


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def added_latency(routed: RoutedDraftVerify, questions: list[str]) -> tuple[list[float], list[float]]:
    """Seconds to choose and to answer, by question, none of them asked before; the first is not timed."""
    chosen, answered = [], []
    for number, question in enumerate(questions):
        choosing = seconds(lambda: routed.routes([question]))  # noqa: B023
        answering = seconds(lambda: routed.answer(question))  # noqa: B023
        if number:
            chosen.append(choosing)
            answered.append(answering)
    return chosen, answered


def right(pipeline: Any, questions: list[Question]) -> int:
    """How many first drafts are right."""
    drafted = pipeline.draft_many([q.question for q in questions], 1, BATCH_ROWS)
    return sum(judge(q, drafts[0], {}).correct for q, drafts in zip(questions, drafted, strict=True))


def main() -> None:
    """Parse, route, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pool", type=Path)
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--verifier", type=Path, required=True)
    parser.add_argument("--items", type=int, default=50, help="test questions of each task")
    parser.add_argument("--timed", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    options = parser.parse_args()
    routed = open_pipeline(options.drafter, options.verifier, router=options.pool, max_tokens=32, temperature=0.0)
    assert isinstance(routed, RoutedDraftVerify)
    questions = [q for task in routed.router.names for q in generate(task, options.items, options.seed, "test")]
    routes = routed.routes([q.question for q in questions])
    hits = dict.fromkeys(routed.router.names, 0)
    for question, route in zip(questions, routes, strict=True):
        hits[question.task] += route.name == question.task
    each = -(-(options.timed + 1) // len(hits))
    timed = [q.question for task in hits for q in generate(task, each, options.seed + 1, "test")]
    new = [text for text in timed if text not in {q.question for q in questions}][: options.timed + 1]
    chosen, answered = added_latency(routed, new)
    merged = DraftVerify(routed.slots, routed.template, "drafter", routed.verifiers, routed.config)
    answers = {name: right(side, questions) for name, side in (("routed", routed), ("merged", merged))}
    resident = routed.slots.memory()["adapters"]
    result = {
        "to_their_adapter": asdict(share(sum(hits.values()), len(questions))),
        "by_task": {task: count / options.items for task, count in hits.items()},
        "accuracy": {name: asdict(share(count, len(questions))) for name, count in answers.items()},
        "added_latency": round(statistics.median(c / a for c, a in zip(chosen, answered, strict=True)), 4),
        "choosing_ms": round(1000 * statistics.median(chosen), 1),
        "answering_ms": round(1000 * statistics.median(answered), 1),
        "bytes": {"pair": sum(resident[name] for name in ROLES), "pool": sum(resident[name] for name in hits)},
    }
    give_result({**result, "versions": versions()}, options.out, result)


if __name__ == "__main__":
    main()
