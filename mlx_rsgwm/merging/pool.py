"""A pool of adapters as merging reads it: checked one by one, then streamed from disk module by module.

Memory does not grow with the number of adapters beyond one module's factors: an adapter's arrays are read lazily and
dropped when the module is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.errors import AdapterError, RsgwmError, raise_problems
from mlx_rsgwm.core.files import sha256_file, sha256_json, sha256_unchanged
from mlx_rsgwm.core.safetensors_io import read_safetensors
from mlx_rsgwm.linalg.gram import Gram
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.pool_checks import doubts, importance_remedy, misfits
from mlx_rsgwm.merging.pool_metric import ModuleGrams
from mlx_rsgwm.models.adapter import (
    IMPORTANCE_FILE,
    INIT_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Adapter,
    LoraSpec,
    check_hashes,
)
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapters
from mlx_rsgwm.models.directions import load_directions, role_grams
from mlx_rsgwm.models.file_readers import UnreadArrays
from mlx_rsgwm.models.finite import not_finite

# Files are hashed beside the work. One thread hashes about 1 GB a second, twice what a merge reads on two cores.
HASHING_THREADS = 2


@dataclass(frozen=True)
class PoolAdapter:
    """One adapter of a pool without its arrays.

    ``name``: what manifests call it. ``shapes``: (in, rank, out) of every module. ``signals``: the importance it has.
    ``has_initial``: whether its lora_a at initialisation was recorded. Arrays come from ``folder``, or from ``held``
    when the adapter is only in memory.
    """

    label: str
    name: str
    spec: LoraSpec
    manifest: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int, int]]
    signals: frozenset[str]
    has_initial: bool
    folder: Path | None
    held: Adapter | None

    @classmethod
    def of(cls, adapter: Adapter) -> PoolAdapter:
        """Raises RsgwmError, all reasons at once, for an adapter that no merge can take."""
        shapes, problems = {}, []
        if adapter.spec.fine_tune_type != "lora":
            problems.append(f"it is a {adapter.spec.fine_tune_type} adapter; only lora adapters can be")
        if adapter.full:
            first = next(iter(adapter.full))
            problems.append(f"it replaces whole parameters of the base ({first}, …), which only rsgwm fuse applies")
        for module, a, b in adapter.factors():
            if a.ndim != 2:
                problems.append(f"{module} is a layer of experts, {a.shape}; those cannot be merged yet")
            elif not problems:
                shapes[module] = (a.shape[0], a.shape[1], b.shape[1])
        raise_problems(f"{adapter.where} cannot be merged or audited", problems)
        return cls(
            label=adapter.where,
            name=adapter.name,
            spec=adapter.spec,
            manifest=adapter.manifest,
            shapes=shapes,
            signals=frozenset(name.partition("/")[0] for name in adapter.importance),
            has_initial=bool(adapter.init),
            folder=adapter.path,
            held=None if adapter.path else adapter,
        )

    def weights(self) -> dict[str, mx.array]:
        """A fresh mapping of lora_a and lora_b, read when used."""
        if self.held is None:
            return self._read(WEIGHTS_FILE)
        unread = self.held.weights
        return unread.anew() if isinstance(unread, UnreadArrays) else dict(unread)

    def importance(self, signal: str) -> dict[str, mx.array]:
        """A fresh mapping of the importance of ``signal`` under the weights' names, read when used."""
        arrays = dict(self.held.importance) if self.held else self._read(IMPORTANCE_FILE)
        prefix = signal + "/"
        return {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}

    def initial(self) -> dict[str, mx.array]:
        """A fresh mapping of lora_a at initialisation, read when used; empty when none was recorded."""
        if self.held:
            return dict(self.held.init)
        return self._read(INIT_FILE) if self.has_initial else {}

    def grams(self, role: str) -> Mapping[str, Gram]:
        """Second moments of the modules' inputs in rows of ``role``, each read when it is asked for.

        Raises:
            RsgwmError: there are none, and how to get them.
        """
        if self.folder is not None:
            return load_directions(self.folder, role)
        directions, metadata = (self.held.directions, self.held.directions_metadata) if self.held else ({}, {})
        if not directions:
            raise RsgwmError(
                f"{self.label} has no directions, and is no folder that they could be collected in; save it"
            )
        return role_grams(lambda: dict(directions), metadata, role, self.label)

    def shares_initial(self, other: PoolAdapter) -> bool:
        """True when both recorded lora_a at initialisation, and the same one."""
        if not (self.has_initial and other.has_initial):
            return False
        mine, other_hash = ((source.manifest.get("files") or {}).get(INIT_FILE) for source in (self, other))
        if self.folder and other.folder and mine and mine == other_hash:
            return True
        return self._initial_digest == other._initial_digest

    @cached_property
    def _initial_digest(self) -> str:
        return _digest(self.initial())

    def _read(self, name: str) -> dict[str, mx.array]:
        assert self.folder is not None
        return read_safetensors(self.folder / name, evaluate=False)[0]

    def describe(self) -> dict[str, Any]:
        """JSON object that names this source in a merge's manifest."""
        digest = self.content_hash() or sha256_json({name: list(shape) for name, shape in self.shapes.items()})
        weights = self.weights_hash()
        return {"name": self.name, "manifest_sha256": digest, **({"weights_sha256": weights} if weights else {})}

    def weights_hash(self) -> str | None:
        """What its manifest says of its weights, which stays where directions are put beside them; None for nothing."""
        recorded = (self.manifest.get("files") or {}).get(WEIGHTS_FILE)
        return str(recorded) if recorded else None

    def content_hash(self) -> str | None:
        """What tells it from every other adapter: the hash of its manifest, or of the files of another format that it
        was read from, with its spec; None for one made in memory.
        """
        manifest = self.folder / MANIFEST_FILE if self.folder else None
        if manifest is not None and manifest.is_file():
            return sha256_file(manifest)
        origin = self.held.origin if self.held is not None else None
        if origin is None:
            return None
        read = [origin] if origin.is_file() else sorted(origin.glob("*.safetensors"))
        return sha256_json([self.spec.to_config(), *map(sha256_unchanged, read)])

    def merged_from(self) -> set[str]:
        """Hashes of manifests and weights of the adapters that it was merged from."""
        sources = (self.manifest.get("merge") or {}).get("sources") or ()
        hashes = ("manifest_sha256", "weights_sha256")
        return {str(part[name]) for part in sources if isinstance(part, dict) for name in hashes if name in part}

    @property
    def base_fingerprint(self) -> str:
        """The fingerprint of the base that it records; empty for none."""
        return (self.manifest.get("base") or {}).get("fingerprint") or ""

    @property
    def untied(self) -> bool:
        """Whether its head is apart from the embedding on a base that ties them."""
        layout = (self.manifest.get("source") or {}).get("layout") or {}
        return bool(self.manifest.get("untied") or layout.get("untied"))

    @property
    def template_hash(self) -> str:
        """The hash of the prompt template that it records; empty for none."""
        return (self.manifest.get("template") or {}).get("hash") or ""


