"""Rounds that are stopped anywhere, or shared out among processes, end in the same bits as in one piece."""

import os
import random
import signal
import subprocess
import time

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.core import files
from mlx_rsgwm.merging import alternate
from mlx_rsgwm.merging.alternate import train_rounds
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.rounds import Rounds
from tests.merging.rounds_of_a_pool import NAMES, RSGWM, make_members, run, settings


@pytest.fixture
def members(tmp_path):
    return make_members(tmp_path)


# --- stopped anywhere ---------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """As a kill: nothing catches it."""


def bits(folder):
    """Digests of all that a pool of rounds leaves, but for times."""
    names = [f"{name}/{file}.safetensors" for name in NAMES for file in ("adapters", "importance", "directions")]
    digests = {name: files.sha256_file(folder / name) for name in names}
    for place in sorted((folder / "rounds").iterdir()):
        digests[place.name] = files.sha256_file(place / "merged/adapters.safetensors")
        digests[f"{place.name}/told"] = (place / "round.json").read_text()
    return digests


def stop_at(monkeypatch, event):
    """Stop before the ``event``-th write of a file or removal of a folder; counts them."""
    seen = [0]

    def counted(module, name):
        function = getattr(module, name)

        def call(*arguments, **options):
            seen[0] += 1
            if seen[0] == event:
                raise Stopped
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    counted(files, "write_json")
    counted(alternate.shutil, "rmtree")
    counted(os, "rename")
    counted(os, "replace")
    return seen


@pytest.mark.parametrize("mode", ["avg_product", "accumulate"])
def test_a_run_stopped_between_any_two_writes_ends_in_the_same_bits(base, members, tmp_path, monkeypatch, mode):
    config = settings(Rounds(2, mode), steps=2)
    with monkeypatch.context() as patch:
        seen = stop_at(patch, 0)
        run(base, members, config, tmp_path / "whole", every=0)
    expected = bits(tmp_path / "whole")
    events = [*sorted(random.Random(mode).sample(range(1, seen[0] + 1), 4)), seen[0]]
    for event in events:
        folder = tmp_path / f"stopped-{event}"
        with monkeypatch.context() as patch:
            stop_at(patch, event)
            with pytest.raises(Stopped):
                run(base, members, config, folder, every=0)
        run(base, members, config, folder, every=0)
        assert bits(folder) == expected, event


@pytest.mark.slow
def test_killed_again_and_again_a_pool_of_rounds_ends_in_the_same_bits(tiny_base, members, tmp_path):
    corpora = [part for name in NAMES for part in ("--corpus", tmp_path / "corpus" / name)]
    command = ["pool", "train", "--base", tiny_base, *corpora, "--rounds", 3, "--rank", 4, "--alpha", 8, "--epochs", 6,
               "--batch-size", 4, "--save-every", 1, "--directions", 4, "--resume"]  # fmt: skip
    started = time.monotonic()
    subprocess.run([*RSGWM, *[str(each) for each in (*command, "--out", tmp_path / "whole")]], check=True)
    whole = time.monotonic() - started
    rng, kills = random.Random(0), 0
    arguments = [str(each) for each in (*command, "--out", tmp_path / "killed")]
    for _ in range(60):
        child = subprocess.Popen([*RSGWM, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            child.wait(timeout=rng.uniform(0.25, 0.55) * whole)
            break
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            kills += 1
        time.sleep(0.1)
    assert child.returncode == 0
    assert kills >= 2
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")


def test_what_is_done_is_not_done_again_and_a_deleted_adapter_is(base, members, tmp_path):
    config = settings(Rounds(2), steps=2)
    first = run(base, members, config, tmp_path / "pool")
    before = bits(tmp_path / "pool")
    stamp = (tmp_path / "pool/rounds/round-01/merged/manifest.json").stat().st_mtime_ns
    for left in (".unfinished", ".lock"):  # by a kill after the last manifest
        (tmp_path / "pool/change" / left).touch()
    assert run(base, members, config, tmp_path / "pool") == first
    assert (tmp_path / "pool/rounds/round-01/merged/manifest.json").stat().st_mtime_ns == stamp
    assert not [*(tmp_path / "pool").rglob(".*")]
    (tmp_path / "pool/groups/manifest.json").unlink()
    assert run(base, members, config, tmp_path / "pool") == first
    assert bits(tmp_path / "pool") == before


# --- several processes --------------------------------------------------------------------------------------------


class Parties:
    """Processes without a common disk, taken one after the other in one process by threads that wait for each other."""

    def __init__(self, size):
        import threading

        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.held = [None] * size

    def of(self, rank):
        parties = self

        class Party:
            size, writes = parties.size, rank == 0

            def __init__(self):
                self.rank = rank

            def wait(self):
                parties.barrier.wait()

            def broadcast(self, content, owner):
                parties.held[rank] = content or b""
                parties.barrier.wait()
                told = parties.held[owner]
                parties.barrier.wait()
                return told

        return Party()


def test_parties_without_a_common_disk_see_their_own_rows_alone(base, members, tmp_path):
    """Two parties, each with its folder and its tasks' rows, end with the same pool as one process."""
    import threading

    config = settings(Rounds(2, method="regmean"), steps=2, dropout=0.0)
    run(base, members, config, tmp_path / "alone")
    bases = [base, load_base(str(base.path), dtype="float32")]
    parties, problems = Parties(2), []

    def take_part(rank):
        try:
            saving = Saving(tmp_path / f"party-{rank}", resume="continue", snapshots=())
            train_rounds(bases[rank], NAMES, members[rank::2], config, saving, processes=parties.of(rank))
        except BaseException as error:
            problems.append(error)
            parties.barrier.abort()

    # MLX's random stream is one for the whole process: without dropout nothing draws from it.
    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    expected = {name: files.sha256_file(tmp_path / "alone" / name / "adapters.safetensors") for name in NAMES}
    for rank in range(2):
        folder = tmp_path / f"party-{rank}"
        assert {n: files.sha256_file(folder / n / "adapters.safetensors") for n in NAMES} == expected


def test_launched_processes_share_a_pool_of_rounds(tiny_base, members, tmp_path, launch):
    corpora = [part for name in NAMES for part in ("--corpus", tmp_path / "corpus" / name)]
    command = ["pool", "train", "--base", tiny_base, *corpora, "--rounds", 2, "--steps", 2, "--rank", 4, "--alpha", 8,
               "--batch-size", 4, "--directions", 4]  # fmt: skip
    alone = CliRunner().invoke(rsgwm, [str(each) for each in (*command, "--out", tmp_path / "alone")])
    assert alone.exit_code == 0, alone.output
    told = launch(*command, "--out", tmp_path / "two")
    for name in NAMES:
        for file in ("adapters.safetensors", "directions.safetensors"):
            place = tmp_path / "two" / name / file
            assert place.is_file(), told[-3000:]
            assert files.sha256_file(tmp_path / "alone" / name / file) == files.sha256_file(place)
    assert told.count("own → merged") == 1
