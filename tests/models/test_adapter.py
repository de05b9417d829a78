"""The adapter folder: what is written is read back bit for bit, and what is damaged is refused."""

import json
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_rsgwm.core.errors import AdapterError
from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.merging.pool import Pool
from mlx_rsgwm.models.adapter import Adapter, is_complete
from mlx_rsgwm.models.adapter_sources import load_adapter
from mlx_rsgwm.models.finite import not_finite


def same(left, right):
    return left.keys() == right.keys() and all(mx.array_equal(left[name], right[name]).item() for name in left)


def test_round_trip_is_exact(make_adapter, tmp_path):
    adapter = make_adapter(1)
    adapter.save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a")
    assert again.spec == adapter.spec
    assert same(again.weights, adapter.weights)
    assert same(again.importance, adapter.importance)
    assert same(again.init, adapter.init)
    assert set(again.manifest["files"]) == {
        "adapter_config.json", "adapters.safetensors", "importance.safetensors", "init.safetensors"
    }  # fmt: skip
    assert not list((tmp_path / "a").glob(".*"))


def test_manifest_is_what_makes_a_folder_whole(make_adapter, tmp_path, monkeypatch):
    from mlx_rsgwm.core import files

    def fail(path, value):
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        original(path, value)

    original = files.write_json
    monkeypatch.setattr(files, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        make_adapter(1).save(tmp_path / "a")
    assert not is_complete(tmp_path / "a")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapters.safetensors").write_bytes((f / "adapters.safetensors").read_bytes()[:-9]), "SHA-256"),
        (lambda f: (f / "importance.safetensors").unlink(), "importance.safetensors is in the manifest"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "SHA-256"),
        (lambda f: (f / "manifest.json").write_text("[]"), "expected a JSON object"),
    ],
)
def test_damage_is_named(make_adapter, tmp_path, damage, message):
    make_adapter(1).save(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(Exception, match=message) as caught:
        Adapter.load(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_damage_without_manifest(make_adapter, tmp_path):
    make_adapter(1).save(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    path = tmp_path / "a" / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(Exception, match="not a sound safetensors file"):
        Adapter.load(tmp_path / "a")


def test_pickle_is_refused_by_name(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle file"):
        Adapter.load(tmp_path)


def test_every_problem_at_once(make_adapter, tmp_path):
    adapter = make_adapter(1)
    names = list(adapter.weights)
    adapter.weights[names[0]] = mx.full(adapter.weights[names[0]].shape, float("nan"))
    del adapter.weights[names[3]]
    with pytest.raises(AdapterError) as caught:
        adapter.save(tmp_path / "a")
    assert "not finite" in str(caught.value)
    assert "has no lora_b" in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_numbers_that_json_cannot_hold_are_refused_before_anything_is_written(make_adapter, tmp_path):
    adapter = make_adapter(1)
    adapter.manifest["merge"] = {"norms": [1.0, float("nan")], "scale": float("inf")}
    with pytest.raises(AdapterError) as caught:
        adapter.save(tmp_path / "a")
    assert "manifest.merge.norms[1] is nan, not finite" in str(caught.value)
    assert "manifest.merge.scale is inf, not finite" in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_no_path_outside_the_folder(make_adapter, tmp_path):
    make_adapter(1).save(tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["files"]["../secret"] = "0"
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(AdapterError, match="outside the folder"):
        Adapter.load(tmp_path / "a")


def test_reads_what_mlx_lm_wrote(base, tmp_path):
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    base.model.freeze()
    parameters = {"rank": 3, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    linear_to_lora_layers(base.model, 1, parameters)
    weights = dict(tree_flatten(base.model.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters, "iters": 3, "seed": 0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = Adapter.load(tmp_path)
    assert adapter.spec.rank == 3
    assert same(adapter.weights, weights)
    assert adapter.base_fingerprint is None


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_what_is_not_finite_is_found_wherever_it_is(dtype):
    largest = mx.finfo(dtype).max
    sound = {
        "plain": mx.array([[0.0, -0.0, 1e-5], [largest, -largest, 3.0]]),
        "sum too large": mx.full((50, 4), largest),
        "empty": mx.zeros((0, 4)),
        "scalar": mx.array(2.5),
    }
    damaged = {
        f"{value} at {place}": mx.where(mx.arange(30).reshape(5, 6) == place, value, 1.0)
        for value in (float("inf"), float("-inf"), float("nan"))
        for place in (0, 17, 29)
    }
    damaged["scalar nan"] = mx.array(float("nan"))
    arrays = {name: value.astype(dtype) for name, value in {**sound, **damaged}.items()}
    arrays |= {"turned": arrays["nan at 17"].T, "counts": mx.array([1, 2])}
    assert not_finite(arrays) == [*damaged, "turned"]
    assert not_finite(arrays, drop=True) == [*damaged, "turned"]
    assert not arrays


def test_a_file_that_the_manifest_does_not_name_is_refused(make_adapter, tmp_path):
    """Else weights could be put where no hash is."""
    folder = make_adapter(1).save(tmp_path / "a")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("adapters.safetensors", "init.safetensors", "adapter_config.json"):
        fewer = {file: digest for file, digest in manifest["files"].items() if file != name}
        (folder / "manifest.json").write_text(json.dumps({**manifest, "files": fewer}))
        with pytest.raises(AdapterError, match=f"{name} is not in the manifest"):
            Adapter.load(folder)
        with pytest.raises(AdapterError, match=f"{name} is not in the manifest"), Pool.open([folder]).checked():
            pass


def test_adapters_that_lie_are_refused_or_told(make_adapter, tmp_path):
    """A zero magnitude kills its layer; a zero lora_b everywhere changes nothing, which is what no training gives."""
    told = []

    class Told(Progress):
        def message(self, text):
            told.append(text)

    adapter = make_adapter(1)
    still = {name: value * 0 if name.endswith("lora_b") else value for name, value in adapter.weights.items()}
    load_adapter(replace(adapter, weights=still).save(tmp_path / "still"), progress=Told())
    load_adapter(adapter.save(tmp_path / "sound"), progress=Told())
    assert [text for text in told if "changes nothing" in text] == [
        f"warning: {tmp_path / 'still'} changes nothing, every lora_b is zero"
    ]
    magnitudes = {f"{module}.m": mx.zeros((b.shape[1],)) for module, _, b in adapter.factors()}
    spec = replace(adapter.spec, fine_tune_type="dora")
    dead = Adapter(spec, {**adapter.weights, **magnitudes}, manifest=adapter.manifest)
    assert len([line for line in dead.problems() if "would switch the layer off" in line]) == len(magnitudes)
    with pytest.raises(AdapterError, match="would switch the layer off"):
        dead.save(tmp_path / "dead")
