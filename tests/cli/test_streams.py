"""Standard streams that are closed, full, unread or no text, and texts that would steer a terminal: each a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mlx_rsgwm.cli.console import Console
from mlx_rsgwm.core.progress import LineProgress, printable

RUN = "import sys; from mlx_rsgwm.cli.main import main; sys.argv[0] = 'rsgwm'; main()"


def shell(line, *arguments, **options):
    """What became of ``rsgwm ARGUMENTS`` with the redirections of ``line`` behind it."""
    command = [
        "bash",
        "-c",
        f'set -o pipefail; "$0" -c "$1" "${{@:2}}" {line}',
        sys.executable,
        RUN,
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, timeout=120, check=False, **options)


def errors(done):
    return [line for line in done.stderr.decode().splitlines() if line]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device on this system")
@pytest.mark.parametrize(
    "arguments",
    [("merge", "--list"), ("merge", "--list", "--json"), ("--help",), ("base", "info", "/nowhere", "--json")],
)
def test_output_that_nothing_can_be_written_to(arguments):
    done = shell("> /dev/full", *arguments)
    assert done.returncode == 2
    assert [line for line in errors(done) if line.startswith("rsgwm: error: ")] == errors(done)[-1:]
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize(("line", "code"), [("2> /dev/full", 2), ("2>&-", 2), (">&-", 2), (">&- 2>&- <&-", 2)])
def test_streams_that_are_closed_leave_the_exit_code(line, code, tmp_path):
    done = shell(line, "base", "info", tmp_path / "nowhere", "--json")
    assert done.returncode == code
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device on this system")
@pytest.mark.parametrize("line", ["2> /dev/full", "2< /dev/null", "2>&-"])
def test_progress_that_cannot_be_shown_ends_no_work(line, make_adapter, tmp_path):
    adapters = [make_adapter(seed).save(tmp_path / str(seed)) for seed in range(2)]
    done = shell(line, "merge", *adapters, "--out", tmp_path / "merged", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout.decode().splitlines()[-1])["out"] == str(tmp_path / "merged")
    assert (tmp_path / "merged" / "manifest.json").exists()


def test_a_reader_that_goes_away_is_one_line():
    """``| head``: the exit code is the one that a shell gives to what a closed pipe ends."""
    done = shell("| true", "help", "--markdown")
    assert done.returncode == 141
    assert errors(done) == ["rsgwm: error: nobody reads the output any more; what was finished before is kept"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("<&-", "the question is empty"),
        ("0> /dev/null", "cannot read standard input: "),
        ("< /dev/zero", "standard input holds more than 64 MB"),
        ("<<< $'What is\\xff?'", "standard input is not UTF-8 text"),
        ("< <(printf 'a\\0b')", "standard input is not UTF-8 text"),
    ],
)
def test_a_question_on_standard_input_that_is_none(line, told, tmp_path):
    done = shell(line, "ask", "-", "--drafter", tmp_path, "--verifier", tmp_path)
    assert done.returncode == 2
    assert len(errors(done)) == 1
    assert told in errors(done)[0]


def test_an_option_that_is_no_text_is_refused_by_name(tmp_path):
    for arguments in (("ask", b"What\xff"), ("eval", "--task", b"\xff"), ("base", "info", tmp_path, "--seed", b"\xff")):
        done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, check=False, timeout=60)
        assert done.returncode == 2, done.stderr
        assert len(errors(done)) == 1


def test_a_terminal_without_a_character_gets_its_number(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = shell("", "base", "info", tmp_path / "→", env=environment)
    assert done.returncode == 2
    assert "\\u2192" in errors(done)[0]


# --- what is shown ----------------------------------------------------------------------------------------------

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\x9b31m\rb\u202etxt.exe\udcff"


def test_control_characters_are_written_out():
    shown = printable(HOSTILE)
    assert shown.isprintable()
    assert shown == r"a\u001b]0;owned\u0007\u001b[2J\u009b31m\u000db\u202etxt.exe\udcff"
    assert printable("tabs\tand\nlines, é, 中, 👍🏽") == "tabs\tand\nlines, é, 中, 👍🏽"


def test_whatever_is_shown_is_printable(capsys):
    """Text, results, warnings and news: a JSON text keeps its value, half a character among it."""
    for console in (Console(), Console(json=True), Console(quiet=True)):
        console.line(HOSTILE)
        console.result({"text": HOSTILE})
        console.progress.warning(HOSTILE)
        console.progress.message(HOSTILE)
        with console.progress.task(HOSTILE, 1) as advance:
            advance(1, HOSTILE)
    LineProgress().message(HOSTILE)
    out, err = capsys.readouterr()
    for line in (*out.splitlines(), *err.splitlines()):
        assert line.isprintable()
    (result,) = (line for line in out.splitlines() if line.startswith("{"))
    assert json.loads(result) == {"text": HOSTILE}


def test_what_draws_or_prints_elsewhere_would_be_seen():
    """Everything printed goes through one of two functions; help is click's own and holds no text of others."""
    from pathlib import Path

    root = Path(__file__).parents[2]
    allowed = {"cli/console.py": 1, "cli/reference.py": 2, "cli/main.py": 2, "mlx_rsgwm/core/progress.py": 1}
    calls = {}
    for folder in ("cli", "mlx_rsgwm", "converters"):
        for file in sorted((root / folder).rglob("*.py")):
            text = file.read_text()
            count = text.count("click.echo(") + sum(line.lstrip().startswith("print(") for line in text.splitlines())
            calls |= {str(file.relative_to(root)): count} if count else {}
    calls.pop("mlx_rsgwm/inference/open.py")  # an example in a docstring
    assert calls == allowed
