"""GGUF conversion: tiny Llama files written here, compared with the arrays they hold and with transformers."""

from __future__ import annotations

import json
import os
import struct
import threading
from contextlib import suppress

import gguf
import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.converters.gguf.file import open_gguf
from mlx_rsgwm.converters.gguf.read import convert_gguf, unpermute
from mlx_rsgwm.converters.gguf.tokenizer import merges_from_scores
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.base import load_base

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


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", weights())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_quantised_matrices_keep_their_values(tmp_path, kind):
    """What MLX makes of the packed integers is what llama.cpp's package makes of the file, to the last bit."""
    path = write_gguf(tmp_path / "a.gguf", weights(3), Kind[kind])
    plain, packed = convert_gguf(path, tmp_path / "plain"), convert_gguf(path, tmp_path / "packed", quantised=True)
    expected, found = (mx.load(str(folder / "model.safetensors")) for folder in (plain, packed))
    bits = 8 if kind == "Q8_0" else 4
    assert json.loads((packed / "config.json").read_text())["quantization"] == {"group_size": 32, "bits": bits}
    for name, value in expected.items():
        if value.ndim == 1:
            assert mx.array_equal(found[name], value), name
            continue
        stem = name.removesuffix(".weight")
        scales, biases = (found[f"{stem}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        back = mx.dequantize(found[name], scales, biases, group_size=32, bits=bits)
        assert mx.array_equal(back, value), name
    assert (packed / "model.safetensors").stat().st_size < (plain / "model.safetensors").stat().st_size / 2
    ids = mx.array([[1, 5, 9, 2, 40]])
    models = [load_base(str(folder), dtype="float32").model for folder in (plain, packed)]
    assert hasattr(models[1].model.layers[0].self_attn.q_proj, "scales")
    assert mx.allclose(models[0](ids), models[1](ids), rtol=1e-4, atol=1e-4).item()


def test_quantised_matrices_of_several_kinds(tmp_path):
    """llama.cpp's files mix types: most matrices in one, some in another, the head in a third that MLX has not."""
    arrays = weights(4)
    down, head = "model.layers.0.mlp.down_proj.weight", "lm_head.weight"
    kinds = {down: Kind.Q8_0, head: Kind.Q5_0}
    others = {name: value for name, value in arrays.items() if name not in kinds}
    more = [(llama_cpp_tensor(n, arrays[n])[0], gguf.quants.quantize(arrays[n], k), k) for n, k in kinds.items()]
    path = write_gguf(tmp_path / "a.gguf", others, Kind.Q4_0, more=more)
    packed = convert_gguf(path, tmp_path / "packed", quantised=True)
    config = json.loads((packed / "config.json").read_text())
    own = {"group_size": 32, "bits": 8}
    assert config["quantization"] == {"group_size": 32, "bits": 4, down.removesuffix(".weight"): own}
    model = load_base(str(packed), dtype="float32").model
    assert model.model.layers[0].mlp.down_proj.bits == 8
    assert model.model.layers[1].mlp.down_proj.bits == 4
    assert not hasattr(model.lm_head, "scales")
    ids = mx.array([[1, 5, 9, 2, 40]])
    plain = load_base(str(convert_gguf(path, tmp_path / "plain")), dtype="float32").model
    assert mx.allclose(plain(ids), model(ids), rtol=1e-4, atol=1e-4).item()


def test_the_command_keeps_a_base_quantised(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", weights(3), Kind.Q4_0)
    arguments = ["convert", "from-gguf", str(path), "--out", str(tmp_path / "model"), "--quantised", "--json"]
    found = CliRunner().invoke(rsgwm, arguments)
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout.splitlines()[-1])["quantization"] == {"group_size": 32, "bits": 4}
    again = CliRunner().invoke(rsgwm, arguments)
    assert again.exit_code == 2
    assert "exists already" in again.stderr


def test_nothing_to_keep_quantised_is_refused(plain, tmp_path):
    with pytest.raises(RsgwmError, match="no matrix in Q4_0, Q4_1, Q8_0"):
        convert_gguf(plain, tmp_path / "out", quantised=True)
    assert only_entry(tmp_path) == []


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 6e4])
def test_a_quantised_scale_that_is_damaged_is_refused(tmp_path, value):
    path = write_gguf(tmp_path / "a.gguf", weights(3), Kind.Q4_0)
    tensor = open_gguf(path).tensors["blk.0.ffn_up.weight"]
    with open(path, "r+b") as file:
        file.seek(tensor.start)
        file.write(np.float16(value).tobytes())
    with pytest.raises(RsgwmError, match=r"blk\.0\.ffn_up\.weight has values that are not finite"):
        convert_gguf(path, tmp_path / "out", quantised=True)
    assert only_entry(tmp_path) == ["a.gguf"]


