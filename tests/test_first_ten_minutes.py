"""docs/first-ten-minutes.md is what the commands print: run here on a tiny random base, and held to the page.

``RSGWM_WRITE_PAGES=1 pytest tests/test_first_ten_minutes.py`` writes the page anew.
"""

import json
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_rsgwm.bench.terminal import Terminal
from mlx_rsgwm.cli import ask
from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.evaluation import judging
from mlx_rsgwm.models import base

PAGE = Path(__file__).parent.parent / "docs" / "first-ten-minutes.md"
SMALLER = "--set data.rows=48 --set data.calibration_items=2 --set evaluate.items=3 --set evaluate.timed=1"
SMALLER += " --set loop.max_tokens=6 --set export.parity=false --set train.directions=8 --set train.num_layers=2"
SMALLER += " --set paper=null"
HEAD = """\
# The first ten minutes

What one types and what comes back. A test runs these commands and holds this page to them; it does so on a random base
of a few thousand parameters and with a coin for a judge, so that the words are real and the figures mean nothing.
Progress is left out.
"""
ASK = "rsgwm ask --file questions.txt --out answers.jsonl --adapter c"
PARTS = (
    (
        "See it whole",
        "`rsgwm demo` trains four adapters on a small model, merges them, and says what checking did.",
        (("rsgwm demo", SMALLER),),
    ),
    (
        "Your own questions",
        'A file with one JSON object a line, `{"question": "…", "answer": "…"}`, becomes a commented recipe.',
        (
            ("rsgwm recipe init sums.jsonl --base smollm2-135m", ""),
            ("rsgwm run own.yaml --dry-run", ""),
            ("rsgwm run own.yaml", "--set loop.max_tokens=6 --set evaluate.timed=1"),
        ),
    ),
    (
        "Two adapters from the Hub",
        "Of one base model, whoever trained them; the method is chosen by what they hold.",
        (("rsgwm merge owner/adapter-1 owner/adapter-2 --out c", ""),),
    ),
    (
        "A file of questions",
        "One a line, JSON or a table. Ctrl-C keeps what is done: pressed twice here, and the same command goes on.",
        ((ASK, "--max-tokens 4"),) * 3,
    ),
)
SAID = "It is typed in a terminal, with editing and history; Ctrl-C stops an answer and not the program."
TALK = ("What is 2 + 3?", "/help", "exit")
END = {"What is 2 + 3?": r"\n(?=>)", "/help": r"stops an answer\s", "exit": r"\d questions?\s"}
# What depends on the last bits of a machine's arithmetic: what was right, and of which question an example is given.
OUTCOMES = ("Checking", "Acceptance", "Right are", "All ", "No answer", "With false", "“", "  rejected", "  accepted")


def stable(page):
    """The page without outcomes and numbers."""
    lines = [line for line in page.splitlines() if not line.startswith(OUTCOMES)]
    return [re.sub(r"[\d.e+-]*\d|[█░]+", "#", re.sub(r"\s+", " ", line)) for line in lines if line.strip()]


@pytest.fixture
def transcript(adapter_sources, tiny_base, tmp_path, monkeypatch):
    """Run a line as shown, with what makes it quick, and return what it printed."""
    for number in (1, 2):
        adapter_sources(number, sidecar=False)
    work = tmp_path / "work"
    work.mkdir()
    rows = [{"question": f"What is {n} + 3?", "answer": f"{n} + 3 = {n + 3}\n#### {n + 3}"} for n in range(60)]
    (work / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = judging.judge

    def by_a_coin(question, draft, *more):
        right = sum(draft.tokens) % 2 == 0
        judged = judge(question, draft, *more)
        return replace(judged, value=question.gold if right else None, status="", correct=right)

    monkeypatch.setattr(judging, "judge", by_a_coin)
    monkeypatch.setattr(base, "_resolve_alias", lambda name, progress: tiny_base)
    (work / "questions.txt").write_text("What is 2 + 3?\nWhat is 4 + 3?\nWhat is 6 + 3?\n")
    monkeypatch.setattr(ask, "_alone", stopped_twice(ask._alone))
    monkeypatch.chdir(work)

    def run(line, more):
        done = CliRunner().invoke(rsgwm, [*shlex.split(line)[1:], *shlex.split(more), "--quiet"])
        assert done.exit_code in (0, 130), f"{line}\n{done.output[-1500:]}"
        told = done.stdout if done.exit_code == 0 else f"^C\n{done.stderr}"
        printed = told.replace(str(tiny_base), "smollm2-135m").rstrip()
        return f"$ {line}\n" + re.sub(r"(?m)^(  (?:rejected|accepted)  ).*(  \()", r"\1…\2", printed)  # random letters

    return run


def stopped_twice(answers):
    """``answers`` as they come, and Ctrl-C after the first of two runs."""
    runs = []

    def until(speaker, texts, batch_rows):
        runs.append(texts)
        for row in answers(speaker, texts, batch_rows):
            yield row
            if len(runs) < 3:
                raise KeyboardInterrupt

    return until


def conversation(folder):
    """What is typed and shown in a terminal, the answer left out: its letters are random."""
    program = "from mlx_rsgwm.cli.main import main; main()"
    command = [sys.executable, "-c", program, "chat", "--adapter", "c", "--quiet", "--max-tokens", "6"]
    terminal = Terminal(command, {"XDG_CACHE_HOME": str(folder)})
    try:
        shown = ["$ rsgwm chat --adapter c", terminal.wait_for(r"exit ends\s").strip()]
        for line in TALK:
            terminal.wait_for(">")
            terminal.send(line)
            terminal.wait_for(re.escape(line))
            terminal.send("\r")
            terminal.wait_for(r"\n")
            answer = terminal.wait_for(END[line]).strip()
            shown += [
                f"> {line}",
                "…" if line == TALK[0] else re.sub(r"\s*\n", "\n", answer).removeprefix(f"> {line}\n"),
            ]
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()
    return "\n".join(shown)


def test_the_page_is_what_the_commands_print(transcript, tmp_path):
    parts = [HEAD]
    for title, said, lines in PARTS:
        shown = "\n".join(transcript(line, more) for line, more in lines)
        parts.append(f"## {title}\n\n{said}\n\n```text\n{shown}\n```\n")
    parts.append(f"## A conversation\n\n{SAID}\n\n```text\n{conversation(tmp_path)}\n```\n")
    page = "\n".join(parts)
    if os.environ.get("RSGWM_WRITE_PAGES"):
        PAGE.write_text(page, encoding="utf-8")
    stale = "run: RSGWM_WRITE_PAGES=1 pytest tests/test_first_ten_minutes.py"
    assert stable(PAGE.read_text(encoding="utf-8")) == stable(page), stale


def test_a_stale_page_is_seen():
    page = PAGE.read_text(encoding="utf-8")
    assert stable(page.replace("rsgwm demo", "rsgwm demos")) != stable(page)
    assert stable(page.replace("Next: ", "Then: ")) != stable(page)
    assert stable(re.sub(r"about \d+ s", "about 99 s", page)) == stable(page)
