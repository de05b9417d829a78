"""Whether two frameworks computed the same, and where first they did not."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_rsgwm.converters.parity.trace import Logits, Trace, largest
from mlx_rsgwm.converters.peft.names import model_order
from mlx_rsgwm.core.dtypes import FLOATS
from mlx_rsgwm.core.errors import RsgwmError

NOISE = 4.0  # times the bare bases' disagreement: what rounding alone may do to a difference of two logits
SHARE = 0.01  # of the adapter's largest effect: a wrong scale, layer or module moves more than this
ROUNDINGS = 64.0  # how many roundings of a layer's largest output may separate the frameworks


def compare(ours: Logits, theirs: Logits, modules: int, tolerance: float) -> dict[str, Any]:
    """The verdict on two sets of logits, with every reason to fail in words.

    The effects must agree within ``NOISE`` times the bases' own disagreement plus ``SHARE`` of the effect, so that an
    adapter whose effect is smaller than ``tolerance`` still has to be applied, and applied right.

    Returns:
        ``passed``, ``failures``, ``max_abs_logit`` (with the adapter), ``base_max_abs_logit`` (without),
        ``max_abs_delta_logit`` (of the adapter's effects), ``effect_mlx`` and ``effect_torch``, ``modules``.
    """
    if ours.adapted.shape != theirs.adapted.shape:
        raise RsgwmError(
            f"MLX and torch give logits of shapes {ours.adapted.shape} and {theirs.adapted.shape}; "
            "their bases do not have the same vocabulary"
        )
    adapted = largest(ours.adapted - theirs.adapted)
    base = largest(ours.base - theirs.base)
    delta = largest((ours.adapted - ours.base) - (theirs.adapted - theirs.base))
    allowed = NOISE * base + SHARE * max(ours.effect, theirs.effect)
    failures = []
    if not adapted <= tolerance:
        failures.append(f"logits with the adapter differ by {adapted:.1e}, beyond {tolerance:.1e}")
    if not base <= tolerance:
        failures.append(f"logits of the bare base differ by {base:.1e}, beyond {tolerance:.1e}")
    if not delta <= allowed:
        failures.append(f"what the adapter changes differs by {delta:.1e}, beyond {allowed:.1e}")
    for side, logits in (("MLX", ours), ("torch", theirs)):
        if not logits.effect > 0:
            failures.append(f"the adapter changes nothing in {side}")
        if logits.modules != modules:
            failures.append(f"{side} adapted {logits.modules} modules, the adapter has {modules}")
    return {
        "passed": not failures,
        "failures": failures,
        "max_abs_logit": adapted,
        "base_max_abs_logit": base,
        "max_abs_delta_logit": delta,
        "effect_mlx": ours.effect,
        "effect_torch": theirs.effect,
        "modules": modules,
        "tolerance": tolerance,
    }


def first_difference(ours: Trace, theirs: Trace, dtype: str, base_differs: bool) -> dict[str, Any] | None:
    """The first layer, in the model's order, that computes something else: a block of a base that differs, else an
    adapted layer on the same input. ``difference`` and ``allowed`` are of its output's values.
    """
    if base_differs:
        for index, (one, other) in enumerate(zip(ours.blocks, theirs.blocks, strict=False)):
            difference, allowed = largest(one - other), 1e-3 * largest(one)
            if not difference <= allowed:
                layer = f"block {index} of the bare base"
                return {"layer": layer, "difference": difference, "allowed": allowed}
    for module in sorted(ours.probes, key=model_order):
        probe, other_probe = ours.probes[module], theirs.probes.get(module)
        there = other_probe.added if other_probe is not None else np.zeros_like(probe.added)
        allowed = SHARE * largest(probe.added) + ROUNDINGS * FLOATS[dtype].epsilon * probe.size
        difference = largest(probe.added - there)
        if not difference <= allowed:
            return {"layer": module, "difference": difference, "allowed": allowed}
    return None


def compare_continuations(ours: Trace, theirs: Trace, tie: float) -> dict[str, Any]:
    """How far greedy continuations agree; another token is a failure unless MLX's lead for its own is below ``tie``."""
    agree, total, failures = 0, 0, []
    for index, (mine, other) in enumerate(zip(ours.continuations, theirs.continuations, strict=True)):
        total += len(mine)
        apart = next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), None)
        agree += len(mine) if apart is None else apart
        if apart is not None and not ours.margins[index][apart] <= tie:
            failures.append(f"greedy continuation {index + 1} differs at token {apart + 1}")
    return {"tokens": total, "agree": agree, "failures": failures}
