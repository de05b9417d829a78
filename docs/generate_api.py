"""Writes docs/api.md from the docstrings of what ``mlx_rsgwm`` exports: python docs/generate_api.py

A test holds the page equal to what this writes.
"""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import mlx_rsgwm as rs
from mlx_rsgwm.core.progress import SILENT

PAGE = Path(__file__).with_name("api.md")
# The exported functions, in the order in which a job uses them.
FUNCTIONS = (
    "build_corpus", "load_questions", "load_base", "load_adapter", "train", "average", "audit_adapters", "merge",
    "open_pipeline", "calibrate", "evaluate", "convert", "extract_vector",
    "apply_vector", "fuse", "parity",
)  # fmt: skip
HEAD = """# Python

    import mlx_rsgwm as rs

Every name below is in `mlx_rsgwm.__all__`, which is the contract: what is not there may change. Names are imported when
they are first used. Defaults are those of the command line. A path may be a `str` or a `Path`. What a user can mend is
raised as `rs.RsgwmError`, in one line. `examples/demo.py` is the whole job in twenty lines.

This page is written by `python docs/generate_api.py` from the docstrings.
"""


def page() -> str:
    """The page as Markdown."""
    objects = [name for name in rs.__all__ if name not in FUNCTIONS]
    parts = [HEAD, *(_function(name) for name in FUNCTIONS), "## Types\n", *(_object(name) for name in objects)]
    return "\n".join(parts)


def _function(name: str) -> str:
    function = getattr(rs, name)
    return f"## rs.{name}\n\n    rs.{name}{_signature(function)}\n\n{_text(function)}\n"


def _signature(function: Any, lines: bool = True) -> str:
    """Parameters with types and defaults, one a line where they do not fit one."""
    signature = inspect.signature(function)
    shown, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            shown.append("*")
            starred = True
        text = f"{'**' if parameter.kind is parameter.VAR_KEYWORD else ''}{parameter.name}: {parameter.annotation}"
        if parameter.default is not parameter.empty:
            text += f" = {'SILENT' if parameter.default is SILENT else repr(parameter.default)}"
        shown.append(text)
    returned = "" if signature.return_annotation is signature.empty else f" -> {signature.return_annotation}"
    line = f"({', '.join(shown)}){returned}"
    if not lines or len(line) <= 90:
        return line
    return "(\n" + "".join(f"        {text},\n" for text in shown) + f"    ){returned}"


def _text(thing: Any) -> str:
    """A docstring as Markdown: its sections become bold lines, what belongs to them lists."""
    lines, listed, example = [], False, False
    for line in (inspect.getdoc(thing) or "").replace(":class:`", "`").replace(":func:`", "`").split("\n"):
        if line in ("Args:", "Returns:", "Raises:", "Example::", "Yields:"):
            listed, example = line != "Example::", line == "Example::"
            lines += [f"**{line.rstrip(':')}**", *([""] if listed else [])]
        elif listed and line.startswith("    ") and not line.startswith("     ") and ": " in line:
            name, _, meaning = line.strip().partition(": ")
            lines.append(f"- `{name}`: {meaning}" if " " not in name else f"- {line.strip()}")
        elif listed and line.startswith("     "):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line if example else line.strip())
    return "\n".join(lines).replace("``", "`")


def _object(name: str) -> str:
    thing = getattr(rs, name)
    body = _text(thing)
    if is_dataclass(thing) and not inspect.signature(thing).parameters.keys() - {item.name for item in fields(thing)}:
        body += f"\n\nFields: {', '.join(f'`{item.name}`' for item in fields(thing))}."
    methods = [
        _method(own, value)
        for own, value in vars(thing).items()
        if inspect.isfunction(value) and not own.startswith("_")
    ]
    return f"### rs.{name}\n\n{body}\n" + ("\n" + "\n".join(methods) + "\n" if methods else "")


def _method(name: str, function: Any) -> str:
    summary = (inspect.getdoc(function) or "").partition("\n")[0].replace(":func:`", "`").replace("``", "`")
    return f"- `.{name}{_signature(function, lines=False)}`" + (f": {summary}" if summary else "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
