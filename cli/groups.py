"""Groups of commands that are imported only when they run, so that ``rsgwm --help`` answers at once."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from mlx_rsgwm.cli.commands import COMMANDS, GROUPS, SECTIONS, members, summary
from mlx_rsgwm.core.nearest import advice, nearest

# What other tools have a command for and this one has not.
SERVED = "`mlx_lm.server --adapter-path ADAPTER` serves an adapter, `rsgwm chat` talks with one"
NOT_HERE = {"server": SERVED, "serve": SERVED, "version": "`rsgwm --version` prints it"}


def find_command(full_name: str) -> click.Command:
    """Import a command by its full name, ``hub push``."""
    module, attribute = COMMANDS[full_name][0].split(":")
    command: click.Command = getattr(import_module(module), attribute)
    return command


class LazyGroup(click.Group):
    """The commands of the table below one name; the empty name is the root."""

    def __init__(self, *arguments: Any, path: str = "", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.path = path

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which a job uses them."""
        return members(self.path)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command by its name; ``None`` when there is no such name."""
        full = f"{self.path} {cmd_name}".strip()
        if full in GROUPS:
            return LazyGroup(cmd_name, path=full, help=GROUPS[full], context_settings=self.context_settings)
        if full not in COMMANDS:
            return None
        return find_command(full)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or suggest the nearest name."""
        name = args[0]
        if name not in self.list_commands(ctx) and not name.startswith("-"):
            raise click.UsageError(f"no command {name!r}{_in(self.path)}; {self._nearest(ctx, name)}", ctx)
        return super().resolve_command(ctx, args)

    def _nearest(self, ctx: click.Context, name: str) -> str:
        """A name like the wrong one, here or in another group, else all there are here."""
        here = self.list_commands(ctx)
        if name in NOT_HERE:
            return NOT_HERE[name]
        if len(here) == 1:
            return f"did you mean 'rsgwm {self.path} {here[0]} {name}'?"
        elsewhere = {full.split()[-1]: full for full in COMMANDS}
        if not nearest(name, here) and (near := nearest(name, elsewhere)):
            return f"did you mean 'rsgwm {elsewhere[near]}'?"
        return advice(name, here)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their summaries, in sections at the root, importing none."""
        names = self.list_commands(ctx)
        width = max(map(len, names))
        placed = {name for section in SECTIONS.values() for name in section}
        sections = {"Commands": tuple(names)} if self.path else SECTIONS
        others = {} if self.path else {"Others": tuple(name for name in names if name not in placed)}
        for title, section in {**sections, **others}.items():
            if section:
                with formatter.section(title):
                    rows = [(f"{name:<{width}}", summary(f"{self.path} {name}".strip())) for name in section]
                    formatter.write_dl(rows)


def _in(path: str) -> str:
    return f" in {path!r}" if path else ""
