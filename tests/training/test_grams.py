"""Gram matrices of module inputs: their values, who shares one, how they stand beside an adapter, the command."""

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.core.safetensors_io import read_safetensors, write_safetensors
from mlx_rsgwm.data.batching import make_batch
from mlx_rsgwm.data.corpus import tokenize
from mlx_rsgwm.models import adapter as adapter_module
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.training.estimate_importance import collect_importance, save_importance
from mlx_rsgwm.training.grams import GRAMS_FILE, collect_grams, load_grams, real_positions, save_grams

KEYS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


@pytest.fixture
def saved(make_adapter, tmp_path):
    """An adapter on five modules of each layer, in a folder."""
    adapter = make_adapter(1, keys=KEYS)
    adapter.save(tmp_path / "adapter")
    return Adapter.load(tmp_path / "adapter")


def inputs_of(model, name, ids, adapter):
    """The input of a module for one row of ids, by running the blocks by hand with the adapter fused in."""
    from mlx.utils import tree_unflatten

    flat = dict(tree_flatten(model.parameters()))
    fused = {
        f"{module}.weight": flat[f"{module}.weight"] + adapter.spec.scale * (a @ b).T
        for module, a, b in adapter.factors()
    }
    model.update(tree_unflatten(list(fused.items())))
    try:
        layer = int(name.split(".")[2])
        h = model.model.embed_tokens(mx.array([ids]))
        for block in model.layers[:layer]:
            h = block(h, mask="causal", cache=None)
        block = model.layers[layer]
        x = block.input_layernorm(h)
        attention = block.self_attn
        if name.endswith("o_proj"):
            heads = [projection(x).reshape(1, len(ids), -1, 8).transpose(0, 2, 1, 3)
                     for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]  # fmt: skip
            queries, keys = (attention.rope(part) for part in heads[:2])
            keys, values = (mx.repeat(part, 2, axis=1) for part in (keys, heads[2]))
            scores = (queries @ keys.swapaxes(-1, -2)) / 8**0.5
            seen = mx.tri(len(ids), dtype=mx.bool_)
            x = mx.softmax(mx.where(seen, scores, -1e9), axis=-1) @ values
            x = x.transpose(0, 2, 1, 3).reshape(1, len(ids), -1)
        elif "mlp" in name:
            x = block.post_attention_layernorm(h + attention(x, mask="causal"))
            if name.endswith("down_proj"):
                gate = block.mlp.gate_proj(x)
                x = gate * mx.sigmoid(gate) * block.mlp.up_proj(x)
        return np.array(x)[0].astype(np.float64)
    finally:
        model.update(tree_unflatten([(name, flat[name]) for name in fused]))


def test_values_with_the_adapter_active_and_no_padding(base, corpus, saved):
    grams, metadata = collect_grams(base, saved, corpus, batch_size=4)
    rows, _ = tokenize(corpus, base.tokenizer, 1024)
    assert set(grams) == set(saved.modules())
    assert int(metadata["tokens"]) == sum(len(row.tokens) - 1 for row in rows)
    assert len({len(row.tokens) for row in rows}) > 1  # otherwise nothing is padded
    for name in saved.modules():
        if "layers.1" not in name:
            continue
        x = np.concatenate([inputs_of(base.model, name, row.tokens[:-1], saved) for row in rows])
        np.testing.assert_allclose(np.array(grams[name]), x.T @ x / len(x), rtol=2e-3, atol=1e-4 * np.mean(x**2))
    base_only = make_like(saved, 0.0)
    name = "model.layers.1.self_attn.q_proj"
    other = collect_grams(base, base_only, corpus, batch_size=4)[0][name]
    assert not mx.allclose(grams[name], other, rtol=1e-2).item()


def make_like(adapter, size):
    weights = {name: value * size if name.endswith("lora_b") else value for name, value in adapter.weights.items()}
    return Adapter(adapter.spec, weights, manifest=adapter.manifest)


def test_batches_do_not_matter_and_shared_inputs_are_one(base, corpus, saved):
    one, many = (collect_grams(base, saved, corpus, batch_size=size)[0] for size in (1, 16))
    for name in one:
        assert mx.allclose(one[name], many[name], rtol=1e-4, atol=1e-5).item()
    layer = "model.layers.0."
    assert one[layer + "self_attn.q_proj"] is one[layer + "self_attn.k_proj"]
    assert one[layer + "self_attn.q_proj"] is not one[layer + "self_attn.o_proj"]
    assert len({id(gram) for gram in one.values()}) == 8


def test_positions_leave_padding_out(base, corpus):
    rows, _ = tokenize(corpus, base.tokenizer, 1024)
    chosen = [min(rows, key=lambda row: len(row.tokens)), max(rows, key=lambda row: len(row.tokens))]
    inputs = make_batch(chosen).inputs
    found = np.array(inputs).reshape(-1)[np.array(real_positions(chosen, inputs.shape[1]))]
    assert found.tolist() == [token for row in chosen for token in row.tokens[:-1]]


def test_rows_are_drawn_by_seed(base, corpus, saved):
    first, again, other = (collect_grams(base, saved, corpus, rows=5, seed=seed) for seed in (1, 1, 2))
    assert first[1]["rows"] == "5"
    name = saved.modules()[0]
    assert mx.array_equal(first[0][name], again[0][name]).item()
    assert not mx.array_equal(first[0][name], other[0][name]).item()
    assert collect_grams(base, saved, corpus, rows=1000)[1]["rows"] == "23"


