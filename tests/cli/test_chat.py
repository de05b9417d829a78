"""``rsgwm chat``: turns, commands and stops, with one adapter, a base or a pair; and in a real terminal."""

import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from mlx_rsgwm.bench.terminal import Terminal
from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.template import TEMPLATES, bare_template
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.inference.speaker import Speaker, open_speaker
from mlx_rsgwm.models.slots import AdapterSlots

# A shell's background job, such as a test run, ignores Ctrl-C and hands that on.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from mlx_rsgwm.cli.main import main; main()"
)

SHORT = ("--max-tokens", "4", "--quiet")


def chat(*arguments, code=0, text=""):
    made = CliRunner().invoke(rsgwm, ["chat", *map(str, arguments)], input=text)
    assert made.exit_code == code, made.output
    return made


@pytest.fixture
def folders(make_adapter, tmp_path):
    return [make_adapter(seed).save(tmp_path / f"a{seed}") for seed in range(2)]


def speaker(base, template, temperature=0.0, **adapters):
    slots = AdapterSlots(base)
    for name, adapter in adapters.items():
        slots.load(name, adapter)
    return Speaker(slots, template, Sampling(temperature=temperature, max_tokens=6))


@pytest.mark.parametrize("template", [TEMPLATES["plain"], bare_template(chat=True, system="Be short.")])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_later_turn_is_what_a_new_reading_of_it_all_gives(base, make_adapter, template, temperature):
    """The cache is cut back to what both turns have in common, and nothing of the last one stays in it."""
    talk = speaker(base, template, temperature, adapter=make_adapter(1))
    said = []
    for question in ("Hello there", "And then?", "Hello there"):
        answer = "".join(talk.say(question, said))
        fresh = "".join(Speaker(talk.slots, template, talk.sampling).say(question, said))
        assert answer == fresh
        said.append((question, answer))
    next(iter(talk.say("Stopped at once", said)))  # an answer that nobody waits for
    assert "".join(talk.say("Hello there")) == said[0][1]


def test_turns_are_in_the_words_of_the_template(base):
    said = [("one?", "1"), ("two?", "2")]
    assert base.tokenizer.decode(TEMPLATES["plain"].turn_prompt(base.tokenizer, said, "three?")) == (
        "Q: one?\nA: 1\nQ: two?\nA: 2\nQ: three?\nA:"
    )
    own = bare_template(chat=True, system="Be short.")
    assert base.tokenizer.decode(own.turn_prompt(base.tokenizer, said, "three?")) == (
        "system: Be short.\nuser: one?\nassistant: 1\nuser: two?\nassistant: 2\nuser: three?\nassistant:"
    )
    assert own.turn_prompt(base.tokenizer, (), "x") == own.draft_prompt(base.tokenizer, "x")


def test_pieces_make_whole_characters(base):
    pieces = list(speaker(base, bare_template(chat=True), 1.5).say("Hi"))
    assert len(pieces) > 1


def test_who_answers_in_which_words(folders, tiny_base, make_adapter, tmp_path):
    assert open_speaker(folders[0]).template == TEMPLATES["plain"]
    assert open_speaker(base=tiny_base).template.chat
    adapter = make_adapter(3)
    del adapter.manifest["template"]
    foreign = adapter.save(tmp_path / "foreign")
    assert open_speaker(foreign, system="Be short.").template == bare_template(chat=True, system="Be short.")
    with pytest.raises(RsgwmError, match="needs a chat template, and the template 'plain' has none"):
        open_speaker(folders[0], system="Be short.")


def test_a_conversation_and_its_commands(folders):
    text = "Hello\n\n/adapter\n/clear\n/helpp\n/help\n/adapter nowhere\n/adapter none\nHello\n"
    made = chat("--adapter", folders[0], *SHORT, text=text + f"/adapter {folders[1]}\nHello\nEXIT\nnever read\n")
    lines = made.stdout.splitlines()
    assert lines[0] == f"{folders[0]}; /help lists what else there is, exit ends"
    assert f"{folders[0]} answers" in lines
    assert "what was said is forgotten" in lines
    assert "no command /helpp; did you mean /help?" in lines
    assert any(line.startswith("/adapter NAME") for line in lines)
    assert any("nowhere" in line for line in lines)
    assert f"{folders[1]} answers" in lines
    assert lines[-1] == "3 questions"
    alone = chat("--adapter", folders[0], *SHORT, text="/\n").stdout.splitlines()
    assert any(line.startswith("/adapter NAME") for line in alone)
    assert alone[-1] == "0 questions"