def only_entry(folder):
    """Names below a folder: proof that a refused conversion left nothing."""
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_float32_tensors_come_back_bit_for_bit(tmp_path, tied):
    arrays = weights(1, tied)
    out = convert_gguf(write_gguf(tmp_path / "a.gguf", arrays), tmp_path / "out")
    found, metadata = mx.load(str(out / "model.safetensors"), return_metadata=True)
    assert metadata == {"format": "pt"}
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(np.array(found[name]), value) for name, value in arrays.items())
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert (config["rope_theta"], config["rms_norm_eps"]) == (5000.0, 1e-5)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert only_entry(tmp_path) == ["a.gguf", "out"]


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_agree_with_transformers_on_the_same_file(tmp_path, kind, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = write_gguf(tmp_path / "a.gguf", weights(2, tied), kind)
    base = load_base(str(convert_gguf(source, tmp_path / "out")), dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
    ids = np.random.default_rng(3).integers(0, len(TOKENS), (2, 17))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    found = np.array(base.model(mx.array(ids)))
    assert np.abs(expected).max() > 1
    assert np.abs(found - expected).max() < 1e-4


def test_transformers_and_mlx_agree_on_the_folder(plain, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    out = convert_gguf(plain, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    ids = np.arange(3, 40)[None]
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    assert np.abs(np.array(load_base(str(out), "float32").model(mx.array(ids))) - expected).max() < 1e-4


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS"])
def test_packed_rows_are_read_in_slices_like_as_a_whole(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    packed = np.random.default_rng(4).integers(0, 60, (40, 2 * size), dtype=np.uint8)  # small: scales stay finite
    file = open_gguf(write_gguf(tmp_path / "a.gguf", {}, more=[("x", packed, Kind[kind])]))
    whole = gguf.quants.dequantize(packed, Kind[kind])
    assert file.tensors["x"].shape == (40, 2 * block)
    assert np.array_equal(file.read("x"), whole, equal_nan=True)
    assert np.array_equal(np.concatenate([file.read("x", 0, 13), file.read("x", 13, 99)]), whole, equal_nan=True)


@pytest.mark.parametrize("fault", ["cut", "written to", "replaced", "gone"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, fault):
    """A mapped file that is cut would end the process."""
    path = write_gguf(tmp_path / "a.gguf", {}, more=[("x", np.ones((4, 64), np.float32), Kind.F32)])
    file = open_gguf(path)
    assert file.read("x", 0, 2).sum() == 128
    whole = path.read_bytes()
    if fault == "cut":
        os.truncate(path, len(whole) - 64)
    elif fault == "written to":
        with open(path, "r+b") as opened:
            opened.seek(-4, os.SEEK_END)
            opened.write(b"gone")
        os.utime(path, ns=(0, 0))
    elif fault == "replaced":
        (tmp_path / "b").write_bytes(whole)
        os.replace(tmp_path / "b", path)
    else:
        path.unlink()
    with pytest.raises(RsgwmError, match="a.gguf does not exist" if fault == "gone" else "a.gguf changed while"):
        file.read("x", 2, 4)


def test_unpermute_undoes_llama_cpp_order():
    rows = np.arange(24.0).reshape(12, 2)
    permuted = rows.reshape(3, 2, 2, 2).swapaxes(1, 2).reshape(12, 2)
    assert not np.array_equal(permuted, rows)
    assert np.array_equal(unpermute(permuted, 3), rows)


def test_byte_level_tokenizer_follows_the_smollm_rule(plain, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(plain, tmp_path / "out"))
    # Digits are cut out first, so the two newlines stand alone and merge; GPT-2's rule would part them.
    assert tokenizer.tokenize("hello\n\n12") == ["hell", "o", "ĊĊ", "1", "2"]
    assert tokenizer.encode("<s>he</s>") == [1, TOKENS.index("he"), 2]
    assert tokenizer.decode(tokenizer.encode("été\t1 2")) == "été\t1 2"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert chat == "<s>he</s>"


def test_llama3_tokenizer_begins_with_bos_unless_the_file_says_no(tmp_path):
    from transformers import AutoTokenizer

    silent = write_gguf(tmp_path / "a.gguf", weights(), pre="llama-bpe", add_bos=None)
    denying = write_gguf(tmp_path / "b.gguf", weights(), pre="llama-bpe")
    he = TOKENS.index("he")
    assert AutoTokenizer.from_pretrained(convert_gguf(silent, tmp_path / "out")).encode("he") == [1, he]
    assert AutoTokenizer.from_pretrained(convert_gguf(denying, tmp_path / "no")).encode("he") == [he]


def test_sentencepiece_tokenizer_agrees_with_transformers(tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "c",
        "ab",
        "▁a",
        "▁ab",
    ]
    pieces += ["bc", "abc", "▁abc"]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(1, len(pieces) - 258)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from mlx_rsgwm.converters.gguf.tokenizer import save_tokenizer

    (tmp_path / "out").mkdir()
    save_tokenizer(open_gguf(tmp_path / "a.gguf").metadata, tmp_path / "out", "a.gguf", len(pieces))
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    for text in ("abc ab cab", "abcabc é", "a\nb", "ab  c"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text)[0] == 1
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == text


def test_merges_from_scores_prefers_the_best_token():
    merges = merges_from_scores(["a", "b", "c", "ab", "bc", "abc"], [-9, -9, -9, -2, -1, -3])
    assert merges[:2] == [("b", "c"), ("a", "b")]
    assert set(merges[2:]) == {("a", "bc"), ("ab", "c")}


def llama3_factors(factor):
    wavelength = 2 * np.pi * 500000.0 ** (np.arange(0, HIDDEN // HEADS, 2) / (HIDDEN // HEADS))
    blend = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    return (1 / ((1 - blend) / factor + blend)).astype(np.float32)


def test_llama3_rope_scaling_is_recognised_from_its_table(tmp_path):
    more = [("rope_freqs.weight", llama3_factors(32.0), Kind.F32)]
    source = write_gguf(tmp_path / "a.gguf", weights(), theta=500000.0, more=more)
    config = json.loads((convert_gguf(source, tmp_path / "out") / "config.json").read_text())
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert load_base(str(tmp_path / "out")).model(mx.array([[1, 2]])).shape == (1, 2, len(TOKENS))


def test_linear_rope_scaling_is_kept(tmp_path):
    extra = [("add_string", "llama.rope.scaling.type", "linear"), ("add_float32", "llama.rope.scaling.factor", 4.0)]
    out = convert_gguf(write_gguf(tmp_path / "a.gguf", weights(), extra=extra), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["rope_scaling"]["factor"] == 4.0


BLOCK = gguf.GGML_QUANT_SIZES[Kind.IQ1_S]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "mamba"}, ["architecture mamba", "only llama"]),
        ({"tokenizer": None}, ["holds no tokenizer"]),
        ({"tokenizer": "bert"}, ["tokenizer model 'bert'"]),
        ({"pre": "klingon"}, ["pre-tokenizer 'klingon'"]),
        ({"extra": [("add_string", "llama.rope.scaling.type", "yarn")]}, ["rope scaling 'yarn'"]),
        ({"extra": [("add_uint32", "llama.expert_count", 8)]}, ["mixture of experts"]),
        ({"extra": [("add_uint16", "split.count", 3)]}, ["3 parts"]),
        ({"more": [("rope_freqs.weight", np.linspace(1, 9, 8, dtype=np.float32), Kind.F32)]}, ["other than Llama 3"]),
        (
            {
                "more": [
                    ("x", np.zeros((2, BLOCK[1]), np.uint8), Kind.IQ1_S),
                    ("y", np.zeros((2, 3), np.float64), Kind.F64),
                ]
            },
            ["x (IQ1_S)", "y (F64)", "Q4_K"],
        ),
        ({"more": [("blk.0.attn_q.bias", np.zeros(64, np.float32), Kind.F32)]}, ["blk.0.attn_q.bias is unknown"]),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, change, words):
    source = write_gguf(tmp_path / "a.gguf", weights(), **change)
    with pytest.raises(RsgwmError) as caught:
        convert_gguf(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in [*words, "a.gguf"])
    assert only_entry(tmp_path) == ["a.gguf"]


def test_missing_and_misshapen_tensors_are_all_named(tmp_path):
    arrays = weights()
    del arrays["model.norm.weight"]
    arrays["model.layers.1.mlp.up_proj.weight"] = np.zeros((64, 64), np.float32)
    with pytest.raises(
        RsgwmError, match=r"output_norm.weight is missing; .*ffn_up.weight has shape \(64, 64\), not \(96"
    ):
        convert_gguf(write_gguf(tmp_path / "a.gguf", arrays), tmp_path / "out")


def test_values_that_are_not_finite_are_refused(tmp_path):
    arrays = weights()
    arrays["model.layers.0.mlp.up_proj.weight"][3, 3] = np.nan
    with pytest.raises(RsgwmError, match=r"blk.0.ffn_up.weight has values that are not finite"):
        convert_gguf(write_gguf(tmp_path / "a.gguf", arrays), tmp_path / "out")
    assert only_entry(tmp_path) == ["a.gguf"]


def header(version=3, tensors=0, metadata=0):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, metadata)


HOSTILE = {
    "empty": b"",
    "short": b"GGUF",
    "text": b"this is not a model at all, but long enough to be one",
    "old": header(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "endless tensors": header(tensors=2**60),
    "endless metadata": header(metadata=2**60),
    # gguf.GGUFReader would walk these 2**60 bytes one at a time
    "endless array": header(metadata=1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 2**60) + b"\0" * 64,
    "endless string": header(metadata=1) + struct.pack("<Q", 2**63),
    "nested array": header(metadata=1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 9, 3) + b"\0" * 64,
    "unknown type": header(metadata=1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 77) + b"\0" * 64,
    "not UTF-8": header(metadata=1) + struct.pack("<Q", 1) + b"\xff" + struct.pack("<I", 0) + b"\0" * 64,
    "far tensor": header(tensors=1) + struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 4, 0, 2**62) + b"\0" * 64,
    "huge tensor": header(tensors=1) + struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0),
    "no such type": header(tensors=1) + struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 4, 999, 0) + b"\0" * 64,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_garbage_is_one_line_and_leaves_nothing(tmp_path, name):
    (tmp_path / "bad.gguf").write_bytes(HOSTILE[name])
    with pytest.raises(RsgwmError) as caught:
        convert_gguf(tmp_path / "bad.gguf", tmp_path / "out")
    assert "bad.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert only_entry(tmp_path) == ["bad.gguf"]


def test_every_truncation_is_refused(plain, tmp_path):
    whole = plain.read_bytes()
    rng = np.random.default_rng(5)
    for length in [len(whole) - 1, *rng.integers(0, len(whole), 40).tolist()]:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(RsgwmError):
            convert_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert only_entry(tmp_path) == ["cut.gguf"]


def test_flipped_header_bytes_never_crash(plain, tmp_path):
    whole = bytearray(plain.read_bytes())
    rng = np.random.default_rng(6)
    for _ in range(150):
        damaged = bytearray(whole)
        for position in rng.integers(4, 1500, 3):
            damaged[position] = rng.integers(0, 256)
        (tmp_path / "flip.gguf").write_bytes(damaged)
        with suppress(RsgwmError):  # anything else is a bug
            open_gguf(tmp_path / "flip.gguf").unreadable()


def test_a_folder_in_the_way_is_not_touched(plain, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(RsgwmError, match="exists already"):
        convert_gguf(plain, tmp_path / "out")
    assert only_entry(tmp_path / "out") == ["mine.txt"]


def test_no_room_is_refused_before_anything_is_written(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(RsgwmError, match="not enough disk space"):
        convert_gguf(plain, tmp_path / "deep" / "out")
    assert only_entry(tmp_path) == []


def test_an_interruption_leaves_nothing(plain, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_rsgwm.converters.gguf.read._parts", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(plain, tmp_path / "out")
    assert only_entry(tmp_path) == []


def test_two_conversions_at_once_both_succeed(plain, tmp_path, monkeypatch):
    import mlx_rsgwm.converters.gguf.read as module

    meet, write = threading.Barrier(2), module._write_weights
    monkeypatch.setattr(module, "_write_weights", lambda *arguments: (write(*arguments), meet.wait(30)))
    results = []
    threads = [threading.Thread(target=lambda: results.append(convert_gguf(plain, tmp_path / "out"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "out"] * 2
    assert only_entry(tmp_path) == ["out"]
    assert load_base(str(tmp_path / "out")).config["model_type"] == "llama"
