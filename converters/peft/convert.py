"""LoRA adapters between this project's folders and PEFT's, bit for bit in both directions.

The two formats hold the same numbers: ``lora_A.weight`` (r, in) is ``lora_a`` (in, r) transposed, ``lora_B.weight``
(out, r) is ``lora_b`` (r, out) transposed, and ``lora_alpha / r`` (``/ sqrt(r)`` for rsLoRA) is ``scale``; DoRA's
``lora_magnitude_vector`` is ``m``. mlx-lm has one rank and one scale for all modules: ``peft_uniform`` says how PEFT's
many become one. What PEFT has no place for (importance, initialisation, manifest, a scale that no alpha divides back
to) travels in the folder ``mlx_rsgwm/`` beside PEFT's two files; it counts only while those are the ones it was written
with.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_rsgwm.converters.base_layers import BaseLayers, local_base_layers, read_base_layers, shared_base_layers
from mlx_rsgwm.converters.peft.folder import open_peft
from mlx_rsgwm.converters.peft.layout import PeftReading
from mlx_rsgwm.converters.peft.read import early_problems, read_peft
from mlx_rsgwm.converters.peft.sidecar import PEFT_CONFIG_FILE, write_sidecar
from mlx_rsgwm.converters.peft.tokenizer_notes import tokenizer_notes
from mlx_rsgwm.converters.peft.write import peft_arrays, peft_form, unconvertible
from mlx_rsgwm.converters.resized_vocabulary import rows_of, tokenizer_files
from mlx_rsgwm.converters.stream import save_adapter, write_arrays
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import AdapterError, RsgwmError, raise_problems
from mlx_rsgwm.core.folders import new_folder, require_empty
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.safetensors_io import read_safetensors, require_space_for
from mlx_rsgwm.models.adapter import WEIGHTS_FILE, Adapter, LoraSpec, check_hashes
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapter
from mlx_rsgwm.models.base import ALIASES, base_for, local_base, resolve_base
from mlx_rsgwm.models.base_folder import fingerprint_of
from mlx_rsgwm.models.file_readers import PEFT_WEIGHTS_FILE, UnreadArrays
from mlx_rsgwm.models.fit_check import check_made_for, dora_changes_nothing


class Converted(NamedTuple):
    """What a conversion wrote, and where."""

    out: Path
    base: str
    spec: LoraSpec
    modules: int
    notes: tuple[str, ...] = ()


def to_peft(adapter: Adapter, base_name: str, out: Path) -> Path:
    """Write ``adapter`` as a PEFT folder that ``PeftModel.from_pretrained`` loads.

    Arrays keep their dtype and bits, and are written one at a time. The folder gets its name once it is whole.
    An adapter that came from PEFT and is unchanged since gets its own form back.

    Args:
        adapter: LoRA or DoRA on linear layers, LoRA on embeddings and experts. It is left as it was.
        base_name: what ``base_model_name_or_path`` says (an alias as its Hub id, which PEFT can find).
        out: a folder that does not exist yet, or an empty one.

    Raises:
        AdapterError: naming every reason why this adapter has no PEFT form.
        RsgwmError: the folder is not empty or cannot be written; the base is not here to say whether an adapted
            embedding is tied, or what mlx-lm made of its arrays.
    """
    copied = replace(adapter, weights=dict(adapter.weights), full=dict(adapter.full))
    return _write(copied, lambda: dict(adapter.weights), base_name, out)


def convert_to_peft(source: AdapterSource, base_name: str | None, out: Path, progress: Progress = SILENT) -> Converted:
    """:func:`to_peft` for an adapter of any source and, in a folder of ours or mlx-lm's, of any size: one array in
    memory at a time.

    ``base_name`` may be None where the adapter records its base.
    """
    require_empty(out)
    adapter = load_adapter(source, base_name, lazy=True, hashes=False, progress=progress)
    name, folder = base_name or adapter.base_name, adapter.path
    if not name:
        raise RsgwmError(f"{adapter.where} does not say which base model it is for; give --base")
    if base_name is not None:
        _check_named_base(adapter, base_name)
    converted = Converted(out, name, adapter.spec, len(adapter.modules()))
    if folder is None:
        to_peft(adapter, name, out)
        return converted

    def weights() -> dict[str, mx.array]:
        return read_safetensors(folder / WEIGHTS_FILE, evaluate=False)[0]

    with ThreadPoolExecutor(1) as checker:  # on another core, while the arrays are written
        _write(adapter, weights, name, out, checker.submit(check_hashes, folder, adapter.manifest).result)
    return converted


def _check_named_base(adapter: Adapter, name: str) -> None:
    """Raise where the base that the PEFT folder is to name is on this machine, and is another than was trained on."""
    place = local_base(name)
    fingerprint = None
    with suppress(RsgwmError):  # not whole, so nobody can tell; it is named and not read
        fingerprint = fingerprint_of(place) if place is not None else None
    if fingerprint is not None:
        check_made_for(adapter, name, fingerprint, weights_only=True)


def _write(
    adapter: Adapter,
    probe: Callable[[], dict[str, mx.array]],
    base_name: str,
    out: Path,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write the PEFT folder; ``probe`` gives the adapter's weights once more, to look at before they are written.

    ``check`` is called once the weights are written, and what it raises undoes them.
    """
    raise_problems(adapter.where, [*adapter.shape_problems(), *unconvertible(adapter)], AdapterError)
    require_empty(out)
    form = peft_form(adapter, probe, lambda required: _base_layers(base_name, required))
    hub_name = ALIASES[base_name].hub_id if base_name in ALIASES else base_name
    config = {**form.config, "base_model_name_or_path": hub_name}
    groups = (adapter.weights, adapter.full, adapter.importance, adapter.init, adapter.kept)
    require_space_for(out, *groups)
    arrays = peft_arrays(adapter, form)
    metadata = (adapter.manifest.get("source") or {}).get("metadata") if form.layout is not None else None
    with new_folder(out) as work:
        digest = write_arrays(work / PEFT_WEIGHTS_FILE, arrays, metadata or {"format": "pt"})
        check()
        write_sidecar(adapter, config, work, digest, form.joined)
        if adapter.files_in is not None and rows_of(adapter.manifest):
            for file in tokenizer_files(adapter.files_in):
                shutil.copyfile(file, work / file.name)
        files.write_json(work / PEFT_CONFIG_FILE, config)
    return out


