"""`convert to-peft` and `convert from-peft`: there and back, and the base they name."""

from __future__ import annotations

import json

import pytest

from mlx_rsgwm.core.errors import AdapterError
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import load_base
from tests.converters.peft.tiny_adapters import VOCABULARY, make_adapter, same_arrays

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_commands_convert_there_and_back(base_folder, tmp_path):
    from click.testing import CliRunner

    from mlx_rsgwm.cli.main import rsgwm

    manifest = {"base": load_base(str(base_folder)).describe()}
    make_adapter(manifest=manifest).save(tmp_path / "ours")
    run = CliRunner().invoke
    there = run(rsgwm, ["convert", "to-peft", str(tmp_path / "ours"), "--out", str(tmp_path / "peft"), "--json"])
    assert there.exit_code == 0, there.output
    assert json.loads(there.stdout.splitlines()[-1])["base"] == str(base_folder)
    options = ["--base", str(base_folder), "--json", "--quiet"]
    back = run(rsgwm, ["convert", "from-peft", str(tmp_path / "peft"), "--out", str(tmp_path / "back"), *options])
    assert back.exit_code == 0, back.output
    assert json.loads(back.stdout.splitlines()[-1])["modules"] == 12
    same_arrays(Adapter.load(tmp_path / "ours").weights, Adapter.load(tmp_path / "back").weights)
    again = run(rsgwm, ["convert", "from-peft", str(tmp_path / "peft"), "--out", str(tmp_path / "back"), *options])
    assert again.exit_code == 2
    assert "not an empty folder" in again.output


def test_to_peft_names_no_other_base_than_was_trained_on(base_folder, tmp_path, make_torch_llama):
    from mlx_rsgwm.converters.peft.convert import convert_to_peft

    make_adapter(manifest={"base": load_base(str(base_folder)).describe()}).save(tmp_path / "ours")
    other = make_torch_llama(tmp_path / "other", 7, 2, VOCABULARY)
    with pytest.raises(AdapterError, match="pass the base it was made for"):
        convert_to_peft(tmp_path / "ours", str(other), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    convert_to_peft(tmp_path / "ours", "owner/not-here", tmp_path / "peft")  # nobody can tell
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "owner/not-here"
    )


def test_to_peft_without_a_known_base_asks_for_one(tmp_path):
    from click.testing import CliRunner

    from mlx_rsgwm.cli.main import rsgwm

    make_adapter().save(tmp_path / "ours")
    result = CliRunner().invoke(rsgwm, ["convert", "to-peft", str(tmp_path / "ours"), "--out", str(tmp_path / "peft")])
    assert result.exit_code == 2
    assert "give --base" in result.output
    assert not (tmp_path / "peft").exists()
