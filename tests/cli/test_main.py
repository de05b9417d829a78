"""What a user meets at the edge: exit codes, one line for every foreseen error, JSON as the last line."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mlx_rsgwm import __version__
from mlx_rsgwm.cli.commands import COMMANDS, GROUPS, SECTIONS, members, summary
from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.main import asks_json, rsgwm, set_environment
from mlx_rsgwm.cli.old_names import COMMANDS_BEFORE, with_new_names
from mlx_rsgwm.core.errors import AdapterError, CheckFailed, RsgwmError

ENTRY = "from mlx_rsgwm.cli.main import main; main()"


@pytest.fixture
def run():
    """Runs ``rsgwm`` with the given arguments and gives click's result."""
    return lambda *arguments: CliRunner().invoke(rsgwm, list(arguments))


@pytest.fixture
def command(monkeypatch):
    """Adds a command ``sample`` whose body is the given function of a console."""

    def add(body):
        @click.command()
        @common_options
        def sample(console: Console) -> None:
            body(console)

        module = types.ModuleType("sample_module")
        module.sample = sample
        monkeypatch.setitem(sys.modules, "sample_module", module)
        monkeypatch.setitem(COMMANDS, "sample", ("sample_module:sample", "A sample."))

    return add


def raising(error):
    def body(console):
        raise error

    return body


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_exists_and_explains_itself(run, name):
    result = run(*name.split(), "--help")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"Usage: rsgwm {name}")


@pytest.mark.parametrize("group", ["", *GROUPS])
def test_help_lists_every_command_and_what_it_is(run, group):
    shown = " ".join(run(*group.split(), "--help").stdout.split())
    for name in members(group):
        assert f" {name} {summary(f'{group} {name}'.strip())}" in shown


def test_every_command_stands_in_one_section(run):
    placed = [name for names in SECTIONS.values() for name in names]
    assert sorted(placed) == sorted({name.split()[0] for name in COMMANDS})
    lines = run("--help").stdout.splitlines()
    assert [line for line in lines if line.rstrip(":") in SECTIONS] == [f"{title}:" for title in SECTIONS]
    assert not {name for name in COMMANDS if " " in name and name.split()[0] not in GROUPS}
    assert [name for name in GROUPS if GROUPS[name].split(": ")[1] != f"{', '.join(members(name))}."] == []


@pytest.mark.parametrize(
    ("names", "shown"),
    [([], "rsgwm"), (["merge"], "rsgwm merge"), (["hub", "push"], "rsgwm hub push"), (["hub"], "rsgwm hub")],
)
def test_help_is_a_command_too(run, names, shown):
    assert run("help", *names).stdout == run(*names, "--help").stdout
    assert run("help", *names).stdout.startswith(f"Usage: {shown} [OPTIONS]")


def test_help_of_what_does_not_exist(run):
    assert "no command 'pusj' in 'hub'; did you mean 'push'?" in run("help", "hub", "pusj").stderr
    assert "rsgwm merge has no command 'all'" in run("help", "merge", "all").stderr


@pytest.mark.parametrize("before", COMMANDS_BEFORE)
def test_old_names_work_and_say_so(run, before):
    now = COMMANDS_BEFORE[before]
    result = run(*before.split(), "--help")
    assert result.stdout == run(*now.split(), "--help").stdout
    assert result.stderr.splitlines() == [
        f"note: `rsgwm {before}` is now `rsgwm {now}`; the old name goes with the next release"
    ]
    assert before not in run("--help").stdout.split()


def test_report_was_a_command(tmp_path):
    assert with_new_names(["report", str(tmp_path)])[0] == ["report", "write", str(tmp_path)]
    assert with_new_names(["report", "--json", "x"])[0] == ["report", "write", "--json", "x"]
    for today in (["report"], ["report", "-h"], ["report", "write", "x"], ["report", "wirte"]):
        assert with_new_names(today) == (today, [])


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "mlx_rsgwm", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: rsgwm [OPTIONS] COMMAND")


