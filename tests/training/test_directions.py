"""Directions recorded in training against float64 Gram matrices of the same rows; recording changes nothing else."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.data.batching import make_batch
from mlx_rsgwm.data.corpus import tokenize
from mlx_rsgwm.linalg.gram import SketchedGram, WholeGram
from mlx_rsgwm.models.adapter import DIRECTIONS_FILE, Adapter
from mlx_rsgwm.models.directions import load_directions, role_grams
from mlx_rsgwm.models.hooks import inputs_seen
from mlx_rsgwm.training.directions import token_positions
from mlx_rsgwm.training.loop import train

KEYS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
STILL = 1e-30  # a learning rate at which the adapter stays zero, so that the inputs are the base's


def directions_of(adapter, role):
    return role_grams(lambda: dict(adapter.directions), adapter.directions_metadata, role, "it")


def dense(gram):
    return gram.dense()


def inputs_of(base, rows, names):
    """Every module's inputs, (tokens, in) float64, of rows run one by one through the base alone."""
    seen = {name: [] for name in names}
    with inputs_seen(base.model, names, lambda name, x: seen[name].append(np.array(x)[0].astype(np.float64))):
        for row in rows:
            mx.eval(base.model(mx.array([row.tokens[:-1]])))
    return {name: np.concatenate(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("changes", [{}, {"accumulate": 3, "batch_size": 2}, {"recompute": True}, {"dropout": 0.3}])
def test_a_role_s_sums_are_those_of_its_rows_alone(base, corpus, config, changes):
    """Prompts and answers count, padding does not: against rows that were never padded."""
    adapter = train(base, corpus, config(keys=KEYS, learning_rate=STILL, directions=8, directions_every=1, **changes))
    rows, _ = tokenize(corpus, base.tokenizer, 1024)
    assert len({len(row.tokens) for row in rows}) > 1  # otherwise nothing is padded
    names = [f"model.layers.{layer}.{key}" for layer in (0, 1) for key in KEYS]
    for role in ("draft", "verify"):
        of_role = [row for row in rows if row.role == role]
        grams = directions_of(adapter, role)
        assert set(grams) == set(names)
        assert int(adapter.directions_metadata[f"rows/{role}"]) == len(of_role)
        assert int(adapter.directions_metadata[f"tokens/{role}"]) == sum(len(row.tokens) - 1 for row in of_role)
        for name, x in inputs_of(base, of_role, names).items():
            gram, sketched = x.T @ x / len(x), grams[name]
            assert isinstance(sketched, SketchedGram)
            np.testing.assert_allclose(np.array(sketched.diagonal), np.diag(gram), rtol=1e-3)
            left_out = gram - np.array(sketched.factor) @ np.array(sketched.factor).T
            trace = np.trace(gram)
            assert np.linalg.eigvalsh(left_out).min() > -1e-4 * trace
            assert np.linalg.norm(left_out, "nuc") <= (sketched.missed + 1e-3) * trace
            assert sketched.missed < 0.9


def test_whole_matrices(base, corpus, config):
    adapter = train(base, corpus, config(keys=KEYS, learning_rate=STILL, directions=32, directions_every=1))
    rows = [row for row in tokenize(corpus, base.tokenizer, 1024)[0] if row.role == "draft"]
    grams = directions_of(adapter, "draft")
    kinds = {name.rpartition(".")[2]: type(gram) for name, gram in grams.items()}
    assert kinds["down_proj"] is SketchedGram  # 64 inputs
    assert kinds["q_proj"] is kinds["o_proj"] is WholeGram
    for name, x in inputs_of(base, rows, ["model.layers.1.self_attn.o_proj"]).items():
        gram = x.T @ x / len(x)
        np.testing.assert_allclose(dense(grams[name]), gram, rtol=2e-3, atol=1e-4 * np.mean(x**2))


def test_every_nth_token_of_each_row(base, corpus):
    rows = tokenize(corpus, base.tokenizer, 1024)[0][:3]
    length = make_batch(rows).inputs.shape[1]
    by_first = [token_positions(rows, length, 4, [first] * 3) for first in range(4)]
    everything = np.concatenate([np.arange(len(row.tokens) - 1) + i * length for i, row in enumerate(rows)])
    np.testing.assert_array_equal(np.sort(np.concatenate(by_first)), everything)
    assert set(np.diff(by_first[0][by_first[0] < length])) == {4}
    apart = token_positions(rows, length, 4, [5, 2, 3])
    np.testing.assert_array_equal(apart[apart < length] % 4, 1)


def test_a_sample_of_tokens_is_near_the_whole(base, corpus, config):
    settings = {"keys": KEYS, "learning_rate": STILL, "directions": 8, "epochs": 2}
    every, fourth = (train(base, corpus, config(**settings, directions_every=n)) for n in (1, 4))
    counts = [int(adapter.directions_metadata["tokens/draft"]) for adapter in (every, fourth)]
    assert counts[1] == pytest.approx(counts[0] / 4, rel=0.02)
    for name, gram in directions_of(every, "draft").items():
        sampled = dense(directions_of(fourth, "draft")[name])
        assert np.linalg.norm(sampled - dense(gram)) < 0.2 * np.linalg.norm(dense(gram))


@pytest.mark.parametrize("changes", [{}, {"recompute": True, "fine_tune_type": "dora"}])
def test_recording_changes_no_bit_of_the_training(base, corpus, config, changes):
    settings = {"keys": KEYS, "learning_rate": 1e-2, "dropout": 0.1, **changes}
    without, with_them = (train(base, corpus, config(**settings, directions=rank)) for rank in (0, 8))
    assert not without.directions
    assert with_them.directions
    for name in ("weights", "importance"):
        for array, value in getattr(without, name).items():
            assert mx.array_equal(value, getattr(with_them, name)[array]).item(), array
    assert without.manifest["history"] == with_them.manifest["history"]


@pytest.mark.parametrize("changes", [{"batch_size": 2, "accumulate": 3}, {"batch_size": 6, "recompute": True}])
def test_batches_and_recomputing_make_no_difference(base, corpus, config, changes):
    settings = {"keys": KEYS, "learning_rate": 1e-3, "directions": 8}
    plain, other = (train(base, corpus, config(**settings, **each)) for each in ({"batch_size": 6}, changes))
    assert plain.directions_metadata == other.directions_metadata
    assert plain.directions.keys() == other.directions.keys()
    for name, value in plain.directions.items():
        scale = float(mx.abs(value).max().item())
        np.testing.assert_allclose(np.array(other.directions[name]), np.array(value), atol=1e-3 * scale, err_msg=name)


def test_heads_and_embeddings(base, corpus, config):
    adapter = train(base, corpus, config(keys=("model.embed_tokens",), learning_rate=STILL, directions_every=1))
    rows = [row for row in tokenize(corpus, base.tokenizer, 1024)[0] if row.role == "draft"]
    counts = np.bincount(np.concatenate([row.tokens[:-1] for row in rows]), minlength=320)
    gram = directions_of(adapter, "draft")["model.embed_tokens"]
    np.testing.assert_allclose(np.array(gram.diagonal), counts / counts.sum(), rtol=1e-5)


def test_saved_beside_the_weights_and_read_again(base, corpus, config, tmp_path):
    adapter = train(base, corpus, config(keys=KEYS, directions=8))
    adapter.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a")
    loaded.save(tmp_path / "b")  # an adapter that is saved elsewhere takes them along
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert DIRECTIONS_FILE in Adapter.load(folder).manifest["files"]
        grams = load_directions(folder, "draft")
        for name, gram in directions_of(adapter, "draft").items():
            np.testing.assert_array_equal(dense(grams[name]), dense(gram))
    assert loaded.directions_metadata["source"] == "training"
    assert loaded.directions_metadata["data_hash"] == corpus.hash
    assert set(loaded.manifest["config"]) & {"directions"} == {"directions"}


def test_old_manifests_say_the_same(config):
    assert not {"directions", "directions_every"} & set(config().describe())
    assert config(directions=0).describe()["directions"] == 0
    assert config(directions_every=2).describe()["directions_every"] == 2
