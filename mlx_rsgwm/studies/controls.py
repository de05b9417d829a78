"""What draft–verify must beat: other ways to spend the same tokens, other verifiers, other adapters.

All ways of choosing among drafts see the same drafts of the merged drafter. Each becomes a list of records "as that
loop would have left them", so that one set of metrics, tests and tokens applies to all. Equal budget means: a control
may spend, over the items so far, as many tokens per item as draft–verify spent on average, drafted or drafted and
verified; it draws whole drafts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.tables import ABSENT, show, show_difference
from mlx_rsgwm.evaluation import calculator_systems, metrics
from mlx_rsgwm.evaluation.records import ItemRecord, by_item, by_seed, replay
from mlx_rsgwm.evaluation.report.comparison import false_accept_rate
from mlx_rsgwm.evaluation.report.summary import correct_matrix, json_value, spread
from mlx_rsgwm.evaluation.stats.intervals import bootstrapped, share
from mlx_rsgwm.evaluation.stats.paired import holm, mcnemar, mean_difference, paired_bootstrap, smallest_difference

REFERENCE = "draft–verify"
CALCULATOR = "calculator"
BEYOND = 2.0  # a threshold that no score in [0, 1] reaches: the best-scored draft is returned


@dataclass(frozen=True)
class System:
    """One way of answering: its records, whether it accepts or refuses, and how it is read.

    ``mode`` is ``drafter`` where the first draft is the answer. ``accepts`` is False where acceptance means nothing
    (a vote, a single draft). ``note`` says what it is. ``calculated``: it looks at the drafts' arithmetic; such systems
    are a family of their own in the correction of p-values, so that the others keep theirs.
    """

    name: str
    note: str
    records: tuple[ItemRecord, ...]
    mode: metrics.Mode = "draft_verify"
    accepts: bool = False
    calculated: bool = False


@dataclass(frozen=True)
class LoopRule:
    """A score and a threshold, both chosen on calibration questions."""

    score: str
    threshold: float


def systems_on_drafts(
    records: Sequence[ItemRecord], k: int, rules: Mapping[str, LoopRule], check: str = "none"
) -> list[System]:
    """Every control that chooses among the recorded drafts of the merged drafter.

    Args:
        records: all seeds; every item with at least ``k`` drafts and the scores the rules name.
        k: attempts of the loop.
        rules: ``verifier`` (the merged one: draft–verify itself), ``self`` (the drafter judges itself) and
            ``direct`` (a verifier trained on the pairs); only the first must be there.
        check: where it looks at some item, the systems with a calculator are added; all others stay as they are.
    """
    rule = rules["verifier"]
    reference = _replayed(records, rule, k)
    systems = [
        System("drafter once", "the first draft", tuple(records), "drafter"),
        System(REFERENCE, f"merged verifier, {rule.score} ≥ {rule.threshold:.3f}", tuple(reference), accepts=True),
    ]
    for name, label in (("self", "drafter + self-verify"), ("direct", "directly trained verifier")):
        if name in rules:
            note = f"{rules[name].score} ≥ {rules[name].threshold:.3f}"
            systems.append(System(label, note, tuple(_replayed(records, rules[name], k)), accepts=True))
    best = replace(rule, threshold=BEYOND)
    accepted = _random_accept(reference)
    systems += [
        System(f"best of {k}", f"all {k} drafts, the best {rule.score}", tuple(_replayed(records, best, k))),
        System(f"majority of {k}", f"all {k} drafts, the commonest answer", tuple(_vote(r, k) for r in records)),
        System("random accept", "accepts drafts at draft–verify's rate, by lot", tuple(accepted), accepts=True),
    ]
    for label, cost in (("drafted", 0.0), ("drafted + verified", 1.0)):
        voted = _budgeted_votes(records, reference, cost)
        note = f"as many drafts as draft–verify's {label} tokens pay for"
        systems.append(System(f"majority, equal {label} tokens", note, tuple(voted)))
    if any(calculator_systems.checks_by_gold(record, check) for record in records):
        systems += _calculated_systems(calculator_systems.annotated(records, check), k, rule)
    return systems


def _calculated_systems(records: Sequence[ItemRecord], k: int, rule: LoopRule) -> list[System]:
    """What refuses drafts that state a false equation: with the verifier, and without any."""
    loop = tuple(replay(record, rule.threshold, k, rule.score, "arithmetic") for record in records)
    best = tuple(replay(record, BEYOND, k, rule.score, "arithmetic") for record in records)
    first = tuple(calculator_systems.first_calculated(record, k) for record in records)
    votes = tuple(calculator_systems.majority_calculated(record, k) for record in records)
    note = "drafts without a false equation"
    return [
        System(f"{REFERENCE}, arithmetic checked", f"as {REFERENCE}, of {note}", loop, accepts=True, calculated=True),
        System(f"best of {k}, arithmetic checked", f"the best {rule.score} of {note}", best, calculated=True),
        System(CALCULATOR, f"the first of {k} {note}, no verifier", first, accepts=True, calculated=True),
        System(f"calculator, majority of {k}", f"the commonest answer of {note}", votes, calculated=True),
    ]


def paper_systems(records: Sequence[ItemRecord], k: int, rule: LoopRule) -> list[System]:
    """The paper's merge, alone and with its verifier, on the drafts of its own drafter."""
    loop = tuple(_replayed(records, rule, k))
    note = f"its own drafts, {rule.score} ≥ {rule.threshold:.3f}"
    return [
        System("drafter once, the paper's merge", "its first draft", tuple(records), "drafter"),
        System(f"{REFERENCE}, the paper's merge", note, loop, accepts=True),
    ]


