"""Bases kept quantised: MLX's packed matrices hold the values that llama.cpp's package reads."""

from __future__ import annotations

import json

import gguf
import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.converters.gguf.file import open_gguf
from mlx_rsgwm.converters.gguf.read import convert_gguf
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.base import load_base
from tests.converters.gguf.tiny_llama import Kind, llama_cpp_tensor, only_entry, weights, write_gguf


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
