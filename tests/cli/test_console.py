"""Where text, results and progress go."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.console import DEFAULT_SEED, BarProgress, Console, WarningsOnly, common_options
from mlx_rsgwm.core.progress import LineProgress


def run(body, *arguments):
    """Run a command with the common options, whose body takes a console."""

    @click.command()
    @common_options
    def probe(console: Console) -> None:
        body(console)

    return CliRunner().invoke(probe, list(arguments), catch_exceptions=False)


def speak(console):
    console.line("a table")
    console.result({"accuracy": 0.5, "folder": Path("runs") / "x", "name": "Zürich"})


def test_without_json_the_text_is_the_result():
    result = run(speak)
    assert result.stdout == "a table\n"
    assert result.stderr == ""


def test_with_json_the_object_is_the_last_line_and_text_moves():
    result = run(speak, "--json")
    assert json.loads(result.stdout) == {"accuracy": 0.5, "folder": str(Path("runs") / "x"), "name": "Zürich"}
    assert result.stderr == "a table\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_json_is_refused(value):
    with pytest.raises(ValueError, match="JSON"):
        run(lambda console: console.result({"accuracy": value}), "--json")


def test_options_reach_the_console():
    seen = []
    run(seen.append)
    run(seen.append, "--seed", "7", "--quiet", "--json")
    assert seen == [
        Console(json=False, quiet=False, seed=DEFAULT_SEED),
        Console(json=True, quiet=True, seed=7, seed_given=True),
    ]
    assert DEFAULT_SEED == 42


def test_own_options_and_common_options_mix_in_either_order():
    @common_options
    @click.option("--steps", type=int)
    def body(console: Console, steps: int) -> None:
        console.line(f"{steps} {console.seed}")

    assert CliRunner().invoke(click.command()(body), ["--steps", "3", "--seed", "5"]).output == "3 5\n"


def work(total, steps=None, units=1):
    def body(console):
        with console.progress.task("train", total) as advance:
            for step in range(total if steps is None else steps):
                advance(units, f"loss {step}")

    return body


def counts(result):
    """The units done on every line of progress."""
    return [int(line.split()[1].split("/")[0]) for line in result.stderr.splitlines()]


def test_plain_progress_shows_first_tenths_and_last():
    result = run(work(200))
    assert counts(result) == [1, *range(20, 201, 20)]
    assert result.stderr.splitlines()[-1].startswith("train: 200/200, loss 199, ")
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("total", "steps", "expected"), [(3, 3, [1, 2, 3]), (10, 0, [0]), (100, 15, [1, 10, 15]), (0, 0, [0])]
)
def test_plain_progress_of_short_and_unfinished_work(total, steps, expected):
    assert counts(run(work(total, steps))) == expected


def test_plain_progress_in_large_steps():
    assert counts(run(work(100, steps=4, units=25))) == [25, 50, 75, 100]


def test_quiet_shows_no_progress():
    seen = []
    assert run(work(50), "--quiet").stderr == ""
    run(lambda console: seen.append(type(console.progress)), "--quiet")
    assert seen == [WarningsOnly]


def test_one_console_has_one_progress():
    console = Console()
    assert console.progress is console.progress
    assert isinstance(console.progress, LineProgress)


def test_bars_on_a_terminal_leave_standard_output_alone():
    """In a real terminal: nested bars draw, messages appear above them, a redirected result stays clean."""
    leader, follower = pty.openpty()
    program = (
        "from mlx_rsgwm.cli.console import Console, BarProgress\n"
        "console = Console()\n"
        "assert isinstance(console.progress, BarProgress)\n"
        "with console.progress.task('outer [x]', 2) as outer:\n"
        "    with console.progress.task('inner', 3) as inner:\n"
        "        inner(1, 'loss 1')\n"
        "        console.progress.message('news [y]')\n"
        "        console.line('result')\n"
        "    outer(1, '')\n"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=follower, env=environment, timeout=60
        )
        drawn = os.read(leader, 65536).decode()
    finally:
        os.close(follower)
        os.close(leader)
    assert done.returncode == 0, drawn
    assert done.stdout == b"result\n"
    for part in ("outer [x]", "inner", "news [y]", "inner: done in"):
        assert part in drawn


def test_bars_close_after_an_error():
    bars = BarProgress()
    with pytest.raises(RuntimeError), bars.task("train", 2):
        raise RuntimeError
    with bars.task("again", 1) as advance:
        advance(1, "")


def test_quiet_keeps_what_the_result_is_worth(capsys):
    """A base that mlx-lm runs otherwise than transformers says so with --quiet, too."""
    progress = Console(quiet=True).progress
    progress.message("loading")
    progress.warning("base: mlx-lm does not apply this model's window of 4 tokens")
    with progress.task("work", 3) as advance:
        advance(3, "")
    assert capsys.readouterr().err == "base: mlx-lm does not apply this model's window of 4 tokens\n"
    Console().progress.warning("told")
    assert "told\n" in capsys.readouterr().err
