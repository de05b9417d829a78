"""A sound command line for every command, by parameter, so that any one value can be replaced by what is odd.

Commands and parameters are those that click knows: a new command without an entry here fails a test, and a new
parameter is tried like the others.
"""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import yaml
from click.testing import CliRunner

from mlx_rsgwm.cli.groups import find_command
from mlx_rsgwm.cli.main import rsgwm

RESULTS = Path(__file__).parent.parent.parent / "bench" / "results"
PAIR = {"--drafter": "draft", "--verifier": "verify", "--score": "yesno", "--threshold": "0.5", "--max-tokens": "4"}
ANSWERING = {key: value for key, value in PAIR.items() if key not in ("--score", "--threshold")}
SMALL = {"--rank": "2", "--alpha": "4", "--steps": "1", "--batch-size": "2"}
RECIPE = {
    "name": "tiny",
    "base": "base",
    "data": {"tasks": ["change", "groups"], "rows": 8, "verify_share": 0.5, "calibration_items": 2},
    "train": {"rank": 2, "alpha": 4, "batch_size": 4, "learning_rate": 1e-2},
    "loop": {"attempts": 2, "max_tokens": 4, "threshold": "auto"},
    "evaluate": {"items": 2, "timed": 0},
    "export": {"parity": False},
}

# Command: parameter (an option's long name, an argument's own) and its value; names of files are relative to the
# folder of work, where every command runs, and what is written goes to `new/`.
SOUND: dict[str, dict[str, str | tuple[str, ...]]] = {
    "demo": {"--out": "new/out", "--set": "base=base", "--show": ""},
    "run": {"recipe": "recipe.yaml", "--out": "new/out", "--show": ""},
    "recipe init": {"files": "mine.jsonl", "--base": "base", "--out": "new/recipe.yaml"},
    "help": {"names": "merge"},
    "data build": {"--task": "change", "--draft-rows": "4", "--verify-rows": "2", "--out": "new/out"},
    "data negatives": {"--adapter": "draft", "--task": "change", "--verify-rows": "2", "--draft-rows": "1",
                       "--items": "2", "--draft-count": "1", "--max-tokens": "4", "--out": "new/out"},
    "train": {"--base": "base", "--corpus": "corpus", "--out": "new/out", **SMALL},
    "average": {"sources": "checkpointed", "--out": "new/out"},
    "pool train": {"--base": "base", "--corpus": "corpus", "--out": "new/out", **SMALL},
    "pool sweep": {"pool": ("pool/change", "pool/groups"), "--methods": "linear", "--task": "change", "--items": "1",
                   "--judged": "1", "--max-tokens": "4", "--out": "new/out"},
    "pool route": {"pool": "pool", "--corpus": "corpora", "--replace": ""},
    "adapter loss": {"--corpus": "corpus", "--adapter": "draft"},
    "adapter importance": {"source": "pool/change", "--corpus": "corpus", "--out": "new/out"},
    "directions collect": {"adapter_folder": "bare", "--corpus": "corpus"},
    "audit": {"adapters": ("pool/change", "pool/groups"), "--data": "mine.jsonl"},
    "probe measure": {"adapters": ("pool/change", "pool/groups"), "--out": "new/table.jsonl"},
    "probe outcomes": {"adapters": ("pool/change", "pool/groups"), "--methods": "linear", "--data-rows": "8",
                       "--out": "new/outcomes.jsonl"},
    "probe fit": {"table": "table.jsonl", "outcomes": "outcomes.jsonl", "--out": "new/predictors"},
    "probe report": {"predictors": "predictors"},
    "probe decide": {"adapters": ("pool/change", "pool/groups")},
    "merge": {"adapters": ("pool/change", "pool/groups"), "--role": "draft", "--out": "new/out"},
    "quantvec extract": {"--qat": "through", "--plain": "pool/change", "--out": "new/out"},
    "quantvec apply": {"receiver": "pool/groups", "--vector": "vector", "--out": "new/out"},
    "ask": {"question": "What is 1 + 1?", **PAIR},
    "chat": PAIR,
    "serve": {"--base": "base", "--port": "0"},
    "calibrate": {**ANSWERING, "--task": "change", "--items": "2"},
    "eval": {**PAIR, "--task": "mine.jsonl", "--items": "1", "--timed": "0", "--out": "new/out"},
    "blindspot": {"adapter": "draft", "--task": "mine.jsonl", "--items": "1", "--max-tokens": "4", "--out": "new/out"},
    "tails": {},
    "compare": {"run_a": "evaluated", "run_b": "evaluated-2", "--out": "new/out.md"},
    "report write": {"run": "evaluated", "--out": "new/out"},
    "report curves": {"adapters": ("pool/change", "pool/groups"), "--out": "new/curves.png"},
    "report controls": {"run": "evaluated", "--items": "1", "--calibration-items": "1", "--sampling-seeds": "1",
                        "--attempts": "1", "--draft-count": "1", "--max-tokens": "2", "--out": "new/out"},
    "report tables": {"number": "1", "--recipe": "recipe.yaml", "--items": "1", "--timed": "0", "--out": "new/out"},
    "lm-eval": {**PAIR, "--task": "nosuch", "--items": "1"},
    "convert to-peft": {"adapter": "draft", "--out": "new/out"},
    "convert from-peft": {"folder": "draft-peft", "--base": "base", "--out": "new/out"},
    "convert from-mlx": {"folder": "draft", "--out": "new/out"},
    "convert to-gguf": {"source": "draft", "--out": "new/out.gguf"},
    "convert from-gguf": {"source": "draft.gguf", "--base": "base", "--out": "new/out"},
    "convert check": {"peft": "draft-peft", "adapter": "draft"},
    "parity": {"adapter": "draft", "--base": "base"},
    "fuse": {"adapter": "draft", "--out": "new/out", "--force": ""},
    "hub push": {"adapter": "draft", "repo": "me/adapter", "--base": "me/base", "--dry-run": ""},
    "hub pull": {"repo": "me/adapter", "--out": "new/out"},
    "base pull": {"name": "base"},
    "base info": {"name": "base"},
    "bench latency": {"--base": "base", "--works": "forward", "--prompt-tokens": "4", "--new-tokens": "2",
                      "--trials": "1", "--batch-size": "1"},
    "bench compare": {"before": "bench.json", "after": "bench.json"},
    "doctor": {},
}  # fmt: skip


