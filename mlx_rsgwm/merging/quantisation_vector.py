"""Quantization vectors: what training through rounding adds to an adapter, lifted off and put on another.

V = ΔW of an adapter trained through rounding − ΔW of one trained without, on the same rows (arXiv 2604.03420). Put on
a receiver that never saw rounding, ΔW + λ V is to survive it better; λ = 1 is the claim without any of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.row_hashes import KEY, record_of
from mlx_rsgwm.inference.pair import other_base
from mlx_rsgwm.linalg.lowrank import Factors, stack
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base_folder import fingerprint_of
from mlx_rsgwm.models.quantisation import QuantFormat
from mlx_rsgwm.models.spec import LoraSpec

VECTOR = "quantization_vector"  # kind of the one, and what a patched adapter's manifest tells of it
PATCHED = "patched"


def extract(through: Adapter, plain: Adapter) -> Adapter:
    """The quantization vector of an adapter trained ``through`` rounding and of the ``plain`` one beside it.

    Its ΔW is their difference, exactly: the factors are stacked, of rank r + r'. Its manifest tells the format, the
    base, and in which other settings the two were trained differently.

    Raises:
        RsgwmError: the first was trained without rounding or the second with it, or they are of two bases, or not
            LoRA on linear layers.
    """
    quant = trained_format(through)
    if quant is None:
        raise RsgwmError(f"{through.where} was not trained through rounding; train it with rsgwm train --qat")
    check_plain(plain)
    _require_same_base(through, plain)
    vector = stacked([(through, 1.0), (plain, -1.0)])
    vector.manifest = {
        "kind": VECTOR,
        "base": through.manifest.get("base"),
        "quantization": described(quant),
        "sources": {"qat": _named(through), "plain": _named(plain)},
        "trained_differently": _differences(through, plain),
        KEY: (record_of(through.manifest, through.name) | record_of(plain.manifest, plain.name)).describe(),
        "versions": versions(),
    }
    return vector


def patch(receiver: Adapter, vector: Adapter, weight: float = 1.0, choice: Mapping[str, Any] | None = None) -> Adapter:
    """``receiver`` with ``weight`` (λ) times the quantization ``vector`` on it, exactly, of rank r + r'.

    Its manifest says whether that is zero-shot: λ was given, and the vector is not one of the receiver itself, which at
    λ = 1 gives back the adapter trained through rounding.

    Args:
        receiver: trained without rounding.
        vector: of :func:`extract`, on the same base.
        weight: λ.
        choice: how λ was chosen on rows of the receiver; None for a λ that was given.

    Raises:
        RsgwmError: ``vector`` is none, or of another base; one of the two is not LoRA on linear layers; the receiver
            was trained through rounding, is a vector, or has one already.
    """
    quant = vector_format(vector)
    check_plain(receiver)
    _require_same_base(receiver, vector)
    result = stacked([(receiver, 1.0), (vector, weight)])
    sources = vector.manifest.get("sources")
    donor = sources.get("plain") if isinstance(sources, Mapping) else None
    of_itself = isinstance(donor, Mapping) and donor.get("sha256") == receiver.content_hash()
    about = {name: receiver.manifest.get(name) for name in ("template", "task", "data", "seed")}
    result.manifest = {
        "kind": PATCHED,
        "base": receiver.manifest.get("base") or vector.manifest.get("base"),
        **{name: value for name, value in about.items() if value is not None},
        "receiver": _named(receiver),
        VECTOR: {
            **_named(vector),
            "quantization": described(quant),
            "lambda": weight,
            "zero_shot": choice is None and not of_itself,
            "of_itself": of_itself,
            **({"choice": dict(choice)} if choice else {}),
        },
        KEY: (record_of(receiver.manifest, receiver.name) | record_of(vector.manifest, vector.name)).describe(),
        "versions": versions(),
    }
    return result


def stacked(parts: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Σ c ΔW of several adapters with their coefficients c as one, exactly: of the sum of their ranks, with scale 1.

    A module that some do not adapt gets zeros for them.

    Raises:
        RsgwmError: an adapter is not LoRA on linear layers, or has other shapes than one before it.
    """
    updates: dict[str, list[Factors]] = {}
    for adapter, coefficient in parts:
        _require_lora(adapter)
        for module, a, b in adapter.factors():
            update = Factors(a.astype(mx.float32), coefficient * adapter.spec.scale * b.astype(mx.float32))
            updates.setdefault(module, []).append(update)
    shapes = {module: {(each.a.shape[0], each.b.shape[1]) for each in addends} for module, addends in updates.items()}
    problems = [f"{module} has several shapes, {sizes}" for module, sizes in shapes.items() if len(sizes) > 1]
    raise_problems(" and ".join(adapter.where for adapter, _ in parts), problems)
    rank = sum(adapter.spec.rank for adapter, _ in parts)
    weights = {}
    for module, addends in updates.items():
        total = stack(addends)
        missing = rank - total.rank
        weights[f"{module}.lora_a"] = mx.pad(total.a, [(0, 0), (0, missing)])
        weights[f"{module}.lora_b"] = mx.pad(total.b, [(0, missing), (0, 0)])
    mx.eval(weights)
    return Adapter(_spec([adapter for adapter, _ in parts], rank, list(updates)), weights)


