"""What a merge did to every module's update, from the products of :mod:`measure`, and when to refuse or to warn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.merging.measure import MeasuredRow
from mlx_rsgwm.merging.options import MergeOptions

# Refused: a module below this share of its sources' mean norm; silently it would be the base model.
COLLAPSE_SHARE = 0.01
# Warned of: a result, or a module of it, of so many times the norm that its sources and weights allow; one so many
# times as large as its sources.
WARN_GROWTH, WARN_MODULE_GROWTH, WARN_SHARE = 2.0, 10.0, 10.0
# How far from 1 the sum of shares may be by rounding.
ROUNDING = 1e-3
# Beyond this norm float32 cannot hold the square.
LARGEST_NORM = 1.8e19
WARN_OUTPUTS = 0.5  # of an adapter's outputs, the squared error


@dataclass(frozen=True)
class Allowance:
    """The norm that the sources and weights of a module allow its result: what a sum or a mean of them never exceeds.

    Of a sum, ``factor`` Σ |w_t| ‖ΔW_t‖; of a mean, ``factor`` times the largest ‖ΔW_t‖ that has a weight.
    """

    weights: tuple[float, ...]
    as_sum: bool
    factor: float = 1.0

    def norm(self, norms: Sequence[float]) -> float:
        """From the T sources' norms."""
        if self.as_sum:
            return self.factor * sum(abs(weight) * norm for weight, norm in zip(self.weights, norms, strict=True))
        return self.factor * max(norm for weight, norm in zip(self.weights, norms, strict=True) if weight)

    def mean(self, row: Mapping[str, Any]) -> float:
        """The mean norm of a module's sources by these weights, or by the method's own shares where it notes them: what
        a result is far below only if it collapses, however unequal the sources are.
        """
        noted: Any = row.get("note/coefficients")
        known = isinstance(noted, list) and abs(sum(map(abs, noted)) - 1.0) < ROUNDING
        pairs = zip(noted if known else self.weights, _norms(row), strict=True)
        weighted = [(abs(weight), norm) for weight, norm in pairs if norm]
        total = sum(weight for weight, _ in weighted)
        return sum(weight * norm for weight, norm in weighted) / total if total else 0.0


def as_numbers(measured: Mapping[str, MeasuredRow]) -> dict[str, dict[str, Any]]:
    """What was measured of every module, its arrays as lists and numbers."""
    return {
        module: {name: value.tolist() if isinstance(value, mx.array) else value for name, value in row.items()}
        for module, row in measured.items()
    }


def refuse_unsound(
    rows: Mapping[str, Mapping[str, Any]],
    labels: Sequence[str],
    allowed: Mapping[str, Allowance],
    objections: Mapping[str, Mapping[str, mx.array]],
    options: MergeOptions,
    remedy: str,
) -> None:
    """Raise for a merge that nobody can want, by what was measured of every module (``rows``, :func:`as_numbers`).

    Raises:
        RsgwmError: a source or the result is beyond float32; an adapter changes nothing; the method has no answer
            between these adapters; a module below 1 % of its sources' mean norm (such a merge silently is the base
            model), or above ``options.largest`` times what is allowed (such a one is made of rounding errors).
    """
    _refuse_sources(rows, labels)
    refuse_objections(objections, options.method, remedy)
    raise_problems(
        f"the {options.method} merge is beyond float32, though its sources are not; give other weights, or {remedy}",
        [f"{module} of the result" for module, row in rows.items() if not abs(row["square"]) < float("inf")],
    )
    _refuse_size(rows, allowed, options, remedy)


def diagnosis(rows: Mapping[str, Mapping[str, Any]], allowed: Mapping[str, Allowance]) -> dict[str, Any]:
    """The manifest's ``diagnosis``, of rows that :func:`refuse_unsound` lets pass: one object per module, one over all.

    ``norm`` and ``source_norms`` ‖ΔW‖_F, ``norm_share`` norm over the sources' mean norm, ``growth`` norm over what its
    :class:`Allowance` allows, ``cosines`` to each source, ``cosine_to_mean_product``, ``discarded`` the share of ‖·‖²
    that the output rank could not hold.
    """
    allowances = {module: allowed[module].norm(_norms(row)) for module, row in rows.items()}
    modules = {module: _summary(row, allowances[module]) for module, row in rows.items()}
    keys = ("square", "mean_square", "discarded")
    overall: dict[str, Any] = {key: sum(row[key] for row in rows.values()) for key in keys}
    for key in ("squares", "dots"):
        overall[key] = [sum(column) for column in zip(*(row[key] for row in rows.values()), strict=True)]
    for name in dict.fromkeys(name for row in rows.values() for name in row if name.startswith("note/")):
        values = [row[name] for row in rows.values() if name in row]
        if isinstance(values[0], list):
            overall[name] = [sum(column) / len(column) for column in zip(*values, strict=True)]
        else:
            overall[name] = sum(values) / len(values)
    combined = sum(allowance**2 for allowance in allowances.values()) ** 0.5
    return {"overall": _summary(overall, combined), "modules": modules}


