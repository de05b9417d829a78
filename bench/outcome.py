"""What the latency bench found, as files and beside another time: JSON, a Markdown table, a picture, a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files, tables
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.evaluation.report.figures import legend_below, write_figure

FORMAT = "mlx-rsgwm/bench-latency"
UNSTEADY = 0.10  # a quartile range above this share of the median
SIDES = {"mlx_ms": "MLX", "torch_ms": "torch"}
# Settings without which two results are of different works.
COMPARED = ("base", "prompt_tokens", "new_tokens", "rows", "pool", "rank")


def table(result: Mapping[str, Any]) -> str:
    """The rows as text for people."""
    rows = [["", "MLX ms", "torch ms", "torch/MLX", ""]]
    for row in result["rows"]:
        times = [f"{row[side]:.1f}" for side in SIDES]
        rows.append([row["work"], *times, f"{row['ratio']:.2f}", remark(row)])
    return "\n".join([tables.aligned(rows), describe(result), *choices(result)])


def choices(result: Mapping[str, Any]) -> list[str]:
    """A line on each work: what torch's search chose for each of its parts, and the times of what it tried."""
    lines = []
    for work, search in (result["machine"].get("torch_settings") or {}).items():
        chosen = list(dict.fromkeys(_setting(setting) for setting in search["chosen"]))
        tried = ", ".join(
            f"{_setting(setting)} {' + '.join(f'{value:.0f}' for value in setting['ms'])} ms"
            for setting in search["tried"]
        )
        lines.append(f"torch, {work}: {' then '.join(chosen)} (tried: {tried})")
    return lines


def _setting(setting: Mapping[str, Any]) -> str:
    parts = [f"{setting['threads']} threads", setting["attention"], setting["batching"]]
    return ", ".join(parts[: 2 if setting["batching"] == "one by one" else 3])


def remark(row: Mapping[str, Any]) -> str:
    """What a reader of one row must know: that MLX loses, that the times varied."""
    varied = [name for side, name in SIDES.items() if spread(row, side) > UNSTEADY]
    remarks = ["MLX is slower"] if row["ratio"] < 1 else []
    return "; ".join([*remarks, *([f"unsteady: {', '.join(varied)}"] if varied else [])])


def spread(row: Mapping[str, Any], side: str) -> float:
    """Quartile range over median."""
    low, high = row["iqr"][side]
    return float((high - low) / row[side])


def describe(result: Mapping[str, Any]) -> str:
    """One line on the machine, its state and the trials."""
    machine, state = result["machine"], result["conditions"]["after"]
    facts = [
        machine["dtype"],
        f"MLX on {machine['mlx_device']}",
        f"torch on {machine['torch_device']}, in processes of their own (BLAS of MLX: {machine.get('mlx_blas')})",
        f"{machine['chip']} ({machine.get('cores')} cores)",
        *([f"on {state['power']} power"] if state["power"] else []),
        *([f"thermal state {state['thermal']}"] if state["thermal"] else []),
        f"medians of {result['config']['trials']} trials",
    ]
    return ", ".join(facts)


