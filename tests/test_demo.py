"""The demo on the real 135M model, held to what the README says of it. Slow: some minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def run(*arguments, timeout=1500):
    command = [str(Path(sys.executable).with_name("rsgwm")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo's folder and summary; ``RSGWM_DEMO`` names a finished run to save the minutes."""
    out = Path(os.environ.get("RSGWM_DEMO") or tmp_path_factory.mktemp("demo") / "run")
    done = run("demo", "--out", out, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    return out, json.loads(done.stdout.splitlines()[-1])


def test_the_demo_does_what_readme_says(demo):
    _, summary = demo
    assert summary["drafter"]["accuracy"]["value"] >= 0.40
    for family, rates in summary["by_task"].items():
        assert rates["drafter"]["value"] > 0, family
    assert summary["verifier_auroc"]["value"] >= 0.75
    assert summary["draft_verify"]["accuracy"]["value"] >= summary["drafter"]["accuracy"]["value"]
    assert summary["oracle"]["any_of_k"]["value"] >= summary["draft_verify"]["accuracy"]["value"]
    assert summary["parity"]["max_abs_logit"] <= 1e-3
    assert {"mean_logprob", "yesno"} <= set(summary["verifier"])
    assert {"mean_logprob", "yesno"} <= set(summary["calibration"]["perturbed_auroc"])


def test_a_second_run_resumes_in_seconds(demo):
    out, first = demo
    again = run("demo", "--out", out, "--json")
    summary = json.loads(again.stdout.splitlines()[-1])
    assert summary["executed"] == []
    assert summary["seconds"] < 20
    assert summary["draft_verify"] == first["draft_verify"]


def test_real_gsm8k_items(demo, data_folder):
    out, _ = demo
    found = run(
        "eval", "--base", "smollm2-135m", "--drafter", out / "drafter", "--verifier", out / "verifier",
        "--task", "gsm8k", "--questions", data_folder, "--items", "6", "--timed", "2", "--max-tokens", "64", "--json",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["accuracy"]["n"] == 6
    assert result["average_latency_ms"] > 0


def test_mlx_lm_accepts_the_drafter(demo):
    out, _ = demo
    base = json.loads(run("base", "pull", "smollm2-135m", "--json").stdout.splitlines()[-1])["folder"]
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", base, "--adapter-path", str(out / "drafter"),
               "--prompt", "Q: Ada has 12 pens and gets 7 more. How many pens does Ada have now?\nA:",
               "--ignore-chat-template", "--max-tokens", "24", "--temp", "0"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "####" in done.stdout
