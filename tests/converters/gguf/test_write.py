"""Models out to GGUF: read back with the gguf package and as a base; tokenizers; what is refused."""

from __future__ import annotations

import json

import gguf
import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.converters.gguf.vocabulary import PROBES, vocabulary
from mlx_rsgwm.converters.gguf.write import model_to_gguf
from mlx_rsgwm.core.errors import CheckFailed, RsgwmError
from mlx_rsgwm.models.base import load_base

IDS = [[5, 9, 33, 70, 41, 100, 7]]


def logits(folder):
    return np.array(load_base(str(folder), dtype="float32").model(mx.array(IDS)))


def read(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}


def altered(base, folder, config=None, arrays=None):
    """A copy of a model folder with other settings, or with more arrays."""
    import shutil

    shutil.copytree(base, folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, **(config or {})}))
    if arrays:
        weights = dict(mx.load(str(folder / "model.safetensors")))
        mx.save_safetensors(str(folder / "model.safetensors"), {**weights, **arrays}, {"format": "pt"})
    return folder


@pytest.mark.parametrize("quantised", [False, True])
def test_a_fused_adapter_comes_back_as_the_same_model(tiny_base, make_adapter, tmp_path, quantised):
    """The whole way with the commands: fuse, to-gguf, and the file as a base."""
    base, run = tiny_base, CliRunner().invoke
    if quantised:
        from mlx_lm import convert

        convert(str(tiny_base), str(tmp_path / "packed"), quantize=True, q_bits=4, q_group_size=32)
        base = tmp_path / "packed"
    adapter = make_adapter(2, size=0.5)
    adapter.manifest = {}
    adapter.save(tmp_path / "adapter")
    options = ["--base", str(base), "--force"]
    fused = run(rsgwm, ["fuse", str(tmp_path / "adapter"), "--out", str(tmp_path / "model"), *options])
    assert fused.exit_code == 0, fused.output
    written = run(rsgwm, ["convert", "to-gguf", str(tmp_path / "model"), "--out", str(tmp_path / "m.gguf"), "--json"])
    assert written.exit_code == 0, written.output
    assert json.loads(written.stdout.splitlines()[-1])["dtype"] == "f32"
    assert np.abs(logits(tmp_path / "m.gguf") - logits(tmp_path / "model")).max() < 1e-5
    assert np.abs(logits(tmp_path / "m.gguf") - logits(base)).max() > 0.1
    misplaced = run(
        rsgwm, ["convert", "to-gguf", str(tmp_path / "model"), "--out", str(tmp_path / "n.gguf"), "--base", "x"]
    )
    assert misplaced.exit_code == 2
    assert "is a model, not an adapter" in misplaced.stderr


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_matrices_are_rounded_once_and_vectors_are_not(tiny_base, tmp_path, dtype):
    model_to_gguf(tiny_base, tmp_path / "exact.gguf")
    model_to_gguf(tiny_base, tmp_path / "a.gguf", dtype)
    exact, found = read(tmp_path / "exact.gguf"), read(tmp_path / "a.gguf")
    assert exact.keys() == found.keys()
    for name, tensor in found.items():
        vector = "norm" in name
        assert tensor.tensor_type.name == ("F32" if vector else dtype.upper())
        expected = exact[name].data if vector else gguf.quants.quantize(exact[name].data, tensor.tensor_type)
        assert np.array_equal(tensor.data, expected)
    with pytest.raises(RsgwmError, match="f32, f16, bf16, q8_0, found 'q2_k'"):
        model_to_gguf(tiny_base, tmp_path / "b.gguf", "q2_k")
    with pytest.raises(RsgwmError, match="exists already"):
        model_to_gguf(tiny_base, tmp_path / "a.gguf")


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("scaling", [LLAMA3, {"type": "linear", "factor": 4.0}], ids=["llama3", "linear"])
def test_rope_scaling_goes_along(tiny_base, tmp_path, scaling):
    folder = altered(tiny_base, tmp_path / "model", {"rope_scaling": scaling, "rope_theta": 5e5})
    model_to_gguf(folder, tmp_path / "a.gguf")
    assert np.abs(logits(tmp_path / "a.gguf") - logits(folder)).max() < 1e-5
    assert ("rope_freqs.weight" in read(tmp_path / "a.gguf")) is (scaling is LLAMA3)


