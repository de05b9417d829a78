"""Malformed adapters: fuzzed, truncated, escaping, pickled, zipped, endless. One line, exit 2, nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile

import mlx.core as mx
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.converters.peft.convert import check_peft, from_peft, to_peft
from mlx_rsgwm.converters.peft.verify import compare_folders
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.adapter import Adapter, LoraSpec

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small PEFT folder and the mlx-lm folder of the same adapter."""
    root = tmp_path_factory.mktemp("sound")
    weights = {}
    for layer in range(2):
        module = f"model.layers.{layer}.self_attn.q_proj"
        weights[f"{module}.lora_a"] = mx.random.normal((32, 2))
        weights[f"{module}.lora_b"] = mx.random.normal((2, 32))
    adapter = Adapter(LoraSpec(2, 2.0, 0.0, ("self_attn.q_proj",), 2), weights)
    adapter.save(root / "ours")
    to_peft(adapter, "b", root / "peft")
    shutil.rmtree(root / "peft" / "mlx_rsgwm")
    return root


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound / "peft", tmp_path / "peft")


def refused(folder):
    """Both readers refuse ``folder`` in one line, or take it; nothing else may happen."""
    lines = []
    for read in (check_peft, from_peft):
        try:
            read(folder)
        except RsgwmError as error:
            lines.append(str(error))
    assert all("\n" not in line and len(line) < 4000 for line in lines)
    return lines


@QUICK
@given(cut=st.integers(0, 1500))
def test_a_truncated_file_is_refused(sound, tmp_path_factory, cut):
    folder = shutil.copytree(sound / "peft", tmp_path_factory.mktemp("cut") / "peft")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: min(cut, len(whole) - 1)])
    assert len(refused(folder)) == 2


@QUICK
@given(changes=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_fuzzed_header_is_refused_or_read(sound, tmp_path_factory, changes):
    folder = shutil.copytree(sound / "peft", tmp_path_factory.mktemp("fuzz") / "peft")
    data = bytearray((folder / WEIGHTS).read_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    (folder / WEIGHTS).write_bytes(bytes(data))
    refused(folder)


@QUICK
@given(
    name=st.sampled_from(
        [
            "r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
            "rank_pattern",
            "alpha_pattern",
            "bias",
            "use_rslora",
            "use_dora",
            "exclude_modules",
            "modules_to_save",
            "layers_to_transform",
            "layers_pattern",
            "target_parameters",
            "peft_type",
            "init_lora_weights",
        ]
    ),
    value=st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers(-5, 5) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_any_value_of_any_field_is_refused_or_read(sound, tmp_path_factory, name, value):
    folder = shutil.copytree(sound / "peft", tmp_path_factory.mktemp("config") / "peft")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    refused(folder)


@QUICK
@given(position=st.integers(0, 2000), value=st.integers(0, 255))
def test_the_proof_refuses_fuzzed_folders_too(sound, tmp_path_factory, position, value):
    folder = shutil.copytree(sound / "peft", tmp_path_factory.mktemp("proof") / "peft")
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[position % len(data)] = value
    (folder / WEIGHTS).write_bytes(bytes(data))
    lines = []
    try:
        compare_folders(folder, sound / "ours")
    except RsgwmError as error:
        lines.append(str(error))
    assert "\n" not in "".join(lines)


def header(entries, data=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


HUGE = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}
FILES = {
    "empty": b"",
    "a length beyond the file": struct.pack("<Q", 2**60) + b"{}",
    "a shape beyond the file": header({"a": HUGE}),
    "overlapping arrays": header(
        {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}, bytes(8)
    ),
    "negative offsets": header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, bytes(8)),
    "an unknown type": header({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "no JSON": struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
    "deep JSON": struct.pack("<Q", 20000) + b"[" * 20000,
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("content", FILES.values(), ids=list(FILES))
def test_files_that_are_no_safetensors(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    assert all("not a sound safetensors file" in line or "holds no" in line for line in refused(folder))
    assert len(refused(folder)) == 2


def test_a_zip_bomb_is_never_opened(folder):
    with zipfile.ZipFile(folder / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(10**7))
    (folder / "bomb").rename(folder / WEIGHTS)
    assert "not a sound safetensors file" in refused(folder)[0]
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "pickle file, which can run code" in refused(folder)[0]


@pytest.mark.parametrize("shard", ["../../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", ""])
def test_shards_outside_of_the_folder(folder, shard):
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    assert "not a safetensors file of this folder" in refused(folder)[0]


@pytest.mark.parametrize("table", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, []])
def test_an_index_that_is_none(folder, table):
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(table))
    assert len(refused(folder)) == 2


def test_shards_are_read_together_and_must_all_be_there(folder, sound):
    arrays = sorted(mx.load(str(folder / WEIGHTS)).items())
    (folder / WEIGHTS).unlink()
    table = {}
    for index, part in enumerate((arrays[:3], arrays[3:])):
        name = f"adapter_model-{index + 1:05d}-of-00002.safetensors"
        mx.save_safetensors(str(folder / name), dict(part))
        table |= dict.fromkeys((key for key, _ in part), name)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": table}))
    found = from_peft(folder)
    expected = from_peft(sound / "peft")
    assert found.weights.keys() == expected.weights.keys()
    assert all(mx.array_equal(found.weights[name], value) for name, value in expected.weights.items())
    mx.save_safetensors(str(folder / name), dict(arrays))
    assert "is in two shards" in refused(folder)[0]
    (folder / name).unlink()
    assert "is in the index but not in the folder" in refused(folder)[0]


def test_links_that_lead_nowhere_or_round(folder):
    (folder / WEIGHTS).unlink()
    os.symlink(WEIGHTS, folder / WEIGHTS)
    assert len(refused(folder)) == 2
    (folder / WEIGHTS).unlink()
    os.symlink("nowhere", folder / WEIGHTS)
    assert len(refused(folder)) == 2


def test_a_link_to_the_file_itself_is_read(folder):
    """As in the Hub's cache, where every file of a snapshot is one."""
    (folder / WEIGHTS).rename(folder / "blob")
    os.symlink("blob", folder / WEIGHTS)
    assert refused(folder) == []


def test_a_configuration_without_end_is_not_read(folder):
    (folder / "adapter_config.json").write_bytes(b" " * (17 << 20))
    assert "more than such a file can have" in refused(folder)[0]
    (folder / "adapter_config.json").write_text("[" * 100000)
    assert "not valid JSON" in refused(folder)[0]


def test_a_sidecar_that_names_other_files_is_refused(sound, tmp_path):
    to_peft(Adapter.load(sound / "ours"), "b", tmp_path / "peft")
    path = tmp_path / "peft" / "mlx_rsgwm" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../adapter_config.json"] = "0"
    path.write_text(json.dumps(manifest))
    with pytest.raises(RsgwmError, match="unknown file"):
        from_peft(tmp_path / "peft")


def test_the_command_ends_with_exit_code_2_and_one_line(folder, tiny_base, tmp_path):
    (folder / WEIGHTS).write_bytes(b"no")
    arguments = ["convert", "from-peft", str(folder), "--out", str(tmp_path / "out"), "--base", str(tiny_base)]
    result = CliRunner().invoke(rsgwm, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("rsgwm: error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
