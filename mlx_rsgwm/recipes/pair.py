"""The folders of a run that answer: a drafter and a verifier, and what is kept of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.inference.calibration import FILE as CALIBRATION_FILE
from mlx_rsgwm.models.adapter import MANIFEST_FILE
from mlx_rsgwm.recipes.schema import MERGED, MergeSection


@dataclass(frozen=True)
class MergedPair:
    """A drafter and a verifier from one merge of the pool, with calibration and report, in ``folder``.

    ``suffix`` ends the names of its stages. ``verifiers``: the folders in it that verify. ``adapter``: where the
    pool is one adapter, its folder: it drafts and verifies. ``drafter``: another pair's, where this one has but a
    verifier, which was trained.
    """

    folder: Path
    section: MergeSection
    suffix: str = ""
    verifiers: tuple[str, ...] = (MERGED,)
    adapter: Path | None = None
    drafter: Path | None = None

    @property
    def roles(self) -> dict[str, Path]:
        """The folders of drafter and verifier."""
        drafter = self.drafter or self.adapter or self.folder / "drafter"
        return {"drafter": drafter, "verifier": self.adapter or self.folder / MERGED}

    @property
    def asked(self) -> dict[str, Path]:
        """The folders that answer, by their slots: the drafter, and who verifies."""
        merged = self.roles
        return {
            "drafter": merged["drafter"],
            **{name: merged["verifier"] if name == MERGED else self.folder / name for name in self.verifiers},
        }

    @property
    def calibration(self) -> Path:
        """The file in which the calibration of who verifies stands."""
        place = self.roles["verifier"] if self.verifiers == (MERGED,) else self.folder / "pool-verifier"
        return place / CALIBRATION_FILE

    @property
    def report(self) -> Path:
        """The folder of the evaluation's report."""
        return self.folder / "report"

    def merge_record(self) -> dict[str, Any]:
        """The method, and what the merges warned of, by role, as the report has it."""
        merges = {
            role: files.read_json_object(folder / MANIFEST_FILE).get("merge") for role, folder in self.roles.items()
        }
        return {
            "method": self.section.method if any(merges.values()) else None,
            "warnings": [f"{role}: {text}" for role, merge in merges.items() if merge for text in merge["warnings"]],
        }
