"""Routing without rows: the share of new questions that go to their own task's adapter by what training kept of its
prompts, against the same rule fitted on the rows.

    python bench/routing_states.py POOL --corpus FOLDER [--items 75] [--questions 8]

POOL has adapters named by the embedded families that they were trained on, FOLDER their corpora under the same names.
Where an adapter keeps no prompt states, or ``--questions`` says of how many each side is made, they are read here as
training reads them. ``right``: test questions that go to their task's adapter. ``below_margin``: those whose first
choice by what is kept is less than 0.9 above the second, so that the merged drafter answers, by whether it is wrong,
right, or of a family outside the pool. The last line is JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.corpus import Corpus, load_corpus
from mlx_rsgwm.data.synthetic import FAMILIES, generate
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.evaluation.stats.intervals import share
from mlx_rsgwm.inference.open import load_base_for, template_of
from mlx_rsgwm.inference.routing import UNTRIED_MARGIN, Route, Router, fit_router, router_of_statistics
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import load_adapters
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.prompt_states import prompt_states
from mlx_rsgwm.models.prompt_statistics import PromptStatistics, statistics_of_pool
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.prompt_statistics import prompt_statistics


def statistics_of(
    adapters: Sequence[Adapter], corpora: Mapping[str, Corpus], base: Base, seed: int, anew: bool
) -> tuple[dict[str, PromptStatistics], float]:
    """What every adapter keeps, or training would keep now; and the seconds that reading took, for one adapter."""
    if not anew and all(adapter.prompt_states for adapter in adapters):
        return statistics_of_pool(adapters), 0.0
    started = time.perf_counter()
    config = TrainConfig(seed=seed)
    statistics = {name: prompt_statistics(base, corpus, config) for name, corpus in corpora.items()}
    return statistics, (time.perf_counter() - started) / len(statistics)


def asked(tasks: Sequence[str], items: int, seed: int) -> tuple[list[str], list[str]]:
    """Test questions of the tasks, and each one's task."""
    questions = [question for task in tasks for question in generate(task, items, seed, "test")]
    return [question.question for question in questions], [question.task for question in questions]


def routes_of(router: Router, base: Base, template: Template, questions: Sequence[str]) -> list[Route]:
    """The router's choices."""
    prompts = [template.draft_prompt(base.tokenizer, text) for text in questions]
    return router.routes(prompt_states(base, prompts, router.layer))


def main() -> None:
    """Parse, fit both, route, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pool", type=Path)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with a corpus under each adapter's name")
    parser.add_argument("--items", type=int, default=75, help="test questions of each family")
    parser.add_argument("--questions", type=int, help="make both of so many of each task, from 5  [default: all]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    options = parser.parse_args()
    adapters = load_adapters([options.pool], None, lazy=True)
    base, template = load_base_for(adapters, None), template_of(adapters)
    corpora = {adapter.name: load_corpus(options.corpus / adapter.name) for adapter in adapters}
    rows = {
        name: list(dict.fromkeys(row.question for row in corpus.rows))[: options.questions]
        for name, corpus in corpora.items()
    }
    corpora = {
        name: replace(corpus, rows=tuple(row for row in corpus.rows if row.question in set(rows[name])))
        for name, corpus in corpora.items()
    }
    statistics, reading = statistics_of(adapters, corpora, base, options.seed, options.questions is not None)
    routers = {
        "kept": router_of_statistics(statistics),
        "corpus": fit_router(base, template, rows, "distance"),
    }
    questions, tasks = asked(list(corpora), options.items, options.seed)
    outside, _ = asked([name for name in FAMILIES if name not in corpora], options.items, options.seed)
    routes = {name: routes_of(router, base, template, questions) for name, router in routers.items()}
    names = {name: np.array([route.name for route in of]) for name, of in routes.items()}
    right = {name: chosen == np.array(tasks) for name, chosen in names.items()}
    margins = np.array([route.margin for route in routes["kept"]])
    strangers = np.array([route.margin for route in routes_of(routers["kept"], base, template, outside)])
    groups = {"wrong": margins[~right["kept"]], "right": margins[right["kept"]], "outside": strangers}
    result: dict[str, Any] = {
        "right": {name: asdict(share(int(hits.sum()), len(hits))) for name, hits in right.items()},
        "by_task": {
            name: {task: float(hits[np.array(tasks) == task].mean()) for task in corpora}
            for name, hits in right.items()
        },
        "alike": float((names["kept"] == names["corpus"]).mean()),
        "below_margin": {
            name: {"count": int((group < UNTRIED_MARGIN).sum()), "of": len(group)} for name, group in groups.items()
        },
        "questions": {name: {"kept": statistics[name].questions, "corpus": len(rows[name])} for name in corpora},
        "reading_seconds": round(reading, 2),
        "bytes": sum(array.nbytes for array in statistics[adapters[0].name].arrays().values()),
    }
    give_result({**result, "versions": versions()}, options.out, result)


if __name__ == "__main__":
    main()
