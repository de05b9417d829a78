"""`rsgwm serve` as a program: OpenAI's own client against it, clients that leave, signals, and what it refuses."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from tests.browser import SCREENS, keep_screenshot, opened, show
from tests.serving.program import SECONDS, serving

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
ENDLESS = {"prompt": "go on", "max_tokens": 490, "logit_bias": {"0": -100}, "stream": True}


@pytest.fixture(scope="module")
def server(adapters, tiny_base):
    """A server of the base and two adapters, of which one is named anew."""
    with serving(
        "--base", tiny_base, "--adapter", adapters / "sums", "--adapter", f"w={adapters / 'words'}"
    ) as running:
        yield running


@pytest.fixture
def client(server):
    """OpenAI's client of it."""
    return openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)


def idle(address):
    text = httpx.get(f"{address}/metrics").text
    return all(f"rsgwm_{name} 0.0" in text for name in ("rows", "running", "waiting"))


def wait_until(true):
    until = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_openais_client_lists_chats_completes_and_streams(client, tiny_base):
    names = [model.id for model in client.models.list()]
    assert names == [str(tiny_base), "sums", "w"]
    assert client.models.retrieve("sums").x_rsgwm["kind"] == "adapter"
    asked = {"messages": QUESTION, "max_completion_tokens": 8, "seed": 3, "temperature": 0.7}
    texts = {}
    for name in names:
        answer = client.chat.completions.create(model=name, n=2, **asked)
        texts[name] = [choice.message.content for choice in answer.choices]
        assert answer.usage.completion_tokens <= 16
        stream = client.chat.completions.create(
            model=name, n=2, stream=True, stream_options={"include_usage": True}, **asked
        )
        parts, usage = ["", ""], None
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                parts[choice.index] += choice.delta.content or ""
        assert parts == texts[name]
        assert usage == answer.usage
    assert len({tuple(pair) for pair in texts.values()}) == 3
    told = client.chat.completions.create(model="sums", logprobs=True, top_logprobs=2, **asked).choices[0].logprobs
    assert all(len(token.top_logprobs) == 2 for token in told.content)
    text = client.completions.create(model="w", prompt="Name a number.", max_tokens=5, temperature=0).choices[0].text
    parts = client.completions.create(model="w", prompt="Name a number.", max_tokens=5, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == text


def test_with_nothing_named_the_demos_pair_is_served(adapters, tiny_base, tmp_path):
    for role in ("drafter", "verifier"):
        shutil.copytree(adapters / "judged", tmp_path / "runs" / "demo" / role)
    with serving(cwd=tmp_path) as (_, address):
        models = httpx.get(f"{address}/v1/models").json()["data"]
        assert [(model["id"], model["x_rsgwm"]["kind"]) for model in models] == [
            (str(tiny_base), "base"),
            ("demo", "verified"),
        ]


def test_openais_client_understands_refusals(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="nobody", messages=QUESTION)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model="sums", messages=QUESTION, reasoning_effort="low")
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "reasoning_effort")
    with pytest.raises(openai.BadRequestError, match="beyond the context"):
        client.completions.create(model="sums", prompt="x" * 600)


def test_clients_that_leave_free_their_rows(server):
    _, address = server
    wait_until(lambda: idle(address))
    with httpx.stream("POST", f"{address}/v1/completions", json={**ENDLESS, "model": "sums"}) as response:
        next(response.iter_lines())  # and away, in the middle of a stream
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/completions", json={**ENDLESS, "model": "w", "n": 2, "stream": False}, timeout=0.3)
    wait_until(lambda: idle(address))
    assert "rsgwm_engine_cancelled_total 0.0" not in httpx.get(f"{address}/metrics").text


def test_a_connection_that_was_idle_is_used_again(server):
    """For longer than uvicorn keeps it by itself, which is as long as httpx does."""
    connection = http.client.HTTPConnection(server[1].removeprefix("http://"), timeout=SECONDS)
    for pause in (6, 0):
        connection.request("GET", "/ready")
        connection.getresponse().read()
        sock = connection.sock
        time.sleep(pause)
    assert connection.sock is sock


@pytest.mark.parametrize("sent", [b"no request\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"])
def test_what_is_no_http_is_refused_as_everything_else(server, sent):
    place = httpx.URL(server[1])
    with socket.create_connection((place.host, place.port), timeout=SECONDS) as connection:
        connection.sendall(sent)
        response = http.client.HTTPResponse(connection)
        response.begin()
        told = json.loads(response.read())["error"]
    assert (response.status, told["type"], told["code"]) == (400, "invalid_request_error", "invalid_http")


