"""OpenAI's own client, any of its majors, against the server at ``RSGWM_URL``: what it is told arrives in it."""

import os

import openai

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
VERIFY = {"attempts": 2, "threshold": 1.0, "drafts": "summary"}

client = openai.OpenAI(base_url=os.environ["RSGWM_URL"], api_key="none", max_retries=0)
assert {"sums", "checked"} <= {model.id for model in client.models.list()}
assert client.models.retrieve("checked").x_rsgwm["kind"] == "verified"

asked = {"messages": QUESTION, "max_tokens": 8, "seed": 4}
whole = client.chat.completions.create(model="sums", n=2, **asked)
parts, usage = ["", ""], None
stream = client.chat.completions.create(model="sums", n=2, stream=True, stream_options={"include_usage": True}, **asked)
for chunk in stream:
    usage = chunk.usage or usage
    for choice in chunk.choices:
        parts[choice.index] += choice.delta.content or ""
assert parts == [choice.message.content for choice in whole.choices]
assert usage.completion_tokens == whole.usage.completion_tokens

raw = client.chat.completions.with_raw_response.create(model="checked", extra_body={"verify": VERIFY}, **asked)
answer = raw.parse()
assert answer.choices[0].message.content
verdict = answer.verification["choices"][0]
assert (verdict["accepted"], verdict["attempts"], len(verdict["drafts"])) == (False, 2, 2)
assert (raw.headers["x-rsgwm-accepted"], raw.headers["x-rsgwm-attempts"]) == ("false", "2")
assert abs(float(raw.headers["x-rsgwm-score"]) - verdict["score"]) < 1e-6
assert answer.usage.completion_tokens_details.rejected_prediction_tokens > 0

*_, last = client.chat.completions.create(model="checked", stream=True, extra_body={"verify": VERIFY}, **asked)
assert last.verification["choices"][0]["score"] == verdict["score"]

abstained = client.chat.completions.create(model="checked", extra_body={"verify": {**VERIFY, "abstain": True}}, **asked)
message = abstained.choices[0].message
assert message.content is None
assert message.refusal.startswith("No answer")

refused = None
try:
    client.chat.completions.create(model="nobody", messages=QUESTION)
except openai.NotFoundError as error:
    refused = error.code, error.param
assert refused == ("model_not_found", "model")
print(f"openai {openai.__version__}: verification {verdict['score']:.6f}")
