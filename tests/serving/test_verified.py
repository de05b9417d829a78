"""Verified answers are those of `rsgwm ask`, alone and among others, and say how far they can be trusted."""

import json
import threading

import pytest

from mlx_rsgwm.inference.draft import Draft
from mlx_rsgwm.inference.open import open_pipeline
from mlx_rsgwm.inference.row_batch import RowBatch
from mlx_rsgwm.models.adapter_sources import load_adapter
from mlx_rsgwm.serving.library import Pair
from tests.serving.conftest import until_idle
from tests.serving.test_app import refused

SECONDS = 60
QUESTIONS = ["What is 2 + 2?", "Name a number.", "Ada has 12 pens and gets 7 more. How many pens has she?", "Why?"]
SETTINGS = {"attempts": 3, "score": "mean_logprob", "threshold": 0.006}
LENGTH = 12


@pytest.fixture
def start(start_pairs):
    return start_pairs


@pytest.fixture
def client(start):
    return start()[0]


def ask(client, question, model="pair", seed=5, status=200, verify=SETTINGS, **more):
    messages = [{"role": "user", "content": question}]
    body = {
        "model": model,
        "messages": messages,
        "seed": seed,
        "max_completion_tokens": LENGTH,
        "verify": verify,
        **more,
    }
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    return response


def asked(pair, question, seed=5, verifier=1, **settings):
    """What `rsgwm ask` does: every step, the answer last."""
    verifiers = pair[1 : 1 + verifier]
    options = {**SETTINGS, **settings}
    return [*open_pipeline(pair[0], verifiers, seed=seed, max_tokens=LENGTH, **options).steps(question)]


def check_same(told, steps, index=0):
    """A choice of a served answer against the steps of the loop."""
    answer, drafts = steps[-1], [step for step in steps if isinstance(step, Draft) and step.state != "drafted"]
    choice = told["verification"]["choices"][index]
    assert (choice["index"], told["choices"][index]["index"]) == (index, index)
    assert told["choices"][index]["message"]["content"] == (None if answer.text is None else answer.text.strip())
    assert (choice["accepted"], choice["attempts"]) == (answer.accepted, answer.attempts)
    assert choice["score"] == pytest.approx(answer.score, abs=1e-5)
    texts = [(draft["text"], draft["accepted"]) for draft in choice["drafts"]]
    assert texts == [(draft.text.strip(), draft.accepted) for draft in drafts]


FULL = {**SETTINGS, "drafts": "full"}


def test_an_answer_is_the_one_of_ask_in_every_mode(client, pair):
    outcomes = set()
    for seed, question in enumerate(QUESTIONS, 6):
        scores = [step.score for step in asked(pair, question, seed, threshold=1.0) if step.score is not None]
        for best in (min(scores), max(scores), 1.0):
            threshold = 0.9999 * best  # nobody's score: round-off decides nothing
            steps = asked(pair, question, seed, threshold=threshold)
            outcomes.add((steps[-1].accepted, steps[-1].attempts))
            for mode in ("adaptive", "parallel", "sequential"):
                verify = {**FULL, "threshold": threshold, "mode": mode}
                check_same(ask(client, question, seed=seed, verify=verify).json(), steps)
    assert outcomes >= {(True, 1), (True, 2), (True, 3), (False, 3)}, outcomes  # or the thresholds tell nothing


def test_the_server_and_the_command_line_write_by_the_same_step(client, pair, monkeypatch):
    """Step for step the same rows are read, and what attempts have in common is read once."""
    read, rows = RowBatch.read, []

    def reading(self, tokens, *arguments):
        rows.append(len(tokens))
        return read(self, tokens, *arguments)

    monkeypatch.setattr(RowBatch, "read", reading)
    settings = {**SETTINGS, "threshold": 1.0, "mode": "parallel"}
    pipeline = open_pipeline(pair[0], [pair[1]], seed=5, max_tokens=LENGTH, temperature=0.2, **settings)
    (answer,) = pipeline.answer_many([QUESTIONS[0]])
    by_the_loop, rows[:] = list(rows), []
    told = ask(client, QUESTIONS[0], temperature=0.2, verify=settings).json()
    assert told["choices"][0]["message"]["content"] == answer.text.strip()
    assert rows == by_the_loop
    assert (min(rows), max(rows)) == (1, 3)  # attempts that begin alike are one row, until they differ


