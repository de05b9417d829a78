"""Scores of items from a file of rows, or of a run's wrong answers that were accepted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.json_lines import RowFile, read_json_rows
from mlx_rsgwm.core.nearest import nearest, nearest_path
from mlx_rsgwm.data.question_files import DELIMITERS, JSON_SUFFIXES, table_rows
from mlx_rsgwm.evaluation.records import ItemRecord
from mlx_rsgwm.evaluation.report.folder import read_report

ID = "id"
SHOWN = 3
NEAREST_TO_ONE = 2.0**-25  # a run's scores are float32: one that is 1 there may be nearer to it than any other


@dataclass(frozen=True)
class ItemScores:
    """``scores`` (n,) float64 of the items ``ids``, in the file's order; without ``named`` these are their places."""

    name: str
    ids: tuple[str, ...]
    scores: np.ndarray
    named: bool = True

    def logits(self) -> ItemScores:
        """The same on the logit scale, where scores near 0 and 1 do not pile up.

        Raises:
            RsgwmError: a score that is not between 0 and 1.
        """
        if not ((self.scores > 0) & (self.scores < 1)).all():
            outside = np.count_nonzero(~((self.scores > 0) & (self.scores < 1)))
            raise RsgwmError(f"{self.name}: {outside} scores are not between 0 and 1 and have no logit")
        return replace(self, scores=_log_odds(self.scores))

    def look_like_chances(self) -> bool:
        """Whether all lie in [0, 1]: what comes out of a sigmoid."""
        return bool(((self.scores >= 0) & (self.scores <= 1)).all())


def read_scores(path: Path, column: str = "score", id_column: str | None = None) -> ItemScores:
    """The numbers in ``column`` of a JSONL or CSV file, or a run's (:func:`wrongly_accepted`).

    Items are named by ``id_column``; None: by ``id`` where that is there, else by their places.

    Raises:
        RsgwmError: no such file or column, a row without a number or a name, an item twice.
    """
    if path.is_dir():
        return wrongly_accepted(read_report(path)[1], str(path))
    file = _rows(path)
    columns = [name for _, row in file.rows[:1] if isinstance(row, dict) for name in row]
    for option, name in (("--column", column), ("--id", id_column)):
        if name is not None and columns and not any(isinstance(row, dict) and name in row for _, row in file.rows):
            near = nearest(name, columns)
            hint = f"did you mean {option} {near}?" if near else f"{option} is one of {', '.join(columns)}"
            raise RsgwmError(f"{path} has no column {name!r}; {hint}")
    named_by = id_column or (ID if ID in columns else None)
    problems, ids, scores = [], [], []
    for place, (number, row) in enumerate(file.rows, 1):
        try:
            scores.append(_score(row, column))
            ids.append(str(place) if named_by is None else _name(row, named_by))
        except ValueError as error:
            problems.append(f"{file.unit} {number}: {error}")
    raise_problems(str(path), problems)
    if not scores:
        raise RsgwmError(f"{path} holds no scores")
    double = next((name for name, times in Counter(ids).items() if times > 1), None)
    if double is not None:
        raise RsgwmError(f"{path}: item {double!r} is there twice; name the items' column (--id)")
    return ItemScores(str(path), tuple(ids), np.array(scores), named_by is not None)


def wrongly_accepted(records: Sequence[ItemRecord], name: str) -> ItemScores:
    """The logits of the scores of answers that were accepted and are wrong: how sure the verifier was of them.

    Raises:
        RsgwmError: there are none.
    """
    wrong = [record for record in records if record.accepted and not record.returned.correct]
    if not wrong:
        raise RsgwmError(f"{name}: no wrong answer was accepted; there is no tail to look at")
    scores = np.array([record.returned.scores[record.score_name] for record in wrong])
    clipped = np.clip(scores.astype(np.float64), NEAREST_TO_ONE, 1 - NEAREST_TO_ONE)
    return ItemScores(name, tuple(f"{record.id}/{record.seed}" for record in wrong), _log_odds(clipped))


def same_items(first: ItemScores, second: ItemScores) -> ItemScores:
    """``second`` in the order of ``first``.

    Raises:
        RsgwmError: items that only one of them has; one that names its items and one that does not.
    """
    if first.named != second.named:
        by_name, by_place = (first, second) if first.named else (second, first)
        raise RsgwmError(f"{by_name.name} names its items and {by_place.name} does not; name its column of them (--id)")
    missing, more = set(first.ids) - set(second.ids), set(second.ids) - set(first.ids)
    if missing or more:
        lacking, extra = (", ".join(sorted(names)[:SHOWN]) or "none" for names in (missing, more))
        raise RsgwmError(
            f"{first.name} and {second.name} are of different items: {len(missing)} only in the first ({lacking}), "
            f"{len(more)} only in the second ({extra}); score the same items with both"
        )
    places = {name: index for index, name in enumerate(second.ids)}
    order = np.array([places[name] for name in first.ids])
    return replace(second, ids=first.ids, scores=second.scores[order])


def _log_odds(chances: np.ndarray) -> np.ndarray:
    """log(p / (1 − p)) of 0 < p < 1, without the clipping of other places: the last decimals are the tail."""
    odds: np.ndarray = np.log(chances) - np.log1p(-chances)
    return odds


def _rows(path: Path) -> RowFile:
    if not files.is_present(path):
        raise RsgwmError(f"{path} does not exist{nearest_path(path)}")
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:
        return read_json_rows(path)
    if suffix not in DELIMITERS:
        raise RsgwmError(f"{path}: scores are read from .jsonl, .json, .csv or .tsv, or from a run's folder")
    text = files.read_text(path)
    first = text.split("\n", 1)[0].strip()
    delimiter = max(DELIMITERS[suffix], key=first.count)
    return RowFile("line", table_rows(path, text, delimiter, [cell.strip() for cell in first.split(delimiter)]))


def _name(row: Any, column: str) -> str:
    """An item's name; ValueError where it has none."""
    if row.get(column) is None or row[column] == "":
        raise ValueError(f"no {column}")
    return str(row[column])


def _score(row: Any, column: str) -> float:
    """The number in a row's ``column``; ValueError says what is there instead."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if column not in row:
        near = nearest(column, list(row))
        raise ValueError(f"no {column}" + (f"; did you mean --column {near}?" if near else ""))
    value = row[column]
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{column} is {value!r}, not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{column} is {value}, not a finite number")
    return number
