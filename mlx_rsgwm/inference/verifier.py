"""What the verifier says of a draft, from one batched forward pass that computes logits only where they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.template import Template, Tokenizer
from mlx_rsgwm.inference.draft import Draft, Signals
from mlx_rsgwm.inference.prefix_cache import CachedPrefixes, LowerLayerCache, after_prompts, remembering, right_padded
from mlx_rsgwm.models.linux_cpu import cross_entropy
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.models.split import LayerSplit, Parts

EMPTY = -1000.0  # nats of a draft without a token, whose probability is taken as 0
LENGTH_STEP = 8
PICK_STEP = 8

VerdictIds = tuple[tuple[int, ...], tuple[int, ...]]
Needs = tuple[bool, bool]  # what to read of a draft: the yes/no verdict, the log-probabilities of its tokens


def signals_of(logprobs: Sequence[float] | None, yesno: float | None) -> Signals:
    """Signals of a draft from its token log-probabilities in nats and the share of yes; None: not asked for."""
    if logprobs is None:
        return Signals(yesno, None, None, 0)
    if not logprobs:
        return Signals(yesno, EMPTY, EMPTY, 0)
    return Signals(yesno, sum(logprobs) / len(logprobs), min(logprobs), len(logprobs))


@dataclass(frozen=True)
class VerifierInput:
    """Token ids of one draft as the verifier reads it.

    ``completion`` is to be predicted after ``prompt``, the drafter's; at the end of ``verdict_prompt`` stands yes or
    no. Either ``completion`` or ``verdict_prompt`` is None when its part is not asked for.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...] | None
    verdict_prompt: tuple[int, ...] | None


def verifier_input(
    template: Template,
    tokenizer: Tokenizer,
    question: str,
    text: str,
    completion: Sequence[int],
    verdict: bool = True,
    logprobs: bool = True,
) -> VerifierInput:
    """What the verifier is to read of the draft ``text``, whose token ids are ``completion``, and of which parts."""
    return VerifierInput(
        tuple(template.draft_prompt(tokenizer, question)),
        tuple(completion) if logprobs else None,
        tuple(template.verify_prompt(tokenizer, question, text.strip())) if verdict else None,
    )


def verdict_ids(template: Template, tokenizer: Tokenizer) -> VerdictIds:
    """Ids of the tokens that say yes and of those that say no.

    The first token of the template's own verdict, and every spelling of the word that is one token: with a space before
    it and without, as written, in lower case, capitalised and in capitals. Their probabilities are summed, so that a
    model is not taken to doubt because it writes "yes" where the template has " Yes". A token that begins both is left
    out of both.
    """
    first_ids = template.verdict_ids(tokenizer)
    spelled = []
    for text, first in zip((template.yes, template.no), first_ids, strict=True):
        word = text.strip()
        spellings = {
            space + form for space in ("", " ") for form in (word, word.lower(), word.upper(), word.capitalize())
        }
        encoded = [tokenizer.encode(spelling, add_special_tokens=False) for spelling in sorted(spellings)]
        spelled.append({first, *(ids[0] for ids in encoded if len(ids) == 1)})
    yes, no = spelled
    shared = (yes & no) - set(first_ids)
    return tuple(sorted(yes - shared - {first_ids[1]})), tuple(sorted(no - shared - {first_ids[0]}))


def read(
    parts: Parts,
    readings: Sequence[VerifierInput],
    verdicts: VerdictIds,
    lower_cache: LowerLayerCache | None = None,
    copies: Sequence[int] = (),
) -> list[Signals]:
    """:func:`read_by_each` for a single verifier."""
    return read_by_each(parts, readings, verdicts, lower_cache, copies)[0]


