"""The adapter folder: a LoRA spec with named arrays that mlx-lm loads unchanged, and what merging needs beside it.

Layout and rules are in docs/formats.md. An :class:`Adapter` never knows a model; ``slots`` checks the fit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import AdapterError, raise_problems
from mlx_rsgwm.core.folders import exclusive
from mlx_rsgwm.core.nearest import nearest_path
from mlx_rsgwm.core.safetensors_io import PICKLE_SUFFIXES, read_safetensors, require_space_for, write_safetensors
from mlx_rsgwm.core.versions import format_problem
from mlx_rsgwm.models.adapter_shapes import FULL_LEAVES, array_problems, factor_problems
from mlx_rsgwm.models.base_folder import base_difference
from mlx_rsgwm.models.file_readers import PEFT_WEIGHTS_FILE
from mlx_rsgwm.models.finite import all_zero_magnitudes, not_finite
from mlx_rsgwm.models.spec import LoraSpec

FORMAT = "mlx-rsgwm/adapter"
FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapters.safetensors"
IMPORTANCE_FILE = "importance.safetensors"
DIRECTIONS_FILE = "directions.safetensors"
PROMPT_STATES_FILE = "prompt_states.safetensors"
INIT_FILE = "init.safetensors"
KEPT_FILE = "kept.safetensors"
BESIDE_FILES = (CONFIG_FILE, IMPORTANCE_FILE, DIRECTIONS_FILE, PROMPT_STATES_FILE, INIT_FILE, KEPT_FILE)
MANIFEST_FILE = "manifest.json"
UNFINISHED_FILE = ".unfinished"
SIGNALS = ("all", "draft", "verify")


@dataclass
class Adapter:
    """One LoRA adapter in memory.

    ``weights``: ``{module}.lora_a`` (in, rank), ``{module}.lora_b`` (rank, out), for DoRA also ``{module}.m`` (out,).
    ``importance``: float32 arrays of the weights' shapes under ``all/``, ``draft/``, ``verify/`` + weight name, or
    empty. ``directions``: second moments of the modules' inputs (:mod:`~mlx_rsgwm.models.directions`), or empty.
    ``prompt_states``: where its task's prompts lie (:mod:`~mlx_rsgwm.models.prompt_statistics`), or empty.
    ``init``: lora_a at initialisation under the weights' names, or empty. ``manifest``: provenance.
    Layers of experts have three axes: ``lora_a`` (experts, rank, in), ``lora_b`` (experts, out, rank).

    ``full``: ``{module}.weight`` or ``.bias`` of the base that this adapter replaces, trained in another framework.
    They are saved among the weights, so that mlx-lm, which cannot apply them, refuses the folder; ``rsgwm fuse``
    applies them. ``kept``: arrays of another format that a conversion back needs and nothing else reads.

    ``path``: the folder that it was read from or saved to. ``origin``: instead, the file or folder of another format.
    ``label``: what to call it, where neither says (a Hub id). ``named_base``: what another tool's configuration calls
    its base. ``base_assumed``: the base in its manifest is the one that it was read for; no fingerprint was recorded.
    """

    spec: LoraSpec
    weights: dict[str, mx.array]
    importance: dict[str, mx.array] = field(default_factory=dict)
    importance_metadata: dict[str, str] = field(default_factory=dict)
    init: dict[str, mx.array] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    full: dict[str, mx.array] = field(default_factory=dict)
    kept: dict[str, mx.array] = field(default_factory=dict)
    origin: Path | None = None
    label: str = ""
    named_base: str = ""
    base_assumed: bool = False
    directions: dict[str, mx.array] = field(default_factory=dict)
    directions_metadata: dict[str, str] = field(default_factory=dict)
    prompt_states: dict[str, mx.array] = field(default_factory=dict)
    prompt_states_metadata: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """What messages call it: its source as it was given, or its folder."""
        return self.label or str(self.path or self.origin or "adapter")

    @property
    def name(self) -> str:
        """A short name for manifests; empty for an adapter that was never in a file."""
        place = self.path or self.origin
        return self.label or (place.name if place else "")

    @property
    def own_folder(self) -> Path | None:
        """The user's folder of this adapter, where more may be put beside it; None for one that is only in memory."""
        return None if self.label else self.path

    @property
    def files_in(self) -> Path | None:
        """The folder that it was read from, whatever its format; None where there is none."""
        return self.path or (self.origin if self.origin is not None and self.origin.is_dir() else None)

    @property
    def base_name(self) -> str | None:
        """Name of the base it was trained on: as its manifest has it, else as another tool's configuration."""
        name = (self.manifest.get("base") or {}).get("name")
        return name if isinstance(name, str) and name else self.named_base or None

    def files_hash(self) -> str:
        """Hex SHA-256 of the hashes in its manifest; where there are none, :meth:`content_hash`."""
        hashes = self.manifest.get("files")
        return files.sha256_json(hashes) if hashes and self.path is not None else self.content_hash()

    def weights_hash(self) -> str:
        """Hex SHA-256 that tells this adapter's weights from others': of their file, else :meth:`content_hash`."""
        return self.content_hash() if self.path is None else files.sha256_file(self.path / WEIGHTS_FILE)

    def content_hash(self) -> str:
        """Hex SHA-256 of spec, weights and replaced parameters, whatever file they come from; reads every value."""
        digest = hashlib.sha256(files.sha256_json(self.spec.to_config()).encode())
        for name, value in sorted((self.weights | self.full).items()):
            digest.update(f"{name} {value.dtype} {value.shape}".encode())
            digest.update(memoryview(mx.contiguous(value).view(mx.uint8)))  # type: ignore[arg-type]
        return digest.hexdigest()

    @property
    def base_fingerprint(self) -> str | None:
        """Fingerprint of the base it was trained on, or None for an adapter that someone else wrote."""
        return (self.manifest.get("base") or {}).get("fingerprint")

    def base_problem(self, name: str, fingerprint: str, weights_only: bool = False) -> str:
        """Why the base called ``name`` is not the recorded one; empty where it is, or where none is recorded.

        The chat template counts where the adapter was trained with it, and not for what only reads weights
        (``weights_only``: fusing, converting, comparing logits).
        """
        recorded = self.base_fingerprint
        template = self.manifest.get("template")
        # Of other kinds nobody knows what they were trained with.
        written_here = self.manifest.get("kind") in ("trained", "checkpoint", "merged", "averaged", "patched")
        chat = not weights_only and (template.get("chat") is not False if isinstance(template, dict) else written_here)
        difference = "" if recorded is None else base_difference(recorded, fingerprint, chat)
        if not difference or recorded is None:
            return ""
        other = self.base_name or "another base"
        if difference != "weights":
            return f"{self.where} was made for {other} with another {difference} than {name} has now"
        return f"{self.where} was made for {other} (fingerprint {recorded[:12]}), not for {name} ({fingerprint[:12]})"

    @property
    def template_hash(self) -> str | None:
        """The hash of the prompt template it was trained with; None where it records none."""
        return (self.manifest.get("template") or {}).get("hash")

    def modules(self) -> list[str]:
        """Names of the adapted modules, in the weights' order."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.weights))

    def factors(self) -> Iterator[tuple[str, mx.array, mx.array]]:
        """``(module, lora_a (in, r), lora_b (r, out))`` for every adapted module."""
        for module in self.modules():
            yield module, self.weights[f"{module}.lora_a"], self.weights[f"{module}.lora_b"]

    def require_factors_only(self, purpose: str) -> None:
        """Raise for an adapter that replaces whole parameters of the base, which only ``rsgwm fuse`` can apply."""
        if self.full:
            names = ", ".join(list(self.full)[:3]) + (" …" if len(self.full) > 3 else "")
            raise AdapterError(
                f"{self.where} replaces whole parameters of the base ({names}) and cannot {purpose}; "
                "make a model of it first (rsgwm fuse)"
            )

    def importance_of(self, signal: str) -> dict[str, mx.array]:
        """The importance arrays recorded for ``signal`` (all, draft or verify), under the weights' names."""
        prefix = signal + "/"
        return {name[len(prefix) :]: value for name, value in self.importance.items() if name.startswith(prefix)}

    def problems(self) -> list[str]:
        """Everything wrong inside the adapter itself: names, shapes, ranks, values that are not finite."""
        problems = self.shape_problems()
        groups = (("", self.weights), ("", self.full), ("importance ", self.importance), ("init ", self.init))
        for label, group in groups:
            problems += [f"{label}{name} has values that are not finite" for name in not_finite(group)]
        return problems + all_zero_magnitudes(self.weights)

    def changes_nothing(self) -> bool:
        """Whether every lora_b is zero, as before any training; of DoRA's magnitudes only the base could tell."""
        leaves = [value for name, value in self.weights.items() if name.endswith(".lora_b")]
        return bool(leaves) and not self.full and not any(mx.any(value != 0).item() for value in leaves)

    def shape_problems(self) -> list[str]:
        """What is wrong with names, shapes and ranks; no value is read."""
        return [*factor_problems(self), *array_problems(self)]

    @classmethod
    def load(cls, path: str | Path, lazy: bool = False, hashes: bool = True, scale: float | None = None) -> Adapter:
        """Read and validate an adapter folder, ours or mlx-lm's; with ``lazy`` values are read and checked when used.

        Without ``hashes`` the caller compares the files with the manifest, by :func:`check_hashes`. ``scale`` is for
        an old mlx-lm configuration that allows two, see :meth:`LoraSpec.from_config`.

        Raises:
            AdapterError: naming every problem found: a missing folder or file, pickle weights, a damaged
                safetensors file, a hash that differs from the manifest, wrong names, shapes or values.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise AdapterError(_explain_missing_folder(folder))
        if not (folder / WEIGHTS_FILE).is_file():
            raise AdapterError(_explain_missing_weights(folder))
        if (folder / UNFINISHED_FILE).is_file() and not is_complete(folder):
            raise AdapterError(f"{folder} was not written to its end: its writer was stopped, or still runs")
        manifest = read_manifest(folder / MANIFEST_FILE) if files.is_present(folder / MANIFEST_FILE) else {}
        before = _stamps(folder)
        if hashes:
            check_hashes(folder, manifest)
        config = files.read_json_object(folder / CONFIG_FILE)
        spec = LoraSpec.from_config(config, str(folder / CONFIG_FILE), scale)
        arrays, _ = read_safetensors(folder / WEIGHTS_FILE, evaluate=not lazy)
        full = {name: value for name, value in arrays.items() if spec.is_full or name.rpartition(".")[2] in FULL_LEAVES}
        weights = {name: value for name, value in arrays.items() if name not in full}
        depth = (manifest.get("base") or {}).get("num_layers")
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in weights))
        spec = spec.covering(modules, depth if isinstance(depth, int) else None)
        importance, metadata = _read_optional(folder / IMPORTANCE_FILE, lazy)
        init, _ = _read_optional(folder / INIT_FILE, lazy)
        kept_arrays, _ = _read_optional(folder / KEPT_FILE, lazy=True)
        adapter = cls(spec, weights, importance, metadata, init, manifest, folder, full, kept_arrays)
        listed = manifest.get("files") or {}
        if DIRECTIONS_FILE in listed:  # large where they are whole: read when they are used
            adapter.directions, adapter.directions_metadata = _read_optional(folder / DIRECTIONS_FILE, lazy=True)
        if PROMPT_STATES_FILE in listed:
            path_of_states = folder / PROMPT_STATES_FILE
            adapter.prompt_states, adapter.prompt_states_metadata = _read_optional(path_of_states, lazy=True)
        if "base" not in manifest and isinstance(model := config.get("model"), str):  # as mlx_lm.lora was given it
            adapter.named_base = model
        raise_problems(str(folder), adapter.shape_problems() if lazy else adapter.problems(), AdapterError)
        if _stamps(folder) != before:
            raise AdapterError(f"{folder} was changed while it was read; try again once it is finished")
        return adapter

    def save(self, path: str | Path) -> Path:
        """Write the folder: arrays and config by rename, manifest last, with the SHA-256 of every other file.

        Adapters that are not in memory whole are written by ``converters/stream.py``, unfinished ones by
        ``training/checkpoints.py``; :func:`seal` ends each.
        """
        raise_problems(self.where, [*self.problems(), *files.json_problems(self.manifest, "manifest")], AdapterError)
        folder = Path(path)
        require_space_for(folder, *self.array_groups())
        with exclusive(folder):
            files.write_text(folder / UNFINISHED_FILE, "This folder is being written, or its writer was stopped.\n")
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
            write_safetensors(folder / WEIGHTS_FILE, {**self.weights, **self.full})
            written = [WEIGHTS_FILE, *self.write_beside(folder)]
            self.manifest = seal(folder, self.manifest, written)
            (folder / UNFINISHED_FILE).unlink(missing_ok=True)
        self.path = folder
        return folder

    def array_groups(self) -> tuple[dict[str, mx.array], ...]:
        """All arrays that its folder holds, by file."""
        beside = (self.importance, self.directions, self.prompt_states, self.init, self.kept)
        return (self.weights, self.full, *beside)

    def write_beside(self, folder: Path) -> list[str]:
        """Write everything but weights and manifest into an existing folder; returns the names of the files.

        The weights must be there already, where there are any: directions say whose inputs they are of.
        """
        weights = folder / WEIGHTS_FILE
        of_weights = {"weights_sha256": files.sha256_file(weights)} if self.directions and weights.is_file() else {}
        files.write_json(folder / CONFIG_FILE, self.spec.to_config())
        written = [CONFIG_FILE]
        for name, arrays, metadata in (
            (IMPORTANCE_FILE, self.importance, self.importance_metadata),
            (DIRECTIONS_FILE, self.directions, {**self.directions_metadata, **of_weights}),
            (PROMPT_STATES_FILE, self.prompt_states, self.prompt_states_metadata),
            (INIT_FILE, self.init, {}),
            (KEPT_FILE, self.kept, {}),
        ):
            if arrays:
                write_safetensors(folder / name, arrays, metadata)
                written.append(name)
            else:
                (folder / name).unlink(missing_ok=True)
        return written


def seal(
    folder: Path, manifest: Mapping[str, Any], written: Iterable[str], hashes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write the manifest of an adapter folder, the last of its files, after which it is whole; returns it.

    It is ``manifest`` with the format and the SHA-256 of every file: ``hashes`` where they are known already, those of
    the files ``written`` taken now.
    """
    taken = {name: files.sha256_file(folder / name) for name in written}
    sealed = {
        **manifest,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "files": {**(hashes or {}), **taken},
    }
    files.write_json(folder / MANIFEST_FILE, sealed)
    return sealed


