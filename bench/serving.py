"""Serving: `rsgwm serve` beside `mlx_lm.server` on one base with one adapter, in turns; and what only the first can do.

    python bench/serving.py --pool runs/demo/pool [--pair runs/demo] [--base smollm2-135m] [--clients 1,4,16,32]
        [--tokens 32] [--requests 2] [--trials 2] [--out results.json]

Both servers run from the beginning to the end; the one that is not measured has nothing to do. A client is a thread
that sends ``--requests`` completions one after another, streams of exactly ``--tokens`` greedy tokens (the end of text
is biased away) after prompts of about 60, all different. For every number of clients the servers take turns,
``--trials`` times after one round that warms up.

- ``throughput_ratio``: tokens a second, this project's over mlx-lm's, by number of clients; medians of the trials.
- ``ttft_p95_ratio``: the 95th percentile of the time to the first text at the largest number of clients, this
  project's over mlx-lm's.
- ``mixed_over_single``: tokens a second at 16 clients whose requests are for four adapters of the pool in turn, over
  that of such requests for one. mlx_lm.server would load the base anew for each change.
- ``switch_ms``: what a request for another adapter than the one before takes longer to its first text, one client.
- ``verified_ratio``: with ``--pair``, verified answers a minute at 16 clients over those of one client.

The last line is JSON: these figures.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.models.base import resolve_base
from mlx_rsgwm.models.base_folder import fingerprint_of

MANY = 16  # clients, where this project is compared with itself
START = 600.0  # seconds until a server must answer
WORDS = "Tell a story of a lighthouse keeper, a gull and a storm that came from the north, in plain words, number"

Body = dict[str, Any]
Told = tuple[float, float, int]  # seconds to the first text and to the last, tokens


class Server:
    """A server on a port of this machine, and how it is asked."""

    def __init__(self, command: Sequence[str], port: int) -> None:
        self.command, self.port = command, port

    @contextmanager
    def running(self) -> Iterator[Server]:
        """The server, from its first answer on."""
        process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until = time.monotonic() + START
            while not self._answers():
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{' '.join(self.command)} does not answer")
                time.sleep(0.2)
            yield self
        finally:
            process.kill()
            process.wait()

    def _answers(self) -> bool:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", "/v1/models")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def ask(self, path: str, body: Body) -> Told:
        """One request; the times are this client's."""
        started = time.perf_counter()
        response = self._sent(path, json.dumps(body))
        if response.status != 200:
            raise SystemExit(f"{path} of port {self.port}: {response.status} {response.read()[:500]!r}")
        if not body.get("stream"):
            answer = json.loads(response.read())
            seconds = time.perf_counter() - started
            return seconds, seconds, answer["usage"]["completion_tokens"]
        first, tokens = None, 0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if first is None and any(choice.get("text") for choice in chunk.get("choices", ())):
                first = time.perf_counter() - started
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        return first or 0.0, time.perf_counter() - started, tokens

    def _sent(self, path: str, body: str) -> http.client.HTTPResponse:
        """The response to a request; Python's own server, mlx-lm's, lets five connections wait and resets others."""
        for _ in range(100):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START)
            try:
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                return connection.getresponse()
            except ConnectionError:
                time.sleep(0.02)
        raise SystemExit(f"port {self.port} takes no connection")

    def load(self, path: str, bodies: Sequence[Body], clients: int) -> tuple[list[Told], float]:
        """All requests by so many clients at a time, and the seconds that took."""
        queue: SimpleQueue[Body] = SimpleQueue()
        for body in bodies:
            queue.put(body)
        told: list[Told] = []
        failed: list[BaseException] = []

        def client() -> None:
            try:
                while True:
                    told.append(self.ask(path, queue.get_nowait()))
            except Empty:
                return
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=client) for _ in range(clients)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return told, time.perf_counter() - started


def requests(models: Sequence[str], count: int, tokens: int, end_ids: Sequence[int], seed: int) -> list[Body]:
    """Completions for models in turn; no two prompts of a run begin alike, so that nothing is known before."""
    return [
        {
            "model": models[number % len(models)],
            "prompt": f"{seed}.{number} {WORDS} {number}: " * 2,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": {str(token): -100 for token in end_ids},
        }
        for number in range(count)
    ]


def speed(told: Sequence[Told], seconds: float, tokens: int) -> float:
    """Tokens a second; every answer must have all of them, or the sides did different work."""
    short = [each[2] for each in told if each[2] != tokens]
    if short:
        raise SystemExit(f"answers of {short[:5]} tokens where {tokens} were asked for")
    return tokens * len(told) / seconds


