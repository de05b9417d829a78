"""A YAML for training: our own keys, or an ``mlx_lm.lora`` one, translated key by key.

mlx-lm's ``iters`` counts batches, ours count optimiser steps, so everything that is told in iterations is divided by
``grad_accumulation_steps``. What cannot be done here is refused by name rather than dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from mlx_rsgwm import files
from mlx_rsgwm.errors import RsgwmError, raise_problems
from mlx_rsgwm.settings import read_yaml
from mlx_rsgwm.training.config import ALL_LINEAR, TrainConfig

# Keys that only mlx-lm has: any of them makes a YAML one of mlx-lm's.
FOREIGN = {
    "model", "iters", "adapter_path", "lora_parameters", "steps_per_eval", "steps_per_report", "grad_checkpoint",
    "grad_accumulation_steps", "max_seq_length", "lr_schedule", "optimizer_config", "val_batches", "project_name",
    "resume_adapter_file", "test_batches", "trust_remote_code", "hf_dataset", "clear_cache_threshold", "train", "test",
}  # fmt: skip
SHARED = {"seed", "batch_size", "num_layers", "fine_tune_type", "learning_rate", "optimizer"}
RUN_KEYS = ("base", "data", "held_out", "out", "save_every", "keep", "mask_prompt", "report_to", "project")


@dataclass
class TrainingFile:
    """What a YAML asks for: settings of the run, what the command line would say around it, and what became of keys."""

    config: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_training_file(path: Path) -> TrainingFile:
    """Read ``path``: our keys (those of :class:`TrainConfig` and ``RUN_KEYS``), or mlx-lm's.

    Raises:
        RsgwmError: not a YAML mapping, keys that are unknown, or mlx-lm settings that have no counterpart here.
    """
    if not path.is_file():
        raise RsgwmError(f"config {path} does not exist")
    values = read_yaml(files.read_text(path), f"config {path}")
    # YAML 1.1 takes 1e-5 for text; mlx-lm reads it as a number.
    values = {key: _number(value) for key, value in values.items()}
    if FOREIGN & set(values):
        return from_mlx_lm(values, str(path))
    own = {field.name for field in fields(TrainConfig)}
    file = TrainingFile(
        config={key: value for key, value in values.items() if key not in RUN_KEYS},
        run={key: value for key, value in values.items() if key in RUN_KEYS},
    )
    if set(file.config) <= own:
        return file
    TrainConfig.from_mapping(file.config)  # names what is unknown
    raise AssertionError("unreachable: unknown keys are refused")


def from_mlx_lm(values: Mapping[str, Any], where: str) -> TrainingFile:
    """Translate the settings of ``mlx_lm.lora``; its defaults hold where it names none."""
    file = TrainingFile()
    problems: list[str] = []
    accumulate = values.get("grad_accumulation_steps") or 1
    if not isinstance(accumulate, int) or accumulate < 1:
        raise RsgwmError(f"{where}: grad_accumulation_steps must be a whole number, found {brief(accumulate)}")
    defaults = {
        "fine_tune_type": "lora", "optimizer": "adam", "num_layers": 16, "batch_size": 4, "learning_rate": 1e-5,
        "iters": 1000, "max_seq_length": 2048, "steps_per_eval": 200, "save_every": 100, "seed": 0,
        "adapter_path": "adapters", "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0},
    }  # fmt: skip
    merged = {**defaults, **{key: value for key, value in values.items() if value is not None}}

    def steps(iterations: Any) -> int:
        return max(1, int(iterations) // accumulate)

    def to(
        target: dict[str, Any], name: str, convert: Callable[[Any], Any] = lambda value: value
    ) -> Callable[[str, Any], None]:
        def put(key: str, value: Any) -> None:
            target[name] = convert(value)
            if key in values and name != key:
                file.notes.append(f"{key} → {name} = {target[name]}")

        return put

    to_config, to_run = partial(to, file.config), partial(to, file.run)

    def ignored(key: str, value: Any) -> None:
        file.notes.append(f"{key} has no effect here")

    def only(*allowed: Any) -> Callable[[str, Any], None]:
        def check(key: str, value: Any) -> None:
            if value not in allowed:
                problems.append(f"{key}: {value!r} cannot be done here")

        return check

    def lora(key: str, value: Any) -> None:
        _lora_parameters(value, file, problems)

    def schedule(key: str, value: Any) -> None:
        _schedule(value, steps(merged["iters"]), file, problems)

    def optimizer(key: str, value: Any) -> None:
        options = dict((values.get("optimizer_config") or {}).get(value) or {})
        _optimizer(value, options, file, problems)

    table: dict[str, Callable[[str, Any], None]] = {
        "model": to_run("base"),
        "data": to_run("data"),
        "adapter_path": to_run("out"),
        "save_every": to_run("save_every", steps),
        "mask_prompt": to_run("mask_prompt", bool),
        "report_to": to_run("report_to"),
        "project_name": to_run("project"),
        "fine_tune_type": only("lora", "dora"),
        "num_layers": to_config("num_layers"),
        "batch_size": to_config("batch_size"),
        "seed": to_config("seed"),
        "learning_rate": to_config("learning_rate", float),
        "iters": to_config("steps", steps),
        "max_seq_length": to_config("max_tokens"),
        "steps_per_eval": to_config("validate_every", steps),
        "grad_checkpoint": to_config("recompute", bool),
        "grad_accumulation_steps": to_config("accumulate"),
        "lora_parameters": lora,
        "lr_schedule": schedule,
        "optimizer": optimizer,
        "optimizer_config": lambda key, value: None,  # read with the optimizer
        "train": only(True),
        "test": only(False),
        "resume_adapter_file": only(None),
        "trust_remote_code": only(False),
        "steps_per_report": ignored,
        "val_batches": ignored,
        "test_batches": ignored,
        "clear_cache_threshold": ignored,
        "config": ignored,
    }
    file.config |= {"schedule": "constant", "warmup": 0.0, "long_rows": "cut"}
    for key, value in merged.items():
        try:
            if key in table:
                table[key](key, value)
            else:
                problems.append(f"{key} has no counterpart here")
        except (TypeError, ValueError, OverflowError, AttributeError):
            problems.append(f"{key}: {brief(value)} is not understood")
    if merged["fine_tune_type"] in ("lora", "dora"):
        file.config["fine_tune_type"] = merged["fine_tune_type"]
    raise_problems(f"{where} (an mlx_lm.lora config)", problems)
    return file


def _lora_parameters(value: Any, file: TrainingFile, problems: list[str]) -> None:
    if not isinstance(value, Mapping):
        problems.append("lora_parameters is not a mapping")
        return
    known = {"rank", "scale", "dropout", "keys", "alpha"}
    problems += [f"lora_parameters.{key} has no counterpart here" for key in value if key not in known]
    if "scale" not in value:
        problems.append("lora_parameters has no scale")
        return
    rank = int(value.get("rank", 8))
    file.config |= {"rank": rank, "alpha": rank * float(value["scale"]), "dropout": float(value.get("dropout", 0.0))}
    file.notes.append(f"lora_parameters.scale → alpha = {file.config['alpha']:g} (scale · rank)")
    if value.get("keys"):
        file.config["keys"] = list(value["keys"])
    else:
        file.config["keys"] = list(ALL_LINEAR)
        file.notes.append("lora_parameters.keys is not given: every linear layer of the blocks, as in mlx-lm")


def _schedule(value: Any, steps: int, file: TrainingFile, problems: list[str]) -> None:
    """mlx-lm's ``lr_schedule``: {name, warmup, warmup_init, arguments: [lr, steps, end]}."""
    if not isinstance(value, Mapping):
        problems.append("lr_schedule is not a mapping")
        return
    names = {"cosine_decay": "cosine", "linear_schedule": "linear"}
    name, arguments = str(value.get("name")), list(value.get("arguments") or [])
    if name not in names or not arguments:
        problems.append(f"lr_schedule.name {name!r} cannot be done here; use {', '.join(names)}")
        return
    rest = [_number(item) for item in arguments[1:]]
    length, end = (rest if name == "cosine_decay" else rest[::-1]) + [None, None][: 2 - len(rest)]
    if end not in (None, 0, 0.0):
        problems.append(f"lr_schedule ends at {end}; here every schedule ends at 0")
    warmup = int(value.get("warmup") or 0)
    if value.get("warmup_init") not in (None, 0, 0.0):
        problems.append("lr_schedule.warmup_init cannot be done here; the warm-up starts at 0")
    if length is not None and int(length) + warmup < steps:
        problems.append(f"lr_schedule lasts {length} steps of {steps}; here it lasts the whole run")
    file.config |= {
        "learning_rate": float(_number(arguments[0])),
        "schedule": names[name],
        "warmup": min(warmup / steps, 0.99),
    }
    file.notes.append(
        f"lr_schedule → {names[name]} over the run, learning_rate = {arguments[0]}, warm-up {warmup} steps"
    )


def _optimizer(name: Any, options: dict[str, Any], file: TrainingFile, problems: list[str]) -> None:
    if name not in ("adam", "adamw"):
        problems.append(f"optimizer: {name!r} cannot be done here (importance is Adam's moment); use adam or adamw")
        return
    file.config["optimizer"] = name
    if name == "adamw":
        file.config["weight_decay"] = float(options.pop("weight_decay", 0.01))
    if "betas" in options:
        file.config["beta1"], file.config["beta2"] = (float(beta) for beta in options.pop("betas"))
    if not options.pop("bias_correction", True):
        problems.append(f"optimizer_config.{name}.bias_correction: false cannot be done here")
    else:
        file.notes.append(f"optimizer {name} with bias correction, which mlx-lm leaves out by default")
    problems += [f"optimizer_config.{name}.{key} has no counterpart here" for key in options]


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
