"""Small adapters made by PEFT and by this project, their arrays, and both sides' logits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.base import load_base

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


HIDDEN, LAYERS, VOCABULARY = 64, 3, 96
IDS = [[1, 5, 9, 2, 33, 70, 41, 8, 95, 3, 17]]
SHAPES = {  # module: (out, in), with half as many key–value heads
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (80, 64),
    "mlp.down_proj": (64, 80),
}
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def randomise(model, seed=3):
    """Give every adapter array of a PEFT model normal values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def make_peft(torch_base, folder, dtype="float32", **settings):
    """A PEFT folder made by PEFT itself."""
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    )
    model = randomise(peft.get_peft_model(torch_base(), config, autocast_adapter_dtype=False))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(str(folder))
    return folder


def make_adapter(layers=range(LAYERS), keys=tuple(SHAPES)[:4], rank=4, scale=2.0, dtype=mx.float32, manifest=None):
    """A random adapter of the tiny base, with importance and initialisation."""
    key, weights = mx.random.key(7), {}
    for layer in layers:
        for name in keys:
            out_dims, in_dims = SHAPES[name]
            key, one, two = mx.random.split(key, 3)
            module = f"model.layers.{layer}.{name}"
            weights[f"{module}.lora_a"] = (0.2 * mx.random.normal((in_dims, rank), key=one)).astype(dtype)
            weights[f"{module}.lora_b"] = (0.2 * mx.random.normal((rank, out_dims), key=two)).astype(dtype)
    importance = {f"{s}/{n}": mx.abs(v.astype(mx.float32)) for s in ("all", "draft") for n, v in weights.items()}
    init = {name: value * 0.5 for name, value in weights.items() if name.endswith("lora_a")}
    spec = LoraSpec(rank, scale, 0.05, tuple(keys), LAYERS - min(layers))
    return Adapter(spec, weights, importance, {"steps": "12"}, init, manifest or {})


def raw(folder):
    """PEFT's arrays as torch tensors by name."""
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same_arrays(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.shape == theirs[name].shape, name
        width = mx.uint32 if value.dtype == mx.float32 else mx.uint16
        assert mx.array_equal(value.view(width), theirs[name].view(width)), name


def mlx_logits(base_folder, adapter_folder):
    from mlx_lm.tuner.utils import load_adapters

    model = load_base(str(base_folder), dtype="float32").model
    load_adapters(model, str(adapter_folder))
    model.eval()
    return np.array(model(mx.array(IDS))[0])


def torch_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits[0].float().numpy()


def save_raw(folder, arrays):
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays, {"format": "pt"})


def arrays_of(folder):
    return dict(mx.load(str(folder / "adapter_model.safetensors")))


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
