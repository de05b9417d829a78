"""PEFT folders and adapters that have no counterpart: refused in one line, nothing written."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from mlx_rsgwm.converters.peft.convert import from_peft, from_peft_on, to_peft
from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from tests.converters.peft.tiny_adapters import VOCABULARY, Q, arrays_of, make_adapter, make_peft, save_raw

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_all_reasons_come_in_one_line(torch_base, tmp_path):
    theirs = make_peft(torch_base, tmp_path / "theirs", lora_bias=True, trainable_token_indices=[1])
    arrays = arrays_of(theirs)
    save_raw(theirs, {**arrays, Q: arrays[Q].astype(mx.int32), "stray": arrays[Q]})
    with pytest.raises(AdapterError) as caught:
        from_peft(theirs)
    text = str(caught.value)
    assert "\n" not in text
    for part in ("lora_bias", "trainable_token_indices", "a bias on lora_B", "trained token", "int32", "array stray"):
        assert part in text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["embed_tokens"]}, "give the base model"),
        ({"target_modules": ["lm_head"]}, "give the base model"),
        ({"modules_to_save": ["lm_head"]}, "give the base model"),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "DoRA on embeddings"),
        ({"trainable_token_indices": [1]}, "trained token embeddings"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_what_peft_itself_makes_and_we_refuse(torch_base, tmp_path, settings, expected):
    theirs = make_peft(torch_base, tmp_path / "theirs", **settings)
    with pytest.raises(AdapterError, match=expected):
        from_peft(theirs)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda a: a.pop(Q), "q_proj has no lora_A.weight"),
        (lambda a: a.update({Q: a[Q].T}), r"has shape \(64, 4\)"),
        (lambda a: a.update({Q: a[Q][None]}), r"has shape \(1, 4, 64\)"),
        (lambda a: a.update({Q: a[Q] * mx.array(math.nan)}), "not finite"),
        (lambda a: a.update({Q: a[Q].astype(mx.int32)}), "int32"),
        (lambda a: a.update({"stray": a[Q]}), "unknown array stray"),
        (
            lambda a: a.update({Q.replace("model.layers.0.", "model.experts.0."): a[Q]}),
            "experts.0.self_attn.q_proj has no lora_B",
        ),
        (lambda a: a.clear() or a.update({"base_model.model.x.ia3_l": mx.ones(3)}), "IA3"),
    ],
    ids=["missing", "transposed", "three axes", "nan", "integers", "stray", "experts", "ia3"],
)
def test_bad_arrays_are_refused(peft_folder, change, expected):
    arrays = arrays_of(peft_folder)
    change(arrays)
    save_raw(peft_folder, arrays)
    with pytest.raises(AdapterError, match=expected) as caught:
        from_peft(peft_folder)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_not_whole(peft_folder, tmp_path):
    weights = peft_folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(RsgwmError, match="not a sound safetensors file"):
        from_peft(peft_folder)
    weights.unlink()
    with pytest.raises(AdapterError, match=r"holds no adapter_model.safetensors"):
        from_peft(peft_folder)
    (peft_folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterError, match=r"adapter_model.bin is a pickle file"):
        from_peft(peft_folder)
    weights.write_bytes(whole)
    (peft_folder / "adapter_config.json").write_text("{")
    with pytest.raises(RsgwmError, match="not valid JSON"):
        from_peft(peft_folder)
    (peft_folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"holds no adapter_config.json"):
        from_peft(peft_folder)
    with pytest.raises(AdapterError, match="does not exist"):
        from_peft(tmp_path / "nowhere")


def test_an_adapter_of_another_base_is_refused(base_folder, peft_folder, tmp_path, make_torch_llama):
    other = make_torch_llama(tmp_path / "other", 0, 2, VOCABULARY)
    with pytest.raises(AdapterError, match="layer 2 is not in the base model"):
        from_peft_on(peft_folder, str(other))
    arrays = arrays_of(peft_folder)
    save_raw(peft_folder, {**arrays, Q: mx.zeros((4, 32))})
    with pytest.raises(AdapterError, match=r"q_proj is \(64, 64\) in the base, the adapter is for \(64, 32\)"):
        from_peft_on(peft_folder, str(base_folder))


def factors(module, shape_a, shape_b, dtype=mx.float32, **more):
    made = {f"{module}.lora_a": mx.ones(shape_a).astype(dtype), f"{module}.lora_b": mx.ones(shape_b).astype(dtype)}
    return made | {f"{module}.{leaf}": mx.ones(shape) for leaf, shape in more.items()}


EXPERTS = "model.layers.0.mlp.experts.up_proj"


@pytest.mark.parametrize(
    ("spec", "weights", "expected"),
    [
        (LoraSpec(2, 1.0, 0.0, ("q",), -1), factors("q", (4, 2), (2, 4), mx.int32), "int32"),
        (LoraSpec(2, 1.0, 0.0, ("e",), -1), factors(EXPERTS, (2, 2, 4), (2, 4, 2)), "named switch_mlp"),
        (
            LoraSpec(2, 1.0, 0.0, ("e",), -1, "dora"),
            factors("model.embed_tokens", (4, 2), (2, 4), m=(4,)),
            "DoRA on embeddings",
        ),
        (
            LoraSpec(2, 1.0, 0.0, ("e",), -1, "dora"),
            factors(EXPERTS.replace("experts", "switch_mlp"), (2, 2, 4), (2, 4, 2), m=(4,)),
            "no DoRA on experts",
        ),
    ],
    ids=["integers", "experts of another name", "dora on embeddings", "dora on experts"],
)
def test_adapters_without_a_peft_form_are_refused_before_anything_is_written(spec, weights, expected, tmp_path):
    with pytest.raises(AdapterError, match=expected):
        to_peft(Adapter(spec, weights), "b", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_anything_is_not_written_to(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RsgwmError, match="not an empty folder"):
        to_peft(make_adapter(), "b", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
