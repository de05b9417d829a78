"""GGUF files that are not read, damaged or hostile: one line, and nothing is left."""

from __future__ import annotations

import struct
from contextlib import suppress

import gguf
import numpy as np
import pytest

from mlx_rsgwm.converters.gguf.file import open_gguf
from mlx_rsgwm.converters.gguf.read import convert_gguf
from mlx_rsgwm.core.errors import RsgwmError
from tests.converters.gguf.tiny_llama import Kind, only_entry, weights, write_gguf

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