def _base_layers(name: str, required: bool) -> BaseLayers | None:
    return read_base_layers(name, resolve_base(name)) if required else local_base_layers(name)


def from_peft(folder: Path, base: Mapping[str, Any] | None = None) -> Adapter:
    """Read a PEFT folder as an :class:`Adapter` in memory (``Adapter.save`` writes it).

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors`` or its shards with their index.
        base: ``Base.describe()`` of the base model, recorded in the manifest; with its ``num_layers`` the adapted
            blocks are counted from the last, as mlx-lm does, and layer numbers are checked.

    Raises:
        AdapterError: one line with every reason: a missing, pickled or damaged file, a PEFT option without a
            counterpart, wrong names, shapes, dtypes or values, layers the base does not have.
    """
    return _evaluated(read_peft(open_peft(Path(folder)), None, base))


def from_peft_on(folder: Path, base_name: str | None, progress: Progress = SILENT, lazy: bool = False) -> Adapter:
    """:func:`from_peft` for a named base, with every module's name and shape checked against the base's.

    With ``lazy`` values are left on disk, and not checked.

    The base is resolved (fetched if need be) only once the adapter itself is known to be sound; it is not loaded.
    Without a name it is the one that the folder records. What PEFT would only warn of is told.
    """
    check_peft(folder)
    name, path = base_for(str(folder), base_name, open_peft(folder).base_name, progress)
    reading, base = PeftReading(), shared_base_layers(name, path)
    adapter = _read_on(folder, base, reading)
    if lazy:
        adapter.weights = UnreadArrays(adapter.weights, lambda: _read_on(folder, base).weights)
    else:
        adapter = _evaluated(adapter)
    for note in reading.notes:
        progress.message(f"{folder}: {note}")
    return adapter