def test_verbose_shows_where_a_foreseen_error_arose(run, command):
    command(raising(RsgwmError("no such folder")))
    result = run("sample", "-v")
    assert result.exit_code == 2
    assert "in body" in result.stderr
    assert result.stderr.splitlines()[-1] == "rsgwm: error: no such folder"


@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [
        ("rsgwm tra", 1, {"train"}),
        ("rsgwm hub ", 2, {"push", "pull"}),
        ("rsgwm bench", 2, {"latency", "compare"}),
        ("rsgwm merge --dr", 2, {"--dry-run"}),
    ],
)
def test_the_shell_completes_commands_and_options(run, monkeypatch, words, position, expected):
    monkeypatch.setenv("_RSGWM_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(position))
    assert {line.partition(",")[2] for line in run().stdout.split()} == expected
    monkeypatch.setenv("_RSGWM_COMPLETE", "zsh_source")
    assert "#compdef rsgwm" in run().stdout


def test_version_names_the_components(run):
    output = run("--version").stdout
    assert output.startswith(f"rsgwm {__version__} (mlx ")
    assert "mlx-lm " in output
    assert "transformers " in output


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["doctr"], ["no command 'doctr'", "did you mean 'doctor'", "rsgwm --help"]),
        (["xyzzy"], ["no command 'xyzzy'", "demo, run, recipe, help"]),
        (["puhs"], ["did you mean 'rsgwm hub push'?"]),
        (["doctor", "--sed", "1"], ["--sed", "--seed", "rsgwm doctor --help"]),
        (["doctor", "--seed", "x"], ["--seed", "'x' is not a whole number", "rsgwm doctor --help"]),
        (["doctor", "--seed", "-1"], ["--seed", "-1"]),
        (["doctor", "extra"], ["extra", "rsgwm doctor --help"]),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(run, arguments, parts):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("rsgwm: error: ")
    for part in parts:
        assert part in result.stderr


def test_no_arguments_show_the_help(run):
    result = run()
    assert result.exit_code == 2
    assert "Data and training:" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (RsgwmError("a/b: no such file\nsay which"), 2, "a/b: no such file say which"),
        (AdapterError("shape differs"), 2, "shape differs"),
        (CheckFailed("parity 0.2 > 0.001"), 3, "parity 0.2 > 0.001"),
        (click.ClickException("bad"), 2, "bad"),
        (click.BadParameter("too many", param_hint="--count"), 2, "--count: too many"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 2, "runs/x: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "runs/x"), 2, "runs/x: Read-only"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "no space left on the disk"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
    ],
)
def test_a_foreseen_failure_is_one_line(run, command, error, code, part):
    command(raising(error))
    result = run("sample")
    lines = [line for line in result.stderr.splitlines() if line]
    assert result.exit_code == code
    assert result.stdout == ""
    assert len(lines) == 1
    assert lines[0].startswith("rsgwm: error: ")
    assert part in lines[0]


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "gone", "x")])
def test_an_unforeseen_failure_keeps_its_traceback(run, command, error):
    command(raising(error))
    result = run("sample", "--json")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert type(error).__name__ in result.stderr
    last = json.loads(result.stdout.splitlines()[-1])
    assert last["exit_code"] == 1
    assert type(error).__name__ in last["error"]


@pytest.mark.parametrize(
    ("arguments", "code"), [(["sample", "--json"], 2), (["sample", "--json", "--nope"], 2), (["prob", "--json"], 2)]
)
def test_with_json_a_failure_ends_in_an_object(run, command, arguments, code):
    command(raising(RsgwmError("no such folder")))
    result = run(*arguments)
    last = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == last["exit_code"] == code
    assert result.stderr == f"rsgwm: error: {last['error']}\n"


