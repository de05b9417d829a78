"""An mlx-lm adapter folder of any age as mlx-lm loads it today: same arrays, configuration in today's fields."""

from __future__ import annotations

from pathlib import Path

from mlx_rsgwm.converters.peft.convert import Converted, replaced_notes
from mlx_rsgwm.core.folders import new_folder, require_empty
from mlx_rsgwm.models.adapter import Adapter


def convert_from_mlx(folder: Path, out: Path, scale: float | None = None) -> Converted:
    """Write the adapter in ``folder`` to the new folder ``out``, with a manifest.

    Args:
        folder: as any mlx-lm since 0.8 wrote it.
        out: a folder that does not exist yet, or an empty one.
        scale: what multiplies B·A, for a configuration that allows two (``spec.scales_of``).

    Raises:
        AdapterError: it is damaged, or two scales are possible and none is chosen.
        RsgwmError: ``out`` is not empty or cannot be written.
    """
    require_empty(out)
    adapter = Adapter.load(folder, scale=scale)
    adapter.manifest = {"kind": "imported", **adapter.manifest}
    name = str((adapter.manifest.get("base") or {}).get("name") or "a base it does not name")
    converted = Converted(out, name, adapter.spec, len(adapter.modules()), tuple(replaced_notes(adapter)))
    with new_folder(out) as work:
        adapter.save(work)
    return converted
