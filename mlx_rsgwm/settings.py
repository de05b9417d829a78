"""From a mapping that a user wrote (YAML, JSON, ``--set``) to a checked dataclass, with errors that help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mlx_rsgwm.errors import RsgwmError, raise_problems

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid")


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass ``cls`` from ``values``, nested dataclasses included.

    Unknown keys are refused with the nearest known name, wrong types with the value found; all problems in one error.
    """
    if not isinstance(values, Mapping):
        raise RsgwmError(f"{where}: expected keys and values, found {type(values).__name__}")
    problems = _unknown(cls, values, "")
    raise_problems(where, problems)
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        for found in error.errors():
            name = ".".join(str(part) for part in found["loc"])
            problems.append(f"{name}: {found['msg'].lower()}, found {found['input']!r}")
    raise_problems(where, problems)
    raise AssertionError("unreachable: a ValidationError always has errors")


def _unknown(cls: Any, values: Mapping[str, Any], prefix: str) -> list[str]:
    known = [field.name for field in fields(cls)]
    hints = get_type_hints(cls)
    problems = []
    for name, value in values.items():
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            problems.append(f"unknown key {prefix + str(name)!r}, {advice}")
        elif is_dataclass(hints[name]) and isinstance(value, Mapping):
            problems += _unknown(hints[name], value, f"{prefix}{name}.")
    return problems
