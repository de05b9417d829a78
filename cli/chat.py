"""``rsgwm chat``: a conversation with one adapter, a base or a pair, in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from mlx_rsgwm.cli.console import Console, Stopped, check_text, common_options
from mlx_rsgwm.cli.options.kinds import OneOf
from mlx_rsgwm.cli.options.speaker import adapter_named, open_speaker_or_pair, speaker_options
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.nearest import nearest

if TYPE_CHECKING:
    from mlx_rsgwm.inference.loop import DraftVerify
    from mlx_rsgwm.inference.speaker import Exchange, Speaker

HISTORIES = ("none", "last", "all")
COMMANDS = {
    "/help": "this list",
    "/adapter NAME": "go on with another adapter of the same base, or with none; without a name: which it is",
    "/clear": "forget what was said",
    "exit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}
SINGLE_QUESTIONS = (
    "warning: drafter and verifier were trained on single questions; with --history last they are also asked the last "
    "question and its answer, and what their scores mean may not hold"
)


@click.command()
@click.option(
    "--history",
    type=OneOf(HISTORIES),
    help="What of the conversation is read with a question.  [default: all; for a pair none]",
)
@speaker_options
@common_options
def chat(console: Console, history: str | None, **who: Any) -> None:
    """Load a model once and answer question after question, until `exit` or end of file.

    One adapter or a base remembers the conversation. For a pair every question stands alone, unless --history last.

    \b
    Examples:
      rsgwm chat --adapter merged
      rsgwm chat --base smollm2-135m --system "Answer in one sentence."

    \b
    Examples, after `rsgwm demo`, with its pair:
      rsgwm chat
      rsgwm chat --history last
    """
    talk = Talk(console, open_speaker_or_pair(console, who), history)
    talk.begin()
    for text in _lines(console):
        if text.lower() in ("exit", "quit", "/exit", "/quit"):
            break
        if text:
            talk.take(text)
    console.line(talk.summary())
    console.result(talk.counts())


class Talk:
    """A conversation: who answers, what was said, and how often."""

    def __init__(self, console: Console, voice: DraftVerify | Speaker, history: str | None) -> None:
        from mlx_rsgwm.inference.speaker import Speaker

        self._console = console
        self._speaker = voice if isinstance(voice, Speaker) else None
        self._pair = None if isinstance(voice, Speaker) else voice
        self._history = history or ("all" if self._speaker else "none")
        if self._pair and history == "all":
            raise RsgwmError("--history all: drafter and verifier were trained on single questions; take none or last")
        self._said: list[Exchange] = []
        self._asked = self._accepted = 0

    def begin(self) -> None:
        """Say who answers, and what is odd about it."""
        if self._pair and self._history == "last":
            self._console.progress.warning(SINGLE_QUESTIONS)
        who = self._speaker.name if self._speaker else "drafter and verifier"
        self._console.line(f"{who}; /help lists what else there is, exit ends")

    def take(self, text: str) -> None:
        """Answer a line, or do what it asks for; what goes wrong is told, and the conversation goes on."""
        try:
            check_text(text, "the question")
            if text == "/" or (text.startswith("/") and text[1:2].isalpha()):
                self._do(text)
            else:
                self._answer(text)
        except (RsgwmError, click.UsageError) as error:
            self._console.line(str(error))
        except Stopped:
            raise
        except KeyboardInterrupt:
            self._console.line("\n(stopped)")

    def _answer(self, question: str) -> None:
        from mlx_rsgwm.cli.answers import tell_alone, tell_pair

        before = {"none": [], "last": self._said[-1:], "all": self._said}[self._history]
        if self._speaker:
            row = tell_alone(self._console, self._speaker, question, before)
        else:
            assert self._pair is not None
            context = "".join(f"{asked}\n{answer}\n\n" for asked, answer in before)
            row = tell_pair(self._console, self._pair, context + question)
            self._accepted += bool(row["accepted"])
        self._asked += 1
        if row["answer"]:
            self._said.append((question, row["answer"]))

    def _do(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name in ("/help", "/"):
            for command, meaning in COMMANDS.items():
                self._console.line(f"{command:<14} {meaning}")
        elif name == "/clear":
            self._said = []
            self._console.line("what was said is forgotten")
        elif name == "/adapter":
            self._take_adapter(rest.strip())
        else:
            near = nearest(name, [command.split()[0] for command in COMMANDS])
            raise RsgwmError(f"no command {name}; " + (f"did you mean {near}?" if near else "see /help"))

    def _take_adapter(self, name: str) -> None:
        if self._speaker is None:
            raise RsgwmError("a drafter and a verifier answer here; start rsgwm chat --adapter NAME for one alone")
        if name:
            self._speaker = self._speaker.with_adapter(adapter_named(name), self._console.progress)
        self._console.line(f"{self._speaker.name} answers")

    def summary(self) -> str:
        """One line at the end."""
        questions = f"{self._asked} question{'s' * (self._asked != 1)}"
        return f"{questions}, {self._accepted} answers accepted" if self._pair else questions

    def counts(self) -> dict[str, int]:
        """The same for programs."""
        return {"asked": self._asked, **({"accepted": self._accepted} if self._pair else {})}


def _lines(console: Console) -> Iterator[str]:
    """What the user writes, line by line: with editing and history on a terminal, as it comes from elsewhere."""
    if console.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from (line.strip() for line in sys.stdin)
        return
    from prompt_toolkit import PromptSession

    session: Any = PromptSession(history=_history())
    while True:
        try:
            yield session.prompt("> ").strip()
        except EOFError:
            return
        except Stopped:
            raise
        except KeyboardInterrupt:
            console.line("(exit or Ctrl-D ends)")


def _history() -> Any:
    """Earlier lines, kept in the user's cache, where that can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    from mlx_rsgwm.models.base import cache_folder

    path = cache_folder() / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
