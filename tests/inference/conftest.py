"""What the tests of the loop share."""

import mlx.nn as nn
import pytest

from mlx_rsgwm.models.slots import AdapterSlots


@pytest.fixture
def slots(request, base, make_adapter):
    """A drafter and a verifier on the tiny base, which a parameter quantises to so many bits."""
    if getattr(request, "param", None):
        nn.quantize(base.model, group_size=32, bits=request.param)
    slots = AdapterSlots(base)
    slots.load("drafter", make_adapter(1))
    slots.load("verifier", make_adapter(2))
    return slots
