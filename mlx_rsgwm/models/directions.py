"""``directions.safetensors``: second moments of the inputs of an adapter's modules, for each role it was trained on.

Of each distinct input the file has, in float32, under ``{role}/{module}``::

    .sketch    (in, k)   (XᵀX / n) Ω, with Ω = test_matrix(in, k, seed)
    .diagonal  (in,)     the diagonal of XᵀX / n
    .gram      (in, in)  instead of the two: XᵀX / n itself, where k is 0 or not below in

An embedding's inputs are one-hot, so that its diagonal alone says everything. Modules that are handed the same input
(the query, key and value projections) share one copy: ``shared`` in the metadata names its owner. ``tokens/{role}``
there is n, ``rows/{role}`` counts the rows they come from. :mod:`mlx_rsgwm.training.directions` makes these files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import AdapterError, RsgwmError, raise_problems
from mlx_rsgwm.core.safetensors_io import read_safetensors
from mlx_rsgwm.linalg.gram import Gram, SketchedGram, WholeGram, float64, from_sketch, test_matrix
from mlx_rsgwm.models.adapter import DIRECTIONS_FILE, MANIFEST_FILE, WEIGHTS_FILE

FORMER_FILE = "grams.safetensors"  # whole matrices of all rows together, until 0.2
ALL = "all"
FORMS = ({"gram"}, {"sketch", "diagonal"}, {"diagonal"})  # what a module's arrays may be
LARGEST_RECENT = 1 << 28  # bytes of a matrix that stays until another is asked for; larger ones are read again


@dataclass(frozen=True)
class DirectionsHeader:
    """What a file says of itself: k, the seed of Ω, the tokens (n) of every role, and whose input a module shares."""

    rank: int
    seed: int
    tokens: Mapping[str, int]
    shared: Mapping[str, str]

    @classmethod
    def of(cls, metadata: Mapping[str, str], where: str) -> DirectionsHeader:
        """Raises AdapterError when the metadata is not what this project writes."""
        try:
            tokens = {name.partition("/")[2]: int(n) for name, n in metadata.items() if name.startswith("tokens/")}
            shared = {str(name): str(owner) for name, owner in json.loads(metadata.get("shared", "{}")).items()}
            header = cls(int(metadata["k"]), int(metadata["seed"]), tokens, shared)
            if min(header.rank, header.seed, *tokens.values()) < 0:
                raise ValueError
            return header
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            raise AdapterError(f"{where}: what it says of its directions is damaged; collect them anew") from None


class RoleGrams(Mapping[str, Gram]):
    """Second moments by module, averaged over roles by their ``shares``; each is read when asked for, and not kept."""

    def __init__(
        self, load: Callable[[], dict[str, mx.array]], header: DirectionsHeader, shares: Mapping[str, float], where: str
    ) -> None:
        self._load, self._header, self._shares, self._where = load, header, shares, where
        self._arrays = load()
        self._forms = _forms(self._arrays, shares)
        raise_problems(where, _misshapen(self._arrays, self._forms, shares, header.rank), AdapterError)
        self._owners = {name: name for name in self._forms}
        self._owners |= {name: owner for name, owner in header.shared.items() if owner in self._forms}
        self._recent: dict[str, Gram] = {}

    def __getitem__(self, module: str) -> Gram:
        owner = self._owners[module]
        if owner in self._recent:
            return self._recent[owner]
        self._recent = {}  # before the next is read: one stays for every adapter of a pool
        gram = self._read(owner)
        if gram.nbytes <= LARGEST_RECENT:
            self._recent = {owner: gram}
        return gram

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    def _read(self, owner: str) -> Gram:
        means = {leaf: self._mean(f"{owner}.{leaf}") for leaf in self._forms[owner]}
        if not all(np.isfinite(np.array(mean, copy=False)).all() for mean in means.values()):
            raise AdapterError(f"{self._where}: the directions of {owner} are not finite; collect them anew")
        if "diagonal" in means and mx.any(means["diagonal"] < 0).item():
            raise AdapterError(f"{self._where}: the directions of {owner} have negative squares; collect them anew")
        if "gram" in means:
            return WholeGram(float64(means["gram"]))
        if "sketch" in means:
            width, rank = means["sketch"].shape
            return from_sketch(means["sketch"], means["diagonal"], test_matrix(width, rank, self._header.seed))
        rest = float64(means["diagonal"])
        return SketchedGram(np.zeros((len(rest), 1)), rest, 0.0)

    def _mean(self, name: str) -> mx.array:
        """The average over roles of their arrays; they are dropped, and the file is opened again for a second time."""
        names = {role: f"{role}/{name}" for role in self._shares}
        if not all(stored in self._arrays for stored in names.values()):
            self._arrays = self._load()
        if len(names) == 1:
            return self._arrays.pop(*names.values())
        parts = [self._arrays.pop(stored) * self._shares[role] for role, stored in names.items()]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


def load_directions(folder: Path, role: str) -> RoleGrams:
    """The second moments of ``role`` in an adapter folder, by module; of ``all``, those of all tokens there.

    Raises:
        AdapterError: the file is damaged, or it is of other weights than the folder's.
        RsgwmError: there are none, or none of ``role``; too few tokens for k.
    """
    path = folder / DIRECTIONS_FILE
    remedy = f"rsgwm directions collect {folder} --corpus ROWS"
    if not files.is_present(path):
        former = f"{FORMER_FILE} of an earlier version, which knows no roles, and " * files.is_present(
            folder / FORMER_FILE
        )
        raise RsgwmError(f"{folder} has {former}no directions; collect them: {remedy}")
    manifest = files.read_json_object(folder / MANIFEST_FILE) if files.is_present(folder / MANIFEST_FILE) else {}
    hashes = manifest.get("files") or {}
    _, metadata = read_safetensors(path, evaluate=False)
    if DIRECTIONS_FILE not in hashes or metadata.get("weights_sha256") != hashes.get(WEIGHTS_FILE):
        raise AdapterError(f"{path} belongs to earlier weights of this folder; collect it anew: {remedy}")
    return role_grams(lambda: read_safetensors(path, evaluate=False)[0], metadata, role, str(folder))


def role_grams(
    load: Callable[[], dict[str, mx.array]], metadata: Mapping[str, str], role: str, where: str
) -> RoleGrams:
    """As :func:`load_directions`, of arrays that ``load`` gives and their ``metadata``."""
    header = DirectionsHeader.of(metadata, where)
    tokens = {name: n for name, n in header.tokens.items() if n > 0 and role in (name, ALL)}
    remedy = f"rsgwm directions collect {where} --corpus ROWS --replace"
    if not tokens:
        roles = ", ".join(name for name, n in header.tokens.items() if n) or "none"
        raise RsgwmError(f"{where} has no directions of the role {role} (there are {roles}); collect them: {remedy}")
    count = sum(tokens.values())
    if count < header.rank and any(name.endswith(".sketch") for name in load()):  # whole matrices have no k
        raise RsgwmError(
            f"{where}: its directions of the role {role} come from {count} tokens, too few for k = {header.rank}; "
            f"collect them on more rows ({remedy}), or set --directions lower"
        )
    return RoleGrams(load, header, {name: n / count for name, n in tokens.items()}, where)


def _forms(arrays: Iterable[str], roles: Iterable[str]) -> dict[str, list[str]]:
    """Which arrays each module has in any of the roles."""
    forms: dict[str, set[str]] = {}
    for name in sorted(arrays):
        role, _, rest = name.partition("/")
        module, _, leaf = rest.rpartition(".")
        if role in roles:
            forms.setdefault(module, set()).add(leaf)
    return {module: sorted(leaves) for module, leaves in forms.items()}


def _misshapen(
    arrays: Mapping[str, mx.array], forms: Mapping[str, list[str]], roles: Iterable[str], rank: int
) -> list[str]:
    """What of the arrays cannot be a second moment; no value is read."""
    problems = [] if forms else ["it has no arrays of its roles"]
    for module, leaves in forms.items():
        shapes = {
            f"{role}/{module}.{leaf}": (leaf, arrays.get(f"{role}/{module}.{leaf}"))
            for role in roles
            for leaf in leaves
        }
        width = next((array.shape[0] for _, array in shapes.values() if array is not None and array.ndim), 0)
        expected = {"gram": (width, width), "diagonal": (width,), "sketch": (width, rank)}
        wrong = [name for name, (leaf, array) in shapes.items() if array is None or array.shape != expected.get(leaf)]
        if wrong or set(leaves) not in FORMS:
            problems.append(f"the directions of {module} have other arrays or shapes than they need")
        elif any(array is not None and array.dtype != mx.float32 for _, array in shapes.values()):
            problems.append(f"the directions of {module} are not float32")
    return problems
