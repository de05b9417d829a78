"""Checkpoints of three programs' runs with their losses, and what cannot be averaged."""

import json
import math
import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.training.average_weights import AverageOptions
from mlx_rsgwm.training.averaging import average, warnings_of, weigh
from mlx_rsgwm.training.checkpoints import Saving, checkpoint_folders
from mlx_rsgwm.training.loop import finish, train
from mlx_rsgwm.training.run_checkpoints import run_checkpoints
from tests.training.averaged_runs import invoke, numbers, reference_weights


def mlx_lm_run(run, folder):
    """The same checkpoints as mlx_lm.lora leaves them."""
    folder.mkdir()
    shutil.copy(run / "adapter_config.json", folder)
    shutil.copy(run / "adapters.safetensors", folder)
    for path in checkpoint_folders(run):
        step = int(path.name.removeprefix("step-"))
        shutil.copy(path / "adapters.safetensors", folder / f"{step:07d}_adapters.safetensors")
    return folder


LOGS = {
    "new": "\x1b[1m  iter   train_loss     tok/s     tokens\x1b[0m\n     1    val 2.900    1.20s\n"
    + "".join(f"     {n}    \x1b[32m{3 - n / 10:.3f} ▼\x1b[0m    1,234    10.0k\n" for n in range(1, 15)),
    "former": "Starting training..., iters: 14\nIter 1: Val loss 2.900, Val took 1.2s\n"
    + "".join(f"Iter {n}: Train loss {3 - n / 10:.3f}, Learning Rate 1.000e-05\n" for n in range(1, 15)),
}


@pytest.mark.parametrize("form", LOGS)
def test_numbered_files_of_mlx_lm_are_averaged_by_steps_or_a_log(run, tmp_path, form):
    folder = mlx_lm_run(run, tmp_path / "mlx-lm")
    (tmp_path / "train.log").write_text(LOGS[form])
    by_steps = average(folder, metric="steps")
    mine = average(run, metric="steps")
    for name, value in mine.weights.items():
        assert (value == by_steps.weights[name]).all().item()
    told = average(folder, log=tmp_path / "train.log", power=2.0).manifest["average"]
    windows = [3 - (n - 0.5) / 10 for n in range(2, 15, 2)]  # the mean of both lines since the checkpoint before
    assert [row["train_loss"] for row in told["checkpoints"]] == pytest.approx(windows)
    assert [row["weight"] for row in told["checkpoints"]] == pytest.approx(reference_weights(windows, 0.7, 2.0))


def test_an_mlx_lm_log_with_validation_at_every_checkpoint_weighs_by_it(run, tmp_path):
    folder = mlx_lm_run(run, tmp_path / "mlx-lm")
    (tmp_path / "train.log").write_text("".join(f"  {n}    val {1 + n / 100:.3f}    1.20s\n" for n in range(2, 15, 2)))
    told = average(folder, log=tmp_path / "train.log").manifest["average"]
    assert told["metric"] == "validation-loss"
    assert [row["validation_loss"] for row in told["checkpoints"]] == pytest.approx(
        [1 + n / 100 for n in range(2, 15, 2)]
    )


def test_checkpoints_of_a_peft_trainer_are_averaged_by_its_log(run, tiny_base, tmp_path):
    from mlx_rsgwm.converters.peft.convert import to_peft

    history = [{"step": n, "loss": 3 - n / 10, "learning_rate": 1e-4} for n in range(1, 15)]
    for path in checkpoint_folders(run):
        step = int(path.name.removeprefix("step-"))
        out = tmp_path / "trainer" / f"checkpoint-{step}"
        to_peft(Adapter.load(path), str(tiny_base), out)
        (out / "trainer_state.json").write_text(json.dumps({"log_history": [r for r in history if r["step"] <= step]}))
    averaged = average(tmp_path / "trainer", base=str(tiny_base))
    told = averaged.manifest["average"]
    windows = [3 - (n - 0.5) / 10 for n in range(2, 15, 2)]
    assert [row["train_loss"] for row in told["checkpoints"]] == pytest.approx(windows)
    arrays, _ = numbers(run)
    weights = reference_weights(windows, 0.7, 1.0)
    for name, value in averaged.weights.items():
        expected = sum(w * each[name] for w, each in zip(weights, arrays, strict=True))
        np.testing.assert_allclose(np.array(value), expected, rtol=1e-5, atol=1e-7)


def damage(run, name, value):
    path = checkpoint_folders(run)[1] / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["record"][name] = value
    path.write_text(json.dumps(manifest))


def test_runs_that_cannot_be_averaged_are_refused_in_a_line(run, base, corpus, config, tmp_path):
    other = Saving(tmp_path / "other", every=4, keep=9, snapshots=())
    finish(train(base, corpus, config(epochs=2, learning_rate=2e-2), saving=other), other)
    mixed = (run / "checkpoints/step-000002", tmp_path / "other/checkpoints/step-000004")
    (tmp_path / "single").mkdir()
    shutil.copy(run / "adapter_config.json", tmp_path / "single")
    shutil.copy(run / "adapters.safetensors", tmp_path / "single/0000100_adapters.safetensors")
    log = tmp_path / "empty.log"
    log.write_text("nothing\n")
    cases = {
        "different runs (config.": mixed,
        "holds 1 checkpoint;": (tmp_path / "single",),
        "holds no checkpoints;": (tmp_path / "corpus",),
        "is no checkpoint;": (run / "checkpoints/step-000002", tmp_path / "single"),
        "is an adapter, no checkpoint": (run, run / "checkpoints/step-000002"),
        "is no folder of a run": (log,),
        "two checkpoints are of step 2": (run / "checkpoints/step-000002",) * 2,
        "--log is for the numbered files": (run, "--log", log),
        "has no line of losses": (mlx_lm_run(run, tmp_path / "mlx-lm"), "--log", log),
        "there is steps: weigh by metric steps": (tmp_path / "mlx-lm",),
        "step-000002 is a single checkpoint; name the run's folder": (run / "checkpoints/step-000002",),
        "0000004_adapters.safetensors is a single checkpoint": (tmp_path / "mlx-lm/0000004_adapters.safetensors",),
        "--base is for --choose": (run, "--base", base.path),
    }
    for message, sources in cases.items():
        done = invoke("average", *sources, "--out", tmp_path / "out")
        assert done.exit_code == 2, (message, done.output)
        assert message in done.stderr, (message, done.stderr)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "0.5", True])
