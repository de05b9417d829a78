"""What one adapter, or the bare base, does on fixed items: greedy drafts, loss of gold, scores of labelled answers.

Made for many adapters in turn on the same items, where most of them write much the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.batching import TokenRow, make_batch
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.inference.draft import Draft, Signals
from mlx_rsgwm.inference.generate import DraftRequest, draft
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.inference.verifier import VerifierInput, read, verdict_ids
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.linux_cpu import cross_entropy
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.models.split import Parts, split_head

JUDGED_BY = ("mean_logprob", "yesno")  # the scores that need no fitting


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer to judge: index of its question, where it comes from (gold, perturbed, draft), whether it is right.

    ``tokens`` end with the end-of-text token, unless the token limit cut the draft.
    """

    question: int
    kind: str
    text: str
    tokens: tuple[int, ...]
    correct: bool


class Meter:
    """Items and template on one base, with slots for the adapters to be measured (None: the bare base).

    ``prompts`` and ``completions`` are the token ids of every question and of its gold answer, end of text included.
    """

    def __init__(
        self, slots: AdapterSlots, questions: Sequence[Question], template: Template, max_tokens: int, batch_rows: int
    ) -> None:
        tokenizer = slots.base.tokenizer
        self.slots = slots
        self.template = template
        self.tokenizer = tokenizer
        self.texts = [question.question for question in questions]
        self.prompts = [tuple(template.draft_prompt(tokenizer, text)) for text in self.texts]
        self.completions = [tuple(template.completion(tokenizer, question.answer)) for question in questions]
        self.max_tokens = max_tokens or 2 * max(map(len, self.completions))
        self.batch_rows = batch_rows
        self._parts = split_head(slots.model)
        self._end_ids = frozenset({*tokenizer.eos_token_ids, tokenizer.eos_token_id})
        self._verdicts = verdict_ids(template, tokenizer)

    def load(self, slot: str, adapter: Adapter) -> None:
        """Put an adapter into a slot; RsgwmError if it was trained with another template."""
        template = self.template
        if adapter.template_hash not in (None, template.hash):
            raise RsgwmError(
                f"{adapter.where} was trained with another prompt template than {template.name!r} "
                f"({adapter.template_hash[:12]} against {template.hash[:12]}); use the template in its manifest"
            )
        self.slots.load(slot, adapter)

    def drafts(self, slot: str | None) -> tuple[list[Draft], list[float]]:
        """A greedy draft of every question, and the nats of its gold completion.

        One pass over the gold completions gives their loss, and where the drafter would have written another token:
        up to there its draft is known. Only what follows is drafted token by token.
        """
        greedy = Sampling(0.0, 1.0, self.max_tokens, 0)
        drafts: dict[int, Draft] = {}
        begun: dict[int, tuple[int, ...]] = {}
        nats = [0.0] * len(self.texts)
        for indices in self._batches([len(p) + len(c) for p, c in zip(self.prompts, self.completions, strict=True)]):
            with self.slots.using(slot):
                pairs = [(self.prompts[index], self.completions[index]) for index in indices]
                followed = follow(self._parts, pairs)
            for index, (nats[index], choices) in zip(indices, followed, strict=True):
                prefix = _until_it_differs(self.completions[index], choices)
                ended = prefix[-1] in self._end_ids
                known = prefix[:-1] if ended else prefix
                if ended or len(known) >= self.max_tokens:
                    drafts[index] = Draft(1, known[: self.max_tokens], ended and len(known) < self.max_tokens)
                else:
                    begun[index] = known
        rest = self.written(slot, {index: self.prompts[index] + known for index, known in begun.items()}, greedy)
        for index, known in begun.items():
            tokens = known + rest[index].tokens
            finished = rest[index].finished and len(tokens) < self.max_tokens
            drafts[index] = Draft(1, tokens[: self.max_tokens], finished)
        return [drafts[index] for index in range(len(self.texts))], nats

    def written(self, slot: str | None, prompts: Mapping[int, tuple[int, ...]], sampling: Sampling) -> dict[int, Draft]:
        """Drafts that go on from ``prompts``, by index of the question."""
        drafts: dict[int, Draft] = {}
        places = list(prompts)
        for rows in self._batches([len(prompts[index]) for index in places]):
            indices = [places[row] for row in rows]
            requests = [DraftRequest(prompts[index], self.texts[index], 1) for index in indices]
            with self.slots.using(slot):
                drafted = draft(self.slots.model, self._parts, self._end_ids, requests, sampling)
            drafts.update(zip(indices, drafted, strict=True))
        return drafts

    def scores(self, slot: str | None, answers: Sequence[LabelledAnswer]) -> dict[str, tuple[float, ...]]:
        """Every score of every labelled answer; equal answers to a question are read once."""
        template, tokenizer = self.template, self.tokenizer
        first = {(answer.question, answer.tokens): answer for answer in reversed(answers)}
        readings = [
            VerifierInput(
                self.prompts[answer.question],
                answer.tokens,
                tuple(template.verify_prompt(tokenizer, self.texts[answer.question], answer.text.strip())),
            )
            for answer in first.values()
        ]
        by_answer: dict[tuple[int, tuple[int, ...]], Signals] = {}
        keys = list(first)
        for rows in self._batches([len(reading.verdict_prompt or ()) for reading in readings]):
            with self.slots.using(slot):
                signals = read(self._parts, [readings[row] for row in rows], self._verdicts)
            by_answer.update(zip((keys[row] for row in rows), signals, strict=True))
        each = [by_answer[answer.question, answer.tokens] for answer in answers]
        return {score: tuple(float(getattr(signal, score) or 0.0) for signal in each) for score in JUDGED_BY}

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Positions of rows of like length, ``batch_rows`` at a time."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for start in range(0, len(order), self.batch_rows):
            yield order[start : start + self.batch_rows]


def _until_it_differs(gold: Sequence[int], choices: Sequence[int]) -> tuple[int, ...]:
    """The tokens that a greedy drafter writes along ``gold``, the first that differs included."""
    same = next((place for place, pair in enumerate(zip(gold, choices, strict=True)) if pair[0] != pair[1]), None)
    return tuple(choices if same is None else choices[: same + 1])


def follow(
    parts: Parts, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[tuple[float, tuple[int, ...]]]:
    """For (prompt, completion) rows: nats of the completion, and the likeliest token at each of its places."""
    batch = make_batch([TokenRow("draft", prompt + completion, len(prompt)) for prompt, completion in rows])
    hidden, head = parts
    states = hidden(batch.inputs)
    logits = head(states.reshape(-1, states.shape[-1])[batch.positions]).astype(mx.float32)
    losses: Any = cross_entropy(logits, batch.targets).tolist()
    choices: Any = mx.argmax(logits, axis=-1).tolist()
    stretches, at = [], 0
    for _, completion in rows:
        stop = at + len(completion)
        stretches.append((sum(losses[at:stop]), tuple(choices[at:stop])))
        at = stop
    return stretches
