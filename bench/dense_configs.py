"""Tiny configurations of models without experts, by model type; see ``architecture_configs``."""

from __future__ import annotations

from typing import Any

from mlx_rsgwm.bench.architecture_sizes import LINEAR_ATTENTION, MAMBA, UNTIED, VISION

DENSE: dict[str, dict[str, Any]] = {
    "apertus": {"config": UNTIED, "json": {"mlp_bias": False, "post_norm": False, "qk_norm": True}},
    "cohere": {"config": {}},
    "cohere2": {
        "config": {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
        "json": {"sliding_window_pattern": 2},
    },
    "ernie4_5": {"config": UNTIED},
    "exaone4": {
        "config": {**UNTIED, "sliding_window": None, "layer_types": ["full_attention", "full_attention"]},
        "json": {"rope_scaling": None, "sliding_window_pattern": None},
    },
    "falcon_h1": {
        "config": {
            **UNTIED,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_expand": 1,
            "attention_in_multiplier": 1.0,
            "key_multiplier": 1.0,
            "attention_out_multiplier": 0.9375,
            "mlp_multipliers": [0.88, 0.5859],
            "ssm_multipliers": [0.35, 0.25, 0.17, 0.5, 0.35],
            "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.6,
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 2.0,
        },
        "exclude": ["out_proj", "conv1d"],
    },
    "falcon_mamba": {"config": MAMBA, "exclude": ["out_proj", "conv1d", "dt_proj"]},
    "gemma": {"config": {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu"}},
    "gemma2": {"config": {"sliding_window": 32, "query_pre_attn_scalar": 8}},
    "gemma3_text": {
        "config": {
            "sliding_window": 32,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "json": {"sliding_window_pattern": 2},
    },
    "gemma3": {
        "text": True,
        "config": {"num_hidden_layers": 6, "sliding_window": 32, "query_pre_attn_scalar": 8},
        "more": {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
        "model": "Gemma3ForConditionalGeneration",
        "json": {"vocab_size": 288},
    },
    "glm": {"config": {**UNTIED, "partial_rotary_factor": 0.5}},
    "glm4": {"config": {**UNTIED, "partial_rotary_factor": 0.5}},
    "gpt2": {
        "config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "max_position_embeddings": 128},
        "json": {"n_ctx": 128},
        "strip": "transformer.",
    },
    "gpt_bigcode": {
        "config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "multi_query": True, "n_inner": 48}
    },
    "gpt_neox": {
        "config": {**UNTIED, "rotary_pct": 0.5, "use_parallel_residual": True},
        "json": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    },
    "gptj": {"config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}},
    "granite": {
        "config": {
            "embedding_multiplier": 2.0,
            "logits_scaling": 1.5,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
        }
    },
    "helium": {"config": UNTIED},
    "hunyuan_v1_dense": {"config": UNTIED},
    "lfm2": {
        "config": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
        "json": {"block_dim": 32, "block_multiple_of": 1, "block_ffn_dim_multiplier": 1.0, "block_ff_dim": 48},
    },
    "llama": {"config": {**UNTIED, "attention_bias": True}},
    "mamba": {"config": MAMBA, "exclude": ["out_proj", "conv1d", "dt_proj"]},
    "mamba2": {
        "config": {**MAMBA, **UNTIED, "num_heads": 8, "head_dim": 8, "n_groups": 1},
        "exclude": ["out_proj", "conv1d"],
    },
    "ministral3": {"config": UNTIED},
    "mistral": {"config": {**UNTIED, "sliding_window": None}},
    "nemotron": {"config": {**UNTIED, "partial_rotary_factor": 0.5}},
    "nemotron_h": {
        "config": {
            **UNTIED,
            "initializer_range": 0.05,
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
        },
        "exclude": ["out_proj", "conv1d"],
    },
    "olmo2": {"config": UNTIED},
    "olmo3": {
        "config": {**UNTIED, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
        "json": {"rope_theta": 10000.0},
    },
    "olmo_hybrid": {"config": {**LINEAR_ATTENTION, **UNTIED}},
    "phi": {"config": {**UNTIED, "partial_rotary_factor": 0.5}},
    "phi3": {"config": {**UNTIED, "sliding_window": None}},
    "qwen2": {"config": UNTIED},
    "qwen3": {"config": {}},
    "qwen3_5": {
        "text": True,
        "config": LINEAR_ATTENTION,
        "more": {**UNTIED, "vision_config": VISION},
        "model": "Qwen3_5ForConditionalGeneration",
    },
    "recurrent_gemma": {
        "config": {
            "lru_width": 32,
            "attention_window_size": 32,
            "block_types": ["recurrent", "attention"],
            "num_key_value_heads": 1,
        }
    },
    "seed_oss": {"config": UNTIED},
    "smollm3": {"config": UNTIED},
    "stablelm": {"config": {**UNTIED, "partial_rotary_factor": 0.5, "use_qkv_bias": True}},
    "starcoder2": {"config": {**UNTIED, "sliding_window": None, "hidden_act": "gelu_pytorch_tanh"}},
}
