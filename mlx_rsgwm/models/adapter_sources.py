"""An adapter from wherever it is: our folder or mlx-lm's, PEFT's folder, a GGUF file, a repository on the Hub.

Whatever the source, the result is an :class:`Adapter` in memory; nothing is written beside the user's files. Formats
other than mlx-lm's are read through a table that converters fill (``file_readers``).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.models.adapter import CONFIG_FILE, UNFINISHED_FILE, WEIGHTS_FILE, Adapter
from mlx_rsgwm.models.base import HUB_ID
from mlx_rsgwm.models.file_readers import ADAPTER_READERS, AdapterReader
from mlx_rsgwm.models.fit_check import names_other_base, other_base_note
from mlx_rsgwm.models.hub_files import fetch_adapter

HUB_PREFIX = re.compile(r"hf:/{1,2}")  # a Path has one slash
SHOWN = 4
OF_A_RUN = ("checkpoints/step-*", "snapshots/step-*", UNFINISHED_FILE)  # what training keeps before there is an adapter

AdapterSource = str | Path | Adapter


@dataclass(frozen=True)
class _Place:
    """A source on this machine: its file or folder, and what to call it where the path says nothing (a Hub id)."""

    path: Path
    label: str = ""


def load_adapter(
    source: AdapterSource,
    base: str | Path | None = None,
    *,
    lazy: bool = False,
    hashes: bool = True,
    progress: Progress = SILENT,
) -> Adapter:
    """Read one adapter from any source, checked, in this project's form.

    Args:
        source: a folder of this project's, mlx-lm's or PEFT's layout, a GGUF file of a LoRA adapter, a Hub id
            (``owner/name``) or ``hf://owner/name@revision``; a local path is looked for first. An adapter that is
            loaded already is returned as it is.
        base: the base to read another format for (Hub id, folder, ``.gguf`` file, alias); its config and headers are
            read, never its weights. None: the one that the source names.
        lazy: leave a folder of our, mlx-lm's or PEFT's layout on disk: values are read, and checked, when they are
            used. GGUF files are converted, and checked, now.
        hashes: compare the files with the manifest's SHA-256.
        progress: is told once what the source does not say: which base it is for, by fingerprint.

    Returns:
        The adapter: ``weights`` hold ``{module}.lora_a`` (in, rank) and ``{module}.lora_b`` (rank, out) in the source's
        dtype; layers of experts have three axes.

    Raises:
        AdapterError: nothing there, a damaged file, options without a counterpart, modules the base has not.
        RsgwmError: a folder of several adapters, no such repository, a base that cannot be had or is not named.

    Example::

        adapter = rs.load_adapter("hf://owner/name@v1.0", base="smollm2-135m")
    """
    if isinstance(source, Adapter):
        return source
    return _read(_locate(source, progress), base, lazy, hashes, progress)


def _read(place: _Place, base: str | Path | None, lazy: bool, hashes: bool, progress: Progress) -> Adapter:
    name = None if base is None else str(base)
    reader = _reader_of(place.path)
    if reader is None:
        if inside := _inside(place.path):
            shown = ", ".join(folder.name for folder in inside[:SHOWN]) + (", …" if len(inside) > SHOWN else "")
            raise RsgwmError(f"{place.label or place.path} is a folder of adapters ({shown}); name one of them")
        adapter = Adapter.load(place.path, lazy=lazy, hashes=hashes)
    else:
        adapter = reader.read(place.path, name, progress, lazy)
    adapter.label = place.label
    _tell_base(adapter, name, progress)
    if not lazy and adapter.changes_nothing():
        magnitudes = "; its magnitudes may" if adapter.spec.fine_tune_type == "dora" else ""
        progress.warning(f"warning: {adapter.where} changes nothing, every lora_b is zero{magnitudes}")
    return adapter


def load_adapters(
    sources: Sequence[AdapterSource],
    base: str | Path | None = None,
    *,
    lazy: bool = False,
    hashes: bool = True,
    progress: Progress = SILENT,
) -> list[Adapter]:
    """:func:`load_adapter` of every source, in order; a folder whose subfolders are adapters stands for them, sorted.

    A pattern, ``pool/*``, stands for what it matches, as in a shell.

    Raises:
        RsgwmError: a pattern that matches nothing; a folder of adapters of which one is not trained to its end; and as
            :func:`load_adapter`.
    """
    adapters: list[Adapter] = []
    for source in (place for given in sources for place in _matches(given)):
        if isinstance(source, Adapter):
            adapters.append(source)
            continue
        place = _locate(source, progress)
        inside = [] if _reader_of(place.path) else _inside(place.path)
        if inside:
            left = _left_out(place.path, inside)
            _require_finished(place.path, left)
            passed = f"; {', '.join(left)} passed over, no adapter" if left else ""
            progress.message(f"{source} is a pool: {', '.join(folder.name for folder in inside)}{passed}")
        places = [_Place(path, f"{place.label}/{path.name}" if place.label else "") for path in inside] or [place]
        adapters += [_read(location, base, lazy, hashes, progress) for location in places]
    return adapters


def _matches(source: AdapterSource) -> list[AdapterSource]:
    """What a pattern of paths matches, sorted; any other source by itself."""
    text = "" if isinstance(source, Adapter) else str(source)
    if not glob.has_magic(text) or os.path.lexists(text):
        return [source]
    matched = sorted(glob.glob(os.path.expanduser(text)))
    if not matched:
        raise RsgwmError(f"{text} matches nothing; name adapters, or a folder of them")
    return [Path(match) for match in matched]


def _locate(source: str | Path, progress: Progress) -> _Place:
    """A source's file or folder, fetched from the Hub first where it is a name there.

    A name whose first part is a folder here is a path, be it a mistyped one.
    """
    text = str(source)
    if HUB_PREFIX.match(text):
        repo, at, revision = HUB_PREFIX.sub("", text).partition("@")
        if not HUB_ID.fullmatch(repo) or bool(at) != bool(revision):
            raise RsgwmError(f"{text!r} names nothing on the Hub; write hf://owner/name or hf://owner/name@revision")
        return _Place(fetch_adapter(repo, revision or None, progress), repo + at + revision)
    path = files.expanded(text)
    if not path.exists() and HUB_ID.fullmatch(text) and not path.parent.is_dir():
        return _Place(fetch_adapter(text, None, progress), text)
    return _Place(path)


def _reader_of(path: Path) -> AdapterReader | None:
    """The reader of another format than mlx-lm's; None for that, and for what is none."""
    reader = next((reader for reader in ADAPTER_READERS.values() if reader.recognises(path)), None)
    if reader is not None and (path / WEIGHTS_FILE).is_file():  # both are there, with one configuration
        return reader if "peft_type" in files.read_json_object(path / CONFIG_FILE) else None
    return reader


def _inside(path: Path) -> list[Path]:
    """The adapters that a folder which is none holds, by name."""
    if not path.is_dir() or (path / WEIGHTS_FILE).is_file():
        return []
    below = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    return [entry for entry in below if (entry / WEIGHTS_FILE).is_file() or _reader_of(entry) is not None]


def _left_out(path: Path, inside: Sequence[Path]) -> list[str]:
    """The other folders of a pool."""
    return sorted(entry.name for entry in set(path.iterdir()) - set(inside) if entry.is_dir() and entry.name[0] != ".")


def _require_finished(path: Path, left: Sequence[str]) -> None:
    """Refuse a pool of which an adapter is still being trained, or was stopped: what is left is not that pool."""
    unfinished = [name for name in left if any(any((path / name).glob(sign)) for sign in OF_A_RUN)]
    if unfinished:
        raise RsgwmError(
            f"{path} is an unfinished pool: {', '.join(unfinished)}; train on (the same command with --resume), "
            "or name the adapters to take"
        )


def _tell_base(adapter: Adapter, given: str | None, progress: Progress) -> None:
    """Say what is not known of an adapter's base, or that its configuration names another than the ``given`` one."""
    if given is not None and names_other_base(adapter, given):
        progress.warning(f"warning: {other_base_note(adapter, given)}")
    elif adapter.base_assumed or (adapter.base_fingerprint is None and (given or adapter.named_base)):
        named = given or adapter.base_name
        progress.message(f"{adapter.where} records no fingerprint of its base; it is taken to be of {named}")
