"""Grafted drafts against a slow run of each chain by itself, and against transformers with a forward hook."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_rsgwm.bench.architectures import save_model
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.inference.generate import DraftRequest, draft
from mlx_rsgwm.inference.grafting import GREEDY, KINDS, SIX, fixed_vectors, grafted_drafts, grafted_layer, layer_at
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.hooks import block_names, outputs_changed
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.models.split import split_head

PROMPTS = ([7, 9, 11, 40, 41, 42, 3], [5, 6, 90, 91], [8, 77, 21, 22, 23, 24, 25, 26, 27, 28])
ALL = (GREEDY, *KINDS)
END, LAYER, TOKENS, SEED = frozenset({0}), 2, 6, 3


@pytest.fixture(scope="module")
def model(make_torch_llama, tmp_path_factory):
    """Four layers, and its folder."""
    folder = tmp_path_factory.mktemp("grafting") / "base"
    make_torch_llama(folder, 1, 4, 300)
    return load_base(str(folder), dtype="float32").model, folder


def drafts(model, prompts=PROMPTS, kinds=ALL, **options):
    given = {"layer": LAYER, "max_tokens": TOKENS, "seed": SEED, **options}
    return grafted_drafts(model, split_head(model), END, prompts, kinds, **given)


def graft(kind, states, below):
    """By the definitions, in NumPy float32: ``states`` (length, dims) of the layer, ``below`` of the one under it."""
    vector, order = (
        (np.array(part) for part in fixed_vectors(kind, states.shape[1], SEED)) if kind != GREEDY else (0, 0)
    )
    last = states[-1]
    return {
        GREEDY: lambda: last,
        "zero": lambda: np.zeros_like(last),
        "rand": lambda: vector / np.linalg.norm(vector) * np.linalg.norm(last),
        "runit": lambda: vector / np.linalg.norm(vector),
        "shuf": lambda: last[order],
        "bos": lambda: states[0],
        "avg": lambda: states[:-1].mean(axis=0),
        "prev": lambda: below[-1],
    }[kind]()


def slow(kind, prompt, run):
    """Greedy tokens without a cache: ``run(ids, replace)`` gives logits (vocabulary,) and calls ``replace`` on the
    states (length, dims) of the grafted layer and of the one below."""
    written = []
    while len(written) < TOKENS:
        end = len(prompt)

        def replace(states, below, end=end):
            changed = states.copy()
            changed[end - 1] = graft(kind, states[:end], below[:end])
            return changed

        token = int(np.argmax(run([*prompt, *written], replace)))
        if token in END:
            return tuple(written), True
        written.append(token)
    return tuple(written), False


def in_mlx(model, layer=LAYER):
    place = block_names(model)[layer]

    def run(ids, replace):
        def change(_, x, y):
            return mx.array(replace(np.array(y[0]), np.array(x[0])))[None]

        with outputs_changed(model, [place], change):
            return np.array(model(mx.array([ids]))[0, -1])

    return run


def in_torch(torch_model, layer):
    import torch

    def run(ids, replace):
        def hook(module, given, output):
            states = output[0] if isinstance(output, tuple) else output
            changed = torch.tensor(replace(states[0].numpy(), given[0][0].numpy()))[None]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = torch_model.model.layers[layer].register_forward_hook(hook)
        with torch.no_grad():
            logits = torch_model(torch.tensor([ids]), use_cache=False).logits[0, -1].numpy()
        handle.remove()
        return logits

    return run


@pytest.mark.parametrize("kind", ALL)
def test_a_batch_of_chains_is_each_chain_by_itself(model, kind):
    together = drafts(model[0])
    for prompt, chains in zip(PROMPTS, together, strict=True):
        chain = chains[ALL.index(kind)]
        assert (chain.kind, chain.attempt) == (kind, ALL.index(kind) + 1)
        assert (chain.tokens, chain.finished) == slow(kind, prompt, in_mlx(model[0]))


def test_a_quantised_base_with_an_adapter_is_grafted_alike(model):
    base = load_base(str(model[1]), dtype="float32")
    nn.quantize(base.model, group_size=32, bits=4, class_predicate=divisible)
    slots = AdapterSlots(base)
    plain = drafts(base.model)
    slots.load("adapter", random_adapter(base))
    slots.use("adapter")
    together = drafts(base.model)
    assert [row[0].tokens for row in together] != [row[0].tokens for row in plain]  # or the adapter does nothing
    for kind in (GREEDY, "zero", "shuf", "prev"):
        for prompt, chains in zip(PROMPTS, together, strict=True):
            assert chains[ALL.index(kind)].tokens == slow(kind, prompt, in_mlx(base.model))[0]


def divisible(_, module):
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


def random_adapter(base):
    random = np.random.default_rng(5)
    weights = {}
    for layer in range(len(base.model.layers)):
        projection = base.model.layers[layer].self_attn.q_proj
        outputs, inputs = projection.weight.shape[0], projection.scales.shape[1] * projection.group_size
        for leaf, shape in (("lora_a", (inputs, 4)), ("lora_b", (4, outputs))):
            name = f"model.layers.{layer}.self_attn.q_proj.{leaf}"
            weights[name] = mx.array(random.standard_normal(shape).astype(np.float32))
    return Adapter(LoraSpec(4, 2.0, 0.0, ("self_attn.q_proj",), len(base.model.layers)), weights)


def test_without_a_graft_it_is_greedy_decoding(model):
    requests = [DraftRequest(tuple(prompt), "q", 1) for prompt in PROMPTS]
    greedy = draft(model[0], split_head(model[0]), END, requests, Sampling(0.0, 1.0, TOKENS))
    assert [row[0].tokens for row in drafts(model[0], kinds=(GREEDY,))] == [row.tokens for row in greedy]


def test_kinds_differ_and_vectors_stay_the_same(model):
    texts = {kind: [chains[n].tokens for chains in drafts(model[0])] for n, kind in enumerate(ALL)}
    assert len({tuple(text) for text in texts.values()}) >= 5
    assert drafts(model[0], PROMPTS[:1])[0] == drafts(model[0])[0]  # alone or among others
    first, second = (np.array(fixed_vectors("rand", 16, seed)[0]) for seed in (0, 1))
    assert not np.allclose(first, second)
    assert not np.allclose(first, np.array(fixed_vectors("runit", 16, 0)[0]))


@pytest.mark.parametrize("kind", ["zero", "shuf", "bos", "avg", "prev", "rand"])
def test_transformers_with_a_forward_hook_writes_the_same(model, kind, one_torch_thread):
    import torch
    from transformers import AutoModelForCausalLM

    torch_model = AutoModelForCausalLM.from_pretrained(str(model[1]), dtype=torch.float32).eval()

    for prompt, chains in zip(PROMPTS[:2], drafts(model[0], PROMPTS[:2], (kind,)), strict=True):
        assert (chains[0].tokens, chains[0].finished) == slow(kind, prompt, in_torch(torch_model, LAYER))


# Blocks that take more than states, caches that cannot be batched (sliding windows, states of recurrences).
ARCHITECTURES = ("qwen2", "qwen3", "gemma2", "gemma3_text", "lfm2", "falcon_h1")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_are_grafted_as_transformers_does(name, tmp_path, one_torch_thread):
    import torch
    from transformers import AutoModelForCausalLM

    save_model(name, tmp_path)
    base = load_base(str(tmp_path), dtype="float32").model
    torch_model = AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32).eval()
    together = drafts(base, PROMPTS[:2], layer=0)
    for place, kind in enumerate(ALL):
        for prompt, chains in zip(PROMPTS[:2], together, strict=True):
            chain = (chains[place].tokens, chains[place].finished)
            assert chain == slow(kind, prompt, in_mlx(base, 0)), kind
            assert chain == slow(kind, prompt, in_torch(torch_model, 0)), kind


def test_a_prompt_of_one_token_has_no_other(model):
    assert [len(chains) for chains in drafts(model[0], [[5], [6, 7]])] == [len(ALL)] * 2


def test_layers_by_depth_never_the_last_and_bad_ones_are_refused(model):
    assert [layer_at(0.75, count) for count in (32, 30, 4, 2)] == [24, 22, 2, 0]
    assert grafted_layer(model[0], None) == block_names(model[0])[2]
    with pytest.raises(RsgwmError, match="layer 4 is out of range: the model has layers 0 to 3"):
        grafted_layer(model[0], 4)
    with pytest.raises(RsgwmError, match="cannot be reached"):
        grafted_layer(object(), None)
    with pytest.raises(RsgwmError, match="did you mean shuf"):
        drafts(model[0], kinds=("shuff",))
    with pytest.raises(RsgwmError, match="named twice"):
        drafts(model[0], kinds=("zero", "zero"))
    assert len(SIX) == 6