def convert_from_peft(folder: Path, base: BaseLayers, out: Path, reading: PeftReading | None = None) -> Converted:
    """Write the PEFT adapter in ``folder``, of any size, to ``out`` as mlx-lm loads it, one array at a time.

    ``reading`` says how, and is told what to say afterwards.

    Raises:
        As :func:`from_peft_on`; ``out`` is not empty or cannot be written.
    """
    require_empty(out)
    reading = reading or PeftReading()
    adapter = _read_on(folder, base, reading)
    reading.notes += [*replaced_notes(adapter), *still_notes(adapter, base)]
    rows = rows_of(adapter.manifest)
    reading.notes += [] if rows else tokenizer_notes(folder, base)
    converted = Converted(out, base.name, adapter.spec, len(adapter.modules()), tuple(reading.notes))
    save_adapter(adapter, out, tokenizer_files(folder) if rows else ())
    return converted


def replaced_notes(adapter: Adapter) -> list[str]:
    """What to tell of an adapter that replaces parameters of its base, which mlx-lm has no place for."""
    if not adapter.full:
        return []
    names = ", ".join(list(adapter.full)[:3]) + (" …" if len(adapter.full) > 3 else "")
    return [
        f"it replaces parameters of the base ({names}), which only rsgwm fuse can apply; "
        "mlx_lm.generate and mlx_lm.fuse cannot use this folder"
    ]


def still_notes(adapter: Adapter, base: BaseLayers) -> list[str]:
    """What to tell of an adapter that no training leaves behind; reads lora_b up to the first that is not zero."""
    if not adapter.changes_nothing():
        return []
    magnitudes = ""
    if adapter.spec.fine_tune_type == "dora":
        same = dora_changes_nothing(adapter, _gains(adapter, base))
        magnitudes = ", and its magnitudes are the base's" if same else "; its magnitudes may"
    return [f"it changes nothing: every lora_b is zero{magnitudes}"]


def _gains(adapter: Adapter, base: BaseLayers) -> Iterator[mx.array]:
    """The magnitudes by the norms of the base's rows, one module at a time; of packed weights nobody can tell here."""
    arrays = base.read_arrays({f"{module}.weight" for module in adapter.modules()})
    for module in adapter.modules():
        weight, magnitude = arrays.pop(f"{module}.weight"), adapter.weights[f"{module}.m"].astype(mx.float32)
        plain = weight.ndim == 2 and mx.issubdtype(weight.dtype, mx.floating)
        norms = mx.linalg.norm(weight.astype(mx.float32), axis=1) if plain else mx.zeros(magnitude.shape)
        yield magnitude / norms


def check_peft(folder: Path) -> None:
    """Raise what is wrong with the PEFT adapter in ``folder`` whatever its base, so that none is fetched for it."""
    raise_problems(str(folder), early_problems(open_peft(folder)), AdapterError)


def _read_on(folder: Path, base: BaseLayers, reading: PeftReading | None = None) -> Adapter:
    try:
        return read_peft(open_peft(folder), base, base.description, reading)
    except AdapterError as error:
        reason = str(error).removeprefix(f"{folder}: ")
        raise AdapterError(f"{folder} cannot be converted for {base.name}: {reason}") from None


def _evaluated(adapter: Adapter) -> Adapter:
    """``adapter`` with its values read and checked, laid out as when saved: transposed views round otherwise."""
    for group in (adapter.weights, adapter.full):
        group.update({name: mx.contiguous(value) for name, value in group.items()})
    try:
        mx.eval(adapter.weights, adapter.full)
    except RuntimeError as error:
        raise AdapterError(f"{adapter.where} cannot be read: {error}") from error
    raise_problems(adapter.where, adapter.problems(), AdapterError)
    return adapter
