"""Whether test questions stand among the training questions: word for word, with other numbers, or nearly.

Adapters record hashes of the rows that they were trained and calibrated on; :func:`check_overlap` compares those with
what is to be evaluated, whatever the command line says. The rest looks closer, at the texts of corpora that are given:
word for word means equal but for case, punctuation and spacing. ``numbers`` are the same words around other numbers:
for generated families that is their making, for a public data set it is a leak of the solution's form. ``near`` shares
at least ``SHARE`` of all word triples (Jaccard).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.corpus import load_corpus
from mlx_rsgwm.data.question_files import is_question_file
from mlx_rsgwm.data.questions import Question, load_jsonl
from mlx_rsgwm.data.row_hashes import (
    KEY,
    RowRecord,
    not_recorded,
    record_of,
    record_of_base,
    repeated_items,
    row_hash,
    row_keys,
    share_of,
)
from mlx_rsgwm.data.select import select_questions
from mlx_rsgwm.inference.calibration import FILE as CALIBRATION_FILE
from mlx_rsgwm.inference.calibration import calibration_folder
from mlx_rsgwm.models.adapter import MANIFEST_FILE, Adapter
from mlx_rsgwm.models.base import ALIASES, resolve_base

SHARE = 0.7
WORDS = 3


@dataclass(frozen=True)
class Match:
    """A test question, the training question it resembles most, how (exact, numbers, near) and their Jaccard share."""

    test: str
    train: str
    kind: str
    share: float


# Letters of scripts without spaces between words are words of their own; signs of arithmetic tell two questions apart.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0e7f]|[^\W\d_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0e7f]+"
    r"|\d+(?:\.\d+)?|[-+*/^=<>%×÷±√∑∫≤≥≠∪∩\\|!]"
)


def words_of(text: str) -> list[str]:
    """Lower-case words of any script, numbers, and signs of arithmetic."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    return _WORD.findall(re.sub(r"(?<=\d),(?=\d{3}\b)", "", re.sub(r"(?<=\w)-(?=[^\W\d])", " ", plain)))


def without_numbers(text: str) -> str:
    """The words of a text, every number as one sign."""
    return " ".join("#" if word[0].isdigit() else word for word in words_of(text))


def triples(text: str) -> frozenset[tuple[str, ...]]:
    """Runs of three words; a shorter text is one run."""
    tokens = words_of(text)
    return frozenset(tuple(tokens[start : start + WORDS]) for start in range(max(1, len(tokens) - WORDS + 1)))


def find_contamination(test: Sequence[Question], train: Mapping[str, str]) -> list[Match]:
    """The closest match of every test question that has one among ``train`` (id: question text).

    Candidates come from an index of word triples, so that the cost grows with what texts share and not with their
    product.
    """
    exact = {" ".join(words_of(text)): name for name, text in reversed(list(train.items()))}
    masked = {without_numbers(text): name for name, text in reversed(list(train.items()))}
    shingles = {name: triples(text) for name, text in train.items()}
    index: dict[tuple[str, ...], list[str]] = {}
    for name, row_triples in shingles.items():
        for triple in row_triples:
            index.setdefault(triple, []).append(name)
    matches = []
    for question in test:
        question_triples = triples(question.question)
        shared = Counter(name for triple in question_triples for name in index.get(triple, ()))
        best, share = "", 0.0
        for name, count in shared.most_common(50):
            jaccard = count / (len(question_triples) + len(shingles[name]) - count)
            if jaccard > share:
                best, share = name, jaccard
        if (same := exact.get(" ".join(words_of(question.question)))) is not None:
            matches.append(Match(question.id, same, "exact", 1.0))
        elif (alike := masked.get(without_numbers(question.question))) is not None:
            matches.append(Match(question.id, alike, "numbers", share if best == alike else 0.0))
        elif share >= SHARE:
            matches.append(Match(question.id, best, "near", share))
    return matches


