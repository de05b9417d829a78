"""The proof of a conversion from its two folders alone: every module's update computed from both, bits compared.

Nothing of the converters is used but the names of modules: arrays are read, ranks and scales taken, experts and gate
and up taken apart here a second time, in NumPy and float64. So a mistake that there and back cancel is seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.converters.module_names import MIXTRAL, ONE_EXPERT, Names
from mlx_rsgwm.converters.peft.folder import PeftFolder, open_peft
from mlx_rsgwm.converters.peft.names import PREFIX, SAVED, model_order, parse_name
from mlx_rsgwm.converters.peft.raw_arrays import RawArray, read_raw
from mlx_rsgwm.converters.weight_map import Link
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import CheckFailed
from mlx_rsgwm.core.patterns import compile_pattern
from mlx_rsgwm.models.adapter import CONFIG_FILE, KEPT_FILE, MANIFEST_FILE, WEIGHTS_FILE
from mlx_rsgwm.models.token_layers import is_embedding, is_head

# float64 sums of products of stored values; a scale folded into float32 errs by 6e-8 a term.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Side:
    """One side's update of a module: ``a`` (r, in) and ``b`` (out, r) of every expert, one for other layers.

    ``factor``: what mlx-lm multiplies the base's weight by, one number or one an output.
    """

    a: tuple[RawArray, ...]
    b: tuple[RawArray, ...]
    scale: float
    factor: float | np.ndarray = 1.0


@dataclass(frozen=True)
class LayerDifference:
    """Where the two folders differ, by mlx-lm's name of the module, and how."""

    module: str
    what: str

    def __str__(self) -> str:
        return f"{self.module}: {self.what}"


def require_equal(peft: Path, adapter: Path, names: Names | None = None) -> int:
    """Compare the folders, and return the number of modules compared.

    Raises:
        CheckFailed: naming the first layer that differs and how, and how many more do.
        RsgwmError: one of the folders cannot be read.
    """
    modules, differences = compare_folders(peft, adapter, names)
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise CheckFailed(f"{peft} and {adapter} are not the same adapter: {differences[0]}{more}")
    return modules


def compare_folders(peft: Path, adapter: Path, names: Names | None = None) -> tuple[int, list[LayerDifference]]:
    """How many modules were compared, and every difference in the order in which a model runs through its layers."""
    opened = open_peft(peft)
    names = names or Names()
    peft_sides, their_rest = _peft_sides(opened, names)
    config = files.read_json_object(adapter / CONFIG_FILE)
    arrays = read_raw(adapter / WEIGHTS_FILE)
    kept_arrays = read_raw(adapter / KEPT_FILE) if files.is_present(adapter / KEPT_FILE) else {}
    mlx_sides, our_rest = _mlx_sides(arrays, config)
    folded = {name.removesuffix(".lora_b") for name in kept_arrays if name.endswith(".lora_b")}
    # What was saved with the base's own values is no part of the adapter and kept for the way back.
    for name in (name.removesuffix(SAVED) for name in kept_arrays if name.endswith(SAVED)):
        ours_name = name if name in their_rest else names.mlx_parameters(name)[0]
        if ours_name in their_rest and their_rest[ours_name].same_bits(kept_arrays[f"{name}{SAVED}"]):
            del their_rest[ours_name]
    manifest = files.read_json_object(adapter / MANIFEST_FILE) if files.is_present(adapter / MANIFEST_FILE) else {}
    source = manifest.get("source") or {}
    for name in (source.get("layout") or {}).get("derived") or ():  # of base and PEFT's arrays together: for parity
        if name not in their_rest:  # in a plain form PEFT's file has them
            our_rest.pop(name, None)
    for module in source.get("left_out") or ():  # --language-only says so when it converts
        peft_sides.pop(names.mlx_module(module), None)
        their_rest = {name: value for name, value in their_rest.items() if name.rpartition(".")[0] != module}
    _untie(peft_sides, their_rest, mlx_sides, our_rest)
    differences = []
    for module in sorted(peft_sides.keys() | mlx_sides.keys(), key=model_order):
        if module not in mlx_sides or module not in peft_sides:
            differences.append(
                LayerDifference(
                    module, f"only the {'PEFT' if module in peft_sides else 'MLX'} folder has arrays for it"
                )
            )
        else:
            differences += [
                LayerDifference(module, what)
                for what in _differences(peft_sides[module], mlx_sides[module], module in folded)
            ]
    for name in sorted(their_rest.keys() | our_rest.keys(), key=lambda name: model_order(name.rpartition(".")[0])):
        module, _, leaf = name.rpartition(".")
        value, other = their_rest.get(name), our_rest.get(name)
        if value is None or other is None:
            differences.append(
                LayerDifference(module, f"only the {'MLX' if value is None else 'PEFT'} folder has its {leaf}")
            )
        elif not _same_parameter(value, other, _link_of(name, names)):
            differences.append(LayerDifference(module, f"its {leaf} differs"))
    if bool(config.get("fine_tune_type") == "dora") != bool(opened.config.get("use_dora")):
        differences.append(
            LayerDifference(next(iter(sorted(mlx_sides, key=model_order)), ""), "only one of the two is DoRA")
        )
    return len(peft_sides), sorted(differences, key=lambda difference: model_order(difference.module))


