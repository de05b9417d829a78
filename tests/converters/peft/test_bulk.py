"""Conversions of one adapter and of many, with the proof, and in little memory."""

from __future__ import annotations

import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.converters.base_layers import read_base_layers
from mlx_rsgwm.converters.peft import bulk
from mlx_rsgwm.converters.peft.bulk import adapter_folders, from_peft_verified, is_mlx, is_peft, to_peft_verified
from mlx_rsgwm.core.errors import CheckFailed
from mlx_rsgwm.models.adapter import Adapter


@pytest.fixture
def pool(make_adapter, tmp_path):
    """Three adapters of the tiny base, one of them in a folder below."""
    for seed, name in enumerate(("one", "two", "more/three")):
        make_adapter(seed).save(tmp_path / "pool" / name)
    return tmp_path / "pool"


def run(*arguments):
    return CliRunner().invoke(rsgwm, [str(one) for one in arguments])


def last(result):
    return json.loads(result.stdout.splitlines()[-1])


def test_a_folder_of_adapters_goes_there_and_back(pool, tiny_base, tmp_path):
    there = run("convert", "to-peft", pool, "--out", tmp_path / "peft", "--verify", "--json", "--quiet")
    assert there.exit_code == 0, there.output
    assert [one["modules"] for one in last(there)["converted"]] == [4, 4, 4]
    back = run(
        "convert", "from-peft", tmp_path / "peft", "--out", tmp_path / "back", "--base", tiny_base, "--verify", "--json"
    )
    assert back.exit_code == 0, back.output
    for folder in adapter_folders(pool, is_mlx):
        before, after = Adapter.load(folder), Adapter.load(tmp_path / "back" / folder.relative_to(pool))
        for group in ("weights", "importance", "init"):
            one, other = getattr(before, group), getattr(after, group)
            assert one.keys() == other.keys()
            assert all(mx.array_equal(one[name], other[name]) for name in one)
    again = run("convert", "from-peft", tmp_path / "peft", "--out", tmp_path / "back", "--base", tiny_base, "--json")
    assert again.exit_code == 0, again.output
    assert len(last(again)["kept"]) == 3
    assert last(again)["converted"] == []


def test_a_folder_of_adapters_becomes_gguf_files(pool, tiny_base, tmp_path):
    (pool / "two" / "adapters.safetensors").write_bytes(b"no")
    result = run("convert", "to-gguf", pool, "--out", tmp_path / "gguf", "--base", tiny_base, "--json", "--quiet")
    assert result.exit_code == 2
    assert "1 of 3 adapters were not converted" in result.stderr
    written = sorted((tmp_path / "gguf").rglob("*"))
    assert written == [tmp_path / "gguf" / name for name in ("more", "more/three.gguf", "one.gguf")]
    alone = run("convert", "to-gguf", pool / "more" / "three", "--out", tmp_path / "three.gguf", "--base", tiny_base)
    assert alone.exit_code == 0, alone.output
    assert (tmp_path / "three.gguf").read_bytes() == (tmp_path / "gguf" / "more" / "three.gguf").read_bytes()
    again = run("convert", "to-gguf", pool, "--out", tmp_path / "gguf", "--base", tiny_base, "--json", "--quiet")
    assert len(last(again)["kept"]) == 2


def test_one_that_fails_does_not_stop_the_others(pool, tmp_path):
    (pool / "two" / "adapters.safetensors").write_bytes(b"no")
    result = run("convert", "to-peft", pool, "--out", tmp_path / "peft", "--json", "--quiet")
    assert result.exit_code == 2
    assert "1 of 3 adapters were not converted" in result.stderr
    found = last(result)
    assert [one["source"] for one in found["failed"]] == [str(pool / "two")]
    assert len(found["converted"]) == 2
    assert sorted(path.name for path in adapter_folders(tmp_path / "peft", is_peft)) == ["one", "three"]


@pytest.mark.parametrize(
    ("source", "out", "expected"),
    [("pool", "pool/peft", "lies inside"), ("nothing", "out", "does not exist"), ("empty", "out", "holds no adapter")],
)
def test_what_cannot_be_done_is_said(pool, tmp_path, source, out, expected):
    (tmp_path / "empty").mkdir()
    result = run("convert", "to-peft", tmp_path / source, "--out", tmp_path / out)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert "\n" not in result.stderr.strip()


