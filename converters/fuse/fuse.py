"""A base with an adapter worked into its weights, once it is known how much of the adapter the target format keeps.

Rounding to a format with few bits can swallow a small update: a 4-bit weight moves by a step or not at all. So every
adapted layer is measured first: the change that F makes of ΔW, with F the way to the target format and back, is
F(W + ΔW) − F(W); the share that survives is its projection on ΔW. Afterwards the written model's logits are compared
with those of base and adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_rsgwm.converters.base_layers import read_base_layers
from mlx_rsgwm.converters.checkpoint_form import checkpoint_arrays
from mlx_rsgwm.converters.fuse.error_feedback import Packed, round_by_feedback
from mlx_rsgwm.converters.fuse.layers import (
    FORMATS,
    StoredForm,
    Target,
    check_groups,
    dora_gains,
    fuse_layers,
    fused_weight,
    kind_of,
    plain_layer,
    quantise,
    stored_as,
    too_narrow,
)
from mlx_rsgwm.converters.fuse.model_files import write_model
from mlx_rsgwm.converters.parity.mlx import apply_adapter, probe_ids, replace_parameters
from mlx_rsgwm.converters.peft.names import model_order
from mlx_rsgwm.converters.resized_vocabulary import make_room, rows_of, tokenizer_of
from mlx_rsgwm.converters.untied_base import adapts_head, untied_base
from mlx_rsgwm.core import files
from mlx_rsgwm.core.dtypes import DTYPES
from mlx_rsgwm.core.errors import AdapterError, CheckFailed, RsgwmError, raise_problems
from mlx_rsgwm.core.folders import new_folder, require_empty, require_space
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.row_hashes import FUSED_FILE, KEY, RowRecord, record_of, record_of_base
from mlx_rsgwm.linalg.gram import Gram
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapter
from mlx_rsgwm.models.base import Base, load_base
from mlx_rsgwm.models.config import open_model
from mlx_rsgwm.models.fit_check import base_of, dora_changes_nothing
from mlx_rsgwm.models.quantisation import QuantFormat
from mlx_rsgwm.models.token_layers import has_head

MIN_SHARE = 0.9
TEXTS = (
    "Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether?",
    "The capital of France is Paris, and the capital of Italy is",
)


@dataclass(frozen=True)
class Survival:
    """Of one module's ΔW, of size ``norm``: ``share`` survives along it, ``error`` comes instead and beside it."""

    module: str
    share: float
    error: float
    norm: float


