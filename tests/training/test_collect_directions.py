"""Directions collected for adapters from elsewhere: the file that training keeps; rows with answers and without."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.core.safetensors_io import write_safetensors
from mlx_rsgwm.data.corpus import tokenize
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.data.unlabelled import load_unlabelled
from mlx_rsgwm.models import adapter_sidecars
from mlx_rsgwm.models.adapter import DIRECTIONS_FILE, Adapter
from mlx_rsgwm.models.directions import load_directions, role_grams
from mlx_rsgwm.models.hooks import inputs_seen
from mlx_rsgwm.training.collect_directions import collect_directions, save_directions
from mlx_rsgwm.training.estimate_importance import collect_importance, save_importance
from mlx_rsgwm.training.layers import adapted, target_modules
from mlx_rsgwm.training.loop import train

KEYS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
Q, K = (f"model.layers.1.self_attn.{name}_proj" for name in "qk")


@pytest.fixture
def saved(make_adapter, tmp_path):
    """An adapter on five modules of each layer, in a folder."""
    make_adapter(1, keys=KEYS).save(tmp_path / "adapter")
    return Adapter.load(tmp_path / "adapter")


def dense(gram):
    return gram.dense()


def collected(base, adapter, data, role="draft", **options):
    arrays, metadata = collect_directions(base, adapter, data, **options)
    return role_grams(lambda: dict(arrays), metadata, role, "it")


def with_b(adapter, factor):
    weights = {name: value * factor if name.endswith("lora_b") else value for name, value in adapter.weights.items()}
    return Adapter(adapter.spec, weights, manifest=adapter.manifest)


def test_whole_matrices_with_the_adapter_on(base, corpus, saved):
    grams = {role: collected(base, saved, corpus, role, rank=0, batch_size=4) for role in ("draft", "verify")}
    rows = tokenize(corpus, base.tokenizer, 1024)[0]
    for role, of_role in grams.items():
        seen = {name: [] for name in saved.modules()}
        modules = target_modules(base.model, saved.spec)
        with adapted(base.model, modules, saved.spec, saved.weights):
            base.model.eval()
            with inputs_seen(base.model, list(seen), lambda name, x, seen=seen: seen[name].append(np.array(x)[0])):
                for row in rows:
                    if row.role == role:
                        mx.eval(base.model(mx.array([row.tokens[:-1]])))
        for name, parts in seen.items():
            x = np.concatenate(parts).astype(np.float64)
            np.testing.assert_allclose(dense(of_role[name]), x.T @ x / len(x), rtol=2e-3, atol=1e-4 * np.mean(x**2))
    off = collected(base, with_b(saved, 0.0), corpus, rank=0)
    assert np.linalg.norm(dense(off[Q]) - dense(grams["draft"][Q])) > 0.01 * np.linalg.norm(dense(off[Q]))


def test_batches_do_not_matter_and_shared_inputs_are_one(base, corpus, saved):
    one, many = (collect_directions(base, saved, corpus, 8, batch_size=size) for size in (1, 16))
    assert one[1] == many[1]
    for name, value in one[0].items():
        scale = float(mx.abs(value).max().item())
        np.testing.assert_allclose(np.array(many[0][name]), np.array(value), atol=1e-4 * scale)
    assert json.loads(one[1]["shared"])[K] == Q
    assert len([name for name in one[0] if name.endswith(".sketch")]) == 2 * 8  # inputs of two roles


def test_what_training_records_is_what_is_collected(base, corpus, config):
    """At a learning rate at which the adapter stays zero, over all tokens: the same sums, in another order."""
    settings = config(keys=KEYS, learning_rate=1e-30, directions=8, directions_every=1)
    adapter = train(base, corpus, settings)
    arrays, metadata = collect_directions(base, adapter, corpus, 8)
    assert arrays.keys() == adapter.directions.keys()
    for name, value in arrays.items():
        scale = float(mx.abs(value).max().item())
        np.testing.assert_allclose(np.array(adapter.directions[name]), np.array(value), atol=1e-4 * scale)
    differing = {name for name, text in metadata.items() if adapter.directions_metadata[name] != text}
    assert differing == {"source"}


def test_rows_are_drawn_by_seed(base, corpus, saved):
    first, again, other = (collect_directions(base, saved, corpus, rows=12, seed=seed) for seed in (1, 1, 2))
    assert sum(int(first[1][f"rows/{role}"]) for role in ("draft", "verify") if f"rows/{role}" in first[1]) == 12
    name = next(iter(first[0]))
    assert mx.array_equal(first[0][name], again[0][name]).item()
    assert not mx.array_equal(first[0][name], other[0][name]).item()


def test_the_base_is_left_as_found(base, corpus, saved):
    logits = base.model(mx.array([[1, 2, 3]]))
    names = [(name, type(module)) for name, module in base.model.named_modules()]
    with pytest.raises(RsgwmError, match=r"directions of .*: the inputs of .* are not finite"):
        collect_directions(base, with_b(saved, float("inf")), corpus)
    collect_directions(base, saved, corpus)
    assert names == [(name, type(module)) for name, module in base.model.named_modules()]
    assert mx.array_equal(base.model(mx.array([[1, 2, 3]])), logits).item()


def test_saved_beside_untouched_weights(base, corpus, saved):
    save_importance(saved, base, corpus, *collect_importance(base, saved, corpus))
    folder = saved.path
    before = {file.name: files.sha256_file(file) for file in folder.iterdir() if file.name != "manifest.json"}
    arrays, metadata = collect_directions(base, saved, corpus)
    save_directions(Adapter.load(folder), base, corpus, arrays, metadata)
    assert before == {name: files.sha256_file(folder / name) for name in before}
    loaded = Adapter.load(folder)
    assert loaded.manifest["kind"] == "trained"
    assert loaded.manifest["importance"]["collected"] is True
    assert set(loaded.manifest["files"]) == {*before, DIRECTIONS_FILE}
    assert loaded.manifest["directions"]["data"]["hash"] == metadata["data_hash"] == corpus.hash
    assert set(load_directions(folder, "verify")) == set(saved.modules())
    damaged = (folder / DIRECTIONS_FILE).read_bytes()
    (folder / DIRECTIONS_FILE).write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
    with pytest.raises(AdapterError, match=r"directions\.safetensors was changed or damaged"):
        Adapter.load(folder)


def test_killed_while_replacing(base, corpus, saved, monkeypatch):
    """The folder stays sound, with the claim of the former directions withdrawn."""
    save_directions(saved, base, corpus, *collect_directions(base, saved, corpus, rows=3))
    written = write_safetensors

    def killed(*arguments):
        written(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_sidecars, "write_safetensors", killed)
    again = Adapter.load(saved.path)
    with pytest.raises(KeyboardInterrupt):
        save_directions(again, base, corpus, *collect_directions(base, again, corpus, rows=4))
    assert Adapter.load(saved.path).manifest["kind"] == "trained"
    with pytest.raises(RsgwmError, match="belongs to earlier weights of this folder; collect it anew"):
        load_directions(saved.path, "draft")


def test_refusals(base, corpus, saved, monkeypatch):
    short = load_lines(saved.path.parent, "a b\n")
    with pytest.raises(RsgwmError, match="the draft rows have 3 tokens, too few for k = 8; take more rows"):
        collect_directions(base, saved, short, 8)
    monkeypatch.setattr("mlx_rsgwm.training.collect_directions.device_limit", lambda: (1000, "a toy"))
    with pytest.raises(RsgwmError, match=r"its directions take 0 GB and a toy is 0 GB; leave --full out"):
        collect_directions(base, saved, corpus, 0)


def test_other_kinds_of_adapters(base, corpus, config):
    adapter = train(base, corpus, config(fine_tune_type="dora", learning_rate=1e-2))
    assert set(collected(base, adapter, corpus, rows=3)) == set(adapter.modules())


# --- rows without answers ---------------------------------------------------------------------------------------


def load_lines(folder, text, name="rows.txt", template=None):
    (folder / name).write_text(text, encoding="utf-8")
    return load_unlabelled(folder / name, template)


def test_questions_are_asked_in_the_words_of_training(base, tmp_path):
    template = TEMPLATES["plain"]
    for field in ("question", "prompt"):
        lines = "".join(json.dumps({field: text}) + "\n" for text in ("One?", "Two?"))
        rows, dropped = load_lines(tmp_path, lines, "q.jsonl", template).token_rows(base.tokenizer, 1024, "drop")
        assert dropped == 0
        for row, text in zip(rows, ("One?", "Two?"), strict=True):
            assert list(row.tokens[:-1]) == template.draft_prompt(base.tokenizer, text)
            assert row.role == "draft"
    plain, dropped = load_lines(tmp_path, "One.\n\n  \nTwo or more.\n").token_rows(base.tokenizer, 8, "drop")
    assert (len(plain), dropped) == (1, 1)
    assert list(plain[0].tokens[:-1]) == base.tokenizer.encode("One.")


def test_what_is_not_without_answers(corpus, tmp_path):
    assert load_unlabelled(tmp_path / "corpus", None) is None
    answered = json.dumps({"prompt": "One?", "completion": "1"}) + "\n"
    assert load_lines(tmp_path, answered, "a.jsonl") is None
    with pytest.raises(RsgwmError, match="line 2: its prompt is no text, or it has a completion, unlike the first row"):
        load_lines(tmp_path, json.dumps({"prompt": "One?"}) + "\n" + answered, "b.jsonl")
    with pytest.raises(RsgwmError, match="holds no rows"):
        load_lines(tmp_path, "\n \n")


# --- the command ------------------------------------------------------------------------------------------------


def invoke(*arguments):
    from mlx_rsgwm.cli.directions import collect

    return CliRunner().invoke(collect, [*(str(argument) for argument in arguments), "--json"])


def test_command(tiny_base, corpus, saved, tmp_path):
    found = invoke(saved.path, "--corpus", tmp_path / "corpus", "--base", tiny_base, "--rows", 6, "--directions", 8)
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout.splitlines()[-1])
    assert (result["modules"], result["inputs"]) == (10, 8)
    assert sum(result["rows"].values()) == 6
    again = invoke(saved.path, "--corpus", tmp_path / "corpus", "--base", tiny_base)
    assert isinstance(again.exception, RsgwmError)
    assert "already has directions (collected, adapter on, labelled rows); pass --replace" in str(again.exception)
    lines = "".join(json.dumps({"question": f"What is {n} + 1?"}) + "\n" for n in range(9))
    (tmp_path / "questions.jsonl").write_text(lines)
    full = invoke(saved.path, "--corpus", tmp_path / "questions.jsonl", "--base", tiny_base, "--full", "--replace")
    assert full.exit_code == 0, full.output
    loaded = Adapter.load(saved.path)
    assert loaded.directions_metadata["source"].endswith("questions without answers or plain text")
    assert {name.rpartition(".")[2] for name in loaded.directions} == {"gram"}
