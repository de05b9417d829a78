"""What a converted folder keeps beside PEFT's files, and when it no longer holds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_rsgwm.converters.peft.convert import from_peft, to_peft
from mlx_rsgwm.core.errors import AdapterError
from mlx_rsgwm.data.row_hashes import KEY, RowRecord, record_of
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.prompt_statistics import PromptStatistics
from tests.converters.peft.tiny_adapters import make_adapter, make_peft

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_the_sidecar_is_ignored_once_peft_changed_its_files(tmp_path):
    adapter = make_adapter(manifest={"kind": "trained"})
    to_peft(adapter, "b", tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 40}))
    again = from_peft(tmp_path / "peft")
    assert again.spec.scale == 10.0
    assert again.importance == {}
    assert again.manifest["kind"] == "converted"


@pytest.mark.parametrize("place", ["manifest", "data"])
def test_rows_of_an_adapter_trained_further_in_torch_still_count(tmp_path, place):
    rows = RowRecord.of(["what is 1 + 1?", "what is 2 + 2?"])
    described = {KEY: rows.describe()} if place == "manifest" else {"data": {KEY: rows.describe()}}
    to_peft(make_adapter(manifest={"kind": "trained", **described}), "b", tmp_path / "peft")
    assert record_of(from_peft(tmp_path / "peft").manifest, "peft") == rows
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 40}))
    again = record_of(from_peft(tmp_path / "peft").manifest, "peft")
    assert (again.used, again.unknown) == (rows.used, ("peft",))


def test_prompt_states_come_back_to_the_same_bits(tmp_path):
    adapter = make_adapter()
    states = np.random.default_rng(0).standard_normal((20, 8))
    statistics = PromptStatistics.of_states(states, 1, adapter.base_fingerprint or "b", "template")
    adapter.prompt_states, adapter.prompt_states_metadata = statistics.arrays(), statistics.metadata()
    adapter.save(tmp_path / "before")
    to_peft(Adapter.load(tmp_path / "before"), "b", tmp_path / "peft")
    from_peft(tmp_path / "peft").save(tmp_path / "back")
    first, again = (tmp_path / name / "prompt_states.safetensors" for name in ("before", "back"))
    assert first.read_bytes() == again.read_bytes()


def test_a_damaged_sidecar_is_an_error(tmp_path):
    to_peft(make_adapter(), "b", tmp_path / "peft")
    path = tmp_path / "peft" / "mlx_rsgwm" / "importance.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdapterError, match=r"importance.safetensors was changed or damaged"):
        from_peft(tmp_path / "peft")


def test_an_edited_adapter_does_not_get_its_old_configuration_back(torch_base, tmp_path):
    adapter = from_peft(make_peft(torch_base, tmp_path / "theirs", use_rslora=True))
    spec = LoraSpec(4, 1.25, 0.0, adapter.spec.keys, -1)
    to_peft(Adapter(spec, adapter.weights, manifest=adapter.manifest), "b", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"]) == (False, 5)
