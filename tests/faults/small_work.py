"""What some commands of the catalogue need beside the work that all share: made when the first of them is tried."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from tests.faults.catalogue import SMALL, held, judged


def run(*arguments):
    """A command in this process."""
    return CliRunner().invoke(rsgwm, [*map(str, arguments), "--quiet"])


def done(*arguments) -> None:
    ended = run(*arguments)
    assert ended.exit_code == 0, ended.stderr


def evaluated(temperature: float) -> Callable[[Path, Path, Path], None]:
    def make(work: Path, base: Path, out: Path) -> None:
        done("eval", "--base", base, *judged(work), "--task", work / "mine.jsonl", "--timed", 0, "--out", out,
             "--temperature", temperature)  # fmt: skip

    return make


def finished_run(work: Path, base: Path, out: Path) -> None:
    done("run", work / "recipe.yaml", "--out", out)


def checkpointed(work: Path, base: Path, out: Path) -> None:
    """A run with several checkpoints."""
    done("train", "--base", base, "--corpus", work / "corpus/change", "--out", out, *SMALL)


def through_rounding(work: Path, base: Path, out: Path) -> None:
    """An adapter that was trained through rounding."""
    done("train", "--base", base, "--corpus", work / "corpus/change", "--out", out, "--qat", "4,32", *SMALL)


def vector(work: Path, base: Path, out: Path) -> None:
    """A quantization vector."""
    done("quantvec", "extract", "--qat", work / "through", "--plain", work / "pool/change", "--out", out)


def questions(more: int) -> Callable[[Path, Path, Path], None]:
    """Enough of them that a share is there for every purpose."""

    def make(work: Path, base: Path, out: Path) -> None:
        rows = [{"question": f"What is {n} + {more}?", "answer": f"#### {n + more}"} for n in range(80)]
        out.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return make


def labelled(work: Path, base: Path, out: Path) -> None:
    """The drafts of a calibration, some of them called right, which those of a base of random weights never are."""
    pair = ["--drafter", work / "draft", "--verifier", work / "verify"]
    run("calibrate", "--base", base, *pair, *held(work), "--drafts-file", out)  # which refuses to fit, all being wrong
    head, *rows = out.read_text().splitlines()
    right = [json.dumps({**json.loads(row), "correct": [True, False]}) for row in rows]
    out.write_text("\n".join([head, *right, ""]))


def hub_cache(work: Path, base: Path, out: Path) -> None:
    """The Hub's cache with one adapter in it, fetched before."""
    repository = out / "models--me--draft"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    shutil.copytree(work / "draft-peft", repository / "snapshots" / ("0" * 40))


MAKERS = {
    "evaluated": evaluated(0.7),
    "evaluated-hot": evaluated(0.9),
    "run": finished_run,
    "checkpointed": checkpointed,
    "through": through_rounding,
    "vector": vector,
    "questions.jsonl": questions(1),
    "others.jsonl": questions(2),
    "held.jsonl": labelled,
    "hub": hub_cache,
}


def make(name: str, work: Path, base: Path) -> None:
    if not (work / name).exists():
        MAKERS[name](work, base, work / name)
