"""A YAML for training: our own keys, or an ``mlx_lm.lora`` one, translated key by key.

mlx-lm's ``iters`` counts batches, ours count optimiser steps, so everything that is told in iterations is divided by
``grad_accumulation_steps``. Every key is done as mlx-lm does it, told to be without effect, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.config import read_yaml, written_texts
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.training.config import ALL_LINEAR, TrainConfig
from mlx_rsgwm.training.mlx_lm_keys import DEFAULTS, ELSEWHERE, FOREIGN, NO_EFFECT, REFUSED
from mlx_rsgwm.training.schedule import RateSchedule

ANY_NUMBER = -(10**9)  # where no least one is meant
FEATURES = ("prompt", "completion", "chat", "text")
TEXTS = {"base", "data", "held_out", "out", "report_to", "project", "warm_start"}
PATHS = TEXTS - {"base", "report_to", "project"}
RUN_KEYS = (*sorted(TEXTS), "save_every", "keep", "mask_prompt", "all_turns", "test")


@dataclass
class TrainingFile:
    """What a YAML asks for: settings of the run, what the command line would say around it, and what became of keys."""

    config: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_training_file(path: Path) -> TrainingFile:
    """Read ``path``: our keys (those of :class:`TrainConfig` and ``RUN_KEYS``), or mlx-lm's.

    Raises:
        RsgwmError: not a YAML mapping, keys that are unknown or of the wrong type, or mlx-lm settings that have no
            counterpart here.
    """
    text = files.read_text(path, files.LARGEST_YAML)
    values = read_yaml(text, f"config {path}")
    texts = written_texts(text)
    foreign = bool(FOREIGN & set(values))
    named = {"model", "data", "adapter_path", "report_to", "project_name", "resume_adapter_file"} if foreign else TEXTS
    values |= {key: texts[key] for key in named & set(texts)}
    if foreign:
        return from_mlx_lm(values, str(path))
    file = TrainingFile(
        config={key: value for key, value in values.items() if key not in RUN_KEYS},
        run={key: value for key, value in values.items() if key in RUN_KEYS and value is not None},
    )
    raise_problems(f"config {path}", _run_problems(file.run))
    _write_out(file.run)
    if not set(file.config) <= {field.name for field in fields(TrainConfig)}:
        TrainConfig.from_mapping(file.config)  # names what is unknown
        raise AssertionError("unreachable: unknown keys are refused")
    return file


def from_mlx_lm(values: Mapping[str, Any], where: str) -> TrainingFile:
    """Translate the settings of ``mlx_lm.lora``; its defaults hold where it names none."""
    given = {key: value for key, value in values.items() if value is not None}
    translation = _Translation(given, {**DEFAULTS, **given})
    translation.run()
    file, problems = translation.file, translation.problems
    if not problems:
        problems += _run_problems(file.run)
    raise_problems(f"{where} (an mlx_lm.lora config)", problems)
    _write_out(file.run)
    return file


class _Translation:
    """The keys of one YAML on their way to ours; ``merged`` holds mlx-lm's defaults, too."""

    def __init__(self, given: Mapping[str, Any], merged: dict[str, Any]) -> None:
        self.given, self.merged = given, merged
        self.file = TrainingFile(config={"schedule": "constant", "warmup": 0.0, "long_rows": "cut"})
        self.problems: list[str] = []
        self.accumulate = 1

    def run(self) -> None:
        """Fill ``file`` and ``problems``."""
        self.accumulate = self._whole("grad_accumulation_steps", 1) or 1
        table: dict[str, Callable[[str, Any], None]] = {
            "model": self._run_as("base"), "data": self._run_as("data"), "adapter_path": self._run_as("out"),
            "report_to": self._run_as("report_to"), "project_name": self._run_as("project"),
            "resume_adapter_file": self._run_as("warm_start"), "mask_prompt": self._run_as("mask_prompt"),
            "test": self._run_as("test"), "save_every": self._steps_as(self.file.run, "save_every", 0),
            "steps_per_eval": self._steps_as(self.file.config, "validate_every", 1), "iters": self._iters,
            "batch_size": self._whole_as("batch_size", 1), "seed": self._whole_as("seed", 0),
            "max_seq_length": self._whole_as("max_tokens", 2), "num_layers": self._layers,
            "grad_accumulation_steps": self._whole_as("accumulate", 1), "grad_checkpoint": self._checkpointing,
            "learning_rate": self._learning_rate, "fine_tune_type": self._fine_tune_type, "train": self._train,
            "lora_layers": self._lora_layers, "lora_parameters": self._lora, "lr_schedule": self._schedule,
            "optimizer": self._optimizer, "optimizer_config": self._optimizer_config,
            "trust_remote_code": self._remote_code,
            **{f"{name}_feature": self._feature for name in FEATURES},
        }  # fmt: skip
        for key, value in self.merged.items():
            if key in NO_EFFECT:
                self.file.notes.append(f"{key} has no effect here")
            elif key in REFUSED and value not in (False, ""):
                self.problems.append(f"{key} has no counterpart here; {REFUSED[key]}")
            elif key in table:
                try:
                    table[key](key, value)
                except (TypeError, ValueError, OverflowError, AttributeError):
                    self.problems.append(f"{key}: {brief(value)} is not understood")
                except RsgwmError as error:
                    self.problems.append(str(error))
            elif key not in REFUSED:
                self.problems.append(f"{key} is no key of mlx_lm.lora, which ignores it; {self._advice(key, table)}")

    def _advice(self, key: str, known: Mapping[str, Any]) -> str:
        """What to write instead of a key that mlx_lm.lora does not have."""
        written = str(key).replace("-", "_")
        near = get_close_matches(written, [*known, *NO_EFFECT], n=1, cutoff=0.8)
        meant = ELSEWHERE.get(written) or (near[0] if near else None)
        return f"write {meant}, or remove it" if meant else "remove it"

    def _put(self, target: dict[str, Any], name: str, key: str, value: Any) -> None:
        target[name] = value
        if key in self.given and name != key:
            self.file.notes.append(f"{key} → {name} = {value}")

    def _run_as(self, name: str) -> Callable[[str, Any], None]:
        return lambda key, value: self._put(self.file.run, name, key, value)

    def _whole(self, key: str, least: int) -> int | None:
        """The whole number of ``key``, or None after naming the problem; 1 where it is not given."""
        value = self.merged.get(key, 1)
        number = _number(value)
        if isinstance(value, bool) or not isinstance(number, float) or number % 1 or number < least:
            bound = f" from {least}" * (least > ANY_NUMBER)
            self.problems.append(f"{key} must be a whole number{bound}, found {brief(value)}")
            return None
        return int(number)

    def _whole_as(self, name: str, least: int) -> Callable[[str, Any], None]:
        def put(key: str, value: Any) -> None:
            number = self._whole(key, least)
            if number is not None:
                self._put(self.file.config, name, key, number)

        return put

    def _steps_as(self, target: dict[str, Any], name: str, least: int) -> Callable[[str, Any], None]:
        def put(key: str, value: Any) -> None:
            number = self._whole(key, least)
            if number is not None:
                self._put(target, name, key, max(1, number // self.accumulate) if number else 0)

        return put

    def _iters(self, key: str, value: Any) -> None:
        number = self._whole(key, 1)
        if number is None:
            return
        if number < self.accumulate:
            self.problems.append(f"iters is {number}: not one step of grad_accumulation_steps, {self.accumulate}")
            return
        self._put(self.file.config, "steps", key, number // self.accumulate)
        if rest := number % self.accumulate:
            self.file.notes.append(f"the last {rest} iterations complete no step and are left out")

    def _layers(self, key: str, value: Any) -> None:
        if key not in self.given and "lora_layers" in self.given:
            return
        number = self._whole(key, ANY_NUMBER)
        if number is None:
            return
        self.file.config["num_layers"] = number if number > 0 else -1
        if number < -1 or number == 0:
            self.file.notes.append(f"{key} = {number} means every layer, as in mlx-lm")

    def _lora_layers(self, key: str, value: Any) -> None:
        if "num_layers" in self.given:
            if value != self.given["num_layers"]:
                self.problems.append(f"lora_layers is {value!r} and num_layers {self.given['num_layers']!r}; give one")
            return
        self._layers(key, value)
        self.file.notes.append("lora_layers, the former name of num_layers, is taken for it")

    def _checkpointing(self, key: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise ValueError(value)
        self._put(self.file.config, "recompute", key, value)

    def _learning_rate(self, key: str, value: Any) -> None:
        rate = _number(value)
        if not isinstance(rate, float) or isinstance(value, bool):
            raise ValueError(value)
        if "lr_schedule" not in self.given:
            self.file.config["learning_rate"] = rate
        elif key in self.given:
            self.file.notes.append("learning_rate has no effect beside lr_schedule, as in mlx-lm")

    def _fine_tune_type(self, key: str, value: Any) -> None:
        if value == "full":
            self.problems.append("fine_tune_type: 'full' cannot be done here, where every run trains an adapter")
        elif value not in ("lora", "dora"):
            self.problems.append(f"fine_tune_type: {brief(value)} cannot be done here; use lora or dora")
        else:
            self.file.config["fine_tune_type"] = value

    def _train(self, key: str, value: Any) -> None:
        if value is not True:
            self.problems.append(
                f"train: {brief(value)} cannot be done here: this command trains; see rsgwm adapter loss"
            )

    def _remote_code(self, key: str, value: Any) -> None:
        if value:
            self.file.notes.append("trust_remote_code has no effect here: no program of a model is run")

    def _feature(self, key: str, value: Any) -> None:
        if not isinstance(value, str) or not value:
            raise ValueError(value)
        field_name = {"chat_feature": "messages"}.get(key, key.removesuffix("_feature"))
        self.file.run.setdefault("features", {})[field_name] = value

    def _lora(self, key: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            self.problems.append("lora_parameters is not a mapping")
            return
        known = {"rank", "scale", "dropout", "keys", "alpha"}
        advice = "; the layers' names go into keys, their number into num_layers above"
        self.problems += [
            f"lora_parameters.{name} is no key of mlx_lm.lora, which ignores it{advice * ('layers' in str(name))}"
            for name in value
            if name not in known
        ]
        numbers = {name: _number(value[name]) for name in ("rank", "scale", "dropout", "alpha") if name in value}
        wrong = [name for name, number in numbers.items() if not (isinstance(number, float) and math.isfinite(number))]
        if wrong or numbers.get("rank", 8.0) % 1:
            self.problems += [
                f"lora_parameters.{name} must be a {'whole ' * (name == 'rank')}number, found {brief(value[name])}"
                for name in wrong or ["rank"]
            ]
            return
        rank = int(numbers.get("rank", 8))
        if "scale" not in numbers:
            of_alpha = f" (alpha / rank would be {numbers['alpha'] / max(rank, 1):g})" if "alpha" in numbers else ""
            self.problems.append(
                f"lora_parameters has no scale, without which mlx_lm.lora stops, too; give it{of_alpha}"
            )
            return
        scale = numbers["scale"]
        if scale <= 0:
            self.problems.append(f"lora_parameters.scale must be above 0, found {scale:g}: B·A is multiplied by it")
            return
        self.file.config |= {"rank": rank, "alpha": rank * scale, "dropout": numbers.get("dropout", 0.0)}
        self.file.notes.append(f"lora_parameters.scale → alpha = {rank * scale:g} (scale · rank)")
        if "alpha" in numbers:
            former = scale * numbers["alpha"] / max(rank, 1)
            self.file.notes.append(
                f"lora_parameters.alpha = {numbers['alpha']:g} has no effect beside scale, as in mlx-lm; before its "
                f"version 0.14.2 the two made a scale of {former:g}"
            )
        keys = value.get("keys")
        if keys is None:
            self.file.config["keys"] = list(ALL_LINEAR)
            self.file.notes.append("lora_parameters.keys is not given: every linear layer of the blocks, as in mlx-lm")
        elif not isinstance(keys, list) or not keys or not all(isinstance(name, str) for name in keys):
            self.problems.append(f"lora_parameters.keys must be a list of module names, found {brief(keys)}")
        else:
            self.file.config["keys"] = list(dict.fromkeys(keys))

    def _schedule(self, key: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            self.problems.append("lr_schedule is not a mapping")
            return
        unknown = [str(name) for name in value if name not in ("name", "arguments", "warmup", "warmup_init")]
        arguments = value.get("arguments")
        if arguments is None:
            rate, steps = self.merged["learning_rate"], self.merged["iters"]
            self.problems.append(
                "lr_schedule has no arguments, without which mlx_lm.lora stops, too; those of cosine_decay are "
                f"[first rate, steps, last rate], such as [{rate}, {steps}, 0.0]"
            )
            return
        numbers = [_number(item) for item in arguments] if isinstance(arguments, list) else []
        warmup, begin = (_number(value.get(name) or 0) for name in ("warmup", "warmup_init"))
        for wrong, what in (
            (unknown, f"{', '.join(unknown)} has no counterpart here"),
            (not numbers or not all(isinstance(item, float) for item in numbers),
             f"arguments must be a list of numbers, found {brief(arguments)}"),
            (not isinstance(warmup, float) or warmup % 1 != 0, f"warmup must be a whole number, found {warmup!r}"),
            (not isinstance(begin, float), f"warmup_init must be a number, found {begin!r}"),
        ):  # fmt: skip
            if wrong:
                self.problems.append(f"lr_schedule.{what}")
                return
        schedule = RateSchedule(str(value.get("name")), tuple(numbers), int(warmup), begin)
        rates = {"name": schedule.name, "arguments": numbers, "warmup": schedule.warmup, "warmup_init": begin}
        self.file.config["lr_schedule"] = rates
        highest = max(numbers[:2] if schedule.name == "linear_schedule" else numbers[:1])
        self.file.config["learning_rate"] = highest or DEFAULTS["learning_rate"]  # of no effect; told in the manifest
        steps, last = self.file.config.get("steps"), int(schedule.length) if schedule.name != "exponential_decay" else 0
        if steps and schedule.name != "step_decay" and last and last + schedule.warmup + bool(schedule.warmup) > steps:
            self.file.notes.append(
                f"lr_schedule is longer than the run: its rate after {steps} steps is {schedule.rate(steps - 1):.3g}"
            )

    def _optimizer(self, key: str, value: Any) -> None:
        name = value.lower() if isinstance(value, str) else value
        if name not in ("adam", "adamw"):
            self.problems.append(
                f"optimizer: {value!r} cannot be done here (importance is Adam's moment); use adam or adamw"
            )
            return
        configs = self.given.get("optimizer_config") or {}
        options = configs.get(name) if isinstance(configs, Mapping) else None
        options = dict(options) if isinstance(options, Mapping) else {}
        config = self.file.config
        config["optimizer"] = name
        numbers = {"eps": options.pop("eps", 1e-8)}
        if name == "adamw":
            numbers["weight_decay"] = options.pop("weight_decay", 0.01)
        betas = options.pop("betas", [0.9, 0.999])
        if isinstance(betas, list) and len(betas) == 2:
            numbers |= {"beta1": betas[0], "beta2": betas[1]}
        else:
            self.problems.append(f"optimizer_config.{name}.betas must be two numbers, found {brief(betas)}")
        for field_name, given in numbers.items():
            number = _number(given)
            if not isinstance(number, float):
                self.problems.append(f"optimizer_config.{name}: {field_name} must be a number, found {brief(given)}")
            elif number != getattr(TrainConfig, field_name):
                config[field_name] = number
        if "bias_correction" in options:
            corrected = options.pop("bias_correction")
            if not isinstance(corrected, bool):
                self.problems.append(f"optimizer_config.{name}.bias_correction must be true or false")
            config["bias_correction"] = corrected
        else:
            self.file.notes.append(f"optimizer {name} with bias correction, which mlx-lm leaves out by default")
        self.problems += [f"optimizer_config.{name}.{option} has no counterpart here" for option in options]

    def _optimizer_config(self, key: str, value: Any) -> None:
        """Read with the optimizer; here what belongs to none."""
        if not isinstance(value, Mapping) or any(not isinstance(part, Mapping | None) for part in value.values()):
            self.problems.append("optimizer_config must hold a mapping for each optimizer (adamw: {eps: 1e-8})")


def _run_problems(run: Mapping[str, Any]) -> list[str]:
    """Values of the keys around a run that are not of their type."""
    problems = [f"{key} must be text, found {brief(run[key])}" for key in TEXTS & set(run) if not _is_text(run[key])]
    for key in ("mask_prompt", "all_turns", "test"):
        if not isinstance(run.get(key, False), bool):
            problems.append(f"{key} must be true or false, found {brief(run[key])}")
    for key, least in (("save_every", 0), ("keep", 1)):
        value = run.get(key, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            problems.append(f"{key} must be a whole number from {least}, found {brief(value)}")
    return sorted(problems)


def _write_out(run: dict[str, Any]) -> None:
    """Write out a leading ``~`` of paths, which no shell has seen; a base's is written out where it is looked for."""
    for key in PATHS & set(run):
        run[key] = str(files.expanded(run[key]))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _number(value: Any) -> Any:
    """A number as float, also one that is quoted; anything else, and what is not finite, as it is."""
    if isinstance(value, str) and not (value.isascii() and "_" not in value):  # Python's float takes ٣ and 1_000, too
        return value
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else value
    except (ValueError, OverflowError):
        return value
    return number if not isinstance(number, float) or math.isfinite(number) else value
