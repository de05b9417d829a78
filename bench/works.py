"""What the latency bench times, each work as two callables that do the same in MLX and in torch.

A trial is called once per turn and returns milliseconds, one number for each of its work's parts; everything that is
not the work (making inputs, undoing what a trial left) happens before the clock starts or after it stops.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_rsgwm.core.distributed import ALONE
from mlx_rsgwm.data.batching import TokenRow
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.open import slots_of
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.layers import lora_layers
from mlx_rsgwm.training.state import TrainingRun

Times = tuple[float, ...]  # milliseconds
Trial = Callable[[], Times]

TEMPERATURE, TOP_P = 0.7, 0.9
DENSITY = 0.5
# Ways to take several drafts of one question in torch, and their verifications after them.
BATCHINGS = ("one by one", "in one batch", "in one batch over one reading of the prompt")


def synchronizer(device: str) -> Callable[[], Any]:
    """What waits for torch's device; nothing is needed on the CPU."""
    import torch

    return {"mps": torch.mps.synchronize, "cuda": torch.cuda.synchronize}.get(device, lambda: None)


def timed_since(started: float) -> Times:
    """Milliseconds since ``started``, as the only time of a trial."""
    return ((time.perf_counter() - started) * 1e3,)


# --- prefill and decode -----------------------------------------------------------------------------------------


def mlx_forward(model: nn.Module, prompt: Sequence[int], forced: Sequence[int]) -> Trial:
    """One timed prefill and decode in MLX, as drafts are written: the whole prompt with logits of its last position."""
    from mlx_lm.models.cache import make_prompt_cache

    hidden, head = split_head(model)
    tokens_in = mx.array([prompt])
    tokens = [mx.array([[token]]) for token in forced]
    mx.eval(tokens_in, tokens)

    def step(token: mx.array, cache: list[Any]) -> mx.array:
        return mx.argmax(head(hidden(token, cache=cache)[:, -1]), axis=-1)

    def trial() -> Times:
        cache = make_prompt_cache(model)
        mx.synchronize()
        started = time.perf_counter()
        mx.eval(step(tokens_in, cache))
        filled = time.perf_counter()
        picked = []
        for token in tokens:
            picked.append(step(token, cache))
            mx.async_eval(picked[-1])
        mx.eval(picked)
        mx.synchronize()
        return (filled - started) * 1e3, (time.perf_counter() - filled) * 1e3

    return trial


def torch_forward(
    model: Any, device: str, prompt: Sequence[int], forced: Sequence[int], before: Callable[[int], None]
) -> Trial:
    """The same in torch, with transformers' ``DynamicCache`` and logits of the last position only.

    ``before(0)`` and ``before(1)`` are called, off the clock, before prefill and before decode.
    """
    import torch
    from transformers import DynamicCache

    tokens_in = torch.tensor([list(prompt)], device=device)
    tokens = [torch.tensor([[token]], device=device) for token in forced]
    synchronize = synchronizer(device)

    def step(token: Any, cache: Any) -> Any:
        output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1)

    def trial() -> Times:
        with torch.inference_mode():
            cache = DynamicCache()
            before(0)
            synchronize()
            started = time.perf_counter()
            step(tokens_in, cache)
            synchronize()
            filled = timed_since(started)
            before(1)
            synchronize()
            started = time.perf_counter()
            picked = [step(token, cache) for token in tokens]
            synchronize()
            decoded = timed_since(started)
        assert len(picked) == len(tokens)
        return *filled, *decoded

    return trial


# --- a training step --------------------------------------------------------------------------------------------


@contextmanager
def mlx_training(base: Base, rows: Sequence[Sequence[int]], spec: LoraSpec, trials: int) -> Iterator[Trial]:
    """One step of this project's training, importance and directions included: forward, backward, Adam; the layers go
    at the end.
    """
    data = [TokenRow("draft", tuple(row), 1, str(number)) for number, row in enumerate(rows)]
    config = TrainConfig(
        rank=spec.rank, alpha=spec.scale * spec.rank, dropout=0.0, keys=spec.keys, batch_size=len(rows), warmup=0.0,
        schedule="constant", learning_rate=1e-4,
    )  # fmt: skip
    with lora_layers(base.model, config.spec(), 0):
        run = TrainingRun(base.model, data, [list(range(len(rows)))] * trials, [], config, "bench", ALONE)

        def trial() -> Times:
            mx.synchronize()
            started = time.perf_counter()
            run.step(keep_sum=False)  # ends with the loss's value
            return timed_since(started)

        with run.looking():
            yield trial


