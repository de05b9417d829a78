"""What reading a PEFT folder is asked for, and what of its form is kept so that it can be written again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_rsgwm.converters.peft.uniform import Folding


@dataclass
class Layout:
    """What of a PEFT file's form mlx-lm's does not show, so that a conversion back can restore it.

    ``names``: transformers' names where they are not the ones we would write. ``experts``: ``each`` or ``stacked``.
    ``folded``: modules whose scale went into lora_b. ``tied``: one embedding pair stands for embedding and head.
    ``derived``: replaced parameters, by our names, that PEFT's file has not (see ``peft_derived``).
    ``untied``: the base ties embedding and head, and the adapter has them apart. ``rows``: those of embedding and head,
    where the vocabulary was resized.
    """

    names: dict[str, str] = field(default_factory=dict)
    experts: str | None = None
    folded: dict[str, Folding] = field(default_factory=dict)
    tied: bool = False
    derived: list[str] = field(default_factory=list)
    untied: bool = False
    rows: int = 0

    def to_json(self) -> dict[str, Any]:
        """JSON values by field, without those at their defaults."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Layout:
        """The reverse of :meth:`to_json`."""
        folded = {name: Folding(**entry) for name, entry in (value.get("folded") or {}).items()}
        names, derived = dict(value.get("names") or {}), list(value.get("derived") or [])
        untied, rows = bool(value.get("untied")), int(value.get("rows") or 0)
        return cls(names, value.get("experts"), folded, bool(value.get("tied")), derived, untied, rows)


@dataclass
class PeftReading:
    """How a folder is read.

    ``strict``: refuse what PEFT would only warn of. ``language_only``: leave out what is of a tower for images or
    sound. ``notes``: what the user is told after. ``left_out``: modules left out, as transformers calls them.
    """

    strict: bool = False
    language_only: bool = False
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
