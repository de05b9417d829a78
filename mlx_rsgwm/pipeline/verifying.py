"""Scores of a draft in [0, 1], from one batched forward pass that computes logits only where they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_rsgwm.cpu import cross_entropy
from mlx_rsgwm.data.batching import TokenRow, make_batch
from mlx_rsgwm.logits import Parts

SCORES = ("yesno", "mean_logprob")


def mean_logprob(parts: Parts, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
    """exp(mean token log-probability of the completion given the prompt), one number in (0, 1] a row.

    The literal reading of the paper's "log-probability score in [0, 1]" (SPEC 6.7, 9). An empty completion scores 0.
    """
    filled = [row for row, completion in enumerate(completions) if len(completion)]
    scores = [0.0] * len(completions)
    if not filled:
        return scores
    rows = [TokenRow("draft", (*prompts[row], *completions[row]), len(prompts[row])) for row in filled]
    batch = make_batch(rows)
    hidden, head = parts
    states = hidden(batch.inputs)
    picked = states.reshape(-1, states.shape[-1])[batch.positions]
    loss = cross_entropy(head(picked).astype(mx.float32), batch.targets) * batch.weights
    owner = batch.positions // batch.inputs.shape[1]
    total = mx.zeros(len(rows)).at[owner].add(loss)
    lengths = mx.array([len(completions[row]) for row in filled])
    found: Any = mx.exp(-total / lengths).tolist()
    for row, score in zip(filled, found, strict=True):
        scores[row] = score
    return scores


def yesno(parts: Parts, prompts: Sequence[Sequence[int]], verdict_ids: tuple[int, int]) -> list[float]:
    """P(yes) / (P(yes) + P(no)) at the end of each verifying prompt."""
    rows = [TokenRow("verify", (*prompt, 0), len(prompt)) for prompt in prompts]
    batch = make_batch(rows, target_step=1)
    hidden, head = parts
    states = hidden(batch.inputs)
    picked = states.reshape(-1, states.shape[-1])[batch.positions]
    logits = head(picked).astype(mx.float32)
    scores: Any = mx.sigmoid(logits[:, verdict_ids[0]] - logits[:, verdict_ids[1]]).tolist()
    return scores