def trained_format(adapter: Adapter) -> QuantFormat | None:
    """The format that an adapter was trained through the rounding to; None where its manifest tells none."""
    config = adapter.manifest.get("config")
    qat = config.get("qat") if isinstance(config, Mapping) else None
    return _format(qat, adapter.where) if qat else None


def check_plain(adapter: Adapter) -> None:
    """Raise where an adapter cannot be one that was trained without rounding, by what its manifest tells."""
    if (quant := trained_format(adapter)) is not None:
        raise RsgwmError(f"{adapter.where} was trained through rounding to {quant}; give one that was trained without")
    check_no_vector(adapter)
    if VECTOR in adapter.manifest:
        raise RsgwmError(f"{adapter.where} has a quantization vector on it already; give the adapter from before that")


def check_no_vector(adapter: Adapter) -> None:
    """Raise where an adapter is a quantization vector, which is a difference and no adapter to use."""
    if adapter.manifest.get("kind") == VECTOR:
        raise RsgwmError(
            f"{adapter.where} is a quantization vector: put it on an adapter by rsgwm quantvec apply, or --vector"
        )


def vector_format(vector: Adapter) -> QuantFormat:
    """The format that a quantization vector is for.

    Raises:
        RsgwmError: the adapter is none, or its manifest is damaged.
    """
    if vector.manifest.get("kind") != VECTOR:
        raise RsgwmError(f"{vector.where} is no quantization vector; rsgwm quantvec extract makes one")
    return _format(vector.manifest.get("quantization"), vector.where)


def described(quant: QuantFormat) -> dict[str, Any]:
    """What a manifest says of a format."""
    return {"bits": quant.bits, "group_size": quant.group_size, "mode": quant.mode}


def _format(value: Any, where: str) -> QuantFormat:
    if not isinstance(value, Mapping) or not isinstance(value.get("bits"), int):
        raise RsgwmError(f"{where}: what its manifest says of its format is damaged")
    group_size, mode = value.get("group_size", 0), value.get("mode", "affine")
    if not isinstance(group_size, int) or not isinstance(mode, str):
        raise RsgwmError(f"{where}: what its manifest says of its format is damaged")
    return QuantFormat(value["bits"], group_size, mode)


def _require_lora(adapter: Adapter) -> None:
    adapter.require_factors_only("be added to others exactly")
    if adapter.spec.fine_tune_type != "lora" or any(value.ndim != 2 for value in adapter.weights.values()):
        raise RsgwmError(f"{adapter.where} is not LoRA on linear layers, whose updates alone can be added exactly")


def _require_same_base(first: Adapter, second: Adapter) -> None:
    """Raise where two adapters were made for two bases; one that does not say for which may be for the other's."""
    if difference := other_base(first, second):
        raise RsgwmError(
            f"{first.where} was made for {first.base_name or 'a base'} and {second.where} for "
            f"{second.base_name or 'a base'}, which have other {difference}"
        )


def require_base(path: Path, adapters: Sequence[Adapter]) -> None:
    """Raise where an adapter says that it was made for another base than that in the folder or file ``path``."""
    fingerprint = fingerprint_of(path)
    for adapter in adapters:
        if adapter.base_fingerprint not in (None, fingerprint):
            raise RsgwmError(f"{adapter.where} was made for {adapter.base_name or 'another base'}, not for {path}")


def _named(adapter: Adapter) -> dict[str, Any]:
    return {"name": adapter.name, "sha256": adapter.content_hash()}


def _differences(through: Adapter, plain: Adapter) -> list[str]:
    """In what the two were trained differently beside the rounding, as far as their manifests tell."""
    first, second = (adapter.manifest.get("config") or {} for adapter in (through, plain))
    names = [name for name in sorted({*first, *second} - {"qat"}) if first.get(name) != second.get(name)]
    hashes = [(adapter.manifest.get("data") or {}).get("hash") for adapter in (through, plain)]
    return [*names, *["data"] * (hashes[0] != hashes[1])]


def _spec(adapters: Sequence[Adapter], rank: int, modules: Sequence[str]) -> LoraSpec:
    keys = tuple(dict.fromkeys(key for adapter in adapters for key in adapter.spec.keys))
    layers = (
        -1 if any(each.spec.num_layers <= 0 for each in adapters) else max(each.spec.num_layers for each in adapters)
    )
    depths = [(adapter.manifest.get("base") or {}).get("num_layers") for adapter in adapters]
    depth = next((depth for depth in depths if isinstance(depth, int)), None)
    return LoraSpec(rank, 1.0, 0.0, keys, layers).covering(modules, depth)
