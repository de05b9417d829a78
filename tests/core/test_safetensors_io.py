"""Files of arrays."""

from __future__ import annotations

import os
import random
import resource
from contextlib import suppress

import mlx.core as mx
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.safetensors_io import read_safetensors, write_safetensors


def test_the_order_of_arrays_does_not_change_the_bytes(tmp_path):
    names = [f"model.layers.{n}.self_attn.q_proj.{leaf}" for n in range(40) for leaf in ("lora_a", "lora_b")]
    arrays = {name: mx.full((3,), place) for place, name in enumerate(names)}
    written = set()
    for seed in range(3):
        random.Random(seed).shuffle(names)
        write_safetensors(tmp_path / "a.safetensors", {name: arrays[name] for name in names})
        written.add((tmp_path / "a.safetensors").read_bytes())
    assert len(written) == 1


def test_a_sound_file_is_not_called_unsound_where_no_more_files_can_be_opened(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": mx.zeros((2,))})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held, told = [], []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(2):  # the file is opened twice at a time
            with pytest.raises(RsgwmError) as refused:
                read_safetensors(path)
            told.append(str(refused.value))
            os.close(held.pop())
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(line.startswith(f"cannot read {path}: ") and "oo many" in line for line in told), told
    assert read_safetensors(path)[0].keys() == {"a"}