def contamination(test: Sequence[Question], train: Mapping[str, str]) -> dict[str, Any]:
    """Counts by kind, and the matches, for a report."""
    matches = find_contamination(test, train)
    counts = Counter(match.kind for match in matches)
    return {
        "test": len(test),
        "train": len(train),
        **{kind: counts[kind] for kind in ("exact", "numbers", "near")},
        "matches": [asdict(match) for match in matches],
    }


@dataclass(frozen=True)
class Overlap:
    """Rows asked that were trained or calibrated on: ``items`` of ``asked``, ``by`` whom, and ``examples`` (ids).

    ``not_recorded`` names adapters of which it is not known what they were trained on. ``repeated`` items ask what an
    item before them asks, and count as if they were others.
    """

    items: int
    asked: int
    by: Mapping[str, int]
    examples: tuple[str, ...]
    not_recorded: tuple[str, ...]
    repeated: int = 0

    def unknown(self) -> str:
        """One line on adapters of which nothing is known; empty where there are none."""
        return not_recorded(self.not_recorded) if self.not_recorded else ""

    def lines(self) -> tuple[str, ...]:
        """All that must be told of it."""
        repeats = repeated_items(self.repeated, self.asked) if self.repeated else ""
        return tuple(line for line in (self.headline(), self.unknown(), repeats) if line)

    def headline(self, what: str = "NOT A TEST") -> str:
        """What must stand above a result; empty where nothing overlaps."""
        if not self.items:
            return ""
        by = ", ".join(f"{name} {count}" for name, count in self.by.items())
        return f"{what}: {self.items} of {self.asked} items were trained or calibrated on ({by})"


def rows_trained_on(
    adapters: Mapping[str, Adapter | Path], base: str | None = None, progress: Progress = SILENT
) -> dict[str, RowRecord]:
    """What each adapter, or the one in a folder, was trained on, by role, and under ``base`` what was fused into it.

    ``base`` names the base that they are used with; None is the one that they record.
    """
    described = {role: _manifest_of(adapter) for role, adapter in adapters.items()}
    recorded = (manifest["base"].get("name") for manifest in described.values() if manifest.get("base"))
    fused = rows_fused(base or next(recorded, None), progress)
    return {role: record_of(manifest, role) for role, manifest in described.items()} | fused


def rows_fused(base: str | None, progress: Progress = SILENT) -> dict[str, RowRecord]:
    """What was fused into a base, under ``base``; empty where nothing was, or where it cannot be had (loading says)."""
    record = RowRecord()
    if base is not None and base not in ALIASES:
        with suppress(RsgwmError):
            record = record_of_base(resolve_base(base, progress))
    return {} if record == RowRecord() else {"base": record}


def rows_seen(
    adapters: Mapping[str, Adapter | Path],
    base: str | None = None,
    progress: Progress = SILENT,
    pool_folder: Path | None = None,
) -> dict[str, RowRecord]:
    """As :func:`rows_trained_on`, with what each adapter's calibration was fitted on, and that of a pool that verifies,
    which is in ``pool_folder``."""
    seen = rows_trained_on(adapters, base, progress)
    places = {
        role: adapter if isinstance(adapter, Path) else calibration_folder([adapter])
        for role, adapter in adapters.items()
    }
    if pool_folder is not None:
        places["verifier"] = pool_folder
    for role, folder in places.items():
        calibration = folder / CALIBRATION_FILE
        if files.is_present(calibration):
            name = f"{role}'s calibration"
            fitted = files.read_json_object(calibration).get(KEY)
            seen[name] = RowRecord.from_description(fitted, str(calibration)) if fitted else RowRecord(unknown=(name,))
    return seen


def _manifest_of(adapter: Adapter | Path) -> dict[str, Any]:
    if isinstance(adapter, Adapter):
        return adapter.manifest
    return files.read_json_object(adapter / MANIFEST_FILE) if files.is_present(adapter / MANIFEST_FILE) else {}


def union(seen: Mapping[str, RowRecord]) -> RowRecord:
    """Everything that any of them has seen."""
    return reduce(or_, seen.values(), RowRecord())