def test_a_pair_hears_the_last_exchange_only_when_asked_to_and_warned(folders, monkeypatch):
    from mlx_rsgwm.inference.loop import DraftVerify

    heard = []
    original = DraftVerify.steps
    monkeypatch.setattr(
        DraftVerify, "steps", lambda self, text, *more: heard.append(text) or original(self, text, *more)
    )
    pair = ("--drafter", folders[0], "--verifier", folders[1], *SHORT)
    made = chat(*pair, text="one?\ntwo?\n")
    assert heard == ["one?", "two?"]
    assert "trained on single questions" not in made.output
    heard.clear()
    made = chat(*pair, "--history", "last", text="one?\ntwo?\nthree?\n")
    assert made.stderr.splitlines()[-1].startswith("warning: drafter and verifier were trained on single questions;")
    assert heard[1].startswith("one?\n")
    assert heard[1].endswith("\n\ntwo?")
    assert "one?" not in heard[2]
    refused = chat(*pair, "--history", "all", code=2)
    assert "take none or last" in refused.stderr
    assert "a drafter and a verifier answer here" in chat(*pair, text="/adapter x\n").stdout


@pytest.mark.parametrize("threshold", [0, 1])
def test_the_answer_of_a_pair_stands_there_once(folders, threshold):
    made = chat("--drafter", folders[0], "--verifier", folders[1], *SHORT, "--max-tokens", 12, "--threshold", threshold,
                text="Hello\n")  # fmt: skip
    lines = made.stdout.splitlines()[1:]
    if threshold == 0:
        assert re.fullmatch(r"draft 1: .*", lines[0])
        assert lines[-2].startswith("  accepted: ")
    else:
        assert sum(line.startswith("  replaced: ") for line in lines) == 2
        assert sum(line.startswith("  not accepted: ") for line in lines) == 1
        assert re.fullmatch(r"the answer is draft [123], not accepted: its score, 0\.\d{3}, is the highest", lines[-2])


def test_ctrl_c_stops_the_answer_and_not_the_program(folders, monkeypatch):
    original, stopped = Speaker.say, []

    def say(self, question, before=()):
        for number, piece in enumerate(original(self, question, before)):
            if question == "Stop" and number == 1:
                stopped.append(question)
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Speaker, "say", say)
    made = chat("--adapter", folders[0], "--quiet", "--max-tokens", 12, text="Stop\nHello\n")
    assert stopped == ["Stop"]
    assert "(stopped)" in made.stdout.splitlines()
    assert made.stdout.splitlines()[-1] == "1 question"


def test_two_adapters_of_the_hub_are_merged_and_talked_with_in_a_terminal(adapter_sources, tmp_path):
    """``rsgwm merge org/a org/b --out c && rsgwm chat --adapter c``: editing, history, Ctrl-C, Ctrl-D."""
    hub = [adapter_sources(seed, sidecar=False)["hub"] for seed in range(2)]
    ours = [sys.executable, "-c", PROGRAM]
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path)}
    out = tmp_path / "c"
    merged = subprocess.run(
        [*ours, "merge", *hub, "--out", out], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert merged.returncode == 0, merged.stderr
    assert "linear was chosen: not every adapter has directions or importance" in merged.stdout
    terminal = Terminal(
        [*ours, "chat", "--adapter", str(out), "--max-tokens", "300", "--temperature", "0"], environment
    )
    terminal.wait_for(r"/help lists what else there is, exit ends")
    terminal.wait_for(">")
    terminal.send("/halp\x7f\x7f\x7felp\r")  # corrected before it is sent
    terminal.wait_for("forget what was said")
    terminal.wait_for(">")
    terminal.send("Tell me\r")
    terminal.wait_for(r"Tell me\s+\S")
    terminal.send("\x03")  # while the answer comes, or at the prompt after it
    terminal.wait_for(r"stopped|Ctrl-D ends")
    terminal.wait_for(">")
    terminal.send("\x1b[A\x1b[A\r")  # twice up: the line before the last
    terminal.wait_for("forget what was said")
    terminal.wait_for(">")
    terminal.send("\x03")
    terminal.wait_for(r"exit or Ctrl-D ends")
    terminal.wait_for(">")
    terminal.send("\x04")
    terminal.wait_for(r"\d questions?\s")
    assert terminal.process.wait(30) == 0