@dataclass(frozen=True)
class Pool:
    """T adapters on one base, and ``warnings``: what a careful person would want to know before trusting a merge.

    ``recollected`` gives what :meth:`grams` gives, where that is not what the adapters have recorded.
    """

    sources: tuple[PoolAdapter, ...]
    warnings: tuple[str, ...]
    recollected: Callable[[Pool], Iterator[Sequence[Gram]]] | None = None

    @classmethod
    def open(cls, adapters: Sequence[AdapterSource]) -> Pool:
        """Check every adapter's names and shapes; hashes and values are left to :meth:`checked`.

        Raises:
            AdapterError: an adapter is damaged.
            RsgwmError: no adapter, adapters of different bases, modules of one name with different shapes; every
                problem at once.
        """
        sources = tuple(PoolAdapter.of(adapter) for adapter in load_adapters(adapters, lazy=True, hashes=False))
        if not sources:
            raise RsgwmError("no adapters to merge")
        raise_problems("the pool cannot be merged", misfits(sources))
        return cls(sources, tuple(doubts(sources)))

    @contextmanager
    def checked(self, signal: str | None = None) -> Iterator[None]:
        """What is made of the pool inside leaves it only if the files are those that their manifests describe.

        Hashing lets go of Python's lock, so it runs beside the work. The importance of ``signal`` is checked first: an
        entry that is not a number would silently count as unimportant. Weights that are not finite show in a merge's
        diagnosis; after any failure they are looked at, since a damaged adapter explains it better. The importance of
        an adapter in memory was checked when it was loaded.

        Raises:
            AdapterError: naming the files that were changed, or the arrays that are not finite.
        """
        with ThreadPoolExecutor(HASHING_THREADS) as workers:
            hashed = [
                workers.submit(check_hashes, source.folder, source.manifest) for source in self.sources if source.folder
            ]
            try:
                if signal is not None:
                    streamed = [source for source in self.sources if source.folder]
                    _check_finite(streamed, "importance ", lambda source: source.importance(signal))
                yield
            except (RsgwmError, ArithmeticError, RuntimeError, ValueError):
                _wait(hashed)
                _check_finite(self.sources, "", PoolAdapter.weights)
                raise
            _wait(hashed)

    @property
    def modules(self) -> list[str]:
        """Every module that at least one adapter adapts, in the order of the adapters' files."""
        return list(dict.fromkeys(name for source in self.sources for name in source.shapes))

    def by_name(self, key: Callable[[str], Any] | None = None) -> Pool:
        """The same with its modules in the order of their names, so that those of a block, which share inputs, meet; or
        of a ``key`` of them.
        """
        names = [sorted(source.shapes, key=key) for source in self.sources]
        sources = [
            replace(source, shapes={name: source.shapes[name] for name in adapted})
            for source, adapted in zip(self.sources, names, strict=True)
        ]
        return replace(self, sources=tuple(sources))

    def shape(self, module: str) -> tuple[int, int]:
        """(in, out) of a module."""
        shape = next(source.shapes[module] for source in self.sources if module in source.shapes)
        return shape[0], shape[2]

    def factor_problems(self) -> list[str]:
        """Why these adapters cannot be merged factor by factor; empty when they can."""
        first, problems = self.sources[0], []
        for other in self.sources[1:]:
            missing = sorted(set(first.shapes) ^ set(other.shapes))
            unequal = [name for name, shape in other.shapes.items() if first.shapes.get(name, shape) != shape]
            if missing:
                problems.append(f"{other.label} and {first.label} differ in modules: {', '.join(missing[:4])}")
            elif unequal:
                ranks = f"{other.shapes[unequal[0]][1]}, not {first.shapes[unequal[0]][1]}"
                problems.append(f"{other.label}: {unequal[0]} has rank {ranks} as in {first.label}")
            if not other.shares_initial(first):
                problems.append(
                    f"{other.label} does not share its lora_a initialisation with {first.label} (or has none recorded)"
                )
        return problems

    def updates(self) -> Iterator[tuple[str, tuple[Factors, ...]]]:
        """Every module with its T updates, scale folded into b; one that an adapter lacks is zero there."""
        readers = [source.weights() for source in self.sources]
        for module in self.modules:
            rows, columns = self.shape(module)
            factors = []
            for source, arrays in zip(self.sources, readers, strict=True):
                if module in source.shapes:
                    a, b = (arrays.pop(f"{module}.{leaf}").astype(mx.float32) for leaf in ("lora_a", "lora_b"))
                    factors.append(Factors(a, b * source.spec.scale))
                else:
                    factors.append(Factors(mx.zeros((rows, 1)), mx.zeros((1, columns))))
            yield module, tuple(factors)

    def importances(self, signal: str) -> Iterator[Iterator[tuple[mx.array, mx.array]]]:
        """For every module, in the order of :meth:`updates`, the T pairs (s_a, s_b) recorded for ``signal``.

        A pair is read when it is reached; walk over all of a module before going on.

        Raises:
            RsgwmError: naming every adapter that has no such importance, and how to get it.
        """
        self.require_signal(signal)
        readers = [source.importance(signal) for source in self.sources]
        return (self._importance(module, readers) for module in self.modules)

    def _importance(self, module: str, readers: Sequence[dict[str, mx.array]]) -> Iterator[tuple[mx.array, mx.array]]:
        rows, columns = self.shape(module)
        for source, arrays in zip(self.sources, readers, strict=True):
            if module in source.shapes:
                yield arrays.pop(f"{module}.lora_a"), arrays.pop(f"{module}.lora_b")
            else:
                yield mx.zeros((rows, 1)), mx.zeros((1, columns))

    def grams(self, role: str) -> Iterator[Sequence[Gram]]:
        """For every module, in the order of :meth:`updates`, the T second moments of its inputs in rows of ``role``.

        Raises:
            RsgwmError: adapters without directions of ``role`` or of a module, and how to get them.
        """
        if self.recollected is not None:
            return self.recollected(self)
        readers = [source.grams(role) for source in self.sources]
        problems = [
            f"{source.label} has none of {missing[0]}; collect them: rsgwm directions collect {source.label} --corpus "
            "ROWS --replace"
            for source, reader in zip(self.sources, readers, strict=True)
            if (missing := sorted(source.shapes.keys() - set(reader)))
        ]
        raise_problems("the merge needs directions of every module", problems)
        return (ModuleGrams(readers, module, self.shape(module)[0]) for module in self.modules)

    def require_signal(self, signal: str) -> None:
        """Raise unless every adapter has the importance of ``signal``."""
        lacking = [source for source in self.sources if signal not in source.signals]
        for source in lacking:
            if source.folder is not None:
                check_hashes(source.folder, source.manifest)  # a file that is lost is not to be collected but had back
        raise_problems(
            f"the merge needs importance for {signal!r}",
            [
                f"{source.label} has {', '.join(sorted(source.signals)) or 'none'}; {importance_remedy(source)}"
                for source in lacking
            ],
        )


def _check_finite(
    sources: Sequence[PoolAdapter], what: str, arrays_of: Callable[[PoolAdapter], dict[str, mx.array]]
) -> None:
    for source in sources:
        names = not_finite(arrays_of(source), drop=True)
        raise_problems(source.label, [f"{what}{name} has values that are not finite" for name in names], AdapterError)


def _wait(hashed: Sequence[Future[None]]) -> None:
    for job in hashed:
        job.result()


def _digest(arrays: dict[str, mx.array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.array(arrays.pop(name).astype(mx.float32)).tobytes())
    return digest.hexdigest()