def is_complete(path: str | Path) -> bool:
    """True when the folder holds a manifest, which is written last, and so everything else too."""
    return (Path(path) / MANIFEST_FILE).is_file()


def _stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes when another process replaces or rewrites a file of the folder."""
    stamps = {}
    for name in (MANIFEST_FILE, WEIGHTS_FILE, *BESIDE_FILES):
        with suppress(OSError):
            stat = (folder / name).stat()
            stamps[name] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return stamps


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest whose parts that everything else relies on are of the right types."""
    manifest = files.read_json_object(path)
    if manifest and (problem := format_problem(manifest, FORMAT, FORMAT_VERSION)):
        raise AdapterError(f"{path}: {problem}")
    problems = []
    for name, inner in (("files", None), ("base", "fingerprint"), ("template", "hash")):
        part = manifest.get(name)
        if part is None:
            continue
        if not isinstance(part, dict):
            problems.append(f"{name} is not an object")
        elif inner and not isinstance(part.get(inner, ""), (str, type(None))):
            problems.append(f"{name}.{inner} is not text")
    raise_problems(str(path), problems, AdapterError)
    return manifest


def _read_optional(path: Path, lazy: bool) -> tuple[dict[str, mx.array], dict[str, str]]:
    return read_safetensors(path, evaluate=not lazy) if files.is_present(path) else ({}, {})


