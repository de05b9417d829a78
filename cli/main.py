"""The ``rsgwm`` command: its subcommands, and how errors become one line and an exit code.

Exit codes: 0 done; 1 internal failure; 2 bad input; 3 a check that was asked for failed; 130 interrupted; 141 whoever
read the output went away. The commands themselves are in a table of their own, :mod:`mlx_rsgwm.cli.commands`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

import click

from mlx_rsgwm import __version__
from mlx_rsgwm.cli.console import Stopped, show
from mlx_rsgwm.cli.crashes import address_limit, crashes_told
from mlx_rsgwm.cli.groups import LazyGroup
from mlx_rsgwm.cli.old_names import with_new_names
from mlx_rsgwm.cli.startup import hide_torch, keep_limits
from mlx_rsgwm.cli.streams import prepare_streams
from mlx_rsgwm.cli.wrong_words import explained, refuse_one_dash
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.signals import TOLD_TO_END, handled

BAD_INPUT = RsgwmError.exit_code
INTERNAL = 1
INTERRUPTED = 130
UNREAD = 141  # what a shell makes of SIGPIPE
LONGEST_SHOWN = 60  # characters of a name that is too long
LONG_WORD = re.compile(r"\S{400,}")  # longer than any name worth reading: what somebody gave by mistake
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
TOO_MANY_OPEN = {errno.EMFILE, errno.ENFILE}
FAILING = {errno.EIO, errno.ESTALE}
UNUSABLE = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}
# MLX's words: of the Metal and the CUDA allocator, and of a command buffer that failed on Metal; then the loader's of a
# library, Python's of a thread, and the system's.
NO_MEMORY_IN = (RuntimeError, ImportError, OSError)
NO_MEMORY = re.compile(
    r"malloc\].*(allocate|memory)|Insufficient Memory|out of memory|std::bad_alloc"
    r"|failed to map segment|can't start new thread|Cannot allocate memory",
    re.IGNORECASE,
)
UNREADABLE = "[read]"  # how MLX begins what it says of a file that ends too soon
UNTOLD = (UNREADABLE, "Resource temporarily unavailable")  # or where it reads to what it did not get, or gets no thread
KEPT = "what was finished before is kept"
LOWER = (
    "lower --batch-size or --max-seq-length in training, --batch-rows, --drafts or --max-tokens in answering, "
    "or take a smaller or quantised base"
)
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


class Rsgwm(LazyGroup):
    """The root group, which ends every failure in one line and an exit code."""

    # click overloads `main` on `standalone_mode`, which is not for callers of this one to choose.
    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **settings: Any
    ) -> NoReturn:
        """Run the command line and exit; the arguments are those of :meth:`click.Command.main`."""
        arguments, notes = with_new_names(sys.argv[1:] if args is None else args)
        for note in notes:
            show(note, err=True)
        outcome: dict[str, bool] = {}
        code, text = 0, ""
        try:
            refuse_one_dash(arguments)
            with handled(TOLD_TO_END, _stop):
                returned = super().main(
                    arguments, prog_name or "rsgwm", **{**settings, "standalone_mode": False, "obj": outcome}
                )
            code = returned if isinstance(returned, int) else 0
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(error.exit_code)
        except SystemExit:
            if "PacifyFlush" not in type(sys.stdout).__name__:  # click's, once a pipe was closed
                raise
            code, text = UNREAD, f"nobody reads the output any more; {KEPT}"
        except (click.Abort, KeyboardInterrupt):
            code, text = INTERRUPTED, f"interrupted; {KEPT}"
        except Exception as error:
            code, text = explain(error)
            if code != INTERNAL and outcome.get("verbose"):
                traceback.print_exception(error)
        if text:
            report_failure(code, text, as_json=asks_json(arguments) and not outcome.get("result_printed"))
        sys.exit(code)


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and the one line for a failure; an unforeseen one prints its traceback here."""
    if (said := _out_of_memory(error)) is not None:
        return BAD_INPUT, f"out of memory ({said}); {KEPT}; {LOWER}"
    if isinstance(error, RsgwmError):
        return error.exit_code, str(error)
    if isinstance(error, click.ClickException):
        return BAD_INPUT, _of_the_command_line(error)
    line = _of_a_file(error) if isinstance(error, OSError) else _of_a_library(error)
    if line is not None:
        return BAD_INPUT, line
    traceback.print_exception(error)
    return INTERNAL, f"internal failure: {type(error).__name__}: {error}"


def _of_the_command_line(error: click.ClickException) -> str:
    """The line for what click refuses."""
    if isinstance(error, click.UsageError):
        context = error.ctx
        return f"{explained(error)} (try '{context.command_path if context else 'rsgwm'} --help')"
    return error.format_message()


