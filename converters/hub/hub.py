"""Adapters to the Hugging Face Hub and back: PEFT's layout, which ``PeftModel.from_pretrained`` loads, and a card.

What is published is first staged as a folder on disk, so that a dry run shows exactly what would go out. Names of
local folders never do: a path in a manifest or certificate is cut to its last part.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_rsgwm.converters.base_layers import read_base_layers
from mlx_rsgwm.converters.hub.model_card import model_card
from mlx_rsgwm.converters.parity.certificate import read_certificate
from mlx_rsgwm.converters.peft.bulk import is_mlx, is_peft
from mlx_rsgwm.converters.peft.convert import check_peft, convert_from_peft, to_peft
from mlx_rsgwm.converters.peft.folder import is_of_wrapped_model, open_peft
from mlx_rsgwm.converters.peft.layout import PeftReading
from mlx_rsgwm.converters.peft.sidecar import CERTIFICATE_FILE, PEFT_CONFIG_FILE, SIDECAR_FOLDER
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import make_folder, new_folder, require_empty
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.safetensors_io import write_safetensors
from mlx_rsgwm.models.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapter
from mlx_rsgwm.models.base import ALIASES, HUB_ID, resolve_base
from mlx_rsgwm.models.hub_files import fetch_adapter, readable

MLX_FOLDER = "mlx"
CARD_FILE = "README.md"


@dataclass(frozen=True)
class Staged:
    """A repository as it would be: its folder, the base's Hub id, and (path, bytes) of every file."""

    folder: Path
    base: str
    contents: tuple[tuple[str, int], ...]


def stage(
    source: AdapterSource,
    repo: str,
    out: Path,
    *,
    base: str | None = None,
    licence: str = "apache-2.0",
    with_mlx: bool = False,
    certificate: Path | None = None,
    report: Path | None = None,
) -> Staged:
    """Write everything that goes into ``repo`` to the new folder ``out``; ``source`` as for ``load_adapter``.

    Raises:
        AdapterError: the adapter is damaged or has no PEFT form.
        RsgwmError: no such repository name, a base that is not on the Hub, a certificate of another adapter.
    """
    if not HUB_ID.fullmatch(repo):
        raise RsgwmError(f"{repo!r} is not a repository's name; give owner/name")
    adapter = load_adapter(source, base)
    hub_base = _hub_base(base or adapter.base_name, adapter.where)
    proof = read_certificate(certificate, adapter) if certificate is not None else None
    metrics = files.read_json_object(report) if report is not None else None
    require_empty(out)
    adapter.manifest = without_paths(adapter.manifest)
    if adapter.manifest.get("base"):
        adapter.manifest["base"] = {**adapter.manifest["base"], "name": hub_base}
    with new_folder(out) as work:
        _fill(work, adapter, repo, hub_base, licence, with_mlx, proof, metrics)
    contents = sorted((str(file.relative_to(out)), file.stat().st_size) for file in out.rglob("*") if file.is_file())
    return Staged(out, hub_base, tuple(contents))


def _fill(
    out: Path,
    adapter: Adapter,
    repo: str,
    hub_base: str,
    licence: str,
    with_mlx: bool,
    proof: Mapping[str, Any] | None,
    metrics: Mapping[str, Any] | None,
) -> None:
    """Write a repository's files into the empty folder ``out``; the arguments are those of :func:`stage`, read."""
    to_peft(adapter, hub_base, out)
    if proof is not None:
        proof = {**without_paths(proof), "base": hub_base, "adapter": repo}
        files.write_json(out / SIDECAR_FOLDER / CERTIFICATE_FILE, proof)
    if with_mlx:
        mlx = make_folder(out / MLX_FOLDER)
        if adapter.path is not None:
            shutil.copyfile(adapter.path / WEIGHTS_FILE, mlx / WEIGHTS_FILE)
        else:
            write_safetensors(mlx / WEIGHTS_FILE, {**adapter.weights, **adapter.full})
        files.write_json(mlx / CONFIG_FILE, adapter.spec.to_config())  # mlx_lm.lora puts every path it was given there
    config = files.read_json_object(out / PEFT_CONFIG_FILE)
    card = model_card(
        repo,
        hub_base,
        config,
        adapter.manifest,
        licence=licence,
        mlx_folder=MLX_FOLDER if with_mlx else None,
        certificate=proof,
        report=metrics,
        wrapped=is_of_wrapped_model(open_peft(out).arrays()[0]),
    )
    files.write_text(out / CARD_FILE, card)


