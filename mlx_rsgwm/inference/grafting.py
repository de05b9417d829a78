"""Grafted drafts: greedy decoding after one activation was replaced, at one layer's output, the prompt's last token.

What sampling never finds, another state to begin from may: each kind of graft gives one draft of a question, the same
in every run (six-chain diagnostics, arXiv 2606.19636; docs/methods.md says where its text and its code differ). All
that comes before the prompt's last token is read once for all chains; their drafts are written side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.nearest import nearest
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.inference.draft import GREEDY, Draft
from mlx_rsgwm.inference.generate import PREFILL_STEP, unread, write_drafts
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.models.hooks import block_names, outputs_changed
from mlx_rsgwm.models.row_batches import can_batch
from mlx_rsgwm.models.split import Parts

if TYPE_CHECKING:
    from mlx_rsgwm.inference.loop import DraftVerify

DEPTH = 0.75  # of the layers, where no layer is given


@dataclass(frozen=True)
class PromptStates:
    """What a graft is made of: states at one layer's output for prompts padded on the left.

    ``last`` and ``below`` (rows, dims): at the last token, of the layer and of the one below; ``first`` (rows, dims):
    at the first token; ``mean`` (rows, dims): over the tokens before the last.
    """

    last: mx.array
    below: mx.array
    first: mx.array
    mean: mx.array


def _norm(states: mx.array) -> mx.array:
    return mx.linalg.norm(states.astype(mx.float32), axis=-1, keepdims=True, stream=mx.cpu)


Graft = Callable[[PromptStates, mx.array, mx.array], mx.array]

# From the states, a fixed random vector (dims,) float32 and a fixed permutation of the dims: what stands at the last
# token instead, (rows, dims).
KINDS: Mapping[str, Graft] = {
    "zero": lambda states, vector, order: mx.zeros_like(states.last),
    "rand": lambda states, vector, order: vector / _norm(vector) * _norm(states.last),
    "runit": lambda states, vector, order: mx.broadcast_to(vector / _norm(vector), states.last.shape),
    "shuf": lambda states, vector, order: states.last[:, order],
    "bos": lambda states, vector, order: states.first,
    "avg": lambda states, vector, order: states.mean,
    "prev": lambda states, vector, order: states.below,
}
SIX = (GREEDY, "zero", "rand", "runit", "shuf", "bos")  # the chains of R₆


@dataclass(frozen=True)
class Chain:
    """A grafted draft to be made: of a kind, at the output of the block ``place``, with the ``seed`` of its vectors."""

    kind: str
    place: str
    seed: int


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise RsgwmError for a kind that there is not, or that is there twice."""
    known = (GREEDY, *KINDS)
    for kind in kinds:
        if kind not in known:
            near = nearest(kind, known)
            hint = f"; did you mean {near}?" if near else ""
            raise RsgwmError(f"no graft is called {kind!r}{hint} There are {', '.join(known)}")
        if list(kinds).count(kind) > 1:
            raise RsgwmError(f"the graft {kind} is named twice: it would give the same draft twice")


def layer_at(depth: float, layers: int) -> int:
    """The number, from 0, of the layer at ``depth`` of ``layers``: never the last."""
    return min(round(depth * layers), layers - 2)


def grafted_layer(model: Any, layer: int | None) -> str:
    """The full name of the block that is grafted; ``layer`` counts from 0, None takes the one at ``DEPTH``.

    Raises:
        RsgwmError: a layer that the model has not, or a model whose layers cannot be reached.
    """
    try:
        names = block_names(model)
    except (AttributeError, KeyError, TypeError):
        names = []
    if len(names) < 2:
        raise RsgwmError("the model's layers cannot be reached, so no activation in them can be replaced")
    number = layer_at(DEPTH, len(names)) if layer is None else layer
    if not 0 <= number < len(names):
        raise RsgwmError(f"layer {number} is out of range: the model has layers 0 to {len(names) - 1}")
    return names[number]


def grafted_drafts(
    model: Any,
    parts: Parts,
    end_ids: frozenset[int],
    prompts: Sequence[Sequence[int]],
    kinds: Sequence[str] = SIX,
    layer: int | None = None,
    max_tokens: int = Sampling.max_tokens,
    seed: int = 0,
) -> list[list[Draft]]:
    """Of every prompt a draft of each kind, with the adapter that is active; ``parts`` is the model's ``split_head``.

    The drafts have no text yet, their ``kind`` is that of their graft, and their attempts count from 1. Random vectors
    are drawn once for ``seed`` and kind, the same for all questions.

    Raises:
        RsgwmError: unknown or doubled kinds, and as :func:`grafted_layer`.
    """
    check_kinds(kinds)
    place = grafted_layer(model, layer)
    sampling = Sampling(0.0, 1.0, max_tokens, seed)
    if can_batch(model):
        rows = _written(model, parts, end_ids, [list(prompt) for prompt in prompts], kinds, place, sampling, True)
    else:  # a row at a time, through the model's own cache
        rows = [
            row
            for prompt in prompts
            for kind in kinds
            for row in _written(model, parts, end_ids, [list(prompt)], (kind,), place, sampling, False)
        ]
    named = [
        replace(row, attempt=number % len(kinds) + 1, kind=kinds[number % len(kinds)])
        for number, row in enumerate(rows)
    ]
    return [named[start : start + len(kinds)] for start in range(0, len(named), len(kinds))]