def test_the_base_is_left_as_found(base, corpus, saved):
    logits = base.model(mx.array([[1, 2, 3]]))
    names = [(name, type(module)) for name, module in base.model.named_modules()]
    collect_grams(base, saved, corpus)
    assert names == [(name, type(module)) for name, module in base.model.named_modules()]
    assert mx.array_equal(base.model(mx.array([[1, 2, 3]])), logits).item()
    broken = make_like(saved, float("inf"))
    with pytest.raises(RsgwmError, match="are not finite"):
        collect_grams(base, broken, corpus)
    assert names == [(name, type(module)) for name, module in base.model.named_modules()]


def test_saved_beside_untouched_weights(base, corpus, saved):
    folder = saved.path
    before = {file.name: files.sha256_file(file) for file in folder.iterdir() if file.name != "manifest.json"}
    grams, metadata = collect_grams(base, saved, corpus)
    save_grams(saved, base, corpus, grams, metadata)
    assert before == {name: files.sha256_file(folder / name) for name in before}
    loaded = Adapter.load(folder)
    assert loaded.manifest["kind"] == "trained"
    assert set(loaded.manifest["files"]) == {*before, GRAMS_FILE}
    assert loaded.manifest["grams"]["data"]["hash"] == metadata["data_hash"] == corpus.hash
    assert loaded.manifest["grams"]["tokens"] == metadata["tokens"]
    found = load_grams(folder)
    assert set(found) == set(grams)
    for name, gram in grams.items():
        assert mx.array_equal(found[name], gram).item()
    layer = "model.layers.0.self_attn."
    assert found[layer + "q_proj"] is found[layer + "k_proj"]
    stored, about = read_safetensors(folder / GRAMS_FILE)
    assert len(stored) == 8
    assert len(json.loads(about["shared"])) == 2
    damaged = (folder / GRAMS_FILE).read_bytes()
    (folder / GRAMS_FILE).write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
    with pytest.raises(AdapterError, match=r"grams\.safetensors was changed or damaged"):
        Adapter.load(folder)


def test_an_adapter_without_manifest_gets_one(base, corpus, saved):
    (saved.path / "manifest.json").unlink()
    bare = Adapter.load(saved.path)
    save_grams(bare, base, corpus, *collect_grams(base, bare, corpus, rows=3))
    loaded = Adapter.load(saved.path)
    assert loaded.manifest["kind"] == "imported"
    assert loaded.base_fingerprint == base.fingerprint
    assert "adapters.safetensors" in loaded.manifest["files"]
    assert load_grams(saved.path)


def test_killed_while_replacing(base, corpus, saved, monkeypatch):
    """The folder stays sound, with the former matrices' claim withdrawn."""
    collected = collect_grams(base, saved, corpus, rows=3)
    save_grams(saved, base, corpus, *collected)
    written = write_safetensors

    def killed(*arguments):
        written(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_module, "write_safetensors", killed)
    again = Adapter.load(saved.path)
    with pytest.raises(KeyboardInterrupt):
        save_grams(again, base, corpus, *collect_grams(base, again, corpus, rows=4))
    assert Adapter.load(saved.path).manifest["kind"] == "trained"
    with pytest.raises(RsgwmError, match="belongs to earlier weights of this folder; collect them"):
        load_grams(saved.path)


def test_other_weights_than_those_they_are_of(base, corpus, saved, make_adapter):
    save_grams(saved, base, corpus, *collect_grams(base, saved, corpus, rows=3))
    make_adapter(2, keys=KEYS).save(saved.path)
    with pytest.raises(RsgwmError, match="belongs to earlier weights of this folder; collect them"):
        load_grams(saved.path)


def test_importance_collected_before(base, corpus, saved):
    save_importance(saved, base, corpus, *collect_importance(base, saved, corpus))
    loaded = Adapter.load(saved.path)
    save_grams(loaded, base, corpus, *collect_grams(base, loaded, corpus, rows=3))
    assert Adapter.load(saved.path).manifest["importance"]["collected"] is True


def test_missing(saved):
    with pytest.raises(RsgwmError, match=r"has no Gram matrices; collect them: rsgwm adapter grams .* --corpus ROWS"):
        load_grams(saved.path)


def test_too_large_for_the_memory(base, corpus, saved, monkeypatch):
    monkeypatch.setattr("mlx_rsgwm.training.grams.device_limit", lambda: (1000, "a toy"))
    with pytest.raises(RsgwmError, match="the Gram matrices of 10 modules take 0 GB and a toy is 0 GB"):
        collect_grams(base, saved, corpus)


def test_other_kinds_of_adapters(base, corpus, config):
    from mlx_rsgwm.training.loop import train

    adapter = train(base, corpus, config(fine_tune_type="dora", learning_rate=1e-2))
    grams, _ = collect_grams(base, adapter, corpus, rows=3)
    assert set(grams) == set(adapter.modules())


def test_command(tiny_base, corpus, saved):
    from mlx_rsgwm.cli.grams import grams as command

    def invoke(*arguments):
        return CliRunner().invoke(command, [*(str(argument) for argument in arguments), "--json"])

    data = saved.path.parent / "corpus"
    found = invoke(saved.path, "--corpus", data, "--base", tiny_base, "--rows", 6)
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["modules"] == 10
    assert result["matrices"] == 8
    assert result["rows"] == 6
    assert len(load_grams(saved.path)) == 10
    again = invoke(saved.path, "--corpus", data, "--base", tiny_base)
    assert isinstance(again.exception, RsgwmError)
    assert "already has Gram matrices; pass --replace" in str(again.exception)
    assert invoke(saved.path, "--corpus", data, "--base", tiny_base, "--replace").exit_code == 0
    assert Adapter.load(saved.path).manifest["grams"]["rows"] == "23"
