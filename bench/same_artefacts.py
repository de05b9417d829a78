"""Whether two installed versions write the same: corpora, adapters, merges by every method, PEFT, evaluations.

    python bench/same_artefacts.py BEFORE/bin/rsgwm AFTER/bin/rsgwm [--base smollm2-135m] [--keep FOLDER]

Both commands run the same list at the same seeds, each in a folder of its own; then every file is compared. Arrays and
text must be equal byte for byte, JSON after what tells of time and machine (``VARYING``) is taken out; files that hold
such JSON's hash follow it. The last line is JSON: files compared, and those that differ or stand on one side only.
Exit 1 where any does. A refusal counts as an artefact: its message and exit code must be the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

VARYING = {
    *("seconds", "cpu_seconds", "tokens_per_second", "latency", "timed", "times", "created"),
    *("memory", "load", "machine", "version", "versions"),
    *("files", "sha256", "manifest_sha256", "told_sha256"),  # hashes of files and lines that tell of those
}
TASKS = ("change", "compare")
SMALL_ROWS = ("--draft-rows", "12", "--verify-rows", "12")
TRAINING = ("--steps", "3", "--batch-size", "4", "--rank", "4")


def commands(base: str, methods: list[str]) -> Iterator[tuple[str, ...]]:
    """The command lines, in order; each runs in the side's folder."""
    for task in TASKS:
        yield ("data", "build", "--task", task, *SMALL_ROWS, "--out", f"data/{task}")
        yield ("train", "--corpus", f"data/{task}", "--base", base, *TRAINING, "--out", f"pool/{task}")
    pool = [f"pool/{task}" for task in TASKS]
    for method in methods:
        yield ("merge", *pool, "--method", method, "--out", f"merged/{method.replace(':', '-')}")
    yield ("merge", *pool, "--role", "draft", "--out", "drafter")
    yield ("merge", *pool, "--role", "verify", "--out", "verifier")
    yield ("convert", "to-peft", "drafter", "--out", "peft")
    yield ("convert", "from-peft", "peft", "--out", "back", "--base", base)
    yield (
        *("eval", "--drafter", "drafter", "--verifier", "verifier", "--base", base, "--task", "change", "--items", "4"),
        *("--threshold", "0.5", "--score", "mean_logprob", "--out", "report"),
    )


def run(command: Path, arguments: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Exit code of one command line and, where it failed, the last line of what it said."""
    done = subprocess.run([command, *arguments, "--quiet"], cwd=folder, capture_output=True, text=True, check=False)
    lines = (done.stderr or done.stdout).strip().splitlines()
    return {"rc": done.returncode, "said": lines[-1] if done.returncode and lines else ""}


def content(path: Path) -> str:
    """A digest of what a file says, apart from time and machine."""
    raw = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        texts = raw.decode("utf-8").splitlines() if path.suffix == ".jsonl" else [raw.decode("utf-8")]
        raw = json.dumps([_lasting(json.loads(text)) for text in texts if text.strip()], sort_keys=True).encode()
    return hashlib.sha256(raw).hexdigest()


def _lasting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _lasting(part) for key, part in value.items() if key not in VARYING and not key.endswith("_ms")}
    return [_lasting(part) for part in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, str]:
    """Digest by path of all files of a side but pictures and pages, which hold times."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): content(path)
        for path in files
        if path.suffix not in (".png", ".svg", ".html", ".md", ".lock")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--keep", type=Path, help="Folder to work in; a temporary one unless given.")
    arguments = parser.parse_args()
    listed = subprocess.run([arguments.before, "merge", "--list", "--json"], capture_output=True, text=True, check=True)
    methods = list(json.loads(listed.stdout.strip().splitlines()[-1]))
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary)
        sides = {"before": arguments.before.absolute(), "after": arguments.after.absolute()}
        ended: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for line in commands(arguments.base, methods):
            for side, command in sides.items():
                (root / side).mkdir(parents=True, exist_ok=True)
                ended[side].append({"command": " ".join(line), **run(command, line, root / side)})
            print(ended["after"][-1], flush=True)
        before, after = contents(root / "before"), contents(root / "after")
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    endings = [first["command"] for first, second in zip(*ended.values(), strict=True) if first != second]
    failed = sum(row["rc"] != 0 for row in ended["before"])
    result = {"commands": len(ended["after"]), "failed": failed, "files": len(before), "differing": differing}
    print(json.dumps(result | {"endings": endings}))
    sys.exit(1 if differing or endings else 0)


if __name__ == "__main__":
    main()