def test_a_loss_that_is_none_is_refused_with_its_checkpoint(run, tmp_path, value):
    damage(run, "train_loss_window", value)
    done = invoke("average", run, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "step-000012" in done.stderr
    assert not (tmp_path / "out").exists()


def test_of_a_run_with_such_a_loss_the_steps_weigh(run, tmp_path):
    damage(run, "train_loss_window", math.nan)
    assert average(run, metric="steps").manifest["average"]["effective"] > 2


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("side", ["Train", "Val"])
def test_such_a_loss_in_a_log_is_refused_with_its_step(run, tmp_path, side, value):
    folder = mlx_lm_run(run, tmp_path / "mlx-lm")
    lines = [f"Iter {n}: {side} loss {value if n == 6 else 1.5}, rest" for n in range(2, 15, 2)]
    (tmp_path / "train.log").write_text("\n".join(lines))
    with pytest.raises(RsgwmError, match=f"the log, step 6: the .*loss is {value}, no finite number from 0"):
        average(folder, log=tmp_path / "train.log")
    assert average(folder, log=tmp_path / "train.log", metric="steps").weights


@pytest.mark.parametrize("text", ["1.2.3", "...", "12x", "-1"])
def test_what_is_no_number_in_a_log_is_no_loss(run, tmp_path, text):
    folder = mlx_lm_run(run, tmp_path / "mlx-lm")
    (tmp_path / "train.log").write_text(f"Iter 2: Train loss {text}, rest\n  2   val {text}   1.2s\n")
    with pytest.raises(RsgwmError, match="no line of losses"):
        average(folder, log=tmp_path / "train.log")


def test_the_window_of_the_first_checkpoint_that_is_left_is_as_long_as_the_next(run, tmp_path):
    """Early ones may have been removed, as transformers' Trainer does; and a list's windows are those of its run."""
    folder = mlx_lm_run(run, tmp_path / "mlx-lm")
    (tmp_path / "train.log").write_text(LOGS["former"])
    for step in (2, 4):
        (folder / f"{step:07d}_adapters.safetensors").unlink()
    windows = [3 - (n - 0.5) / 10 for n in range(6, 15, 2)]
    taken = run_checkpoints([folder], tmp_path / "train.log")
    assert [each.train_loss for each in taken] == pytest.approx(windows)
    listed = run_checkpoints([taken[0].path, taken[3].path], tmp_path / "train.log")
    assert [each.train_loss for each in listed] == pytest.approx([windows[0], windows[3]])


def test_validation_losses_that_others_lack_are_told(run):
    damage(run, "validation_loss", 1.5)
    checkpoints = run_checkpoints([run])
    [told] = warnings_of(weigh(checkpoints, AverageOptions(penalty=0.9)))
    assert told.startswith("1 of 7 checkpoints have a validation loss and the others none")
    assert warnings_of(weigh(checkpoints, AverageOptions("train-loss", 0.9))) == []


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
    path = checkpoint_folders(run)[0] / "adapters.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(bytes(data))
    done = invoke("average", run, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "was changed or damaged" in done.stderr


@pytest.mark.parametrize("inside", [False, True])
def test_a_runs_folder_of_checkpoints_is_the_run(run, monkeypatch, inside):
    if inside:
        monkeypatch.chdir(run / "checkpoints")
    of_run, of_folder = average(run), average("." if inside else run / "checkpoints")
    assert of_folder.content_hash() == of_run.content_hash()
    assert of_folder.manifest["average"]["checkpoints"] == of_run.manifest["average"]["checkpoints"]


def test_what_of_a_run_is_not_finished_is_told(run, tmp_path):
    (run / "checkpoints/step-000004/manifest.json").unlink()
    (run / "manifest.json").unlink()
    done = invoke("average", run, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "step-000004 was not written to its end, and is left out" in done.stderr
    assert "the run is not finished; its newest checkpoint is of step 14" in done.stderr


@pytest.mark.parametrize("space", ["factor", "product"])
@pytest.mark.parametrize(("factor", "message"), [(1e30, "products leave float32"), (math.nan, "0000004_adapters")])
def test_values_that_no_mean_can_have_are_refused_before_anything_is_written(run, tmp_path, space, factor, message):
    folder = mlx_lm_run(run, tmp_path / "mlx-lm")
    broken = folder / "0000004_adapters.safetensors"
    mx.save_safetensors(str(broken), {name: value * factor for name, value in mx.load(str(broken)).items()})
    done = invoke("average", folder, "--metric", "steps", "--space", space, "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    [told] = [line for line in done.stderr.splitlines() if not line.startswith("average: ")]  # progress
    assert message in told
    assert not (tmp_path / "out").exists()
