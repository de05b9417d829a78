"""The YAML files that commands read: a sound one of each kind, every key that it may have, and how it is read.

Keys are those of the dataclasses and tables that read them: a new key is tried like the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from mlx_rsgwm.audit.plan import Plan, read_plan
from mlx_rsgwm.merging.methods import METHODS
from mlx_rsgwm.recipes.schema import Recipe, load_recipe
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.mlx_lm_keys import DEFAULTS, ELSEWHERE, FOREIGN, NO_EFFECT, REFUSED
from mlx_rsgwm.training.mlx_lm_yaml import RUN_KEYS, read_training_file
from tests.outside.commands import RECIPE

HERE = "@@here@@"
Steps = tuple[Any, ...]
MODULE = "model.layers.0.self_attn.q_proj"
SCHEDULE = {"name": "cosine_decay", "arguments": [1e-3, 10, 0.0], "warmup": 2, "warmup_init": 0.0}
OWN = {
    "base": "base", "data": "corpus", "out": "new/out", "rank": 2, "alpha": 4.0, "steps": 1, "batch_size": 2,
    "num_layers": 1,
}  # fmt: skip
MLX_LM = {
    "model": "base", "train": True, "data": "corpus", "adapter_path": "new/out", "iters": 1, "batch_size": 2,
    "num_layers": 1, "max_seq_length": 64, "learning_rate": 1e-4,
    "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
}  # fmt: skip
PLAN = {
    "kind": "merge-plan",
    "adapters": [{"adapter": "pool/change"}, {"adapter": "pool/groups"}],
    "modules": {MODULE: {"method": "ties", "weights": [0.5, 0.5], "density": 0.5, "reason": "x"}},
}


@dataclass(frozen=True)
class Kind:
    """``sound``: a document. ``places``: every key, with the document that it is put into. ``read``: as a command does.

    ``words``: the command that is given the file of the name ``odd.yaml``.
    """

    sound: dict[str, Any]
    places: Callable[[], Iterator[tuple[Steps, dict[str, Any]]]]
    read: Callable[[Path], Any]
    words: tuple[str, ...]


def steps_of(cls: Any, before: Steps = ()) -> Iterator[Steps]:
    """The keys of a dataclass, those of the dataclasses in it included."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        yield (*before, field.name)
        for inner in (hints[field.name], *get_args(hints[field.name])):
            if is_dataclass(inner):
                yield from steps_of(inner, (*before, field.name))


def recipe_keys() -> Iterator[tuple[Steps, dict[str, Any]]]:
    rates = {**RECIPE["train"], "schedule": "constant", "warmup": 0.0, "lr_schedule": SCHEDULE}
    for steps in steps_of(Recipe):
        yield steps, {**RECIPE, "train": rates} if "lr_schedule" in steps[:-1] else RECIPE
    for name, method in METHODS.items():  # parameters are a method's own
        for parameter in method.parameters:
            yield ("merge", "parameters", parameter), {**RECIPE, "merge": {"method": name}}


def own_keys() -> Iterator[tuple[Steps, dict[str, Any]]]:
    for key in RUN_KEYS:
        yield (key,), OWN
    for steps in steps_of(TrainConfig):
        if len(steps) == 1:  # what lr_schedule holds is asked of mlx-lm's form, which it is of
            yield steps, OWN


def mlx_lm_keys() -> Iterator[tuple[Steps, dict[str, Any]]]:
    for key in sorted(
        {*DEFAULTS, *FOREIGN, *NO_EFFECT, *REFUSED, *ELSEWHERE, "data", "mask_prompt", "report_to", "test"}
    ):
        yield (key,), MLX_LM
    for key in ("rank", "scale", "dropout", "alpha", "keys"):
        yield ("lora_parameters", key), MLX_LM
    for key in SCHEDULE:
        yield ("lr_schedule", key), {**MLX_LM, "lr_schedule": SCHEDULE}
    for name in ("adam", "adamw"):
        document = {**MLX_LM, "optimizer": name}
        yield ("optimizer_config", name), document
        for key in ("betas", "eps", "weight_decay", "bias_correction"):
            yield ("optimizer_config", name, key), document


def plan_keys() -> Iterator[tuple[Steps, dict[str, Any]]]:
    places = {"adapters": ("adapters", 0), "modules": ("modules", MODULE)}
    for steps in steps_of(Plan):
        yield steps if len(steps) == 1 else (*places[steps[0]], *steps[1:]), PLAN


def read_training(path: Path) -> TrainConfig:
    """As ``rsgwm train --config`` reads it, up to what it opens."""
    return TrainConfig.from_mapping(read_training_file(path).config)


KINDS = {
    "recipe": Kind(RECIPE, recipe_keys, lambda path: load_recipe(str(path)),
                   ("run", "odd.yaml", "--out", "new/out", "--dry-run")),
    "training": Kind(OWN, own_keys, read_training, ("train", "--config", "odd.yaml")),
    "mlx_lm": Kind(MLX_LM, mlx_lm_keys, read_training, ("train", "--config", "odd.yaml")),
    "plan": Kind(PLAN, plan_keys, read_plan, ("merge", "--plan", "odd.yaml", "--out", "new/out")),
}  # fmt: skip


def text_with(document: dict[str, Any], steps: Steps, value: str) -> str:
    """The YAML of a document in which ``value``, as it is written, stands at ``steps``."""
    changed = copy.deepcopy(document)
    target: Any = changed
    for step in steps[:-1]:
        if not isinstance(target, list) and not isinstance(target.get(step), (dict, list)):
            target[step] = {}
        target = target[step]
    target[steps[-1]] = HERE
    return yaml.safe_dump(changed, sort_keys=False, width=10**6).replace(f"'{HERE}'", value, 1)