def test_a_failed_check_keeps_its_result_as_the_last_line(run, command):
    def body(console):
        console.result({"max_abs_logit": 0.5})
        raise CheckFailed("too far")

    command(body)
    result = run("sample", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == {"max_abs_logit": 0.5}
    assert result.stderr == "rsgwm: error: too far\n"


def test_an_exit_code_asked_of_click_is_kept(run, command):
    command(lambda console: click.get_current_context().exit(3))
    assert run("sample").exit_code == 3


def test_json_after_a_double_dash_is_an_argument():
    assert asks_json(["ask", "--json", "x"])
    assert not asks_json(["ask", "--", "--json"])


def test_the_environment_has_defaults_that_users_override():
    environment = {"TOKENIZERS_PARALLELISM": "true"}
    set_environment(environment)
    assert environment == {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.mark.parametrize(("options", "heard"), [([], False), (["--verbose"], True)])
def test_libraries_warn_and_log_for_who_asks(options, heard, tmp_path):
    (tmp_path / "sample_module.py").write_text(
        "import logging, warnings\n"
        "from mlx_rsgwm.cli.console import common_options\n"
        "import click\n"
        "@click.command()\n"
        "@common_options\n"
        "def sample(console):\n"
        "    warnings.warn('a warning')\n"
        "    logging.getLogger('library').warning('a log line')\n"
        "    console.line('done')\n"
    )
    program = (
        "from mlx_rsgwm.cli import commands, main\n"
        "commands.COMMANDS['sample'] = ('sample_module:sample', '')\n"
        "main.main()"
    )
    command = [sys.executable, "-c", program, "sample", *options]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "done\n"
    assert [part in done.stderr for part in ("a warning", "a log line")] == [heard, heard]
    assert heard or done.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_kill_and_ctrl_c_run_the_clean_up(number, tmp_path):
    """A command that is stopped runs its ``finally`` and exits with 130."""
    ready, cleaned = tmp_path / "ready", tmp_path / "cleaned"
    (tmp_path / "sample_module.py").write_text(
        "import pathlib, time, click\n"
        "@click.command()\n"
        "def sample():\n"
        "    try:\n"
        f"        pathlib.Path({str(ready)!r}).touch()\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        f"        pathlib.Path({str(cleaned)!r}).touch()\n"
    )
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mlx_rsgwm.cli import commands, main\n"
        "commands.COMMANDS['sample'] = ('sample_module:sample', '')\n"
        "main.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "sample"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert cleaned.exists()
    assert "rsgwm: error: interrupted" in stderr
    assert "Traceback" not in stderr


def test_help_is_quick():
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", ENTRY, "--help"], check=True, capture_output=True)
    assert time.monotonic() - started < 2  # 0.1 s on an idle machine


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "q", "--drafter", LONG, "--verifier", LONG],
        ["ask", "--file", LONG],
        ["run", "demo", "--out", LONG],
        ["run", f"{LONG}.yaml", "--out", "none"],
        ["merge", LONG, LONG, "--out", "none"],
        ["base", "info", "~nosuchuser/base"],
        ["train", "--corpus", "tests", "--out", "~nosuchuser/out"],
        ["merge", "~nosuchuser/a", "b", "--out", "none"],
        ["train", "--corpus", "tests", "--out", ""],
        ["train", "--corpus", "", "--out", "none"],
        ["train", "--base", "", "--corpus", "tests", "--out", "none"],
        ["ask", "q", "--base", " ", "--drafter", "tests", "--verifier", "tests"],
        ["merge", "", "", "--out", "none"],
        ["base", "info", "a\0b"],
    ],
    ids=lambda arguments: " ".join(arguments[:2])[:30],
)
def test_names_that_no_file_can_have(run, arguments):
    before = sorted(os.listdir())
    result = run(*arguments)
    assert sorted(os.listdir()) == before
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert line.startswith("rsgwm: error:")


def test_the_page_of_commands_is_what_the_program_prints(run):
    page = Path(__file__).parents[2] / "docs" / "commands.md"
    assert page.read_text(encoding="utf-8") == run("help", "--markdown").stdout, (
        "rsgwm help --markdown > docs/commands.md"
    )
