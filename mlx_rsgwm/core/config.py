"""From a mapping that a user wrote (YAML, JSON, ``--set``) to a checked dataclass, with errors that help."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from reprlib import repr as brief
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.nearest import nearest

T = TypeVar("T")

MOST_VALUES = 100_000
MOST_TOLD = 8  # unknown keys that a near one is looked for: an error tells no more
LARGEST_BITS = 1024
LARGEST_WHOLE = 2**32 - 1  # a seed is the largest of whole numbers that anybody gives
NUMBER = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")


class Loader(yaml.SafeLoader):
    """YAML 1.1 that reads 1e-5 as a number, as mlx-lm does, and leaves dates the texts that they are written as.

    It stops at ``MOST_VALUES``, which take seconds, where a file of 16 MB can hold millions.
    """

    composed = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As PyYAML does it, and counted."""
        self.composed += 1
        if self.composed > MOST_VALUES:
            raise yaml.YAMLError(f"it has more than {MOST_VALUES} values")
        return super().compose_node(parent, index)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789"))


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass ``cls`` from ``values``, nested dataclasses included.

    Unknown keys are refused with the nearest known name, wrong types with the value found; all problems in one error.
    A section that is null, as one whose lines are all comments, is one that is not there.
    """
    if not isinstance(values, Mapping):
        raise RsgwmError(f"{where}: expected keys and values, found {type(values).__name__}")
    sections: Any = [name for name, hint in get_type_hints(cls).items() if is_dataclass(hint)]
    values = {name: value for name, value in values.items() if value is not None or name not in sections}
    problems = _unknown(cls, values, "")
    raise_problems(where, problems)
    checked: Any = cls
    try:
        built: T = _checker(checked).validate_python(dict(values))
        return built
    except ValidationError as error:
        for detail in error.errors():
            name = ".".join(str(part) for part in detail["loc"])
            message = detail["msg"].lower().replace("a valid tuple", "a list")
            message = re.sub(r"a dictionary or an instance of \w+", "keys and values", message)
            problems.append(f"{name}: {message}, found {brief(detail['input'])}")
    raise_problems(where, problems)
    raise AssertionError("unreachable: a ValidationError always has errors")


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping that a YAML text holds.

    Raises:
        RsgwmError: whatever :func:`parse_yaml` raises, or it is not a mapping.
    """
    values = parse_yaml(text, where)
    if not isinstance(values, dict):
        raise RsgwmError(f"{where}: expected keys and values at the top level")
    return values


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Raises:
        RsgwmError: it is not YAML, gives a key twice, or has aliases that unfold to more than any settings have.
    """
    try:
        loader = Loader(text)
        root = loader.get_single_node()
        twice = _repeated_keys(root)
        values = loader.construct_document(root) if root is not None else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-13-45 is a date without such a day
        reason = _yaml_reason(error)
        raise RsgwmError(f"{where} is not valid YAML: {reason}") from None
    except (LookupError, AttributeError, TypeError) as error:  # PyYAML's constructors, of !!bool maybe, !!timestamp x
        reason = f"a value is not what its tag says ({brief(str(error))})"
        raise RsgwmError(f"{where} is not valid YAML: {reason}") from None
    raise_problems(where, [f"{key} is given twice, the second time in line {line}" for key, line in twice])
    _unfold(values, where)
    return values


def _yaml_reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None and "'\\t'" in str(error):
        return f"line {mark.line + 1} is indented with a tab; use spaces"
    reason = " ".join(str(error).replace('"<unicode string>", ', "").split())
    if "Exceeds the limit" in reason:  # Python's own text tells of a setting of the interpreter
        return "a whole number has thousands of digits"
    return reason


def _repeated_keys(root: yaml.Node | None) -> list[tuple[str, int]]:
    """Keys that stand twice in one mapping, with the line of the second, where YAML libraries take the last in silence.

    What ``<<`` merges into a mapping may stand there again.
    """
    twice, waiting, visited = [], [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in visited or not isinstance(node, yaml.CollectionNode):
            continue
        visited.add(id(node))
        keys = set()
        for entry in node.value:
            waiting += entry if isinstance(node, yaml.MappingNode) else [entry]
            key = entry[0] if isinstance(node, yaml.MappingNode) else None
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    twice.append((key.value, key.start_mark.line + 1))
                keys.add((key.tag, key.value))
    return twice


def written_texts(text: str) -> dict[str, str]:
    """The top-level values of a YAML mapping as they are written, of those that are no list, mapping or null: ``2024``
    and ``0123`` may be meant as names."""
    root = yaml.compose(text, Loader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    return {
        key.value: value.value
        for key, value in pairs
        if isinstance(value, yaml.ScalarNode) and value.tag != "tag:yaml.org,2002:null"
    }


def _unfold(values: Any, where: str) -> None:
    """Refuse what has more than ``MOST_VALUES`` values once aliases are written out, such as one that holds itself, and
    whole numbers that neither a float nor, if they come as 0x…, Python's ``str`` takes."""
    waiting, seen = [values], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise RsgwmError(f"{where} unfolds to more than {MOST_VALUES} values; write its aliases out")
        if isinstance(value, int) and value.bit_length() > LARGEST_BITS:
            raise RsgwmError(f"{where} holds a whole number of hundreds of digits, which nothing here can be")
        if isinstance(value, (Mapping, list, tuple, set)):
            waiting += [*value, *value.values()] if isinstance(value, Mapping) else value


