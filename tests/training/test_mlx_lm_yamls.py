"""Configurations of mlx_lm.lora as people write them: the same rates, the same trained arrays as mlx-lm's own code."""

from types import SimpleNamespace

import mlx.core as mx
import pytest
import yaml
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.utils import build_schedule, linear_to_lora_layers

from mlx_rsgwm.training.config import TrainConfig, learning_rate_at, make_optimizer
from mlx_rsgwm.training.layers import linear_keys, lora_layers, trainable
from mlx_rsgwm.training.mlx_lm_yaml import DEFAULTS, read_training_file

YAMLS = {
    "documentation": """
        train: true
        fine_tune_type: lora
        optimizer: adamw
        optimizer_config: {adamw: {betas: [0.9, 0.98], eps: 1e-6, weight_decay: 0.05, bias_correction: true}}
        seed: 0
        num_layers: 16
        batch_size: 4
        iters: 1000
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
        grad_checkpoint: false
        lora_parameters: {keys: ["self_attn.q_proj", "self_attn.v_proj"], rank: 8, scale: 20.0, dropout: 0.0}
        lr_schedule: {name: cosine_decay, warmup: 100, warmup_init: 1e-7, arguments: [1e-5, 1000, 1e-7]}
        """,
    "old-names": "lora_layers: 8\nbatch_size: 1\niters: 600\nlora_parameters: {keys: [self_attn.q_proj], rank: 8, "
    "alpha: 16.0, scale: 10.0, dropout: 0.0}",
    "minimal": "train: true\niters: 100",
    "all-layers": "num_layers: -1\niters: 300\nlearning_rate: 2e-4\nbatch_size: 1\ngrad_checkpoint: true",
    "zero-layers": "num_layers: 0\niters: 3",
    "attention-and-mlp": "num_layers: 24\niters: 500\nlora_parameters: {rank: 16, scale: 2, dropout: 0.05, keys: ["
    "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj, mlp.gate_proj, mlp.up_proj, "
    "mlp.down_proj]}",
    "head-and-embedding": "num_layers: 4\niters: 10\nlora_parameters: {rank: 4, scale: 10.0, dropout: 0.0, keys: ["
    "self_attn.v_proj, lm_head, model.embed_tokens]}",
    "head-alone": "iters: 10\nlora_parameters: {rank: 4, scale: 10.0, dropout: 0.0, keys: [lm_head]}",
    "dora": "fine_tune_type: dora\niters: 200\nnum_layers: 8\nlora_parameters: {rank: 8, scale: 20.0, dropout: 0.1}",
    "linear-schedule": "iters: 600\nlr_schedule: {name: linear_schedule, arguments: [1e-4, 0.0, 600]}",
    "linear-up": "iters: 60\nlr_schedule: {name: linear_schedule, arguments: [0, 1e-4, 100]}",
    "longer-than-run": "iters: 600\nlr_schedule: {name: cosine_decay, warmup: 100, arguments: [1e-4, 2000]}",
    "shorter-than-run": "iters: 600\nlr_schedule: {name: cosine_decay, arguments: [1e-4, 62, 1e-6]}",
    "warmup-longer": "iters: 50\nlr_schedule: {name: cosine_decay, warmup: 100, arguments: [1e-4, 1000]}",
    "step-decay": "iters: 100\nlr_schedule: {name: step_decay, arguments: [1e-4, 0.9, 10]}",
    "exponential": "iters: 100\nlr_schedule: {name: exponential_decay, arguments: [1e-4, 0.99], warmup: 5}",
    "accumulated": "iters: 400\ngrad_accumulation_steps: 8\nbatch_size: 1\n"
    "lr_schedule: {name: cosine_decay, warmup: 10, arguments: [1e-4, 40]}",
    "test-too": "train: true\ntest: true\ntest_batches: -1\niters: 20\nmask_prompt: true",
    "features": "iters: 20\nprompt_feature: question\ncompletion_feature: answer\nreport_to: wandb\nproject_name: 2024",
    "chat-feature": "iters: 20\nchat_feature: conversation\ntrust_remote_code: true\nclear_cache_threshold: 0",
    "text-feature": "iters: 20\ntext_feature: body\noptimizer: AdamW\noptimizer_config: {adam: {}, adamw: {}, sgd: {}}",
    "adam-options": "iters: 20\noptimizer_config: {adam: {betas: [0.8, 0.95], eps: 1e-6, bias_correction: false}}",
    "warm-start": "iters: 20\nresume_adapter_file: adapters/0000100_adapters.safetensors",
    "nulls": "iters: 20\nlr_schedule: null\nseed: null\nlora_parameters: null\noptimizer_config: null\n"
    "hf_dataset: null\nuse_dora: false\nreport_to: null\nmask_prompt: null",
    "merged": "iters: 20\nlora_parameters: {<<: {rank: 8, scale: 2.0, dropout: 0.0}, rank: 4}",
    "numbers-quoted": "iters: 1e2\nbatch_size: 2.0\nlearning_rate: '1e-4'\nlora_parameters: {rank: 8, scale: 1e1}",
}  # fmt: skip


