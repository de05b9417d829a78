"""An adapter is the same from every source, and what its source leaves open is told or refused by name."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import load_adapter, load_adapters

FOREIGN = ("peft", "gguf", "hub")


class Listening(Progress):
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def message(self, text):
        self.told.append(text)


@pytest.mark.parametrize("kind", ["ours", "mlx_lm", "peft", "gguf", "hub", "hub_revision"])
def test_every_source_gives_the_same_adapter(kind, adapter_sources, tiny_base, tmp_path):
    sources = adapter_sources(1)
    expected = Adapter.load(sources["ours"])
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    found = load_adapter(sources[kind], tiny_base)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before  # nothing is written
    assert (found.spec.rank, found.spec.scale) == (expected.spec.rank, expected.spec.scale)
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert found.weights[name].dtype == value.dtype
        assert mx.array_equal(found.weights[name], value)
    assert found.base_name == str(tiny_base)
    assert bool(found.own_folder) is (kind in ("ours", "mlx_lm"))


def test_a_path_is_looked_for_before_the_hub(adapter_sources, tmp_path, monkeypatch):
    sources = adapter_sources(1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(AdapterError, match="adapter folder owner/missing does not exist"):
        load_adapter("owner/missing")
    (tmp_path / "owner" / "adapter-1").symlink_to(sources["ours"])
    assert load_adapter("owner/adapter-1").path.name == "adapter-1"
    with pytest.raises(RsgwmError, match="elsewhere/missing could not be fetched from the Hub"):
        load_adapter("elsewhere/missing")
    for wrong in ("hf://owner", "hf://owner/name@", "hf://a/b/c@main"):
        with pytest.raises(RsgwmError, match="write hf://owner/name"):
            load_adapter(wrong)


def test_a_pool_stands_for_its_adapters(adapter_sources, tiny_base, tmp_path):
    pool = tmp_path / "pool"
    pool.mkdir()
    for seed, kind in enumerate(("ours", "mlx_lm", "peft", "gguf")):
        source = adapter_sources(seed)[kind]
        (pool / f"{seed}{source.suffix}").symlink_to(source)
    (pool / "notes").mkdir()
    told = Listening()
    found = load_adapters([pool, adapter_sources(5)["ours"]], tiny_base, progress=told)
    assert [(one.path or one.origin).name for one in found] == ["0", "1", "2", "3.gguf", "adapter-5"]
    assert f"{pool} is a pool: 0, 1, 2, 3.gguf; notes passed over, no adapter" in told.told
    with pytest.raises(RsgwmError, match=r"is a folder of adapters \(0, 1, 2, 3.gguf\); name one of them"):
        load_adapter(pool)


@pytest.mark.parametrize("kept", ["checkpoints/step-000002", "snapshots/step-000001", ".unfinished"])
def test_a_pool_that_was_not_trained_to_its_end_stands_for_nothing(kept, adapter_sources, tmp_path):
    pool = tmp_path / "pool"
    for seed, name in enumerate(("a", "c")):
        Adapter.load(adapter_sources(seed)["ours"]).save(pool / name)
    (pool / "b" / kept).parent.mkdir(parents=True)
    (pool / "b" / kept).touch()
    (pool / "data" / "a").mkdir(parents=True)
    with pytest.raises(RsgwmError, match=r"is an unfinished pool: b; train on .*, or name the adapters to take"):
        load_adapters([pool])
    assert [adapter.name for adapter in load_adapters([pool / "a", pool / "c"])] == ["a", "c"]
    (pool / "b" / kept).unlink()
    assert [adapter.name for adapter in load_adapters([pool])] == ["a", "c"]


def test_what_is_not_recorded_is_told_once(adapter_sources, tiny_base):
    sources = adapter_sources(1, sidecar=False)
    for kind in FOREIGN:
        told = Listening()
        load_adapter(sources[kind], progress=told)
        lines = [line for line in told.told if "records no fingerprint of its base" in line]
        assert len(lines) == 1, told.told
        assert lines[0].endswith(f"taken to be of {tiny_base}")
    told = Listening()
    load_adapter(sources["ours"], tiny_base, progress=told)
    assert told.told == []


def test_another_base_than_the_named_one_is_warned_of(adapter_sources, tiny_base, make_base_of, tmp_path):
    source = adapter_sources(1, sidecar=False)["peft"]
    config = json.loads((source / "adapter_config.json").read_text())
    for named, warned in (("owner/llama", True), (f"someone/{tiny_base.name}", False), (str(tiny_base), False)):
        (source / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
        told = Listening()
        load_adapter(source, tiny_base, progress=told)
        assert any(f"trained on {named}, not on {tiny_base}" in line for line in told.told) is warned
    # Of another name the weights decide, where both are here.
    (tmp_path / "copy").symlink_to(tiny_base)
    (source / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(tiny_base)}))
    for base, warned in ((tmp_path / "copy", False), (make_base_of(1), True)):
        told = Listening()
        load_adapter(source, base, progress=told)
        assert any("says that it was trained on" in line for line in told.told) is warned


def test_an_alias_and_its_hub_id_are_one_base(make_adapter):
    from mlx_rsgwm.models.fit_check import names_other_base

    adapter = make_adapter(0)
    adapter.named_base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not names_other_base(adapter, "smollm2-135m")
    adapter.named_base = "smollm2-135m"
    assert not names_other_base(adapter, "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert names_other_base(adapter, "HuggingFaceTB/SmolLM2-360M")


def test_without_a_base_that_can_be_had_it_is_said(adapter_sources):
    source = adapter_sources(1, sidecar=False)["peft"]
    config = json.loads((source / "adapter_config.json").read_text())
    for named, reason in (("owner/gone", "cannot be had; say where it is with --base"), (None, "give --base")):
        (source / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
        with pytest.raises(RsgwmError, match=reason):
            load_adapter(source)


def gguf_with(path, tensors, alpha=8.0, kind="adapter", architecture="llama"):
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_string("general.type", kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(rank, name="blk.0.attn_v.weight", inputs=32, outputs=16, dtype=np.float32):
    rng = np.random.default_rng(rank)
    shapes = {"lora_a": (rank, inputs), "lora_b": (outputs, rank)}
    return {f"{name}.{leaf}": rng.standard_normal(shape).astype(dtype) for leaf, shape in shapes.items()}


def test_ranks_that_differ_in_a_gguf_file_are_scaled_each_by_its_own(tiny_base, base, tmp_path):
    """llama.cpp multiplies by alpha / rank of the module; here one scale serves all, so the other goes into lora_b."""
    width = base.model.model.layers[0].mlp.gate_proj.weight.shape
    tensors = pair(4, "blk.0.ffn_gate.weight", width[1], width[0]) | pair(
        2, "blk.1.ffn_gate.weight", width[1], width[0], np.float16
    )
    found = load_adapter(gguf_with(tmp_path / "a.gguf", tensors), tiny_base)
    assert (found.spec.rank, found.spec.scale) == (4, 2.0)
    for layer, rank in ((0, 4), (1, 2)):
        a, b = (tensors[f"blk.{layer}.ffn_gate.weight.lora_{leaf}"].astype(np.float32) for leaf in "ab")
        module = f"model.layers.{layer}.mlp.gate_proj"
        update = found.spec.scale * np.array(
            found.weights[f"{module}.lora_a"].astype(mx.float32) @ found.weights[f"{module}.lora_b"].astype(mx.float32)
        )
        np.testing.assert_allclose(update.T, 8.0 / rank * b @ a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"kind": "model"}, "is no adapter but a model; give it as --base"),
        ({"architecture": "qwen2"}, "is for qwen2 models, and"),
        ({"tensors": {}}, "it holds no tensors"),
        ({"tensors": pair(2, "blk.9.attn_v.weight")}, "the base has no module for blk.9.attn_v.weight.lora_a"),
        ({"tensors": pair(2, inputs=7)}, "do not fit the model's"),
        ({"tensors": {f"blk.0.attn_v.weight.lora_{leaf}": np.ones(4, np.float32) for leaf in "ab"}}, "are no pair"),
        ({"tensors": {"blk.0.attn_v.weight.lora_a": np.ones((2, 32), np.float32)}}, "lora_b is missing"),
        ({"alpha": float("nan"), "tensors": pair(2)}, "not a finite number"),
    ],
)
def test_a_gguf_file_that_is_no_adapter_for_the_base_is_refused(tiny_base, tmp_path, changed, reason):
    path = gguf_with(tmp_path / "a.gguf", **{"tensors": pair(2), **changed})
    with pytest.raises(AdapterError, match=reason):
        load_adapter(path, tiny_base)


def test_a_gguf_adapter_is_converted_as_it_is_read(adapter_sources, tiny_base, tmp_path):
    from click.testing import CliRunner

    from mlx_rsgwm.cli.main import rsgwm

    source = adapter_sources(1)["gguf"]
    done = CliRunner().invoke(rsgwm, ["convert", "from-gguf", str(source), "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["base"] == str(tiny_base)
    found, expected = Adapter.load(tmp_path / "out"), load_adapter(source)
    assert found.spec == expected.spec
    assert all(mx.array_equal(found.weights[name], value) for name, value in expected.weights.items())
    options = ["--out", str(tmp_path / "q"), "--quantised"]
    again = CliRunner().invoke(rsgwm, ["convert", "from-gguf", str(source), *options])
    assert again.exit_code == 2
    assert "is an adapter, not a model; leave --quantised out" in again.stderr
    back = CliRunner().invoke(rsgwm, ["convert", "to-gguf", str(tmp_path / "out"), "--out", str(tmp_path / "b.gguf")])
    assert back.exit_code == 0, back.output


def test_what_is_read_goes_to_peft_again(adapter_sources, tmp_path):
    from click.testing import CliRunner

    from mlx_rsgwm.cli.main import rsgwm
    from mlx_rsgwm.converters.peft.convert import from_peft

    sources = adapter_sources(1, sidecar=False)
    expected = mx.load(str(sources["peft"] / "adapter_model.safetensors"))
    for kind, more in (("gguf", ["--verify"]), ("hub", []), ("hub_revision", [])):
        out = tmp_path / f"again-{kind}"
        done = CliRunner().invoke(rsgwm, ["convert", "to-peft", str(sources[kind]), str(out), *more])
        assert done.exit_code == 0, done.output
        found = mx.load(str(out / "adapter_model.safetensors"))
        assert found.keys() == expected.keys()
        assert all(mx.array_equal(found[name], value) for name, value in expected.items())
    assert from_peft(out).spec.scale == 2.0


@pytest.mark.parametrize("to", ["peft", "mlx", "gguf"])
def test_an_adapter_goes_to_every_format_and_reads_back(to, make_adapter, make_base_of, tmp_path):
    """Also with a scale whose alpha a float32 does not hold exactly."""
    from mlx_rsgwm.converters.convert import convert

    adapter = make_adapter(1, scale=0.1)
    out = convert(adapter, tmp_path / f"out.{to}", to)
    found = load_adapter(out, adapter.base_name)
    assert found.weights.keys() == adapter.weights.keys()
    assert all(mx.array_equal(found.weights[name], value) for name, value in adapter.weights.items())
    assert found.spec.scale == pytest.approx(0.1, rel=1e-7)
    with pytest.raises(AdapterError, match="pass the base it was made for"):
        convert(adapter, tmp_path / "other", to, str(make_base_of(1)))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("ask", ["base", "revision", "rows", "adapter"])
def test_failures_of_the_hub_are_one_line_without_the_token(ask, monkeypatch):
    """Whoever asks: the messages of the Hub's client repeat request headers."""
    import datasets
    import huggingface_hub

    from mlx_rsgwm.data.public_sets import SOURCES, hub_rows
    from mlx_rsgwm.evaluation.slices import newest_revision
    from mlx_rsgwm.models.base import resolve_base
    from mlx_rsgwm.models.hub_files import fetch_adapter

    def fail(*_, **__):
        raise ValueError("401 for Bearer hf_abcdefghij\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    asked = {
        "base": lambda: resolve_base("owner/none"),
        "revision": lambda: newest_revision("owner/none"),
        "rows": lambda: hub_rows(SOURCES["svamp"], "test", None),
        "adapter": lambda: fetch_adapter("owner/none"),
    }
    with pytest.raises(RsgwmError, match=r"401 for Bearer \(token\)(?:;|$)") as refused:
        asked[ask]()
    assert "more" not in str(refused.value)
