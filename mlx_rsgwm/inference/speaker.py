"""One voice and no verifier: an adapter on its base, or the base alone, token by token and over several turns.

Generation is mlx-lm's, one step ahead of what is shown. What a turn has in common with the one before (the whole
conversation, as a rule) is not read again. Tokens are drawn as drafts are (:mod:`~mlx_rsgwm.inference.sampling`), so a
question alone and one of a file get the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.template import Template, bare_template, find_template
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.open import load_base_for, slots_of
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.sampling import Sampling, choose, choose_exact, uniforms
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapter
from mlx_rsgwm.models.slots import AdapterSlots

ADAPTER = "adapter"  # its slot
Exchange = tuple[str, str]  # a question and its answer


class Speaker:
    """What answers alone. ``loop`` is it as a pipeline that drafts, for many questions at a time."""

    def __init__(self, slots: AdapterSlots, template: Template, sampling: Sampling) -> None:
        self.slots, self.template, self.sampling = slots, template, sampling
        self.tokenizer = slots.base.tokenizer
        config = LoopConfig(attempts=1, sampling=sampling)
        self.loop = DraftVerify(slots, template, self._name, None, config, on_mismatch="warn", calibration=None)
        self._cache: list[Any] = []
        self._read: tuple[int, ...] = ()  # what the cache holds, as far as it is known

    @property
    def _name(self) -> str | None:
        return ADAPTER if ADAPTER in self.slots.names() else None

    @property
    def name(self) -> str:
        """What speaks: the adapter, or the base."""
        return self.slots.adapter(ADAPTER).where if self._name else self.slots.base.name

    def say(self, question: str, before: Sequence[Exchange] = ()) -> Iterator[str]:
        """The answer in pieces of text, as they come; closing the iterator stops it.

        Raises:
            RsgwmError: the question is empty, or with what was said before it is longer than the model reads.
        """
        prompt = self._prompt(question, before)
        detokenizer = self.tokenizer.detokenizer
        with self.slots.using(self._name):
            for token in self._tokens(prompt, question):
                detokenizer.add_token(token)
                if piece := detokenizer.last_segment:
                    yield piece
        detokenizer.finalize()
        if piece := detokenizer.last_segment:
            yield piece

    def _prompt(self, question: str, before: Sequence[Exchange]) -> tuple[int, ...]:
        if not question.strip():
            raise RsgwmError("the question is empty")
        prompt = self.template.turn_prompt(self.tokenizer, before, question)
        about, remedy = "the question", "shorten it or lower --max-tokens"
        if before:
            about, remedy = "the conversation", f"begin a new one (/clear), {remedy}"
        return self.slots.base.fitting_prompt(prompt, self.sampling.max_tokens, about, remedy)

    def _tokens(self, prompt: tuple[int, ...], question: str) -> Iterator[int]:
        from mlx_lm.generate import generate_step, generation_stream, wired_limit

        rest = self._continued(prompt)
        written: list[int] = []
        self._read = ()  # until this turn has ended as it should
        streams: Any = [generation_stream]
        with wired_limit(self.slots.model, streams):
            for token, _ in generate_step(
                mx.array(rest),
                self.slots.model,
                max_tokens=self.sampling.max_tokens,
                sampler=self._sampler(question),
                prompt_cache=self._cache,
            ):
                if int(token) in self.loop.end_ids:
                    break
                written.append(int(token))
                yield written[-1]
        self._read = (*prompt, *written)

    def _continued(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """What of a prompt is still to be read, once the cache holds the rest of it and nothing more."""
        pairs = zip(self._read, prompt[:-1], strict=False)
        same = next((index for index, (held, asked) in enumerate(pairs) if held != asked), None)
        if same is None:
            same = min(len(self._read), len(prompt) - 1)
        if same and can_trim_prompt_cache(self._cache):
            same = min(same, self._cache[0].offset)
            trim_prompt_cache(self._cache, self._cache[0].offset - same)
            return prompt[same:]
        self._cache = make_prompt_cache(self.slots.model)
        return prompt

    def _sampler(self, question: str) -> Callable[[mx.array], mx.array]:
        sampling = self.sampling
        if sampling.temperature == 0:
            return lambda logprobs: mx.argmax(logprobs, axis=-1)
        stream = iter(uniforms(sampling.seed, question, 1, sampling.max_tokens + 1))

        def sample(logprobs: mx.array) -> mx.array:
            uniform = mx.array([float(next(stream))])
            tokens, certain = choose(logprobs, uniform, sampling.temperature, sampling.top_p)
            if not mx.all(certain).item():
                tokens = choose_exact(logprobs, uniform, sampling.temperature, sampling.top_p)
            return tokens

        return sample

    def with_adapter(self, source: AdapterSource | None, progress: Progress = SILENT) -> Speaker:
        """The same base with another adapter, or with none.

        Raises:
            AdapterError: it cannot be read, or does not fit; this speaker stays as it was.
        """
        base = self.slots.base
        adapter = None if source is None else load_adapter(source, base.name, progress=progress)
        template = spoken_template(adapter, base.tokenizer, None, self.template.system)
        if adapter is None:
            return Speaker(slots_of(base, {}), template, self.sampling)
        self.slots.load(ADAPTER, adapter)
        return Speaker(self.slots, template, self.sampling)


def spoken_template(adapter: Adapter | None, tokenizer: Any, given: str | None, system: str) -> Template:
    """The template ``given``, else the adapter's, else the model's own chat template; with the ``system`` message.

    Raises:
        RsgwmError: a system message, and no chat template that has a place for it.
    """
    recorded = adapter.manifest.get("template") if adapter is not None else None
    if given is not None:
        template = find_template(given)
    elif recorded:
        template = Template.from_description(recorded)
    else:
        template = bare_template(chat=bool(tokenizer.has_chat_template))
    if not system:
        return template
    if not template.chat:
        why = f"the template {template.name!r} has none" if template.name != "own" else "this model has none"
        raise RsgwmError(
            f"a system message needs a chat template, and {why}; leave out --system, or use --template chat"
        )
    return Template(**{**vars(template), "system": system})


def open_speaker(
    adapter: AdapterSource | None = None,
    base: str | Path | None = None,
    *,
    template: str | None = None,
    system: str = "",
    temperature: float = Sampling.temperature,
    top_p: float = Sampling.top_p,
    max_tokens: int = Sampling.max_tokens,
    seed: int = Sampling.seed,
    progress: Progress = SILENT,
) -> Speaker:
    """An adapter on the base that it records (or ``base``), or a base alone, ready to answer.

    Raises:
        AdapterError: an adapter that cannot be read or does not fit the base.
        RsgwmError: no base, a base that is not the adapter's, settings out of range, a system message without a place.
    """
    sampling = Sampling(temperature, top_p, max_tokens, seed)
    name = None if base is None else str(base)
    loaded = {} if adapter is None else {ADAPTER: load_adapter(adapter, name, progress=progress)}
    resident = load_base_for([*loaded.values()], name, progress)
    spoken = spoken_template(loaded.get(ADAPTER), resident.tokenizer, template, system)
    return Speaker(slots_of(resident, loaded), spoken, sampling)
