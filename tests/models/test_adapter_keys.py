"""Configs that do not reach all arrays of their adapter: amended on loading and merging, so that mlx-lm takes them."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.converters.fuse.fuse import fuse
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_keys import covering, covers
from mlx_rsgwm.models.base import load_base

Q, V = "self_attn.q_proj", "self_attn.v_proj"
BLOCKS = [f"model.layers.{layer}.{name}" for layer in range(4) for name in (Q, V)]


@pytest.mark.parametrize(
    ("keys", "num_layers", "modules", "depth", "reached"),
    [
        ((Q, V), -1, BLOCKS, None, True),
        ((Q, V), 0, BLOCKS, None, True),  # mlx-lm's [-0:] is all of them
        ((Q, V), 4, BLOCKS, 4, True),
        ((Q, V), 3, BLOCKS, 4, False),
        ((Q, V), 2, BLOCKS[4:], None, True),
        ((Q, V), 2, BLOCKS[4:], 6, False),  # they are not the last two
        ((Q,), -1, BLOCKS, None, False),
        (("auto",), -1, BLOCKS, None, False),
        (("q_proj", "v_proj"), -1, BLOCKS, None, False),
        ((), -1, BLOCKS, None, True),  # no keys are all linear layers
        ((), 2, BLOCKS, 4, False),
        ((), -1, [*BLOCKS, "lm_head"], None, False),
        ((Q, V, "lm_head"), 4, [*BLOCKS, "lm_head"], 4, True),
        (tuple(BLOCKS), 1, BLOCKS, 4, True),  # whole names are looked up in the whole model
        ((Q,), -1, ["transformer.h.0." + Q, "transformer.h.1." + Q], None, True),
    ],
)
def test_what_a_config_reaches(keys, num_layers, modules, depth, reached):
    assert covers(keys, num_layers, modules, depth) == reached


@pytest.mark.parametrize(
    "modules",
    [BLOCKS, [*BLOCKS, "lm_head"], BLOCKS[:1], ["vision.layers.0.q", "model.layers.0.q"], ["model.embed_tokens"]],
)
def test_amended_keys_reach_everything(modules):
    assert covers(*covering(modules), modules)


CHANGES = {
    "keys auto": {"keys": ["auto"]},
    "short keys": {"keys": ["q_proj", "v_proj"]},
    "one key of two": {"keys": [Q]},
    "one layer": {"num_layers": 1},
    "no dropout": {"dropout": None},
    "whole": {},
}


def rewrite(folder, change):
    """The adapter as another program leaves it: config changed, no manifest."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if "num_layers" in change:
        config["num_layers"] = change["num_layers"]
    if "keys" in change:
        config["lora_parameters"]["keys"] = change["keys"]
    if "dropout" in change:
        del config["lora_parameters"]["dropout"]
    path.write_text(json.dumps(config))
    (folder / "manifest.json").unlink()
    return folder


def logits(base_folder, adapter_folder):
    from mlx_lm.tuner.utils import load_adapters

    model = load_base(str(base_folder), dtype="float32").model
    load_adapters(model, str(adapter_folder))
    model.eval()
    return np.array(model(mx.array([[1, 2, 3, 4, 5]])))


@pytest.mark.parametrize("change", CHANGES)
def test_mlx_lm_takes_what_comes_of_any_config(make_adapter, tiny_base, tmp_path, change):
    adapters = [replace(make_adapter(seed), manifest={}) for seed in range(2)]
    whole = [adapter.save(tmp_path / f"whole{index}") for index, adapter in enumerate(adapters)]
    changed = [rewrite(one.save(tmp_path / f"a{index}"), CHANGES[change]) for index, one in enumerate(adapters)]
    expected = merge(whole, MergeOptions("linear")).save(tmp_path / "expected")
    found = merge(changed, MergeOptions("linear")).save(tmp_path / "found")
    np.testing.assert_array_equal(logits(tiny_base, found), logits(tiny_base, expected))
    again = Adapter.load(changed[0])
    assert covers(again.spec.keys, again.spec.num_layers, again.modules())
    np.testing.assert_array_equal(logits(tiny_base, again.save(tmp_path / "again")), logits(tiny_base, whole[0]))


@pytest.mark.parametrize("change", ["keys auto", "one layer", "no dropout"])
def test_fuse_works_in_every_array(make_adapter, tiny_base, tmp_path, change):
    adapter = replace(make_adapter(0, size=1.0), manifest={})
    folder = rewrite(adapter.save(tmp_path / "a"), CHANGES[change])
    fused = fuse(folder, str(tiny_base), tmp_path / "fused")
    assert fused["modules"] == len(adapter.modules())
    assert fused["share"] > 0.99


def test_a_merge_reaches_the_modules_of_all(make_adapter):
    """One adapter names no keys, so all linear layers, the other one: their union must not be that one alone."""
    first, second = make_adapter(0), make_adapter(1, keys=(Q,))
    first.spec = replace(first.spec, keys=(), num_layers=0)
    merged = merge([first, second], MergeOptions("linear"))
    assert covers(merged.spec.keys, merged.spec.num_layers, merged.modules())
