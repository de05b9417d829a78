"""The certificate of a parity check: which files it was made for, and a copy of it inside an exported PEFT folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_rsgwm.converters.peft.sidecar import CERTIFICATE_FILE, SIDECAR_FOLDER
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.models.adapter import Adapter

CERTIFICATE_FORMAT = "mlx-rsgwm/parity"


def sign(result: dict[str, Any], adapter: Adapter, base_fingerprint: str) -> dict[str, Any]:
    """A parity result with the SHA-256 of the weights and the base's fingerprint it holds for."""
    return {
        "format": CERTIFICATE_FORMAT,
        "format_version": 1,
        "adapter_sha256": adapter.weights_hash(),
        "base_fingerprint": base_fingerprint,
        **result,
    }


def read_certificate(path: Path, adapter: Adapter) -> dict[str, Any]:
    """A certificate, once it is known to be of ``adapter`` and to have passed.

    Raises:
        RsgwmError: it is none, is another adapter's, or says that the check failed.
    """
    certificate = files.read_json_object(path)
    if certificate.get("format") != CERTIFICATE_FORMAT:
        raise RsgwmError(f"{path} is no certificate of rsgwm parity")
    if certificate.get("adapter_sha256") != adapter.weights_hash():
        raise RsgwmError(f"{path} is the certificate of another adapter than {adapter.where}")
    if certificate.get("passed") is not True:
        raise RsgwmError(f"{path} says that the check failed; run rsgwm parity again once it is repaired")
    return certificate


def embed_certificate(path: Path, adapter: Adapter, peft_folder: Path) -> None:
    """Put the certificate of ``adapter`` into the PEFT folder made from it."""
    certificate = read_certificate(path, adapter)
    files.write_json(make_folder(peft_folder / SIDECAR_FOLDER) / CERTIFICATE_FILE, certificate)
