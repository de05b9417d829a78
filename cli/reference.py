"""``rsgwm help``: what a command does and takes, by its name; and all commands and options as one page of Markdown."""

from __future__ import annotations

import re
from collections import defaultdict

import click

from mlx_rsgwm.cli.commands import COMMANDS, SECTIONS, summary
from mlx_rsgwm.cli.groups import find_command
from mlx_rsgwm.cli.old_names import COMMANDS_BEFORE, OPTIONS_BEFORE

OptionTable = dict[str, dict[str, click.Option]]


@click.command(name="help")
@click.argument("names", metavar="[COMMAND]...", nargs=-1)
@click.option("--markdown", is_flag=True, help="Print a page of all commands and options: docs/commands.md.")
@click.pass_context
def show_help(ctx: click.Context, names: tuple[str, ...], markdown: bool) -> None:
    """Show the help of COMMAND: the text of `rsgwm COMMAND --help`.

    Example: rsgwm help data build
    """
    if markdown:
        click.echo("\n".join(reference_page()))
        return
    context = ctx.find_root()
    for name in names:
        if not isinstance(context.command, click.Group):
            raise click.UsageError(f"{context.command_path} has no command {name!r}", ctx)
        _, command, _ = context.command.resolve_command(context, [name])
        assert command is not None
        context = click.Context(command, parent=context, info_name=name)
    click.echo(context.get_help())


# Options that mean something else in one group: `rsgwm merge --at PATTERN`, and a time in `rsgwm probe`; `rsgwm train
# --qat FORMAT`, and the adapter that was trained so in `rsgwm quantvec`.
OF_A_GROUP = frozenset({("probe", "--at"), ("quantvec", "--qat")})


def option_table() -> OptionTable:
    """Every option by its long name: the commands that have it, and click's object for each."""
    table: OptionTable = defaultdict(dict)
    for name in COMMANDS:
        for parameter in find_command(name).params:
            if isinstance(parameter, click.Option):
                for flag in (flag for flag in parameter.opts if flag.startswith("--")):
                    group = name.split()[0]
                    table[f"{flag} ({group})" if (group, flag) in OF_A_GROUP else flag][name] = parameter
    return table


def stem(help_text: str) -> str:
    """The part of a help that all commands share: before the first tail, default or colon."""
    return re.split(r"[;:]|\.(?:\s|$)|\s\s\[", help_text)[0]


def reference_page() -> list[str]:
    """Lines of docs/commands.md."""
    lines = [
        "# Commands and options",
        "",
        "Made by `rsgwm help --markdown > docs/commands.md`. `rsgwm COMMAND --help` has defaults and examples of each.",
    ]
    before: dict[str, list[str]] = {"report write": ["report"]}
    for old, now in COMMANDS_BEFORE.items():
        before.setdefault(now, []).append(old)
    for title, names in SECTIONS.items():
        lines += ["", f"## {title}", "", "| command | what it does | until 0.1 |", "|---|---|---|"]
        for name in (full for top in names for full in COMMANDS if full.split()[0] == top):
            old_names = ", ".join(f"`{old}`" for old in before.get(name, ()))
            lines.append(f"| `rsgwm {name}` | {summary(name)} | {old_names} |")
    return [*lines, *_options(), *_renamed()]


def _options() -> list[str]:
    lines = ["", "## Options", "", "An option means the same in every command that has it.", ""]
    lines += ["| option | value | what it is | commands |", "|---|---|---|---|"]
    for _, users in sorted(option_table().items()):
        shown = [(name, option) for name, option in users.items() if not option.hidden]
        option = max((option for _, option in shown), key=lambda option: len(_value(option)))
        names = "all" if len(shown) == len(COMMANDS) - 1 else ", ".join(name for name, _ in shown)
        flags = "/".join((*option.opts, *option.secondary_opts))
        lines.append(f"| `{flags}` | {_value(option)} | {stem(str(option.help))} | {names} |")
    return lines


def _value(option: click.Option) -> str:
    """What an option takes, in words."""
    if option.is_flag:
        return ""
    if option.metavar:
        return f"`{option.metavar}`".replace("|", "\\|")
    if isinstance(option.type, click.Choice):
        return ", ".join(str(choice) for choice in option.type.choices)
    if isinstance(option.type, (click.IntRange, click.FloatRange)):
        return _range(option.type)
    return option.type.name.replace("|", " or ")


def _range(kind: click.IntRange | click.FloatRange) -> str:
    low = "" if kind.min is None else f" {'above' if kind.min_open else 'from'} {kind.min}"
    high = "" if kind.max is None else f" {'below' if kind.max_open else 'to'} {kind.max}"
    return f"{kind.name.split()[0]}{low}{high}"


def _renamed() -> list[str]:
    lines = ["", "## Options that were called otherwise until 0.1", "", "| command | then | now |", "|---|---|---|"]
    for command, names in OPTIONS_BEFORE.items():
        lines += [f"| `{command}` | `{then}` | `{now}` |" for then, now in names.items()]
    return [*lines, "", "The names of 0.1 work for one more release and say so on standard error."]