def _number_problem(name: str, hint: Any, value: Any) -> str:
    """What is wrong with the numbers that stand where the field ``name`` takes some; empty where nothing is.

    pydantic would make 1 or 0 of a truth value, and take what is not finite or has hundreds of digits.
    """
    kinds = {hint, *get_args(hint)}
    if not kinds & {int, float} or bool in kinds:
        return ""
    for entry in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(entry, bool):
            return f"{name}: expected a number, found {brief(value)}"
        if isinstance(entry, str) and str in kinds:
            continue
        if not _is_in_range(entry, float in kinds):
            return f"{name} = {brief(entry)} is out of range"
    return ""


def _is_in_range(value: Any, is_real: bool) -> bool:
    """Whether a number, also as text, is finite and, where it must be whole, no larger than any; of the rest True."""
    try:
        number = abs(float(value))
    except OverflowError:
        return False
    except (ValueError, TypeError):
        return True
    return number < float("inf") and (is_real or number <= LARGEST_WHOLE)


@cache
def _checker(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _unknown(cls: Any, values: Mapping[str, Any], prefix: str) -> list[str]:
    known = [field.name for field in fields(cls)]
    hints = get_type_hints(cls)
    problems: list[str] = []
    for name, value in values.items():
        if name not in known:
            near: str | None = None
            if len(problems) < MOST_TOLD:
                near = nearest(str(name), known) or _deeper(hints, str(name))
            advice = f"did you mean {near!r}?" if near else f"known are {', '.join(known)}"
            problems.append(f"unknown key {prefix + str(name)!r}, {advice}")
        elif problem := _number_problem(prefix + name, hints[name], value):
            problems.append(problem)
        elif isinstance(value, Mapping):
            kinds = [kind for kind in (hints[name], *get_args(hints[name])) if is_dataclass(kind)]
            # A table of dataclasses by name has names of its own.
            inside = value if get_origin(hints[name]) is Mapping else {"": value}
            for key, entry in inside.items():
                if kinds and isinstance(entry, Mapping):
                    problems += _unknown(kinds[0], entry, f"{prefix}{name}.{key}.".replace("..", "."))
    return problems


def _deeper(hints: Mapping[str, Any], name: str) -> str | None:
    """Where a key that is unknown here is known: ``train.epochs``."""
    sections = {section: hint for section, hint in hints.items() if is_dataclass(hint)}
    places = [f"{section}.{name}" for section, hint in sections.items() if name in {each.name for each in fields(hint)}]
    return places[0] if places else None
