"""Merging a pool: check that it can be merged, run the method module by module, look at what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.nearest import nearest
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.random_streams import module_seed
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.batching import ROLES
from mlx_rsgwm.data.row_hashes import KEY, record_of
from mlx_rsgwm.linalg.lowrank import Factors, truncate
from mlx_rsgwm.merging.automatic import choose_method
from mlx_rsgwm.merging.compressed import compressed_modules
from mlx_rsgwm.merging.diagnosis import (
    Allowance,
    as_numbers,
    diagnosis,
    overwritten,
    refuse_objections,
    refuse_unsound,
    warnings_of,
)
from mlx_rsgwm.merging.layer import Layer
from mlx_rsgwm.merging.measure import LayerBatch, measuring
from mlx_rsgwm.merging.methods import (
    Method,
    find_method,
    method_for,
    needs_directions,
    resolved,
    sums,
    weight_problems,
)
from mlx_rsgwm.merging.options import AUTO, MergeOptions, Override
from mlx_rsgwm.merging.pool import Pool
from mlx_rsgwm.merging.weights import brought_near_one
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapters
from mlx_rsgwm.models.base import resolve_base
from mlx_rsgwm.models.base_folder import fingerprint_of
from mlx_rsgwm.models.directions import ALL
from mlx_rsgwm.models.fit_check import check_made_for

if TYPE_CHECKING:  # it runs models, and imports what they need
    from mlx_rsgwm.merging.recollect import LayerByLayer, Recollection

# Modules are evaluated together until their updates ΔW, or the factors of all adapters, have so many entries, and while
# one such batch is computed the next is described.
BATCH_ENTRIES = 1 << 23
BATCH_FACTORS = 1 << 20


def merge(
    adapters: Sequence[AdapterSource],
    options: MergeOptions,
    progress: Progress = SILENT,
    diagnosed: bool = True,
    base: str | Path | None = None,
    recollection: Recollection | None = None,
    once_checked: Callable[[], None] | None = None,
) -> Adapter:
    """One adapter from several, with the diagnosis and the sources in its manifest.

    Sources are as for ``load_adapters``, a folder of adapters stands for them, and ``base`` is what those of other
    formats are read for. Folders are streamed: with their number grows one module's factors, and nothing else. With
    ``diagnosed`` False nothing is measured, so there is no diagnosis, and no refusal of a merge that collapses or blows
    up: for a caller who looks at the result in another way. With a ``recollection`` the recorded directions are left
    aside: they are collected while merging, a block's under the merged blocks below. ``once_checked`` is called when
    options and adapters are known to fit, and the merge begins.

    Raises:
        AdapterError: an adapter is damaged.
        RsgwmError: an unknown method or parameter, fewer than two adapters, a pool that does not fit together (every
            reason at once), missing importance, adapters between which the method has no answer, a result that is not
            finite, that collapses or that blows up.
    """
    if recollection is not None and options.method == AUTO:
        options = replace(options, method="regmean")
    if options.method != AUTO:
        resolved(options)  # what it refuses is said before anything is read
    loaded = load_adapters(adapters, base, lazy=True, hashes=False, progress=progress)
    if len(loaded) < 2:
        raise RsgwmError(f"a merge needs at least two adapters, found {len(loaded)}")
    if base is not None:
        fingerprint = fingerprint_of(resolve_base(str(base), progress))
        for adapter in loaded:
            check_made_for(adapter, str(base), fingerprint, weights_only=True)
    pool = Pool.open(loaded)
    options, reason = choose_method(pool, options)
    method, parameters = find_method(options.method), resolved(options)
    raise_problems("merge options", weight_problems(options, len(loaded)))
    _check_overrides(pool, options)
    if parameters.get("space") == "factor":
        _check_factors(pool)
    signal = parameters["signal"] if "importance" in method.needs else None
    if signal is not None:
        pool.require_signal(signal)
    layers = None
    if recollection is not None:
        if not needs_directions(method, parameters):
            raise RsgwmError(f"{options.method} does not look at directions; recollect them for regmean")
        layers = recollection.start(loaded, options.role)
        pool = replace(pool, recollected=layers.grams)
    if once_checked is not None:
        once_checked()
    with pool.checked(signal):
        pool = pool.by_name(layers.order if layers else None) if needs_directions(method, parameters) else pool
        merged = _merged(pool, method, options, parameters, progress, diagnosed, layers)
    if layers is not None:
        merged.manifest["merge"]["recollected"] = layers.describe()
    if reason:
        merged.manifest["merge"]["chosen_because"] = reason
    return merged


def _merged(
    pool: Pool,
    method: Method,
    options: MergeOptions,
    parameters: Mapping[str, Any],
    progress: Progress,
    diagnosed: bool,
    layers: LayerByLayer | None,
) -> Adapter:
    rank = options.rank or _usual_rank(method, pool)
    spec = merged_spec(pool, rank)
    weights: dict[str, mx.array] = {}
    rows: dict[str, dict[str, Any]] = {}
    allowed: dict[str, Allowance] = {}
    objections: dict[str, Mapping[str, mx.array]] = {}
    ranks: dict[str, int] = {}
    computing, batch = LayerBatch(), LayerBatch()
    by_numpy = needs_directions(method, parameters)
    with (
        progress.task(f"merge by {options.method}", len(pool.modules)) as advance,
        measuring(rows, by_numpy) as measure_jobs,
    ):
        modules = _modules(pool, method, options, parameters)
        for module, compressed in compressed_modules(modules, rank, diagnosed, layers is None):
            if layers is not None:
                layers.take(module.name, compressed.factors)
            a, b = _padded(compressed.factors, rank)
            ranks[module.name] = min(compressed.factors.rank, a.shape[0], b.shape[1])
            weights[f"{module.name}.lora_a"], weights[f"{module.name}.lora_b"] = a, b / spec.scale
            batch.arrays += [weights[f"{module.name}.lora_a"], weights[f"{module.name}.lora_b"], module.objections]
            if diagnosed:
                rows[module.name] = batch.diagnose(module, compressed)
            allowed[module.name] = _allowance(module)
            objections[module.name] = module.objections
            batch.entries += a.shape[0] * b.shape[1]
            batch.held += sum(factors.a.size + factors.b.size for factors in module.factors)
            if batch.entries >= BATCH_ENTRIES or batch.held >= BATCH_FACTORS:
                mx.async_eval(batch.arrays)
                # A batch that is much larger than meant is one module's: two of those would be in memory.
                mx.eval(computing.arrays, batch.arrays if batch.held >= 2 * BATCH_FACTORS else [])
                measure_jobs(computing.jobs)
                computing, batch = batch, LayerBatch()
            advance(1, "")
        mx.eval(computing.arrays, batch.arrays)
        measure_jobs(computing.jobs + batch.jobs)
    labels = [source.label for source in pool.sources]
    # Why a method has no answer explains a result that is not finite; that an adapter is damaged explains either.
    described = None
    if diagnosed:
        numbers = as_numbers(rows)
        refuse_unsound(numbers, labels, allowed, objections, options, method.remedy)
        described = diagnosis(numbers, allowed)
    else:
        refuse_objections(objections, options.method, method.remedy)
    merged = Adapter(spec, weights, manifest=_manifest(pool, options, parameters, rank, ranks, described))
    # What was measured is finite, or it was refused.
    raise_problems(f"{options.method} merge", merged.shape_problems() if diagnosed else merged.problems())
    return merged


def _as_sum(method: Method, parameters: Mapping[str, Any]) -> bool:
    return sums(method, parameters) or method.scales


def _allowance(module: Layer) -> Allowance:
    as_sum = _as_sum(find_method(module.method), module.parameters)
    return Allowance(module.weights, as_sum, module.parameters.get("lambda", 1.0))


def merged_spec(pool: Pool, rank: int) -> LoraSpec:
    """The spec that covers every module of the pool, with the first adapter's scale and dropout."""
    specs = [source.spec for source in pool.sources]
    keys = tuple(dict.fromkeys(key for spec in specs for key in spec.keys))
    layers = -1 if any(spec.num_layers <= 0 for spec in specs) else max(spec.num_layers for spec in specs)
    depths = [(source.manifest.get("base") or {}).get("num_layers") for source in pool.sources]
    depth = next((depth for depth in depths if isinstance(depth, int)), None)
    return LoraSpec(rank, specs[0].scale, specs[0].dropout, keys, layers).covering(pool.modules, depth)


