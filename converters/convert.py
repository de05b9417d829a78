"""An adapter from any source, written in any of the formats, and read back from there."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_rsgwm.converters.base_layers import read_base_layers
from mlx_rsgwm.converters.gguf.adapter import to_gguf
from mlx_rsgwm.converters.peft.convert import to_peft
from mlx_rsgwm.core.errors import CheckFailed, RsgwmError
from mlx_rsgwm.core.folders import new_folder, require_empty
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapter
from mlx_rsgwm.models.fit_check import base_of

FORMATS = ("peft", "mlx", "gguf")


def convert(source: AdapterSource, out: Path, to: str, base: str | None = None, progress: Progress = SILENT) -> Path:
    """Write an adapter in the format ``to`` of :data:`FORMATS`, and compare what is read back from there.

    Raises:
        CheckFailed: what is read back differs; it is left for inspection.
        RsgwmError: what has no counterpart in that format, no base, ``out`` is there already.
    """
    if to not in FORMATS:
        raise RsgwmError(f"an adapter is converted to {', '.join(FORMATS)}, not to {to!r}")
    adapter = load_adapter(source, base, progress=progress)
    name, path = base_of(adapter, base, progress)
    if to == "gguf":
        to_gguf(adapter, read_base_layers(name, path), out)
    elif to == "peft":
        to_peft(adapter, name, out)
    else:
        require_empty(out)
        with new_folder(out) as work:
            adapter.save(work)
    _compare(adapter, load_adapter(out, name), out)
    return out


def _compare(adapter: Adapter, written: Adapter, out: Path) -> None:
    """Raise unless both hold the same values in every array, as float32, and the same alpha."""
    before, after = ({**side.weights, **side.full} for side in (adapter, written))
    names = sorted(before.keys() ^ after.keys())
    if not names:
        pairs = {name: (value, after[name]) for name, value in before.items()}
        names = [
            name
            for name, (first, second) in pairs.items()
            if first.shape != second.shape
            or not mx.array_equal(first.astype(mx.float32), second.astype(mx.float32)).item()
        ]
    # GGUF keeps alpha = scale · rank as float32, which a scale of 0.1 does not come back from in float64.
    alphas = [np.float32(side.spec.scale * side.spec.rank) for side in (adapter, written)]
    if names or alphas[0] != alphas[1]:
        raise CheckFailed(f"{out} was written, but reads back otherwise ({names[0] if names else 'its scale'})")
