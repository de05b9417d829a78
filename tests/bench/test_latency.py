"""The latency bench: that both sides do the same work, and that its numbers are what it says they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.bench import conditions, latency, outcome, sides, works
from mlx_rsgwm.bench.latency import LatencyConfig, interleave, measure_latency, rows_of_times, token_ids
from mlx_rsgwm.converters.parity.torch import apply_peft, load_torch_base
from mlx_rsgwm.converters.peft.convert import to_peft
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.base import load_base

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, byte_level):
    """A tiny random Llama saved by transformers, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=80,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    byte_level(folder)
    return folder


def small(base_folder, **changes):
    settings = {"prompt_tokens": 8, "new_tokens": 3, "trials": 3, "rank": 2, "dtype": "float32", "device": "cpu"}
    return LatencyConfig(base=str(base_folder), **{**settings, **changes})


@pytest.fixture(scope="module")
def result(base_folder):
    return measure_latency(small(base_folder))


def test_rows_hold_what_is_measured(result):
    assert [row["work"] for row in result["rows"]] == [
        "prefill 8 tokens",
        "decode 3 tokens",
        "prefill 8 tokens with adapter",
        "decode 3 tokens with adapter",
        "prefill 8 tokens fused",
        "decode 3 tokens fused",
        "train step 2 × 8 tokens",
        "merge 4 adapters, TIES",
        "draft–verify 3 × 3 tokens",
    ]
    for row in result["rows"]:
        assert set(row) == {"work", "mlx_ms", "torch_ms", "ratio", "iqr"}
        for side in ("mlx_ms", "torch_ms"):
            low, high = row["iqr"][side]
            assert 0 < low <= row[side] <= high
        assert row["ratio"] == pytest.approx(row["torch_ms"] / row["mlx_ms"], rel=0.01, abs=6e-4)  # of three decimals
    machine = result["machine"]
    assert (machine["dtype"], machine["torch_device"]) == ("float32", "cpu")
    assert {"mlx", "mlx-lm", "torch", "peft", "transformers"} <= machine["versions"].keys()
    assert result["conditions"]["before"]["load"] >= 0
    assert min(result["load_ms"].values()) > 0
    assert set(machine["torch_settings"]) == {"forward", "train", "merge", "loop", "lora", "fused"}
    for work, search in machine["torch_settings"].items():
        parts = 2 if work in ("forward", "lora", "fused") else 1
        assert len(search["chosen"]) == parts
        for part, setting in enumerate(search["chosen"]):  # the quickest of what was tried, for each part
            best = min(search["tried"], key=lambda tried, part=part: tried["ms"][part])
            assert {**setting, "ms": best["ms"]} == best
    assert [setting["batching"] for setting in machine["torch_settings"]["loop"]["tried"]] == list(works.BATCHINGS)
    assert "torch, loop: " in outcome.table(result)
    json.dumps(result, allow_nan=False)


class Echo:
    """A side that says what its process has."""

    def __init__(self, start: int) -> None:
        self.count = start
        self.facts = {"pid": os.getpid(), "environment": {name: os.environ.get(name) for name in sides.FOR_MLX}}

    def add(self, number: int) -> int:
        self.count += number
        return self.count

    def fail(self, error: type[BaseException]) -> None:
        raise error("on purpose")

    def die(self) -> None:
        os._exit(3)


