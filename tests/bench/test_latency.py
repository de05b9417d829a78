"""The latency bench: that both sides do the same work, and that its numbers are what it says they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.base import load_base
from mlx_rsgwm.bench import latency
from mlx_rsgwm.bench.latency import LatencyConfig, interleave, measure_latency, summarise, token_ids
from mlx_rsgwm.errors import RsgwmError

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A tiny random Llama saved by transformers, with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=80,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    return folder


def small(base_folder, **changes):
    settings = {"prompt_tokens": 8, "new_tokens": 3, "trials": 3, "rank": 2, "dtype": "float32", "device": "cpu"}
    return LatencyConfig(base=str(base_folder), **{**settings, **changes})


@pytest.fixture(scope="module")
def result(base_folder):
    return measure_latency(small(base_folder))


def test_rows_hold_what_is_promised(result):
    assert [row["work"] for row in result["rows"]] == [
        "prefill 8 tokens",
        "decode 3 tokens",
        "prefill 8 tokens with adapter",
        "decode 3 tokens with adapter",
    ]
    for row in result["rows"]:
        assert set(row) == {"work", "adapter", "mlx_ms", "torch_ms", "ratio", "iqr"}
        for side in ("mlx_ms", "torch_ms"):
            low, high = row["iqr"][side]
            assert 0 < low <= row[side] <= high
        assert row["ratio"] == pytest.approx(row["torch_ms"] / row["mlx_ms"], rel=0.01)
    machine = result["machine"]
    assert (machine["dtype"], machine["torch_device"]) == ("float32", "cpu")
    assert {"mlx", "mlx-lm", "torch", "peft", "transformers"} <= machine["versions"].keys()
    json.dumps(result, allow_nan=False)


def test_both_sides_see_the_same_tokens_and_fill_the_cache_alike(base_folder, monkeypatch):
    """The caches after a trial hold the same keys: every token was fed, in order, at its position, on both sides."""
    config = small(base_folder)
    base = load_base(config.base, dtype="float32")
    prompt, forced = token_ids(config, 96)
    caches = {}

    from mlx_lm.models import cache as mlx_cache

    make = mlx_cache.make_prompt_cache
    monkeypatch.setattr(mlx_cache, "make_prompt_cache", lambda model: caches.setdefault("mlx", make(model)))
    latency.mlx_trial(base.model, prompt, forced)()

    real = transformers.DynamicCache
    monkeypatch.setattr(transformers, "DynamicCache", lambda: caches.setdefault("torch", real()))
    latency.torch_trial(latency.load_torch_base(base.path, "cpu", "float32"), "cpu", prompt, forced)()

    for ours, theirs in zip(caches["mlx"], caches["torch"].layers, strict=True):
        assert ours.offset == theirs.keys.shape[2] == config.prompt_tokens + config.new_tokens
        keys = np.array(ours.keys)[:, :, : ours.offset]  # MLX's buffer is longer than what is in it
        assert np.abs(keys - theirs.keys.numpy()).max() < 1e-4


def test_the_adapter_changes_what_is_timed(base_folder):
    config = small(base_folder)
    base = load_base(config.base, dtype="float32")
    adapter = latency.random_adapter(base, 2, 0)
    assert len(adapter.modules()) == 2 * 4
    assert all(mx.abs(value).max().item() > 0 for value in adapter.weights.values())
    again = latency.random_adapter(base, 2, 0)
    assert all(mx.array_equal(value, again.weights[name]) for name, value in adapter.weights.items())


def test_a_given_adapter_is_used_in_the_dtype_of_the_base(base_folder, tmp_path):
    base = load_base(str(base_folder), dtype="bfloat16")
    folder = latency.random_adapter(base, 3, 1).save(tmp_path / "adapter")
    used = latency.bench_adapter(base, small(base_folder, adapter=str(folder)), "bfloat16")
    assert used.spec.rank == 3
    assert {value.dtype for value in used.weights.values()} == {mx.bfloat16}


def test_trials_take_turns_and_the_warm_up_does_not_count():
    calls, advanced = [], []

    def side(name, values):
        source = iter(values)

        def trial():
            calls.append(name)
            return next(source), 1.0

        return trial

    config = LatencyConfig(trials=3, warmup=1)
    times = interleave(side("mlx", [99, 1, 2, 3]), side("torch", [99, 4, 5, 6]), config, lambda: advanced.append(1))
    assert calls == ["mlx", "torch", "torch", "mlx", "mlx", "torch", "torch", "mlx"]
    assert times == ([(1, 1.0), (2, 1.0), (3, 1.0)], [(4, 1.0), (5, 1.0), (6, 1.0)])
    assert len(advanced) == 4


def test_medians_quartiles_and_ratio():
    mlx = [(1.0, 10.0), (2.0, 10.0), (3.0, 10.0), (4.0, 10.0), (100.0, 10.0)]
    theirs = [(6.0, 5.0)] * 5
    prefill, decode = summarise("", False, LatencyConfig(), mlx, theirs)
    assert (prefill["mlx_ms"], prefill["iqr"]["mlx_ms"], prefill["ratio"]) == (3.0, [2.0, 4.0], 2.0)
    assert (decode["ratio"], decode["torch_ms"]) == (0.5, 5.0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompt_tokens": 1}, "prompt_tokens must be at least 2"),
        ({"trials": 0, "new_tokens": 0}, "new_tokens must be at least 1, found 0; trials must be at least 1"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"adapter": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_bad_settings_are_one_line(base_folder, changes, expected):
    with pytest.raises(RsgwmError, match=expected):
        measure_latency(small(base_folder, **changes))


@pytest.mark.parametrize(
    ("preload", "expected"), [("", "a slow BLAS"), ("/usr/lib/libopenblas.so.0", "other programs keep the processor")]
)
def test_a_slow_machine_is_said_in_one_line(monkeypatch, preload, expected):
    monkeypatch.setattr(latency.mx, "default_device", lambda: mx.Device(mx.cpu, 0))
    monkeypatch.setenv("LD_PRELOAD", preload)
    monkeypatch.setattr(latency, "matmul_gflops", lambda: 4.0)
    (line,) = latency.slow_machine()
    assert "4 GFLOP/s" in line
    assert expected in line
    assert "\n" not in line
    monkeypatch.setattr(latency, "matmul_gflops", lambda: 180.0)
    assert list(latency.slow_machine()) == []


def test_the_script_and_the_command_end_with_json(base_folder, monkeypatch, result):
    from click.testing import CliRunner

    from mlx_rsgwm.cli.main import rsgwm

    seen = []
    monkeypatch.setattr(latency, "measure_latency", lambda config, progress: seen.append(config) or result)
    for extra in ([], ["--json"]):
        done = CliRunner().invoke(rsgwm, ["bench", "latency", "--base", "b", "--trials", "2", "--seed", "7", *extra])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout.splitlines()[-1]) == result
    assert seen == [LatencyConfig(base="b", trials=2, seed=7)] * 2
    script = Path(__file__).parents[2] / "bench" / "latency.py"
    failed = subprocess.run([sys.executable, str(script), "--trials", "0"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.strip() == "error: bench latency: trials must be at least 1, found 0"
