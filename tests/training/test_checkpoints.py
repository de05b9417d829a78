"""Stopping and going on: a continued run ends in the same bits, and refuses to be another run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.quantisation import QuantFormat
from mlx_rsgwm.training.checkpoints import Saving, checkpoint_folders, claim_adapter_folder, clear_run, read_checkpoint
from mlx_rsgwm.training.loop import finish, train

RESULT = tuple(f"{name}.safetensors" for name in ("adapters", "importance", "directions", "prompt_states", "init"))


class Stop(Progress):
    """Sends this process a signal (or raises) once a run has taken ``after`` steps."""

    def __init__(self, after, act):
        self.after, self.act, self.messages = after, act, []

    def message(self, text):
        self.messages.append(text)

    def task(self, label, total):
        from contextlib import contextmanager

        done = 0

        @contextmanager
        def opened():
            def advance(units, note):
                nonlocal done
                done += units
                if done == self.after:
                    self.act()

            yield advance

        return opened()


def send(number):
    return lambda: os.kill(os.getpid(), number)


def digests(folder):
    return {name: files.sha256_file(folder / name) for name in RESULT}


def told(folder):
    """What the manifest says of the course of the run."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return {name: manifest[name] for name in ("history", "validation", "kept_step", "held_out_loss", "tokens")}


def complete(base, corpus, config, saving, progress=None, held_out=None):
    adapter = train(base, corpus, config, held_out, saving=saving, progress=progress or Progress())
    finish(adapter, saving)
    return saving.folder


SETTINGS = [
    {"dropout": 0.1, "epochs": 2, "directions": 8},
    {"fine_tune_type": "dora", "dropout": 0.1, "num_layers": 1},
    {
        "optimizer": "adamw", "weight_decay": 0.1, "clip": 0.5, "accumulate": 2, "batch_size": 2, "epochs": 2,
        "validate_every": 3, "select": "best", "schedule": "cosine", "recompute": True, "dropout": 0.1,
    },
    {"qat": QuantFormat(3, 32), "dropout": 0.1, "epochs": 2, "recompute": True},
]  # fmt: skip


