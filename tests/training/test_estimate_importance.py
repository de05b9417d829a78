"""Importance for adapters of others: the root mean square of batch gradients, marked as collected."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import AdapterError
from mlx_rsgwm.data.batching import make_batch, plan_epoch
from mlx_rsgwm.data.corpus import tokenize
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.training.estimate_importance import collect_importance, save_importance
from mlx_rsgwm.training.layers import adapted, target_modules
from mlx_rsgwm.training.losses import batch_loss


@pytest.fixture
def foreign(tmp_path, base):
    """An adapter as mlx_lm.lora leaves it: its own arguments in the config, no keys, no manifest."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    folder = tmp_path / "foreign"
    folder.mkdir()
    parameters = {"rank": 3, "scale": 5.0, "dropout": 0.1}
    before = dict(base.model.named_modules())
    linear_to_lora_layers(base.model, 1, {**parameters, "keys": None})
    flat = dict(tree_flatten(base.model.trainable_parameters()))
    for name in [name for name in flat if name.endswith("lora_b")]:
        flat[name] = mx.random.normal(flat[name].shape) * 0.1
    mx.save_safetensors(str(folder / "adapters.safetensors"), flat)
    from mlx.utils import tree_unflatten

    names = {name.rpartition(".")[0] for name in flat}
    base.model.update_modules(tree_unflatten([(name, before[name]) for name in names]))
    base.model.freeze()
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters, "iters": 3, "model": "x"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_collected_is_the_root_mean_square(base, corpus, foreign):
    adapter = Adapter.load(foreign)
    assert len(adapter.modules()) == 7
    arrays, metadata = collect_importance(base, adapter, corpus, batch_size=4)
    rows, _ = tokenize(corpus, base.tokenizer, 1024)
    sums = {"all": {}, "draft": {}, "verify": {}}
    counts = dict.fromkeys(sums, 0)
    modules = {name: dict(base.model.named_modules())[name] for name in adapter.modules()}
    with adapted(base.model, modules, adapter.spec, adapter.weights):
        base.model.eval()
        hidden, head = split_head(base.model)
        for indices in plan_epoch(rows, 4, 0, 0):
            batch = make_batch([rows[index] for index in indices])
            _, found = nn.value_and_grad(base.model, lambda _, b: batch_loss(hidden, head, b))(base.model, batch)
            for signal in ("all", batch.role):
                counts[signal] += 1
                for name, gradient in tree_flatten(found):
                    square = np.array(gradient).astype(np.float64) ** 2
                    sums[signal][name] = sums[signal].get(name, 0) + square
    assert set(arrays) == {f"{signal}/{name}" for signal in sums for name in adapter.weights}
    for signal, found in sums.items():
        for name, value in found.items():
            expected = np.sqrt(value / counts[signal])
            np.testing.assert_allclose(np.array(arrays[f"{signal}/{name}"]), expected, rtol=1e-3, atol=1e-6)
    assert metadata["source"].startswith("collected after training")
    assert metadata["steps/all"] == str(counts["all"])


def test_saved_beside_untouched_weights(base, corpus, foreign):
    adapter = Adapter.load(foreign)
    before = {name: files.sha256_file(foreign / name) for name in ("adapters.safetensors", "adapter_config.json")}
    save_importance(adapter, base, corpus, *collect_importance(base, adapter, corpus))
    assert before == {name: files.sha256_file(foreign / name) for name in before}
    loaded = Adapter.load(foreign)
    assert loaded.manifest["kind"] == "imported"
    assert loaded.manifest["importance"]["collected"] is True
    assert loaded.manifest["importance"]["data"]["hash"] == corpus.hash
    assert loaded.importance_metadata["source"].startswith("collected")
    assert loaded.base_fingerprint == base.fingerprint
    loaded.save(foreign.parent / "copy")  # an adapter without keys stays one that mlx-lm applies
    again = json.loads((foreign.parent / "copy" / "adapter_config.json").read_text())
    assert "keys" not in again["lora_parameters"]


def test_dora_and_the_base_is_left_as_found(base, corpus, config):
    from mlx_rsgwm.training.loop import train

    logits = base.model(mx.array([[1, 2, 3]]))
    adapter = train(base, corpus, config(fine_tune_type="dora", learning_rate=1e-2))
    arrays, _ = collect_importance(base, adapter, corpus)
    assert {name.rpartition(".")[2] for name in arrays} == {"lora_a", "lora_b", "m"}
    assert mx.array_equal(base.model(mx.array([[1, 2, 3]])), logits).item()
    assert not tree_flatten(base.model.trainable_parameters())
    assert target_modules(base.model, adapter.spec)


def test_adapters_that_do_not_fit(base, corpus, make_adapter):
    other = make_adapter(1)
    other.manifest["base"]["fingerprint"] = "0" * 64
    with pytest.raises(AdapterError, match="pass the base it was made for"):
        collect_importance(base, other, corpus)
    strange = make_adapter(1)
    strange.weights = {name.replace("layers.1", "layers.7"): value for name, value in strange.weights.items()}
    with pytest.raises(AdapterError, match=r"no linear layer model\.layers\.7\.self_attn"):
        collect_importance(base, strange, corpus)
