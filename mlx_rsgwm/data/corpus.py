"""A corpus: the training rows of one adapter as a folder with a manifest and hashes.

Draft rows teach to answer; verify rows ask whether a proposed answer is correct, half of them with the gold answer and
half with a perturbed one. Rows keep text, not token ids: the template in the manifest renders them at training time.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError, grouped, raise_problems
from mlx_rsgwm.core.folders import exclusive
from mlx_rsgwm.core.json_lines import read_json_lines
from mlx_rsgwm.core.resume import json_values, read_stamp
from mlx_rsgwm.core.versions import format_problem
from mlx_rsgwm.data.arithmetic import false_equations
from mlx_rsgwm.data.batching import NO_KEYS, ROLES, TokenRow
from mlx_rsgwm.data.perturb import borrow, perturb
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.row_hashes import KEY, RowKeys, RowRecord, contents_hash, row_keys
from mlx_rsgwm.data.template import Template, Tokenizer

FORMAT = "mlx-rsgwm/corpus"
FORMAT_VERSION = 1
ROWS_FILE = "rows.jsonl"
MANIFEST_FILE = "manifest.json"
MOST_DRAWS = 12  # wrong answers drawn for a question until one states no false equation


@dataclass(frozen=True)
class CorpusRow:
    """One training row. ``answer`` is what the drafter should write, or what the verifier is shown.

    ``correct`` is None for a draft row, else the verdict the verifier should give.
    """

    id: str
    task: str
    role: str
    question: str
    answer: str
    correct: bool | None = None

    def __post_init__(self) -> None:
        texts = ("id", "task", "role", "question", "answer")
        wrong = [name for name in texts if not isinstance(getattr(self, name), str)]
        if wrong:
            raise RsgwmError(f"row {self.id!r}: {', '.join(wrong)} must be text")
        if self.role not in ROLES:
            raise RsgwmError(f"row {self.id}: role must be one of {', '.join(ROLES)}, found {self.role!r}")
        if not isinstance(self.correct, bool if self.role == "verify" else type(None)):
            raise RsgwmError(f"row {self.id}: a verify row, and only one, says whether its answer is correct")
        if not self.question.strip() or not self.answer.strip():
            raise RsgwmError(f"row {self.id}: question and answer must not be empty")


@dataclass(frozen=True)
class Corpus:
    """Rows with their template and provenance; ``hash`` is that of the rows file."""

    rows: tuple[CorpusRow, ...]
    template: Template
    manifest: Mapping[str, Any]

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the rows file, as the manifest has it."""
        digest: str = self.manifest["files"][ROWS_FILE]
        return digest

    def token_rows(self, tokenizer: Tokenizer, max_tokens: int, long_rows: str) -> tuple[list[TokenRow], int]:
        """See :func:`tokenize`."""
        return tokenize(self, tokenizer, max_tokens, long_rows)

    def describe(self) -> dict[str, Any]:
        """For an adapter's manifest; where the wrong answers come from if a gold answer was not simply perturbed."""
        return {
            "hash": self.hash,
            "counts": self.manifest["counts"],
            "seed": self.manifest.get("seed"),
            **{name: self.manifest[name] for name in ("negatives", "true_equations") if name in self.manifest},
            KEY: self.record().describe(),
        }

    def record(self) -> RowRecord:
        """The questions it teaches, and those of the files they were taken from; older corpora have only the rows."""
        if self.manifest.get(KEY):
            return RowRecord.from_description(self.manifest[KEY], MANIFEST_FILE)
        return RowRecord.of(row.question for row in self.rows)

    def contents(self) -> frozenset[bytes]:
        """Hashes of what the rows ask and answer, by which files of the same rows are recognised."""
        verdicts = {None: "", True: "\ncorrect", False: "\nincorrect"}
        return frozenset(contents_hash(row.question, row.answer + verdicts[row.correct]) for row in self.rows)