def _replayed(records: Sequence[ItemRecord], rule: LoopRule, k: int) -> list[ItemRecord]:
    return [replay(record, rule.threshold, k, rule.score) for record in records]


def _vote(record: ItemRecord, k: int) -> ItemRecord:
    """The record of a majority vote over the first ``k`` drafts; a vote verifies nothing and accepts nothing."""
    if len(record.drafts) < k:
        raise RsgwmError(f"item {record.id}: a vote of {k} needs {k} drafts, found {len(record.drafts)}")
    chosen = metrics.majority_index(record.drafts[:k])
    return replace(record, score_name="", threshold=1.0, accepted=False, attempts=k, chosen=chosen, latency_ms=None)


def _budgeted_votes(
    records: Sequence[ItemRecord], reference: Sequence[ItemRecord], verified: float
) -> list[ItemRecord]:
    """Votes whose drafts cost, running over the items, no more than the reference's mean cost per item.

    Every item gets one draft at least, and at most those recorded. Items are taken in an order by hash, so that the
    change in the budget does not follow the order of the tasks.
    """
    mean = sum(r.drafted_tokens + verified * r.verified_tokens for r in reference) / len(reference)
    order = sorted(
        range(len(records)), key=lambda i: hashlib.sha256(f"{records[i].seed}/{records[i].id}".encode()).digest()
    )
    voted: dict[int, ItemRecord] = {}
    spent = 0.0
    for position, index in enumerate(order, 1):
        record, count = records[index], 1
        spent += record.drafts[0].tokens
        while count < len(record.drafts) and spent + record.drafts[count].tokens <= mean * position:
            spent += record.drafts[count].tokens
            count += 1
        voted[index] = _vote(record, count)
    return [voted[index] for index in range(len(records))]


def _random_accept(reference: Sequence[ItemRecord]) -> list[ItemRecord]:
    """The loop with a verifier that accepts a draft by lot, as often as the reference accepted one it looked at.

    A draft nobody accepted is returned by lot too (its lot is its score).
    """
    looked = sum(record.attempts for record in reference)
    rate = sum(record.accepted for record in reference) / looked
    k = max(record.attempts for record in reference)
    replayed = []
    for record in reference:
        drafts = tuple(
            replace(draft, scores={**draft.scores, "random": _lot(record, number)})
            for number, draft in enumerate(record.drafts)
        )
        replayed.append(replay(replace(record, drafts=drafts), 1 - rate, k, "random"))
    return replayed