def markdown(result: Mapping[str, Any]) -> str:
    """A table with quartiles, for a README or an issue."""
    rows = [["work", "MLX ms", "torch ms", "torch / MLX", ""]]
    for row in result["rows"]:
        cells = [f"{row[side]:.1f} ({row['iqr'][side][0]:.1f}–{row['iqr'][side][1]:.1f})" for side in SIDES]
        rows.append([row["work"], *cells, f"{row['ratio']:.2f}", remark(row)])
    lines = [tables.markdown(rows)]
    load, versions = result["load_ms"], result["machine"]["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("mlx", "mlx-lm", "torch", "peft"))
    lines += ["", f"{describe(result)}; in brackets the quartiles.", *(f"- {line}" for line in choices(result))]
    lines += [f"Loading: MLX {load['mlx']:.0f} ms, torch {load['torch']:.0f} ms. {named}.", ""]
    return "\n".join(lines)


def save_outcome(result: Mapping[str, Any], path: Path) -> list[Path]:
    """Write ``path`` (JSON) and beside it the table (.md) and the picture (.png)."""
    if path.suffix != ".json":
        raise RsgwmError(f"--out {path}: expected a name that ends in .json; the table and the picture go beside it")
    make_folder(path.parent)
    written = [path.with_suffix(".md"), path.with_suffix(".png"), path]
    files.write_text(written[0], markdown(result))
    plot(result, written[1])
    files.write_json(path, {"format": FORMAT, **result})
    return written


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Bars of both sides on a logarithmic axis, with quartiles and the ratio; PNG or SVG."""
    write_figure(path, partial(_draw, result=result), (9, 1.3 + 0.6 * len(result["rows"])), dpi=120)


def _draw(figure: Any, result: Mapping[str, Any]) -> None:
    rows, axes = list(result["rows"])[::-1], figure.subplots()
    for offset, (side, label) in zip((0.2, -0.2), SIDES.items(), strict=True):
        values = [row[side] for row in rows]
        errors = [
            [row[side] - row["iqr"][side][0] for row in rows],
            [row["iqr"][side][1] - row[side] for row in rows],
        ]
        places = [index + offset for index in range(len(rows))]
        axes.barh(places, values, height=0.38, xerr=errors, label=label, capsize=2)
    for index, row in enumerate(rows):
        highest = max(row["iqr"][side][1] for side in SIDES)
        axes.annotate(f" {row['ratio']:.2f}×", (highest, index), va="center")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set(xlabel="ms, median and quartiles; at the end torch / MLX")
    axes.set_yticks(range(len(rows)), [row["work"] for row in rows])
    axes.margins(x=0.15)
    axes.set_title(f"{result['machine']['chip']}, {result['machine']['dtype']}")
    legend_below(figure, axes)


def load_outcome(path: Path) -> dict[str, Any]:
    """A result that :func:`save_outcome` wrote.

    Raises:
        RsgwmError: no such file, or another one.
    """
    result = files.read_json_object(path)
    if result.get("format") != FORMAT:
        raise RsgwmError(f"{path} is not a result of rsgwm bench latency")
    parts = {"rows": list, "machine": dict, "config": dict}
    raise_problems(
        str(path), [f"{name} is missing" for name, kind in parts.items() if not isinstance(result.get(name), kind)]
    )
    try:
        for row in result["rows"]:
            numbers = [row["ratio"], *(value for side in SIDES for value in (row[side], *row["iqr"][side]))]
            if not all(isinstance(value, (int, float)) and value > 0 for value in numbers) or len(numbers) != 7:
                raise ValueError(f"{row['work']!r} has a time that is none")
    except (KeyError, TypeError, ValueError) as error:
        raise RsgwmError(f"{path} has a row that is damaged ({error}); measure again") from None
    return result


def compare(before: Mapping[str, Any], after: Mapping[str, Any], anyway: bool = False) -> dict[str, Any]:
    """Every work of both results: ``{work, side, before_ms, after_ms, ratio, differs}``, and those in one only.

    ``ratio`` is before over after, above 1 where it became faster; ``differs`` where the quartile ranges do not meet.

    Raises:
        RsgwmError: the results are of different works or dtypes, unless ``anyway``.
    """
    settings = [(name, before["config"].get(name), after["config"].get(name)) for name in COMPARED]
    settings.append(("dtype", before["machine"].get("dtype"), after["machine"].get("dtype")))
    differing = [f"{name} is {new!r} there, {old!r} here" for name, old, new in settings if old != new]
    if not anyway:
        raise_problems("the results are not of the same work (--anyway compares them)", differing)
    olds, news = ({row["work"]: row for row in result["rows"]} for result in (before, after))
    rows = []
    for work in (work for work in olds if work in news):
        for side, name in SIDES.items():
            old, new = olds[work], news[work]
            (low, high), (new_low, new_high) = old["iqr"][side], new["iqr"][side]
            rows.append(
                {
                    "work": work,
                    "side": name,
                    "before_ms": old[side],
                    "after_ms": new[side],
                    "ratio": round(old[side] / new[side], 3),
                    "differs": high < new_low or new_high < low,
                }
            )
    return {
        "rows": rows,
        "only_before": [work for work in olds if work not in news],
        "only_after": [work for work in news if work not in olds],
        "settings": differing,
    }


def _spread_note(row: Mapping[str, Any]) -> str:
    return "" if row["differs"] else "within the spread"


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """A comparison as text for people."""
    rows = [["", "", "before ms", "after ms", "faster", ""]]
    for row in comparison["rows"]:
        times = [f"{row[name]:.1f}" for name in ("before_ms", "after_ms")]
        rows.append([row["work"], row["side"], *times, f"{row['ratio']:.2f}×", _spread_note(row)])
    lines = [tables.aligned(rows)]
    for name, label in (("only_before", "only before"), ("only_after", "only after")):
        lines += [f"{label}: {', '.join(comparison[name])}"] if comparison[name] else []
    return "\n".join([*lines, *comparison["settings"]])
