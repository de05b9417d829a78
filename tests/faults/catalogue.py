"""Every command that writes something, on work so small that each can be run hundreds of times."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SMALL = ["--rank", 4, "--alpha", 8, "--batch-size", 2, "--epochs", 3, "--save-every", 2]


@dataclass(frozen=True)
class Kind:
    """A command.

    ``arguments`` of the folders of work, base and place, which is new; ``written``: what must be the same whatever
    happened before, below the place; ``copied``: what of the work is changed where it is, and so copied there first.
    """

    arguments: Callable[[Path, Path, Path], list]
    written: tuple[str, ...]
    copied: tuple[str, ...] = ()

    def prepare(self, work: Path, place: Path) -> None:
        place.mkdir()
        for name in self.copied:
            shutil.copytree(work / name, place / name)


def judged(work: Path) -> list:
    pair = ["--drafter", work / "draft", "--verifier", work / "verify", "--score", "yesno", "--threshold", "0.5"]
    return [*pair, "--max-tokens", 6, "--attempts", 2]


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
         "out/adapter_config.json"),
    ),
    "pool train": Kind(
        lambda work, base, place: ["pool", "train", "--base", base, "--corpus", work / "corpus/change",
                                   "--corpus", work / "corpus/groups", "--out", place / "out", *SMALL],
        ("out/change/adapters.safetensors", "out/groups/adapters.safetensors"),
    ),
    "directions collect": Kind(
        lambda work, base, place: ["directions", "collect", place / "pool/change", "--corpus", work / "corpus/change",
                                   "--replace"],
        ("pool/change/directions.safetensors", "pool/change/adapters.safetensors"),
        copied=("pool/change",),
    ),
    "importance": Kind(
        lambda work, base, place: ["adapter", "importance", work / "pool/change", "--corpus", work / "corpus/change",
                                   "--out", place / "out"],
        ("out/adapters.safetensors", "out/importance.safetensors"),
    ),
    "merge": Kind(
        lambda work, base, place: ["merge", work / "pool/change", work / "pool/groups", "--role", "draft",
                                   "--out", place / "out"],
        ("out/adapters.safetensors", "out/adapter_config.json"),
    ),
    "eval": Kind(
        lambda work, base, place: ["eval", "--base", base, *judged(work), "--task", work / "mine.jsonl", "--timed", 0,
                                   "--out", place / "out"],
        ("out/items.jsonl",),
    ),
    "to-peft": Kind(
        lambda work, base, place: ["convert", "to-peft", work / "draft", "--out", place / "out"],
        ("out/adapter_model.safetensors", "out/adapter_config.json"),
    ),
    "from-peft": Kind(
        lambda work, base, place: ["convert", "from-peft", work / "draft-peft", "--base", base, "--out", place / "out"],
        ("out/adapters.safetensors", "out/adapter_config.json"),
    ),
    "to-gguf": Kind(
        lambda work, base, place: ["convert", "to-gguf", work / "draft", "--out", place / "out.gguf"],
        ("out.gguf",),
    ),
    "from-gguf": Kind(
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
}  # fmt: skip
