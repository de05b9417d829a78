"""What a merge did to every module's update, measured while its factors are in memory; and when to refuse it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import mlx.core as mx

from mlx_rsgwm.errors import RsgwmError, raise_problems
from mlx_rsgwm.merging.lowrank import Truncated, cross, gram, owner_matrix, stack
from mlx_rsgwm.merging.module import Factors, Module

COLLAPSE_SHARE = 0.01
# Updates are stacked for their inner products until their ranks reach this sum.
STACKED_RANK = 128


def measure(module: Module, merged: Truncated) -> dict[str, mx.array]:
    """Inner products of one module's merged update with its T sources and their mean, and what the method noted.

    Arrays, not yet evaluated: ``square`` ‖merged‖², ``squares`` (T,), ``dots`` (T,), ``mean_square`` ‖mean of the
    sources‖², ``whole`` and ``discarded`` (before truncation, and lost by it). Time is linear in T.
    """
    updates, factors = module.factors, merged.factors
    if sum(one.rank for one in updates) + factors.rank <= STACKED_RANK:
        products = gram((*updates, factors))  # one stack for everything
        square, squares, dots = products[-1, -1], mx.diag(products[:-1, :-1]), products[-1, :-1]
        square_of_sum = products[:-1, :-1].sum()
    else:
        squares, square_of_sum = _squares(updates)
        square, dots = cross(factors, factors), _dots(factors, updates)
    return {
        "square": square,
        "squares": squares,
        "dots": dots,
        "mean_square": square_of_sum / len(updates) ** 2,
        "whole": merged.square,
        "discarded": merged.discarded,
        **{f"note/{name}": value for name, value in module.notes.items()},
    }


def _squares(updates: Sequence[Factors]) -> tuple[mx.array, mx.array]:
    """‖ΔW_t‖² of every update, (T,), and ‖Σ_t ΔW_t‖², by whichever takes less time."""
    rows, columns = updates[0].a.shape[0], updates[0].b.shape[1]
    # Of a sum every product is taken; a pair is taken once, but the later of its stacks is made anew.
    if sum(one.rank for one in updates) * (rows + columns) < 3 * rows * columns:
        return _squares_by_pairs(updates)
    return _squares_by_sum(updates)


def _squares_by_pairs(updates: Sequence[Factors]) -> tuple[mx.array, mx.array]:
    squares, whole = [], mx.array(0.0)
    for index, (some, owners) in enumerate(_stacks(updates)):
        products = _products(some, some)
        squares.append(((products @ owners) * owners).sum(axis=0))
        whole = whole + products.sum()
        for later, _ in islice(_stacks(updates), index + 1, None):
            whole = whole + 2 * _products(some, later).sum()
            mx.eval(whole)  # before the next stack is made
    return mx.concatenate(squares), whole


def _squares_by_sum(updates: Sequence[Factors]) -> tuple[mx.array, mx.array]:
    squares, total = [], mx.zeros((updates[0].a.shape[0], updates[0].b.shape[1]))
    for some, owners in _stacks(updates):
        squares.append(((_products(some, some) @ owners) * owners).sum(axis=0))
        total = mx.addmm(total, some.a, some.b)
        mx.eval(squares, total)  # before the next stack is made
    flat = total.reshape(-1)
    return mx.concatenate(squares), flat @ flat


def _dots(merged: Factors, updates: Sequence[Factors]) -> mx.array:
    """(T,): inner products of the merged update with every other."""
    dots = mx.zeros((0,))
    for some, owners in _stacks(updates):
        mx.eval(dots)  # before the next stack is made
        dots = mx.concatenate([dots, _products(merged, some).sum(axis=0) @ owners])
    return dots


def _stacks(updates: Sequence[Factors]) -> Iterator[tuple[Factors, mx.array]]:
    """Some updates after the others stacked, so that never all are in memory twice, with their owner matrix."""
    step = max(1, STACKED_RANK // max(one.rank for one in updates))
    for start in range(0, len(updates), step):
        some = updates[start : start + step]
        yield stack(some), owner_matrix(tuple(one.rank for one in some))


def _products(first: Factors, second: Factors) -> mx.array:
    """(r₁, r₂): inner products of the rank-1 parts of one update with those of the other."""
    return (first.a.T @ second.a) * (first.b @ second.b.T)


def diagnosis(measured: Mapping[str, Mapping[str, mx.array]], labels: Sequence[str]) -> dict[str, Any]:
    """The manifest's ``diagnosis``: one object per module and one over all.

    ``norm`` and ``source_norms`` ‖ΔW‖_F, ``norm_share`` norm over the sources' mean norm, ``cosines`` to each source,
    ``cosine_to_mean_product``, ``discarded`` the share of ‖·‖² that the output rank could not hold.

    Raises:
        RsgwmError: not finite, a source's module is zero, or a product below 1 % of its sources' mean norm (SPEC 6.14):
            such a merge silently is the base model.
    """
    plain: dict[str, dict[str, Any]] = {
        module: {name: value.tolist() for name, value in row.items()} for module, row in measured.items()
    }
    modules = {module: _summary(row) for module, row in plain.items()}
    _refuse(plain, modules, labels)
    keys = ("square", "mean_square", "whole", "discarded")
    overall: dict[str, Any] = {key: sum(row[key] for row in plain.values()) for key in keys}
    for key in ("squares", "dots"):
        overall[key] = [sum(column) for column in zip(*(row[key] for row in plain.values()), strict=True)]
    notes = {name for row in plain.values() for name in row if name.startswith("note/")}
    for name in notes:
        values = [row[name] for row in plain.values() if name in row]
        if isinstance(values[0], list):
            overall[name] = [sum(column) / len(column) for column in zip(*values, strict=True)]
        else:
            overall[name] = sum(values) / len(values)
    return {"overall": _summary(overall), "modules": modules}


def _summary(row: Mapping[str, Any]) -> dict[str, Any]:
    norm = max(row["square"], 0.0) ** 0.5
    norms = [max(square, 0.0) ** 0.5 for square in row["squares"]]
    present = [one for one in norms if one]
    mean = sum(present) / len(present) if present else 0.0
    count = len(norms)
    return {
        "norm": norm,
        "source_norms": norms,
        "norm_share": norm / mean if mean else 0.0,
        "cosines": [_cosine(dot, norm, one) for dot, one in zip(row["dots"], norms, strict=True)],
        "cosine_to_mean_product": _cosine(sum(row["dots"]) / count, norm, max(row["mean_square"], 0.0) ** 0.5),
        "discarded": min(max(row["discarded"], 0.0) / row["whole"], 1.0) if row["whole"] > 0 else 0.0,
        **{name.removeprefix("note/"): value for name, value in row.items() if name.startswith("note/")},
    }


def _cosine(dot: float, first: float, second: float) -> float:
    return dot / (first * second) if first and second else 0.0


def _refuse(plain: Mapping[str, Any], modules: Mapping[str, Any], labels: Sequence[str]) -> None:
    raise_problems(
        "the pool cannot be merged",
        [
            f"{module} of {label} has values that are not finite"
            for module, row in plain.items()
            for label, square in zip(labels, row["squares"], strict=True)
            if not abs(square) < float("inf")
        ],
    )
    raise_problems(
        "the merge is not finite",
        [f"{module} of the result" for module, row in plain.items() if not abs(row["square"]) < float("inf")],
    )
    zero = [
        f"{label} changes nothing: every lora_a @ lora_b of it is zero"
        for index, label in enumerate(labels)
        if not any(row["squares"][index] for row in plain.values())
    ]
    raise_problems("the pool cannot be merged", zero)
    dead = {module: row["norm_share"] for module, row in modules.items() if row["norm_share"] < COLLAPSE_SHARE}
    if dead:
        module, share = min(dead.items(), key=lambda item: item[1])
        raise RsgwmError(
            f"the merge collapses in {len(dead)} of {len(modules)} modules ({module}: the product keeps {share:.2%} "
            "of the sources' mean norm); use the quantile scope 'tensor', the reference 'init', a lower tau or another "
            "method"
        )