def check_hashes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise an :class:`AdapterError` that names every file of ``folder`` that is not the one its manifest describes."""
    listed = manifest.get("files") or {}
    # Importance and directions are put beside later; killed in between, one may stand there unlisted for a while.
    read = (CONFIG_FILE, WEIGHTS_FILE, INIT_FILE, KEPT_FILE) if listed else ()
    problems = [f"{name} is not in the manifest" for name in read if name not in listed and (folder / name).exists()]
    for name, expected in listed.items():
        if Path(name).name != name:
            raise AdapterError(f"{folder / MANIFEST_FILE}: file name {name!r} points outside the folder")
        if not (folder / name).is_file():
            problems.append(f"{name} is in the manifest but not in the folder")
        elif files.sha256_file(folder / name) != expected:
            problems.append(f"{name} was changed or damaged after it was written (its SHA-256 differs)")
    raise_problems(str(folder), problems, AdapterError)


def _explain_missing_weights(folder: Path) -> str:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        return f"{folder}: {pickles[0]} is a pickle file, which can run code when loaded; only .safetensors is read"
    if (folder / PEFT_WEIGHTS_FILE).is_file():
        return f"{folder} is a PEFT adapter; convert it first: rsgwm convert from-peft {folder} OUT --base BASE"
    if (folder / "adapters.npz").is_file():
        return (
            f"{folder} holds adapters.npz, as mlx-lm wrote it until 0.8; save its arrays as {WEIGHTS_FILE} "
            "(mx.save_safetensors(..., mx.load(...)))"
        )
    if (folder / "config.json").is_file():
        return f"{folder} is a base model, not an adapter; name an adapter (--base is for a model)"
    return f"{folder} holds no {WEIGHTS_FILE}; it is not an mlx-lm adapter folder"


def _explain_missing_folder(folder: Path) -> str:
    if folder.is_file():
        return f"{folder} is a file, not an adapter; name the adapter's folder, or a .gguf file"
    if kind := files.other_kind(folder):
        return f"{folder} is {kind}, not an adapter; name the adapter's folder, or a .gguf file"
    several = "; write several with spaces between them" if "," in folder.name else ""
    made = several or nearest_path(folder) or "; `rsgwm demo` makes some, `rsgwm train` your own"
    return f"adapter folder {folder} does not exist{made}"