def read_by_each(
    parts: Parts,
    readings: Sequence[VerifierInput],
    verdicts: VerdictIds,
    lower_cache: LowerLayerCache | None = None,
    copies: Sequence[int] = (),
    adapters: int = 1,
) -> list[list[Signals]]:
    """What each of several adapters says of all readings; ``parts`` are those of ``pool_reader.PoolLayers``.

    One forward pass; mean, minimum and number of token log-probabilities come together. Where the verifying prompt
    begins with the drafting prompt and the draft, as that of a plain template does, both parts are read in one row.
    Rows that ``lower_cache`` knows are not read from the start. With ``copies``, which says of each of the model's
    plain key–value caches how many adapters' rows it keeps, a prompt that several rows begin with is read once.
    """
    rows: list[tuple[int, ...]] = []
    # How many of a row's tokens are the drafting prompt's, its last one left out; 0 where the row begins otherwise.
    starts: list[int] = []
    likelihood: list[tuple[int, int, int]] = []  # row, position, the token that stands next
    verdict: list[tuple[int, int]] = []  # row, position
    for reading in readings:
        written = reading.completion or ()
        draft_row = (*reading.prompt, *written)[:-1]
        shares = reading.verdict_prompt is not None and reading.verdict_prompt[: len(draft_row)] == draft_row
        if written:
            if not shares:
                rows.append(draft_row)
                starts.append(len(reading.prompt) - 1)
            row = len(rows) if shares else len(rows) - 1
            likelihood += [(row, len(reading.prompt) - 1 + index, token) for index, token in enumerate(written)]
        if reading.verdict_prompt is not None:
            rows.append(reading.verdict_prompt)
            begins = reading.verdict_prompt[: len(reading.prompt)] == reading.prompt
            starts.append(len(reading.prompt) - 1 if begins else 0)
            verdict.append((len(rows) - 1, len(reading.verdict_prompt) - 1))
    if not rows:
        return [_signals(readings, [], [])] * adapters
    common = starts if copies and _worth_sharing(rows, starts) else None
    passed = _pass(parts, rows, likelihood, verdict, verdicts, lower_cache, common, copies, adapters)
    return [_signals(readings, logprobs, yes) for logprobs, yes in passed]


def _signals(readings: Sequence[VerifierInput], logprobs: Sequence[float], yes: Sequence[float]) -> list[Signals]:
    """Signals of every reading from what the pass over all of them gave, in their order."""
    signals, at, judged = [], 0, iter(yes)
    for reading in readings:
        answer_logprobs = None
        if reading.completion is not None:
            answer_logprobs = logprobs[at : at + len(reading.completion)]
            at += len(reading.completion)
        signals.append(signals_of(answer_logprobs, next(judged) if reading.verdict_prompt is not None else None))
    return signals


