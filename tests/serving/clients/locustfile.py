"""Mixed load for locust: all that is served, streams that are left, what must be refused, adapters that change.

A request counts as failed where its status or its answer is not what it must be.
"""

import itertools
import json
import random

from locust import HttpUser, between, task

MODELS = ("sums", "words")
NUMBERS = itertools.count()
DRAWN = random.Random(0)
ANSWER = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}


def question():
    """A chat's messages: mostly new, of one to three turns that begin alike."""
    turns = [{"role": "user", "content": f"What is {DRAWN.randint(1, 99)} + {DRAWN.randint(1, 99)}?"}]
    for _ in range(DRAWN.randint(0, 2)):
        turns += [{"role": "assistant", "content": "I think so."}, {"role": "user", "content": "Are you sure?"}]
    return turns


class Client(HttpUser):
    """One who asks, one request after another."""

    wait_time = between(0, 0.2)

    def asked(self, path, body, name, status=200, right=lambda answer: True):
        """The answer to a request; it fails where it is not right."""
        with self.client.post(path, json=body, name=name, catch_response=True) as response:
            answer = response.json() if response.status_code else {}
            if response.status_code == status and right(answer):
                response.success()
            else:
                response.failure(f"{response.status_code}: {str(answer)[:300]}")
        return answer

    def chat(self, name, model=None, **more):
        """A chat of up to 40 tokens."""
        body = {
            "model": model or DRAWN.choice(MODELS),
            "messages": question(),
            "max_tokens": DRAWN.randint(1, 40),
            **more,
        }
        return self.asked(
            "/v1/chat/completions", body, name, right=lambda answer: len(answer["choices"]) == more.get("n", 1)
        )

    @task(6)
    def chats(self):
        """Of one adapter."""
        self.chat("chat", n=DRAWN.randint(1, 3), logprobs=DRAWN.random() < 0.2)

    @task(3)
    def sums(self):
        """Of adapters that are scaled and added."""
        self.chat("sum", lora=[{"id": name, "scale": DRAWN.choice((-1, 0.5, 2))} for name in MODELS])

    @task(1)
    def values(self):
        """Held to a schema."""
        body = {
            "model": "sums",
            "messages": question(),
            "max_tokens": 60,
            "response_format": FORMAT,
            "temperature": 0.5,
        }

        def right(answer):
            (choice,) = answer["choices"]
            return choice["finish_reason"] == "length" or set(json.loads(choice["message"]["content"])) == {"yes"}

        self.asked("/v1/chat/completions", body, "schema", right=right)

    @task(3)
    def verified(self):
        """Drafted, by samples or grafted chains, and verified."""
        verify = {"attempts": 3, "threshold": DRAWN.choice((0.0, 0.5, 1.0)), "drafts": "full"}
        self.chat("verified", DRAWN.choice(("checked", "checked", "chains")), n=DRAWN.randint(1, 2), verify=verify)

    @task(1)
    def verdicts(self):
        """On answers that others wrote."""
        body = {"model": "checked", "question": "What is 2 + 2?", "answers": ["4", "5", "four"]}
        self.asked("/v1/verifications", body, "verdicts", right=lambda answer: len(answer["data"]) == 3)

    def stream(self, name, to_its_end):
        """A stream, read to its end or left after its first lines."""
        body = {"model": DRAWN.choice((*MODELS, "checked")), "messages": question(), "max_tokens": 40, "stream": True}
        with self.client.post(
            "/v1/chat/completions", json=body, name=name, stream=True, catch_response=True
        ) as response:
            lines = (line for line in response.iter_lines() if line)
            told = list(lines if to_its_end else itertools.islice(lines, 2))
            response.close()
            if response.status_code == 200 and told and (not to_its_end or told[-1] == b"data: [DONE]"):
                response.success()
            else:
                response.failure(f"{response.status_code}: {told[-1:]}")

    @task(4)
    def streams(self):
        """Read to their ends."""
        self.stream("stream", True)

    @task(2)
    def left(self):
        """And left in the middle."""
        self.stream("stream, left", False)

    @task(2)
    def refused(self):
        """What is not served, by its name."""
        self.asked("/v1/chat/completions", {"model": "nobody", "messages": question()}, "refused", 404)
        self.asked("/v1/completions", {"model": "sums", "prompt": "x" * 900}, "too long", 400)
        self.asked("/v1/completions", {"model": "sums", "prompt": "x", "tools": []}, "refused", 400)

    @task(1)
    def changes(self):
        """An adapter that is loaded, asked, replaced, asked and unloaded."""
        name = f"adapter {next(NUMBERS)}"
        for path in MODELS:
            body = {"lora_name": name, "lora_path": path, "load_inplace": True}
            self.asked("/v1/load_lora_adapter", body, "load", right=lambda answer: answer["id"] == name)
            self.chat("chat of a loaded one", name)
        self.asked("/v1/unload_lora_adapter", {"lora_name": name}, "unload", right=lambda answer: answer["deleted"])