def _differences(peft: Side, mlx: Side, folded: bool) -> Iterator[str]:
    """What differs between the two updates of one module; ``folded``: its lora_b was folded and its original kept."""
    if len(peft.a) != len(mlx.a):
        yield f"{len(peft.a)} experts in PEFT, {len(mlx.a)} in MLX"
        return
    for expert, (a1, b1, a2, b2) in enumerate(zip(peft.a, peft.b, mlx.a, mlx.b, strict=True)):
        where = f" of expert {expert}" if len(peft.a) > 1 else ""
        if 2 * a2.shape[0] == a1.shape[0]:
            a1, b1 = _own_half(a1, b1, a2)
        rank = a1.shape[0]
        if (a1.shape[1], b1.shape[0]) != (a2.shape[1], b2.shape[0]) or a2.shape[0] < rank:
            yield f"maps {a1.shape[1]} to {b1.shape[0]} in PEFT, {a2.shape[1]} to {b2.shape[0]} in MLX{where}"
            return
        for side, pair in (("PEFT", (a1, b1)), ("MLX", (a2, b2))):
            for leaf, value in zip("ab", pair, strict=True):
                if not np.isfinite(value.values()).all():
                    yield f"lora_{leaf}{where} has values that are not finite in {side}"
                    return
        if what := _effect(a1, b1, peft.scale * peft.factor, a2, b2, mlx.scale):
            yield what + where
            return
        if a1.dtype != a2.dtype or (b1.dtype != b2.dtype and peft.scale == mlx.scale and not folded):
            yield f"{a1.dtype}, {b1.dtype} in PEFT, {a2.dtype}, {b2.dtype} in MLX{where}"
            return
        same_a = a1.same_bits(a2.take(a2.bits[:rank]))
        same_b = peft.scale != mlx.scale or folded or b1.same_bits(b2.take(b2.bits[:, :rank]))
        if not same_a or not same_b or a2.bits[rank:].any() or b2.bits[:, rank:].any():
            yield f"not the same bits in lora_{'b' if same_a else 'a'}{where}"
            return


def _link_of(name: str, names: Names) -> Link | None:
    """How mlx-lm's parameter comes from transformers'; of a layer's magnitudes, the size of its factor."""
    weight = names.link(f"{name.removesuffix('.m')}.weight") if name.endswith(".m") else None
    if weight is None or not weight.scaled:
        return names.link(name)
    scale = np.abs(weight.scale)
    return Link(weight.source, (0,), (), scale if isinstance(weight.scale, np.ndarray) else float(scale))


