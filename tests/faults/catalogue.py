"""Every command that writes something, on work so small that each can be run hundreds of times."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Five checkpoints, of which three stay and two can be continued; two of each run where several are trained.
SMALL = ["--rank", 4, "--alpha", 8, "--batch-size", 2, "--steps", 10, "--save-every", 2]
FEW = [*SMALL[:6], "--steps", 4, "--save-every", 2]


@dataclass(frozen=True)
class Kind:
    """A command.

    ``arguments`` of the folders of work, base and place, which is new; ``written``: what must be the same whatever
    happened before, below the place; ``copied``: what of the work is changed where it is, and so copied there first;
    ``needs``: what of the work is made only for it, see ``small_work``.
    """

    arguments: Callable[[Path, Path, Path], list]
    written: tuple[str, ...]
    copied: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def prepare(self, work: Path, place: Path) -> None:
        place.mkdir()
        for name in self.copied:
            (shutil.copytree if (work / name).is_dir() else shutil.copy)(work / name, place / name)


def judged(work: Path) -> list:
    pair = ["--drafter", work / "draft", "--verifier", work / "verify", "--score", "yesno", "--threshold", "0.5"]
    return [*pair, "--max-tokens", 6, "--attempts", 2]


def held(work: Path) -> list:
    return ["--task", work / "mine.jsonl", "--split", "all", "--items", 6, "--attempts", 2, "--max-tokens", 6]


KINDS = {
    "data build": Kind(
        lambda work, base, place: ["data", "build", "--task", "change", "--draft-rows", 8, "--verify-rows", 4,
                                   "--out", place / "out"],
        ("out/rows.jsonl", "out/manifest.json"),
    ),
    "train": Kind(
        lambda work, base, place: ["train", "--base", base, "--corpus", work / "corpus/change", "--out", place / "out",
                                   "--resume", *SMALL],
        ("out/adapters.safetensors", "out/importance.safetensors", "out/directions.safetensors", "out/init.safetensors",
         "out/prompt_states.safetensors", "out/adapter_config.json"),
    ),
    "average": Kind(
        lambda work, base, place: ["average", work / "checkpointed", "--out", place / "out"],
        ("out/adapters.safetensors", "out/importance.safetensors", "out/directions.safetensors",
         "out/adapter_config.json"),
        needs=("checkpointed",),
    ),
    "pool train": Kind(
        lambda work, base, place: ["pool", "train", "--base", base, "--corpus", work / "corpus/change",
                                   "--corpus", work / "corpus/groups", "--out", place / "out", "--resume", *FEW],
        ("out/change/adapters.safetensors", "out/groups/adapters.safetensors", "out/change/prompt_states.safetensors",
         "out/groups/prompt_states.safetensors"),
    ),
    "pool train --rounds": Kind(
        lambda work, base, place: ["pool", "train", "--base", base, "--corpus", work / "corpus/change",
                                   "--corpus", work / "corpus/groups", "--out", place / "out", *FEW, "--rounds", 2,
                                   "--directions", 2, "--resume"],
        ("out/change/adapters.safetensors", "out/groups/adapters.safetensors", "out/change/directions.safetensors",
         "out/groups/importance.safetensors", "out/rounds/round-01/merged/adapters.safetensors",
         "out/rounds/round-02/merged/adapters.safetensors", "out/rounds/round-01/round.json",
         "out/groups/prompt_states.safetensors"),
    ),
    "pool route": Kind(
        lambda work, base, place: ["pool", "route", place / "pool", "--corpus", work / "corpus/change",
                                   "--corpus", work / "corpus/groups", "--base", base, "--replace"],
        ("pool/router.safetensors",),
        copied=("pool",),
    ),
    "directions collect": Kind(
        lambda work, base, place: ["directions", "collect", place / "pool/change", "--corpus", work / "corpus/change",
                                   "--replace"],
        ("pool/change/directions.safetensors", "pool/change/adapters.safetensors"),
        copied=("pool/change",),
    ),
    "adapter importance": Kind(
        lambda work, base, place: ["adapter", "importance", work / "pool/change", "--corpus", work / "corpus/change",
                                   "--out", place / "out"],
        ("out/adapters.safetensors", "out/importance.safetensors"),
    ),
    "probe measure": Kind(
        lambda work, base, place: ["probe", "measure", work / "pool/change", work / "pool/groups",
                                   "--out", place / "table.jsonl"],
        ("table.jsonl",),
    ),
    "probe outcomes": Kind(
        lambda work, base, place: ["probe", "outcomes", work / "pool/change", work / "pool/groups", "--base", base,
                                   "--methods", "linear", "--data-rows", 8, "--out", place / "outcomes.jsonl"],
        ("outcomes.jsonl",),
    ),
    "probe decide": Kind(
        lambda work, base, place: ["probe", "decide", work / "pool/change", work / "pool/groups", "--apply",
                                   "--out", place / "out"],
        ("out/decision.json", "out/merged/adapters.safetensors"),
    ),
    "merge": Kind(
        lambda work, base, place: ["merge", work / "pool/change", work / "pool/groups", "--role", "draft",
                                   "--out", place / "out"],
        ("out/adapters.safetensors", "out/adapter_config.json"),
    ),
    "quantvec extract": Kind(
        lambda work, base, place: ["quantvec", "extract", "--qat", work / "through", "--plain", work / "pool/change",
                                   "--out", place / "out"],
        ("out/adapters.safetensors", "out/adapter_config.json"),
        needs=("through",),
    ),
    "quantvec apply": Kind(
        lambda work, base, place: ["quantvec", "apply", work / "pool/groups", "--vector", work / "vector",
                                   "--out", place / "out"],
        ("out/adapters.safetensors", "out/adapter_config.json"),
        needs=("through", "vector"),
    ),
    "eval": Kind(
        lambda work, base, place: ["eval", "--base", base, *judged(work), "--task", work / "mine.jsonl", "--timed", 0,
                                   "--out", place / "out"],
        ("out/items.jsonl",),
    ),
    "convert to-peft": Kind(
        lambda work, base, place: ["convert", "to-peft", work / "draft", "--out", place / "out"],
        ("out/adapter_model.safetensors", "out/adapter_config.json"),
    ),
    "convert from-peft": Kind(
        lambda work, base, place: ["convert", "from-peft", work / "draft-peft", "--base", base, "--out", place / "out"],
        ("out/adapters.safetensors", "out/adapter_config.json"),
    ),
    "convert to-gguf": Kind(
        lambda work, base, place: ["convert", "to-gguf", work / "draft", "--out", place / "out.gguf"],
        ("out.gguf",),
    ),
    "convert from-gguf": Kind(
        lambda work, base, place: ["convert", "from-gguf", work / "draft.gguf", "--base", base, "--out", place / "out"],
        ("out/adapters.safetensors", "out/adapter_config.json"),
    ),
    "fuse": Kind(
        lambda work, base, place: ["fuse", work / "draft", "--force", "--out", place / "out"],
        ("out/model.safetensors", "out/config.json"),
    ),
    "run": Kind(
        lambda work, base, place: ["run", work / "recipe.yaml", "--out", place / "out"],
        # no calibration: a random base gets every draft wrong, and none can be fitted on that
        ("out/drafter/adapters.safetensors", "out/verifier/adapters.safetensors", "out/report/items.jsonl",
         "out/export/drafter-peft/adapter_model.safetensors"),
    ),
    "recipe init": Kind(
        lambda work, base, place: ["recipe", "init", work / "questions.jsonl", "--base", base,
                                   "--out", place / "own.yaml"],
        ("own.yaml",),
        needs=("questions.jsonl",),
    ),
    "data negatives": Kind(
        lambda work, base, place: ["data", "negatives", "--base", base, "--adapter", work / "pool/change", "--task",
                                   "change", "--draft-rows", 2, "--verify-rows", 4, "--offset", 20, "--max-tokens", 4,
                                   "--out", place / "out"],
        ("out/rows.jsonl", "out/manifest.json"),
    ),
    "pool sweep": Kind(
        lambda work, base, place: ["pool", "sweep", work / "pool/change", work / "pool/groups", "--base", base,
                                   "--methods", "linear", "--methods", "ties", "--items", 2, "--max-tokens", 4,
                                   "--out", place / "out"],
        ("out/sweep.md",),
    ),
    "ask": Kind(
        lambda work, base, place: ["ask", "--file", work / "mine.jsonl", "--base", base, *judged(work),
                                   "--batch-rows", 2, "--out", place / "answers.jsonl"],
        ("answers.jsonl",),
    ),
    "calibrate": Kind(
        lambda work, base, place: ["calibrate", "--base", base, "--drafter", work / "draft", "--verifier",
                                   place / "verify", *held(work), "--drafts-file", place / "held.jsonl"],
        ("verify/calibration.json", "verify/adapters.safetensors", "held.jsonl"),
        copied=("verify", "held.jsonl"),
        needs=("held.jsonl",),
    ),
    "blindspot": Kind(
        lambda work, base, place: ["blindspot", work / "draft", "--task", work / "mine.jsonl", "--split", "all",
                                   "--items", 6, "--max-tokens", 6, "--out", place / "out"],
        ("out/blindspot.json", "out/blindspot.html"),
    ),
    "compare": Kind(
        lambda work, base, place: ["compare", work / "evaluated", work / "evaluated-hot", "--out", place / "out.md"],
        ("out.md",),
        needs=("evaluated", "evaluated-hot"),
    ),
    "report write": Kind(
        lambda work, base, place: ["report", "write", place / "evaluated", "--tables", place / "tables.tex"],
        ("evaluated/report.json", "evaluated/report.html", "evaluated/items.jsonl", "tables.tex"),
        copied=("evaluated",),
        needs=("evaluated",),
    ),
    "report curves": Kind(
        lambda work, base, place: ["report", "curves", work / "pool/change", "--out", place / "curves.svg"],
        ("curves.svg",),
    ),
    "report controls": Kind(
        lambda work, base, place: ["report", "controls", work / "run", "--base", base, "--items", 2,
                                   "--calibration-items", 2, "--sampling-seeds", 1, "--attempts", 2, "--draft-count", 2,
                                   "--max-tokens", 4, "--out", place / "out"],
        ("out/controls.md", "out/joint/adapters.safetensors"),
        needs=("run",),
    ),
    "report tables": Kind(
        lambda work, base, place: ["report", "tables", 1, "--recipe", work / "recipe.yaml", "--items", 2, "--timed", 0,
                                   "--out", place / "out"],
        ("out/table-1/table-1.md", "out/default/drafter/adapters.safetensors"),
    ),
    "convert from-mlx": Kind(
        lambda work, base, place: ["convert", "from-mlx", work / "draft", "--out", place / "out"],
        ("out/adapters.safetensors", "out/adapter_config.json"),
    ),
    "hub pull": Kind(
        lambda work, base, place: ["hub", "pull", "me/draft", "--base", base, "--out", place / "out"],
        ("out/adapters.safetensors", "out/adapter_config.json"),
        needs=("hub",),
    ),
}  # fmt: skip

# Commands that stay out, and why.
NOT_HERE = {
    "demo": "`run` with a recipe of its own and a base that is fetched",
    "help": "writes nothing",
    "adapter loss": "writes nothing",
    "probe fit": "files of their own at its end, through the same function as `compare`",
    "probe report": "a page, one file at its end, through the same function as `compare`",
    "audit": "a plan or a page, one file at its end, through the same function as `compare`",
    "chat": "writes nothing",
    "serve": "writes nothing",
    "tails": "a picture at its end, through the same function as `compare`",
    "lm-eval": "one file at its end, through the same function as `compare`",
    "convert check": "writes nothing",
    "parity": "one file at its end, through the same function as `compare`; takes seconds to import torch",
    "hub push": "stages in the system's temporary folder, writes nowhere else on this machine",
    "base pull": "fetches into the Hub's cache and this tool's own: tests/models/test_base.py",
    "base info": "writes nothing",
    "bench latency": "measures times, which no second run repeats",
    "bench compare": "writes nothing",
    "doctor": "writes nothing",
}
