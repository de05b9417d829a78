"""Settings of one training run; the defaults are the paper's where it states them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.optimizers as optimizers

from mlx_rsgwm.core.config import build
from mlx_rsgwm.core.errors import raise_problems
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.models.adapter import LoraSpec
from mlx_rsgwm.models.quantisation import QuantFormat
from mlx_rsgwm.training.rounds import ACCUMULATE, FREEZE_A, Rounds
from mlx_rsgwm.training.schedule import RateSchedule

SCHEDULES = ("constant", "linear", "cosine")
FINE_TUNE_TYPES = ("lora", "dora")
OPTIMIZERS = ("adam", "adamw")
SELECTIONS = ("last", "best")
LONG_ROWS = ("drop", "cut")
ALL_LINEAR = ("all-linear",)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what one run computes. ``alpha`` / ``rank`` is the scale of B·A.

    ``keys`` are module names inside a block, or ``all-linear`` for every linear layer there. ``num_layers`` counts
    blocks from the last, -1 for all. ``init_seed`` seeds lora_a alone and is shared by a pool: factor-space merging is
    only meaningful for adapters that started from the same A. ``seed`` seeds dropout and the order of the
    data.

    One step takes ``accumulate`` batches of ``batch_size`` rows, weighted by their trained tokens, so that it equals a
    step with one batch of all their rows. ``steps`` above 0 ends the run there, else ``epochs`` does. ``clip`` is the
    greatest global norm of the gradient, 0 for no clipping. ``weight_decay`` is AdamW's, decoupled.
    ``validate_every`` scores the held-out rows that often; ``patience`` ends the run after that many of these scores
    without a new lowest; ``select`` keeps the last weights or those of the lowest score. ``long_rows`` says what
    becomes of rows above ``max_tokens``. ``recompute`` trades time for memory: blocks keep their inputs only (gradient
    checkpointing). ``lr_schedule``, one of mlx-lm's, decides the rates instead of ``schedule`` and ``warmup``. ``eps``
    and ``bias_correction`` are Adam's. ``directions`` is k of the sketches that are kept of the modules' inputs
    (:mod:`~mlx_rsgwm.training.directions`; 0 for none), of every nth token, n = ``directions_every``.
    ``rounds`` shares the steps out among rounds, between which a pool is merged. ``qat`` trains through the rounding to
    a format: every layer computes with the weight it would have there, base and update together.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    keys: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    num_layers: int = -1
    fine_tune_type: str = "lora"
    epochs: int = 2
    steps: int = 0
    batch_size: int = 8
    accumulate: int = 1
    optimizer: str = "adam"
    learning_rate: float = 5e-4
    warmup: float = 0.05
    schedule: str = "linear"
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 0.0
    max_tokens: int = 1024
    long_rows: str = "drop"
    recompute: bool = False
    validate_every: int = 0
    patience: int = 0
    select: str = "last"
    seed: int = DEFAULT_SEED
    init_seed: int = DEFAULT_SEED
    eps: float = 1e-8
    bias_correction: bool = True
    lr_schedule: RateSchedule | None = None
    directions: int = 64
    directions_every: int = 4
    rounds: Rounds | None = None
    qat: QuantFormat | None = None

    def __post_init__(self) -> None:
        checks = {
            "rank": self.rank >= 1,
            "alpha": 0 < self.alpha < float("inf"),
            "dropout": 0 <= self.dropout < 1,
            "keys": len(self.keys) > 0 and len(set(self.keys)) == len(self.keys),
            "num_layers": self.num_layers == -1 or self.num_layers >= 1,
            "fine_tune_type": self.fine_tune_type in FINE_TUNE_TYPES,
            "epochs": self.epochs >= 1,
            "steps": self.steps >= 0,
            "batch_size": self.batch_size >= 1,
            "accumulate": self.accumulate >= 1,
            "optimizer": self.optimizer in OPTIMIZERS,
            "learning_rate": 0 < self.learning_rate < 1,
            "warmup": 0 <= self.warmup < 1,
            "schedule": self.schedule in SCHEDULES,
            "beta1": 0 <= self.beta1 < 1,
            "beta2": 0 < self.beta2 < 1,
            "weight_decay": 0 <= self.weight_decay < float("inf"),
            "clip": 0 <= self.clip < float("inf"),
            "max_tokens": self.max_tokens >= 2,
            "long_rows": self.long_rows in LONG_ROWS,
            "validate_every": self.validate_every >= 0,
            "patience": self.patience >= 0,
            "select": self.select in SELECTIONS,
            "eps": 0 <= self.eps < 1,
            "directions": self.directions >= 0,
            "directions_every": self.directions_every >= 1,
            "seed": 0 <= self.seed < 2**32,
            "init_seed": 0 <= self.init_seed < 2**32,
        }
        problems = [f"{name} = {getattr(self, name)!r} is out of range" for name, ok in checks.items() if not ok]
        if self.weight_decay and self.optimizer == "adam":
            problems.append(f"weight_decay = {self.weight_decay!r} needs optimizer adamw, found adam")
        if self.lr_schedule and (self.schedule != "constant" or self.warmup):
            problems.append("lr_schedule stands beside schedule or warmup; give one of them")
        for name in ("patience", "select"):
            if getattr(self, name) not in (0, "last") and not self.validate_every:
                problems.append(f"{name} = {getattr(self, name)!r} needs validate_every")
        if self.rounds and self.fine_tune_type != "lora":
            problems.append(f"rounds are for lora adapters, found fine_tune_type {self.fine_tune_type}")
        if self.freezes_a and (self.weight_decay or not self.eps):
            problems.append("rounds of mode freeze_a need weight_decay 0 and eps above 0, or lora_a would change")
        if self.qat and (self.fine_tune_type != "lora" or self.grows):
            problems.append("qat is for lora adapters whose rank stays: no dora, no rounds of mode accumulate")
        raise_problems("training config", problems)

    @property
    def freezes_a(self) -> bool:
        """Whether lora_a stays as it is."""
        return self.rounds is not None and self.rounds.mode == FREEZE_A

    @property
    def grows(self) -> bool:
        """Whether the adapters of a pool get a higher rank than ``rank``, by what they were trained on top of."""
        return self.rounds is not None and self.rounds.mode == ACCUMULATE

    @property
    def scale(self) -> float:
        """What B·A is multiplied by, alpha / rank."""
        return self.alpha / self.rank

    @property
    def step_rows(self) -> int:
        """Rows of one step: all its batches together."""
        return self.batch_size * self.accumulate

    def spec(self) -> LoraSpec:
        """What the adapter folder records."""
        return LoraSpec(self.rank, self.scale, self.dropout, self.keys, self.num_layers, self.fine_tune_type)

    def describe(self) -> dict[str, Any]:
        """JSON object of all settings; those that came later are in it where they are not at their defaults."""
        values = {**asdict(self), "keys": list(self.keys)}
        for name in ("eps", "bias_correction", "lr_schedule", "directions", "directions_every", "rounds", "qat"):
            if values[name] == getattr(TrainConfig, name):
                del values[name]
        if self.rounds and self.rounds.schedule == Rounds.schedule:
            del values["rounds"]["schedule"]
        if self.lr_schedule:
            values["lr_schedule"]["arguments"] = list(self.lr_schedule.arguments)
        return values

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Settings from YAML or JSON; unknown keys and wrong types are refused by name."""
        return build(cls, values, "training config")


def learning_rate_at(config: TrainConfig, step: int, total: int) -> float:
    """Learning rate of 0-based ``step``: linear warm-up from one step's share, then the schedule down to zero."""
    if config.rounds:
        step, total = config.rounds.place(step, total)
    if config.lr_schedule:
        return config.lr_schedule.rate(step)
    warmup = round(config.warmup * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate


def make_optimizer(config: TrainConfig) -> Any:
    """Adam or AdamW, with bias correction (which MLX leaves out by default) unless ``config`` says otherwise."""
    betas, rate, corrected = [config.beta1, config.beta2], config.learning_rate, config.bias_correction
    if config.optimizer == "adamw":
        return optimizers.AdamW(rate, betas, config.eps, config.weight_decay, corrected)
    return optimizers.Adam(rate, betas, config.eps, corrected)