def _written(
    model: Any,
    parts: Parts,
    end_ids: frozenset[int],
    prompts: Sequence[Sequence[int]],
    kinds: Sequence[str],
    place: str,
    sampling: Sampling,
    batched: bool,
) -> list[Draft]:
    """Drafts, those of a prompt after one another."""
    hidden, head = parts
    ids, caches, padding = unread(model, prompts, batched)
    before = states_at(model, hidden, ids[:, :-1], caches, place)
    if len(kinds) > 1:
        rows = mx.repeat(mx.arange(len(prompts)), len(kinds))
        for cache in caches:
            cache.filter(rows)
        ids = ids[rows]
    with grafted(model, place, before, padding, kinds, sampling.seed):
        last = hidden(ids[:, -1:], cache=caches)[:, -1]
        mx.eval(last)
    return write_drafts(parts, end_ids, caches, head(last[:, None])[:, 0], sampling)


def states_at(model: Any, hidden: Any, ids: mx.array, caches: Sequence[Any], place: str) -> mx.array | None:
    """Read ids (rows, length); their states (rows, length, dims) at the output of the layer ``place``, None of none."""
    seen: list[mx.array] = []

    def keep(_: str, x: mx.array, y: Any) -> Any:
        seen.append(_state(y))
        return y

    with outputs_changed(model, [place], keep):
        for start in range(0, ids.shape[1], PREFILL_STEP):
            hidden(ids[:, start : start + PREFILL_STEP], cache=caches)
            mx.eval([cache.state for cache in caches], seen)
    return mx.concatenate(seen, axis=1) if seen else None


def grafted(
    model: Any, place: str, before: mx.array | None, padding: Sequence[int], kinds: Sequence[str], seed: int
) -> AbstractContextManager[None]:
    """The hook under which the last tokens of prompts are read, a row for each chain, those of a prompt together: the
    layer ``place`` puts out every chain's graft.

    ``before``: :func:`states_at` of the prompts' other tokens, padded on the left by ``padding``.
    """

    def change(_: str, x: mx.array, y: Any) -> Any:
        given = _state(y)
        chains = given.reshape(-1, len(kinds), given.shape[-1])
        states = _prompt_states(chains[:, 0], x[:: len(kinds), -1], before, padding)
        grafts = [_graft(kind, states, seed) for kind in kinds]
        return _with_state(y, mx.stack(grafts, axis=1).reshape(given.shape).astype(given.dtype))

    return outputs_changed(model, [place], change)


def _prompt_states(last: mx.array, below: mx.array, before: mx.array | None, padding: Sequence[int]) -> PromptStates:
    if before is None:  # a prompt of one token has no other
        return PromptStates(last, below, last, last)
    starts = mx.array(list(padding))
    real = (mx.arange(before.shape[1])[None] >= starts[:, None])[..., None]
    count = mx.maximum(real.sum(axis=1), 1)
    first = mx.where(
        (starts < before.shape[1])[:, None],
        mx.take_along_axis(before, mx.minimum(starts, before.shape[1] - 1)[:, None, None], axis=1)[:, 0],
        last,
    )
    mean = mx.where(real.sum(axis=1) > 0, (before * real).sum(axis=1) / count, last)
    return PromptStates(last, below, first, mean)


def _graft(kind: str, states: PromptStates, seed: int) -> mx.array:
    if kind == GREEDY:
        return states.last
    vector, order = fixed_vectors(kind, states.last.shape[-1], seed)
    return KINDS[kind](states, vector, order)


def fixed_vectors(kind: str, dims: int, seed: int) -> tuple[mx.array, mx.array]:
    """The random vector (dims,) float32 and the permutation (dims,) of a kind and seed: the same for every question."""
    generator = np.random.default_rng([seed, list(KINDS).index(kind)])
    return mx.array(generator.standard_normal(dims).astype(np.float32)), mx.array(generator.permutation(dims))


def _state(output: Any) -> mx.array:
    """What some blocks return is a tuple, of which the state comes first."""
    state: mx.array = output[0] if isinstance(output, tuple) else output
    return state


def _with_state(output: Any, state: mx.array) -> Any:
    return (state, *output[1:]) if isinstance(output, tuple) else state


def graft_many(
    pipeline: DraftVerify,
    questions: Sequence[str],
    kinds: Sequence[str] = SIX,
    layer: int | None = None,
    batch_rows: int = 32,
    progress: Progress = SILENT,
) -> list[list[Draft]]:
    """Of every question a draft of each kind by the pipeline's drafter, ``batch_rows`` of them at a time, with texts.

    Raises:
        RsgwmError: as :func:`grafted_drafts`, and for an empty or too long question.
    """
    sampling, model = pipeline.config.sampling, pipeline.slots.model
    check_kinds(kinds)
    grafted_layer(model, layer)
    prompts = [pipeline.prompt(question) for question in questions]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    drafts: dict[int, list[Draft]] = {}
    step = max(1, batch_rows // len(kinds))
    with progress.task("draft grafted chains", len(questions)) as advance, pipeline.slots.using(pipeline.drafter):
        for start in range(0, len(order), step):
            places = order[start : start + step]
            written = grafted_drafts(
                model,
                pipeline.parts,
                pipeline.end_ids,
                [prompts[place] for place in places],
                kinds,
                layer,
                sampling.max_tokens,
                sampling.seed,
            )
            for place, chains in zip(places, written, strict=True):
                texts = [pipeline.tokenizer.decode(list(chain.tokens)) for chain in chains]
                drafts[place] = [replace(chain, text=text) for chain, text in zip(chains, texts, strict=True)]
            advance(len(places), "")
    return [drafts[index] for index in range(len(questions))]
