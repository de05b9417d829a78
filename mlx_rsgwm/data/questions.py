"""Questions with gold answers, from the public data sets or any JSONL.

One row parser per data set reads both shapes a row comes in: the original JSONL files (``<data>/<task>/<split>.jsonl``)
and the Hub's tables. Every problem names its file and line.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.json_lines import read_json_lines
from mlx_rsgwm.data.boxes import Boxes, find_boxes
from mlx_rsgwm.data.numbers import LITERAL, parse_number, plain_number, write_number
from mlx_rsgwm.data.question_files import read_question_rows

LONGEST_TASK = 80  # characters; charts and tables are labelled with it


@dataclass(frozen=True)
class Question:
    """One item. ``rationale`` is the worked solution without the final line; ``gold`` is the final answer as text.

    A data set without rationales (CommonsenseQA, StrategyQA) leaves ``rationale`` empty or gives its facts.
    """

    id: str
    task: str
    question: str
    rationale: str
    gold: str

    @property
    def answer(self) -> str:
        """The full gold answer in GSM8K style: the rationale, then a line ``#### gold``.

        A gold answer of several lines stands below the mark, so that the reader of texts knows where it begins.
        """
        final = f"####\n{self.gold}" if "\n" in self.gold else f"#### {self.gold}"
        return f"{self.rationale}\n{final}" if self.rationale else final


class Parsed(NamedTuple):
    """What a row parser finds; ``id`` and ``task`` are empty when the row has none."""

    question: str
    rationale: str
    gold: str
    id: str = ""
    task: str = ""


Row = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a data set lives and how one row of it is read.

    ``splits`` maps the names of the original files to the Hub's; ``evaluation_split`` is the labelled one to report on.
    """

    parse: Callable[[Row], Parsed]
    hub: str
    configs: tuple[str | None, ...] = (None,)
    splits: Mapping[str, str] = field(default_factory=dict)
    evaluation_split: str = "test"


def split_marked(answer: str) -> tuple[str, str] | None:
    """``(rationale, gold)`` of a GSM8K-style answer, calculator notes stripped; None without a ``####`` line."""
    marks = list(re.finditer(r"#{4,}", answer))
    if not marks:
        return None
    rationale, rest = answer[: marks[-1].start()], answer[marks[-1].end() :].strip()
    return re.sub(r"<<[^<>\n]*>>", "", rationale).strip(), plain_number(rest.split("\n")[0]) if rest else ""


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"no {name}" if value is None or value == "" else f"{name} is not text: {str(value)[:40]!r}")
    return value.strip()