def _same_parameter(saved: RawArray, loaded: RawArray, link: Link | None) -> bool:
    """Whether our replaced parameter is theirs as mlx-lm would load it: to the bit, or as its type can hold it."""
    if link is None or link.plain or link.axes is None:
        return saved.same_bits(loaded)
    moved = saved.take(saved.bits.transpose(link.axes))
    if not link.scaled and not link.shifted:
        return moved.same_bits(loaded)
    rows = np.reshape(link.scale, (-1, *[1] * (moved.bits.ndim - 1))) if link.scaled else 1.0
    expected = moved.values() * rows + link.offset
    step = {"F32": 2e-7, "F16": 1e-3, "BF16": 8e-3}[loaded.dtype]
    return loaded.shape == moved.shape and bool(
        (np.abs(loaded.values() - expected) <= step * (np.abs(expected) + np.abs(link.offset))).all()
    )


def _own_half(a: RawArray, b: RawArray, other_a: RawArray) -> tuple[RawArray, RawArray]:
    """The half of a pair's rank that is this projection's, where gate and up share the pair with zeros between them."""
    half = a.shape[0] // 2
    for half_rows, foreign in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
        cut = a.take(a.bits[half_rows])
        if not b.bits[:, foreign].any() and cut.same_bits(other_a):
            return cut, b.take(b.bits[:, half_rows])
    return a, b


def _effect(
    a1: RawArray, b1: RawArray, scale1: float | np.ndarray, a2: RawArray, b2: RawArray, scale2: float
) -> str | None:
    """How the updates of a random input differ, or None where they do not."""
    x = np.random.default_rng(a1.shape[1]).standard_normal(a1.shape[1])
    effect = scale1 * (b1.values() @ (a1.values() @ x))
    other = scale2 * (b2.values() @ (a2.values() @ x))
    size = np.abs(scale1) * (np.abs(b1.values()) @ (np.abs(a1.values()) @ np.abs(x)))
    error = np.abs(effect - other)
    if (error <= TOLERANCE * size).all():
        return None
    norm = float(effect @ effect)
    factor = float(effect @ other) / norm if norm else math.inf
    if not other.any():
        return "the update is zero in MLX, not in PEFT"
    if not norm:
        return "the update is zero in PEFT, not in MLX"
    if np.abs(other - factor * effect).max() <= 1e-4 * np.abs(other).max():
        return f"the update in MLX is {factor:.6g} times that in PEFT (scale {scale2:g} against {np.mean(scale1):g})"
    return f"the updates differ by {math.sqrt(float(error @ error) / norm):.1e} of their size"


# --- PEFT's side ------------------------------------------------------------------------------------------------


