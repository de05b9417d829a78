"""What every command shares: the common options, where text and results go, and how progress is drawn."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import click

from mlx_rsgwm.cli.options.kinds import Whole
from mlx_rsgwm.core.progress import Advance, LineProgress, Progress, printable
from mlx_rsgwm.core.random_streams import DEFAULT_SEED


class Stopped(KeyboardInterrupt):
    """The program was told to end (SIGTERM, SIGHUP): unlike Ctrl-C, nothing goes on after it."""


def show(text: str, err: bool = False, newline: bool = True) -> None:
    """Print a text, whoever wrote it, on standard output or standard error."""
    click.echo(printable(text), nl=newline, err=err)


def read_standard_input(largest: int = 64 << 20) -> str:
    """The UTF-8 text on standard input, of at most ``largest`` bytes: what is piped there may never end.

    Raises:
        RsgwmError: it cannot be read, holds more, or is no text.
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.core.files import decode_text

    try:
        data = sys.stdin.buffer.read(largest + 1)
    except (OSError, ValueError) as error:
        raise RsgwmError(f"cannot read standard input: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > largest:
        raise RsgwmError(f"standard input holds more than {largest >> 20} MB; give a file")
    return decode_text(data, "standard input")


def check_text(text: str, what: str) -> None:
    """Refuse bytes that are no text, which Python hands on as half characters: no tokenizer takes those."""
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise click.UsageError(f"{what} is not UTF-8 text: {printable(text)[:80]}")


@dataclass(frozen=True)
class Console:
    """Output of one command, as asked for by ``--json``, ``--quiet`` and ``--seed``.

    Standard output holds the result: text for people, or with ``--json`` one JSON object as its last line, and then
    the text moves to standard error. Progress always goes to standard error.
    """

    json: bool = False
    quiet: bool = False
    seed: int = DEFAULT_SEED
    seed_given: bool = False  # on the command line, so that it goes before a recipe's own
    verbose: bool = False

    def line(self, text: str = "") -> None:
        """Print text for people (it may hold newlines)."""
        show(text, err=self.json)

    def piece(self, text: str) -> None:
        """Print a part of a line, at once."""
        show(text, err=self.json, newline=False)

    def result(self, mapping: Mapping[str, Any]) -> None:
        """Print the command's result as JSON, with ``--json`` only. Call it once, at the end.

        Paths become strings. NaN and infinity raise ``ValueError``, for they are not JSON.
        """
        if not self.json:
            return
        show(json.dumps(mapping, ensure_ascii=False, allow_nan=False, default=os.fspath))
        context = click.get_current_context(silent=True)
        if context is not None and isinstance(context.obj, dict):
            context.obj["result_printed"] = True  # a later failed check must not print a second object

    @cached_property
    def progress(self) -> Progress:
        """Bars on a terminal, plain lines elsewhere, warnings alone with ``--quiet``."""
        if self.quiet:
            return WarningsOnly()
        return BarProgress() if sys.stderr.isatty() else LineProgress()


class WarningsOnly(Progress):
    """Says nothing but what the result is worth."""

    def warning(self, text: str) -> None:
        """Print one line on standard error."""
        show(text, err=True)


class BarProgress(Progress):
    """Draws one bar per open task on standard error, which must be a terminal."""

    def __init__(self) -> None:
        from rich import console, progress  # 60 ms that short commands need not spend

        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[note]}", markup=False),
            console=console.Console(stderr=True),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # a redirected result must not pass through the bars' stream
        )
        self._open = 0

    def message(self, text: str) -> None:
        """Print above the bars."""
        self._bars.console.print(printable(text), markup=False, highlight=False)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """Show a bar while the work lasts, and one plain line once it is done; tasks may nest."""
        if self._open == 0:
            self._bars.start()
        self._open += 1
        started = time.monotonic()
        bar = self._bars.add_task(printable(label), total=total, note="")

        def advance(units: int, note: str = "") -> None:
            self._bars.update(bar, advance=units, note=printable(note))

        try:
            yield advance
            self.message(f"{label}: done in {time.monotonic() - started:.0f} s")
        finally:
            self._bars.remove_task(bar)
            self._open -= 1
            if self._open == 0:
                self._bars.stop()


def common_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that all have, and pass its function a :class:`Console` first."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of standard output.")
    @click.option("--quiet", is_flag=True, help="Show no progress.")
    @click.option("-v", "--verbose", is_flag=True, help="Show what libraries log, and where an error arose.")
    @click.option(
        "--seed",
        type=Whole(0, 2**32 - 1),
        default=DEFAULT_SEED,
        show_default=True,
        metavar="INTEGER",
        help="Seed of everything random.",
    )
    @functools.wraps(function)
    def command(*arguments: Any, as_json: bool, quiet: bool, verbose: bool, seed: int, **options: Any) -> None:
        context = click.get_current_context()
        if verbose:
            logging.basicConfig(level=logging.INFO)
            if isinstance(context.obj, dict):
                context.obj["verbose"] = True  # a foreseen error then shows its traceback, too
        source = context.get_parameter_source("seed")
        given = source not in (None, click.core.ParameterSource.DEFAULT)
        for name, value in options.items():
            for text in value if isinstance(value, tuple) else (value,):
                check_text(text if isinstance(text, str) else "", name)
        if any(isinstance(options.get(name), str) and not options[name].strip() for name in ("base", "base_name")):
            raise click.UsageError("--base is empty; leave it out, or name a model")
        function(Console(as_json, quiet, seed, given, verbose), *arguments, **options)

    return command