def push(staged: Staged, repo: str, *, private: bool = True, message: str = "Add adapter") -> str:
    """Create ``repo`` unless it is there, upload everything staged in one commit, and return the commit's URL.

    Raises:
        RsgwmError: not logged in, not allowed, no network; the access token is never part of the message.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with readable(f"{repo} could not be written to the Hub"):
        api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        commit = api.upload_folder(
            repo_id=repo, folder_path=str(staged.folder), commit_message=message, repo_type="model"
        )
    return str(commit.commit_url)


def pull(
    repo: str,
    out: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    keep_peft: bool = False,
    reading: PeftReading | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Fetch an adapter and write it to the new folder ``out``: as mlx-lm loads it, or PEFT's files as they are.

    A repository of mlx-lm's own layout is checked and copied. ``reading`` says how PEFT's is read.

    A revision that was fetched before is taken from the Hub's cache when there is no network.

    Raises:
        RsgwmError: no such repository, no network and nothing cached; not an adapter; as ``convert_from_peft``.
    """
    if not HUB_ID.fullmatch(repo):
        raise RsgwmError(f"{repo!r} is not a repository's name; give owner/name")
    require_empty(out)
    folder = fetch_adapter(repo, revision, progress)
    if is_mlx(folder) and not is_peft(folder):
        return _kept_mlx(folder, repo, out, base, keep_peft)
    check_peft(folder)
    named = base or files.read_json_object(folder / PEFT_CONFIG_FILE).get("base_model_name_or_path")
    if keep_peft:
        _copy(folder, out)
        return {"out": str(out), "repo": repo, "base": named, "layout": "peft"}
    if not isinstance(named, str) or not named:
        raise RsgwmError(f"{repo} does not say which base model it is for; give --base")
    layers = read_base_layers(named, resolve_base(named, progress))
    converted = convert_from_peft(folder, layers, out, reading)
    return {
        "out": str(out),
        "repo": repo,
        "base": named,
        "layout": "mlx",
        "rank": converted.spec.rank,
        "scale": converted.spec.scale,
        "modules": converted.modules,
        "notes": list(converted.notes),
    }


def _kept_mlx(folder: Path, repo: str, out: Path, base: str | None, keep_peft: bool) -> dict[str, Any]:
    if keep_peft:
        raise RsgwmError(f"{repo} has mlx-lm's layout, not PEFT's; leave --keep-peft out")
    adapter = Adapter.load(folder)
    _copy(folder, out)
    named = base or (adapter.manifest.get("base") or {}).get("name")
    return {
        "out": str(out),
        "repo": repo,
        "base": named,
        "layout": "mlx",
        "rank": adapter.spec.rank,
        "scale": adapter.spec.scale,
        "modules": len(adapter.modules()),
    }


def _copy(folder: Path, out: Path) -> None:
    with new_folder(out) as work:
        shutil.copytree(folder, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))


def _hub_base(name: str | None, where: str) -> str:
    """The Hub id of a base; a local folder's name must not be published."""
    if name in ALIASES:
        return ALIASES[name].hub_id
    if not name or not HUB_ID.fullmatch(name) or Path(name).exists():
        raise RsgwmError(
            f"{where} is for the base {name or '(unknown)'}, which is not on the Hub; give --base owner/name"
        )
    return name


def without_paths(value: Any) -> Any:
    """A JSON value with every text that is an absolute path cut to its last part."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~")) or re.match(r"[A-Za-z]:[\\/]", value)):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value
