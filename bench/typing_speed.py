"""How soon ``rsgwm chat`` and ``mlx_lm.chat`` are ready, and how soon their first token stands there.

    python bench/typing_speed.py [--base smollm2-135m] [--trials 5] [--out results.json]

Each trial starts both programs anew, one after the other, the order turning from trial to trial, each in a
pseudo-terminal of its own and on the same folder of the base. Cold start is from the start of the process until its
prompt stands there. A question is typed, and the clock runs from Enter until the first letter of the answer; then a
second one is. Both decode greedily, with the base's own chat template and no system message.

Of two programs the other work of a machine falls on both; the ratios of medians hold on a busy one, the seconds do not.
The last line is JSON: ``cold_start_ratio``, ``first_token_ratio``, ``next_token_ratio`` (the second question), this
project's over the peer's, and each side's medians in seconds.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mlx_rsgwm.bench.terminal import Terminal
from mlx_rsgwm.core.files import write_json
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.models.base import resolve_base

QUESTIONS = ("Write a sentence about the sea.", "And one about the mountains.")
MEASURED = ("cold_start", "first_token", "next_token")
SETTLED = 0.5  # seconds until a typed line is drawn
PATIENCE = 300.0  # seconds until a side is given up


@dataclass(frozen=True)
class Side:
    """A program: how it is started on a base, what its prompt is, and what ends it."""

    command: tuple[str, ...]
    prompt: str
    end: str


def sides(base: Path, max_tokens: int) -> dict[str, Side]:
    """Both programs."""
    rsgwm = ("-m", "mlx_rsgwm", "chat", "--base", str(base), "--temperature", "0")
    mlx_lm = ("-m", "mlx_lm", "chat", "--model", str(base), "--temp", "0")
    length = ("--max-tokens", str(max_tokens))
    return {
        "rsgwm": Side((sys.executable, *rsgwm, *length), ">", "exit"),
        "mlx_lm": Side((sys.executable, *mlx_lm, *length), "›", "q"),
    }


def measure(side: Side) -> dict[str, float]:
    """Seconds of one start and of the first tokens of two answers."""
    terminal = Terminal(side.command)
    try:
        terminal.wait_for(_prompt(side), PATIENCE)
        seconds = {"cold_start": time.perf_counter() - terminal.started}
        for name, question in zip(MEASURED[1:], QUESTIONS, strict=True):
            seconds[name] = _first_letter(terminal, question)
            terminal.wait_for(_prompt(side), PATIENCE)
        terminal.send(f"{side.end}\r")
        terminal.process.wait(PATIENCE)
        return seconds
    finally:
        terminal.close()


def _prompt(side: Side) -> str:
    """A pattern of the prompt at the start of a line."""
    return rf"(?:^|[\r\n]){re.escape(side.prompt)}"


def _first_letter(terminal: Terminal, question: str) -> float:
    """Type a question, press Enter, and wait for a letter below it."""
    terminal.send(question)
    terminal.wait_for(re.escape(question), PATIENCE)
    time.sleep(SETTLED)
    terminal.wait_for(r"(?s).*", PATIENCE)  # what is drawn of the line
    terminal.send("\r")
    started = time.perf_counter()
    terminal.wait_for(rf"(?:{re.escape(question)})?\s*[\r\n]\s*[^\s>]", PATIENCE)
    return time.perf_counter() - started


def ratios(trials: dict[str, list[dict[str, float]]]) -> dict[str, object]:
    """Each side's medians in seconds, and ours over theirs."""
    medians = {
        name: {what: statistics.median(trial[what] for trial in runs) for what in MEASURED}
        for name, runs in trials.items()
    }
    over = {f"{what}_ratio": medians["rsgwm"][what] / medians["mlx_lm"][what] for what in MEASURED}
    return {**over, **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    programs = sides(resolve_base(options.base).resolve(), options.max_tokens)
    for side in programs.values():
        measure(side)  # not counted: the system's cache gets warm
    trials: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for trial in range(options.trials):
        for name in list(programs) if trial % 2 else list(programs)[::-1]:
            trials[name].append(measure(programs[name]))
            shown = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in trials[name][-1].items())
            print(f"{trial + 1}/{options.trials} {name}: {shown}", flush=True)
    result = {**ratios(trials), "base": options.base, "trials": options.trials, "versions": versions()}
    if options.out:
        write_json(options.out, {**result, "seconds": trials})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
