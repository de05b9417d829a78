"""Public data sets: where each lives, and how one of its rows is read.

One row parser per data set reads both shapes a row comes in: the original JSONL files (``<data>/<task>/<split>.jsonl``)
and the Hub's tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.boxes import find_boxes
from mlx_rsgwm.data.gold_answers import scalar_gold, split_marked
from mlx_rsgwm.data.question_rows import Parsed, Row, text_of
from mlx_rsgwm.models.hub_files import readable


@dataclass(frozen=True)
class DataSet:
    """Where a data set lives and how one row of it is read.

    ``splits`` maps the names of the original files to the Hub's; ``evaluation_split`` is the labelled one to report on.
    """

    parse: Callable[[Row], Parsed]
    hub: str
    configs: tuple[str | None, ...] = (None,)
    splits: Mapping[str, str] = field(default_factory=dict)
    evaluation_split: str = "test"


def _parse_gsm8k(row: Row) -> Parsed:
    marked = split_marked(text_of(row, "answer"))
    if marked is None:
        raise ValueError("no gold answer: answer has no '#### ' line")
    return Parsed(text_of(row, "question"), *marked)


def _parse_math(row: Row) -> Parsed:
    solution = text_of(row, "solution")
    boxes = [box.answer for box in find_boxes(solution, finished=False)]
    if not boxes or not boxes[-1]:
        raise ValueError("no gold answer: solution has no \\boxed{…}")
    return Parsed(text_of(row, "problem"), solution, boxes[-1])


def _parse_commonsense_qa(row: Row) -> Parsed:
    question = row.get("question")
    if isinstance(question, Mapping):  # the original files
        stem, choices = text_of(question, "stem"), question.get("choices")
    else:  # the Hub: choices as two columns
        stem, choices = text_of(row, "question"), row.get("choices")
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
    return Parsed(text_of(row, "question"), rationale, "yes" if label else "no", str(row.get("qid") or ""))


def _parse_mawps(row: Row) -> Parsed:
    name = "target" if "target" in row else "result"
    return Parsed(text_of(row, "input" if "input" in row else "question"), "", scalar_gold(row.get(name), name))


def _parse_svamp(row: Row) -> Parsed:
    body = text_of(row, "Body")
    text = f"{body if body.endswith(('.', '?', '!')) else body + '.'} {text_of(row, 'Question')}"
    return Parsed(text, "", scalar_gold(_number_if_numeric(row.get("Answer")), "Answer"), str(row.get("ID") or ""))


def _number_if_numeric(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)

SOURCES: dict[str, DataSet] = {
    "gsm8k": DataSet(_parse_gsm8k, "openai/gsm8k", ("main",)),
    "math": DataSet(_parse_math, "EleutherAI/hendrycks_math", MATH_SUBJECTS),
    "commonsense_qa": DataSet(
        _parse_commonsense_qa, "tau/commonsense_qa", splits={"dev": "validation"}, evaluation_split="dev"
    ),
    "strategyqa": DataSet(_parse_strategyqa, "ChilleD/StrategyQA", splits={"dev": "test"}, evaluation_split="dev"),
    "mawps": DataSet(_parse_mawps, "MU-NLPC/Calc-mawps", evaluation_split="multiarith", splits={"multiarith": "test"}),
    "svamp": DataSet(_parse_svamp, "ChilleD/SVAMP"),
}


def local_file(data: Path, task: str, split: str) -> Path:
    """``data/task/split.jsonl``.

    Raises:
        RsgwmError: no such folder, task or split; it says what is there.
    """
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


def hub_rows(source: DataSet, split: str, revision: str | None) -> Iterable[tuple[int, Any]]:
    """The rows of a split on the Hub, numbered from 1, those of several configurations one after another.

    Raises:
        RsgwmError: the Hub cannot be reached, or has no such split or revision.
    """
    from datasets import load_dataset

    rows: list[Any] = []
    for config in source.configs:
        with readable(
            f"cannot load split {split!r} of {source.hub} from the Hub", "give a local folder with --questions"
        ):
            rows += load_dataset(source.hub, config, split=source.splits.get(split, split), revision=revision)
    return enumerate(rows, 1)
