"""What this project uses of mlx-lm beyond its public face, name by name, so that a new mlx-lm says what to look at.

mlx-lm documents ``load``, ``generate``, ``stream_generate``, ``batch_generate`` and ``convert``; nothing else of it is
documented, and it has no upper bound in ``pyproject.toml``. Here stands every other name that the package imports, with
the parameters that it had when it was tried. ``mlx_lm.models.<type>`` modules are found by name and not listed.
"""

import ast
import importlib
import inspect
from pathlib import Path

import mlx_lm
import pytest

ROOT = Path(__file__).parent.parent
USED = {
    "mlx_lm.generate.generate_step": (
        "prompt model stream max_tokens sampler logits_processors max_kv_size "
        "prompt_cache prefill_step_size kv_bits kv_group_size "
        "quantized_kv_start prompt_progress_callback input_embeddings"
    ),
    "mlx_lm.generate.generation_stream": None,
    "mlx_lm.generate.wired_limit": "model streams",
    "mlx_lm.models.base.scaled_dot_product_attention": "queries keys values cache scale mask sinks",
    "mlx_lm.models.cache.BatchKVCache": "left_padding",
    "mlx_lm.models.cache.KVCache": "",
    "mlx_lm.models.cache.can_trim_prompt_cache": "cache",
    "mlx_lm.models.cache.make_prompt_cache": "model max_kv_size",
    "mlx_lm.models.cache.trim_prompt_cache": "cache num_tokens",
    "mlx_lm.models.switch_layers.QuantizedSwitchLinear": (
        "input_dims output_dims num_experts bias group_size bits mode global_scale"
    ),
    "mlx_lm.models.switch_layers.SwitchLinear": "input_dims output_dims num_experts bias",
    "mlx_lm.tokenizer_utils.TokenizerWrapper": (
        "tokenizer detokenizer_class eos_token_ids chat_template tool_call_start tool_call_end tool_parser "
        "response_format"
    ),
    "mlx_lm.tuner.dora.DoRALinear": "input_dims output_dims r dropout scale bias",
    "mlx_lm.tuner.lora.LoRAEmbedding": "num_embeddings dims r dropout scale",
    "mlx_lm.tuner.lora.LoRALinear": "input_dims output_dims r dropout scale bias",
    "mlx_lm.tuner.utils.load_adapters": "model adapter_path",
    "mlx_lm.utils.MODEL_REMAPPING": None,
    "mlx_lm.utils._get_classes": "config",
    "mlx_lm.utils.dequantize_model": "model",
    "mlx_lm.utils.load_model": "model_path lazy strict model_config get_model_classes trust_remote_code",
    "mlx_lm.utils.load_tokenizer": "model_path tokenizer_config_extra eos_token_ids",
    "mlx_lm.utils.make_shards": "weights max_file_size_gb",
    "mlx_lm.utils.quantize_model": "model config group_size bits mode global_scale quant_predicate",
    "mlx_lm.utils.save_config": "config config_path keep_vision_config",
    "mlx_lm.utils.save_model": "save_path model donate_model",
}
PRIVATE = {"mlx_lm.utils._get_classes"}


def imported_names():
    """Every name of mlx-lm that the package imports, and the files that do."""
    users = {}
    for folder in ("mlx_rsgwm", "converters", "cli"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mlx_lm":
                    for alias in node.names:
                        users.setdefault(f"{node.module}.{alias.name}", []).append(file.relative_to(ROOT).as_posix())
                if isinstance(node, ast.Import):
                    for alias in node.names:
                        if alias.name.split(".")[0] == "mlx_lm":
                            users.setdefault(alias.name, []).append(file.relative_to(ROOT).as_posix())
    return users


USERS = imported_names()


def test_every_import_of_mlx_lm_is_listed():
    public = {f"mlx_lm.{name}" for name in mlx_lm.__all__}
    assert set(USERS) - public == set(USED)
    assert {name for name in USED if name.rpartition(".")[2].startswith("_")} == PRIVATE


@pytest.mark.parametrize("name", USED)
def test_the_installed_mlx_lm_has_it(name):
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute, None)
    told = f"mlx-lm {mlx_lm.__version__} changed {name}; used in {', '.join(USERS[name])}"
    assert value is not None, told
    if USED[name] is not None:
        assert " ".join(inspect.signature(value).parameters) == USED[name], told