def test_links_that_go_round_are_not_followed(pool):
    (pool / "round").symlink_to(pool, target_is_directory=True)
    assert len(adapter_folders(pool, is_mlx)) == 3


# --- the proof --------------------------------------------------------------------------------------------------


def test_a_result_that_fails_the_proof_is_removed(pool, tiny_base, tmp_path, monkeypatch):
    base = read_base_layers(str(tiny_base), tiny_base)
    to_peft_verified(pool / "one", None, tmp_path / "peft")
    real = bulk.convert_from_peft

    def faulty(folder, base, out, reading=None):
        converted = real(folder, base, out)
        adapter = Adapter.load(out)
        name = "model.layers.1.self_attn.q_proj.lora_b"
        adapter.weights[name] = adapter.weights[name] * 2
        adapter.save(out)
        return converted

    monkeypatch.setattr(bulk, "convert_from_peft", faulty)
    with pytest.raises(
        CheckFailed, match=r"model.layers.1.self_attn.q_proj: the update in MLX is 2 times that in PEFT"
    ):
        from_peft_verified(tmp_path / "peft", base, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_what_does_not_come_back_is_caught(pool, tiny_base, tmp_path, monkeypatch):
    base = read_base_layers(str(tiny_base), tiny_base)
    to_peft_verified(pool / "one", None, tmp_path / "peft")
    real = bulk.convert_to_peft

    def forgetful(folder, base_name, out):
        converted = real(folder, base_name, out)
        path = str(out / "adapter_model.safetensors")
        arrays = dict(mx.load(path))
        arrays.pop("base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight")
        mx.save_safetensors(path, arrays)
        return converted

    monkeypatch.setattr(bulk, "convert_to_peft", forgetful)
    with pytest.raises(CheckFailed, match=r"does not survive there and back: .*v_proj a comes back changed \(1 arrays"):
        from_peft_verified(tmp_path / "peft", base, tmp_path / "ours")


# --- memory -----------------------------------------------------------------------------------------------------

STREAM = """
import resource, sys
from pathlib import Path
import mlx.core as mx
mx.set_cache_limit(0)
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.converters.peft.convert import convert_to_peft
source, out, small = map(Path, sys.argv[1:])
convert_to_peft(small, "b", out / "small")  # imports and first allocations are not the conversion's
mx.reset_peak_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_to_peft(source, "b", out / "large")
print(mx.get_peak_memory(), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_large_adapter_takes_memory_for_one_batch_of_arrays(tmp_path):
    from mlx_rsgwm.models.adapter import LoraSpec

    def make(layers, width):
        rng = np.random.default_rng(0)
        weights = {}
        for layer in range(layers):
            for name in ("lora_a", "lora_b"):
                shape = (width, 16) if name == "lora_a" else (16, width)
                values = rng.standard_normal(shape).astype(np.float32)
                weights[f"model.layers.{layer}.mlp.up_proj.{name}"] = mx.array(values)
        return Adapter(LoraSpec(16, 2.0, 0.0, ("mlp.up_proj",), -1), weights)

    make(2, 64).save(tmp_path / "small")
    large = make(100, 16384).save(tmp_path / "large")
    size = (large / "adapters.safetensors").stat().st_size
    command = [sys.executable, "-c", STREAM, str(large), str(tmp_path / "out"), str(tmp_path / "small")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    arrays, resident = map(int, output.split())
    assert size > 200 * 10**6
    assert arrays < size / 3
    assert resident < size / 2


def test_a_whole_disk_is_not_walked(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(bulk, "MOST_FOLDERS", 5)
    result = run("convert", "to-peft", pool, "--out", tmp_path / "peft")
    assert result.exit_code == 0, result.output
    (pool / "more/empty").mkdir()
    result = run("convert", "from-peft", pool, "--out", tmp_path / "back", "--base", "x")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "more than 5 folders" in result.stderr
    assert not (tmp_path / "back").exists()