def _stepped(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def _worth_sharing(rows: Sequence[tuple[int, ...]], starts: Sequence[int]) -> bool:
    """Whether, all rows beginning with a prompt, at least a quarter of the prompts are repetitions."""
    if not rows or min(starts) < 1:
        return False
    return len({row[:start] for row, start in zip(rows, starts, strict=True)}) <= 0.75 * len(rows)


def _pass(
    parts: Parts,
    rows: Sequence[tuple[int, ...]],
    likelihood: Sequence[tuple[int, int, int]],
    verdict: Sequence[tuple[int, int]],
    verdicts: VerdictIds,
    lower_cache: LowerLayerCache | None,
    starts: Sequence[int] | None,
    copies: Sequence[int],
    adapters: int,
) -> list[tuple[list[float], list[float]]]:
    """By each adapter: log-probabilities (likelihood entries,), shares of yes (verdict entries,); one pass over
    ``rows``."""
    hidden, head = parts
    # A row by itself is not padded: what is known of its tokens can then be used up to the last.
    longest = max(map(len, rows))
    length = longest if len(rows) == 1 else _stepped(longest)
    states, first = lower_cache(rows, length) if lower_cache is not None else None, [0] * len(rows)
    if states is None and starts is not None:
        states, first = after_prompts(hidden, copies, rows, starts, LENGTH_STEP), list(starts)
    if states is None:
        states = hidden(mx.array(right_padded(rows, length)))
    width = states.shape[1]
    places = [row * width + position - first[row] for row, position, *_ in [*likelihood, *verdict]]
    # Few shapes, so that little is compiled.
    picks = np.zeros(-(-len(places) // PICK_STEP) * PICK_STEP, dtype=np.int32)
    picks[: len(places)] = places
    of_each = np.concatenate([picks + adapter * len(rows) * width for adapter in range(adapters)])
    logits = head(states.reshape(-1, states.shape[-1])[mx.array(of_each)]).astype(mx.float32)
    targets = mx.array(np.array([token for _, _, token in likelihood], dtype=np.int32))
    passed: Any = []
    for adapter in range(adapters):
        at = adapter * len(picks)
        logprobs: Any = []
        yes: Any = []
        if likelihood:
            logprobs = (-cross_entropy(logits[at : at + len(likelihood)], targets)).tolist()
        if verdict:
            said = logits[at + len(likelihood) : at + len(places)]
            yes_mass, no_mass = (mx.logsumexp(said[:, mx.array(ids)], axis=-1) for ids in verdicts)
            yes = mx.sigmoid(yes_mass - no_mass).tolist()
        passed.append((logprobs, yes))
    return passed


class Reader:
    """The verifier at work: the adapter in a slot (None: the bare base), reading drafts in its own template.

    ``caches``: how many plain key–value caches the model keeps, None where it keeps others. ``adapters``: one here,
    several where a pool reads (:class:`~mlx_rsgwm.inference.pool_reader.PoolReader`).
    """

    def __init__(
        self,
        slots: AdapterSlots,
        adapters: Sequence[str | None],
        template: Template,
        parts: Parts,
        caches: int | None,
    ) -> None:
        self.parts = parts
        self.adapters = tuple(adapters)
        self.verdict_ids = verdict_ids(template, slots.base.tokenizer)
        self._slots, self._template, self._caches = slots, template, caches
        self._tokenizer = slots.base.tokenizer

    def prompt(self, question: str) -> list[int]:
        """The token ids with which the reading of a draft begins."""
        return self._template.draft_prompt(self._tokenizer, question)

    def remembering(self, question: str) -> tuple[list[int], Parts]:
        """:meth:`prompt`, and the parts with which drafts after it are read: the prompt once."""
        prompt = self.prompt(question)
        return prompt, (remembering(self._slots.model, self.parts[0], prompt), self.parts[1])

    def lower_cache(self, split: LayerSplit, prefixes: CachedPrefixes | None, prompt: Sequence[int]) -> LowerLayerCache:
        """What reads on where the drafter's lower layers, those of ``split``, have read."""
        return LowerLayerCache(self._slots.model, split, prefixes, prompt)

    def _read(
        self, readings: Sequence[VerifierInput], parts: Parts | None, lower_cache: LowerLayerCache | None
    ) -> list[Signals]:
        with self._slots.using(self.adapters[0]):
            if parts is not None:
                return read(parts, readings, self.verdict_ids, lower_cache)
            return read(self.parts, readings, self.verdict_ids, lower_cache, [1] * (self._caches or 0))

    def signals(
        self,
        questions: Sequence[str],
        drafts: Sequence[Draft],
        needs: Needs = (True, True),
        parts: Parts | None = None,
        lower_cache: LowerLayerCache | None = None,
    ) -> list[Signals]:
        """What the verifier says of (question, draft) pairs, all in one forward pass.

        ``parts`` of :meth:`remembering`; what ``lower_cache`` knows is not read again.
        """
        # A draft that ended by itself also chose to end; one that was cut off did not.
        end = () if self._tokenizer.eos_token_id is None else (self._tokenizer.eos_token_id,)
        template, tokenizer = self._template, self._tokenizer
        readings = [
            verifier_input(
                template, tokenizer, question, draft.text, draft.tokens + (end if draft.finished else ()), *needs
            )
            for question, draft in zip(questions, drafts, strict=True)
        ]
        return self._read(readings, parts, lower_cache)

    def signals_many(
        self,
        questions: Sequence[str],
        drafts: Sequence[Draft],
        needs: Needs = (True, True),
        batch_rows: int = 32,
        progress: Progress = SILENT,
        lower_cache: LowerLayerCache | None = None,
    ) -> list[Signals]:
        """:meth:`signals` in batches of like questions; equal pairs are read once, and so are prompts of a batch.

        A batch has ``batch_rows`` drafts, or so many rows that as many adapters read.
        """
        size = max(1, batch_rows // len(self.adapters))
        pairs = [(question, draft.content) for question, draft in zip(questions, drafts, strict=True)]
        first = {pair: index for index, pair in reversed([*enumerate(pairs)])}
        order = sorted(
            set(first.values()), key=lambda index: (len(questions[index]), questions[index], len(drafts[index].tokens))
        )
        signals: dict[int, Signals] = {}
        with progress.task("verify", len(order)) as advance:
            for start in range(0, len(order), size):
                chunk = order[start : start + size]
                texts, chosen = [questions[index] for index in chunk], [drafts[index] for index in chunk]
                signals.update(zip(chunk, self.signals(texts, chosen, needs, lower_cache=lower_cache), strict=True))
                advance(len(chunk), "")
        return [signals[first[pair]] for pair in pairs]
