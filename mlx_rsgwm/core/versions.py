"""Versions of the components that shape results, and of the formats of files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def versions() -> dict[str, str]:
    """Versions of the components that shape results, for manifests and reports."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    installed = {}
    for package in ("mlx-rsgwm", "mlx", "mlx-lm", "numpy", "transformers"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def format_problem(told: Mapping[str, Any], name: str, newest: int) -> str:
    """Why a file that says ``format`` and ``format_version`` of itself cannot be read as ``name``; empty where it can.

    Only what is newer than ``newest`` is refused: what it means nobody knows here.
    """
    stated = told.get("format_version", newest)
    if told.get("format") != name:
        return f"format is {told.get('format')!r}, not {name!r}"
    if type(stated) is not int:
        return f"format_version must be a whole number, found {stated!r}"
    newer = f"it is of a newer mlx-rsgwm (format {stated}; this one reads {newest}); update mlx-rsgwm"
    return newer if stated > newest else ""
