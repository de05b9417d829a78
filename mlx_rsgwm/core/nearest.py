"""What a wrong name was likely meant to be: one spelt alike, or what mlx-lm, PEFT and others call the same."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

SIMILAR = 0.75  # how alike names of files must be: their suffixes alone make most of them half alike
MOST_FILES = 1000  # of a folder that are looked at

# What mlx-lm, PEFT, transformers, mergekit and people call it, and our words for it: the first that is known counts.
ELSEWHERE = {
    "lr": ("learning-rate",),
    "rate": ("learning-rate",),
    "r": ("rank",),
    "dora": ("type",),
    "lora-r": ("rank",),
    "lora-rank": ("rank",),
    "lora-alpha": ("alpha",),
    "lora-dropout": ("dropout",),
    "target-modules": ("key", "keys"),
    "modules": ("key", "keys"),
    "keys": ("key",),
    "num-layers": ("layers",),
    "lora-layers": ("layers", "num-layers"),
    "iters": ("steps",),
    "max-steps": ("steps",),
    "num-train-epochs": ("epochs",),
    "per-device-train-batch-size": ("batch-size",),
    "gradient-accumulation-steps": ("accumulate",),
    "grad-accumulation-steps": ("accumulate",),
    "grad-checkpoint": ("recompute",),
    "fine-tune-type": ("type",),
    "val-data": ("held-out",),
    "valid": ("held-out",),
    "model": ("base",),
    "model-name-or-path": ("base",),
    "hf-path": ("base",),
    "adapter-path": ("adapter", "out"),
    "adapter-file": ("adapter", "out"),
    "lora": ("train", "adapter", "type"),
    "peft": ("adapter",),
    "output-dir": ("out",),
    "save-path": ("out",),
    "dataset": ("corpus", "task"),
    "questions-file": ("file", "task"),
    "input": ("file",),
    "temp": ("temperature",),
    "max-new-tokens": ("max-tokens",),
    "system-prompt": ("system",),
    "max-length": ("max-tokens", "max-seq-length"),
    "limit": ("items",),
    "num-samples": ("items",),
    "samples": ("items",),
    "average": ("linear",),
    "mean": ("linear",),
    "weighted": ("linear",),
    "soup": ("linear",),
    "generate": ("ask",),
    "answer": ("ask",),
    "finetune": ("train",),
    "fine-tune": ("train",),
    "download": ("pull",),
    "upload": ("push",),
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` most likely means, as it is known; None where there is none like it."""
    plain = {_plain(each): each for each in known}
    wanted = _plain(name)
    if wanted in plain:
        return plain[wanted]
    for meant in ELSEWHERE.get(wanted, ()):
        if meant in plain:
            return plain[meant]
    if near := get_close_matches(wanted, plain, n=1):
        return plain[near[0]]
    begun = [each for each in plain if min(len(each), len(wanted)) > 2 and _begins(each, wanted)]
    return plain[max(begun, key=len)] if begun else None


def advice(name: str, known: Iterable[str]) -> str:
    """``did you mean 'ties'?`` where a name is near, else which there are."""
    names = list(known)
    near = nearest(name, names)
    return f"did you mean {near!r}?" if near else f"there are {', '.join(names)}"


def nearest_path(path: Path) -> str:
    """``; did you mean 'a/b'?`` for a path that does not exist, where its folder holds a name much like it."""
    try:
        names = [entry.name for entry, _ in zip(os.scandir(path.parent), range(MOST_FILES), strict=False)]
    except (OSError, ValueError):
        return ""
    near = get_close_matches(path.name, [name for name in names if not name.startswith(".")], n=1, cutoff=SIMILAR)
    return f"; did you mean '{path.with_name(near[0])}'?" if near else ""


def _plain(name: str) -> str:
    return str(name).strip().casefold().replace("_", "-").replace(" ", "-")


def _begins(name: str, other: str) -> bool:
    return name.startswith(other) or other.startswith(name)