@dataclass(frozen=True)
class CalibrationDraw:
    """Questions to calibrate on, the record of them for the calibration, their overlap, and ``notes`` to tell."""

    questions: tuple[Question, ...]
    record: RowRecord
    overlap: Overlap
    notes: tuple[str, ...]


def draw_calibration(
    tasks: Sequence[str],
    count: int,
    seed: int,
    folder: Path | None,
    trained: Mapping[str, RowRecord],
    allow: bool,
    *,
    split: str | None = None,
    only_known_files: bool = False,
) -> CalibrationDraw:
    """``count`` calibration questions of each task, each question once; the one way to choose them.

    Args:
        tasks, count, seed, folder, split: see :func:`~mlx_rsgwm.data.select.select_questions`.
        trained: from :func:`rows_trained_on`.
        allow: report questions that were trained on instead of refusing them.
        only_known_files: of files of one's own only those that the adapters know by all their rows and that have a
            calibration share; any other was given as a test and stays one.

    Raises:
        RsgwmError: questions that were trained on, unless ``allow``; whatever choosing raises.
    """
    known = union(trained).in_files
    questions: dict[bytes, Question] = {}
    in_files: list[str] = []
    notes: list[str] = []
    for task in tasks:
        if only_known_files and is_question_file(task):
            texts = [question.question for question in load_jsonl(Path(task))]
            shares = {share_of(text) for text in texts}
            if "calibration" not in shares or any(row_hash(text) not in known for text in texts):
                continue
        chosen = select_questions(task, "calibration", count, seed, folder, split=split)
        for question in chosen.questions:
            questions.setdefault(row_hash(question.question), question)
        in_files += chosen.file_questions
        notes += [note] if (note := chosen.note(task)) else []
    drawn = tuple(questions.values())
    overlap = check_overlap(drawn, trained, allow, "calibration")
    notes += [line for line in (overlap.headline("NOT HELD OUT"), overlap.unknown()) if line and drawn]
    return CalibrationDraw(drawn, RowRecord.of((row.question for row in drawn), in_files), overlap, tuple(notes))


def check_overlap(questions: Sequence[Question], seen: Mapping[str, RowRecord], allow: bool, doing: str) -> Overlap:
    """Compare what is to be asked with what was trained and calibrated on.

    Args:
        questions: the items.
        seen: by role, from :func:`rows_seen`.
        allow: report an overlap instead of refusing it.
        doing: ``test`` or ``calibration``, for the message.

    Raises:
        RsgwmError: an overlap that is not allowed; says how many rows and how to proceed.
    """
    keys = [row_keys(question.question) for question in questions]
    by = {role: sum(map(record.has, keys)) for role, record in seen.items()}
    everything = union(seen)
    shared = [question.id for question, key in zip(questions, keys, strict=True) if everything.has(key)]
    overlap = Overlap(
        len(shared),
        len(questions),
        {role: count for role, count in by.items() if count},
        tuple(shared[:5]),
        everything.unknown,
        len(questions) - len({row_hash(question.question) for question in questions}),
    )
    if shared and not allow:
        counts = ", ".join(f"{role} {count}" for role, count in overlap.by.items())
        raise RsgwmError(
            f"{len(shared)} of {len(questions)} {doing} questions were trained or calibrated on ({counts}), such as "
            f"{shared[0]}; give other questions, or the {doing} share of a file of which only a share was trained on "
            f"(--split {doing}), or --allow-overlap, and the overlap stands above the result"
        )
    return overlap


def training_questions(folders: Iterable[Path]) -> dict[str, str]:
    """Question texts of corpus folders by ``folder/row id``; a question used twice is there once."""
    questions: dict[str, str] = {}
    seen: set[str] = set()
    for folder in folders:
        for row in load_corpus(folder).rows:
            if row.question not in seen:
                seen.add(row.question)
                questions[f"{folder.name}/{row.id}"] = row.question
    return questions
