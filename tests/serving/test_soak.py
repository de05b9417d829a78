"""Minutes of mixed load by locust on loopback: no request is lost, and memory stays flat. By `make soak`."""

import csv
import json
import os
import statistics
import subprocess
import threading

import httpx
import pytest

from tests.serving.program import serving
from tests.serving.test_clients import HERE, python_with, run

MINUTES = float(os.environ.get("RSGWM_SOAK_MINUTES", 0))
CLIENTS = 12
MOST_GROWTH = 0.05  # of resident memory from the middle fifth of the time, when caches are full, to the last


def resident(process):
    """Bytes of memory that a process has."""
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(process.pid)])) << 10


@pytest.mark.slow
@pytest.mark.skipif(not MINUTES, reason="takes minutes: make soak")
def test_no_request_is_lost_and_memory_stays_flat(adapters, tiny_base, tmp_path):
    python = python_with("locust", "locust>=2.40")
    names = ("--base", tiny_base, "--adapter", adapters / "sums", "--adapter", adapters / "words")
    both = f"{adapters / 'judged'}+{adapters / 'sums'}"
    pair = ("--verified", f"checked={both}", "--verified", f"chains={both},drafts=mixed")
    over, sizes = threading.Event(), []
    with serving(*names, *pair, "--adapter-dir", adapters, "--memory-limit", "0.1") as (process, address):

        def watch():
            while not over.wait(1.0):
                sizes.append(resident(process))

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            load = ["--users", CLIENTS, "--spawn-rate", CLIENTS, "--run-time", f"{round(MINUTES * 60)}s"]
            told = ["--headless", "--only-summary", "--stop-timeout", "60", "--csv", tmp_path / "soak"]
            command = [python, "-m", "locust", "-f", HERE / "locustfile.py", "--host", address]
            run([*command, *load, *told], seconds=MINUTES * 60 + 200)
        finally:
            over.set()
            watching.join()
        metrics = httpx.get(f"{address}/metrics").text
        assert all(f"rsgwm_{name} 0.0" in metrics for name in ("rows", "running", "waiting"))
    with open(tmp_path / "soak_stats.csv", newline="", encoding="utf-8") as file:
        total = {row["Name"]: row for row in csv.DictReader(file)}["Aggregated"]
    fifth = len(sizes) // 5
    before, after = statistics.median(sizes[2 * fifth : 3 * fifth]), statistics.median(sizes[-fifth:])
    figures = {
        "minutes": MINUTES,
        "clients": CLIENTS,
        "requests": int(total["Request Count"]),
        "lost": int(total["Failure Count"]),
        "resident_mb": [round(before / 1e6), round(after / 1e6)],
    }
    print(json.dumps(figures))
    assert figures["lost"] == 0
    assert figures["requests"] > 60 * MINUTES
    assert after <= before * (1 + MOST_GROWTH)
