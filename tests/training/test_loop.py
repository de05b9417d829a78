"""Training: the loss against a slow reference, importance against a float64 replay, and what is left behind."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.data.batching import make_batch, plan_epoch
from mlx_rsgwm.data.corpus import tokenize
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.training.config import TrainConfig, learning_rate_at
from mlx_rsgwm.training.layers import lora_layers
from mlx_rsgwm.training.loop import train
from mlx_rsgwm.training.losses import batch_loss

KEYS = ("self_attn.q_proj", "self_attn.v_proj")


def reference_loss(model, rows):
    """Row by row without padding, all logits, float64 log-softmax."""
    total, count = 0.0, 0
    for row in rows:
        logits = np.array(model(mx.array([row.tokens[:-1]]))[0]).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        for position in range(row.prompt_length - 1, len(row.tokens) - 1):
            total -= logprobs[position, row.tokens[position + 1]]
            count += 1
    return total / count


def test_loss_is_that_of_completion_tokens_without_padding(base, corpus):
    rows, _ = tokenize(corpus, base.tokenizer, 512)
    hidden, head = split_head(base.model)
    for role in ("draft", "verify"):
        chosen = [row for row in rows if row.role == role][:5]
        found = batch_loss(hidden, head, make_batch(chosen)).item()
        assert found == pytest.approx(reference_loss(base.model, chosen), rel=1e-5)


def test_importance_is_the_replayed_second_moment(base, corpus, config):
    settings = config(epochs=2, learning_rate=1e-2)
    adapter = train(base, corpus, settings)
    rows, _ = tokenize(corpus, base.tokenizer, settings.max_tokens)
    plan = [batch for epoch in range(2) for batch in plan_epoch(rows, 4, settings.seed, epoch)]
    moments: dict[str, dict[str, np.ndarray]] = {"all": {}, "draft": {}, "verify": {}}
    steps = dict.fromkeys(moments, 0)
    with lora_layers(base.model, settings.spec(), settings.init_seed):
        hidden, head = split_head(base.model)
        optimizer = optimizers.Adam(1e-2, betas=[0.9, 0.999], bias_correction=True)
        for number, indices in enumerate(plan):
            batch = make_batch([rows[index] for index in indices])
            optimizer.learning_rate = learning_rate_at(settings, number, len(plan))
            _, gradients = nn.value_and_grad(base.model, lambda _, b: batch_loss(hidden, head, b))(base.model, batch)
            for signal in ("all", batch.role):
                steps[signal] += 1
                for name, gradient in tree_flatten(gradients):
                    square = np.square(np.array(gradient).astype(np.float64))
                    before = moments[signal].get(name, np.zeros_like(square))
                    moments[signal][name] = 0.999 * before + 0.001 * square
            optimizer.update(base.model, gradients)
            mx.eval(base.model.parameters(), optimizer.state)
        trained = dict(tree_flatten(base.model.trainable_parameters()))
        adam = {name: np.array(state) for name, state in tree_flatten(optimizer.state) if name.endswith(".v")}
    for name, value in adapter.weights.items():
        np.testing.assert_allclose(np.array(value), np.array(trained[name]), rtol=1e-4, atol=1e-6)
    assert set(adapter.importance) == {f"{signal}/{name}" for signal in moments for name in adapter.weights}
    for signal, found in moments.items():
        for name, moment in found.items():
            expected = np.sqrt(moment / (1 - 0.999 ** steps[signal]))
            actual = np.array(adapter.importance[f"{signal}/{name}"])
            np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-4 * expected.max())
    for name in adapter.weights:  # "all" is what Adam itself holds
        expected = np.sqrt(adam[f"{name}.v"] / (1 - 0.999 ** steps["all"]))
        actual = np.array(adapter.importance[f"all/{name}"])
        np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-4 * expected.max())
    assert adapter.importance_metadata["steps/draft"] == str(steps["draft"])


def test_base_is_left_as_found(base, corpus, config):
    before = dict(tree_flatten(base.model.parameters()))
    logits = base.model(mx.array([[1, 2, 3]]))
    train(base, corpus, config())
    after = dict(tree_flatten(base.model.parameters()))
    assert before.keys() == after.keys()
    assert mx.array_equal(base.model(mx.array([[1, 2, 3]])), logits).item()


def test_pool_shares_a_and_seeds_are_what_matters(base, corpus, config):
    first, again = train(base, corpus, config()), train(base, corpus, config())
    other = train(base, corpus, config(seed=7, learning_rate=1e-4))
    wider = train(base, corpus, config(keys=(*KEYS, "self_attn.o_proj")))
    for name, value in first.weights.items():
        assert mx.array_equal(value, again.weights[name]).item()
    for name, value in first.init.items():
        assert mx.array_equal(value, other.init[name]).item()
        assert mx.array_equal(value, wider.init[name]).item()
        bound = 1 / np.sqrt(value.shape[0])
        assert np.abs(np.array(value)).max() <= bound
    assert not mx.array_equal(first.weights[name], other.weights[name]).item()


def test_adapter_is_accepted_by_mlx_lm(base, corpus, tiny_base, tmp_path, config):
    from mlx_lm.tuner.utils import load_adapters

    from mlx_rsgwm.models.base import load_base
    from mlx_rsgwm.models.slots import AdapterSlots

    train(base, corpus, config(num_layers=1, learning_rate=1e-2)).save(tmp_path / "a")
    adapter = Adapter.load(tmp_path / "a")
    assert {name.split(".")[2] for name in adapter.modules()} == {"1"}
    other = load_base(str(tiny_base), dtype="float32").model
    load_adapters(other, str(tmp_path / "a"))
    other.eval()
    slots = AdapterSlots(base)
    slots.load("x", adapter)
    slots.use("x")
    ids = mx.array([[4, 5, 6, 7]])
    assert mx.array_equal(slots.model(ids), other(ids)).item()


def test_training_learns_and_scores_held_out_rows(base, corpus, config):
    adapter = train(base, corpus, config(epochs=20, learning_rate=2e-2), held_out=corpus)
    loss = adapter.manifest["held_out_loss"]
    assert loss["after"]["draft"] < 0.85 * loss["before"]["draft"]
    history = adapter.manifest["history"]
    assert len(history) == 20 * 7
    assert adapter.manifest["tokens"]["trained"] == sum(row[3] for row in history)


def test_schedule(config):
    settings = config(learning_rate=1e-3, warmup=0.1)
    rates = [learning_rate_at(settings, step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(1e-3)
    assert rates[0] == pytest.approx(1e-3 / 11)
    assert rates[-1] == pytest.approx(1e-3 / 90)
    assert learning_rate_at(config(schedule="constant", warmup=0.0), 5, 10) == 5e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rnak": 8}, "did you mean 'rank'"),
        ({"rank": 0}, "rank = 0 is out of range"),
        ({"rank": "many"}, "rank"),
        ({"learning_rate": -1}, "learning_rate = -1"),
        ({"schedule": "sine"}, "schedule = 'sine'"),
        ({"keys": []}, "keys"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(RsgwmError, match=message):
        TrainConfig.from_mapping(values)


def test_bad_keys_and_layers(base, corpus, config):
    with pytest.raises(RsgwmError, match=r"no layer has a module self_attn\.nonesuch; there are .*self_attn\.q_proj"):
        train(base, corpus, config(keys=("self_attn.nonesuch",)))
    with pytest.raises(RsgwmError, match="the model has 2 layers"):
        train(base, corpus, config(num_layers=3))


def test_a_loss_that_is_not_finite_names_its_step(base, corpus, config):
    base.model.model.norm.weight = base.model.model.norm.weight * float("nan")
    with pytest.raises(RsgwmError, match=r"the loss is nan at step 1 \("):
        train(base, corpus, config())


def test_held_out_rows_are_cut_as_training_rows_are(base, config, tmp_path):
    """Rows of two messages, some longer than allowed: cut and told, or left out and told; all of them are counted."""
    from mlx_rsgwm.data.loading import load_data

    class Told(Progress):
        def __init__(self):
            self.messages = []

        def message(self, text):
            self.messages.append(text)

    def write(name, lengths):
        rows = [{"prompt": f"What is {length}?", "completion": "x" * length} for length in lengths]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("train.jsonl", [10, 12])
    write("valid.jsonl", [9, 200, 300])
    data, held = load_data(tmp_path, None, True)
    for long_rows, counts, told in (("cut", (3, 0, 2), "0 held-out rows of 3 left out, 2 cut"),
                                    ("drop", (1, 2, 0), "2 held-out rows of 3 left out, 0 cut")):  # fmt: skip
        told_by = Told()
        settings = config(max_tokens=64, long_rows=long_rows, steps=1)
        adapter = train(base, data, settings, held, progress=told_by)
        assert adapter.manifest["held_out_rows"] == dict(
            zip(("rows", "rows_too_long", "rows_cut"), counts, strict=True)
        )
        assert any(told in message for message in told_by.messages)
    write("valid.jsonl", [200, 300])
    _, held = load_data(tmp_path, None, True)
    cut = train(base, data, config(max_tokens=64, long_rows="cut", steps=1), held)
    assert cut.manifest["held_out_loss"]["after"]["draft"] > 0