def _modules(pool: Pool, method: Method, options: MergeOptions, parameters: Mapping[str, Any]) -> Iterator[Layer]:
    survey = method.survey(pool, parameters) if method.survey else None
    nothing = [()] * len(pool.modules)
    importances: Any = pool.importances(parameters["signal"]) if "importance" in method.needs else nothing
    grams: Any = pool.grams(_directions_role(options)) if needs_directions(method, parameters) else nothing
    initial = pool.sources[0].initial() if parameters.get("reference") == "init" else {}
    scales = tuple(source.spec.scale for source in pool.sources)
    for (name, factors), importance, gram in zip(pool.updates(), importances, grams, strict=True):
        override = next((candidate for candidate in options.overrides if candidate.covers(name)), None)
        method_name, module_parameters = method_for(options, override) if override else (options.method, parameters)
        weights = (override.weights if override else ()) or options.weights or (1.0,) * len(factors)
        if override and override.ranks:
            factors = tuple(truncate(*pair).factors for pair in zip(factors, override.ranks, strict=True))
        as_sum = _as_sum(find_method(method_name), module_parameters)
        start = initial.pop(f"{name}.lora_a", None)
        yield Layer(
            name=name,
            factors=factors,
            scales=scales,
            weights=weights if as_sum else brought_near_one(weights),
            key=mx.random.key(module_seed(options.seed, name)),
            importances=importance,
            initial_a=None if start is None else start.astype(mx.float32),
            grams=gram,
            survey=survey,
            parameters=module_parameters,
            method=method_name,
        )


