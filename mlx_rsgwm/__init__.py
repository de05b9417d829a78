"""Role-Specific Gradient-Weighted Merging of LoRA adapters on MLX, and draft–verify answers from the result.

``import mlx_rsgwm as rs``: the names of ``__all__`` are the library's contract. Each is imported when it is first
used, so the import itself takes no time. docs/api.md lists them, each with an example.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_rsgwm import converters as converters  # fills the table of readers of base files

if TYPE_CHECKING:
    from mlx_rsgwm.api import calibrate, convert, evaluate, fuse, load_questions, merge, parity, train
    from mlx_rsgwm.audit.audit_adapters import audit_adapters
    from mlx_rsgwm.core.errors import AdapterError, CheckFailed, RsgwmError
    from mlx_rsgwm.core.progress import LineProgress, Progress
    from mlx_rsgwm.data.build import build_corpus
    from mlx_rsgwm.data.corpus import Corpus
    from mlx_rsgwm.data.questions import Question
    from mlx_rsgwm.data.template import Template
    from mlx_rsgwm.inference.calibration import Calibration
    from mlx_rsgwm.inference.draft import Answer, Draft
    from mlx_rsgwm.inference.loop import DraftVerify
    from mlx_rsgwm.inference.open import open_pipeline
    from mlx_rsgwm.merging.vector_sources import apply_vector, extract_vector
    from mlx_rsgwm.models.adapter import Adapter
    from mlx_rsgwm.models.adapter_sources import load_adapter
    from mlx_rsgwm.models.base import Base, load_base
    from mlx_rsgwm.training.averaging import average
    from mlx_rsgwm.training.config import TrainConfig

__version__ = "0.1.0"

# Where each name of the library is defined.
_HOMES = {
    "api": ("calibrate", "convert", "evaluate", "fuse", "load_questions", "merge", "parity", "train"),
    "audit.audit_adapters": ("audit_adapters",),
    "core.errors": ("AdapterError", "CheckFailed", "RsgwmError"),
    "core.progress": ("LineProgress", "Progress"),
    "data.build": ("build_corpus",),
    "data.corpus": ("Corpus",),
    "data.questions": ("Question",),
    "data.template": ("Template",),
    "inference.calibration": ("Calibration",),
    "inference.draft": ("Answer", "Draft"),
    "inference.loop": ("DraftVerify",),
    "inference.open": ("open_pipeline",),
    "merging.vector_sources": ("apply_vector", "extract_vector"),
    "models.adapter": ("Adapter",),
    "models.adapter_sources": ("load_adapter",),
    "models.base": ("Base", "load_base"),
    "training.averaging": ("average",),
    "training.config": ("TrainConfig",),
}
_MODULE_OF = {name: f"mlx_rsgwm.{module}" for module, names in _HOMES.items() for name in names}
__all__ = [
    "Adapter",
    "AdapterError",
    "Answer",
    "Base",
    "Calibration",
    "CheckFailed",
    "Corpus",
    "Draft",
    "DraftVerify",
    "LineProgress",
    "Progress",
    "Question",
    "RsgwmError",
    "Template",
    "TrainConfig",
    "apply_vector",
    "audit_adapters",
    "average",
    "build_corpus",
    "calibrate",
    "convert",
    "evaluate",
    "extract_vector",
    "fuse",
    "load_adapter",
    "load_base",
    "load_questions",
    "merge",
    "open_pipeline",
    "parity",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mlx_rsgwm' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