def warnings_of(diagnosed: Mapping[str, Any], weights: Sequence[float]) -> list[str]:
    """What a careful person would want to know of a merge with these ``weights`` that was not refused."""
    overall, warnings = diagnosed["overall"], []
    grown = {name: row["growth"] for name, row in diagnosed["modules"].items() if row["growth"] > WARN_MODULE_GROWTH}
    if overall["growth"] > WARN_GROWTH:
        warnings.append(
            f"the update is {overall['growth']:.1f} times as large as its sources and weights allow a mean or sum to be"
        )
    elif overall["norm_share"] > WARN_SHARE:
        warnings.append(
            f"the update is {overall['norm_share']:.1f} times as large as its sources' mean, by the weights"
        )
    if grown:
        worst = max(grown, key=lambda name: grown[name])
        warnings.append(
            f"{len(grown)} modules are above {WARN_MODULE_GROWTH:g} times that (e.g. {worst}, {grown[worst]:.1f})"
        )
    away = [name for name, row in diagnosed["modules"].items() if row["cosine_to_mean_product"] < 0]
    if away and min(weights, default=0) >= 0:
        warnings.append(f"{len(away)} modules point away from their sources' mean (e.g. {away[0]})")
    return warnings


def overwritten(names: Sequence[str], parameters: Mapping[str, Any], diagnosed: Mapping[str, Any]) -> list[str]:
    """Which adapters a merge that counts errors as they are gives up, for larger updates on the same inputs."""
    errors = diagnosed["overall"].get("output_errors")
    if parameters.get("balance") != "equal" or not errors:
        return []
    lost = [name for name, error in zip(names, errors, strict=True) if error > WARN_OUTPUTS]
    told = f"little is left of the outputs of {', '.join(lost)}, whose updates are small; balance=root keeps more"
    return [told] if lost else []


def _norms(row: Mapping[str, Any]) -> list[float]:
    return [max(square, 0.0) ** 0.5 for square in row["squares"]]


def _norm(row: Mapping[str, Any]) -> float:
    return float(max(row["square"], 0.0) ** 0.5)


def _summary(row: Mapping[str, Any], allowance: float) -> dict[str, Any]:
    norm, norms = _norm(row), _norms(row)
    discarded = max(row["discarded"], 0.0)
    present = [size for size in norms if size]
    mean = sum(present) / len(present) if present else 0.0
    count = len(norms)
    return {
        "norm": norm,
        "source_norms": norms,
        "norm_share": _ratio(norm, mean),
        "growth": _ratio(norm, allowance),
        "cosines": [_cosine(dot, norm, other_norm) for dot, other_norm in zip(row["dots"], norms, strict=True)],
        "cosine_to_mean_product": _cosine(sum(row["dots"]) / count, norm, max(row["mean_square"], 0.0) ** 0.5),
        "discarded": discarded / (norm**2 + discarded) if discarded else 0.0,
        **{name.removeprefix("note/"): value for name, value in row.items() if name.startswith("note/")},
    }


def _ratio(norm: float, of: float) -> float:
    """``norm / of``; 1 where all sources are zero and so is the result."""
    if of:
        return norm / of
    return float("inf") if norm else 1.0


def _cosine(dot: float, first: float, second: float) -> float:
    return dot / (first * second) if first and second else 0.0


def _refuse_sources(rows: Mapping[str, Any], labels: Sequence[str]) -> None:
    # An adapter whose values are not finite is named by the pool, which looks after any failure.
    raise_problems(
        "the pool cannot be merged",
        [
            f"{module} of {label} is too large for float32: its update's norm is above {LARGEST_NORM:g}"
            for module, row in rows.items()
            for label, square in zip(labels, row["squares"], strict=True)
            if not abs(square) < float("inf")
        ],
    )
    raise_problems(
        "the pool cannot be merged",
        [
            f"{label} changes nothing: every lora_a @ lora_b of it is zero, or too small for float32 (norm below 1e-19)"
            for index, label in enumerate(labels)
            if not any(row["squares"][index] for row in rows.values())
        ],
    )


def refuse_objections(objections: Mapping[str, Mapping[str, mx.array]], method: str, remedy: str) -> None:
    """Raise with what the method itself says against merging these adapters, and in which modules."""
    where: dict[str, list[str]] = {}
    for module, reasons in objections.items():
        for reason, holds in reasons.items():
            if holds.item():
                where.setdefault(reason, []).append(module)
    problems = [
        f"{reason}, in {len(modules)} of {len(objections)} modules (e.g. {modules[0]})"
        for reason, modules in where.items()
    ]
    raise_problems(f"{method} cannot merge these adapters ({remedy})", problems)


def _refuse_size(
    rows: Mapping[str, Mapping[str, Any]], allowed: Mapping[str, Allowance], options: MergeOptions, remedy: str
) -> None:
    # Where only adapters of weight 0 have an update, nothing is what should come out.
    means = {module: allowed[module].mean(row) for module, row in rows.items()}
    shares = {module: _norm(row) / means[module] for module, row in rows.items() if means[module]}
    dead = {module: share for module, share in shares.items() if share < COLLAPSE_SHARE}
    if dead:
        module, share = min(dead.items(), key=lambda item: item[1])
        raise RsgwmError(
            f"the merge collapses in {len(dead)} of {len(rows)} modules ({module}: the product keeps {share:.2%} "
            f"of the sources' mean norm); {remedy}"
        )
    growths = {module: _ratio(_norm(row), allowed[module].norm(_norms(row))) for module, row in rows.items()}
    grown = {module: growth for module, growth in growths.items() if growth > options.largest}
    if grown:
        module, growth = max(grown.items(), key=lambda item: item[1])
        raise RsgwmError(
            f"the merge blows up in {len(grown)} of {len(rows)} modules ({module}: {growth:.3g} times the norm that "
            f"its sources and weights allow, the limit is {options.largest:g}); {remedy}, or allow it (--largest)"
        )
