"""YAML for training: ours, and mlx_lm.lora's key by key."""

import pytest
import yaml

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.training.config import TrainConfig, learning_rate_at
from mlx_rsgwm.training.mlx_lm_yaml import read_training_file
from mlx_rsgwm.training.schedule import RateSchedule

EXAMPLE = """
model: "mlx_model"
train: true
fine_tune_type: dora
optimizer: adamw
optimizer_config:
  adamw: {betas: [0.9, 0.98], weight_decay: 0.05, bias_correction: true}
data: "/path/to/training/data"
seed: 7
num_layers: 8
batch_size: 2
iters: 600
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: true
grad_accumulation_steps: 4
mask_prompt: true
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.1
lr_schedule:
  name: cosine_decay
  warmup: 15
  warmup_init: 0
  arguments: [1e-4, 1000]
"""


def read(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return read_training_file(path)


def test_an_mlx_lm_config_is_translated(tmp_path):
    file = read(tmp_path, EXAMPLE)
    config = TrainConfig.from_mapping(file.config)
    expected = {
        "rank": 8, "alpha": 160.0, "dropout": 0.1, "keys": ("self_attn.q_proj", "self_attn.v_proj"), "num_layers": 8,
        "fine_tune_type": "dora", "optimizer": "adamw", "weight_decay": 0.05, "beta2": 0.98, "seed": 7, "batch_size": 2,
        "accumulate": 4, "steps": 150, "validate_every": 50, "max_tokens": 2048, "long_rows": "cut", "recompute": True,
        "schedule": "constant", "learning_rate": 1e-4, "lr_schedule": RateSchedule("cosine_decay", (1e-4, 1000.0), 15),
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.scale == 20.0
    assert file.run == {
        "base": "mlx_model", "data": "/path/to/training/data", "out": "adapters", "save_every": 25, "mask_prompt": True,
        "test": False,
    }  # fmt: skip
    notes = "\n".join(file.notes)
    for told in ("iters → steps = 150", "max_seq_length → max_tokens", "val_batches has no effect", "than the run",
                 "scale → alpha = 160", "grad_checkpoint → recompute = True"):  # fmt: skip
        assert told in notes


def test_mlx_lm_defaults_hold(tmp_path):
    file = read(tmp_path, "model: m\ndata: d\ntrain: true\n")
    config = TrainConfig.from_mapping(file.config)
    assert (config.rank, config.scale, config.steps, config.batch_size) == (8, 20.0, 1000, 4)
    assert config.keys == ("all-linear",)
    assert config.optimizer == "adam"
    assert learning_rate_at(config, 0, 1000) == learning_rate_at(config, 999, 1000) == 1e-5


def test_the_shipped_example_of_mlx_lm_is_understood(tmp_path):
    """Whatever keys mlx-lm's own defaults have is either translated or refused by name: none passes in silence."""
    from mlx_lm.lora import CONFIG_DEFAULTS

    defaults = {**CONFIG_DEFAULTS, "train": True}
    file = read(tmp_path, yaml.safe_dump(defaults))
    TrainConfig.from_mapping(file.config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\noptimizer: muon", "optimizer: 'muon' cannot be done here"),
        ("model: m\nfine_tune_type: full", "fine_tune_type: 'full' cannot be done"),
        ("model: m\nhf_dataset: {path: x}", "hf_dataset has no counterpart here; write the rows to train.jsonl"),
        ("model: m\ntrain: false", "train: False cannot be done here"),
        ("model: m\nwarm: 1", "warm is no key of mlx_lm.lora, which ignores it; remove it"),
        ("model: m\nlora_rank: 8", r"lora_rank is no key .*; write lora_parameters: \{rank: …\}, or remove it"),
        ("model: m\nbatch-size: 2", "batch-size is no key .*; write batch_size, or remove it"),
        ("model: m\ngrad_accumulation: 2", "write grad_accumulation_steps, or remove it"),
        ("model: m\nsteps_per_evals: 2", "write steps_per_eval, or remove it"),
        ("model: m\nlora_parameters: {rank: 8, scale: 2, lora_layers: [mlp]}", "the layers' names go into keys"),
        (
            "model: m\nlr_schedule: {name: cosine_decay, warmup: 9}",
            r"has no arguments, .* such as \[1e-05, 1000, 0.0\]",
        ),
        ("model: m\nlora_parameters: {rank: 8}", "lora_parameters has no scale"),
        ("model: m\nlora_parameters: {rank: 8, scale: 2, bias: true}", "lora_parameters.bias is no key"),
        ("model: m\nlora_parameters: {rank: 8, alpha: 32}", r"no scale, .*; give it \(alpha / rank would be 4\)"),
        (
            "model: m\nlora_parameters: {rank: 8, scale: 2, keys: self_attn.q_proj}",
            "keys must be a list of module names",
        ),
        ("model: m\nlora_parameters: {rank: 8, scale: 2, keys: []}", "keys must be a list of module names"),
        ("model: m\nlora_parameters: {rank: 8.5, scale: 2}", "lora_parameters.rank must be a whole number, found 8.5"),
        ("model: m\nlora_parameters: {rank: 8, scale: .nan}", "lora_parameters.scale must be a number"),
        (
            "model: m\nlora_parameters: {rank: 8, scale: 0}",
            r"\.yaml .*: lora_parameters.scale must be above 0, found 0",
        ),
        ("model: m\nlora_parameters: {rank: 8, scale: -2.5}", "lora_parameters.scale must be above 0, found -2.5"),
        ("model: m\nlr_schedule: {name: join_schedules, arguments: [1e-4, 0.9]}", "name 'join_schedules' is unknown"),
        ("model: m\nlr_schedule: {name: cosine_decay, arguments: [1e-4]}", "takes 2 to 3 arguments, found 1"),
        ("model: m\nlr_schedule: {name: cosine_decay, arguments: [1e-4, 0]}", "lasts 0 steps"),
        ("model: m\nlr_schedule: {name: cosine_decay, arguments: [1e-4, .nan]}", "arguments .* are out of range"),
        ("model: m\nlr_schedule: {name: cosine_decay, arguments: [1e-4, 9], warmup: 1.5}", "warmup must be a whole"),
        ("model: m\nlr_schedule: {name: cosine_decay, arguments: [1e-4, 9], warmup: -5}", "warmup is -5"),
        ("model: m\nlr_schedule: {name: cosine_decay, arguments: 1e-4}", "must be a list of numbers"),
        ("model: m\noptimizer_config: {adam: {weight_decay: 0.1}}", "optimizer_config.adam.weight_decay has no"),
        (
            "model: m\noptimizer: adamw\noptimizer_config: {adamw: {weight_decay: true}}",
            "weight_decay must be a number",
        ),
        ("model: m\noptimizer_config: {adam: {betas: [0.9]}}", "betas must be two numbers, found"),
        ("model: m\noptimizer_config: {adam: {eps: small}}", "eps must be a number, found 'small'"),
        ("model: m\noptimizer_config: {weight_decay: 0.1}", "must hold a mapping for each optimizer"),
        ("model: m\nlora_layers: 4\nnum_layers: 8", "lora_layers is 4 and num_layers 8; give one"),
        ("model: m\niters: 0", "iters must be a whole number from 1, found 0"),
        ("model: m\niters: -5", "iters must be a whole number from 1, found -5"),
        ("model: m\niters: 2.5", "iters must be a whole number"),
        ("model: m\niters: true", "iters must be a whole number"),
        ("model: m\niters: .inf", "iters must be a whole number"),
        ("model: m\niters: [1]", "iters must be a whole number"),
        ("model: m\niters: 3\ngrad_accumulation_steps: 4", "iters is 3: not one step of grad_accumulation_steps, 4"),
        ("model: m\ngrad_accumulation_steps: 0", "grad_accumulation_steps must be a whole number from 1"),
        ("model: m\nsteps_per_eval: 0", "steps_per_eval must be a whole number from 1"),
        ("model: m\nbatch_size: ten", "batch_size must be a whole number"),
        ("model: m\nlearning_rate: fast", "learning_rate: 'fast' is not understood"),
        ("model: m\nmask_prompt: 'false'", "mask_prompt must be true or false, found 'false'"),
        ("model: m\ngrad_checkpoint: 'no'", "grad_checkpoint: 'no' is not understood"),
        ("model: [m]", "base must be text"),
        ("base: b\nmask_prompt: 'false'", "mask_prompt must be true or false, found 'false'"),
        ("base: b\nsave_every: ten", "save_every must be a whole number from 0, found 'ten'"),
        ("base: b\nkeep: 0", "keep must be a whole number from 1"),
        ("base: {a: b}", "base must be text"),
        ("rnak: 8", "did you mean 'rank'"),
        ("- 8", "expected keys and values"),
        ("a: [", "not valid YAML"),
        ("model: m\niters: 5\niters: 6", "iters is given twice, the second time in line 3"),
        ("model: m\nlora_parameters: {rank: 8, scale: 2, rank: 16}", "rank is given twice"),
        ("model: m\nnum_layers: all", "num_layers must be a whole number, found 'all'"),
        ("model: m\nlora_parameters: {}", "lora_parameters has no scale"),
        ("model: m\nlr_schedule: cosine", "lr_schedule is not a mapping"),
        (
            "model: m\nlr_schedule: {name: cosine_decay, arguments: []}",
            r"arguments must be a list of numbers, found \[\]",
        ),
        ("model: m\nadapter_path: ''", "out must be text, found ''"),
        ("model: m\ntrain: 'true'", "train: 'true' cannot be done here"),
        ("model: m\nuse_dora: true", "use_dora has no counterpart here; write fine_tune_type: dora"),
        ("model: m\nfine_tune_type: LoRA", "fine_tune_type: 'LoRA' cannot be done here; use lora or dora"),
        ("model: m\nbase: m", "base is no key of mlx_lm.lora"),
        ("model: m\nsteps: 4", "steps is no key of mlx_lm.lora"),
        ("", "expected keys and values"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(RsgwmError, match=message):
        read(tmp_path, text)


def test_our_own_keys(tmp_path):
    file = read(tmp_path, "base: b\ndata: d\nrank: 4\nalpha: 8\nlearning_rate: 1e-3\nsave_every: 5\n")
    assert file.config == {"rank": 4, "alpha": 8, "learning_rate": 1e-3}
    assert file.run == {"base": "b", "data": "d", "save_every": 5}
    assert file.notes == []


@pytest.mark.parametrize("key", ["model", "data", "adapter_path", "project_name", "report_to"])
@pytest.mark.parametrize(
    "written", ["2024", "'2024'", "0123", "2025-11-28", "1e5", "infinity", "yes", "1_0", "0x1f", "nan"]
)
def test_names_stay_the_text_that_they_are_written_as(tmp_path, key, written):
    file = read(tmp_path, f"iters: 1\n{key}: {written}")
    ours = {"model": "base", "adapter_path": "out", "project_name": "project"}.get(key, key)
    assert file.run[ours] == written.strip("'")
    own = read(tmp_path, f"out: {written}\nrank: 1e1\n")
    assert own.run["out"] == written.strip("'")


def test_the_home_folder_is_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = read(tmp_path, "model: ~/m\ndata: ~/d\nadapter_path: ~/a\nresume_adapter_file: ~/w.safetensors")
    home = {"data": f"{tmp_path}/d", "out": f"{tmp_path}/a", "warm_start": f"{tmp_path}/w.safetensors"}
    assert {key: file.run[key] for key in home} == home
    assert read(tmp_path, "base: b\nout: ~/a").run["out"] == f"{tmp_path}/a"
    with pytest.raises(RsgwmError, match="there is no user nosuchuser"):
        read(tmp_path, "model: m\nadapter_path: ~nosuchuser/a")


def test_what_is_without_effect_is_told(tmp_path):
    file = read(
        tmp_path,
        "model: m\nlora_parameters: {rank: 4, alpha: 32, scale: 2.0}\ntrust_remote_code: true\niters: 10\n"
        "grad_accumulation_steps: 4\nnum_layers: 0\nlearning_rate: 1e-3\n"
        "lr_schedule: {name: cosine_decay, arguments: [1e-4, 2000]}",
    )
    told = "\n".join(file.notes)
    for note in ("alpha = 32 has no effect beside scale, as in mlx-lm; before its version 0.14.2 the two made",
                 "trust_remote_code has no effect", "the last 2 iterations complete no step", "means every layer",
                 "learning_rate has no effect beside lr_schedule", "lr_schedule is longer than the run"):  # fmt: skip
        assert note in told
    assert TrainConfig.from_mapping(file.config).scale == 2.0


@pytest.mark.parametrize(
    ("name", "values"),
    [("clip", ("nan", "-1", "inf")), ("weight_decay", ("nan", "-0.1", "inf")), ("learning_rate", ("nan", "0", "-1")),
     ("alpha", ("nan", "0", "-2", "inf")), ("dropout", ("nan", "-0.1", "1")), ("warmup", ("nan", "-1", "1")),
     ("beta1", ("nan", "1")), ("beta2", ("nan", "0")), ("eps", ("nan", "-1"))],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_by_name(tmp_path, name, values):
    for value in values:
        written = {"nan": ".nan", "inf": ".inf"}.get(value, value)
        file = read(tmp_path, f"base: b\n{name}: {written}\noptimizer: adamw\n")
        with pytest.raises(RsgwmError, match=f"{name} = {float(value)!r} is out of range"):
            TrainConfig.from_mapping(file.config)
        with pytest.raises(RsgwmError, match=f"{name} = .* is out of range"):
            TrainConfig.from_mapping({name: float(value), "optimizer": "adamw"})


@pytest.mark.parametrize(
    ("schedule", "message"),
    [("{name: cosine_decay, arguments: [1e-4, 9], warmup: true}", "lr_schedule.warmup: expected a number, found True"),
     ("{name: cosine_decay, arguments: [1e-4, true]}", "lr_schedule.arguments: expected a number"),
     ("{name: cosine_decay, arguments: [1e-4, 9], warm: 3}", "unknown key 'lr_schedule.warm', did you mean 'warmup'")],
)  # fmt: skip
def test_a_schedule_of_our_own_is_checked_as_deep_as_it_goes(tmp_path, schedule, message):
    file = read(tmp_path, "base: b\nschedule: constant\nwarmup: 0\nbeta1: 0.8\n")
    lr_schedule = yaml.safe_load(schedule.replace("1e-4", "0.0001"))
    with pytest.raises(RsgwmError, match=message):
        TrainConfig.from_mapping({**file.config, "lr_schedule": lr_schedule})