LARGE = {"model.layers.0.self_attn.q_proj.weight": mx.full((32, 32), 1e6)}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
BIASES = {f"model.layers.{i}.mlp.{n}_proj.bias": mx.ones(64) for i in (0, 1) for n in ("gate", "up")}
BIASES |= {f"model.layers.{i}.mlp.down_proj.bias": mx.ones(32) for i in (0, 1)}
REFUSED = {
    "yarn": ({"rope_scaling": YARN}, {}, None, "rope_scaling is"),
    "other llama3": ({"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0}}, {}, None, "other than Llama 3's"),
    "traditional": ({"rope_traditional": True}, {}, None, "rope_traditional is True, llama.cpp would take False"),
    "window": (
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
        {},
        None,
        "layer_types put windows on other layers",
    ),
    "bias": (
        {"mlp_bias": True},
        BIASES,
        None,
        "model.layers.0.mlp.down_proj.bias has no tensor in llama.cpp's llama; model.layers.0.mlp.gate_proj.bias",
    ),
    "architecture": ({"model_type": "mixtral"}, {}, None, "mixtral models are not written as GGUF, only llama, "),
    "too large": ({}, LARGE, "f16", "blk.0.attn_q.weight has values beyond float16; choose bf16 or f32"),
    "not finite": ({}, {"model.norm.weight": mx.full(32, float("nan"))}, None, "output_norm.weight has values that"),
}


@pytest.mark.parametrize(("config", "arrays", "dtype", "expected"), REFUSED.values(), ids=list(REFUSED))
def test_what_the_file_cannot_say_is_refused(tiny_base, tmp_path, config, arrays, dtype, expected):
    folder = altered(tiny_base, tmp_path / "model", config, arrays)
    with pytest.raises(RsgwmError) as caught:
        model_to_gguf(folder, tmp_path / "a.gguf", dtype)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_file_that_reads_otherwise_is_not_left(tiny_base, tmp_path, monkeypatch):
    real = gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda self, value, *rest: real(self, value * 2, *rest))
    with pytest.raises(CheckFailed, match=r"token_embd.weight does not read as it was written"):
        model_to_gguf(tiny_base, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


# --- tokenizers -------------------------------------------------------------------------------------------------

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3_REGEX = PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPLITS = {  # as the models' own tokenizer.json have it
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), BYTES]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated"), BYTES]),
}


def byte_level(name):
    """A tokenizer of that family, trained on the probes."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.normalizer = normalizers.NFC() if name == "qwen2" else None
    tokenizer.pre_tokenizer, tokenizer.decoder = SPLITS[name], decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*PROBES, "1 12 123 1234 12345 3.14 2024 1,000,000"] * 3, trainer)
    if name == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tokenizer


def sentencepiece(prefix):
    """A tokenizer of pieces, with every way to merge a piece, as transformers makes them of SentencePiece's."""
    from transformers.convert_slow_tokenizer import generate_merges

    words = [
        "▁the",
        "▁a",
        "he",
        "llo",
        "▁wor",
        "ld",
        "▁▁",
        "in",
        "ing",
        "or",
        "wo",
        "ll",
        "th",
        "▁t",
        "▁w",
        "▁wo",
        "lo",
    ]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for text in PROBES for letter in text if letter.isalpha() and letter < "z"} | {"▁", "z"})
    pieces += [*words, *letters]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    scores = {word: -float(index) for index, word in enumerate(words)}
    merges = generate_merges(vocab, {piece: scores.get(piece, -99.0) for piece in pieces})
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    first = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


TOKENIZERS = {
    **{name: (lambda name=name: byte_level(name), {"tokenizer.ggml.pre": name}) for name in SPLITS},
    "pieces with a space first": (lambda: sentencepiece(True), {"tokenizer.ggml.add_space_prefix": True}),
    "pieces": (lambda: sentencepiece(False), {"tokenizer.ggml.add_space_prefix": False}),
}


def saved(tokenizer, folder):
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "{{ messages[0].content }}</s>"
    wrapped.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return wrapped


@pytest.mark.parametrize(("make", "expected"), TOKENIZERS.values(), ids=list(TOKENIZERS))
def test_a_tokenizer_is_recognised_by_what_it_does(tmp_path, make, expected):
    tokenizer = saved(make(), tmp_path)
    rows = len(tokenizer) + 3
    found = vocabulary(tmp_path, rows)
    assert expected.items() <= found.items()
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert all(tokens[index] == text for text, index in tokenizer.get_vocab().items())
    assert tokens[-3:] == [f"[PAD{rows - i}]" for i in (3, 2, 1)]
    assert kinds[-3:] == [5, 5, 5]
    assert kinds[tokens.index("</s>")] == 3
    if "<tool>" in tokens:
        assert kinds[tokens.index("<tool>")] == 4
    else:
        assert kinds[tokens.index("<unk>")] == 2
        assert kinds[tokens.index("<0x0A>")] == 6
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert found["tokenizer.ggml.add_bos_token"] is (tokenizer.encode("a")[0] == tokenizer.bos_token_id)
    assert found["tokenizer.chat_template"] == tokenizer.chat_template


def lower_case():
    tokenizer = byte_level("gpt-2")
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lower_case, "no tokenizer known here that cuts text as this one does"),
        (lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "a WordLevel tokenizer has no GGUF form"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(tmp_path, make, expected):
    saved(make(), tmp_path)
    with pytest.raises(RsgwmError, match=expected):
        vocabulary(tmp_path, 500)


def test_a_folder_without_a_tokenizer_is_one_line(tiny_base, tmp_path):
    folder = altered(tiny_base, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(RsgwmError, match="holds no tokenizer") as caught:
        model_to_gguf(folder, tmp_path / "a.gguf")
    assert "\n" not in str(caught.value)
