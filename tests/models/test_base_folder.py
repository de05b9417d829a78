"""Folders of base models: what is refused, and what their fingerprints tell apart."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core import files
from mlx_rsgwm.core.safetensors_io import read_safetensors, write_safetensors
from mlx_rsgwm.models.base_folder import describe_folder, fingerprint_of
from tests.models.tiny_bases import CONFIG, edit_config, refused, write_folder

pytestmark = pytest.mark.usefixtures("own_cache")


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
