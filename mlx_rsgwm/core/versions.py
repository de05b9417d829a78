"""Versions of the components that shape results."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


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
