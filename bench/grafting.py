"""What grafted drafts cost: six chains of a question beside one greedy draft, and what reading the prompt once saves.

    python bench/grafting.py [--base smollm2-135m] [--questions 8] [--max-tokens 32] [--trials 3]

The sides take turns, question by question, in one process: one greedy draft; six chains together, at batch size 1
(one question at a time); six chains one by one, each reading its prompt anew. Every chain writes ``--max-tokens``
tokens, for no end of text counts, so all sides decode equally far. The last line is JSON: medians of the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import find_template
from mlx_rsgwm.inference.grafting import GREEDY, SIX, grafted_drafts
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.split import split_head

TASK = "prices"


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of one call; drafts are token ids, so all is computed when it returns."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Parse, time in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    options = parser.parse_args()
    base = load_base(options.base, dtype="float32")
    parts, template = split_head(base.model), find_template("plain")
    prompts = [template.draft_prompt(base.tokenizer, q.question) for q in generate(TASK, options.questions, 0, "test")]

    def drafted(prompt: tuple[int, ...], kinds: tuple[str, ...]) -> Any:
        return grafted_drafts(base.model, parts, frozenset(), [prompt], kinds, max_tokens=options.max_tokens)

    sides: dict[str, Callable[[Any], Any]] = {
        "greedy": lambda prompt: drafted(prompt, (GREEDY,)),
        "six": lambda prompt: drafted(prompt, SIX),
        "apart": lambda prompt: [drafted(prompt, (kind,)) for kind in SIX],
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side(prompts[0])  # not timed: compiles
    for _ in range(options.trials):
        for prompt in prompts:
            for name, side in sides.items():
                times[name].append(seconds(lambda: side(prompt)))  # noqa: B023
    ratios = {
        "six_chains_over_greedy": [six / greedy for six, greedy in zip(times["six"], times["greedy"], strict=True)],
        "shared_prefix_saving": [1 - six / apart for six, apart in zip(times["six"], times["apart"], strict=True)],
    }
    medians = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    print(", ".join(f"{name} {statistics.median(values):.2f} s" for name, values in times.items()), flush=True)
    give_result({**medians, "versions": versions(), "times": times}, options.out, medians)


if __name__ == "__main__":
    main()
