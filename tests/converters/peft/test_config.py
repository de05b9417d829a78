"""PEFT's adapter_config.json: scales, patterns, and every refusal with its field."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_rsgwm.converters.peft.config import alpha_for, config_problems, pattern_problem, scale_of, selects
from mlx_rsgwm.converters.peft.convert import from_peft, to_peft
from tests.converters.peft.tiny_adapters import make_adapter


def test_rank_stabilised_scale_divides_by_the_root():
    assert scale_of({"r": 16, "lora_alpha": 32, "use_rslora": True}) == 8.0
    assert scale_of({"r": 16, "lora_alpha": 32}) == 2.0


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 49, 64])
def test_alpha_divides_back_to_the_scale(rank):
    scales = [2.0, 0.1, 1 / 3, 20.0, 1e-3, -1.5, math.pi, *np.random.default_rng(0).uniform(0.01, 40, 200)]
    off = [scale for scale in map(float, scales) if alpha_for(scale, rank) / rank != scale]
    assert all(abs(alpha_for(scale, rank) / rank / scale - 1) < 3e-16 for scale in off)
    assert len(off) <= 0.2 * len(scales)
    assert alpha_for(2.0, 16) == 32
    assert isinstance(alpha_for(2.0, 16), int)


@pytest.mark.parametrize("rank", [3, 7, 49])
def test_a_scale_that_no_alpha_gives_still_survives(tmp_path, rank):
    scales = np.random.default_rng(1).uniform(0.01, 40, 2000).tolist()
    scale = next(one for one in scales if alpha_for(one, rank) / rank != one)
    to_peft(make_adapter(rank=rank, scale=scale), "b", tmp_path / "peft")
    assert from_peft(tmp_path / "peft").spec.scale == scale


GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: 'q_proj' has rank 0"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: 'q_proj' has alpha None"),
        ({"rank_pattern": [8]}, "rank_pattern must map"),
        ({"rank_pattern": {"(": 8}}, "is not a regular expression"),
        ({"target_modules": r"((a)\2+)+$"}, "could take forever (groupref among"),
        ({"rank_pattern": {"(?i)q_proj": 8}}, "is not a regular expression"),
        ({"layers_pattern": ["h", "(.*)+"]}, "is not the name of a list of layers"),
        ({"layers_pattern": r"(?P<layer>h)"}, "is not a regular expression"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number"),
        ({"alpha_pattern": {"q_proj": -(10**400)}}, "alpha_pattern: 'q_proj' has alpha"),
        ({"r": 10**400}, "r must be a whole number"),
        ({"target_modules": 7}, "target_modules must be a list"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform must be"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: not a list"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"lora_bias": "yes"}, "lora_bias must be"),
        ({"trainable_token_indices": {"embed_tokens": ["a"]}}, "trainable_token_indices must be"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "QALoRA"),
        ({"alora_invocation_tokens": [3]}, "activated LoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"kasa_config": {"beta": 1}}, "kasa_config asks for KaSA"),
        ({"arrow_config": {"top_k": 1}}, "Arrow"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"monteclora_config": {"num_samples": 2}}, "Monte Carlo"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"something_new": 1, "peft_version": "0.99.1"}, "something_new is an option of PEFT 0.99.1"),
        ({"something_new": 1, "peft_version": "1.0.0.dev0"}, "something_new is an option of PEFT 1.0.0.dev0"),
        ({"enable_lora": [True, False, True]}, "parts of a fused layer"),
        ({"target_modules": "a" * 300_000}, "300000 characters long"),
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "XLORA"}, "XLORA"),
        ({"peft_type": "LOKR"}, "LOKR"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": 0}, "r must be"),
        ({"r": "four"}, "r must be"),
        ({"lora_alpha": 0}, "lora_alpha must be"),
        ({"lora_alpha": math.inf}, "lora_alpha must be"),
        ({"lora_dropout": 1.0}, "lora_dropout must be"),
        ({"use_rslora": "yes"}, "use_rslora must be"),
        ({"use_dora": "yes"}, "use_dora must be"),
    ],
)
def test_every_refusal_names_its_field(change, expected):
    assert config_problems(GOOD) == []
    problems = config_problems({**GOOD, **change})
    assert len(problems) == 1
    assert expected in problems[0]


def test_the_expression_that_unsloth_writes_is_taken():
    parts = r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    names = "(?:k_proj|q_proj|v_proj|fc1|fc2)"
    pattern = (
        rf"(?:.*?(?:vision|image|visual|patch|language|text).*?{parts}.*?{names}.*?)"
        rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.{parts}\.(?:{names}))"
    )
    assert pattern_problem(pattern) is None
    config = {"target_modules": pattern}
    assert selects(config, "model.layers.13.self_attn.q_proj")
    assert not selects(config, "model.layers.13.self_attn.o_proj")