def make_rows(
    questions: Sequence[Question],
    draft_rows: int,
    verify_rows: int,
    seed: int,
    at_most: bool = False,
    true_equations: bool = False,
) -> list[CorpusRow]:
    """Draft rows from the first ``draft_rows`` questions, verify rows from the first that a wrong answer is known for.

    Verify rows alternate gold and wrong answers, each question once, so that the pairs are balanced and neither
    the question nor its length gives the verdict away. With ``at_most`` fewer rows than asked for are no error; with
    ``true_equations`` wrong answers state no false equation, so that a calculator cannot find them.
    """
    if draft_rows > len(questions) and not at_most:
        raise RsgwmError(f"{draft_rows} draft rows asked for, but there are {len(questions)} questions")
    rng = random.Random(f"negatives/{seed}")
    rows = [CorpusRow(f"{q.id}/draft", q.task, "draft", q.question, q.answer) for q in questions[:draft_rows]]
    made = 0
    for question in questions:
        if made == verify_rows:
            break
        negative = wrong_answer(question, questions, rng, true_equations)
        if negative is None:
            continue
        correct = made % 2 == 0
        answer = question.answer if correct else negative.answer
        rows.append(CorpusRow(f"{question.id}/verify", question.task, "verify", question.question, answer, correct))
        made += 1
    if made < verify_rows and not at_most:
        raise RsgwmError(
            f"{verify_rows} verify rows asked for, but only {made} of {len(questions)} questions "
            "have a solution that can be perturbed; ask for fewer or give more questions"
        )
    return rows


def wrong_answer(
    question: Question, others: Sequence[Question], rng: random.Random, true_equations: bool
) -> Question | None:
    """A wrong answer to the question, or None; with ``true_equations`` the first drawn that a calculator passes."""
    for _ in range(MOST_DRAWS if true_equations else 1):
        wrong = perturb(question, rng) or borrow(question, others, rng)
        if wrong is None or not true_equations or not false_equations(wrong.answer, question.question):
            return wrong
    return None


def save_corpus(
    folder: Path,
    rows: Sequence[CorpusRow],
    template: Template,
    provenance: Mapping[str, Any],
    file_questions: Iterable[str] = (),
    replace: bool = True,
) -> Corpus:
    """Write the folder, manifest last, and return the corpus as read back would be.

    ``file_questions``: all questions of the user's own files that the rows were taken from. Without ``replace`` another
    corpus that is there by then is an error; the same one is written again.

    Raises:
        RsgwmError: no rows; what is there and may not be replaced, a manifest of something else in any case.
    """
    if not rows:
        raise RsgwmError(f"{folder}: a corpus needs at least one row")
    text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    counts = {
        task: {role: sum(row.task == task and row.role == role for row in rows) for role in ROLES}
        for task in dict.fromkeys(row.task for row in rows)
    }
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "template": template.describe(),
        "counts": counts,
        **provenance,
        KEY: RowRecord.of((row.question for row in rows), file_questions).describe(),
        "files": {ROWS_FILE: hashlib.sha256(text.encode()).hexdigest()},
    }
    with exclusive(folder):
        path = folder / MANIFEST_FILE
        require_no_other(folder)
        if not replace and files.is_present(path) and files.read_json(path) != json_values(manifest):
            raise RsgwmError(f"{folder} already holds another corpus; --replace it, or choose another folder")
        path.unlink(missing_ok=True)
        files.write_text(folder / ROWS_FILE, text)
        files.write_json(path, manifest)
    return Corpus(tuple(rows), template, manifest)


def require_no_other(folder: Path) -> None:
    """Refuse a folder whose manifest is of something else, an adapter say, that is no corpus to be replaced by one.

    A manifest that cannot be read says nothing, and may be what is left of a corpus.
    """
    before = read_stamp(folder / MANIFEST_FILE)
    if before is not None and before.get("format") != FORMAT:
        raise RsgwmError(f"{folder} holds something else than a corpus ({MANIFEST_FILE}); choose another folder")