def _of_a_file(error: OSError) -> str | None:
    """The line for what the system says of a file or a disk; None for what it says of anything else."""
    if error.errno in FULL_DISK:
        where = f" while writing {error.filename}" if error.filename else ""
        what = "a file is too large for the disk" if error.errno == errno.EFBIG else "no space left on the disk"
        return f"{what}{where}; free some space or choose another folder"
    if error.errno in FORBIDDEN:
        return f"{error.filename or 'a file'}: {error.strerror}; change its permissions or choose another place"
    if error.errno in UNUSABLE:
        name = str(error.filename or "a name")
        shown = name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}…"
        return f"{shown}: {str(error.strerror).lower()}; choose another name"
    if error.errno in TOO_MANY_OPEN:
        return "too many files are open; raise the limit (ulimit -n)"
    if error.errno in FAILING:
        return f"{error.filename or 'a file'}: {error.strerror}; the disk or network drive failed, try again"
    return None


def _of_a_library(error: Exception) -> str | None:
    """The line for input of which Python or MLX only says in its own words that it is bad; None for other errors."""
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # what pathlib says of ~nosuchuser
        return "a path begins with ~ and the name of a user that does not exist; write it out"
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a path holds a character that no file name can have (NUL)"
    if isinstance(error, RuntimeError) and str(error).startswith(
        UNREADABLE
    ):  # MLX's, of arrays that are read when used
        return "a file became shorter while it was being read; look what writes it and try again"
    return None


def _out_of_memory(error: BaseException | None) -> str | None:
    """What Python, a library or MLX says of memory that it did not get, also behind another error; None otherwise."""
    while error is not None:
        first = (str(error).splitlines() or [""])[0]
        if isinstance(error, MemoryError) or (isinstance(error, NO_MEMORY_IN) and NO_MEMORY.search(first)):
            return first or "Python got none"
        if isinstance(error, RuntimeError) and first.startswith(UNTOLD) and address_limit() is not None:
            return f"{first}, as ulimit -v leaves no room"
        error = error.__cause__
    return None


def report_failure(code: int, text: str, as_json: bool) -> None:
    """One line on standard error; with ``--json`` also an object as the last line of standard output.

    Where they cannot be written the exit code has to do.
    """
    line = LONG_WORD.sub(lambda word: f"{word[0][:LONGEST_SHOWN]}…{word[0][-20:]}", " ".join(text.split()))
    with suppress(OSError):
        show(f"rsgwm: error: {line}", err=True)
    if as_json:
        with suppress(OSError):
            show(json.dumps({"error": line, "exit_code": code}, ensure_ascii=False))


def asks_json(arguments: Sequence[str]) -> bool:
    """Whether ``--json`` is among the options: known even when the rest cannot be parsed."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in options


def _stop(signum: int, frame: FrameType | None) -> None:
    """Let ``kill`` end the work much as Ctrl-C does, so that every ``finally`` runs; a SIGHUP after it is ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise Stopped


def set_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Defaults for the libraries below, which the user's own settings override.

    No telemetry; no tokenizer threads, which only warn once the process forks.
    """
    environment.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")


def quieten_libraries(arguments: Sequence[str]) -> None:
    """Let no library warn or log on standard error, unless ``--verbose`` or Python's own ``-W`` asks for it."""
    if sys.warnoptions or {"-v", "--verbose"} & set(arguments):
        return
    for library in ("HF_HUB", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())  # without a handler Python prints what libraries log


def show_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Print the version and those of the parts a report of a problem needs."""
    if not value or ctx.resilient_parsing:
        return
    from mlx_rsgwm.core.machine import all_versions

    parts = ", ".join(f"{name} {version}" for name, version in all_versions().items() if name != "mlx-rsgwm")
    click.echo(f"rsgwm {__version__} ({parts})")
    ctx.exit()


@click.group(cls=Rsgwm, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Show the version, and those of the main components.",
)
def rsgwm() -> None:
    """Train a pool of LoRA adapters, merge it into a drafter and a verifier, get checked answers.

    Start with `rsgwm demo`; `rsgwm doctor` examines the machine; `rsgwm help COMMAND` has examples.
    """


def main() -> NoReturn:
    """The entry point of the ``rsgwm`` script."""
    prepare_streams()
    with crashes_told() as limit:
        if limit is not None:
            text = f"out of memory (ulimit -v allows {limit / 1e6:.0f} MB); {KEPT}; {LOWER}"
            report_failure(BAD_INPUT, text, as_json=asks_json(sys.argv[1:]))
            sys.exit(BAD_INPUT)
        set_environment()
        quieten_libraries(sys.argv[1:])
        hide_torch(sys.argv[1:])
        keep_limits()
        rsgwm.main()
