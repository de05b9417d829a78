"""LangChain's OpenAI chat model against the server at ``RSGWM_URL``: it keeps headers, and drops ``verification``."""

import os

from langchain_openai import ChatOpenAI

asked = {"base_url": os.environ["RSGWM_URL"], "api_key": "none", "max_tokens": 8, "seed": 4, "max_retries": 0}
verify = {"verify": {"attempts": 2, "threshold": 1.0}}
checked = ChatOpenAI(model="checked", include_response_headers=True, extra_body=verify, **asked)
answer = checked.invoke("What is 2 + 2?")
headers = answer.response_metadata["headers"]
assert (headers["x-rsgwm-accepted"], headers["x-rsgwm-attempts"]) == ("false", "2")
assert "".join(part.content for part in checked.stream("What is 2 + 2?")) == answer.content != ""
several = ChatOpenAI(model="sums", **asked).batch(["One?", "Two?"])
assert all(message.usage_metadata["output_tokens"] <= 8 for message in several)
print(f"headers {headers['x-rsgwm-score']}")
