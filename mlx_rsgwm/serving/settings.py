"""How a server is reached, what it allows, and how long it waits."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError, raise_problems

FEWEST_KEY_LETTERS = 8
LOOPBACK_NAMES = ("localhost",)


@dataclass(frozen=True)
class ServerSettings:
    """Of the server; what the engine takes on is in :class:`~mlx_rsgwm.serving.admission.Limits`.

    ``api_keys``: who may ask; empty: anybody who reaches the server, which must then be on loopback. ``admin_keys``:
    who may load and unload adapters, where that is not everybody who may ask. ``adapter_dir``: where adapters that are
    loaded at run time lie; None: none are. ``allowed_hosts``: names that clients may call the server by, besides
    addresses and localhost. ``cors_origins``: pages of other servers that may ask from a browser. ``history``: what a
    verified model does with a conversation, ``last`` or ``refuse``.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    adapter_dir: Path | None = None
    max_tokens: int = 512
    timeout: float = 600.0
    drain: float = 30.0
    history: str = "last"

    def __post_init__(self) -> None:
        problems = []
        if not is_loopback(self.host) and not self.api_keys:
            problems.append(
                f"--host {self.host} can be reached from other machines; give --api-key-file, or take 127.0.0.1"
            )
        if self.adapter_dir is not None and not self.adapter_dir.is_dir():
            problems.append(f"--adapter-dir {self.adapter_dir} is not a folder")
        if "*" in self.cors_origins and not self.api_keys:
            problems.append("--cors-origin * lets every page on the web ask; give --api-key-file, or name the origin")
        raise_problems("serve", problems, RsgwmError)


def is_address(host: str) -> bool:
    """Whether a host is given by its address, not by a name."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    return host in LOOPBACK_NAMES or (is_address(host) and ipaddress.ip_address(host.strip("[]")).is_loopback)


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys in a file, one a line; lines that begin with # are none.

    Raises:
        RsgwmError: the file cannot be read, has none, or has one that is too short or holds white space.
    """
    if path is None:
        return ()
    lines = [line.strip() for line in files.read_text(path).splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise RsgwmError(f"{path} holds no key; write one a line")
    if any(len(key) < FEWEST_KEY_LETTERS or not key.isascii() or len(key.split()) != 1 for key in keys):
        raise RsgwmError(f"{path}: a key has at least {FEWEST_KEY_LETTERS} ASCII characters and no space")
    return tuple(keys)
