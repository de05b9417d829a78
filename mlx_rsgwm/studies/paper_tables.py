"""The paper's Tables 1, 2 and 3 measured here, printed beside its numbers.

Each row is a recipe run (its variant trained when it is not there) and a way to answer. The paper does not define its
variants; what they are read as stands in ``VARIANTS`` and in the notes, and can be replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.tables import ABSENT
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.evaluation import metrics
from mlx_rsgwm.evaluation.journal import EvaluationJournal
from mlx_rsgwm.evaluation.records import ItemRecord, by_seed, write_items
from mlx_rsgwm.evaluation.report.summary import spread
from mlx_rsgwm.evaluation.runner import describe_run, evaluate
from mlx_rsgwm.evaluation.stats.intervals import share
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.open import slots_of
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.studies.paper import TABLES, PaperRow, footnotes

# Recipe settings of Table 3's rows and of the run that all tables share: our reading of names the paper leaves open.
VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "balanced": ("data.verify_share=0.5",),
    "phase-2 prompts": ("template=chat",),
}

# Words that no adapter here was trained with: what the verifier is asked in when prompts are not aligned.
UNALIGNED = Template(
    name="unaligned",
    draft="Question: {question}\nSolution:",
    verify="Question: {question}\nSolution: {answer}\nIs this solution right? Reply Yes or No:",
)

COLUMNS = {
    "accuracy": "accuracy",
    "wrong_rate": "wrong (hall.)",
    "no_answer_rate": "no answer",
    "cut_off_rate": "cut off",
    "accept_rate": "accept",
    "accepted_and_correct": "acc. & correct",
    "false_accept_rate": "false accepts",
    "accepted_wrong_rate": "accepted wrong",
    "average_attempts": "attempts",
    "average_latency_ms": "ms",
    "items_per_minute": "items/min",
}
PRINTED = {
    "average_latency_ms": "latency_ms",
    "wrong_rate": "hallucination_rate",
}  # names that differ in the paper's rows


@dataclass(frozen=True)
class TableRow:
    """One row to measure: a recipe variant, threshold, who verifies, and in which words it is asked."""

    name: str
    variant: str = "default"
    threshold: float | None = None
    verifier: str = "verifier"
    aligned: bool = True


ROWS: dict[int, tuple[TableRow, ...]] = {
    1: (TableRow("Single-GWM", verifier="drafter"), TableRow("GWM-DV-V2")),
    2: (
        TableRow("τ 0.7 (default)", threshold=0.7, aligned=False),
        TableRow("τ 0.5 (smoke)", threshold=0.5, aligned=False),
        TableRow("τ 0.5 (aligned prompts)", threshold=0.5),
    ),
    3: (
        TableRow("default"),
        TableRow("balanced", variant="balanced"),
        TableRow("phase-2 prompts", variant="phase-2 prompts"),
    ),
}


@dataclass(frozen=True)
class Setting:
    """How the rows are measured: loop settings of the run, sampling seeds, items timed one by one."""

    config: LoopConfig
    seeds: tuple[int, ...]
    timed: int
    batch_rows: int = 32


def measure_table(
    table: int,
    base: Base,
    runs: Mapping[str, Path],
    questions: Sequence[Question],
    settings: Mapping[str, Setting],
    out: Path,
    progress: Progress = SILENT,
    overlap: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure every row of one table; items go to ``out``, and a run that was cut off goes on there.

    Args:
        table: 1, 2 or 3.
        base: the model all variants were trained on.
        runs: a finished recipe folder for every variant the table names.
        questions: the fixed slice, the same for all rows.
        settings: by variant; a row's threshold goes before its own.
        out: folder for journals, items and ``table-N.json``.
        overlap: which of the questions the variants were trained or calibrated on, for the result.
    """
    if table not in ROWS:
        raise RsgwmError(f"the paper's tables are 1, 2 and 3, found {table}")
    measured = []
    for row, printed in zip(ROWS[table], TABLES[table], strict=True):
        records = _measure_row(row, base, runs[row.variant], questions, settings[row.variant], out, progress)
        write_items(out / f"{file_name(row.name)}.jsonl", records)
        measured.append(row_summary(row, records, printed, settings[row.variant].config.attempts))
    result = {
        "table": table,
        "n": len(questions),
        "seeds": list(settings[ROWS[table][0].variant].seeds),
        "rows": measured,
        "footnotes": footnotes(table),
        "base": base.describe(),
        **({"overlap": dict(overlap)} if overlap is not None else {}),
    }
    files.write_json(out / f"table-{table}.json", result)
    return result


def file_name(name: str) -> str:
    """A row's name as a file name."""
    plain = "".join(sign if sign.isalnum() or sign in ".-" else "-" for sign in name.replace("τ", "tau"))
    return "-".join(part for part in plain.split("-") if part)


