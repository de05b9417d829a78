"""Merges to compare, as a user writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.merging.methods import METHODS, resolved
from mlx_rsgwm.merging.options import MergeOptions

ROLES = ("draft", "verify")
# Every method, and beside rsgwm's default its other readings.
DEFAULT_METHODS = (
    "all",
    "rsgwm:space=factor/product,signal=per_role/shared",
    "rsgwm:tau=0.3/0.5/0.8",
    "rsgwm:normalise=mean/none/rank",
)


@dataclass(frozen=True)
class Variant:
    """A method with some of its parameters set, for both roles."""

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """``rsgwm:space=product,tau=0.5``: what :func:`parse_variants` reads."""
        pairs = ",".join(f"{name}={_shown(value)}" for name, value in self.parameters.items())
        return f"{self.method}:{pairs}" if pairs else self.method


def parse_variants(texts: Sequence[str]) -> list[Variant]:
    """Variants as a user writes them: ``linear,ties:density=0.2/0.5,rsgwm:space=product,tau=0.3/0.5``.

    Values with / between them make one variant each, several such parameters every combination; ``all`` is every
    method but the imitations (``peft:…``), with its defaults. Variants that come to the same merge are kept once,
    under the first name.

    Raises:
        RsgwmError: unknown methods and parameters, values out of range; all in one error.
    """
    variants: list[Variant] = []
    for piece in (part.strip() for text in texts for part in text.split(",") if part.strip()):
        left, equals, value = piece.partition("=")
        # Names of methods may hold a colon themselves, names of parameters not.
        method, colon, name = left.rpartition(":") if equals else (left, ":", "")
        if method == "all" and not equals:
            variants += [Variant(known) for known in METHODS if ":" not in known]
        elif colon:
            variants.append(Variant(method))
        if equals:
            if not variants or not name:
                raise RsgwmError(f"--methods: expected METHOD:NAME=VALUE, found {piece!r}")
            variants[-1] = replace(variants[-1], parameters={**variants[-1].parameters, name: value})
    return _distinct([expanded for variant in variants for expanded in _expanded(variant)])


def _expanded(variant: Variant) -> list[Variant]:
    choices = [[_value(value) for value in str(text).split("/")] for text in variant.parameters.values()]
    return [replace(variant, parameters=dict(zip(variant.parameters, row, strict=True))) for row in product(*choices)]


def _distinct(variants: Sequence[Variant]) -> list[Variant]:
    distinct: dict[Any, Variant] = {}
    problems = []
    for variant in variants:
        try:
            merges = [resolved(MergeOptions(variant.method, role, variant.parameters)) for role in ROLES]
        except RsgwmError as error:
            problems.append(str(error).removeprefix("merge options: "))
        else:
            method = METHODS[variant.method]
            distinct.setdefault((method.merge, method.rank, json.dumps(merges, default=str)), variant)
    raise_problems("--methods", problems)
    return list(distinct.values())


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
