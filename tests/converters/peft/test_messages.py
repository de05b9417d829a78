"""What from-peft says of arrays that it cannot place, checked on the sorting of arrays alone."""

import mlx.core as mx
import pytest

from mlx_rsgwm.converters.peft.folder import group_arrays

PREFIX = "base_model.model.model.layers.0."


@pytest.mark.parametrize("leaf", ["dt_bias", "A_log", "D"])
def test_a_parameter_of_a_saved_module_is_named_as_that(leaf):
    config = {"r": 4, "lora_alpha": 8, "modules_to_save": ["mamba"]}
    _, problems = group_arrays({f"{PREFIX}mamba.{leaf}": mx.zeros((4,))}, config, True)
    assert len(problems) == 1
    assert f"{leaf} of the saved module mamba" in problems[0]
    _, problems = group_arrays({f"{PREFIX}other.{leaf}": mx.zeros((4,))}, config, True)
    assert problems[0].startswith("unknown array")
