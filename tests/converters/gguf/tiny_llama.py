"""GGUF files of a tiny random Llama, as llama.cpp's own writer makes them, for the tests that read some."""

from __future__ import annotations

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, LAYERS = 64, 4, 2, 96, 2
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
Kind = gguf.GGMLQuantizationType


def byte_alphabet():
    """GPT-2's printable spelling of the 256 bytes, in byte order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(extra)) for byte in range(256)]


TOKENS = ["<unk>", "<s>", "</s>", *byte_alphabet(), "ĊĊ", "he", "ll", "hell"]


def weights(seed=0, tied=False):
    """Random float32 arrays of a tiny Llama under Hugging Face's names."""
    rng = np.random.default_rng(seed)
    head = HIDDEN // HEADS
    shapes = {"model.embed_tokens": (len(TOKENS), HIDDEN), "model.norm": (HIDDEN,)}
    if not tied:
        shapes["lm_head"] = (len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        shapes |= {block + "input_layernorm": (HIDDEN,), block + "post_attention_layernorm": (HIDDEN,)}
        shapes |= {block + "self_attn.q_proj": (HEADS * head, HIDDEN), block + "self_attn.o_proj": (HIDDEN, HIDDEN)}
        shapes |= {block + f"self_attn.{name}_proj": (KV_HEADS * head, HIDDEN) for name in "kv"}
        shapes |= {block + f"mlp.{name}_proj": (FEED_FORWARD, HIDDEN) for name in ("gate", "up")}
        shapes[block + "mlp.down_proj"] = (HIDDEN, FEED_FORWARD)
    return {
        name + ".weight": (rng.normal(size=shape) * 0.2 + ("norm" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }


def llama_cpp_tensor(name, value):
    """Name and rows as llama.cpp's convert_hf_to_gguf.py writes them (its `permute`, for q and k)."""
    for theirs, ours in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ):
        name = name.replace(theirs, ours)
    for part, heads in ((".attn_q.", HEADS), (".attn_k.", KV_HEADS)):
        if part in name:
            value = value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
    return name, value


def write_gguf(path, arrays, kind=Kind.F32, architecture="llama", tokenizer="gpt2", extra=(), more=(), **settings):
    """A GGUF file; ``extra`` are (method, key, value) of the writer, ``more`` raw (name, array, kind) tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(settings.get("theta", 5000.0))
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    if tokenizer:
        writer.add_tokenizer_model(tokenizer)
        writer.add_tokenizer_pre(settings.get("pre", "smollm"))
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
        writer.add_token_merges(["Ċ Ċ", "h e", "l l", "he ll"])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        if "add_bos" not in settings:
            writer.add_add_bos_token(False)
        writer.add_chat_template(TEMPLATE)
    for method, key, value in extra:
        getattr(writer, method)(key, value)
    for name, value in arrays.items():
        name, value = llama_cpp_tensor(name, value)
        chosen = Kind.F32 if value.ndim == 1 else kind
        writer.add_tensor(name, gguf.quants.quantize(value, chosen), raw_dtype=chosen)
    for name, value, raw in more:
        writer.add_tensor(name, value, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def only_entry(folder):
    """Names below a folder: proof that a refused conversion left nothing."""
    return sorted(entry.name for entry in folder.iterdir())
