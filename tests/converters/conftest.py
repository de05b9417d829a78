"""Small torch models of the architectures that go to GGUF and back."""

import pytest

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 7,  # one more than gemma3's pattern of window and full attention
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 260,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# llama.cpp's architecture: (transformers' class, more of its config)
MODELS = {
    "llama": ("Llama", {"rope_theta": 5e4, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": ("Gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 16}),  # mlx-lm's has no window at all
    "gemma3": ("Gemma3", {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    "phi2": ("Phi", {"rope_theta": 5e4, "partial_rotary_factor": 0.375, "tie_word_embeddings": False}),  # 6 of 16
    "phi3": ("Phi3", {"sliding_window": None, "tie_word_embeddings": False}),
}


@pytest.fixture(scope="session")
def model_of():
    """Maker of a random torch model of an architecture, in evaluation mode."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def make(architecture):
        kind, extra = MODELS[architecture]
        torch.manual_seed(3)
        name = f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config"
        unknown = {"Phi3": ("head_dim",), "Phi": ("head_dim", "rms_norm_eps")}.get(kind, ())
        sizes = {key: value for key, value in SIZES.items() if key not in unknown}
        config = getattr(transformers, name)(**{**sizes, **extra})
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("bias", "norm.weight", "layernorm.weight")):
                parameter.data += 0.2 * torch.randn(parameter.shape)
        return model

    return make


@pytest.fixture(scope="session")
def save_random_peft():
    """Maker of a saved PEFT model whose trainable parameters are random: LoRA's anew, others moved."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    def save(model, folder, settings, **options):
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                kept = 0.0 if "lora_" in name and "bias" not in name else parameter.data
                parameter.data = kept + 0.2 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(str(folder), **options)
        return model

    return save
