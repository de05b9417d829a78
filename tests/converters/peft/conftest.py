"""What the tests of PEFT folders share: a tiny base in both libraries, and one converted adapter."""

from __future__ import annotations

import copy

import pytest


@pytest.fixture(scope="module")
def base_folder(make_torch_llama, tmp_path_factory):
    from tests.converters.peft.tiny_adapters import LAYERS, VOCABULARY

    return make_torch_llama(tmp_path_factory.mktemp("base"), 0, LAYERS, VOCABULARY)


@pytest.fixture(scope="module")
def torch_base(base_folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(base_folder), dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()

    def fresh():
        return copy.deepcopy(model)

    return fresh


@pytest.fixture
def peft_folder(tmp_path):
    from mlx_rsgwm.converters.peft.convert import to_peft
    from tests.converters.peft.tiny_adapters import make_adapter

    return to_peft(make_adapter(), "b", tmp_path / "peft")
