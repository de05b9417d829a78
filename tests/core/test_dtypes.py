"""The table of array types against MLX, NumPy, safetensors, gguf and torch, and the lists that cannot import it."""

import gguf
import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.numpy import save

from mlx_rsgwm.cli import fuse as fuse_command
from mlx_rsgwm.cli.commands import COMMANDS
from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.converters.fuse.layers import FORMATS
from mlx_rsgwm.core.dtypes import BY_CODE, CODES, DTYPES, FLOATS, NAMES, TABLE, UNSIGNED, name_of


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_library_means_the_same(row, tmp_path):
    assert getattr(mx, row.name) == row.mlx
    assert name_of(row.mlx) == row.name
    assert np.dtype(row.bits).itemsize == row.size == getattr(torch, row.name).itemsize
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"x": mx.array([1, 2]).astype(row.mlx)})
    assert f'"dtype":"{row.code}"'.encode() in (tmp_path / "x.safetensors").read_bytes()
    if row.name != "bfloat16":
        assert f'"{row.code}"'.encode() in save({"x": np.zeros(2, dtype=row.bits)})
    if row.code in gguf.GGMLQuantizationType.__members__:
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[row.code]] == (1, row.size)


def test_floats():
    assert list(DTYPES) == list(FLOATS) == ["float32", "float16", "bfloat16"]
    assert [row.epsilon for row in FLOATS.values()] == [2.0**-23, 2.0**-10, 2.0**-7]
    assert {NAMES[value]: value for value in DTYPES.values()} == DTYPES
    assert {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64} == UNSIGNED
    assert {code: CODES[row.mlx] for code, row in BY_CODE.items()} == {code: code for code in BY_CODE}


def test_the_choices_of_commands_are_the_tables():
    """Commands are read without MLX, and say the names themselves."""
    assert "parity" in COMMANDS
    parity = next(p for p in rsgwm.get_command(None, "parity").params if p.name == "dtype")
    assert list(parity.type.choices) == list(DTYPES)
    assert set(fuse_command.FORMATS) == {"keep", *FORMATS}
