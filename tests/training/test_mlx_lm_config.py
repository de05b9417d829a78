"""YAML for training: ours, and mlx_lm.lora's key by key."""

import pytest
import yaml

from mlx_rsgwm.errors import RsgwmError
from mlx_rsgwm.training.config import TrainConfig, learning_rate_at
from mlx_rsgwm.training.mlx_lm_config import read_training_file

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
        "schedule": "cosine", "learning_rate": 1e-4, "warmup": 0.1,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.scale == 20.0
    assert file.run == {
        "base": "mlx_model", "data": "/path/to/training/data", "out": "adapters", "save_every": 25, "mask_prompt": True,
    }  # fmt: skip
    notes = "\n".join(file.notes)
    for told in ("iters → steps = 150", "max_seq_length → max_tokens", "val_batches has no effect", "bias correction",
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
        ("model: m\nresume_adapter_file: a.safetensors", "resume_adapter_file: 'a.safetensors' cannot"),
        ("model: m\nhf_dataset: {path: x}", "hf_dataset has no counterpart"),
        ("model: m\ntrust_remote_code: true", "trust_remote_code: True cannot"),
        ("model: m\nlora_parameters: {rank: 8}", "lora_parameters has no scale"),
        ("model: m\nlora_parameters: {rank: 8, scale: 2, bias: true}", "lora_parameters.bias has no counterpart"),
        ("model: m\nlr_schedule: {name: exponential_decay, arguments: [1e-4, 0.9]}", "'exponential_decay' cannot"),
        ("model: m\nlr_schedule: {name: cosine_decay, arguments: [1e-4, 1000, 1e-6]}", "ends at 1e-06"),
        ("model: m\nlr_schedule: {name: cosine_decay, arguments: [1e-4, 10]}", "lasts 10 steps of 1000"),
        ("model: m\nlr_schedule: {name: linear_schedule, arguments: [1e-4, 1e-5, 1000]}", "ends at 1e-05"),
        ("model: m\noptimizer_config: {adam: {bias_correction: false}}", "bias_correction: false"),
        ("model: m\noptimizer_config: {adam: {eps: 1.0}}", "optimizer_config.adam.eps has no counterpart"),
        ("rnak: 8", "did you mean 'rank'"),
        ("- 8", "expected keys and values"),
        ("a: [", "not valid YAML"),
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
