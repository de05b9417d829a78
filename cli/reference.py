"""``rsgwm help``: what a command does and takes, by its name; and all commands as one page of Markdown."""

from __future__ import annotations

import click

from mlx_rsgwm.cli.commands import COMMANDS, SECTIONS, summary
from mlx_rsgwm.cli.old_names import COMMANDS_BEFORE


@click.command(name="help")
@click.argument("names", metavar="[COMMAND]...", nargs=-1)
@click.option("--markdown", is_flag=True, help="Print a page of all commands: docs/commands.md.")
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


def reference_page() -> list[str]:
    """Lines of docs/commands.md."""
    lines = [
        "# Commands",
        "",
        "Made by `rsgwm help --markdown > docs/commands.md`. `rsgwm COMMAND --help` has options and examples of each.",
    ]
    before: dict[str, list[str]] = {"report write": ["report"]}
    for old, now in COMMANDS_BEFORE.items():
        before.setdefault(now, []).append(old)
    for title, names in SECTIONS.items():
        lines += ["", f"## {title}", "", "| command | what it does | until 0.1 |", "|---|---|---|"]
        for name in (full for top in names for full in COMMANDS if full.split()[0] == top):
            old_names = ", ".join(f"`{old}`" for old in before.get(name, ()))
            lines.append(f"| `rsgwm {name}` | {summary(name)} | {old_names} |")
    lines += ["", "The names of 0.1 work for one more release and say so on standard error."]
    return lines
