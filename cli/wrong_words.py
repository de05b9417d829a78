"""Words of a command line that a command does not take: what was likely meant, in our words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

import click

from mlx_rsgwm.cli.commands import COMMANDS, full_name
from mlx_rsgwm.core.nearest import nearest

# What a word that stands alone most likely is, for commands that take none.
ALONE = {"chat": "--adapter", "train": "--corpus", "pool train": "--task", "data build": "--task", "eval": "--task",
         "calibrate": "--task"}  # fmt: skip
# Options of other tools for which there is no option here, by command.
INSTEAD = {
    ("train", "--task"): "a corpus is made of tasks first: rsgwm data build --task TASK --out corpus",
    ("demo", "--base"): "the recipe names it: --set base=MODEL",
    ("run", "--base"): "the recipe names it: --set base=MODEL",
    ("ask", "--prompt"): 'the question stands alone: rsgwm ask "…"',
    ("ask", "--question"): 'the question stands alone: rsgwm ask "…"',
}


def explained(error: click.UsageError) -> str:
    """The message of a usage error, with what to type instead where that can be known."""
    context = error.ctx
    command = context.command_path.partition(" ")[2] if context else ""
    if isinstance(error, click.NoSuchOption) and context is not None:
        return _no_option(error.option_name, command, context.command)
    extra = getattr(error, "message", "").partition("unexpected extra argument")[2]
    if extra and context is not None:
        return _extra(extra.partition("(")[2].removesuffix(")"), command, context)
    message = error.format_message().rstrip(".")
    if isinstance(error, click.MissingParameter) and context is not None and (line := _example(context.command)):
        message += f"; for example: {line}"
    return message[:1].lower() + message[1:]


def _example(command: click.Command) -> str | None:
    """The first example of a command's help."""
    line = re.search(r"(?m)^\s*(?:Example: )?(rsgwm .*)$", command.help or "")
    return line[1] if line else None


def _no_option(given: str, command: str, asked: click.Command) -> str:
    if instead := INSTEAD.get((command, given)):
        return f"no option {given}; {instead}"
    flags = [flag for parameter in asked.params if not getattr(parameter, "hidden", False) for flag in parameter.opts]
    near = nearest(given.lstrip("-"), [flag[2:] for flag in flags if flag.startswith("--")])
    if near is None and command == "merge" and (name := _parameter(given.lstrip("-"))):
        return f"no option {given}; did you mean --set {name}=VALUE?"
    return f"no option {given}" + (f"; did you mean --{near}?" if near else "")


def _parameter(name: str) -> str | None:
    from mlx_rsgwm.merging.methods import METHODS

    return nearest(name, sorted({each for method in METHODS.values() for each in method.parameters}))


def _extra(words: str, command: str, context: click.Context) -> str:
    question = context.params.get("question") or ""
    if command == "ask" and " " not in question:
        return f"a question of several words needs quotes: rsgwm ask {shlex.quote(f'{question} {words}'[:60])}"
    if command == "chat" and len(words.split()) == 2:
        drafter, verifier = words.split()
        return f"rsgwm chat takes no names by themselves; did you mean --drafter {drafter} --verifier {verifier}?"
    if flag := ALONE.get(command):
        return f"rsgwm {command} takes no {words!r} by itself; did you mean {flag} {words}?"
    return f"too many arguments: {words}"


def refuse_one_dash(arguments: Sequence[str]) -> None:
    """Refuse ``-out``, which would be ``-o ut``, and its like.

    Raises:
        UsageError: a word with one dash is an option's name with two.
    """
    words = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    suspects = [word for word in words if word.startswith("-") and word[1:2].isalpha() and len(word) > 2]
    if not suspects or full_name(words) not in COMMANDS:
        return
    from mlx_rsgwm.cli.groups import find_command

    flags = {flag for parameter in find_command(full_name(words)).params for flag in parameter.opts}
    for word in suspects:
        if f"-{word.partition('=')[0]}" in flags:
            raise click.UsageError(f"no option {word}; did you mean -{word}?")
