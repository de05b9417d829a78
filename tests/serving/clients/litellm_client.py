"""LiteLLM against the server at ``RSGWM_URL``: the object ``verification`` and the headers arrive in it."""

import os

import litellm

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
ASKED = {
    "model": "openai/checked",
    "api_base": os.environ["RSGWM_URL"],
    "api_key": "none",
    "messages": QUESTION,
    "max_tokens": 8,
    "seed": 4,
    "extra_body": {"verify": {"attempts": 2, "threshold": 1.0}},
}

answer = litellm.completion(**ASKED)
verdict = answer.verification["choices"][0]
headers = answer._hidden_params["additional_headers"]  # where LiteLLM's documentation says they are
assert headers["llm_provider-x-rsgwm-attempts"] == str(verdict["attempts"]) == "2"
assert abs(float(headers["llm_provider-x-rsgwm-score"]) - verdict["score"]) < 1e-6
*parts, last = litellm.completion(**ASKED, stream=True)
assert last.verification["choices"][0]["score"] == verdict["score"]
text = "".join(part.choices[0].delta.content or "" for part in (*parts, last))
assert text == answer.choices[0].message.content != ""
try:
    litellm.completion(**{**ASKED, "model": "openai/nobody"})
except litellm.NotFoundError:
    pass
else:
    raise AssertionError("a model that is not there was answered")
print(f"verification {verdict['score']:.6f}")
