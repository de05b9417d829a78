"""What is missing is said before torch is imported, which takes seconds."""

from __future__ import annotations

import pytest

from mlx_rsgwm.bench import latency
from mlx_rsgwm.converters.parity import check
from mlx_rsgwm.core.errors import RsgwmError


@pytest.fixture
def no_torch(monkeypatch):
    for module in (check, latency):
        monkeypatch.setattr(module, "import_torch", lambda: pytest.fail("torch was imported"))


@pytest.mark.usefixtures("no_torch")
def test_parity_looks_at_adapter_base_and_peft_first(make_adapter, tiny_base, tmp_path):
    adapter, nowhere = make_adapter(1).save(tmp_path / "adapter"), tmp_path / "nowhere"
    for source, base, peft in ((nowhere, tiny_base, None), (adapter, nowhere, None), (adapter, tiny_base, nowhere)):
        with pytest.raises(RsgwmError, match="nowhere"):
            check.check_parity(source, str(base), peft_folder=peft)


@pytest.mark.usefixtures("no_torch")
def test_latency_looks_at_base_and_adapter_first(tiny_base, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    for base, adapter in ((nowhere, ""), (str(tiny_base), nowhere)):
        with pytest.raises(RsgwmError, match="nowhere"):
            latency.measure_latency(latency.LatencyConfig(base=base, adapter=adapter))