def _lot(record: ItemRecord, number: int) -> float:
    digest = hashlib.sha256(f"random accept/{record.seed}/{record.id}/{number}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def summarise_controls(systems: Sequence[System], k: int, seed: int = 0) -> dict[str, Any]:
    """Per system: rates over all seeds with intervals over items, per-seed tuples, tokens, and the test against ours.

    The test is McNemar's on the first seed, and a sign-flip permutation test of the mean over seeds with items as
    units; Holm corrects each over all systems of a family (with a calculator and without).
    """
    reference = next(system for system in systems if system.name == REFERENCE)
    reference_by_seed = by_seed(reference.records)
    ceiling = {s: metrics.any_of_k(rows, k) for s, rows in reference_by_seed.items()}
    rows = [_system_row(system, reference_by_seed, reference, seed) for system in systems]
    families = [[row for row, system in zip(rows, systems, strict=True) if system.calculated == of] for of in (0, 1)]
    for key, family in product(("mcnemar_p", "p_value"), families):
        others = [row for row in family if row.get(key) is not None]
        for row, corrected in zip(others, holm([row[key] for row in others]), strict=True):
            row[f"{key}_holm"] = corrected
    _add_over_calculator(rows, systems, seed)
    first = {s: metrics.table(r, "drafter").accuracy.value for s, r in reference_by_seed.items()}
    loop = {s: metrics.table(r, "draft_verify").accuracy.value for s, r in reference_by_seed.items()}
    closed = [metrics.gap_closed(loop[s], first[s], c.value if c else None) for s, c in ceiling.items()]
    return {
        "k": k,
        "seeds": list(reference_by_seed),
        "n": len(next(iter(reference_by_seed.values()))),
        "any_of_k": {"values": [json_value(rate) for rate in ceiling.values()]},
        "gap_closed": spread(closed),
        "false_accepts_against_self": _far_drop(systems, seed),
        "systems": rows,
    }


def _system_row(
    system: System, reference_rows: Mapping[int, Sequence[ItemRecord]], reference: System, seed: int
) -> dict[str, Any]:
    seeds = by_seed(system.records)
    tables = [metrics.table(rows, system.mode) for rows in seeds.values()]
    finals = [metrics.final(record, system.mode) for record in system.records]
    ids = [record.id for record in system.records]
    right = [draft.correct for draft in finals]
    shares = {
        "accuracy": right,
        "wrong_rate": [draft.status == "answer" and not draft.correct for draft in finals],
        "no_answer_rate": [draft.status == "no_answer" for draft in finals],
        "cut_off_rate": [draft.status == "cut_off" for draft in finals],
    }
    row: dict[str, Any] = {"name": system.name, "note": system.note}
    for name, flags in shares.items():
        row[name] = json_value(_over_items(flags, ids, seed))
        row[f"{name}_seeds"] = spread([getattr(table, name).value for table in tables])
    for name in ("accept_rate", "false_accept_rate"):
        row[name] = None
        if system.accepts:
            accepted = [not record.returned.correct for record in system.records if record.accepted]
            accepted_ids = [record.id for record in system.records if record.accepted]
            flags, of = (
                (accepted, accepted_ids) if name == "false_accept_rate" else ([r.accepted for r in system.records], ids)
            )
            row[name] = json_value(_over_items(flags, of, seed)) if flags else None
            row[f"{name}_seeds"] = spread([rate.value if (rate := getattr(table, name)) else None for table in tables])
    alone = system.mode == "drafter"
    count = len(system.records)
    row["attempts"] = 1.0 if alone else sum(record.attempts for record in system.records) / count
    row["tokens_drafted"] = sum(r.first.tokens if alone else r.drafted_tokens for r in system.records) / count
    row["tokens_verified"] = 0.0 if alone else sum(r.verified_tokens for r in system.records) / count
    if system.name != REFERENCE and set(seeds) == set(reference_rows):
        first, second = correct_matrix(seeds, system.mode), correct_matrix(reference_rows, reference.mode)
        test = mcnemar([bool(flag) for flag in first[:, 0]], [bool(flag) for flag in second[:, 0]])
        gap = mean_difference(first, second, seed=seed)
        row |= {"difference": gap.to_dict(), "p_value": gap.p_value, "mcnemar_p": test.p_value}
        row["smallest_difference"] = smallest_difference(test.n, (test.only_first + test.only_second) / test.n)
    return row


def _add_over_calculator(rows: Sequence[dict[str, Any]], systems: Sequence[System], seed: int) -> None:
    """To the systems that look at arithmetic: what they add to a calculator without a verifier."""
    by_name = {system.name: by_seed(system.records) for system in systems if system.calculated}
    control = by_name.get(CALCULATOR)
    if control is None:
        return
    right = correct_matrix(control, "draft_verify")
    for row in rows:
        if row["name"] in by_name and row["name"] != CALCULATOR:
            matrix = correct_matrix(by_name[row["name"]], "draft_verify")
            row["over_calculator"] = mean_difference(right, matrix, seed=seed).to_dict()


def _over_items(flags: Sequence[bool], ids: Sequence[str], seed: int) -> Any:
    """Share of flags over all seeds; with one draft per item Wilson's interval, else a bootstrap over items."""
    if len(set(ids)) == len(ids):
        return share(sum(flags), len(flags))
    values = np.asarray(flags, dtype=np.float64)
    return bootstrapped(lambda rows: float(values[rows].mean()), ids, seed=seed)


def _far_drop(systems: Sequence[System], seed: int) -> dict[str, Any] | None:
    """False-accept rate of draft–verify minus that of self-verification: the paper's second headline."""
    known = {system.name: system for system in systems}
    if "drafter + self-verify" not in known:
        return None
    columns = [list(by_item(known[name].records).values()) for name in ("drafter + self-verify", REFERENCE)]
    drop = paired_bootstrap(columns[0], columns[1], false_accept_rate, seed=seed)
    rates = [false_accept_rate(column) for column in columns]
    if drop is None or rates[0] is None or rates[1] is None:
        return None
    return {
        **drop.to_dict(),
        "self": rates[0],
        "ours": rates[1],
        "relative": rates[1] / rates[0] - 1 if rates[0] else None,
    }


def control_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The table of all systems, first row its head."""
    rows = [[
        "system", "accuracy", "per seed", "false accepts", "accepts", "no answer", "cut off",
        "drafted", "verified", "ours minus it", "p (Holm)",
    ]]  # fmt: skip
    for row in summary["systems"]:
        seeds = ", ".join(f"{value:.3f}" for value in row["accuracy_seeds"]["values"])
        gap, p_value = row.get("difference"), row.get("p_value_holm")
        rows.append([
            row["name"], show(row["accuracy"]), f"({seeds})",
            show(row["false_accept_rate"]), show(row["accept_rate"]),
            f"{row['no_answer_rate']['value']:.3f}", f"{row['cut_off_rate']['value']:.3f}",
            f"{row['tokens_drafted']:.1f}", f"{row['tokens_verified']:.1f}",
            "" if gap is None else show_difference(gap),
            "" if p_value is None else f"{p_value:.4f}",
        ])  # fmt: skip
    return rows


def control_notes(summary: Mapping[str, Any]) -> list[str]:
    """What the table means, and the two headlines with their truth."""
    closed = summary["gap_closed"]
    shown = ", ".join(ABSENT if value is None else f"{value:.2f}" for value in closed["values"])
    middle = ABSENT if closed["median"] is None else f"{closed['median']:.2f}"
    ceiling = ", ".join(f"{rate['value']:.3f}" for rate in summary["any_of_k"]["values"] if rate)
    notes = [
        f"{summary['n']} items, K = {summary['k']}, sampling seeds {', '.join(map(str, summary['seeds']))}; shares are "
        "over all seeds with 95 % bootstrap intervals over items (one seed: Wilson), tokens are means per item.",
        f"Any of K drafts right (the ceiling): {ceiling}. Share of that gap closed by draft–verify: {shown}; median "
        f"{middle}.",
        "Differences are draft–verify minus the system, items as units over all seeds; p by sign-flip permutation, "
        "corrected by Holm over the systems.",
    ]
    for row in summary["systems"]:
        if gap := row.get("over_calculator"):
            shown = show_difference(gap)
            notes.append(f"{row['name']} minus the calculator without a verifier: {shown}, p = {gap['p_value']:.4f}.")
    drop = summary["false_accepts_against_self"]
    if drop:
        relative = "" if drop["relative"] is None else f" ({drop['relative']:+.0%})"
        notes.append(
            f"False accepts: {drop['self']:.3f} when the drafter verifies itself, {drop['ours']:.3f} with the verifier"
            f"{relative}; difference {drop['value']:+.3f} [{drop['low']:+.3f}, {drop['high']:+.3f}]."
        )
    return notes
