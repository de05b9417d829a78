"""What a run can be told: DoRA, quantised bases, accumulation, clipping, decay, validation, snapshots."""

import json
import sys
import types

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.batching import make_batch, plan_steps
from mlx_rsgwm.data.corpus import tokenize
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import load_adapter
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.config import TrainConfig, learning_rate_at
from mlx_rsgwm.training.layers import lora_layers, trainable
from mlx_rsgwm.training.loop import train
from mlx_rsgwm.training.losses import batch_nats
from mlx_rsgwm.training.reporting import open_reports
from mlx_rsgwm.training.snapshots import snapshot_folders, snapshot_steps


def equal(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_allclose(np.array(value), np.array(second[name]), err_msg=name, **tolerance)


def losses(adapter):
    return [line[2] for line in adapter.manifest["history"]]


def quantised(tiny_base, folder, bits):
    """The tiny base, quantised by mlx-lm and saved as it does."""
    from mlx_lm.utils import load, quantize_model, save_config

    model, _ = load(str(tiny_base))
    config = json.loads((tiny_base / "config.json").read_text())
    model, config = quantize_model(model, config, group_size=32, bits=bits)
    folder.mkdir()
    for file in tiny_base.iterdir():
        if "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    save_config(config, folder / "config.json")
    return folder


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_mlx_lm_loads_and_fuses_what_was_trained(base, corpus, config, tiny_base, tmp_path, kind, bits):
    from mlx_lm.tuner.utils import load_adapters

    from mlx_rsgwm.models.base import load_base

    folder = quantised(tiny_base, tmp_path / "q", bits) if bits else tiny_base
    base = load_base(str(folder), dtype="float32")
    keys = ("self_attn.q_proj", "mlp.down_proj")
    settings = config(fine_tune_type=kind, keys=keys, num_layers=1, epochs=12, learning_rate=2e-2)
    adapter = train(base, corpus, settings)
    assert np.mean(losses(adapter)[-7:]) < 0.95 * np.mean(losses(adapter)[:7])
    adapter.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a")
    assert {name.rpartition(".")[2] for name in loaded.weights} == {
        "lora_a",
        "lora_b",
        *(["m"] if kind == "dora" else []),
    }
    assert set(loaded.importance_of("all")) == set(loaded.weights)
    other = load_base(str(folder), dtype="float32").model
    load_adapters(other, str(tmp_path / "a"))
    other.eval()
    ids = mx.array([[4, 5, 6, 7]])
    spec = settings.spec()
    with lora_layers(base.model, spec, 0):
        base.model.load_weights(list(loaded.weights.items()), strict=False)
        base.model.eval()
        expected = base.model(ids)
    np.testing.assert_allclose(np.array(other(ids)), np.array(expected), atol=1e-6)
    fused = [(name, module.fuse(dequantize=True)) for name, module in other.named_modules() if hasattr(module, "fuse")]
    assert len(fused) == 2
    other.update_modules(_tree(fused))
    np.testing.assert_allclose(np.array(other(ids)), np.array(expected), atol=2e-4)


def _tree(pairs):
    from mlx.utils import tree_unflatten

    return tree_unflatten(list(pairs))


def test_accumulated_batches_are_one_big_batch(base, corpus, config):
    whole = train(base, corpus, config(batch_size=6, epochs=2, learning_rate=1e-2))
    parts = train(base, corpus, config(batch_size=2, accumulate=3, epochs=2, learning_rate=1e-2))
    np.testing.assert_allclose(losses(whole), losses(parts), rtol=1e-5)
    equal(whole.weights, parts.weights, rtol=1e-4, atol=2e-5)
    equal(whole.importance, parts.importance, rtol=1e-3, atol=1e-5)
    assert whole.manifest["tokens"]["trained"] == parts.manifest["tokens"]["trained"]
    assert whole.manifest["tokens"]["real"] == parts.manifest["tokens"]["real"]


def test_recomputing_changes_nothing(base, corpus, config):
    plain = train(base, corpus, config(epochs=2, learning_rate=1e-2))
    again = train(base, corpus, config(epochs=2, learning_rate=1e-2, recompute=True))
    np.testing.assert_allclose(losses(plain), losses(again), rtol=1e-5)
    equal(plain.weights, again.weights, rtol=1e-4, atol=2e-5)
    assert "checkpointed" not in type(base.model.layers[0]).__call__.__qualname__


def test_recomputing_draws_the_same_dropout(base, corpus, config):
    """Gradients with dropout against differences of the loss; with other masks in the second pass they are far off."""
    from mlx_rsgwm.training.layers import recomputed_blocks

    rows, _ = tokenize(corpus, base.tokenizer, 512)
    batch = make_batch([row for row in rows if row.role == "draft"][:2])
    settings = config(dropout=0.5)
    with lora_layers(base.model, settings.spec(), 0):
        model = base.model
        shapes = {name: value.shape for name, value in trainable(model).items() if name.endswith("lora_b")}
        model.load_weights([(name, mx.random.normal(shape) * 0.3) for name, shape in shapes.items()], strict=False)
        model.train()
        hidden, head = split_head(model)
        seeds = iter(())

        def fresh():
            nonlocal seeds
            seeds = iter(range(100, 200))

        with recomputed_blocks(model, lambda: next(seeds)):
            fresh()
            _, gradients = nn.value_and_grad(model, lambda _, b: batch_nats(hidden, head, b))(model, batch)
            flat = dict(tree_flatten(gradients))
            for name in ("model.layers.0.self_attn.q_proj.lora_b", "model.layers.1.self_attn.v_proj.lora_a"):
                weight = trainable(model)[name]
                direction = flat[name] / mx.linalg.norm(flat[name])
                values = []
                for sign in (1, -1):
                    model.load_weights([(name, weight + sign * 1e-2 * direction)], strict=False)
                    fresh()
                    values.append(batch_nats(hidden, head, batch).item())
                model.load_weights([(name, weight)], strict=False)
                slope = (values[0] - values[1]) / 2e-2
                assert slope == pytest.approx(mx.linalg.norm(flat[name]).item(), rel=2e-2)


def test_moments_and_steps_with_clipping_decay_and_accumulation(base, corpus, config):
    """The run against a float64 replay: importance sees the mean gradient unclipped, AdamW the clipped one."""
    settings = config(
        batch_size=2, accumulate=2, epochs=2, learning_rate=1e-2, optimizer="adamw", weight_decay=0.3, clip=0.05
    )
    adapter = train(base, corpus, settings)
    rows, _ = tokenize(corpus, base.tokenizer, settings.max_tokens)
    plan = plan_steps(rows, 4, settings.seed, 2)
    moments = {"all": {}, "draft": {}, "verify": {}}
    steps = dict.fromkeys(moments, 0)
    clipped = 0
    with lora_layers(base.model, settings.spec(), settings.init_seed):
        hidden, head = split_head(base.model)
        values = {name: np.array(value).astype(np.float64) for name, value in trainable(base.model).items()}
        first = {name: np.zeros_like(value) for name, value in values.items()}
        second = {name: np.zeros_like(value) for name, value in values.items()}
        for number, indices in enumerate(plan):
            model = base.model
            model.load_weights([(name, mx.array(v.astype(np.float32))) for name, v in values.items()], strict=False)
            model.eval()
            chosen = [rows[index] for index in indices]
            batch = make_batch(chosen)
            _, found = nn.value_and_grad(model, lambda _, b: batch_nats(hidden, head, b))(model, batch)
            count = sum(len(row.tokens) - row.prompt_length for row in chosen)
            gradients = {name: np.array(g).astype(np.float64) / count for name, g in tree_flatten(found)}
            for signal in ("all", batch.role):
                steps[signal] += 1
                for name, gradient in gradients.items():
                    before = moments[signal].get(name, 0.0)
                    moments[signal][name] = 0.999 * before + 0.001 * gradient**2
            norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
            clipped += norm > 0.05
            rate = learning_rate_at(settings, number, len(plan))
            for name, gradient in gradients.items():
                gradient = gradient * min(1.0, 0.05 / (norm + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                m, v = first[name] / (1 - 0.9 ** (number + 1)), second[name] / (1 - 0.999 ** (number + 1))
                values[name] = values[name] * (1 - rate * 0.3) - rate * m / (np.sqrt(v) + 1e-8)
    assert clipped > len(plan) / 2
    for name, value in values.items():
        np.testing.assert_allclose(np.array(adapter.weights[name]), value, rtol=1e-2, atol=2e-4 * np.abs(value).max())
    for signal, found in moments.items():
        for name, moment in found.items():
            expected = np.sqrt(moment / (1 - 0.999 ** steps[signal]))
            actual = np.array(adapter.importance[f"{signal}/{name}"])
            np.testing.assert_allclose(actual, expected, rtol=1e-2, atol=1e-3 * expected.max())


def test_dropout_is_off_in_evaluation(base, corpus, config):
    first = train(base, corpus, config(dropout=0.5, validate_every=2, learning_rate=1e-2), held_out=corpus)
    from mlx_rsgwm.training.losses import held_out_loss

    rows, _ = tokenize(corpus, base.tokenizer, 512)
    settings = config(dropout=0.5)
    with lora_layers(base.model, settings.spec(), 0):
        base.model.load_weights(list(first.weights.items()), strict=False)
        base.model.train()
        mx.random.seed(99)
        once = held_out_loss(base.model, rows, 4)
        base.model.train()
        assert held_out_loss(base.model, rows, 4) == once
    assert once == pytest.approx(first.manifest["held_out_loss"]["after"], rel=1e-5)


def test_best_weights_are_kept_and_patience_ends_the_run(base, corpus, config):
    settings = config(epochs=30, learning_rate=0.3, schedule="constant", validate_every=2, patience=3, select="best")
    adapter = train(base, corpus, settings, held_out=corpus)
    scores = {step: loss for step, loss, _ in adapter.manifest["validation"]}
    best = min(scores, key=scores.get)
    assert adapter.manifest["kept_step"] == best
    assert len(adapter.manifest["history"]) < 30 * 7
    assert sum(step > best for step in scores) == 3
    by_role = next(roles for step, _, roles in adapter.manifest["validation"] if step == best)
    assert adapter.manifest["held_out_loss"]["after"] == pytest.approx(by_role, rel=1e-6)


def test_steps_end_a_run_and_the_last_batch_is_whole(base, corpus, config):
    assert len(losses(train(base, corpus, config(steps=10)))) == 10
    adapter = train(base, corpus, config())
    rows, _ = tokenize(corpus, base.tokenizer, 512)
    assert adapter.manifest["tokens"]["trained"] == sum(row.trained_tokens for row in rows)


def test_all_linear_names_every_layer(base, corpus, config):
    adapter = train(base, corpus, config(keys=("all-linear",)))
    assert set(adapter.spec.keys) == {
        *(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    }  # fmt: skip
    assert len(adapter.modules()) == 14


def test_rank_above_dimensions_is_refused(base, corpus, config):
    with pytest.raises(
        RsgwmError, match=r"rank 20 is above the dimensions of model\.layers\.0\.self_attn\.v_proj \(32→16\)"
    ):
        train(base, corpus, config(rank=20))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_decay": 0.1}, "weight_decay = 0.1 needs optimizer adamw"),
        ({"patience": 2}, "patience = 2 needs validate_every"),
        ({"select": "best"}, "select = 'best' needs validate_every"),
        ({"fine_tune_type": "full"}, "fine_tune_type = 'full'"),
        ({"clip": -1.0}, "clip"),
        ({"accumulate": 0}, "accumulate"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"keys": ["a", "a"]}, "keys"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(RsgwmError, match=message):
        TrainConfig.from_mapping(values)


def test_validation_needs_rows(base, corpus, config):
    with pytest.raises(RsgwmError, match="no held-out rows"):
        train(base, corpus, config(validate_every=2))


def test_snapshots_hold_update_and_mean_gradient(base, corpus, config, tmp_path):
    assert snapshot_steps((0.01, 0.02, 0.05), 100) == {1: [0.01], 2: [0.02], 5: [0.05]}
    assert snapshot_steps((0.01, 0.02, 0.05), 20) == {1: [0.01, 0.02, 0.05]}
    settings = config(epochs=2, learning_rate=1e-2, fine_tune_type="dora")
    saving = Saving(tmp_path / "a", snapshots=(0.05, 0.2))
    train(base, corpus, settings, saving=saving)
    folders = sorted((tmp_path / "a" / "snapshots").iterdir())
    assert [path.name for path in folders] == ["step-000001", "step-000003"]
    manifest = json.loads((folders[1] / "manifest.json").read_text())
    assert (manifest["shares"], manifest["step"], manifest["kind"]) == ([0.2], 3, "snapshot")
    assert snapshot_folders(tmp_path / "a") == {0.05: folders[0], 0.2: folders[1]}
    rows, _ = tokenize(corpus, base.tokenizer, 512)
    plan = plan_steps(rows, 4, settings.seed, 2)
    with lora_layers(base.model, settings.spec(), settings.init_seed):
        hidden, head = split_head(base.model)
        start = trainable(base.model)
        optimizer = optimizers.Adam(1e-2, betas=[0.9, 0.999], bias_correction=True)
        total = {}
        for number, indices in enumerate(plan[:3]):
            batch = make_batch([rows[index] for index in indices])
            optimizer.learning_rate = learning_rate_at(settings, number, len(plan))
            _, gradients = nn.value_and_grad(base.model, lambda _, b: batch_nats(hidden, head, b) / b.trained_tokens)(
                base.model, batch
            )
            total = {name: total.get(name, 0) + value for name, value in tree_flatten(gradients)}
            optimizer.update(base.model, gradients)
        moved = trainable(base.model)
    snapshot = load_adapter(folders[1])
    equal(dict(sorted(snapshot.weights.items())), moved, rtol=1e-3, atol=1e-5)
    assert snapshot.init.keys() == {name for name in start if name.endswith("lora_a")}
    assert all(mx.array_equal(value, start[name]) for name, value in snapshot.init.items())
    assert snapshot.importance.keys() == {f"all/{name}" for name in moved}
    mean = {name: total[name] / 3 for name in moved}
    equal(dict(sorted(mx.load(str(folders[1] / "gradient.safetensors")).items())), mean, rtol=1e-3, atol=1e-6)


def test_reports_reach_the_services(base, corpus, config, tmp_path, monkeypatch):
    calls = []
    for name in ("wandb", "trackio", "swanlab"):
        fake = types.ModuleType(name)
        fake.init = lambda _name=name, **options: calls.append((_name, "init", options["project"]))
        fake.log = lambda values, step, _name=name: calls.append((_name, step, values))
        fake.finish = lambda _name=name: calls.append((_name, "finish", None))
        monkeypatch.setitem(sys.modules, name, fake)
    reports = open_reports(("wandb", "trackio", "swanlab"), "p", tmp_path, {})
    train(base, corpus, config(validate_every=7), held_out=corpus, reports=reports)
    reports.close()
    for name in ("wandb", "trackio", "swanlab"):
        mine = [call for call in calls if call[0] == name]
        assert mine[0] == (name, "init", "p")
        assert mine[-1] == (name, "finish", None)
        assert [call[1] for call in mine[1:-1]] == [1, 2, 3, 4, 5, 6, 7, 7]
        assert "held_out_loss" in mine[-2][2]
        assert {"learning_rate", "memory/peak"} <= mine[1][2].keys()


def test_reports_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RsgwmError, match="report-to wandb needs its package: pip install wandb"):
        open_reports(("wandb",), "p", tmp_path, {})
    with pytest.raises(RsgwmError, match="report-to mlflow is unknown"):
        open_reports(("mlflow",), "p", tmp_path, {})