def key_of(parameter: click.Parameter) -> str:
    """What ``SOUND`` calls a parameter: the long name of an option, the name of an argument."""
    return max(parameter.opts, key=len) if isinstance(parameter, click.Option) else str(parameter.name)


def valued(command: str) -> list[click.Parameter]:
    """Every parameter of a command that takes a value."""
    return [each for each in find_command(command).params if not getattr(each, "is_flag", False)]


def command_line(command: str, key: str = "", value: str = "") -> list[str]:
    """The sound command line; with ``key``, this parameter has ``value`` instead."""
    given = SOUND[command] if not key else {**SOUND[command], key: value}
    words = command.split()
    for name, held in given.items():
        if name.startswith("-"):
            words += [name, *([str(held)] if held != "" or name == key else [])]
    for parameter in find_command(command).params:  # arguments in their order
        if isinstance(parameter, click.Argument) and parameter.name in given:
            held = given[str(parameter.name)]
            words += [held] if isinstance(held, str) else list(held)
    return words


def make_work(folder: Path, base: Path) -> None:
    """Everything that ``SOUND`` names, in ``folder``."""
    shutil.copytree(base, folder / "base")
    (folder / "new").mkdir()
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(12)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    small = [word for pair in SMALL.items() for word in pair]
    rows_of = ("--draft-rows", "4", "--verify-rows", "4")
    run("data", "build", "--task", "change", *rows_of, "--out", "corpus")
    for task in ("change", "groups"):
        run("data", "build", "--task", task, "--draft-rows", "6", "--verify-rows", "2", "--out", f"corpora/{task}")
    run("pool", "train", "--base", "base", "--task", "change", "--task", "groups", *rows_of, "--out", "pool", *small)
    steps = ("--steps", "2", "--save-every", "1")
    run("train", "--base", "base", "--corpus", "corpus", "--out", "checkpointed", *small, *steps)
    run("train", "--base", "base", "--corpus", "corpus", "--out", "through", "--qat", "4,32", *small)
    run("quantvec", "extract", "--qat", "through", "--plain", "pool/change", "--out", "vector")
    run("audit", "pool/change", "pool/groups", "--plan", "plan.yaml")
    shutil.copytree(folder / "pool/change", folder / "bare")
    manifest = json.loads((folder / "bare/manifest.json").read_text())
    (folder / "bare/directions.safetensors").unlink()
    del manifest["files"]["directions.safetensors"]
    (folder / "bare/manifest.json").write_text(json.dumps(manifest))
    write_study(folder / "table.jsonl", folder / "outcomes.jsonl")
    run("probe", "fit", "table.jsonl", "outcomes.jsonl", "--out", "predictors")
    for role in ("draft", "verify"):
        run("merge", "pool/change", "pool/groups", "--role", role, "--out", role)
    run("convert", "to-peft", "draft", "--out", "draft-peft")
    run("convert", "to-gguf", "draft", "--out", "draft.gguf")
    for out, seed in (("evaluated", "0"), ("evaluated-2", "1")):
        run(*command_line("eval", "--out", out), "--sampling-seeds", "2", "--seed", seed)
    shutil.copyfile(RESULTS / "latency-linux-2core.json", folder / "bench.json")


def write_study(table: Path, outcomes: Path) -> None:
    """A table of pairs and what merges did to them, of adapters that are nowhere."""
    names = [f"pool/{letter}" for letter in "abcde"]
    pairs = list(combinations(range(len(names)), 2))
    rows = [
        {"adapters": [names[i], names[j]], "tasks": ["abcde"[i], "abcde"[j]], "modules": 2,
         "measures": {"task_vector_cosine": (i * j) / 20, "task_vector_norm_ratio": 1 / (1 + i + j),
                      "task_vector_l2": 2.0 + i, "task_vector_dot": (i - j) / 5, "sign_disagreement.mean": j / 5}}
        for i, j in pairs
    ]  # fmt: skip
    told = {"at": 1.0, "base": None, "adapters": dict.fromkeys(names, ""), "data": None}
    write_lines(table, [{"about": {"kind": "pair-table", "version": 1, **told}}, *rows])
    about = {"kind": "merge-outcomes", "version": 1, "adapters": dict.fromkeys(names, ""),
             "tasks": {name: name[-1] for name in names}}  # fmt: skip
    alone = [
        {"members": [name], "method": method, "scores": {name: {"nats": nats, "right": 3, "tokens": 10}}, "refused": ""}
        for name in names
        for method, nats in (("base", 20.0), ("single", 10.0))
    ]
    merged = [
        {"members": [names[i], names[j]], "method": "linear", "refused": "",
         "scores": {names[place]: {"nats": 11.0 + i + j / 3, "right": 3, "tokens": 10} for place in (i, j)}}
        for i, j in pairs
    ]  # fmt: skip
    write_lines(outcomes, [{"about": about}, *alone, *merged])


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*arguments: Any) -> None:
    done = CliRunner().invoke(rsgwm, [*map(str, arguments), "--quiet"])
    assert done.exit_code == 0, (arguments, done.output[-2000:])
