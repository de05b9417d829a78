"""Where the prompts of a run's own questions lie in the bare base, read once when training is done.

No step is slower for it. See :mod:`mlx_rsgwm.models.prompt_statistics` for what is kept and what is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.corpus import Corpus
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.prompt_states import BATCH_ROWS, StateReader, depth_of
from mlx_rsgwm.models.prompt_statistics import PromptStatistics
from mlx_rsgwm.training.config import TrainConfig

SAMPLE = 64  # questions that are read


def sample_prompts(base: Base, corpus: Corpus, config: TrainConfig) -> list[list[int]]:
    """Token ids of at most 64 different questions as a drafter is asked them, drawn by the run's seed.

    Those are left out that training leaves out as too long.
    """
    questions = list(dict.fromkeys(row.question for row in corpus.rows))
    prompts: list[list[int]] = []
    for index in np.random.default_rng(config.seed).permutation(len(questions)):
        prompt = corpus.template.draft_prompt(base.tokenizer, questions[index])
        if len(prompt) <= config.max_tokens:
            prompts.append(prompt)
        if len(prompts) == SAMPLE:
            break
    return prompts


def prompt_statistics(base: Base, corpus: Corpus, config: TrainConfig) -> PromptStatistics:
    """Mean and covariance of the states of :func:`sample_prompts` where a router takes them.

    Raises:
        RsgwmError: too few questions, states that are not finite, a base whose layers cannot be reached one by one.
    """
    layer = depth_of(base)
    prompts = sample_prompts(base, corpus, config)
    if not prompts:
        raise RsgwmError(f"no question has at most {config.max_tokens} tokens")
    # No more rows at a time than training had room for.
    states = StateReader(base, layer, min(BATCH_ROWS, config.batch_size)).states(prompts)
    return PromptStatistics.of_states(states, layer, base.fingerprint, corpus.template.hash)


def prompt_fields(base: Base, data: Any, config: TrainConfig, tell: Callable[[str], None]) -> dict[str, Any]:
    """The fields of an adapter that hold :func:`prompt_statistics` of ``data``, empty where it is no corpus.

    So they are after all rounds but the last. What cannot be read costs no adapter: it is told.
    """
    if not isinstance(data, Corpus) or (config.rounds and not config.rounds.last):
        return {}
    try:
        statistics = prompt_statistics(base, data, config)
    except RsgwmError as error:
        tell(f"no prompt states are kept to route by: {error}")
        return {}
    return {"prompt_states": statistics.arrays(), "prompt_states_metadata": statistics.metadata()}
