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


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """Base folders by architecture (those of ``bench/architectures.py``), made when asked for."""
    from mlx_rsgwm.bench.architectures import save_model

    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("bases") / name
            save_model(name, made[name])
        return made[name]

    return folder


@pytest.fixture(scope="session")
def save_torch_model():
    """Save a random float32 model of a transformers class (``Llama`` for ``LlamaForCausalLM``); its biases count."""
    import torch
    import transformers

    def save(kind, settings, folder):
        torch.manual_seed(5)
        config = getattr(transformers, f"{kind}Config")(**settings)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)

    return save