def test_a_side_has_a_process_and_libraries_of_its_own(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    with sides.side_process("echo", Echo, 3) as own, sides.side_process("echo", Echo, 0, without_mlx=False) as shared:
        assert len({os.getpid(), own.facts["pid"], shared.facts["pid"]}) == 3
        assert set(own.facts["environment"].values()) == {None}
        assert shared.facts["environment"]["OPENBLAS_NUM_THREADS"] == "1"
        assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
        assert [own.call("add", 2), own.call("add", 2), shared.call("add", 1)] == [5, 7, 1]
        with pytest.raises(RsgwmError, match="on purpose"):
            own.call("fail", RsgwmError)
        assert own.call("add", 0) == 7
        with pytest.raises(RuntimeError, match="ZeroDivisionError: on purpose"):
            own.call("fail", ZeroDivisionError)
        with pytest.raises(RsgwmError, match="the process of echo died"):
            shared.call("die")


@pytest.mark.parametrize("batching", works.BATCHINGS)
def test_torch_drafts_alike_however_they_are_batched(base_folder, tmp_path, monkeypatch, batching):
    """Greedy drafts of every way of batching are the one draft of the plain loop."""
    base = load_base(str(base_folder), dtype="float32")
    model = load_torch_base(base.path, "cpu", "float32")
    adapter = latency.random_adapter(base, 2, 0)
    to_peft(adapter, "b", tmp_path / "peft")
    model = apply_peft(model, tmp_path / "peft", widen=False)
    model.load_adapter(str(tmp_path / "peft"), adapter_name="other")
    drafts = []
    generate = type(model).generate

    def greedy(self, **options):
        for name in ("temperature", "top_p", "top_k"):
            del options[name]
        drafts.append(generate(self, **{**options, "do_sample": False}))
        return drafts[-1]

    monkeypatch.setattr(type(model), "generate", greedy)
    question = latency.question_of(base.tokenizer, 8)
    works.torch_loop(model, "cpu", base.tokenizer, question, 3, 4, ["default", "other"], batching)()
    rows = [row.tolist() for draft in drafts for row in draft]
    assert len(rows) == 3
    prompt = works.TEMPLATES["plain"].draft_prompt(base.tokenizer, question)
    model.set_adapter("default")
    alone = generate(model, input_ids=torch.tensor([prompt]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert rows == [alone[0].tolist()] * 3


def test_works_can_be_chosen(base_folder):
    found = measure_latency(small(base_folder, works="merge,train", trials=1, warmup=0))["rows"]
    assert [row["work"].split()[0] for row in found] == ["train", "merge"]


def test_both_sides_take_the_same_training_step(base_folder):
    """The losses of the second step agree, so forward, backward and Adam were the same work."""
    config = small(base_folder)
    base = load_base(config.base, dtype="float32")
    theirs = load_torch_base(base.path, "cpu", "float32")
    rows = works.training_rows(320, 2, 8, 0)
    losses = {"mlx": [], "torch": []}
    spec = LoraSpec(2, 2.0, 0.0, ("self_attn.q_proj",), -1)
    with works.mlx_training(base, rows, spec, 3) as trial:
        held = [cell.cell_contents for cell in trial.__closure__]
        run = next(value for value in held if isinstance(value, works.TrainingRun))
        from mlx_rsgwm.converters.peft.convert import to_peft
        from mlx_rsgwm.training.layers import trainable

        to_peft(Adapter(spec, trainable(base.model)), "b", base.path / "peft")
        for _ in range(3):
            trial()
        losses["mlx"] = [step.loss for step in run.history]
    theirs = apply_peft(theirs, base.path / "peft", widen=False)
    forward = type(theirs).forward

    def watched(*arguments, **options):
        output = forward(*arguments, **options)
        losses["torch"].append(output.loss.item())
        return output

    theirs.forward = watched.__get__(theirs)
    trial = works.torch_training(theirs, "cpu", rows)
    for _ in range(3):
        trial()
    assert losses["mlx"] == pytest.approx(losses["torch"], abs=1e-4)
    assert losses["mlx"][2] < losses["mlx"][0]


def test_both_sides_see_the_same_tokens_and_fill_the_cache_alike(base_folder, monkeypatch):
    """The caches after a trial hold the same keys: every token was fed, in order, at its position, on both sides."""
    config = small(base_folder)
    base = load_base(config.base, dtype="float32")
    prompt, forced = token_ids(config, 320)
    caches = {}

    from mlx_lm.models import cache as mlx_cache

    make = mlx_cache.make_prompt_cache
    monkeypatch.setattr(mlx_cache, "make_prompt_cache", lambda model: caches.setdefault("mlx", make(model)))
    works.mlx_forward(base.model, prompt, forced)()

    real = transformers.DynamicCache
    monkeypatch.setattr(transformers, "DynamicCache", lambda: caches.setdefault("torch", real()))
    model, parts = load_torch_base(base.path, "cpu", "float32"), []
    works.torch_forward(model, "cpu", prompt, forced, parts.append)()
    assert parts == [0, 1]

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
    prefill, decode = rows_of_times(("prefill", "decode"), mlx, theirs)
    assert (prefill["mlx_ms"], prefill["iqr"]["mlx_ms"], prefill["ratio"]) == (3.0, [2.0, 4.0], 2.0)
    assert (decode["ratio"], decode["torch_ms"]) == (0.5, 5.0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompt_tokens": 1}, "prompt_tokens must be at least 2"),
        ({"trials": 0, "new_tokens": 0}, "new_tokens must be at least 1, found 0; trials must be at least 1"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"works": "forward,dance"}, "works must be some of forward, lora"),
        ({"works": " "}, "works must be some of"),
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
    for extra, expected in (([], result["rows"]), (["--json"], result)):
        done = CliRunner().invoke(rsgwm, ["bench", "latency", "--base", "b", "--trials", "2", "--seed", "7", *extra])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout.splitlines()[-1]) == expected
    assert seen == [LatencyConfig(base="b", trials=2, seed=7)] * 2
    script = Path(__file__).parents[2] / "bench" / "latency.py"
    failed = subprocess.run([sys.executable, str(script), "--trials", "0"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.strip() == "error: bench latency: trials must be at least 1, found 0"


def test_a_result_is_written_and_compared(result, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from mlx_rsgwm.cli.main import rsgwm

    before = tmp_path / "new" / "before.json"
    assert outcome.save_outcome(result, before) == [before.with_suffix(end) for end in (".md", ".png", ".json")]
    assert before.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = before.with_suffix(".md").read_text()
    assert all(f"| {row['work']} |" in text for row in result["rows"])
    assert "MLX is slower" in text or all(row["ratio"] >= 1 for row in result["rows"])

    faster = json.loads(json.dumps(result))
    row = faster["rows"][0]
    row["mlx_ms"], row["iqr"]["mlx_ms"] = row["mlx_ms"] / 1000, [value / 1000 for value in row["iqr"]["mlx_ms"]]
    del faster["rows"][1]
    after = tmp_path / "after.json"
    outcome.save_outcome(faster, after)
    done = CliRunner().invoke(rsgwm, ["bench", "compare", str(before), str(after), "--json"])
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["rows"][0]["ratio"], found["rows"][0]["differs"]) == (pytest.approx(1000, rel=1e-2), True)
    assert (found["rows"][1]["ratio"], found["rows"][1]["differs"]) == (1.0, False)
    assert (found["only_before"], found["only_after"]) == (["decode 3 tokens"], [])
    assert "within the spread" in done.stderr

    faster["machine"]["dtype"] = "bfloat16"
    outcome.save_outcome(faster, after)
    refused = CliRunner().invoke(rsgwm, ["bench", "compare", str(before), str(after)])
    assert refused.exit_code == 2
    assert "dtype is 'bfloat16' there, 'float32' here" in refused.stderr
    assert CliRunner().invoke(rsgwm, ["bench", "compare", str(before), str(after), "--anyway"]).exit_code == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{}", "is not a result"),
        ('{"format": "mlx-rsgwm/bench-latency"}', "rows is missing; machine is missing"),
        ('{"format": "mlx-rsgwm/bench-latency", "rows": [{}], "machine": {}, "config": {}}', "row that is damaged"),
        ('{"format": "mlx-rsgwm/bench-latency", "rows": [3], "machine": {}, "config": {}}', "row that is damaged"),
    ],
)
def test_other_files_are_no_results(tmp_path, content, expected):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(RsgwmError, match=expected):
        outcome.load_outcome(path)
    with pytest.raises(RsgwmError, match=r"ends in \.json"):
        outcome.save_outcome({}, tmp_path / "a.txt")


def test_remarks_say_where_mlx_loses_and_what_varied():
    row = {
        "work": "a",
        "mlx_ms": 10.0,
        "torch_ms": 8.0,
        "ratio": 0.8,
        "iqr": {"mlx_ms": [9.9, 10.1], "torch_ms": [7, 9]},
    }
    assert outcome.remark(row) == "MLX is slower; unsteady: torch"
    assert outcome.remark({**row, "ratio": 1.2, "iqr": {"mlx_ms": [10, 10], "torch_ms": [8, 8]}}) == ""


def test_power_and_heat_are_read_from_what_the_system_prints(tmp_path):
    batt = "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t87%; discharging; 5:12 remaining\n"
    assert conditions.power_in(batt) == "battery"
    assert conditions.power_in(batt.replace("Battery Power", "AC Power")) == "mains"
    assert conditions.power_in("") is None
    assert conditions.low_power_in("Battery Power:\n lowpowermode         1\n") is True
    assert conditions.low_power_in("AC Power:\n sleep 1\n") is None
    quiet = "Note: No thermal warning level has been recorded\nNote: No performance warning level has been recorded\n"
    assert conditions.thermal_in(quiet) == "nominal"
    assert conditions.thermal_in("CPU_Scheduler_Limit = 100\nCPU_Speed_Limit = 64\n") == "limited to 64 %"
    assert conditions.linux_conditions(tmp_path) == {"power": None, "low_power_mode": None, "thermal": None}
    for name, value in (
        ("class/power_supply/AC/online", "0"),
        ("devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", "3"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(f"{value}\n")
    found = conditions.linux_conditions(tmp_path)
    assert (found["power"], found["thermal"]) == ("battery", "throttled 3 times since start")
