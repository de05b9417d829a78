"""One field of a base's configuration after the other changed: does mlx-lm still compute what transformers computes?

    python bench/base_configs.py [NAME ...]

A tiny random model of every architecture that both have is made by transformers, once as it is and once with each field
of its configuration changed, and opened as ``rsgwm`` opens a base. Where the change moves torch's logits, MLX's must
move along, within 1e-4 of the largest (5e-4 where the load says that mlx-lm computes nearly the same), or the base must
be refused. Every line printed is a field with which it is wrong; the last line is JSON: how many fields of each kind.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.bench.architecture_configs import ARCHITECTURES
from mlx_rsgwm.bench.architecture_sizes import SIZES
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.config import open_model

IDS = [int(i) for i in np.random.default_rng(0).integers(2, 120, 24)]
# Sizes (their arrays follow), and fields that say nothing of what is computed.
LEFT_OUT = {
    *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size", "vision_config"),
    *("max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
    *("transformers_version", "model_type", "architectures", "use_cache", "return_dict", "layer_types", "torch_dtype"),
    *("output_hidden_states", "output_attentions", "is_encoder_decoder", "id2label", "label2id", "problem_type"),
}
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size")
CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "default", "rope_theta": 3e5},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {**LLAMA3, "original_max_position_embeddings": 16},
    YARN,
    {**YARN, "attention_factor": 1.7},
    {**YARN, "truncate": False},
    {**YARN, "beta_fast": 8.0, "beta_slow": 2.0},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5},
)


def build(name: str, changed: dict[str, Any]) -> Any:
    """A random torch model of the architecture with some fields changed."""
    import torch
    import transformers

    entry = ARCHITECTURES[name]
    fields = {**SIZES, **entry["config"], **changed}
    torch.manual_seed(0)
    if entry.get("text"):
        config = transformers.AutoConfig.for_model(name, text_config=fields, **entry.get("more", {}))
        model = getattr(transformers, entry["model"])(config)
    else:
        config = transformers.AutoConfig.for_model(name, **fields)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.float().eval()


def compare(name: str, changed: dict[str, Any]) -> tuple[np.ndarray | None, Any, str]:
    """torch's logits (None where it refuses too), its configuration, and ``right``, ``refused`` or what is wrong."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        try:
            model = build(name, changed)
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].float().numpy()
            model.save_pretrained(folder)
        except Exception:  # whatever transformers says of a field changed at random
            return None, None, "not possible"
        try:
            opened, _, notes = open_model(Path(folder))
            logits = np.array(opened(mx.array([IDS]))[0].astype(mx.float32))
        except RsgwmError as error:
            return expected, model.config, f"refused: {str(error).partition(': ')[2][:150]}"
        except Exception as error:  # the sweep goes on, the line says so
            return expected, model.config, f"crash: {type(error).__name__}: {error}"
    error_share = float(np.abs(logits - expected).max() / np.abs(expected).max())
    told = " ".join(notes)
    if error_share < (5e-4 if "2e-4" in told else 1e-4):
        return expected, model.config, "right"
    return expected, model.config, "told" if "window" in told else f"WRONG by {error_share:.0e}"


def changes(config: Any) -> Iterator[tuple[str, Any]]:
    """Every field of a text configuration with another value or several."""
    fields = config.to_dict()
    for key, value in fields.items():
        if key in LEFT_OUT or key.startswith(("_", "rope_")):
            continue
        if isinstance(value, bool):
            yield key, not value
        elif isinstance(value, float):
            yield key, value * 1.5 + 0.25
        elif key.endswith(("_act", "activation", "activation_function")):
            yield from ((key, other) for other in ("silu", "gelu") if other != value)
        elif key in WINDOWS:
            yield key, 5
        elif key in CHOSEN:
            yield key, 1
        elif isinstance(value, int):
            yield key, value + 1
        elif value is None and "softcap" in key:
            yield key, 1.5
    yield from (("num_key_value_heads", 1), ("head_dim", 12), ("attention_bias", True), ("mlp_bias", True))
    yield from (("rope_parameters", table) for table in _tables(config))


def _tables(config: Any) -> Iterator[dict[str, Any]]:
    usual = getattr(config, "rope_parameters", None)
    if not isinstance(usual, dict) or not usual:
        return
    shared = ("partial_rotary_factor", "mrope_section", "rope_theta")
    for table in ROPES:
        if all(isinstance(value, dict) for value in usual.values()):
            for kind, rotation in usual.items():
                yield {
                    **copy.deepcopy(usual),
                    kind: {**{key: rotation[key] for key in shared if key in rotation}, **table},
                }
        else:
            yield {**{key: usual[key] for key in shared if key in usual}, **table}


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    for name in sys.argv[1:] or sorted(ARCHITECTURES):
        usual, config, verdict = compare(name, {})
        print(f"{name}: {verdict}", flush=True)
        counts[verdict.split(":")[0].split(" by")[0]] += 1
        if usual is None or verdict != "right":
            continue
        text = config.get_text_config() if ARCHITECTURES[name].get("text") else config
        for key, value in changes(text):
            logits, _, outcome = compare(name, {key: value})
            moved = logits is not None and (logits.shape != usual.shape or np.abs(logits - usual).max() > 1e-5)
            counts[outcome.split(":")[0].split(" by")[0] if moved else "no effect"] += 1
            if moved and outcome.startswith(("WRONG", "crash")):
                print(f"  {key} = {json.dumps(value)[:120]}: {outcome}", flush=True)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
