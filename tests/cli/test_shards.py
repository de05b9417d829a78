"""``mlx.launch`` with two local processes: a sweep and an evaluation are those of one process, also after one died."""

import json
import os
import signal
import subprocess
import time

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm


def invoke(*arguments):
    found = CliRunner().invoke(rsgwm, [str(argument) for argument in arguments])
    assert found.exit_code == 0, found.output + str(found.stderr)


def records(folder):
    """The items without what a clock said."""
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    for line in lines:
        del line["latency_ms"]
        for draft in line["drafts"]:
            del draft["latency_ms"]
    return lines


def arguments_of_eval(pool, tiny_base):
    return (
        "eval", "--base", tiny_base, "--drafter", pool[0], "--verifier", pool[1], "--task", "change", "--items", 12,
        "--threshold", "0.02", "--score", "mean_logprob", "--max-tokens", 5, "--timed", 1, "--batch-rows", 6,
        "--sampling-seeds", 2,
    )  # fmt: skip


def test_two_processes_evaluate_as_one(launch, pool, tiny_base, tmp_path):
    run = arguments_of_eval(pool, tiny_base)
    invoke(*run, "--out", tmp_path / "one")
    told = launch(*run, "--out", tmp_path / "two")
    assert (tmp_path / "two" / "report.html").is_file(), told
    assert told.count("report:") == 1
    assert records(tmp_path / "one") == records(tmp_path / "two")
    own, other = ((tmp_path / "two" / name).read_text().splitlines() for name in ("journal.jsonl", "journal.1.jsonl"))
    assert sum('"item"' in line for line in own) == sum('"item"' in line for line in other) == 12
    # One process goes on where two were, and asks no more.
    (tmp_path / "two" / "report.html").unlink()
    invoke(*run, "--out", tmp_path / "two")
    assert (tmp_path / "two" / "report.html").is_file()
    assert [(tmp_path / "two" / "journal.1.jsonl").read_text().splitlines()] == [other]


def test_several_processes_need_a_folder(launch, pool, tiny_base):
    told = launch(*arguments_of_eval(pool, tiny_base))
    assert told.count("under mlx.launch give --out") == 2


def test_two_processes_sweep_as_one(launch, pool, tiny_base, tmp_path):
    run = (
        "pool",
        "sweep",
        *pool,
        "--base",
        tiny_base,
        "--items",
        2,
        "--max-tokens",
        3,
        "--methods",
        "linear,slerp,ties",
    )
    invoke(*run, "--out", tmp_path / "one")
    told = launch(*run, "--out", tmp_path / "two")
    assert (tmp_path / "two" / "sweep.json").is_file(), told
    measured = [{p.name: p.read_text() for p in (tmp_path / n / "measured").iterdir()} for n in ("one", "two")]
    assert measured[0] == measured[1]
    assert (tmp_path / "one" / "sweep.json").read_text() == (tmp_path / "two" / "sweep.json").read_text()


def test_two_processes_measure_outcomes_as_one(launch, pool, tiny_base, tmp_path):
    run = (
        "probe", "outcomes", *pool, "--base", tiny_base, "--methods", "linear,ties,norm_equalised", "--data", "change",
        "--data", "change", "--data-rows", 8,
    )  # fmt: skip
    invoke(*run, "--out", tmp_path / "one.jsonl")
    told = launch(*run, "--out", tmp_path / "two.jsonl", "--json")
    assert sum(line.startswith("{") for line in told.splitlines()) == 1, told
    shards = [(tmp_path / name).read_text().splitlines() for name in ("two.jsonl", "two.1.jsonl")]
    assert [len(rows) > 1 for rows in shards] == [True, True]
    assert sorted({*shards[0], *shards[1]}) == sorted((tmp_path / "one.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_a_process_that_dies_is_told_and_its_share_is_done_again(launch, start_two, pool, tiny_base, tmp_path):
    run = arguments_of_eval(pool, tiny_base)
    invoke(*run, "--out", tmp_path / "one")
    with start_two(*run, "--out", tmp_path / "two") as launched:
        shard = tmp_path / "two" / "journal.1.jsonl"
        deadline = time.time() + 120
        while not (shard.is_file() and '"item"' in shard.read_text()) and time.time() < deadline:
            time.sleep(0.02)
        found = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True, check=True)
        os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
        told, _ = launched.communicate(timeout=120)
    assert not (tmp_path / "two" / "report.html").exists(), told
    assert "exited with code -9" in told
    assert "Traceback" not in told
    told = launch(*run, "--out", tmp_path / "two")
    assert (tmp_path / "two" / "report.html").is_file(), told
    assert records(tmp_path / "one") == records(tmp_path / "two")
