"""What an adapter is beside its arrays: mlx-lm's ``adapter_config.json``, of every age, read and written."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_rsgwm.core.errors import AdapterError, raise_problems
from mlx_rsgwm.models.adapter_keys import covering, covers

FINE_TUNE_TYPES = ("lora", "dora", "full")


@dataclass(frozen=True)
class LoraSpec:
    """What mlx-lm needs to rebuild the LoRA layers: its ``adapter_config.json`` fields.

    ``scale`` multiplies B·A directly (alpha / rank in PEFT's terms). ``keys`` are module names inside one block
    (``self_attn.q_proj``); ``num_layers`` counts the adapted blocks from the last, -1 for all of them.
    ``fine_tune_type``: lora, dora, or full for parameters of the base trained as they are, without factors.
    """

    rank: int
    scale: float
    dropout: float
    keys: tuple[str, ...]
    num_layers: int
    fine_tune_type: str = "lora"

    def __post_init__(self) -> None:
        problems = []
        if self.rank < 1:
            problems.append(f"rank must be at least 1, found {self.rank}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be in [0, 1), found {self.dropout}")
        if not abs(self.scale) < float("inf") or self.scale == 0:
            problems.append(f"scale must be finite and not zero, found {self.scale}")
        if self.fine_tune_type not in FINE_TUNE_TYPES:
            problems.append(f"fine_tune_type must be {' or '.join(FINE_TUNE_TYPES)}, found {self.fine_tune_type!r}")
        raise_problems("adapter spec", problems, AdapterError)

    @property
    def is_full(self) -> bool:
        """Whether mlx-lm trained the base's own parameters (``--fine-tune-type full``)."""
        return self.fine_tune_type == "full"

    def to_config(self) -> dict[str, Any]:
        """The JSON object mlx-lm reads from ``adapter_config.json``.

        mlx-lm takes an empty list of keys for no layers and no list for all linear ones, so none is written for none.
        """
        parameters = {"rank": self.rank, "scale": self.scale, "dropout": self.dropout}
        return {
            "fine_tune_type": self.fine_tune_type,
            "num_layers": self.num_layers,
            "lora_parameters": {**parameters, **({"keys": list(self.keys)} if self.keys else {})},
        }

    def covering(self, modules: Sequence[str], depth: int | None = None) -> LoraSpec:
        """This spec if its keys and layers reach all ``modules`` of a model of ``depth`` blocks, else one that does."""
        if covers(self.keys, self.num_layers, modules, depth):
            return self
        keys, num_layers = covering(modules)
        return replace(self, keys=keys, num_layers=num_layers)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str, scale: float | None = None) -> LoraSpec:
        """Read mlx-lm's fields; extra ones (the training arguments mlx_lm.lora adds) are ignored.

        Until 0.18 ``num_layers`` was called ``lora_layers``, and ``use_dora`` stood where ``fine_tune_type`` does now.
        ``dropout`` may be missing and is 0 then. ``scale`` chooses where :func:`scales_of` finds two.

        Raises:
            AdapterError: a field is missing or of another type; two scales are possible and none is chosen.
        """
        kind = str(config.get("fine_tune_type") or ("dora" if config.get("use_dora") is True else "lora"))
        parameters = config.get("lora_parameters")
        if kind == "full" and (
            parameters is None or isinstance(parameters, Mapping)
        ):  # which mlx-lm does not read then
            parameters = {"rank": 1, "scale": 1.0, **(parameters or {})}
        if not isinstance(parameters, Mapping):
            raise AdapterError(f"{where}: no lora_parameters; is this an mlx-lm LoRA adapter?")
        layers = config.get("num_layers", config.get("lora_layers", -1))
        numbers = {"num_layers": layers, **{key: parameters.get(key, 1) for key in ("rank", "scale", "dropout")}}
        numbers["alpha"] = parameters.get("alpha") or 0
        raise_problems(where, _number_problems(numbers), AdapterError)
        if float(numbers["rank"]) < 1:
            raise AdapterError(f"{where}: rank must be at least 1, found {numbers['rank']}")
        try:
            chosen = float(parameters["scale"]) if kind == "full" else _chosen_scale(config, where, scale)
            return cls(
                rank=int(float(parameters["rank"])),
                scale=chosen,
                dropout=float(parameters.get("dropout", 0.0)),
                keys=tuple(parameters.get("keys") or ()),
                num_layers=int(float(layers)),
                fine_tune_type=kind,
            )
        except KeyError as error:
            raise AdapterError(f"{where}: lora_parameters has no {error}") from None
        except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise AdapterError(f"{where}: {error}") from None
        except AdapterError as error:
            raise AdapterError(
                f"{where}: {str(error).removeprefix(f'{where}: ').removeprefix('adapter spec: ')}"
            ) from None


def _number_problems(numbers: Mapping[str, Any]) -> list[str]:
    """What is no number, or no whole one where it must be; numbers may be quoted, a truth value is none."""
    problems = []
    for name, value in numbers.items():
        number = _as_number(value)
        # An alpha that is not finite stands in files whose mlx-lm never read it.
        if number is None or not (math.isfinite(number) or name == "alpha"):
            problems.append(f"{name} must be a number, found {value!r}")
        elif name in ("rank", "num_layers") and number % 1:
            problems.append(f"{name} must be a whole number, found {value!r}")
    return problems


def _as_number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def scales_of(config: Mapping[str, Any]) -> tuple[float, ...]:
    """The scales that an mlx-lm configuration may mean: one, or two that its training version decides between.

    Until 0.14.1 mlx-lm multiplied by scale · alpha / rank, later versions by scale and left an ``alpha`` unread. The
    configuration does not record the version, but ``num_layers`` is newer than both.

    Raises:
        KeyError, TypeError, ValueError: a number is missing or none.
    """
    parameters = config["lora_parameters"]
    scale = float(parameters["scale"])
    if parameters.get("alpha") is None or "num_layers" in config:
        return (scale,)
    older = scale * (float(parameters["alpha"]) / int(float(parameters["rank"])))
    trains = math.isfinite(older) and older != 0  # without, the older version would have trained nothing
    return (older, scale) if trains and not math.isclose(older, scale, rel_tol=1e-12) else (scale,)


def _chosen_scale(config: Mapping[str, Any], where: str, scale: float | None) -> float:
    possible = scales_of(config)
    if scale is not None:
        for value in possible:
            if math.isclose(value, scale, rel_tol=1e-6):
                return value
        raise AdapterError(
            f"{where}: its scale can be {' or '.join(f'{candidate:g}' for candidate in possible)}, not {scale:g}"
        )
    if len(possible) == 1:
        return possible[0]
    older, newer = possible
    raise AdapterError(
        f"{where}: lora_parameters has alpha beside scale; mlx-lm until 0.14.1 multiplied by scale · alpha / rank = "
        f"{older:g}, later versions by scale = {newer:g}; say which trained it: "
        f"rsgwm convert from-mlx {shlex.quote(str(Path(where).parent))} OUT --scale {older:g} (or {newer:g})"
    )