def load_corpus(folder: Path) -> Corpus:
    """Read and check a corpus folder."""
    if not folder.exists():
        raise RsgwmError(f"{folder} does not exist")
    if not (folder / MANIFEST_FILE).is_file():
        raise RsgwmError(
            f"{folder} holds neither a corpus (no {MANIFEST_FILE}; make one with: rsgwm data build) nor train.jsonl"
        )
    manifest = files.read_json_object(folder / MANIFEST_FILE)
    if problem := format_problem(manifest, FORMAT, FORMAT_VERSION):
        raise RsgwmError(f"{folder / MANIFEST_FILE}: {problem}")
    path = folder / ROWS_FILE
    if not path.is_file():
        raise RsgwmError(f"{folder}: {ROWS_FILE} is missing")
    parts = ("files", "template", "counts")
    raise_problems(
        str(folder / MANIFEST_FILE),
        [f"{name} is not an object" for name in parts if not isinstance(manifest.get(name), dict)],
    )
    if files.sha256_file(path, files.LARGEST_TEXT) != manifest["files"].get(ROWS_FILE):
        raise RsgwmError(f"{path} was changed after it was built; build the corpus again")
    rows, problems = [], []
    for number, value in read_json_lines(path):
        try:
            if isinstance(value, ValueError):
                raise value
            rows.append(CorpusRow(**value))
        except (ValueError, TypeError, RsgwmError) as error:
            problems.append((f"line {number}", str(error)))
    raise_problems(str(path), grouped(problems))
    if not rows:
        raise RsgwmError(f"{path} holds no rows")
    return Corpus(tuple(rows), Template.from_description(manifest["template"]), manifest)


def tokenize(
    corpus: Corpus, tokenizer: Tokenizer, max_tokens: int, long_rows: str = "drop"
) -> tuple[list[TokenRow], int]:
    """Token rows of a corpus and how many were left out because they exceed ``max_tokens``.

    ``long_rows`` ``cut`` keeps the beginning of a draft row that does not fit, if a part of its answer is in it; a cut
    verify row would have lost its verdict, and is always left out.
    """
    template = corpus.template
    verdicts = dict(zip((True, False), template.verdict_ids(tokenizer), strict=True))
    rows, dropped = [], 0
    for row in corpus.rows:
        if row.correct is None:
            prompt = template.draft_prompt(tokenizer, row.question)
            completion = template.completion(tokenizer, row.answer)
        else:
            prompt = template.verify_prompt(tokenizer, row.question, row.answer)
            completion = [verdicts[row.correct]]
        cut = long_rows if row.correct is None else "drop"
        fitted = fit_row(row.role, prompt, completion, row.id, max_tokens, cut, keys=row_keys(row.question))
        if fitted is None:
            dropped += 1
        else:
            rows.append(fitted)
    if not rows:
        raise RsgwmError(f"every row of the corpus is longer than {max_tokens} tokens; raise max_tokens")
    return rows, dropped


def fit_row(
    role: str,
    prompt: Sequence[int],
    completion: Sequence[int],
    name: str,
    max_tokens: int,
    long_rows: str,
    untrained: Sequence[int] = (),
    notes: tuple[str, ...] = (),
    keys: RowKeys = NO_KEYS,
) -> TokenRow | None:
    """The token row of a prompt and a completion, cut to ``max_tokens`` if ``long_rows`` says so; None if left out."""
    tokens = (*prompt, *completion)
    if len(tokens) <= max_tokens:
        return TokenRow(role, tokens, len(prompt), name, untrained=tuple(untrained), notes=notes, keys=keys)
    if long_rows == "cut" and len(prompt) < max_tokens:
        within = tuple(position for position in untrained if position < max_tokens)
        return TokenRow(role, tokens[:max_tokens], len(prompt), name, True, within, notes, keys)
    return None
