"""Merging a pool: check that it can be merged, run the method, look at what came out, hand back an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import mlx.core as mx

from mlx_rsgwm.adapter import Adapter, versions
from mlx_rsgwm.errors import RsgwmError, raise_problems
from mlx_rsgwm.files import sha256_file, sha256_json
from mlx_rsgwm.merging.linear import linear
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.merging.products import diagnose, mean_product_cosine
from mlx_rsgwm.merging.rsgwm import rsgwm

Method = Callable[[Sequence[Adapter], MergeOptions], dict[str, mx.array]]

METHODS: MappingProxyType[str, Method] = MappingProxyType({"rsgwm": rsgwm, "linear": linear})


def merge(adapters: Sequence[Adapter], options: MergeOptions) -> Adapter:
    """One adapter from several, with the diagnosis and the sources in its manifest.

    Raises:
        RsgwmError: an unknown method, fewer than two adapters, a pool that does not fit together (every reason at
            once), a result that is not finite or that collapses.
    """
    if options.method not in METHODS:
        raise RsgwmError(f"unknown method {options.method!r}; there are {', '.join(METHODS)}")
    check_pool(adapters, options)
    weights = METHODS[options.method](adapters, options)
    mx.eval(weights)
    first = adapters[0]
    merged = Adapter(first.spec, weights)
    raise_problems(f"{options.method} merge", merged.problems())
    diagnosis = diagnose(adapters, merged)
    diagnosis["overall"]["cosine_to_mean_product"] = mean_product_cosine(adapters, weights, first.spec.scale)
    merged.manifest = {
        "kind": "merged",
        "base": first.manifest.get("base"),
        "template": first.manifest.get("template"),
        "merge": {
            **options.describe(),
            "sources": [_source(adapter) for adapter in adapters],
            "diagnosis": diagnosis,
        },
        "versions": versions(),
    }
    return merged


def check_pool(adapters: Sequence[Adapter], options: MergeOptions) -> None:
    """Raise one error with every reason why these adapters cannot be merged factor by factor."""
    if len(adapters) < 2:
        raise RsgwmError(f"a merge needs at least two adapters, found {len(adapters)}")
    if options.weights and len(options.weights) != len(adapters):
        raise RsgwmError(f"{len(options.weights)} weights for {len(adapters)} adapters; give one for each")
    first, problems = adapters[0], []
    for other in adapters[1:]:
        name = other.where
        if other.spec.fine_tune_type != "lora" or first.spec.fine_tune_type != "lora":
            problems.append(f"{name}: only lora adapters can be merged")
        if (other.base_fingerprint or "") != (first.base_fingerprint or ""):
            problems.append(f"{name} was made for another base than {first.where}")
        if other.spec.scale != first.spec.scale:
            problems.append(f"{name} has scale {other.spec.scale}, {first.where} has {first.spec.scale}")
        missing = sorted(set(first.modules()) ^ set(other.modules()))
        if missing:
            problems.append(f"{name} and {first.where} differ in modules: {', '.join(missing[:4])}")
            continue
        unequal = [key for key, value in first.weights.items() if other.weights[key].shape != value.shape]
        if unequal:
            key = unequal[0]
            problems.append(f"{name}: {key} has shape {other.weights[key].shape}, not {first.weights[key].shape}")
        elif not same_initialisation(first, other):
            problems.append(
                f"{name} does not share its lora_a initialisation with {first.where} (or has none recorded)"
            )
        if other.template_hash != first.template_hash:
            problems.append(f"{name} was trained with another prompt template than {first.where}")
    raise_problems("the pool cannot be merged factor by factor", problems)


def same_initialisation(first: Adapter, second: Adapter) -> bool:
    """Both recorded lora_a at initialisation, and it is the same array for array."""
    if not first.init or first.init.keys() != second.init.keys():
        return False
    return bool(
        mx.all(mx.stack([mx.array_equal(value, second.init[name]) for name, value in first.init.items()])).item()
    )


def _source(adapter: Adapter) -> dict[str, Any]:
    manifest = adapter.path / "manifest.json" if adapter.path else None
    if manifest is not None and manifest.is_file():
        digest = sha256_file(manifest)
    else:
        digest = sha256_json({name: list(value.shape) for name, value in adapter.weights.items()})
    return {"name": adapter.path.name if adapter.path else "", "manifest_sha256": digest}
