"""Adapters that come and go at run time: names under one folder, read and checked beside the engine's thread."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx

from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import load_adapter
from mlx_rsgwm.serving.engine import Engine
from mlx_rsgwm.serving.errors import RequestError
from mlx_rsgwm.serving.library import ServedModel

MOST_FILES = 1000
LONGEST_SHOWN = 200  # characters of a path


class Shelf:
    """The folder of adapters that may be loaded; None: none may."""

    def __init__(self, engine: Engine, folder: Path | None) -> None:
        self._engine = engine
        self._folder = None if folder is None else folder.resolve()
        # One at a time: reading hashes whole files, and nothing waits for it but who asked.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="adapter-loader")

    def require(self) -> Path:
        """The folder.

        Raises:
            RequestError: adapters are not loaded at run time.
        """
        if self._folder is None:
            raise RequestError(
                "adapters are loaded when the server starts; --adapter-dir allows it later",
                403,
                "adapter_loading_disabled",
            )
        return self._folder

    def load(self, name: str, path: str, replace: bool) -> Future[ServedModel]:
        """Read an adapter below the folder and serve it under a name.

        Raises:
            RequestError: it may not be read, or the name has a model already, or is a verified pair's.
        """
        folder = self.require()
        library = self._engine.library
        library.check_name(name)
        library.check_is_adapter(name)
        if not replace and any(model.name == name for model in library.models()):
            raise RequestError(
                f"{name!r} is loaded already; load_inplace replaces it", 400, "already_loaded", "lora_name"
            )
        place = self._place(folder, path)
        return self._loader.submit(self._load, name, place, path)

    def unload(self, name: str) -> Future[ServedModel]:
        """Serve a model no more.

        Raises:
            RequestError: there is none of that name, or models stay as they are, as verified pairs do.
        """
        self.require()
        library = self._engine.library
        library.find(name)
        library.check_is_adapter(name)
        return self._engine.call(lambda library: library.remove(name))

    def close(self) -> None:
        """End the loader's thread."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _place(self, folder: Path, path: str) -> Path:
        outside = RequestError(
            "adapters are loaded by paths relative to --adapter-dir, and from nowhere else",
            403,
            "path_outside_adapter_dir",
            "lora_path",
        )
        if not path.strip() or "\0" in path or Path(path).is_absolute() or ":" in path:
            raise outside
        try:
            place = (folder / path).resolve()
        except (OSError, RuntimeError):  # a loop of links
            raise outside from None
        if place == folder or not place.is_relative_to(folder):
            raise outside
        if not os.path.exists(place):  # of a name that is too long a Path would raise
            raise RequestError(
                f"there is no adapter {path[:LONGEST_SHOWN]!r} in the server's folder",
                404,
                "adapter_not_found",
                "lora_path",
            )
        inside = list(place.rglob("*"))[: MOST_FILES + 1] if place.is_dir() else []
        if len(inside) > MOST_FILES:
            raise RequestError(f"{path!r} has more than {MOST_FILES} files", 400, "adapter_unreadable", "lora_path")
        if not all(entry.resolve().is_relative_to(folder) for entry in inside):
            raise outside
        return place

    def _load(self, name: str, place: Path, shown: str) -> ServedModel:
        """In the loader's thread; only arrays with values leave it."""
        try:
            adapter: Adapter = load_adapter(place, self._engine.library.base.name)
            mx.eval(adapter.weights)
            digest = adapter.content_hash()
        except RsgwmError as error:
            told = str(error).replace(str(place), shown)
            raise RequestError(told, 400, "adapter_unreadable", "lora_path") from None
        adapter.label = shown
        try:
            return self._engine.call(lambda library: library.add_adapter(name, adapter, digest)).result()
        except AdapterError as error:
            raise RequestError(error, 400, "adapter_mismatch", "lora_path") from None
