"""Settings of one training run; the defaults are the paper's (SPEC 8) where it states them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlx_rsgwm.adapter import LoraSpec
from mlx_rsgwm.errors import raise_problems
from mlx_rsgwm.settings import build

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class TrainConfig:
    """One run. ``alpha`` / ``rank`` is the scale of B·A; ``num_layers`` counts blocks from the last, -1 for all.

    ``init_seed`` seeds lora_a alone and is shared by a pool: factor-space merging is only meaningful for adapters that
    started from the same A (SPEC 6.13). ``seed`` seeds dropout and the order of the data.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    keys: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    num_layers: int = -1
    epochs: int = 2
    batch_size: int = 8
    learning_rate: float = 5e-4
    warmup: float = 0.05
    schedule: str = "linear"
    beta1: float = 0.9
    beta2: float = 0.999
    max_tokens: int = 1024
    seed: int = 42
    init_seed: int = 42

    def __post_init__(self) -> None:
        checks = {
            "rank": self.rank >= 1,
            "alpha": 0 < self.alpha < float("inf"),
            "dropout": 0 <= self.dropout < 1,
            "keys": len(self.keys) > 0,
            "num_layers": self.num_layers == -1 or self.num_layers >= 1,
            "epochs": self.epochs >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": 0 < self.learning_rate < 1,
            "warmup": 0 <= self.warmup < 1,
            "schedule": self.schedule in SCHEDULES,
            "beta1": 0 <= self.beta1 < 1,
            "beta2": 0 < self.beta2 < 1,
            "max_tokens": self.max_tokens >= 2,
        }
        raise_problems(
            "training config",
            [f"{name} = {getattr(self, name)!r} is out of range" for name, ok in checks.items() if not ok],
        )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def spec(self) -> LoraSpec:
        """What the adapter folder records."""
        return LoraSpec(self.rank, self.scale, self.dropout, self.keys, self.num_layers)

    def describe(self) -> dict[str, Any]:
        """JSON object of all settings."""
        return {**asdict(self), "keys": list(self.keys)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Settings from YAML or JSON; unknown keys and wrong types are refused by name."""
        return build(cls, values, "training config")