def _peft_sides(folder: PeftFolder, names: Names) -> tuple[dict[str, Side], dict[str, RawArray]]:
    """Updates by mlx-lm's module, and everything else (magnitudes, trained parameters) by mlx-lm's parameter."""
    config = folder.config
    pairs: dict[str, dict[str, RawArray]] = {}
    rest: dict[str, RawArray] = {}
    for file in folder.weights:
        for name, value in read_raw(file).items():
            parsed = parse_name(name)
            if parsed is None:
                rest[name] = value
            elif parsed.leaf in ("a", "b", "embedding_a", "embedding_b"):
                pairs.setdefault(parsed.module, {})[parsed.leaf[-1]] = value
            elif parsed.leaf in ("tokens", "lora_bias"):
                rest[name.removeprefix(PREFIX)] = value
            elif parsed.leaf == "magnitude":
                rest[f"{names.mlx_module(parsed.module)}.m"] = value
            elif parsed.leaf != "base_weight":
                leaf = "bias" if parsed.leaf == "base_bias" else parsed.leaf
                rest[names.mlx_parameters(f"{parsed.module}.{leaf}")[0]] = value
    sides: dict[str, Side] = {}
    singles: dict[str, dict[int, Side]] = {}
    for module, pair in pairs.items():
        if pair.keys() != {"a", "b"}:
            rest[f"{module}.lora_{next(iter(pair))}"] = next(iter(pair.values()))
        elif match := ONE_EXPERT.fullmatch(module):
            projection = MIXTRAL.get(match["projection"], match["projection"])
            name = f"{names.switch_layers(match['block'])}.{projection}"
            scale = _scale(config, module, pair["a"].shape[0])
            singles.setdefault(name, {})[int(match["expert"])] = Side((pair["a"],), (pair["b"],), scale)
        elif module.endswith((".experts", ".experts.base_layer")):
            sides |= _expert_sides(module, pair["a"], pair["b"], config, names)
        else:
            scale = _scale(config, module, pair["a"].shape[0])
            mlx_name = names.mlx_module(module)
            link = names.link(f"{mlx_name}.weight")
            sides[mlx_name] = Side((pair["a"],), (pair["b"],), scale, link.scale if link is not None else 1.0)
    for name, experts in singles.items():
        ordered = [experts[index] for index in sorted(experts)]
        a, b = tuple(side.a[0] for side in ordered), tuple(side.b[0] for side in ordered)
        sides[name] = Side(a, b, ordered[0].scale)
    return sides, rest


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's scaling from the rank that the arrays have."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if compile_pattern(rf"(.*\.)?({pattern})$").match(module):
            alpha = value
            break
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _expert_sides(module: str, a: RawArray, b: RawArray, config: Mapping[str, Any], names: Names) -> dict[str, Side]:
    experts_name = module.removesuffix(".base_layer")
    targeted = [
        name
        for name in ("gate_up_proj", "down_proj")
        if any(f".{experts_name}.{name}".endswith("." + target) for target in config.get("target_parameters") or ())
    ]
    parameter = targeted[0] if module != experts_name else targeted[-1]
    rank = int(config["r"])
    for pattern, value in (config.get("rank_pattern") or {}).items():
        if compile_pattern(rf"(.*\.)?({pattern})$").match(f"{experts_name}.{parameter}"):
            rank = int(value)
            break
    count = a.shape[0] // rank
    factors_a = tuple(a.take(a.bits[expert * rank : (expert + 1) * rank]) for expert in range(count))
    factors_b = [b.bits[:, expert::count] for expert in range(count)]
    scale = _scale(config, f"{experts_name}.{parameter}", rank)
    block = names.switch_layers(experts_name.removesuffix(".experts"))
    if parameter == "down_proj":
        return {f"{block}.down_proj": Side(factors_a, tuple(map(b.take, factors_b)), scale)}
    half = b.shape[0] // 2
    sides = {}
    for name, rows in (("gate_proj", slice(0, half)), ("up_proj", slice(half, None))):
        sides[f"{block}.{name}"] = Side(factors_a, tuple(b.take(value[rows]) for value in factors_b), scale)
    return sides


# --- MLX's side -------------------------------------------------------------------------------------------------


def _mlx_sides(
    arrays: Mapping[str, RawArray], config: Mapping[str, Any]
) -> tuple[dict[str, Side], dict[str, RawArray]]:
    scale = float(config["lora_parameters"]["scale"])
    sides, rest = {}, {}
    for name, value in arrays.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "lora_a" and (b := arrays.get(f"{module}.lora_b")) is not None:
            if value.bits.ndim == 3:
                experts = range(value.shape[0])
                own_a = tuple(value.take(value.bits[i]) for i in experts)
                sides[module] = Side(own_a, tuple(b.take(b.bits[i]) for i in experts), scale)
            else:
                sides[module] = Side((value.take(value.bits.T),), (b.take(b.bits.T),), scale)
        elif leaf != "lora_b" or f"{module}.lora_a" not in arrays:
            rest[name] = value
    return sides, rest


def _untie(
    peft_sides: dict[str, Side],
    their_rest: dict[str, RawArray],
    mlx_sides: dict[str, Side],
    our_rest: dict[str, RawArray],
) -> None:
    """Where MLX has one update or weight for a tied embedding and head, give its head a copy to be compared."""
    embedding = next((name for name in mlx_sides if is_embedding(name)), None)
    head = next((name for name in peft_sides if is_head(name)), None)
    if embedding is not None and head is not None and head not in mlx_sides:
        side = mlx_sides[embedding]
        a, b = side.b[0], side.a[0]
        mlx_sides[head] = Side((a.take(a.bits.T),), (b.take(b.bits.T),), side.scale)
    embedding_name = next((name for name in our_rest if is_embedding(name.removesuffix(".weight"))), None)
    head = next((name for name in their_rest if is_head(name.removesuffix(".weight"))), None)
    if embedding_name is not None and head is not None and head not in our_rest:
        our_rest[head] = our_rest[embedding_name]
