"""Two runs on the same items: tests and intervals of every rate's difference, corrected for their number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.tables import ABSENT, show_difference
from mlx_rsgwm.evaluation.metrics import Mode, final
from mlx_rsgwm.evaluation.records import ItemRecord, by_item, by_seed
from mlx_rsgwm.evaluation.stats.paired import (
    fewest_discordant,
    holm,
    mcnemar,
    mean_difference,
    paired_bootstrap,
    smallest_difference,
)

MODES: tuple[Mode, ...] = ("drafter", "draft_verify")
FLAGS: dict[str, Callable[[ItemRecord, Mode], bool]] = {
    "accuracy": lambda record, mode: final(record, mode).correct,
    "wrong_rate": lambda record, mode: final(record, mode).status == "answer" and not final(record, mode).correct,
    "no_answer_rate": lambda record, mode: final(record, mode).status == "no_answer",
    "cut_off_rate": lambda record, mode: final(record, mode).status == "cut_off",
    "accept_rate": lambda record, mode: mode == "draft_verify" and record.accepted,
}


def parse_modes(text: str) -> tuple[Mode, Mode]:
    """``drafter``, ``draft_verify``, or one for each run: ``drafter,draft_verify``."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 2 or any(part not in MODES for part in parts):
        raise RsgwmError(f"--of must be {', '.join(MODES)}, or two of them with a comma between, found {text!r}")
    first, second = (mode for part in (parts * 2 if len(parts) == 1 else parts) for mode in MODES if mode == part)
    return first, second


def compare_runs(
    first: Sequence[ItemRecord], second: Sequence[ItemRecord], modes: str, names: tuple[str, str], seed: int = 0
) -> dict[str, Any]:
    """Differences (second minus first) on the items both hold, over all their sampling seeds.

    Items are matched by id, and must ask the same question with the same gold answer. McNemar's exact test takes the
    first seeds; interval and permutation test take the mean over each run's seeds, with items as units. Holm corrects
    the p-values over the rates.

    Raises:
        RsgwmError: no item in common, or items of one id that differ.
    """
    mode_of = parse_modes(modes)
    runs = [by_item(first), by_item(second)]
    common = [name for name in runs[0] if name in runs[1]]
    if not common:
        raise RsgwmError(f"{names[0]} and {names[1]} have no item in common")
    for name in common:
        item, other = runs[0][name][0], runs[1][name][0]
        if (item.question, item.gold) != (other.question, other.gold):
            raise RsgwmError(
                f"item {name!r} asks something else in {names[1]} than in {names[0]}; compare runs of one slice"
            )
    rates: dict[str, Any] = {}
    for rate, flag in FLAGS.items():
        if rate == "accept_rate" and "drafter" in mode_of:
            continue
        table = [
            [[flag(record, mode) for record in run[name]] for name in common]
            for run, mode in zip(runs, mode_of, strict=True)
        ]
        means = [np.asarray([np.mean(row) for row in column], dtype=np.float64) for column in table]
        test = mcnemar(*([row[0] for row in column] for column in table))
        discordant = (test.only_first + test.only_second) / test.n
        rates[rate] = {
            "first": float(means[0].mean()),
            "second": float(means[1].mean()),
            "mcnemar": test.to_dict(),
            "difference": mean_difference(means[0], means[1], seed=seed).to_dict(),
            "smallest_difference": smallest_difference(test.n, discordant),
        }
    for rate, corrected in zip(rates, holm([row["mcnemar"]["p_value"] for row in rates.values()]), strict=True):
        rates[rate]["mcnemar_p_holm"] = corrected
    far = None
    if mode_of == ("draft_verify", "draft_verify"):
        columns = [[run[name] for name in common] for run in runs]
        gap = paired_bootstrap(columns[0], columns[1], false_accept_rate, seed=seed)
        far = gap and {"first": false_accept_rate(columns[0]), "second": false_accept_rate(columns[1]), **gap.to_dict()}
    return {
        "runs": list(names),
        "of": list(mode_of),
        "n": len(common),
        "left_out": [len(runs[0]) - len(common), len(runs[1]) - len(common)],
        "seeds": [list(by_seed(records)) for records in (first, second)],
        "rates": rates,
        "false_accept_rate": far,
        "fewest_discordant": fewest_discordant(),
    }


def false_accept_rate(items: Sequence[Sequence[ItemRecord]]) -> float | None:
    """Accepted and wrong over accepted, over all seeds of the items; None when nothing was accepted."""
    accepted = [record for rows in items for record in rows if record.accepted]
    return sum(not record.returned.correct for record in accepted) / len(accepted) if accepted else None


def comparison_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """One row per rate, first row the head."""
    rows = [["", "A", "B", "B − A", "only A", "only B", "McNemar p", "Holm", "permutation p", "shown from"]]
    for rate, row in comparison["rates"].items():
        gap, test, smallest = row["difference"], row["mcnemar"], row["smallest_difference"]
        rows.append([
            rate.replace("_", " "), f"{row['first']:.3f}", f"{row['second']:.3f}",
            show_difference(gap),
            str(test["only_first"]), str(test["only_second"]), f"{test['p_value']:.4f}",
            f"{row['mcnemar_p_holm']:.4f}", f"{gap['p_value']:.4f}", ABSENT if smallest is None else f"{smallest:.3f}",
        ])  # fmt: skip
    far = comparison["false_accept_rate"]
    if far:
        rates = [f"{far[name]:.3f}" for name in ("first", "second")]
        rows.append(["false accept rate", *rates, show_difference(far), *[""] * 6])
    return rows


def comparison_notes(comparison: Mapping[str, Any]) -> list[str]:
    """What was compared and how far it can be trusted."""
    seeds = [", ".join(map(str, run)) for run in comparison["seeds"]]
    left = (
        f"; {comparison['left_out'][0]} and {comparison['left_out'][1]} items only in one of them"
        if any(comparison["left_out"])
        else ""
    )
    return [
        f"A: {comparison['of'][0]} of {comparison['runs'][0]} (sampling seeds {seeds[0]}); B: {comparison['of'][1]} of "
        f"{comparison['runs'][1]} ({seeds[1]}); {comparison['n']} items in common{left}.",
        "Intervals and permutation p: items as units, seeds averaged. McNemar: first seeds, exact; Holm over them. "
        "“Shown from”: the smallest difference found with 80 % power; fewer than "
        f"{comparison['fewest_discordant']} items, all in one run's favour, are never significant.",
    ]
