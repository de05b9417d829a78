"""Tiny configurations of the architectures that mlx-lm and transformers share: what each needs beyond common sizes."""

from __future__ import annotations

from typing import Any

VOCABULARY = 288
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
UNTIED = {"tie_word_embeddings": False}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **UNTIED}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    **UNTIED,
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "full_attention_interval": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 14,
}
MAMBA = {"state_size": 8, "expand": 2, "conv_kernel": 4}
# model type: ``config`` beyond SIZES; ``json``: fields of config.json as published models have them; ``model``: the
# class, where not AutoModelForCausalLM's; ``text``: the fields are those of text_config; ``exclude``, ``to exclude``:
# modules left out; ``strip``: a prefix that published checkpoints leave out
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": {
        "config": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            **UNTIED,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_attn_every_n_layers": 2,
            "sliding_window": 32,
            "n_group": 1,
            "topk_group": 1,
        }
    },
    "apertus": {"config": {**UNTIED}, "json": {"mlp_bias": False, "post_norm": False, "qk_norm": True}},
    "cohere": {"config": {}},
    "cohere2": {
        "config": {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
        "json": {"sliding_window_pattern": 2},
    },
    "dbrx": {
        "config": {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
            **UNTIED,
        }
    },
    "deepseek_v2": {
        "config": {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            **UNTIED,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "topk_method": "greedy",
            "num_key_value_heads": 4,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 10000.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        }
    },
    "deepseek_v3": {
        "config": {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            **UNTIED,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        }
    },
    "deepseek_v32": {
        "config": {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            **UNTIED,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "index_n_heads": 4,
            "index_head_dim": 16,
            "index_topk": 64,
        }
    },
    "dots1": {
        "config": {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            **UNTIED,
            "num_key_value_heads": 4,
        }
    },
    "ernie4_5": {"config": {**UNTIED}},
    "ernie4_5_moe": {
        "config": {
            **UNTIED,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        }
    },
    "exaone4": {
        "config": {**UNTIED, "sliding_window": None, "layer_types": ["full_attention", "full_attention"]},
        "json": {"rope_scaling": None, "sliding_window_pattern": None},
    },
    "exaone_moe": {
        "config": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            **UNTIED,
            "num_shared_experts": 1,
            "is_moe_layer": [False, True],
            "n_group": 1,
            "topk_group": 1,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        }
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
    "falcon_mamba": {
        "config": {"state_size": 8, "expand": 2, "conv_kernel": 4},
        "exclude": ["out_proj", "conv1d", "dt_proj"],
    },
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
        "config": {"sliding_window": 32, "query_pre_attn_scalar": 8},
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
    "glm4_moe": {
        "config": {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            **UNTIED,
            "partial_rotary_factor": 0.5,
            "use_qk_norm": True,
        },
        "json": {"rope_scaling": None},
    },
    "glm4_moe_lite": {
        "config": {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            **UNTIED,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        }
    },
    "glm_moe_dsa": {
        "config": {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            **UNTIED,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "index_n_heads": 4,
            "index_head_dim": 16,
            "index_topk": 64,
        },
        "json": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    },
    "gpt2": {
        "config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "max_position_embeddings": 128},
        "json": {"n_ctx": 128},
        "strip": "transformer.",
    },
    "gpt_bigcode": {
        "config": {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "multi_query": True,
            "n_inner": 48,
        }
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
    "granitemoe": {"config": {**UNTIED, "num_local_experts": 4, "num_experts_per_tok": 2}},
    "granitemoehybrid": {
        "config": {
            **UNTIED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 40,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
        },
        "exclude": ["conv1d"],
    },
    "helium": {"config": {**UNTIED}},
    "hunyuan_v1_dense": {"config": {**UNTIED}},
    "jamba": {
        "config": {
            **UNTIED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        }
    },
    "laguna": {
        "config": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **UNTIED},
        "to exclude": ["shared_expert"],
    },
    "lfm2": {
        "config": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
        "json": {"block_dim": 32, "block_multiple_of": 1, "block_ffn_dim_multiplier": 1.0, "block_ff_dim": 48},
    },
    "lfm2_moe": {
        "config": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "layer_types": ["conv", "full_attention"],
            "num_dense_layers": 1,
            "conv_L_cache": 3,
        }
    },
    "llama": {"config": {**UNTIED, "attention_bias": True}},
    "longcat_flash": {
        "config": {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            **UNTIED,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 24,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 1,
            "num_layers": 2,
            "num_key_value_heads": 4,
        }
    },
    "mamba": {"config": {"state_size": 8, "expand": 2, "conv_kernel": 4}, "exclude": ["out_proj", "conv1d", "dt_proj"]},
    "mamba2": {
        "config": {
            "state_size": 8,
            "expand": 2,
            "conv_kernel": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            **UNTIED,
        },
        "exclude": ["out_proj", "conv1d"],
    },
    "mellum": {
        "config": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **UNTIED},
        "json": {"num_experts": 4},
    },
    "minimax_m2": {
        "config": {**UNTIED, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
        "json": {"shared_intermediate_size": 48, "rotary_dim": 8},
    },
    "ministral3": {"config": {**UNTIED}},
    "mistral": {"config": {**UNTIED, "sliding_window": None}},
    "mixtral": {"config": {**UNTIED, "num_local_experts": 4, "num_experts_per_tok": 2}},
    "nemotron": {"config": {**UNTIED, "partial_rotary_factor": 0.5}},
    "nemotron_h": {
        "config": {
            "initializer_range": 0.05,
            **UNTIED,
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
        },
        "exclude": ["out_proj", "conv1d"],
    },
    "olmo2": {"config": {**UNTIED}},
    "olmo3": {
        "config": {**UNTIED, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
        "json": {"rope_theta": 10000.0},
    },
    "olmo_hybrid": {
        "config": {
            **UNTIED,
            "layer_types": ["linear_attention", "full_attention"],
            "full_attention_interval": 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 4,
        }
    },
    "olmoe": {"config": {"num_experts": 4, "num_experts_per_tok": 2, **UNTIED}},
    "phi": {"config": {**UNTIED, "partial_rotary_factor": 0.5}},
    "phi3": {"config": {**UNTIED, "sliding_window": None}},
    "phimoe": {
        "config": {
            **UNTIED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "attention_bias": True,
            "lm_head_bias": True,
        },
        "exclude": ["router"],
        "to exclude": [],
    },
    "qwen2": {"config": {**UNTIED}},
    "qwen2_moe": {
        "config": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            **UNTIED,
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        "json": {"num_experts": 4},
    },
    "qwen3": {"config": {}},
    "qwen3_moe": {
        "config": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            **UNTIED,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
        },
        "json": {"num_experts": 4},
    },
    "qwen3_next": {
        "config": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            **UNTIED,
            "layer_types": ["linear_attention", "full_attention"],
            "full_attention_interval": 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 4,
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
        }
    },
    "qwen3_5": {
        "text": True,
        "config": {
            "layer_types": ["linear_attention", "full_attention"],
            "full_attention_interval": 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 4,
        },
        "more": {
            **UNTIED,
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "out_hidden_size": 32,
                "patch_size": 14,
            },
        },
        "model": "Qwen3_5ForConditionalGeneration",
    },
    "qwen3_5_moe": {
        "text": True,
        "config": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            **UNTIED,
            "layer_types": ["linear_attention", "full_attention"],
            "full_attention_interval": 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 4,
            "shared_expert_intermediate_size": 40,
            "norm_topk_prob": True,
        },
        "more": {
            **UNTIED,
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "out_hidden_size": 32,
                "patch_size": 14,
            },
        },
        "model": "Qwen3_5MoeForConditionalGeneration",
    },
    "recurrent_gemma": {
        "config": {
            "lru_width": 32,
            "attention_window_size": 32,
            "block_types": ["recurrent", "attention"],
            "num_key_value_heads": 1,
        }
    },
    "seed_oss": {"config": {**UNTIED}},
    "smollm3": {"config": {**UNTIED}},
    "solar_open": {
        "config": {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            **UNTIED,
        },
        "json": {"partial_rotary_factor": 1.0},
    },
    "stablelm": {"config": {**UNTIED, "partial_rotary_factor": 0.5, "use_qkv_bias": True}},
    "starcoder2": {"config": {**UNTIED, "sliding_window": None, "hidden_act": "gelu_pytorch_tanh"}},
}


def make_config(name: str) -> tuple[Any, str | None]:
    """transformers' configuration of the architecture, and its class where AutoModelForCausalLM's is not meant."""
    from transformers import AutoConfig

    entry = ARCHITECTURES[name]
    fields = {**SIZES, **entry["config"]}
    if entry.get("text"):
        return AutoConfig.for_model(name, text_config=fields, **entry.get("more", {})), entry["model"]
    return AutoConfig.for_model(name, **fields), None