def _scalar_gold(value: Any, name: str) -> str:
    """A gold answer given as a JSON scalar: booleans become yes/no, numbers their exact short form."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"{name} is not finite: {value}")
        exact = Fraction(repr(value))
        # 0.6666666667 in MAWPS stands for 2/3; 0.35 stays 0.35.
        simple = exact.limit_denominator(1000)
        return write_number(simple if abs(exact - simple) < Fraction(1, 10**9) else exact)
    if isinstance(value, str) and value.strip():
        return plain_number(value)
    raise ValueError(f"no gold answer in {name}")


def _parse_gsm8k(row: Row) -> Parsed:
    found = split_marked(_text(row, "answer"))
    if found is None:
        raise ValueError("no gold answer: answer has no '#### ' line")
    return Parsed(_text(row, "question"), *found)


def _parse_math(row: Row) -> Parsed:
    solution = _text(row, "solution")
    boxes = [box.answer for box in find_boxes(solution, finished=False)]
    if not boxes or not boxes[-1]:
        raise ValueError("no gold answer: solution has no \\boxed{…}")
    return Parsed(_text(row, "problem"), solution, boxes[-1])


def _parse_commonsense_qa(row: Row) -> Parsed:
    question = row.get("question")
    if isinstance(question, Mapping):  # the original files
        stem, choices = _text(question, "stem"), question.get("choices")
    else:  # the Hub: choices as two columns
        stem, choices = _text(row, "question"), row.get("choices")
    if isinstance(choices, Mapping):
        pairs = list(zip(choices.get("label") or (), choices.get("text") or (), strict=False))
    else:
        pairs = [(choice.get("label"), choice.get("text")) for choice in choices or ()]
    gold = str(row.get("answerKey") or "").strip()
    if not gold:
        raise ValueError("no gold answer: answerKey is empty (the test split is published without labels)")
    if gold not in [label for label, _ in pairs]:
        raise ValueError(f"answerKey {gold!r} is not one of the choices {[label for label, _ in pairs]}")
    lettered = "\n".join(f"{label}. {text}" for label, text in pairs)
    return Parsed(f"{stem}\n{lettered}", "", gold, str(row.get("id") or ""))


def _parse_strategyqa(row: Row) -> Parsed:
    answer = row.get("answer")
    label = (
        answer
        if isinstance(answer, bool)
        else {"true": True, "yes": True, "false": False, "no": False}.get(str(answer).strip().lower())
    )
    if label is None:
        raise ValueError("no gold answer: answer is neither true nor false")
    facts = row.get("facts") or ""
    rationale = facts.strip() if isinstance(facts, str) else " ".join(str(fact).strip() for fact in facts)
    return Parsed(_text(row, "question"), rationale, "yes" if label else "no", str(row.get("qid") or ""))


def _parse_mawps(row: Row) -> Parsed:
    name = "target" if "target" in row else "result"
    return Parsed(_text(row, "input" if "input" in row else "question"), "", _scalar_gold(row.get(name), name))


def _parse_svamp(row: Row) -> Parsed:
    body = _text(row, "Body")
    text = f"{body if body.endswith(('.', '?', '!')) else body + '.'} {_text(row, 'Question')}"
    return Parsed(text, "", _scalar_gold(_number_if_numeric(row.get("Answer")), "Answer"), str(row.get("ID") or ""))


def _number_if_numeric(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _parse_own(row: Row) -> Parsed:
    """A row of a user's own file: question, answer; optional id, task, rationale, answer_type.

    The gold answer is what the row says: all of ``answer``, or what it marks. ``"answer_type": "number"`` asks for the
    last number of a sentence; ``"text"`` for all of ``answer``, marks and all.
    """
    if "question" not in row:
        raise ValueError(f"no question, it has {', '.join(str(name)[:20] for name in list(row)[:5]) or 'no field'}")
    question, answer = _text(row, "question"), row.get("answer")
    row_id, task, rationale, asked = (_optional(row, name) for name in ("id", "task", "rationale", "answer_type"))
    if asked not in ("", "text", "number"):
        raise ValueError(f"answer_type must be text or number, found {asked[:40]!r}")
    if len(task) > LONGEST_TASK or not task.isprintable():
        raise ValueError(f"task must be printable and at most {LONGEST_TASK} characters long, found {task[:40]!r}")
    if not isinstance(answer, str):
        return Parsed(question, rationale, _written_scalar(answer, "answer"), row_id, task)
    answer = answer.strip()
    if not answer:
        raise ValueError("no gold answer: answer is empty")
    if asked == "text":
        return Parsed(question, rationale, answer, row_id, task)
    solution, gold = marked_answer(answer) or ("", answer)
    if not gold:
        raise ValueError("no gold answer: nothing stands after the mark")
    if asked == "number" and parse_number(gold) is None:
        numbers = _NUMBER_IN_TEXT.findall(gold.replace("−", "-"))
        if not numbers:
            raise ValueError(f"answer_type is number, and there is none in {gold[:40]!r}")
        solution, gold = solution or gold, numbers[-1]  # the sentence belongs to the solution
    return Parsed(question, solution or rationale, plain_number(gold) if asked == "number" else gold, row_id, task)


def marked_answer(answer: str) -> tuple[str, str] | None:
    r"""``(rationale, gold)`` of an answer that marks its final part, gold as it is written; None where nothing does.

    A mark is a last line ``#### gold`` (a ``####`` above other lines is a heading; at the end of a line of words it
    marks a number only), a last line "The answer is gold.", or ``\boxed{gold}`` in mathematics or at the end; boxes
    that stand beside each other give one gold together. A box or ``####`` that a sentence only speaks of is none.
    """
    line = re.search(r"(^[ \t]*)?#{4,}(?!.*#{4})\s*([^\n]*)\Z", answer.rstrip(), re.MULTILINE)
    if line is not None and (line[1] is not None or _is_short_number(line[2])):
        return re.sub(r"<<[^<>\n]*>>", "", answer[: line.start()]).strip(), line[2].strip()
    boxes = list(find_boxes(answer))
    if boxes and boxes[-1].answer and _marks(answer, boxes[-1]):
        bare = re.fullmatch(r"[\s$.]*", answer[: boxes[-1].start] + answer[boxes[-1].end :])
        return ("" if bare else answer), boxes[-1].answer
    stated = _STATED.fullmatch(answer.rpartition("\n")[2].strip())
    return (answer, stated[1]) if stated else None


def _is_short_number(text: str) -> bool:
    return re.search(r"\d", text) is not None and len(text.split()) <= 3


def _marks(answer: str, box: Boxes) -> bool:
    """Whether a box gives the answer: it stands in mathematics, or at most two words (a unit) follow it."""
    before = answer[: box.start].replace("$$", "$").replace(r"\$", "")
    opened = max(before.rfind(mark) for mark in (r"\[", r"\(", r"\begin{"))
    closed = max(before.rfind(mark) for mark in (r"\]", r"\)", r"\end{"))
    return before.count("$") % 2 == 1 or opened > closed or len(re.findall(r"[^\W_]+", answer[box.end :])) <= 2


_STATED = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+)?answer\s*(?:is:?|:|=)\s*(\S.*?)\.?", re.IGNORECASE
)
_NUMBER_IN_TEXT = re.compile(rf"(?:(?<![\w)\]])-)?{LITERAL}")


def _optional(row: Row, name: str) -> str:
    """A field as text; missing, null and NaN (what pandas writes for missing) are empty."""
    value = row.get(name)
    if isinstance(value, (list, Mapping)):
        raise ValueError(f"{name} is not text: {str(value)[:40]}")
    return "" if value is None or value != value else str(value).strip()


def _written_scalar(value: Any, name: str) -> str:
    """A gold answer given as JSON true, false or number: yes, no, or the number in full, not rounded."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return write_number(Fraction(repr(value)))
    return _scalar_gold(value, name)


MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)

SOURCES: dict[str, Source] = {
    "gsm8k": Source(_parse_gsm8k, "openai/gsm8k", ("main",)),
    "math": Source(_parse_math, "EleutherAI/hendrycks_math", MATH_SUBJECTS),
    "commonsense_qa": Source(
        _parse_commonsense_qa, "tau/commonsense_qa", splits={"dev": "validation"}, evaluation_split="dev"
    ),
    "strategyqa": Source(_parse_strategyqa, "ChilleD/StrategyQA", splits={"dev": "test"}, evaluation_split="dev"),
    "mawps": Source(_parse_mawps, "MU-NLPC/Calc-mawps", evaluation_split="multiarith", splits={"multiarith": "test"}),
    "svamp": Source(_parse_svamp, "ChilleD/SVAMP"),
}


def load_questions(
    task: str,
    split: str | None = None,
    data: Path | None = None,
    *,
    limit: int | None = None,
    offset: int = 0,
    seed: int | None = None,
    revision: str | None = None,
) -> list[Question]:
    """Read one split of a public data set.

    Args:
        task: a key of ``SOURCES``.
        split: name of the file or Hub split; None takes the one to report on.
        data: folder laid out as ``<data>/<task>/<split>.jsonl``; None asks the Hub.
        limit, offset: keep ``limit`` questions from ``offset`` on, after shuffling.
        seed: shuffle with this seed first; None keeps the order of the source.
        revision: commit, tag or branch of the Hub data set; None takes its newest.

    Raises:
        RsgwmError: unknown task, missing folder or split (naming what is there), bad rows with file and line.
    """
    if task not in SOURCES:
        raise RsgwmError(f"unknown task {task!r}; known are {', '.join(SOURCES)} (or give a .jsonl file)")
    source = SOURCES[task]
    split = split or source.evaluation_split
    if data is None:
        where, rows = f"{source.hub} {split}", _hub_rows(source, split, revision)
    else:
        path = _local_file(Path(data), task, split)
        where, rows = str(path), read_json_lines(path)
    unit = "row" if data is None else "line"
    questions = _to_questions(where, rows, source.parse, task, f"{task}-{split}", unit)
    return select(questions, limit=limit, offset=offset, seed=seed)


