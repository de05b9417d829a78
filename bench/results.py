"""What a benchmark ends with: its result as a file, where one was asked for, and as JSON on the last line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def give_result(result: Mapping[str, Any], out: Path | None, shown: Mapping[str, Any] | None = None) -> None:
    """Write ``result``, JSON values, to ``out`` unless that is None, then print it, or what of it is ``shown``."""
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result if shown is None else shown))