def _measure_row(
    row: TableRow, base: Base, run: Path, questions: Sequence[Question], setting: Setting, out: Path, progress: Progress
) -> list[ItemRecord]:
    slots = slots_of(base, {name: run / name for name in ("drafter", row.verifier)})
    template = Template.from_description(slots.adapter("drafter").manifest["template"])
    threshold = setting.config.threshold if row.threshold is None else row.threshold
    config = replace(setting.config, threshold=threshold)
    pipeline = DraftVerify(slots, template, "drafter", row.verifier, config)
    if not row.aligned:
        pipeline = DraftVerify(slots, template, "drafter", row.verifier, config, UNALIGNED, "warn")
    about = describe_run(pipeline, questions, setting.batch_rows, seeds=setting.seeds, aligned=row.aligned)
    journal = EvaluationJournal(out / f"{file_name(row.name)}.journal.jsonl", about)
    return evaluate(
        pipeline,
        questions,
        setting.timed,
        setting.batch_rows,
        progress,
        seeds=setting.seeds,
        journal=journal,
        part=row.name,
    )


def row_summary(row: TableRow, records: Sequence[ItemRecord], printed: PaperRow, attempts: int) -> dict[str, Any]:
    """Our figures (first seed with intervals, all seeds as tuples and medians) beside the paper's."""
    tables = [metrics.table(rows, "draft_verify", max_attempts=attempts) for rows in by_seed(records).values()]
    first = tables[0].to_dict()
    seeds: dict[str, Any] = {}
    for name in COLUMNS:
        values = [getattr(table, name) for table in tables]
        values = [value.value if hasattr(value, "value") else value for value in values]
        seeds[name] = spread(values)
    printed_rates = {name: getattr(printed, PRINTED.get(name, name), None) for name in COLUMNS}
    interval = share(round(printed.accuracy * printed.n), printed.n).to_dict()
    return {
        "name": row.name,
        "variant": row.variant,
        "threshold": records[0].threshold,
        "score": records[0].score_name,
        "aligned": row.aligned,
        "verifier": row.verifier,
        "ours": {name: first[name] for name in COLUMNS},
        "seeds": seeds,
        "paper": {**printed_rates, "n": printed.n, "accuracy_interval": interval},
    }


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Ours and the paper's in turn, first row the head; columns nobody has are left out."""
    names = [
        name
        for name in COLUMNS
        if any(row["paper"][name] is not None or row["ours"][name] is not None for row in result["rows"])
    ]
    rows = [["", "n", *(COLUMNS[name] for name in names)]]
    for row in result["rows"]:
        several = len(result["seeds"]) > 1
        cells = [_cell(row["ours"][name], row["seeds"][name] if several else None) for name in names]
        paper = [_printed(row["paper"], name) for name in names]
        rows.append([f"{row['name']}, here", str(result["n"]), *cells])
        rows.append([f"{row['name']}, paper", str(row["paper"]["n"]), *paper])
    return rows


def _cell(value: Any, seeds: Mapping[str, Any] | None) -> str:
    if seeds is not None and seeds["median"] is not None:
        digits = 3 if isinstance(value, Mapping) else 2
        shown = ", ".join(ABSENT if number is None else f"{number:.{digits}f}" for number in seeds["values"])
        return f"{seeds['median']:.{digits}f} ({shown})"
    if isinstance(value, Mapping):
        return f"{value['value']:.3f} [{value['low']:.2f}, {value['high']:.2f}]"
    return ABSENT if value is None else f"{value:.2f}"


def _printed(paper: Mapping[str, Any], name: str) -> str:
    value = paper[name]
    if name == "accuracy":
        interval = paper["accuracy_interval"]
        return f"{value:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"
    return ABSENT if value is None else f"{value:g}"


def table_notes(result: Mapping[str, Any]) -> list[str]:
    """How our rows are to be read, then what is wrong with the paper's."""
    seeds = result["seeds"]
    shown = (
        f"ours: median of sampling seeds {', '.join(map(str, seeds))} (each in brackets)"
        if len(seeds) > 1
        else f"ours: sampling seed {seeds[0]}, 95 % Wilson intervals"
    )
    rules = "; ".join(
        f"{row['name']}: {row['score']} ≥ {row['threshold']:.3f}"
        + ("" if row["aligned"] else ", verifier asked in other words")
        for row in result["rows"]
    )
    told = [f"{shown}. {rules}"]
    if result["table"] == 3:
        told.append(
            "the paper does not define its variants; read here as "
            + "; ".join(
                f"{name}: {', '.join(settings) or 'the recipe as it is'}" for name, settings in VARIANTS.items()
            )
        )
    return told + [f"[{number}] {note}" for number, note in enumerate(result["footnotes"], 1)]