def load_jsonl(
    path: Path,
    task: str | None = None,
    *,
    limit: int | None = None,
    offset: int = 0,
    seed: int | None = None,
) -> list[Question]:
    """Read a user's own questions: JSON lines, a JSON array, CSV or TSV, with ``question`` and ``answer`` in every row.

    Optional are ``id``, ``task``, ``rationale`` and ``answer_type`` (see :func:`_parse_own`). The gold answer is what
    the row says; true and false become yes and no. ``task`` defaults to the row's, then the file's name.

    Raises:
        RsgwmError: a missing or empty file, bad rows with their line numbers, duplicate ids.
    """
    path = Path(path)
    found = read_question_rows(path)
    name = path.stem[:LONGEST_TASK]
    questions = _to_questions(str(path), found.rows, _parse_own, task or name, path.stem, found.unit, task is None)
    return select(questions, limit=limit, offset=offset, seed=seed)


def select(questions: list[Question], *, limit: int | None, offset: int = 0, seed: int | None = None) -> list[Question]:
    """``limit`` questions from ``offset`` on, in order, or in the order a seeded shuffle gives."""
    if limit is not None and limit < 1:
        raise RsgwmError(f"limit must be at least 1, found {limit}")
    if offset < 0 or offset >= len(questions):
        raise RsgwmError(f"offset must be in 0–{len(questions) - 1} (the questions there are), found {offset}")
    chosen = list(questions)
    if seed is not None:
        random.Random(seed).shuffle(chosen)
    return chosen[offset:] if limit is None else chosen[offset : offset + limit]


def _local_file(data: Path, task: str, split: str) -> Path:
    folder = data / task
    if not data.is_dir():
        raise RsgwmError(f"data folder {data} does not exist")
    if not folder.is_dir():
        there = sorted(child.name for child in data.iterdir() if child.is_dir())
        raise RsgwmError(f"{data} has no folder {task}; there is {', '.join(there) or 'nothing'}")
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        there = sorted(child.stem for child in folder.glob("*.jsonl"))
        raise RsgwmError(f"{folder} has no split {split!r}; there is {', '.join(there) or 'no .jsonl file'}")
    return path


def _hub_rows(source: Source, split: str, revision: str | None) -> Iterable[tuple[int, Any]]:
    from datasets import load_dataset

    rows: list[Any] = []
    for config in source.configs:
        try:
            rows += load_dataset(source.hub, config, split=source.splits.get(split, split), revision=revision)
        except Exception as error:  # the Hub client raises its own, httpx's and the disk's errors; all mean the same
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RsgwmError(
                f"cannot load split {split!r} of {source.hub} from the Hub: {reason}; give a local folder with --data"
            ) from error
    return enumerate(rows, 1)


def _to_questions(
    where: str,
    rows: Iterable[tuple[int, Any]],
    parse: Callable[[Row], Parsed],
    task: str,
    prefix: str,
    unit: str,
    row_task: bool = False,
) -> list[Question]:
    questions: list[Question] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    for number, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, Mapping):
                raise ValueError(f"expected a JSON object, found {type(row).__name__}")
            parsed = parse(row)
            if not parsed.gold:
                raise ValueError("no gold answer")
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            problems.append(f"{unit} {number}: {error}")
            continue
        row_id = parsed.id or f"{prefix}-{number}"
        if row_id in seen:
            problems.append(f"{unit} {number}: id {row_id!r} is already that of {unit} {seen[row_id]}")
        seen[row_id] = number
        name = parsed.task if row_task and parsed.task else task
        questions.append(Question(row_id, name, parsed.question, parsed.rationale, parsed.gold))
    raise_problems(where, problems)
    if not questions:
        raise RsgwmError(f"{where} is empty: no questions to read")
    return questions