def compare(
    sides: dict[str, tuple[Server, str]], options: argparse.Namespace, end_ids: Sequence[int]
) -> dict[str, Any]:
    """Tokens a second and times to the first text of both sides, by number of clients."""
    results: dict[str, Any] = {}
    for clients in options.clients:
        rows: dict[str, dict[str, list[float]]] = {name: {"speeds": [], "firsts": []} for name in sides}
        for trial in range(options.trials + 1):
            for name, (server, model) in sides.items():
                seed = 1000 * clients + trial
                bodies = requests([model], clients * options.requests, options.tokens, end_ids, seed)
                told, seconds = server.load("/v1/completions", bodies, clients)
                if trial:
                    rows[name]["speeds"].append(speed(told, seconds, options.tokens))
                    rows[name]["firsts"] += [each[0] for each in told]
        results[str(clients)] = {
            name: {
                "tokens_per_second": statistics.median(row["speeds"]),
                "ttft_p95": sorted(row["firsts"])[int(0.95 * (len(row["firsts"]) - 1))],
            }
            for name, row in rows.items()
        }
        print(f"{clients} clients: {json.dumps(results[str(clients)])}", flush=True)
    return results


def mixed(server: Server, names: Sequence[str], options: argparse.Namespace, end_ids: Sequence[int]) -> float:
    """Tokens a second over adapters in turn by that of one adapter, median of the trials, in turns."""
    shares = []
    for trial in range(options.trials):
        speeds = []
        for models in (names, names[:1]):
            bodies = requests(models, MANY * options.requests, options.tokens, end_ids, 7000 + 10 * trial + len(models))
            speeds.append(speed(*server.load("/v1/completions", bodies, MANY), options.tokens))
        shares.append(speeds[0] / speeds[1])
    return statistics.median(shares)


def switch(server: Server, names: Sequence[str], end_ids: Sequence[int]) -> float:
    """Milliseconds by which a first text is later after a change of adapter, one request at a time."""
    firsts: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(12):
        model = names[pair % len(names)]
        for changed, body in zip((True, False), requests([model], 2, 2, end_ids, 9000 + pair), strict=True):
            firsts[changed].append(server.ask("/v1/completions", body)[0])
    return 1000 * (statistics.median(firsts[True]) - statistics.median(firsts[False]))


def verified(server: Server, options: argparse.Namespace) -> float:
    """Verified answers a minute of many clients over those of one."""
    questions = [question.question for question in generate("change", 4 * MANY, 3, "test")]
    asked = [
        {"model": "pair", "messages": [{"role": "user", "content": text}], "seed": 1, "max_completion_tokens": 64}
        for text in questions
    ]
    _, alone = server.load("/v1/chat/completions", asked[:8], 1)
    _, together = server.load("/v1/chat/completions", asked[8:], MANY)
    return (len(asked[8:]) / together) / (8 / alone)


def parsed() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--pair", type=Path)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--clients", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 16, 32])
    for name, default in (("tokens", 32), ("requests", 2), ("trials", 2), ("port", 18080)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def ratios(compared: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Tokens a second by number of clients, and times to the first text at ``most`` of them, over mlx-lm's."""
    throughput = {
        clients: row["rsgwm"]["tokens_per_second"] / row["mlx_lm"]["tokens_per_second"]
        for clients, row in compared.items()
    }
    at_most = compared[str(most)]
    return {
        "throughput_ratio": throughput,
        "ttft_p95_ratio": at_most["rsgwm"]["ttft_p95"] / at_most["mlx_lm"]["ttft_p95"],
    }


def main() -> None:
    """Start both servers, measure in turns, print."""
    options = parsed()
    folder = resolve_base(options.base)
    adapters = sorted(path for path in options.pool.iterdir() if (path / "adapters.safetensors").is_file())[:4]
    names = [path.name for path in adapters]
    ends = json.loads((folder / "config.json").read_text())["eos_token_id"]
    end_ids = ends if isinstance(ends, list) else [ends]
    pair = [f"--verified=pair={options.pair / 'drafter'}+{options.pair / 'verifier'}"] if options.pair else []
    main_of = (sys.executable, "-m", "mlx_rsgwm", "serve", "--base", options.base, "--port", str(options.port))
    server = Server([*main_of, "--queue", "256", *pair, *(f"--adapter={path}" for path in adapters)], options.port)
    peer = (sys.executable, "-m", "mlx_lm", "server", "--model", str(folder), "--adapter-path", str(adapters[0]))
    peer_server = Server([*peer, "--port", str(options.port + 1)], options.port + 1)
    with server.running():
        with peer_server.running():
            compared = compare(
                {"rsgwm": (server, names[0]), "mlx_lm": (peer_server, "default_model")}, options, end_ids
            )
        shown: dict[str, Any] = {
            **ratios(compared, options.clients[-1]),
            "mixed_over_single": mixed(server, names, options, end_ids),
            "switch_ms": switch(server, names, end_ids),
            **({"verified_ratio": verified(server, options)} if options.pair else {}),
        }
    about = {
        "base": options.base,
        "fingerprint": fingerprint_of(folder),
        "tokens": options.tokens,
        "cores": os.cpu_count(),
    }
    give_result({**shown, "compared": compared, **about, "versions": versions()}, options.out, shown)


if __name__ == "__main__":
    main()
