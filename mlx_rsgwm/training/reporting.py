"""Sending a run's numbers to wandb, swanlab or trackio, each by its own package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_rsgwm.core.errors import RsgwmError

SERVICES = ("wandb", "swanlab", "trackio")


class Reports:
    """The open runs of the services asked for; with none, every call does nothing."""

    def __init__(self, services: Mapping[str, Any]) -> None:
        self._services = services

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step to every service."""
        for service in self._services.values():
            service.log(dict(values), step=step)

    def close(self) -> None:
        """Let every service write what it still holds."""
        for service in self._services.values():
            service.finish()


NO_REPORTS = Reports({})


def open_reports(services: Sequence[str], project: str, folder: Path, config: Mapping[str, Any]) -> Reports:
    """Start a run of ``project``, named as the adapter folder, at every service.

    Raises:
        RsgwmError: a service that is not known, or whose package is not installed.
    """
    unknown = sorted(set(services) - set(SERVICES))
    if unknown:
        raise RsgwmError(f"report-to {', '.join(unknown)} is unknown; there are {', '.join(SERVICES)}")
    opened = {}
    for service in services:
        try:
            opened[service] = import_module(service)
        except ImportError:
            raise RsgwmError(f"report-to {service} needs its package: pip install {service}") from None
    named: dict[str, dict[str, Any]] = {
        "wandb": {"name": folder.name, "dir": str(folder)},
        "swanlab": {"experiment_name": folder.name, "logdir": str(folder / "swanlog")},
        "trackio": {"name": folder.name},
    }
    for service, module in opened.items():
        module.init(project=project, config=dict(config), **named[service])
    return Reports(opened)
