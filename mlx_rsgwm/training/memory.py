"""What a run will need of the memory, estimated before the first step, and what it took."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_rsgwm.core.errors import RsgwmError, raise_problems

MOMENTS = 5  # of the parameters' size: Adam's two, and the importance of all, draft and verify


@dataclass(frozen=True)
class MemoryOptions:
    """Limits in gigabytes (10⁹ bytes), None for MLX's own: of MLX's cache of freed buffers and of wired memory.

    ``enforce`` refuses to start a run whose estimate exceeds what the device has.
    """

    cache_limit: float | None = None
    wired_limit: float | None = None
    enforce: bool = True

    def __post_init__(self) -> None:
        raise_problems(
            "memory options",
            [
                f"{name} = {value!r} is out of range"
                for name, value in (("cache_limit", self.cache_limit), ("wired_limit", self.wired_limit))
                if value is not None and not 0 <= value < 1e6
            ],
        )

    def apply(self) -> None:
        """Tell MLX the limits; wired memory is Metal's alone and elsewhere ignored."""
        if self.cache_limit is not None:
            mx.set_cache_limit(int(self.cache_limit * 1e9))
        if self.wired_limit is not None and mx.metal.is_available():
            mx.set_wired_limit(int(self.wired_limit * 1e9))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a step needs at its greatest: one batch of the longest rows, forward and backward."""

    weights: int
    adapter: int
    moments: int
    activations: int
    logits: int
    directions: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return self.weights + self.adapter + self.moments + self.activations + self.logits + self.directions

    def line(self) -> str:
        """For people."""
        parts = ", ".join(f"{name} {value / 1e6:.0f}" for name, value in asdict(self).items())
        return f"memory estimate {self.total / 1e6:.0f} MB ({parts})"


def estimate(
    model: Any,
    config: dict[str, Any],
    rows: int,
    length: int,
    trained: int,
    accumulate: int,
    recompute: bool,
    directions: int = 0,
    rounded: int = 0,
) -> MemoryEstimate:
    """Estimate from the model's ``config``, ``rows`` × ``length`` tokens a batch and ``trained`` positions in it.

    A block keeps for its backward pass about 12 arrays of the hidden size, 5 of the MLP's, and twice the attention
    scores where attention is not fused (the CPU); with ``recompute`` its input alone, and one block at a time the rest.
    Logits exist four times at their positions: product, float32, exponentials, gradient. ``directions``: bytes of the
    sums over inputs, which exist twice while a step's are added to them. ``rounded``: of weights kept beside their own.
    """
    text = {**config, **(config.get("text_config") or {})}
    size, trained_bytes = _nbytes(model.parameters()), _nbytes(model.trainable_parameters())
    hidden = int(text["hidden_size"])
    mlp = int(text.get("intermediate_size") or 4 * hidden)
    heads = int(text.get("num_attention_heads") or 1)
    item = _item_size(model)
    scores = 0 if mx.default_device() == mx.gpu else 2 * rows * heads * length * length
    block = item * (rows * length * (12 * hidden + 5 * mlp) + scores)
    activations = len(model.layers) * item * rows * length * hidden + block if recompute else len(model.layers) * block
    return MemoryEstimate(
        weights=size - trained_bytes + rounded,
        adapter=trained_bytes * (2 if accumulate == 1 else 3),  # and its gradient, and the sum of gradients
        moments=MOMENTS * trained_bytes,
        activations=activations,
        logits=trained * int(text["vocab_size"]) * (item + 12),
        directions=2 * directions,
    )


def device_limit() -> tuple[int, str]:
    """Bytes that MLX may use, and what says so."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"]), "Metal's recommended working set"
    limits = [(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "the machine's memory")]
    cgroup = Path("/sys/fs/cgroup/memory.max")
    allowed = cgroup.read_text().strip() if cgroup.is_file() else "max"
    if allowed.isdigit():
        limits.append((int(allowed), "this container's limit"))
    addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
    if addresses != resource.RLIM_INFINITY:
        limits.append((addresses, "ulimit -v"))
    return min(limits)


def check_estimate(estimate: MemoryEstimate, enforce: bool = True) -> str:
    """The estimate against the limit, as one line; advice when it is tight.

    Raises:
        RsgwmError: it does not fit and ``enforce`` is set.
    """
    limit, source = device_limit()
    line = f"{estimate.line()}, {source} {limit / 1e6:.0f} MB"
    if estimate.total <= 0.8 * limit:
        return line
    advice = "a smaller batch size with more accumulation, recompute (gradient checkpointing), a lower max_tokens"
    if estimate.weights > 0.5 * limit:
        advice = f"a quantised base (4-bit), {advice}"
    if estimate.total > limit and enforce:
        raise RsgwmError(f"{line}: the run does not fit; try {advice}, or skip this check with --ignore-memory")
    return f"{line}: tight; if it fails try {advice}"


def memory_now() -> dict[str, int]:
    """Bytes: MLX's active, cached and peak memory, and the process's greatest resident size."""
    footprint = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "active": mx.get_active_memory(),
        "cache": mx.get_cache_memory(),
        "peak": mx.get_peak_memory(),
        "process_peak": footprint if sys.platform == "darwin" else footprint * 1024,
    }


def memory_line() -> str:
    """:func:`memory_now` for people."""
    megabytes = {name: f"{value / 1e6:.0f}" for name, value in memory_now().items()}
    return (
        f"memory: active {megabytes['active']}, cache {megabytes['cache']}, peak {megabytes['peak']}, "
        f"process peak {megabytes['process_peak']} MB"
    )


def _item_size(model: nn.Module) -> int:
    """Bytes of one activation: those of the model's floating type."""
    flat: Any = tree_flatten(model.parameters())
    return min((value.itemsize for _, value in flat if mx.issubdtype(value.dtype, mx.floating)), default=4)


def _nbytes(parameters: Any) -> int:
    flat: Any = tree_flatten(parameters)
    return sum(value.nbytes for _, value in flat)
