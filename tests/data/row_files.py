"""Writers of small files of questions, and the real slices where this machine has them."""

import csv
import json
import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("RSGWM_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no data slices: set RSGWM_DATA to a folder of them")


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def write_file(path, rows):
    """The same rows as JSON lines, a JSON array, CSV or TSV."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
        elif path.suffix == ".json":
            json.dump(rows, file, indent=1)
        else:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path