def model():
    arguments = {
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 24, "intermediate_size": 24,
        "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 40,
        "tie_word_embeddings": False,
    }  # fmt: skip
    made = Model(ModelArgs.from_dict(arguments))
    made.freeze()
    return made


@pytest.mark.parametrize("name", list(YAMLS))
def test_rates_optimizer_and_trained_arrays_are_those_of_mlx_lm(tmp_path, name):
    text = f"model: m\ndata: d\n{YAMLS[name]}"
    path = tmp_path / "c.yaml"
    path.write_text(text.replace("\n        ", "\n"))
    file = read_training_file(path)
    config = TrainConfig.from_mapping(file.config)
    wanted = SimpleNamespace(**{**DEFAULTS, **{key: value for key, value in _as_mlx_lm_reads(path).items() if value}})

    steps = int(float(wanted.iters)) // getattr(wanted, "grad_accumulation_steps", 1)
    assert config.steps == steps
    schedule = getattr(wanted, "lr_schedule", None)
    rate = build_schedule(schedule) if schedule else lambda step: float(wanted.learning_rate)
    for step in sorted({*range(0, steps, 7), steps - 1}):
        expected = rate(step)
        expected = expected.item() if hasattr(expected, "item") else expected
        assert learning_rate_at(config, step, steps) == pytest.approx(expected, rel=1e-5, abs=1e-11)

    options = (getattr(wanted, "optimizer_config", None) or {}).get(wanted.optimizer.lower(), {})
    optimizer = make_optimizer(config)
    assert type(optimizer).__name__.lower() == wanted.optimizer.lower()
    assert optimizer.betas == list(options.get("betas", [0.9, 0.999]))
    assert optimizer.eps == options.get("eps", 1e-8)
    assert optimizer.bias_correction == options.get("bias_correction", True)

    theirs = model()
    layers = getattr(wanted, "lora_layers", wanted.num_layers) if "num_layers: 0" not in text else 0
    linear_to_lora_layers(theirs, layers, wanted.lora_parameters | {"dropout": 0.0}, wanted.fine_tune_type == "dora")
    expected = {key: value.shape for key, value in tree_flatten(theirs.trainable_parameters())}
    ours = model()
    keys = linear_keys(ours) if config.keys == ("all-linear",) else config.keys
    spec = TrainConfig.from_mapping({**file.config, "keys": list(keys), "dropout": 0.0}).spec()
    spec_scale = wanted.lora_parameters["scale"]
    assert spec.scale == pytest.approx(spec_scale)
    with lora_layers(ours, spec, 1):
        assert {key: value.shape for key, value in trainable(ours).items()} == expected
        bounds = {key: (mx.abs(value).max().item()) for key, value in trainable(ours).items() if key.endswith("lora_a")}
        for key, value in tree_flatten(theirs.trainable_parameters()):
            if key.endswith("lora_a"):
                assert bounds[key] == pytest.approx(mx.abs(value).max().item(), rel=0.4)


def _as_mlx_lm_reads(path):
    from mlx_lm.lora import yaml_loader

    return yaml.load(path.read_text(), yaml_loader)
