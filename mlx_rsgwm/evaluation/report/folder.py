"""The report folder of an evaluation: items.jsonl, report.html, report.md, plot.png, and report.json last.

Everything shown (terminal, Markdown, page, plot) is drawn from the one object that ``summarise_records`` makes of the
records, so no two places can disagree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.tables import ABSENT, Section, markdown_page, show, text_page
from mlx_rsgwm.core.versions import format_problem
from mlx_rsgwm.data.row_hashes import not_recorded, repeated_items
from mlx_rsgwm.evaluation.calculator_systems import SYSTEMS, annotated
from mlx_rsgwm.evaluation.records import ItemRecord, items_text, read_items, write_items
from mlx_rsgwm.evaluation.report.html import render_html
from mlx_rsgwm.evaluation.report.outcome import p_shown
from mlx_rsgwm.evaluation.report.plots import plot_report
from mlx_rsgwm.evaluation.report.summary import FORMAT, FORMAT_VERSION, summarise_records

TITLE = "Evaluation"
REPORT_FILE = "report.json"
MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"
ITEMS_FILE = "items.jsonl"
PLOT_FILE = "plot.png"

# The eight rows of the paper's Table 1, beside its wrong answers those that there are not, then ours.
ROWS = {
    "accuracy": "Accuracy",
    "wrong_rate": "Wrong (the paper's hallucination rate)",
    "no_answer_rate": "No answer",
    "cut_off_rate": "Cut off",
    "accept_rate": "Accept rate",
    "accepted_and_correct": "Accepted and correct",
    "false_accept_rate": "False-accept rate",
    "average_attempts": "Average attempts",
    "average_latency_ms": "Average latency, ms",
    "items_per_minute": "Throughput, items/min",
    "accepted_wrong_rate": "Accepted with a wrong answer",
    "median_latency_ms": "Median latency, ms",
    "p95_latency_ms": "95 % latency, ms",
    "tokens_drafted": "Tokens drafted per item",
    "tokens_verified": "Tokens verified per item",
    "energy_j": "Energy per item, J",
}
TIMED = ("average_latency_ms", "items_per_minute", "median_latency_ms", "p95_latency_ms", "energy_j")


def sections(summary: Mapping[str, Any]) -> list[Section]:
    """Titles and tables (first row is the head) shared by the terminal, the Markdown and the page."""
    parts: list[Section] = [
        ("Draft–verify against the drafter alone", _main(summary)),
        *([("With arithmetic checked", _arithmetic(summary))] if "arithmetic" in summary else []),
        *([("With and without more training", _beside(summary))] if "beside" in summary["metadata"] else []),
        ("Families", _families(summary)),
        ("Verifier", _scores(summary)),
        ("Ceiling", _ceiling(summary)),
        ("Drafts without a false equation (passed by a calculator)", _calculator(summary)),
    ]
    if len(summary["readings"]) > 1:
        parts.append(("The same drafts by other extractors", _readings(summary)))
    if len(summary["pass_at_k"]) > 1:
        parts.append(("Several drafts", _several(summary)))
    if summary["seeds"]:
        parts.append((f"Sampling seeds {', '.join(map(str, summary['seeds']['seeds']))}", _seeds(summary["seeds"])))
    return parts


def _main(summary: Mapping[str, Any]) -> list[list[str]]:
    alone, checked = summary["drafter"], summary["draft_verify"]
    rows = [["", "drafter alone", "n", "draft–verify", "n"]]
    for name, label in ROWS.items():
        counts = [row[name]["n"] if isinstance(row[name], Mapping) else None for row in (alone, checked)]
        if name in TIMED:
            counts = [row["timed_items"] if row[name] is not None else None for row in (alone, checked)]
        shown = [str(count) if count is not None else "" for count in counts]
        rows.append([label, show(alone[name]), shown[0], show(checked[name]), shown[1]])
    return rows


def _arithmetic(summary: Mapping[str, Any]) -> list[list[str]]:
    """The same drafts where none with a false equation is accepted; the tables around this one are without that."""
    rows = [["", *(label for label, _ in SYSTEMS.values()), "n"]]
    for name, label in ROWS.items():
        cells = [summary[key][name] for key in SYSTEMS]
        if any(cell is not None for cell in cells):
            rows.append([label, *(show(cell) for cell in cells), str(summary["n"])])
    about = summary["arithmetic"]
    for task in summary["by_task"] if len(summary["by_task"]) > 1 else ():
        rates = [about["by_task"][key][task] for key in SYSTEMS]
        rows.append([f"Accuracy, {task}", *map(show, rates), str(rates[0]["n"])])
    if about.get("seeds"):
        rows.append(["Accuracy over all seeds", *(show(about["seeds"][key]) for key in SYSTEMS), ""])
    return rows


BESIDE = ("accuracy", "accept_rate", "accepted_and_correct", "false_accept_rate", "average_attempts")


def _beside(summary: Mapping[str, Any]) -> list[list[str]]:
    """Draft–verify of two pairs with one drafter on the same questions, a row each; ``metadata`` has the other's."""
    about = summary["metadata"]["beside"]
    rows = [["draft–verify", *(ROWS[name] for name in BESIDE), "score", "AUROC", "n"]]
    for label, report in ((about["other"], about["report"]), (about["this"], summary)):
        checked, score = report["draft_verify"], report["score"]
        cells = [*(show(checked[name]) for name in BESIDE), score, show(report["verifier_auroc"][score]["all"])]
        rows.append([label, *cells, str(checked["accuracy"]["n"])])
    return rows


