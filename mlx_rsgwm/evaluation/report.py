"""The report folder of an evaluation: items.jsonl, report.md, plot.png, and report.json last.

``summarise`` turns records into one JSON object; everything shown (terminal, Markdown, plot) is drawn from that object,
so no two places can disagree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_rsgwm import files
from mlx_rsgwm.errors import RsgwmError
from mlx_rsgwm.evaluation import metrics
from mlx_rsgwm.evaluation.intervals import Rate
from mlx_rsgwm.evaluation.metrics import ItemRecord
from mlx_rsgwm.progress import SILENT, Progress

FORMAT = "mlx-rsgwm/report"
FORMAT_VERSION = 1
REPORT_FILE = "report.json"
MARKDOWN_FILE = "report.md"
ITEMS_FILE = "items.jsonl"
PLOT_FILE = "plot.png"

# The eight rows of the paper's Table 1, then ours.
ROWS = {
    "accuracy": "Accuracy",
    "hallucination_rate": "Hallucination rate",
    "accept_rate": "Accept rate",
    "accepted_and_correct": "Accepted and correct",
    "false_accept_rate": "False-accept rate",
    "average_attempts": "Average attempts",
    "average_latency_ms": "Average latency, ms",
    "items_per_minute": "Throughput, items/min",
    "refusal_rate": "Refusal rate",
    "truncated_rate": "Truncated rate",
    "far_halluc": "False-accept rate without refusals",
}
TIMED = ("average_latency_ms", "items_per_minute")  # over the items that were run one by one
THRESHOLDS = tuple(step / 20 for step in range(21))


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Rate) else value


def summarise(
    records: Sequence[ItemRecord],
    k: int,
    metadata: Mapping[str, Any] | None = None,
    wall_seconds: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """One JSON object with everything the report shows.

    Args:
        records: one per item.
        k: attempts the loop had in all.
        metadata: where the numbers come from (base, adapters, data, seed, versions); JSON values.
        wall_seconds: seconds the whole pass took, under ``drafter`` and ``draft_verify``; either may be missing.
        seed: of the bootstrap behind the AUROC intervals.
    """
    times = dict(wall_seconds or {})
    alone = metrics.table(records, "drafter", wall_seconds=times.get("drafter"))
    checked = metrics.table(records, "draft_verify", wall_seconds=times.get("draft_verify"), max_attempts=k)
    ceiling = metrics.any_of_k(records, k)
    alone_by_task, checked_by_task = metrics.by_task(records, "drafter"), metrics.by_task(records, "draft_verify")
    auroc = metrics.verifier_auroc(records, seed)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "n": len(records),
        "k": k,
        "score": records[0].score_name,
        "threshold": records[0].threshold,
        "drafter": alone.to_dict(),
        "draft_verify": checked.to_dict(),
        "paired": metrics.compare(records).to_dict(),
        "by_task": {
            task: {"drafter": rate.to_dict(), "draft_verify": checked_by_task[task].to_dict()}
            for task, rate in alone_by_task.items()
        },
        "verifier_auroc": {
            name: {label: _plain(rate) for label, rate in found.items()} for name, found in auroc.items()
        },
        "oracle": {
            "any_of_k": _plain(ceiling),
            "majority_of_k": _plain(metrics.majority_of_k(records, k)),
            "gap_closed": metrics.gap_closed(
                checked.accuracy.value, alone.accuracy.value, ceiling.value if ceiling else None
            ),
        },
        "sweep": {
            name: {str(at): found.to_dict() for at, found in metrics.sweep(records, THRESHOLDS, k, name).items()}
            for name in auroc
        },
        "metadata": dict(metadata or {}),
    }


def show(value: Any, digits: int = 3) -> str:
    """A cell: ``0.720 [0.625, 0.799]`` for a rate, a short number, or a dash for what does not apply."""
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _sections(summary: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Titles and tables (first row is the head) shared by the terminal and the Markdown."""
    alone, checked, k = summary["drafter"], summary["draft_verify"], summary["k"]
    main = [["", "drafter alone", "n", "draft–verify", "n"]]
    for name, label in ROWS.items():
        counts = [row[name]["n"] if isinstance(row[name], Mapping) else None for row in (alone, checked)]
        if name in TIMED:
            counts = [row["timed_items"] if row[name] is not None else None for row in (alone, checked)]
        shown = [str(count) if count is not None else "" for count in counts]
        main.append([label, show(alone[name]), shown[0], show(checked[name]), shown[1]])
    tasks = [["family", "drafter alone", "draft–verify", "n"]]
    for task, rates in summary["by_task"].items():
        tasks.append([task, show(rates["drafter"]), show(rates["draft_verify"]), str(rates["drafter"]["n"])])
    scores = [["verifier score", "AUROC, all drafts", "n", "AUROC, first drafts", "n"]]
    for name, found in summary["verifier_auroc"].items():
        used = f"{name} (used)" if name == summary["score"] else name
        cells = [
            text for label in ("all", "first") for text in (show(found[label]), str((found[label] or {}).get("n", "")))
        ]
        scores.append([used, *cells])
    oracle, n = summary["oracle"], str(summary["n"])
    ceiling = [["ceiling", "accuracy", "n"]]
    ceiling.append([f"any of {k} drafts correct (oracle)", show(oracle["any_of_k"]), n])
    ceiling.append([f"majority of {k}", show(oracle["majority_of_k"]), n])
    ceiling.append(["share of the oracle gap closed", show(oracle["gap_closed"]), n])
    return [
        ("Draft–verify against the drafter alone", main),
        ("Families", tasks),
        ("Verifier", scores),
        ("Ceiling", ceiling),
    ]


