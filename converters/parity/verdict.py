"""Whether two frameworks computed the same, and where first they did not."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_rsgwm.converters.parity.trace import Logits, Trace, largest_size
from mlx_rsgwm.converters.peft.names import model_order
from mlx_rsgwm.core.dtypes import FLOATS
from mlx_rsgwm.core.errors import RsgwmError

NOISE = 4.0  # times the bare bases' disagreement: what rounding alone may do to a difference of two logits
SHARE = 0.01  # of the adapter's largest effect: a wrong scale, layer or module moves more than this
ROUNDINGS = 64.0  # how many roundings of a layer's largest output may separate the frameworks


def compare_logits(mlx: Logits, torch: Logits, modules: int, tolerance: float) -> dict[str, Any]:
    """The verdict on two sets of logits, with every reason to fail in words.

    The effects must agree within ``NOISE`` times the bases' own disagreement plus ``SHARE`` of the effect, so that an
    adapter whose effect is smaller than ``tolerance`` still has to be applied, and applied right.

    Returns:
        ``passed``, ``failures``, ``max_abs_logit`` (with the adapter), ``base_max_abs_logit`` (without),
        ``max_abs_delta_logit`` (of the adapter's effects), ``effect_mlx`` and ``effect_torch``, ``modules``.
    """
    if mlx.adapted.shape != torch.adapted.shape:
        raise RsgwmError(
            f"MLX and torch give logits of shapes {mlx.adapted.shape} and {torch.adapted.shape}; "
            "their bases do not have the same vocabulary"
        )
    adapted = largest_size(mlx.adapted - torch.adapted)
    base = largest_size(mlx.base - torch.base)
    delta = largest_size((mlx.adapted - mlx.base) - (torch.adapted - torch.base))
    allowed = NOISE * base + SHARE * max(mlx.effect, torch.effect)
    failures = []
    if not adapted <= tolerance:
        failures.append(f"logits with the adapter differ by {adapted:.1e}, beyond {tolerance:.1e}")
    if not base <= tolerance:
        failures.append(f"logits of the bare base differ by {base:.1e}, beyond {tolerance:.1e}")
    if not delta <= allowed:
        failures.append(f"what the adapter changes differs by {delta:.1e}, beyond {allowed:.1e}")
    for side, logits in (("MLX", mlx), ("torch", torch)):
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
        "effect_mlx": mlx.effect,
        "effect_torch": torch.effect,
        "modules": modules,
        "tolerance": tolerance,
    }


def first_difference(mlx: Trace, torch: Trace, dtype: str, base_differs: bool) -> dict[str, Any] | None:
    """The first layer, in the model's order, that computes something else: a block of a base that differs, else an
    adapted layer on the same input. ``difference`` and ``allowed`` are of its output's values.
    """
    if base_differs:
        for index, (states, other) in enumerate(zip(mlx.blocks, torch.blocks, strict=False)):
            difference, allowed = largest_size(states - other), 1e-3 * largest_size(states)
            if not difference <= allowed:
                layer = f"block {index} of the bare base"
                return {"layer": layer, "difference": difference, "allowed": allowed}
    for module in sorted(mlx.probes, key=model_order):
        probe, other_probe = mlx.probes[module], torch.probes.get(module)
        there = other_probe.added if other_probe is not None else np.zeros_like(probe.added)
        allowed = SHARE * largest_size(probe.added) + ROUNDINGS * FLOATS[dtype].epsilon * probe.size
        difference = largest_size(probe.added - there)
        if not difference <= allowed:
            return {"layer": module, "difference": difference, "allowed": allowed}
    return None


def compare_continuations(mlx: Trace, torch: Trace, tie: float) -> dict[str, Any]:
    """How far greedy continuations agree; another token is a failure unless MLX's lead for its own is below ``tie``."""
    agree, total, failures = 0, 0, []
    for index, (mine, other) in enumerate(zip(mlx.continuations, torch.continuations, strict=True)):
        total += len(mine)
        apart = next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), None)
        agree += len(mine) if apart is None else apart
        if apart is not None and not mlx.margins[index][apart] <= tie:
            failures.append(f"greedy continuation {index + 1} differs at token {apart + 1}")
    return {"tokens": total, "agree": agree, "failures": failures}