def _families(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [["family", "drafter alone", "draft–verify", "n"]]
    for task, rates in summary["by_task"].items():
        rows.append([task, show(rates["drafter"]), show(rates["draft_verify"]), str(rates["drafter"]["n"])])
    return rows


def _scores(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [["verifier score", "drafts", "n", "AUROC", "average precision", "Brier", "ECE", "AURC (best)"]]
    for name, labels in summary["verifier"].items():
        for label, quality in labels.items():
            used = f"{name} (used)" if name == summary["score"] else name
            best = ABSENT if quality["aurc_best"] is None else f"{quality['aurc_best']:.3f}"
            cells = [show(quality[key]) for key in ("auroc", "average_precision", "brier", "ece")]
            rows.append([used, label, str(quality["n"]), *cells, f"{show(quality['aurc'])} ({best})"])
    return rows


def _ceiling(summary: Mapping[str, Any]) -> list[list[str]]:
    oracle, n, k = summary["oracle"], str(summary["n"]), summary["k"]
    return [
        ["ceiling", "accuracy", "n"],
        [f"any of {k} drafts correct (oracle)", show(oracle["any_of_k"]), n],
        [f"majority of {k}", show(oracle["majority_of_k"]), n],
        ["share of the oracle gap closed", show(oracle["gap_closed"]), n],
    ]


def _calculator(summary: Mapping[str, Any]) -> list[list[str]]:
    told = summary["calculator_passed"]
    rows = [["of the drafts that state none", "", "over the first", "n"]]
    for key, label in (("passing_wrong", "share of wrong drafts"), ("passing_right", "share of right drafts")):
        rate = told[key]
        rows.append([f"{label} that are passed", show(rate), "", str(rate["n"] if rate else 0)])
    best = {f"best by {name}": selection for name, selection in told["best"].items()}
    selections = {"first, no verifier": told["control"], **best, "any right": told["any"]}
    for label, selection in selections.items():
        gap = selection["over_control"]
        over = "" if gap is None else f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
        rows.append([label, show(selection["accuracy"]), over, str(selection["accuracy"]["n"])])
    return rows


def _readings(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [["extractor", "of", "accuracy", "wrong", "no answer", "cut off"]]
    for name, modes in summary["readings"].items():
        for mode, label in (("drafter", "drafter alone"), ("draft_verify", "draft–verify")):
            rows.append([name, label, *(show(rate) for rate in modes[mode].values())])
    return rows


def _several(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [["k", "pass@k", "maj@k", "n"]]
    for count, rate in summary["pass_at_k"].items():
        rows.append([count, show(rate), show(summary["majority_at_k"][count]), str(summary["n"])])
    return rows


def _seeds(seeds: Mapping[str, Any]) -> list[list[str]]:
    rows = [["", "drafter alone", "median", "draft–verify", "median"]]
    for name, label in ROWS.items():
        if name in seeds["drafter"]:
            cells = []
            for mode in ("drafter", "draft_verify"):
                values = [f"{value:.3f}" if value is not None else ABSENT for value in seeds[mode][name]["values"]]
                middle = seeds[mode][name]["median"]
                cells += [f"({', '.join(values)})", ABSENT if middle is None else f"{middle:.3f}"]
            rows.append([label, *cells])
    shown = [show(seeds[mode]["accuracy_all_seeds"]) for mode in ("drafter", "draft_verify")]
    rows.append(["Accuracy over all seeds", shown[0], "", shown[1], ""])
    return rows


def headline(summary: Mapping[str, Any]) -> str:
    """What must stand above everything else: that items were trained on. Empty otherwise."""
    return str((summary.get("overlap") or {}).get("headline") or "")


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What must be said beside the tables, the headline first."""
    paired = summary["paired"]
    lines = [headline(summary)] if headline(summary) else []
    lines += [
        f"{summary['n']} items, K = {summary['k']}, score {summary['score']}, threshold {summary['threshold']:g}; "
        "brackets are 95 % intervals (Wilson for shares; bootstrap over items for the rest).",
        f"Same items: only draft–verify right on {paired['only_second']}, only the drafter on {paired['only_first']}, "
        f"difference {paired['difference']:+.3f}, exact McNemar p {p_shown(paired['p_value'])}.",
    ]
    smallest = paired.get("smallest_difference")
    floor = f"no test shows fewer than {paired['fewest_discordant']} items, all in one system's favour"
    shown = f"a difference of {smallest:.3f} would be shown with 80 % power, and " if smallest is not None else ""
    lines.append(f"What {summary['n']} items can show at 5 %: {shown}{floor}.")
    if "arithmetic" in summary:
        lines.append(_arithmetic_note(summary["arithmetic"]))
    if summary["seeds"]:
        gap = summary["seeds"]["difference"]
        lines.append(
            f"Over all sampling seeds (items as units): difference {gap['value']:+.3f} [{gap['low']:+.3f}, "
            f"{gap['high']:+.3f}], permutation p {p_shown(gap['p_value'])}. "
            "The tables above are those of the first seed."
        )
    lines += [told["note"] for told in summary["metadata"].get("tasks") or () if told.get("note")]
    lines += [f"Merge, {told}." for told in (summary["metadata"].get("merge") or {}).get("warnings", ())]
    unknown = (summary.get("overlap") or {}).get("not_recorded")
    if unknown:
        lines.append(not_recorded(unknown))
    if repeated := (summary.get("overlap") or {}).get("repeated"):
        lines.append(f"{repeated_items(repeated, summary['overlap']['asked'])}.")
    contamination = summary["metadata"].get("contamination")
    if contamination:
        lines.append(
            f"Contamination: of {contamination['test']} test questions {contamination['exact']} stand in the "
            f"{contamination['train']} training questions word for word, {contamination['numbers']} with other "
            f"numbers, {contamination['near']} nearly."
        )
    return lines


def _arithmetic_note(about: Mapping[str, Any]) -> str:
    gaps = [
        f"{about[key]['difference']:+.3f} against {label} (exact McNemar p {p_shown(about[key]['p_value'])})"
        for key, label in (("against_draft_verify", "draft–verify"), ("against_calculator", "the calculator alone"))
    ]
    return f"Draft–verify with arithmetic checked, same items: difference {', '.join(gaps)}."


def render_table(summary: Mapping[str, Any]) -> str:
    """The report as plain text with aligned columns, for a terminal."""
    above = [headline(summary)] if headline(summary) else []
    return "\n\n".join([*above, text_page(sections(summary), notes(summary)[len(above) :])])


def render_markdown(summary: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    picture = f"![families, reliability, risk and coverage, thresholds, attempts, latency]({PLOT_FILE})"
    parts = [markdown_page(TITLE, sections(summary), notes(summary)), picture + "\n"]
    if summary["metadata"]:
        shown = json.dumps(summary["metadata"], indent=2, ensure_ascii=False)
        parts.append(f"## Where the numbers come from\n\n```json\n{shown}\n```\n")
    return "\n".join(parts)


def write_report(
    folder: Path,
    records: Sequence[ItemRecord],
    k: int,
    metadata: Mapping[str, Any] | None = None,
    wall_seconds: Mapping[str, float] | None = None,
    seed: int = 0,
    check: str = "none",
) -> dict[str, Any]:
    """Write the report folder and return what report.json holds.

    An old report.json of other items is removed first and the new one written last, so that it is never beside items
    it was not made from. One of the same items stays until the new one is there: only it knows k and the metadata.
    """
    folder = Path(folder)
    records = annotated(records, check)
    summary = summarise_records(records, k, metadata, wall_seconds, seed, check)
    make_folder(folder)
    if not _has_items(folder, records):
        with suppress(FileNotFoundError):
            (folder / REPORT_FILE).unlink()
        write_items(folder / ITEMS_FILE, records)
    files.write_text(folder / MARKDOWN_FILE, render_markdown(summary))
    files.write_text(folder / HTML_FILE, render_html(TITLE, sections(summary), notes(summary), summary, records))
    plot_report(summary, folder / PLOT_FILE)
    names = [ITEMS_FILE, MARKDOWN_FILE, HTML_FILE, PLOT_FILE]
    summary["files"] = {name: files.sha256_file(folder / name) for name in names}
    files.write_json(folder / REPORT_FILE, summary)
    return summary


def _has_items(folder: Path, records: Sequence[ItemRecord]) -> bool:
    """Whether the folder's items are these records, to the byte."""
    path = folder / ITEMS_FILE
    return path.is_file() and files.read_bytes(path) == items_text(records).encode()


def report_folder(folder: Path) -> Path:
    """Where the report is: ``folder`` itself, its ``report``, or the folder of a ``report.json`` that was named.

    Raises:
        RsgwmError: no finished report at any of them.
    """
    if folder.name == REPORT_FILE and folder.is_file():
        return folder.parent
    for place in (folder, folder / "report"):
        if (place / REPORT_FILE).is_file():
            return place
    raise RsgwmError(f"{folder} holds no {REPORT_FILE}; give the folder of a finished rsgwm eval, run or demo")


def read_report(folder: Path) -> tuple[dict[str, Any], list[ItemRecord]]:
    """Summary and records of a finished report folder, or of the one in a recipe's run.

    Raises:
        RsgwmError: no finished report there, or items that are not those it was made from.
    """
    folder = report_folder(folder)
    summary = files.read_json_object(folder / REPORT_FILE)
    if problem := format_problem(summary, FORMAT, FORMAT_VERSION):
        raise RsgwmError(f"{folder / REPORT_FILE}: {problem}")
    if not isinstance(summary.get("k"), int) or not isinstance(summary.get("metadata"), dict):
        raise RsgwmError(f"{folder / REPORT_FILE} has no k or no metadata; evaluate again")
    return summary, read_items(folder / ITEMS_FILE)