def test_told_to_stop_it_ends_what_is_under_way(adapters, tiny_base):
    with (
        serving("--base", tiny_base, "--adapter", adapters / "sums") as (process, address),
        httpx.stream(
            "POST", f"{address}/v1/completions", json={**ENDLESS, "model": "sums"}, timeout=SECONDS
        ) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert process.wait(SECONDS) == 0
        assert "Traceback" not in process.stderr.read()


def test_an_answer_that_takes_too_long_is_cut_when_it_stops(adapters, tiny_base):
    with (
        serving("--base", tiny_base, "--adapter", adapters / "sums", "--drain", "0") as (process, address),
        httpx.stream(
            "POST", f"{address}/v1/completions", json={**ENDLESS, "model": "sums"}, timeout=SECONDS
        ) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(httpx.RemoteProtocolError):
            list(lines)
        assert process.wait(SECONDS) == 0


def test_keys_are_read_from_files(adapters, tiny_base, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# who may ask\nfirst-key\nsecond-key\n")
    with serving("--base", tiny_base, "--api-key-file", keys) as (_, address):
        assert httpx.get(f"{address}/v1/models").status_code == 401
        listed = openai.OpenAI(base_url=f"{address}/v1", api_key="second-key", max_retries=0).models.list()
        assert [model.id for model in listed] == [str(tiny_base)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines; give --api-key-file"),
        (["--host", "::"], "can be reached from other machines"),
        (["--host", "example.org"], "can be reached from other machines"),
        (["--cors-origin", "*"], "every page on the web"),
        (["--adapter-dir", "nowhere"], "is not a folder"),
        (["--adapter", "nowhere"], "adapter folder nowhere does not exist"),
        (["--adapter", "a=x", "--adapter", "a=y"], "two adapters are named a"),
        (["--api-key-file", "nowhere"], "nowhere"),
        (["--base", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_served_exits_with_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(rsgwm, ["serve", "--port", "0", *arguments])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize("text", ["", "# nothing\n", "short\n", "two words\n", "schlüssel-mit-umlaut\n"])
def test_keys_that_are_none_exit_with_2(text, tmp_path):
    (tmp_path / "keys").write_text(text)
    result = CliRunner().invoke(rsgwm, ["serve", "--port", "0", "--api-key-file", str(tmp_path / "keys")])
    assert result.exit_code == 2, result.output


def test_a_port_that_is_taken_exits_with_2(server, tiny_base):
    port = server[1].rpartition(":")[2]
    result = CliRunner().invoke(rsgwm, ["serve", "--base", str(tiny_base), "--port", port])
    assert result.exit_code == 2
    assert f"127.0.0.1:{port} cannot be taken" in result.output


def test_without_the_extra_it_says_what_to_install(tiny_base, monkeypatch):
    for name in ("uvicorn", "mlx_rsgwm.serving.opening"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(rsgwm, ["serve", "--base", str(tiny_base)])
    assert result.exit_code == 2
    assert "uvicorn is not installed; pip install 'mlx-rsgwm[serve]'" in result.output


DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
EXAMPLES = re.findall(r"<!-- run against a server -->\n\n```(\w+)\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)


def test_the_examples_of_the_documentation_run(adapters, tiny_base):
    """As they stand, but for the port."""
    names = (
        "--base",
        tiny_base,
        "--adapter",
        adapters / "sums",
        "--adapter",
        adapters / "words",
        "--adapter-dir",
        adapters,
    )
    pair = ("--verified", f"checked={adapters / 'judged'}+{adapters / 'judged'}")
    assert [kind for kind, _ in EXAMPLES] == ["bash", "python", "bash", "bash", "bash"]
    with serving(*names, *pair) as (_, address):
        for kind, text in EXAMPLES:
            command = [sys.executable, "-c"] if kind == "python" else ["bash", "-ec"]
            lines = text.replace("http://127.0.0.1:8080", address).replace("curl ", "curl --fail-with-body -sS ")
            done = subprocess.run([*command, lines], capture_output=True, text=True, timeout=SECONDS)
            assert done.returncode == 0, (text, done.stdout, done.stderr)
            assert done.stdout.strip()
            if kind == "python":
                assert "'checked'" in done.stdout
                assert re.search(r"^(True|False)$", done.stdout, re.M)


DRAFTS = "[...document.querySelectorAll('#drafts article .verdict')].map(verdict => verdict.textContent)"
FITS = "document.documentElement.scrollWidth <= window.innerWidth"


def test_the_page_asks_and_shows_drafts_and_verdicts(browser, adapters, tiny_base):
    pair = ("--verified", f"checked={adapters / 'judged'}+{adapters / 'judged'}")
    with serving("--base", tiny_base, "--adapter", adapters / "sums", *pair) as (_, address):
        assert "default-src 'none'" in httpx.get(f"{address}/").headers["content-security-policy"]
        session, evaluate = opened(browser, f"{address}/", "document.querySelectorAll('#model option').length === 3")
        assert evaluate("document.querySelector('#model').value") == "checked"
        assert evaluate("document.querySelector('#threshold').placeholder") == "0.700"
        evaluate("document.querySelector('#threshold').value = 0.90971839")
        assert evaluate("document.querySelector('#ask').checkValidity()")  # as calibrated pairs have it
        evaluate("document.querySelector('#threshold').value = 1; document.querySelector('#go').click()")
        wait_until(lambda: evaluate("!!document.querySelector('#answer article')"))
        verdicts = evaluate(DRAFTS)
        assert len(verdicts) == 3
        assert all(re.fullmatch(r"not accepted · 0\.\d{3}", verdict) for verdict in verdicts)
        assert "not accepted after 3" in evaluate("document.querySelector('#answer').textContent")
        for width, scheme in SCREENS:
            show(browser, session, width, scheme)
            assert evaluate(FITS), (width, scheme)
            if keep := os.environ.get("RSGWM_SCREENSHOTS"):
                keep_screenshot(browser, session, Path(keep) / f"serving-{width}-{scheme}.png")
        evaluate("document.querySelector('#model').value = 'sums'; document.querySelector('#go').click()")
        wait_until(lambda: evaluate("document.querySelectorAll('#drafts article').length === 1"))
        wait_until(lambda: evaluate("document.querySelector('#stop').disabled"))
        evaluate("document.querySelector('#question').value = 'x'.repeat(600); document.querySelector('#go').click()")
        wait_until(lambda: "beyond the context" in evaluate("document.querySelector('#answer').textContent"))
        asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
        errors = [e for e in browser.events if e["method"] == "Runtime.exceptionThrown"]
    assert all(url.startswith(address) for url in asked)
    assert not errors
