"""The memory estimate: near what MLX reports, and checked against the device."""

import mlx.core as mx
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.training import memory
from mlx_rsgwm.training.loop import train
from mlx_rsgwm.training.memory import MemoryEstimate, MemoryOptions, check_estimate, memory_line, memory_now


@pytest.mark.parametrize("recompute", [False, True])
def test_estimate_is_near_the_peak(tmp_path, config, recompute):
    """Within a factor of three of what a step takes above what was there before, on sizes where it matters."""
    import json

    from mlx_lm.models.llama import Model, ModelArgs

    from mlx_rsgwm.core.distributed import ALONE
    from mlx_rsgwm.data.batching import TokenRow
    from mlx_rsgwm.training.layers import lora_layers
    from mlx_rsgwm.training.state import TrainingRun

    values = {
        "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 6, "intermediate_size": 384,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 2000,
        "tie_word_embeddings": True,
    }  # fmt: skip
    model = Model(ModelArgs.from_dict(json.loads(json.dumps(values))))
    mx.eval(model.parameters())
    rows = [TokenRow("draft", tuple(range(1, 202)), 150) for _ in range(4)]
    settings = config(recompute=recompute)
    with lora_layers(model, settings.spec(), 0):
        found = memory.estimate(model, values, 4, 201, 4 * 51, 1, recompute)
        run = TrainingRun(model, rows, [[0, 1, 2, 3]] * 2, [], settings, "x", ALONE)
        with run.looking():
            run.step(False)
            mx.clear_cache()
            mx.reset_peak_memory()
            start = mx.get_active_memory()
            run.step(False)
            taken = mx.get_peak_memory() - start
    expected = found.activations + found.logits + found.adapter
    print(f"taken {taken / 1e6:.1f} MB, estimated {expected / 1e6:.1f} MB")
    assert expected / 3 < taken < expected * 1.5


def test_too_little_memory_is_refused_with_advice(base, corpus, config, monkeypatch):
    monkeypatch.setattr(memory, "device_limit", lambda: (1000, "this toy"))
    with pytest.raises(RsgwmError, match=r"this toy 0 MB: the run does not fit; try .*--ignore-memory"):
        train(base, corpus, config())
    adapter = train(base, corpus, config(), memory=MemoryOptions(enforce=False))
    assert adapter.manifest["memory"]["estimate"] > 1000
    assert adapter.manifest["memory"]["process_peak"] > 1e6


def test_advice_when_it_is_tight(monkeypatch):
    monkeypatch.setattr(memory, "device_limit", lambda: (10**9, "this toy"))
    tight = MemoryEstimate(weights=6 * 10**8, adapter=0, moments=0, activations=3 * 10**8, logits=0)
    assert "a quantised base (4-bit)" in check_estimate(tight)
    roomy = MemoryEstimate(weights=10**8, adapter=0, moments=0, activations=0, logits=0)
    assert check_estimate(roomy).endswith("this toy 1000 MB")


def test_limits_reach_mlx(monkeypatch):
    seen = {}
    monkeypatch.setattr(mx, "set_cache_limit", lambda size: seen.update(cache=size))
    monkeypatch.setattr(mx, "set_wired_limit", lambda size: seen.update(wired=size))
    MemoryOptions(cache_limit=0.5, wired_limit=1.0).apply()
    assert seen["cache"] == 500_000_000
    assert ("wired" in seen) == mx.metal.is_available()
    with pytest.raises(RsgwmError, match="cache_limit = -1"):
        MemoryOptions(cache_limit=-1)


def test_what_is_in_use_is_told():
    assert set(memory_now()) == {"active", "cache", "peak", "process_peak"}
    assert "process peak" in memory_line()
    limit, source = memory.device_limit()
    assert limit > 1e8
    assert source
