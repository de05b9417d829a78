"""Rows of several lengths in one batch: every architecture drafts the same as each row by itself, or row by row."""

from __future__ import annotations

import pytest

from mlx_rsgwm.bench.architectures import save_model
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.inference.generate import DraftRequest, draft
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.row_batches import can_batch
from mlx_rsgwm.models.split import split_head

PROMPTS = ([7, 9, 11, 40, 41, 42, 3], [5, 6, 90, 91], [8, 77, 21, 22, 23, 24, 25, 26, 27, 28])
# Whether padded rows give what mlx-lm 0.32.2 gives of each by itself.
BATCHES = {
    "llama": True, "qwen2": True, "qwen3": True, "qwen3_moe": True, "phi3": True, "gemma": True, "smollm3": True,
    "gemma2": False, "gpt_bigcode": False, "ministral3": False,
    "gemma3_text": False, "lfm2": False,  # other caches
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_drafts_in_a_batch_are_those_of_each_row(name, tmp_path):
    save_model(name, tmp_path)
    model = load_base(str(tmp_path), dtype="float32").model
    parts, requests = split_head(model), [DraftRequest(tuple(prompt), "q", 1) for prompt in PROMPTS]

    def drafted(rows):
        return draft(model, parts, frozenset({0}), rows, Sampling(0.0, 1.0, 6))

    assert drafted(requests) == [row for request in requests for row in drafted([request])]
    assert can_batch(model) is BATCHES[name]


def test_a_model_that_mlx_lm_makes_wrongly_is_one_line(tmp_path):
    save_model("recurrent_gemma", tmp_path)
    with pytest.raises(RsgwmError, match="cannot be loaded by mlx-lm"):
        load_base(str(tmp_path), dtype="float32")
