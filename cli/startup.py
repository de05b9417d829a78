"""What is done while libraries are imported: torch is kept from those that only ask for it, and a limit kept as it is.

transformers, which mlx-lm takes tokenizers from, imports torch wherever it is installed, and that doubles the time
until a command does anything. It asks once whether torch is there (``is_torch_available``) and keeps the answer; so
torch is hidden while it asks, and nowhere else. Without torch everything here works alike: it is an extra.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from mlx_rsgwm.cli.commands import WITH_TORCH, full_name
from mlx_rsgwm.cli.old_names import with_new_names

ASKING = "transformers.utils.import_utils"
RAISING = "mlx_lm.utils"


class TorchHider(MetaPathFinder):
    """Finds one module, the one that asks for torch, as it would be found anyway, and lets it ask at once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of ``transformers.utils.import_utils``, None for every other module."""
        if fullname != ASKING:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_ask(module: ModuleType) -> None:
            load(module)
            ask = getattr(module, "is_torch_available", None)
            if ask is None or "torch" in sys.modules:
                return
            sys.modules["torch"] = None  # type: ignore[assignment]  # what Python takes for "cannot be imported"
            try:
                ask()
            finally:
                del sys.modules["torch"]

        spec.loader.exec_module = load_and_ask  # type: ignore[method-assign]
        return spec


class LimitKeeper(MetaPathFinder):
    """Finds one module, mlx-lm's that sets the limit of open files, and lets it go on where that may not be raised.

    It asks for 4,096, for models of many shards; where a container or ``ulimit -n`` allows fewer its import would fail.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of ``mlx_lm.utils``, None for every other module."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == RAISING else None
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_keep(module: ModuleType) -> None:
            raised = resource.setrlimit

            def raised_if_allowed(which: int, limits: tuple[int, int]) -> None:
                with suppress(ValueError, OSError):
                    raised(which, limits)

            resource.setrlimit = raised_if_allowed
            try:
                load(module)
            finally:
                resource.setrlimit = raised

        spec.loader.exec_module = load_and_keep  # type: ignore[method-assign]
        return spec


def keep_limits() -> None:
    """Let mlx-lm be imported under a low limit of open files."""
    sys.meta_path.insert(0, LimitKeeper())


def hide_torch(arguments: Sequence[str]) -> None:
    """Hide torch from transformers unless the command that ``arguments`` name computes with it."""
    if full_name(with_new_names(arguments)[0]) not in WITH_TORCH:
        sys.meta_path.insert(0, TorchHider())