def torch_training(model: Any, device: str, rows: Sequence[Sequence[int]]) -> Trial:
    """The same on a PEFT model: loss of every token but the first, backward through the LoRA layers, Adam."""
    import torch

    ids = torch.tensor([list(row) for row in rows], device=device)
    trained = [value for name, value in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.Adam(trained, lr=1e-4, betas=(0.9, 0.999))
    synchronize = synchronizer(device)

    def trial() -> Times:
        for value in trained:
            value.requires_grad_(True)
        synchronize()
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        synchronize()
        timed = timed_since(started)
        for value in trained:
            value.requires_grad_(False)
        return timed

    return trial


# --- a merge ----------------------------------------------------------------------------------------------------


def mlx_merge(pool: Sequence[Path]) -> Trial:
    """PEFT's ``ties`` of adapters in memory, with this project's checks and diagnosis of it."""
    adapters = [Adapter.load(folder) for folder in pool]
    options = MergeOptions("peft:ties", parameters={"density": DENSITY}, weights=(1 / len(pool),) * len(pool))

    def trial() -> Times:
        mx.synchronize()
        started = time.perf_counter()
        mx.eval(merge(adapters, options).weights)
        return timed_since(started)

    return trial


def torch_merge(model: Any, device: str, names: Sequence[str]) -> Trial:
    """The same by ``add_weighted_adapter``, on adapters that the model already holds."""
    import torch

    synchronize = synchronizer(device)
    weights = [1 / len(names)] * len(names)

    def trial() -> Times:
        synchronize()
        started = time.perf_counter()
        with torch.inference_mode():
            model.add_weighted_adapter(list(names), weights, "merged", combination_type="ties", density=DENSITY)
        synchronize()
        timed = timed_since(started)
        model.set_adapter(names[0])
        model.delete_adapter("merged")
        return timed

    return trial


# --- draft–verify -----------------------------------------------------------------------------------------------


def mlx_loop(base: Base, pool: Sequence[Path], question: str, attempts: int, new_tokens: int) -> Trial:
    """All drafts of a question and their verification by this project's loop: none is accepted, none ends early."""
    slots = slots_of(base, dict(zip(("drafter", "verifier"), pool, strict=False)))
    config = LoopConfig(attempts, 1.0, "mean_logprob", Sampling(TEMPERATURE, TOP_P, new_tokens))
    pipeline = DraftVerify(slots, TEMPLATES["plain"], "drafter", "verifier", config)
    pipeline.end_ids = frozenset()

    def trial() -> Times:
        mx.synchronize()
        started = time.perf_counter()
        answer = pipeline.answer(question)
        timed = timed_since(started)
        assert answer.attempts == attempts, "a draft was accepted"
        return timed

    return trial


def torch_loop(
    model: Any,
    device: str,
    tokenizer: Any,
    question: str,
    attempts: int,
    new_tokens: int,
    names: Sequence[str],
    batching: str = BATCHINGS[0],
) -> Trial:
    """The loop as a script with transformers has it: ``generate`` under one adapter, a forward pass under the other."""
    import torch
    from transformers import DynamicCache

    drafter, verifier = names[:2]
    prompt = torch.tensor([TEMPLATES["plain"].draft_prompt(tokenizer, question)], device=device)
    length = prompt.shape[1]
    options = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0, "pad_token_id": 0}
    options |= {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    rows, rounds = (1, attempts) if batching == BATCHINGS[0] else (attempts, 1)
    repeated = prompt.repeat(rows, 1)
    synchronize = synchronizer(device)

    def draft() -> Any:
        model.set_adapter(drafter)
        cache = None
        if batching == BATCHINGS[2]:
            cache = DynamicCache()
            model(input_ids=prompt[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(rows)
        return model.generate(
            input_ids=repeated, attention_mask=torch.ones_like(repeated), past_key_values=cache, **options
        )

    def trial() -> Times:
        torch.manual_seed(0)
        synchronize()
        started = time.perf_counter()
        with torch.inference_mode():
            for _ in range(rounds):
                sequence = draft()
                model.set_adapter(verifier)
                logits = model(input_ids=sequence, logits_to_keep=new_tokens + 1).logits[:, :-1].float()
                logits.log_softmax(-1).gather(-1, sequence[:, length:, None]).mean((1, 2)).exp().tolist()
        synchronize()
        elapsed = timed_since(started)
        assert sequence.shape[1] == length + new_tokens, "a draft ended early"
        return elapsed

    return trial


# --- adapters ---------------------------------------------------------------------------------------------------


def fuse_mlx(model: nn.Module) -> None:
    """Work mlx-lm's LoRA layers into the weights below them, in place, as ``mlx_lm.fuse`` does."""
    fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fused))
    mx.eval(model.parameters())


def training_rows(vocabulary: int, rows: int, length: int, seed: int) -> list[list[int]]:
    """Seeded token ids, every row of one length: no padding on either side."""
    drawn: list[list[int]] = np.random.default_rng(seed + 1).integers(0, vocabulary, (rows, length)).tolist()
    return drawn
