"""Tiny configurations of mixtures of experts, by model type; see ``architecture_configs``."""

from __future__ import annotations

from typing import Any

from mlx_rsgwm.bench.architecture_sizes import LINEAR_ATTENTION, MLA, MOE, ROUTED, UNTIED, VISION

MIXTURES: dict[str, dict[str, Any]] = {
    "afmoe": {
        "config": {
            **MOE,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_attn_every_n_layers": 2,
            "sliding_window": 32,
            "n_group": 1,
            "topk_group": 1,
        }
    },
    "dbrx": {
        "config": {
            **UNTIED,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        }
    },
    "deepseek_v2": {
        "config": {
            **ROUTED,
            **MLA,
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
    "deepseek_v3": {"config": {**ROUTED, **MLA, "num_key_value_heads": 4}},
    "deepseek_v32": {
        "config": {
            **ROUTED,
            **MLA,
            "num_key_value_heads": 4,
            "index_n_heads": 4,
            "index_head_dim": 16,
            "index_topk": 64,
        }
    },
    "dots1": {"config": {**ROUTED, "num_key_value_heads": 4}},
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
    "exaone_moe": {
        "config": {
            **MOE,
            "num_shared_experts": 1,
            "is_moe_layer": [False, True],
            "n_group": 1,
            "topk_group": 1,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        }
    },
    "glm4_moe": {
        "config": {**ROUTED, "partial_rotary_factor": 0.5, "use_qk_norm": True},
        "json": {"rope_scaling": None},
    },
    "glm4_moe_lite": {"config": {**ROUTED, **MLA, "num_key_value_heads": 4}},
    "glm_moe_dsa": {
        "config": {
            **ROUTED,
            **MLA,
            "num_key_value_heads": 4,
            "index_n_heads": 4,
            "index_head_dim": 16,
            "index_topk": 64,
        },
        "json": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
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
    "laguna": {"config": MOE, "to exclude": ["shared_expert"]},
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
    "longcat_flash": {
        "config": {
            **MLA,
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
    "mellum": {"config": MOE, "json": {"num_experts": 4}},
    "minimax_m2": {
        "config": {**UNTIED, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
        "json": {"shared_intermediate_size": 48, "rotary_dim": 8},
    },
    "mixtral": {"config": {**UNTIED, "num_local_experts": 4, "num_experts_per_tok": 2}},
    "olmoe": {"config": {**UNTIED, "num_experts": 4, "num_experts_per_tok": 2}},
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
    "qwen2_moe": {
        "config": {**MOE, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1, "mlp_only_layers": []},
        "json": {"num_experts": 4},
    },
    "qwen3_moe": {
        "config": {**MOE, "decoder_sparse_step": 1, "mlp_only_layers": [0], "norm_topk_prob": True},
        "json": {"num_experts": 4},
    },
    "qwen3_next": {
        "config": {
            **MOE,
            **LINEAR_ATTENTION,
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
        }
    },
    "qwen3_5_moe": {
        "text": True,
        "config": {**MOE, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 40, "norm_topk_prob": True},
        "more": {**UNTIED, "vision_config": VISION},
        "model": "Qwen3_5MoeForConditionalGeneration",
    },
    "solar_open": {"config": ROUTED, "json": {"partial_rotary_factor": 1.0}},
}