def _directions_role(options: MergeOptions) -> str:
    return options.role if options.role in ROLES else ALL


def _mixture_note(method: Method, options: MergeOptions, parameters: Mapping[str, Any]) -> list[str]:
    if not needs_directions(method, parameters) or _directions_role(options) != ALL:
        return []
    return [f"role {options.role} has no directions of its own: those of all roles count, by their tokens"]


def _padded(factors: Factors, rank: int) -> tuple[mx.array, mx.array]:
    missing = rank - factors.rank
    if not missing:
        return factors.a, factors.b
    return mx.pad(factors.a, [(0, 0), (0, missing)]), mx.pad(factors.b, [(0, missing), (0, 0)])


def _rank_warning(options: MergeOptions, ranks: Mapping[str, int]) -> list[str]:
    """One line where a rank was asked for that not every module's update can fill; ``ranks`` are what they have."""
    low = {name: rank for name, rank in ranks.items() if rank < (options.rank or 0)}
    if not low:
        return []
    highest, name = max(ranks.values()), min(low, key=lambda name: low[name])
    if len(low) == len(ranks):
        return [
            f"rank {options.rank} adds nothing: no update here has more than rank {highest}, and the rest is zeros; "
            f"--rank {highest} gives the same update"
        ]
    return [
        f"rank {options.rank} is more than {len(low)} of {len(ranks)} updates have (e.g. {name}: {low[name]}); "
        "the rest of those is zeros"
    ]


def _usual_rank(method: Method, pool: Pool) -> int:
    ranks = [source.spec.rank for source in pool.sources]
    return sum(ranks) if method.rank == "sum" else max(ranks)


def _check_overrides(pool: Pool, options: MergeOptions) -> None:
    """Refuse overrides that no module can have, or that are for none."""
    for override in options.overrides:
        method_for(options, override)
        if fixed := {"space", "scope", "signal", "truncate"} & set(override.parameters):
            raise RsgwmError(f"merge options: {', '.join(sorted(fixed))} cannot differ between modules")
        if not any(override.covers(module) for module in pool.modules):
            near = nearest(override.pattern, [part for module in pool.modules for part in module.split(".")])
            hint = f"did you mean {near!r}?" if near else f"there is e.g. {pool.modules[0]}"
            raise RsgwmError(f"merge options: {override.pattern!r} finds no module; {hint}")


def _check_factors(pool: Pool) -> None:
    """Refuse a pool whose factors do not belong together."""
    advice = " (merge the products instead: --set space=product)"
    raise_problems(f"the pool cannot be merged factor by factor{advice}", pool.factor_problems())


def _described(override: Override) -> dict[str, Any]:
    """An override as a JSON object, without the fields that it leaves as they are."""
    fields = {"weights": list(override.weights), "method": override.method, "ranks": list(override.ranks)}
    given = {name: value for name, value in fields.items() if value or name == "weights"}
    return {"pattern": override.pattern, "parameters": dict(override.parameters), **given}


def _manifest(
    pool: Pool,
    options: MergeOptions,
    parameters: Mapping[str, Any],
    rank: int,
    ranks: Mapping[str, int],
    described: dict[str, Any] | None,
) -> dict[str, Any]:
    first = pool.sources[0].manifest
    hashes = {source.template_hash for source in pool.sources}
    return {
        "kind": "merged",
        "base": next((s.manifest["base"] for s in pool.sources if s.base_fingerprint), None),
        # Adapters of several templates make an adapter of none.
        "template": first.get("template") if len(hashes) == 1 else None,
        KEY: reduce(or_, (record_of(s.manifest, s.name) for s in pool.sources)).describe(),
        "merge": {
            "method": options.method,
            "role": options.role,
            "parameters": dict(parameters),
            "weights": list(options.weights),
            "overrides": [_described(override) for override in options.overrides],
            "rank": rank,
            "seed": options.seed,
            "largest": options.largest,
            "sources": [source.describe() for source in pool.sources],
            "warnings": [
                *pool.warnings,
                *_rank_warning(options, ranks),
                *_mixture_note(find_method(options.method), options, parameters),
                *(warnings_of(described, options.weights) if described else ()),
                *(overwritten([s.name for s in pool.sources], parameters, described) if described else ()),
            ],
            **({"diagnosis": described} if described else {}),
        },
        "versions": versions(),
        **({"untied": True} if any(source.untied for source in pool.sources) else {}),
    }
