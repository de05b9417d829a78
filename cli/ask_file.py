"""``rsgwm ask --file``: a file of questions, answered in batches, each kept as it comes, gone on with after a stop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_rsgwm.cli.console import Console, read_standard_input
from mlx_rsgwm.core.errors import RsgwmError

if TYPE_CHECKING:
    from mlx_rsgwm.core.resume import Journal
    from mlx_rsgwm.data.asked_files import AskedRow
    from mlx_rsgwm.inference.loop import DraftVerify

Answers = Iterator[tuple[int, dict[str, Any]]]  # the place of a question among those asked, and what its row gets


class Interrupted(RsgwmError):
    """Ctrl-C or kill, with a word on what is there."""

    exit_code = 130


def questions_of(path: Path) -> list[AskedRow]:
    """The questions of a file; of standard input where it is called ``-``."""
    from mlx_rsgwm.data.asked_files import read_asked

    return read_asked(path, read_standard_input() if str(path) == "-" else None)


@contextmanager
def claimed(out: Path | None, asked: Path) -> Iterator[None]:
    """Keep ``out`` for this process while the body runs.

    Raises:
        RsgwmError: another process writes it; ``out`` is a folder, a device, the file ``asked`` itself, or is there and
            no unfinished run beside it.
    """
    from mlx_rsgwm.core.folders import exclusive_file

    if out is None:
        yield
        return
    if out.is_dir():
        raise RsgwmError(f"{out} is a folder; name a file for the answers, such as {out / 'answers.jsonl'}")
    if out.exists() and asked.exists() and out.samefile(asked):
        raise RsgwmError(f"{out} holds the questions; give another --out")
    with exclusive_file(out):
        if out.exists() and not _journal_path(out).exists():
            raise RsgwmError(
                f"{out} is there already, and no unfinished run beside it; remove it, or give another --out"
            )
        yield


def _journal_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.journal")


def answer_file(
    console: Console,
    asked: Sequence[AskedRow],
    out: Path | None,
    pipeline: DraftVerify,
    answers: Callable[[Sequence[str]], Answers],
) -> list[dict[str, Any]]:
    """Answer all questions, in their order into ``out``, or where there is none to the console.

    Rows are kept in a journal beside ``out`` as they come. After a stop ``out`` has what was done by then, and the same
    command goes on; once all is done the journal is gone.

    Raises:
        RsgwmError: the unfinished run beside ``out`` was of other adapters or settings.
        Interrupted: where the answers are that were done.
    """
    rows: dict[int, dict[str, Any]] = {}
    for each in asked:
        pipeline.prompt(each.question, f"question {each.number}")  # before anything is written or answered
    journal = None if out is None else _journal(out, pipeline, asked, rows, console)
    waiting = [place for place in range(len(asked)) if place not in rows]
    printed = _InOrder(console, asked) if out is None else None
    try:
        with console.progress.task("answer", len(waiting)) as advance:
            started = time.monotonic()
            for place, row in answers([asked[place].question for place in waiting]):
                number = waiting[place]
                rows[number] = _row(asked[number], row)
                if journal is not None:
                    journal.append([{"place": number, "row": rows[number]}])
                if printed is not None:
                    printed.show(rows)
                advance(1, _pace(len(rows) - len(asked) + len(waiting), len(waiting), time.monotonic() - started))
    except KeyboardInterrupt:
        if out is None:
            raise
        _write(out, rows)
        raise Interrupted(
            f"interrupted: {len(rows)} of {len(asked)} answers are in {out}; the same command goes on from there"
        ) from None
    if out is not None and journal is not None:
        _write(out, rows)
        journal.path.unlink()
        console.line(f"{out}: {len(rows)} answer{'s' * (len(rows) != 1)}")
    return [rows[place] for place in sorted(rows)]


def _journal(
    out: Path, pipeline: DraftVerify, asked: Sequence[AskedRow], rows: dict[int, dict[str, Any]], console: Console
) -> Journal:
    from mlx_rsgwm.core.resume import Journal
    from mlx_rsgwm.evaluation.runner import describe_run

    others: set[tuple[int, str]] = set()

    def take(row: Any, where: str) -> None:
        place, question = int(row["place"]), str(row["row"]["question"])
        if place < len(asked) and question == asked[place].question:
            rows[place] = dict(row["row"])
        else:
            others.add((place, question))

    journal = Journal(_journal_path(out), _settings(describe_run(pipeline, (), 0)), take)
    if others and not rows:
        problem = f"{journal.path} keeps {len(others)} answers to other questions"
        raise RsgwmError(f"{problem}; give another --out, or delete it to start anew")
    if others:
        about = f"{len(others)} other question{'s' * (len(others) != 1)}"
        console.progress.warning(f"warning: answers to {about}, kept from before, are left out")
    if rows:
        console.progress.message(f"{len(rows)} of {len(asked)} answers are there already; going on with the rest")
    return journal


def _settings(about: Mapping[str, Any]) -> dict[str, Any]:
    """What answers depend on, side by side, so that a refusal names the option that changed."""
    flat = {**about, **about["loop"], **about["loop"]["sampling"]}
    return {name: flat[name] for name in flat if name not in ("questions", "items", "loop", "sampling")}


def _row(asked: AskedRow, row: Mapping[str, Any]) -> dict[str, Any]:
    named = {} if asked.id is None else {"id": asked.id}
    return {**named, "row": asked.number, "question": asked.question, **row}


def _write(out: Path, rows: Mapping[int, Mapping[str, Any]]) -> None:
    from mlx_rsgwm.core.files import write_text

    lines = [json.dumps(rows[place], ensure_ascii=False, allow_nan=False) for place in sorted(rows)]
    write_text(out, "".join(f"{line}\n" for line in lines))


def _pace(done: int, total: int, seconds: float) -> str:
    """Rate and time left, as far as they can be told."""
    from mlx_rsgwm.core.progress import shown_time

    if seconds < 1:
        return ""
    return f"{60 * done / seconds:.3g} a minute, {shown_time((total - done) * seconds / done)} left"


class _InOrder:
    """Prints rows in the order of the questions, each as soon as those before it are there."""

    def __init__(self, console: Console, asked: Sequence[AskedRow]) -> None:
        self._console, self._next = console, 0

    def show(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        while (row := rows.get(self._next)) is not None:
            self._next += 1
            shown = "no answer" if row["answer"] is None else " / ".join(row["answer"].splitlines())
            self._console.line(f"{row['question']}\n  {shown}{_verdict(row)}")


def _verdict(row: Mapping[str, Any]) -> str:
    if "score" not in row:
        return ""
    state = "accepted" if row["accepted"] else "not accepted"
    why = f"{row['false_equation']} is false" if "false_equation" in row else f"score {row['score']:.3f}"
    return f" ({why}, {state}, {row['attempts']} attempts)"
