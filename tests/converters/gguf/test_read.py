"""GGUF conversion: tiny Llama files written here, compared with the arrays they hold and with transformers."""

from __future__ import annotations

import json
import os
import threading

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.converters.gguf.file import open_gguf
from mlx_rsgwm.converters.gguf.read import convert_gguf, unpermute
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.base import load_base
from tests.converters.gguf.tiny_llama import HEADS, HIDDEN, TOKENS, Kind, only_entry, weights, write_gguf


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