def test_answers_among_others_are_the_same(start, pair):
    client, engine = start(limits={"rows": 8, "queue": 200})
    expected = {(question, seed): asked(pair, question, seed) for question in QUESTIONS for seed in (5, 6)}
    failures = []

    def verified(question, seed):
        try:
            check_same(ask(client, question, seed=seed, verify=FULL).json(), expected[question, seed])
        except AssertionError as error:
            failures.append(error)

    def alone():
        for _ in range(3):
            client.post("/v1/completions", json={"model": "alone", "prompt": "x", "max_tokens": 20})

    threads = [threading.Thread(target=verified, args=key) for key in expected]
    threads += [threading.Thread(target=alone) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert failures == []
    until_idle(engine)


def test_a_pool_verifies_as_it_does_for_ask(client, pair):
    for question in QUESTIONS[:2]:
        check_same(ask(client, question, "pool", verify=FULL).json(), asked(pair, question, verifier=2))


def test_yesno_and_one_attempt(client, pair):
    settings = {"attempts": 1, "score": "yesno", "threshold": 0.5}
    for question in QUESTIONS:
        told = ask(client, question, verify={**settings, "drafts": "full"}).json()
        check_same(told, asked(pair, question, **settings))


def test_what_is_told(client, pair):
    response = ask(client, QUESTIONS[0], verify={**SETTINGS, "threshold": 0.0})
    told = response.json()
    verification = told["verification"]
    assert set(verification) == {"choices", "score_name", "drafter", "verifier", "calibrated", "warnings"}
    (choice,) = verification["choices"]
    assert set(choice) == {"index", "score", "probability", "threshold", "accepted", "attempts"}
    assert (choice["accepted"], choice["threshold"], choice["probability"]) == (True, 0.0, None)
    assert (verification["calibrated"], verification["score_name"]) == (False, "mean_logprob")
    assert verification["drafter"]["name"] == "drafter"
    assert response.headers["x-rsgwm-accepted"] == "true"
    assert response.headers["x-rsgwm-attempts"] == "1"
    assert float(response.headers["x-rsgwm-score"]) == pytest.approx(choice["score"], abs=1e-6)
    usage = ask(client, QUESTIONS[0], verify={**FULL, "threshold": 1.0}).json()["usage"]
    assert usage["completion_tokens_details"]["rejected_prediction_tokens"] > 0
    assert usage["completion_tokens"] <= 3 * LENGTH
    described = client.get("/v1/models/pair").json()["x_rsgwm"]
    assert (described["kind"], described["calibrated"], described["threshold"]) == ("verified", False, 0.7)


def test_several_choices_are_answers_to_seeds_that_count_on(client, pair):
    told = ask(client, QUESTIONS[0], n=3, verify=FULL).json()
    alone = [ask(client, QUESTIONS[0], seed=5 + index, verify=FULL) for index in range(3)]
    for index, response in enumerate(alone):
        check_same(told, asked(pair, QUESTIONS[0], 5 + index), index)
        assert told["choices"][index]["message"] == response.json()["choices"][0]["message"]
    assert len({choice["message"]["content"] for choice in told["choices"]}) > 1  # or the seeds are one
    usages = [response.json()["usage"] for response in alone]
    assert told["usage"]["prompt_tokens"] == usages[0]["prompt_tokens"]
    accepted = ask(client, QUESTIONS[0], n=2, verify={**SETTINGS, "threshold": 0.0})
    assert accepted.headers["x-rsgwm-accepted"] == "true, true"
    assert accepted.headers["x-rsgwm-score"].count(", ") == 1
    usage = ask(client, QUESTIONS[0], n=2, verify={**SETTINGS, "attempts": 1}).json()["usage"]
    assert usage["completion_tokens_details"]["rejected_prediction_tokens"] == 0


def test_several_choices_in_a_stream_tell_of_all_that_have_ended(client):
    told = ask(client, QUESTIONS[0], n=3, verify=FULL).json()
    lines = ask(client, QUESTIONS[0], n=3, verify=FULL, stream=True).text.split("\n\n")
    assert {json.loads(line[2:])["choice"] for line in lines if line.startswith(": ")} == {0, 1, 2}
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    texts, reasons = {}, {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + (choice["delta"].get("content") or "")
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {choice["index"]: choice["message"]["content"] for choice in told["choices"]}
    assert reasons == {choice["index"]: choice["finish_reason"] for choice in told["choices"]}
    ends = [
        [choice["index"] for choice in chunk["verification"]["choices"]] for chunk in chunks if "verification" in chunk
    ]
    assert [len(indices) for indices in ends] == [1, 2, 3]
    assert ends[-1] == [0, 1, 2]


def test_names_are_those_of_the_model_that_was_asked(start, pair, tmp_path):
    client, engine = start()
    twins = [
        load_adapter(folder).save(tmp_path / name) for folder, name in zip(pair, ("twin drafter", "twin"), strict=False)
    ]
    engine.call(lambda library: library.add_pair("twins", Pair(twins[0], [twins[1]]))).result(SECONDS)
    for model, names in (("pair", ("drafter", "verifier")), ("twins", ("twin drafter", "twin"))):
        verification = ask(client, QUESTIONS[0], model).json()["verification"]
        assert (verification["drafter"]["name"], verification["verifier"][0]["name"]) == names


def test_it_abstains(client):
    response = ask(client, QUESTIONS[0], verify={**SETTINGS, "threshold": 1.0, "abstain": True})
    (choice,) = response.json()["choices"]
    assert choice["message"]["content"] is None
    assert choice["message"]["refusal"].startswith("No answer: of 3 drafts none reached 1.000; the best of them scores")
    assert choice["finish_reason"] == "stop"
    assert response.headers["x-rsgwm-accepted"] == "false"


def test_a_stream_shows_drafts_in_comments_and_ends_with_the_verification(client):
    whole = ask(client, QUESTIONS[0], verify=FULL).json()
    response = ask(client, QUESTIONS[0], verify=FULL, stream=True, stream_options={"include_usage": True})
    lines = [line for line in response.text.split("\n\n") if line]
    comments = [json.loads(line[2:]) for line in lines if line.startswith(": ")]
    drafts = whole["verification"]["choices"][0]["drafts"]
    judged = [comment for comment in comments if "score" in comment]
    assert [comment["accepted"] for comment in judged] == [draft["accepted"] for draft in drafts]
    last_texts = {comment["draft"]: comment["text"] for comment in comments if "text" in comment}
    assert all(last_texts[draft["attempt"]].strip() == draft["text"] for draft in drafts)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    end = chunks[-2]
    assert end["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert end["verification"]["choices"][0]["accepted"] == whole["verification"]["choices"][0]["accepted"]
    assert chunks[-1]["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert lines[-1] == "data: [DONE]"
    refusing = ask(client, QUESTIONS[0], verify={**SETTINGS, "threshold": 1.0, "abstain": True}, stream=True)
    chunks = [json.loads(line[6:]) for line in refusing.text.split("\n\n") if line.startswith("data: {")]
    assert any("No answer" in (choice["delta"].get("refusal") or "") for chunk in chunks for choice in chunk["choices"])


def test_verdicts_on_given_answers(client, pair):
    answers = ["4", "5", "2 + 2 = 5\n#### 5", "4"] * 10
    body = {"model": "pair", "question": QUESTIONS[0], "answers": answers, "score": "yesno", "threshold": 0.5}
    told = client.post("/v1/verifications", json=body).json()
    pipeline = open_pipeline(pair[0], [pair[1]], score="yesno", threshold=0.5)
    drafts = [pipeline.as_draft(answer) for answer in answers[:2]]
    expected = pipeline.score_many([QUESTIONS[0]] * 2, drafts, "yesno")
    scores = [verdict["score"] for verdict in told["data"]]
    assert scores[:2] == pytest.approx(expected, abs=1e-5)
    assert [verdict["index"] for verdict in told["data"]] == [*range(40)]
    assert told["data"][2]["score"] is None  # a false equation is not shown to the verifier
    assert (told["data"][2]["accepted"], told["data"][2]["false_equation"]) == (False, "2 + 2 = 5")
    assert [verdict["accepted"] for verdict in told["data"][:2]] == [score >= 0.5 for score in scores[:2]]
    assert scores[0] == pytest.approx(scores[3], abs=1e-6)
    refused(client.post("/v1/verifications", json={**body, "model": "alone"}), 400, "not_a_verified_model", "model")
    refused(client.post("/v1/verifications", json={**body, "answers": []}), 400, "invalid_value", "answers")
    refused(client.post("/v1/verifications", json={**body, "answers": ["x"] * 65}), 400, "invalid_value", "answers")
    refused(
        client.post("/v1/verifications", json={**body, "answers": ["x" * 900]}),
        400,
        "context_length_exceeded",
        "answers",
    )
    refused(client.post("/v1/verifications", json={**body, "target_far": 0.1}), 400, "invalid_value", "target_far")


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"n": 33}, "invalid_value", "n"),
        ({"stop": "x"}, "unsupported_parameter", "stop"),
        ({"logprobs": True}, "unsupported_parameter", "logprobs"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"top_k": 3}, "unsupported_parameter", "top_k"),
        ({"lora": [{"id": "alone", "scale": 1}]}, "unsupported_parameter", "lora"),
        ({"verify": {"depth": 3}}, "unsupported_parameter", "verify.depth"),
        ({"verify": {"router": "pool"}}, "unsupported_parameter", "verify.router"),
        ({"verify": {"drafts": "grafted"}}, "invalid_value", "verify.drafts"),
        ({"verify": {"attempts": 0}}, "invalid_value", "verify.attempts"),
        ({"verify": {"score": "combined"}}, "invalid_value", "verify.score"),
        ({"verify": {"target_far": 0.1}}, "no_risk_bound", "verify.target_far"),
        ({"verify": {"target_far": 0.1, "threshold": 0.5}}, "invalid_value", "verify.target_far"),
        ({"model": "alone"}, "unsupported_parameter", "verify"),
        ({"max_completion_tokens": 510}, "context_length_exceeded", "messages"),
        ({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}, "unsupported_message",
         "messages"),
    ],
)  # fmt: skip
def test_what_a_pair_cannot_do_is_refused_by_name(client, change, code, param):
    body = {"model": "pair", "messages": [{"role": "user", "content": "x"}], "verify": SETTINGS, **change}
    refused(client.post("/v1/chat/completions", json=body), 400, code, param)


TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Three?"},
]


def test_conversations(client, start, pair):
    told = ask(client, "", messages=TURNS, verify=FULL).json()
    check_same(told, asked(pair, "Two?\n2\n\nThree?"))
    assert "trained on single questions" in told["verification"]["warnings"][-1]
    strict, _ = start(history="refuse")
    refused(ask(strict, "", messages=TURNS, status=400), 400, "unsupported_message", "messages")
    refused(client.post("/v1/completions", json={"model": "pair", "prompt": "x"}), 400, "chat_only", "model")


def test_a_client_that_leaves_while_it_is_verified_frees_everything(start, pair, monkeypatch):
    client, engine = start()
    reader = type(engine.library.find("pair").pipeline.reader)
    signals = reader.signals
    jobs = []

    def leaving(self, *arguments, **options):
        jobs[:] = list(engine._jobs)
        engine.cancel(jobs[0])
        return signals(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(reader, "signals", leaving)
        leaver = threading.Thread(target=ask, args=(client, QUESTIONS[1]), kwargs={"status": 499})
        leaver.start()
        until_idle(engine, lambda: engine.counts.cancelled == 1)
        leaver.join(SECONDS)
    check_same(ask(client, QUESTIONS[0], verify=FULL).json(), asked(pair, QUESTIONS[0]))


def test_a_verdict_that_raises_fails_its_own_request(start, pair, monkeypatch):
    client, engine = start(limits={"queue": 50})
    reader = type(engine.library.find("pair").pipeline.reader)
    signals = reader.signals

    def raising(self, questions, *arguments, **options):
        if any("poison" in question for question in questions):
            raise RuntimeError("no verdict")
        return signals(self, questions, *arguments, **options)

    monkeypatch.setattr(reader, "signals", raising)
    results = {}

    def client_of(question, status):
        results[question] = ask(client, question, status=status, verify=FULL).json()

    threads = [threading.Thread(target=client_of, args=(text, 200)) for text in QUESTIONS]
    threads.append(threading.Thread(target=client_of, args=("poison", 500)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert results.keys() == {*QUESTIONS, "poison"}
    monkeypatch.undo()
    for question in QUESTIONS:
        check_same(results[question], asked(pair, question))
