"""Every command that README and docs show is parsed by the real command line; the quick start is run as it stands."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.commands import COMMANDS
from mlx_rsgwm.cli.groups import find_command
from mlx_rsgwm.cli.main import rsgwm

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLACEHOLDERS = re.compile(r"^(COMMAND|REPOSITORY)$")
PATHS = r"`((?:tests|bench|mlx_rsgwm|converters|cli|docs)/[\w/.-]+\.(?:py|md|yaml))(?:::(\w+))?`"
RUN_MARK = "<!-- run in order -->"


def shown(page):
    """Lines of indented or fenced blocks, without comments, that start a command of ours."""
    fenced = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            words = re.split(r"\s+#\s", line.strip())[0]
            words = re.sub(r"^(time |mlx\.launch (?:-n \d+|--hostfile \S+) -- |echo .* \| )", "", words)
            if words.startswith("rsgwm "):
                yield from words.split(" && ")


def spoken(page):
    """Commands in running text: `rsgwm train --resume`."""
    text = page.read_text(encoding="utf-8")
    return sorted({found[1] for found in re.finditer(r"`(rsgwm [^`]+)`", text)})


def parse(words):
    """Parse as the program would, without running; returns the context of the command."""
    command, context = rsgwm, rsgwm.make_context("rsgwm", shlex.split(words)[1:])
    while isinstance(command, click.Group):
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, arguments, parent=context)
    return context


def examples(name):
    """Commands that the help of a command shows: lines after ``Examples``, and the sentence after ``Example``."""
    for paragraph in re.split(r"\n\s*\n", find_command(name).help.replace("\b", "")):
        if found := re.match(r"\s*Example\b[^:]*:\s+(rsgwm .*)", paragraph, re.DOTALL):
            yield " ".join(found[1].split())
        elif re.match(r"\s*Examples\b[^:]*:", paragraph):
            for line in paragraph.strip().splitlines()[1:]:
                yield re.sub(r"^(mlx\.launch .*? -- |echo .* \| )", "", line.strip())


COMMANDS_SHOWN = [(page.name, words) for page in PAGES for words in shown(page)]
COMMANDS_SHOWN += [(f"help of {name}", words) for name in COMMANDS for words in examples(name)]


def test_there_are_commands_to_check():
    assert len(COMMANDS_SHOWN) >= 90
    without = {"demo", "doctor"}  # they need nothing
    assert {name for name in COMMANDS if f"help of {name}" not in dict(COMMANDS_SHOWN)} == without
    pages = {page for page, _ in COMMANDS_SHOWN}
    assert {"README.md", "quick-start.md", "verifier.md", "benchmarks.md", "training.md", "merging.md"} <= pages


@pytest.mark.parametrize(("page", "words"), COMMANDS_SHOWN, ids=[f"{page}: {words}" for page, words in COMMANDS_SHOWN])
def test_every_command_shown_is_understood(page, words):
    parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_in_running_text_exists(page):
    wrong = []
    for words in spoken(page):
        names = [word for word in words.split()[1:] if not PLACEHOLDERS.match(word)]
        command = rsgwm
        while names and isinstance(command, click.Group) and not names[0].startswith("-"):
            name = names.pop(0)
            command = command.get_command(click.Context(rsgwm), name)
            if command is None:
                break
        if command is None:
            wrong.append(words)
            continue
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        options = {name.partition("=")[0] for name in names if name.startswith("-")}
        wrong += [f"{words}: {option}" for option in options - known - {"--help", "-h"}]
    assert wrong == []


def test_every_command_is_on_some_page():
    everything = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in COMMANDS if f"rsgwm {name}" not in everything] == []


def test_every_link_leads_somewhere():
    wrong = []
    for page in PAGES:
        for found in re.finditer(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            if not (page.parent / found[1]).exists():
                wrong.append(f"{page.name}: {found[1]}")
        for found in re.finditer(PATHS, page.read_text(encoding="utf-8")):
            target = ROOT / found[1]
            if not target.exists() or (found[2] and f"def {found[2]}(" not in target.read_text()):
                wrong.append(f"{page.name}: {found[0]}")
    assert wrong == []


def test_every_file_and_name_of_the_architecture_exists():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/.-]+)`", text))
    files = {name for name in named if name.endswith(".py") or "/" in name}
    places = (ROOT, ROOT / "mlx_rsgwm")
    assert len(files) > 50
    assert [name for name in sorted(files) if not any((place / name).exists() for place in places)] == []
    code = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "mlx_rsgwm").rglob("*.py"))
    # What is no file: functions and classes, commands, and the arrays and files of an adapter.
    others = {name for name in named - files if name not in COMMANDS and name != "with"}
    assert len(others) > 10
    assert [name for name in sorted(others) if not re.search(rf"(?:def|class) {name}\b|[\"./]{name}\"", code)] == []


def test_every_make_target_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    named = {name for text in texts for name in re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE)}
    assert named - targets == set()
    assert {"demo", "test", "slow", "lint"} <= named


def test_troubleshooting_quotes_what_the_program_says():
    """Every quoted message is in the source, up to the names that stand in capitals."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    source = "\n".join(
        file.read_text(encoding="utf-8")
        for top in ("mlx_rsgwm", "converters", "cli")
        for file in sorted((ROOT / top).rglob("*.py"))
    )
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    quoted = [found for row in rows for found in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) >= 10
    for message in quoted:
        for part in re.split(r"[A-Z]{3,}|…|SHA-256", message):
            assert part.strip(" ():") in source, message


BLOCK = re.search(rf"{RUN_MARK}\n\n((?:    .*\n)+)", (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8"))[1]


QUICKER = {"pool": ["--steps", "8"], "calibrate": ["--items", "4"], "eval": ["--items", "4"]}


def test_the_quick_start_runs(tiny_base, tmp_path, monkeypatch):
    """Every line, in order, in an empty folder; what ``smollm2-135m`` names is tiny, and so are the numbers."""
    from mlx_rsgwm.evaluation import judging
    from mlx_rsgwm.models import base

    judge = judging.judge

    def half_right(question, draft, *more):
        """The tiny model answers nothing right, and on that nothing can be calibrated."""
        judged = judge(question, draft, *more)
        right = sum(draft.tokens) % 2 == 0
        return replace(judged, value=question.gold if right else None, status="", correct=right)

    monkeypatch.setattr(judging, "judge", half_right)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_resolve_alias", lambda name, progress: tiny_base)
    lines = [line.strip() for line in BLOCK.splitlines()]
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line)[1:]
        result = CliRunner().invoke(rsgwm, [*words, *QUICKER.get(words[0], []), "--quiet"])
        assert result.exit_code == 0, f"{line}\n{result.output[-1500:]}"
    left = {path.name for path in tmp_path.iterdir()}
    assert {"corpus", "pool", "drafter", "verifier", "report", "drafter-peft"} <= left
    assert (tmp_path / "verifier" / "calibration.json").is_file()
    assert (tmp_path / "report" / "report.html").is_file()