def _notes(summary: Mapping[str, Any]) -> list[str]:
    paired = summary["paired"]
    return [
        f"{summary['n']} items, K = {summary['k']}, score {summary['score']}, threshold {summary['threshold']:g}; "
        "brackets are 95 % intervals (Wilson; bootstrap over items for AUROC).",
        f"Same items: only draft–verify right on {paired['only_second']}, only the drafter on {paired['only_first']}, "
        f"difference {paired['difference']:+.3f}, exact McNemar p = {paired['p_value']:.3f}.",
    ]


def render_table(summary: Mapping[str, Any]) -> str:
    """The report as plain text with aligned columns, for a terminal."""
    blocks = []
    for title, rows in _sections(summary):
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        blocks.append("\n".join([title, lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]]))
    return "\n\n".join([*blocks, "\n".join(_notes(summary))])


def render_markdown(summary: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# Evaluation", "", *(f"{note}\n" for note in _notes(summary))]
    for title, rows in _sections(summary):
        body = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
        lines += [f"## {title}", "", body[0], "|" + "---|" * len(rows[0]), *body[1:], ""]
    if summary["metadata"]:
        shown = json.dumps(summary["metadata"], indent=2, ensure_ascii=False)
        lines += ["## Where the numbers come from", "", "```json", shown, "```", ""]
    return "\n".join(lines)


def write_report(
    folder: Path,
    records: Sequence[ItemRecord],
    k: int,
    metadata: Mapping[str, Any] | None = None,
    wall_seconds: Mapping[str, float] | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write the report folder and return what report.json holds.

    An old report.json is removed first and the new one written last, so a folder with one is whole. Without
    matplotlib the plot is left out and ``progress`` is told.
    """
    folder = Path(folder)
    summary = summarise(records, k, metadata, wall_seconds, seed)
    files.make_folder(folder)
    with suppress(FileNotFoundError):
        (folder / REPORT_FILE).unlink()
    write_items(folder / ITEMS_FILE, records)
    files.write_text(folder / MARKDOWN_FILE, render_markdown(summary))
    names = [ITEMS_FILE, MARKDOWN_FILE]
    try:
        plot(summary, folder / PLOT_FILE)
        names.append(PLOT_FILE)
    except ImportError:
        (folder / PLOT_FILE).unlink(missing_ok=True)
        progress.message("no plot: matplotlib is not installed (pip install 'mlx-rsgwm[plots]')")
    summary["files"] = {name: files.sha256_file(folder / name) for name in names}
    files.write_json(folder / REPORT_FILE, summary)
    return summary


def write_items(path: Path, records: Sequence[ItemRecord]) -> None:
    """One record a line."""
    lines = [json.dumps(record.to_dict(), ensure_ascii=False, allow_nan=False) for record in records]
    files.write_text(path, "\n".join(lines) + "\n")


def read_items(path: Path) -> list[ItemRecord]:
    """Read ``items.jsonl`` back; a bad line is a :class:`RsgwmError` with its number."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RsgwmError(f"cannot read {path}: {error}") from None
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise RsgwmError(f"{path} line {number}: not valid JSON ({error.msg})") from None
            if not isinstance(value, dict):
                raise RsgwmError(f"{path} line {number}: expected a JSON object, found {type(value).__name__}")
            records.append(ItemRecord.from_dict(value, f"{path} line {number}"))
    return records


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Bars per family with intervals, and accuracy, accept and false-accept rate over the threshold; a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    bars, curve = figure.subplots(1, 2)
    tasks = list(summary["by_task"])
    for shift, (mode, label) in enumerate((("drafter", "drafter alone"), ("draft_verify", "draft–verify"))):
        rates = [summary["by_task"][task][mode] for task in tasks]
        values = [rate["value"] for rate in rates]
        below = [rate["value"] - rate["low"] for rate in rates]
        above = [rate["high"] - rate["value"] for rate in rates]
        places = [index + (shift - 0.5) * 0.4 for index in range(len(tasks))]
        bars.bar(places, values, 0.4, yerr=[below, above], capsize=3, label=label)
    bars.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
    bars.set(ylim=(0, 1), ylabel="accuracy", title="Families")
    bars.legend()
    points = summary["sweep"].get(summary["score"], {})
    for name, label in (
        ("accuracy", "accuracy"),
        ("accept_rate", "accept rate"),
        ("false_accept_rate", "false accepts"),
    ):
        shown = [(float(at), row[name]["value"]) for at, row in points.items() if row[name] is not None]
        if shown:
            curve.plot(*zip(*shown, strict=True), marker=".", label=label)
    curve.axvline(summary["threshold"], color="grey", linestyle=":", label="threshold used")
    curve.set(xlim=(0, 1), ylim=(0, 1), xlabel=f"threshold on {summary['score']}", title="Risk and coverage")
    curve.legend()
    temporary = files.temporary_for(path)
    try:
        figure.savefig(temporary, dpi=120, format="png")
        files.replace_file(path, temporary)
    except OSError as error:
        raise RsgwmError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