@pytest.mark.parametrize("changes", SETTINGS, ids=["lora", "dora", "everything", "qat"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_and_resumed_is_bit_equal(base, corpus, config, tmp_path, changes, number):
    settings = config(learning_rate=1e-2, **changes)
    held = corpus if settings.validate_every else None
    whole = complete(base, corpus, settings, Saving(tmp_path / "whole", every=2), held_out=held)
    folder = tmp_path / "cut"
    for after in (1, 4, 5):
        saving = Saving(folder, every=2, resume="continue")
        with pytest.raises(KeyboardInterrupt):
            train(base, corpus, settings, held, saving=saving, progress=Stop(after, send(number)))
        assert checkpoint_folders(folder)[0].name == f"step-{after:06d}"
        assert not (folder / "manifest.json").exists()
        mx.random.seed(after)  # the stream of a new process is elsewhere
    complete(base, corpus, settings, Saving(folder, every=2, resume="continue"), held_out=held)
    assert digests(folder) == digests(whole)
    assert told(folder) == told(whole)
    for path in (whole / "snapshots").rglob("*.safetensors"):
        assert files.sha256_file(path) == files.sha256_file(folder / path.relative_to(whole))


def test_handlers_come_back(base, corpus, config, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(base, corpus, config(), saving=Saving(tmp_path / "a"), progress=Stop(1, send(signal.SIGINT)))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_checkpoints_are_adapters_with_losses_and_old_ones_go(base, corpus, config, tmp_path):
    saving = Saving(tmp_path / "a", every=2, keep=3)
    with pytest.raises(KeyboardInterrupt):
        train(
            base,
            corpus,
            config(epochs=2, validate_every=4),
            corpus,
            saving=saving,
            progress=Stop(13, send(signal.SIGINT)),
        )
    kept = checkpoint_folders(saving.folder)
    assert [path.name for path in kept] == ["step-000013", "step-000012", "step-000010"]
    assert [(path / "state.safetensors").exists() for path in kept] == [True, True, False]
    manifests = [json.loads((path / "manifest.json").read_text()) for path in kept]
    assert manifests[1]["record"]["validation_loss"] == manifests[1]["record"]["scores"][-1]["loss"]
    assert manifests[2]["record"]["validation_loss"] > 0  # not a step that is scored otherwise
    assert manifests[2]["record"]["scores"][-1]["step"] == 8
    assert manifests[0]["record"]["validation_loss"] is None  # interrupted
    history = manifests[0]["record"]["history"]
    window = history[10:12]
    expected = sum(loss * tokens for _, _, loss, tokens in window) / sum(tokens for *_, tokens in window)
    assert manifests[1]["record"]["train_loss_window"] == pytest.approx(expected)
    loaded = Adapter.load(kept[2])
    assert loaded.base_fingerprint == base.fingerprint
    adapter = train(
        base, corpus, config(epochs=2, validate_every=4), corpus, saving=Saving(tmp_path / "a", 2, 3, "continue")
    )
    finish(adapter, saving)
    assert [path.name for path in checkpoint_folders(saving.folder)] == ["step-000014", "step-000013", "step-000012"]
    assert not list(saving.folder.rglob("state.safetensors"))
    last = Adapter.load(checkpoint_folders(saving.folder)[0])
    for name, value in adapter.weights.items():
        assert mx.array_equal(last.weights[name], value).item()


@pytest.fixture
def unfinished(base, corpus, config, tmp_path):
    """A folder with checkpoints after steps 2, 4 and 5."""
    folder = tmp_path / "unfinished"
    with pytest.raises(KeyboardInterrupt):
        train(base, corpus, config(), saving=Saving(folder, every=2), progress=Stop(5, send(signal.SIGINT)))
    return folder


def test_resume_names_what_changed(base, corpus, config, unfinished, tmp_path):
    with pytest.raises(RsgwmError, match=r"unfinished run \(step-000005\); continue it with --resume"):
        train(base, corpus, config(), saving=Saving(unfinished))
    again = Saving(unfinished, resume="continue")
    with pytest.raises(RsgwmError, match=r"config\.learning_rate is 0\.001 now, was 0\.0005"):
        train(base, corpus, config(learning_rate=1e-3), saving=again)
    with pytest.raises(RsgwmError, match=r"config\.rank is 2 now, was 4; config\.alpha is 4\.0 now"):
        train(base, corpus, config(rank=2, alpha=4.0), saving=again)
    from mlx_rsgwm.data.corpus import save_corpus

    fewer = save_corpus(tmp_path / "fewer", corpus.rows[:-1], corpus.template, {})
    with pytest.raises(RsgwmError, match=r"cannot resume .*: data is '"):
        train(base, fewer, config(), saving=again)
    with pytest.raises(RsgwmError, match=r"held_out is '.* now, was None"):
        train(base, corpus, config(), corpus, saving=again)
    assert len(checkpoint_folders(unfinished)) == 3
    adapter = train(base, corpus, config(learning_rate=1e-3), saving=Saving(unfinished, resume="replace"))
    assert len(adapter.manifest["history"]) == 7


@pytest.mark.parametrize("damage", ["cut", "record lacks an entry", "record has no JSON number"])
def test_damaged_checkpoint_falls_back_to_the_one_before(base, corpus, config, unfinished, tmp_path, damage):
    whole = complete(base, corpus, config(), Saving(tmp_path / "whole"))
    newest = unfinished / "checkpoints" / "step-000005"
    if damage == "cut":
        data = (newest / "state.safetensors").read_bytes()
        (newest / "state.safetensors").write_bytes(data[:-7])
    else:
        manifest = json.loads((newest / "manifest.json").read_text())
        if damage == "record lacks an entry":
            del manifest["record"]["history"]
        else:
            manifest["record"]["seconds"] = float("nan")
        (newest / "manifest.json").write_text(json.dumps(manifest))
    (unfinished / "checkpoints" / ".step-000006.1.tmp").mkdir()
    progress = Stop(-1, None)
    complete(base, corpus, config(), Saving(unfinished, every=2, resume="continue"), progress)
    assert any("damaged; trying an older" in text for text in progress.messages)
    assert any("continuing after step 4 of 7" in text for text in progress.messages)
    assert digests(unfinished) == digests(whole)
    assert not list((unfinished / "checkpoints").glob(".step*"))


def test_all_damaged_is_an_error(unfinished, base, corpus, config):
    for path in checkpoint_folders(unfinished):
        (path / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(RsgwmError, match=r"can be resumed \(damaged: step-000005, step-000004, step-000002\)"):
        train(base, corpus, config(), saving=Saving(unfinished, resume="continue"))


def test_nan_names_step_and_rows_and_keeps_checkpoints(base, corpus, config, tmp_path):
    weight = base.model.model.norm.weight
    folder = tmp_path / "nan"

    def poison():
        base.model.model.norm.weight = weight * float("nan")

    with pytest.raises(RsgwmError, match=r"the loss is nan at step 6 \(\w+ batch of rows change-train-\S+") as caught:
        train(base, corpus, config(), saving=Saving(folder, every=2), progress=Stop(5, poison))
    assert "checkpoints of earlier steps are kept" in str(caught.value)
    assert [path.name for path in checkpoint_folders(folder)] == ["step-000004", "step-000002"]
    base.model.model.norm.weight = weight
    saved = Adapter.load(checkpoint_folders(folder)[0])
    assert all(np.isfinite(np.array(value)).all() for value in saved.weights.values())


def test_weights_that_are_not_finite_are_not_saved(base, corpus, config, tmp_path):
    model = base.model

    def poison():
        layer = model.layers[0].self_attn.q_proj
        layer.lora_a = layer.lora_a * float("inf")
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RsgwmError, match="no longer finite after step 3; older checkpoints are kept"):
        train(base, corpus, config(), saving=Saving(tmp_path / "a", every=2), progress=Stop(3, poison))
    assert [path.name for path in checkpoint_folders(tmp_path / "a")] == ["step-000002"]


def test_full_disk_keeps_the_last_checkpoint(base, corpus, config, tmp_path, monkeypatch):
    def fill():
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))

    with pytest.raises(RsgwmError, match="not enough disk space"):
        train(base, corpus, config(), saving=Saving(tmp_path / "a", every=2), progress=Stop(3, fill))
    assert [path.name for path in checkpoint_folders(tmp_path / "a")] == ["step-000002"]


@pytest.mark.parametrize("values", [{"every": -1}, {"keep": 0}, {"resume": "maybe"}, {"snapshots": (0.0,)}])
def test_bad_saving(values, tmp_path):
    with pytest.raises(RsgwmError, match="is out of range"):
        Saving(tmp_path, **values)


def test_nothing_to_resume_starts_at_the_beginning(tmp_path):
    assert read_checkpoint(Saving(tmp_path, resume="continue"), {}, Progress()) is None


def test_reading_removes_nothing(base, corpus, config, tmp_path):
    """Another run's checkpoints go when that is asked for, by what starts the new one, not by what looks at them."""
    saving = Saving(tmp_path / "a", every=2, resume="replace")
    with pytest.raises(KeyboardInterrupt):
        train(base, corpus, config(), saving=saving, progress=Stop(3, send(signal.SIGINT)))
    before = sorted(path for path in saving.folder.rglob("*"))
    assert read_checkpoint(saving, {"config": "another"}, Progress()) is None
    assert sorted(path for path in saving.folder.rglob("*")) == before
    clear_run(saving.folder)
    assert not checkpoint_folders(saving.folder)


CHILD = """
import sys
from pathlib import Path
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.data.corpus import load_corpus
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.loop import finish, train
base, corpus, out = sys.argv[1:]
config = TrainConfig(rank=4, alpha=8.0, keys=("self_attn.q_proj", "self_attn.v_proj"), batch_size=4, epochs=40,
                     learning_rate=1e-2, dropout=0.1, validate_every=20, select="best")
data = load_corpus(Path(corpus))
saving = Saving(Path(out), every=7, resume="continue")
model = load_base(base, "float32")
print("ready", flush=True)
finish(train(model, data, config, data, saving=saving), saving)
"""


@pytest.mark.slow
def test_killed_at_random_moments(tiny_base, corpus, tmp_path):
    """kill -9 at no fewer than ten moments, wherever they fall; the end is byte for byte that of one piece."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)

    def start(out):
        command = [sys.executable, str(script), str(tiny_base), str(tmp_path / "corpus"), str(out)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "ready\n"
        return child

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    child = start(whole)
    started = time.monotonic()
    assert child.wait() == 0
    length = time.monotonic() - started
    rng = random.Random(4)
    kills, newest = 0, 0
    while kills < 12:
        child = start(cut)
        time.sleep(rng.uniform(0.0, 0.2) * length)
        child.send_signal(signal.SIGKILL)
        child.wait()
        found = checkpoint_folders(cut)
        step = int(found[0].name.removeprefix("step-")) if found else 0
        assert step >= newest, "a kill lost a checkpoint that was there before"
        newest = step
        if (cut / "manifest.json").exists():  # it was through before the signal came: begin again, this kill is none
            shutil.rmtree(cut)
            newest = 0
        else:
            kills += 1
    assert start(cut).wait() == 0
    assert digests(cut) == digests(whole)
    assert told(cut) == told(whole)


def test_paths_are_folders(tmp_path):
    assert checkpoint_folders(Path(tmp_path)) == []


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_of_another_program_is_not_written_over(tmp_path, name):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / name).write_text("theirs")
    with pytest.raises(RsgwmError, match=f"holds {name} of another program"), claim_adapter_folder(folder):
        raise AssertionError
    assert [path.name for path in folder.iterdir()] == [name]


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ("config.json", "holds a base model"),
        ("model-00001-of-00002.safetensors", "holds a base model"),
        ("change/adapters.safetensors", r"is a folder of adapters \(change is there\)"),
        ("change/adapter_model.safetensors", "is a folder of adapters"),
        ("change/checkpoints/step-000002", "is a folder of adapters"),
        (
            "checkpoints/step-000002",
            r"an unfinished training \(checkpoints/step-000002\); finish it",
        ),
        ("snapshots/step-000002", "unfinished training"),
    ],
)
def test_what_an_adapter_would_spoil_is_not_written_into(tmp_path, held, reason):
    folder = tmp_path / "out"
    (folder / held).parent.mkdir(parents=True)
    (folder / held).touch()
    for trains in (False, True):
        if trains and "unfinished" in reason:
            with claim_adapter_folder(folder, trains=True):
                continue
        with pytest.raises(RsgwmError, match=reason), claim_adapter_folder(folder, trains):
            raise AssertionError
    assert (folder / held).exists()


def test_a_folder_of_something_else_is_not_cleared(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": "mlx-rsgwm/corpus"}')
    (tmp_path / "checkpoints" / "notes").mkdir(parents=True)
    with pytest.raises(RsgwmError, match=r"else than an adapter \(mlx-rsgwm/corpus\)"), claim_adapter_folder(tmp_path):
        raise AssertionError
    assert (tmp_path / "checkpoints" / "notes").is_dir()