def fuse(
    source: AdapterSource,
    base_name: str | None,
    out: Path,
    *,
    target: Target = "keep",
    min_share: float = MIN_SHARE,
    force: bool = False,
    grams: Mapping[str, Gram] | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write the model that a base is with an adapter to the new folder ``out``.

    Args:
        source: as for ``load_adapter``: LoRA or DoRA on any layers, and replaced parameters.
        base_name: as for ``load_base``; None: the one that the adapter records.
        out: a folder that does not exist yet, or an empty one.
        target: one of :data:`FORMATS`, or a format of few bits.
        min_share: the share of the adapter's update, and of its effect on logits, that must survive.
        force: write it whatever survives.
        grams: second moments of the adapted layers' inputs by module; with them, which takes a format of few bits,
            these layers are rounded by error feedback.

    Returns:
        JSON: ``form``, whose names and layout the arrays have (``transformers`` or ``mlx-lm``), with ``form_reason``
        where that is mlx-lm's though they are floats; ``share`` and ``error`` over all modules, the ``worst`` ones,
        ``logit_share``, ``logit_error``, ``max_abs_logit`` against base and adapter, ``in_floats``, layers whose
        columns the format's groups do not divide, and what was fused.

    Raises:
        CheckFailed: less than ``min_share`` survives; nothing is written then, or kept.
        RsgwmError: the adapter does not fit the base, groups do not divide an adapted layer's columns, ``out`` is not
            empty, no room.
    """
    if isinstance(target, str) and target not in FORMATS:
        raise RsgwmError(f"fuse: format {target!r} is unknown; there are {', '.join(FORMATS)}")
    if not 0 <= min_share <= 1:
        raise RsgwmError(f"fuse: the share must be in [0, 1], found {min_share}")
    require_empty(out)
    adapter = load_adapter(source, base_name, progress=progress)
    name, path = base_of(adapter, base_name, progress)
    record = record_of(adapter.manifest, adapter.name) | record_of_base(path)
    with ExitStack() as stack:
        loaded_name = name
        if adapts_head(adapter) and not has_head(dict(open_model(path)[0].named_modules())):
            path = stack.enter_context(untied_base(path))
            loaded_name = str(path)
        return _fuse(adapter, path, loaded_name, name, out, target, min_share, force, grams or {}, progress, record)


def _fuse(
    adapter: Adapter,
    path: Path,
    loaded_name: str,
    base_name: str,
    out: Path,
    target: Target,
    min_share: float,
    force: bool,
    grams: Mapping[str, Gram],
    progress: Progress,
    record: RowRecord,
) -> dict[str, Any]:
    """:func:`fuse` with the base in the folder ``path``, which ``load_base`` finds as ``loaded_name``."""
    model, config, replaced = _adapted_model(path, adapter, base_name)
    tokenizer = tokenizer_of(adapter, path)
    layers = _adapted_layers(model, adapter)
    if dora_changes_nothing(adapter, dora_gains(layers.values())):
        raise AdapterError(f"{adapter.where} changes nothing: every lora_b is zero, and its magnitudes are the base's")
    check_groups(layers, target)
    survivals, rounded = _measured(layers, grams, target, progress)
    total = _total(survivals)
    if total.share < min_share and not force:
        raise CheckFailed(
            f"only {total.share:.0%} of {adapter.where} survives in the format {target}, below {min_share:.0%} "
            f"(least in {_worst(survivals)[0].module}, {_worst(survivals)[0].share:.0%}); "
            "choose another --format (float16), or --force"
        )
    fused, config, form = _fused_model(path, model, config, layers, adapter, target, rounded)
    in_floats = too_narrow(fused, target)
    del model, layers
    size = sum(value.nbytes for value in _arrays_of(fused))
    require_space(out, size + 2**24)
    with new_folder(out) as work:
        write_model(fused, config, path, tokenizer, work)
        del fused
        mx.clear_cache()
        result = {
            "out": str(out),
            "base": base_name,
            "adapter": adapter.where,
            "format": str(target),
            **form,
            "modules": sum(survival.norm > 0 for survival in survivals),
            "replaced": replaced,
            "share": total.share,
            "error": total.error,
            "worst": [vars(survival) for survival in _worst(survivals)],
            "min_share": min_share,
            "by_feedback": len(rounded),
            "in_floats": in_floats,
            **_compare_logits(adapter, loaded_name, work, target, progress),
            "versions": versions(),
        }
        if not all(math.isfinite(float(str(result[key]))) for key in ("logit_share", "logit_error", "max_abs_logit")):
            raise RsgwmError(
                f"the logits of {base_name} are not finite on texts of about a hundred characters, so nothing can be "
                "compared; has it fewer positions, or values that are not finite?"
            )
        if abs(1 - float(str(result["logit_share"]))) > 1 - min_share and not force:
            raise CheckFailed(
                f"{result['logit_share']:.0%} of the adapter's effect on logits is in the fused model, "
                f"outside {min_share:.0%} to {2 - min_share:.0%}; it was removed; choose another --format, or --force"
            )
        files.write_json(work / FUSED_FILE, {**result, KEY: record.describe()})
    return result


# --- measuring --------------------------------------------------------------------------------------------------


def _adapted_model(path: Path, adapter: Adapter, base_name: str) -> tuple[Any, dict[str, Any], int]:
    """The base's model with the adapter in it, its config, and how many of the replaced parameters are other ones."""
    model: Any
    model, config, _ = open_model(path)
    replaced = _count_replaced(model, adapter)
    config = make_room(model, config, adapter)
    if adapter.full:
        replace_parameters(model, adapter)
    if adapter.weights:
        apply_adapter(model, adapter, base_name)
    return model, config, replaced


def _count_replaced(model: Any, adapter: Adapter) -> int:
    """How many parameters of ``adapter`` are not the base's own: a head may be held as it was."""
    flat: Any = tree_flatten(model.parameters())
    present = dict(flat)
    return sum(
        (old := present.get(name)) is None
        or old.shape != value.shape
        or not bool(mx.array_equal(old, value.astype(old.dtype)).item())
        for name, value in adapter.full.items()
    )


def _adapted_layers(model: Any, adapter: Adapter) -> dict[str, Any]:
    """mlx-lm's LoRA and DoRA layers that ``adapter`` has arrays of; the model gets its own back for the others.

    mlx-lm adapts whatever the configuration selects: a layer without arrays would be counted, and rounded once more.

    Raises:
        AdapterError: naming what mlx-lm left out.
    """
    layers = {name: module for name, module in model.named_modules() if "lora_a" in module and "lora_b" in module}
    modules = adapter.modules()
    missing = [module for module in modules if module not in layers]
    raise_problems(adapter.where, [f"{name} was not applied by mlx-lm" for name in missing], AdapterError)
    without = layers.keys() - set(modules)
    model.update_modules(tree_unflatten([(name, plain_layer(layers[name])) for name in without]))
    return {name: layer for name, layer in layers.items() if name not in without}


def _measured(
    layers: Mapping[str, Any], grams: Mapping[str, Gram], target: Target, progress: Progress
) -> tuple[list[Survival], dict[str, Packed]]:
    """What survives of every layer's update in the target, and the layers that error feedback has rounded."""
    survivals: list[Survival] = []
    rounded: dict[str, Packed] = {}
    with progress.task("measuring", len(layers)) as advance:
        for name in sorted(layers, key=model_order):
            if name in grams and not hasattr(layers[name], "embedding"):  # whose inputs are no columns of its weight
                rounded[name] = _by_feedback(layers[name], grams[name], target)
            survivals.append(_survival(name, layers[name], stored_as(layers[name], target), rounded.get(name)))
            advance(1, name)
    return survivals, rounded


def _by_feedback(layer: Any, gram: Gram, target: Target) -> Packed:
    """The fused weight of an adapted layer in a format of few bits, rounded by error feedback."""
    stored = stored_as(layer, target)
    if stored.quant is None or not isinstance(target, QuantFormat):
        raise RsgwmError(f"fuse: error feedback is for formats of few bits, found {target}")
    return round_by_feedback(fused_weight(layer)[1], gram.dense(), stored.quant, stored.dtype)


def _survival(name: str, layer: Any, stored: StoredForm, rounded: Packed | None = None) -> Survival:
    weight, fused = fused_weight(layer)
    update = fused - weight
    survived = (rounded.dense() if rounded else stored.round_trip(fused)) - stored.round_trip(weight)
    square = mx.sum(update * update)
    along = mx.sum(survived * update)
    beside = mx.sum(mx.square(survived - update))
    mx.eval(square, along, beside)
    size, dot, off = (float(value.tolist()) for value in (square, along, beside))  # type: ignore[arg-type]
    if not size:
        return Survival(name, 1.0, 0.0, 0.0)
    return Survival(name, dot / size, (off / size) ** 0.5, size**0.5)


def _total(survivals: list[Survival]) -> Survival:
    """Over all modules, each by the square of its update's size."""
    squares = [survival.norm**2 for survival in survivals]
    total = sum(squares)
    if not total:
        return Survival("", 1.0, 0.0, 0.0)
    share = sum(survival.share * square for survival, square in zip(survivals, squares, strict=True)) / total
    error = sum(survival.error**2 * square for survival, square in zip(survivals, squares, strict=True)) / total
    return Survival("", share, error**0.5, total**0.5)


def _worst(survivals: list[Survival]) -> list[Survival]:
    return (
        sorted((survival for survival in survivals if survival.norm), key=lambda survival: survival.share)[:5]
        or survivals[:1]
    )


# --- the fused model --------------------------------------------------------------------------------------------


def _fused_model(
    path: Path,
    model: Any,
    config: dict[str, Any],
    layers: dict[str, Any],
    adapter: Adapter,
    target: Target,
    rounded: Mapping[str, Packed],
) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """The fused model, its config, and in which form it is, with the reason why not in transformers'.

    In transformers' form it is a table of the checkpoint's arrays; in mlx-lm's, ``model`` with plain layers.
    """
    kind = kind_of(target)
    packed = bool(config.get("quantization") or config.get("quantization_config"))
    if isinstance(kind, QuantFormat) or (kind is None and packed):
        return model, fuse_layers(model, config, layers, target, rounded), {"form": "mlx-lm"}
    base = read_base_layers(str(path), path)
    changed = {**adapter.full, **{f"{name}.weight": fused_weight(layer)[1] for name, layer in layers.items()}}
    config = fuse_layers(model, config, layers, target, {})
    try:
        arrays = checkpoint_arrays(base, model, changed, adapter, DTYPES[kind] if kind else None)
    except RsgwmError as error:
        return model, config, {"form": "mlx-lm", "form_reason": str(error)}
    return arrays, config, {"form": "transformers"}


def _arrays_of(fused: Any) -> list[mx.array]:
    flat: Any = tree_flatten(fused.parameters() if isinstance(fused, nn.Module) else fused)
    return [value for _, value in flat]


# --- the written model ------------------------------------------------------------------------------------------


def _compare_logits(
    adapter: Adapter, base_name: str, out: Path, target: Target, progress: Progress
) -> dict[str, float]:
    """How much of the adapter's effect on float32 logits the written model has, and how far it is from it."""
    with progress.task("comparing logits", 3) as advance:
        base = load_base(base_name, "float32", progress)
        ids = probe_ids(base, TEXTS)
        if rows := rows_of(adapter.manifest):  # of a smaller vocabulary only what both have is compared
            ids = [[token for token in text if token < rows] for text in ids]
        bare = _logits(base, ids)
        quant = kind_of(target)
        packed = bare
        make_room(base.model, base.config, adapter)
        if adapter.full:
            replace_parameters(base.model, adapter)
        if adapter.weights:
            apply_adapter(base.model, adapter, base_name)
        adapted = _logits(base, ids)
        del base
        advance(1, "base and adapter")
        if isinstance(quant, QuantFormat):
            again = load_base(base_name, "float32", progress)
            if not again.config.get("quantization"):
                quantise(again.model, dict(again.config), quant)
                packed = _logits(again, ids)
            del again
        advance(1, "the base in the target format")
        fused = _logits(load_base(str(out), "float32"), ids)
        advance(1, "the fused model")
    columns = min(bare.shape[-1], fused.shape[-1])
    bare, packed, adapted, fused = (logits[:, :columns] for logits in (bare, packed, adapted, fused))
    effect, change = adapted - bare, fused - packed
    square = float((effect * effect).sum())
    return {
        "logit_share": float((effect * change).sum()) / square if square else 1.0,
        "logit_error": (float(np.square(change - effect).sum()) / square) ** 0.5 if square else 0.0,
        "max_abs_logit": float(np.abs(fused - adapted).max()),
    }


def _logits(base: Base, ids: list[list[int]]) -> np.ndarray:
    model: Any = base.model
    logits = [np.array(model(mx.array([row]))[0].astype(mx.float32)).astype(np.float64) for row in ids if row]
    mx.clear_cache()
    return np.concatenate(logits)
