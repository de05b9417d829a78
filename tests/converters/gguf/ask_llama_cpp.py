"""Run by test_llama_cpp.py in a process of its own: what llama.cpp computes, as one line of JSON.

The argument is JSON: ``model`` and ``adapter`` (GGUF files, the adapter may be null), ``prompts`` (lists of token ids),
``texts`` to be cut into tokens, ``vocabulary`` (rows) and ``plain`` (a token whose text is a letter).
"""

import json
import sys
import urllib.request

import xllamacpp

job = json.loads(sys.argv[1])
parameters = xllamacpp.CommonParams()
parameters.model.path = job["model"]
parameters.n_ctx = 256
parameters.n_parallel = 1
parameters.warmup = False
parameters.cpuparams.n_threads = 1
parameters.verbosity = -1
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
if job["adapter"]:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = job["adapter"], 1.0
    parameters.lora_adapters = [adapter]
server = xllamacpp.Server(parameters)


def post(path, body):
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


logprobs = []
for prompt in job["prompts"]:
    # A letter is forced: the server leaves out what it says of a token that ends the text or is half a character.
    body = {"prompt": prompt, "n_predict": 1, "n_probs": job["vocabulary"], "cache_prompt": False, "temperature": 0}
    found = post("/completion", {**body, "logit_bias": [[job["plain"], 1000.0]]})
    row = [0.0] * job["vocabulary"]
    for entry in found["completion_probabilities"][0]["top_logprobs"]:
        row[entry["id"]] = entry["logprob"]
    logprobs.append(row)
tokens = [post("/tokenize", {"content": text, "add_special": True})["tokens"] for text in job["texts"]]
print(json.dumps({"logprobs": logprobs, "tokens": tokens}), flush=True)
