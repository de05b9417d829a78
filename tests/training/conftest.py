"""What the training tests share: a small corpus with both roles, settings for the tiny base, and a run's files."""

import pytest

from mlx_rsgwm.data.corpus import make_rows, save_corpus
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.training.config import TrainConfig


@pytest.fixture
def corpus(tmp_path):
    """13 draft and 10 verify rows."""
    rows = make_rows(generate("change", 13, 1, "train"), 13, 10, 1)
    return save_corpus(tmp_path / "corpus", rows, TEMPLATES["plain"], {"seed": 1})


@pytest.fixture
def config():
    """Makes settings: ``config(clip=1.0)``. 13 + 10 rows in batches of 4 are 7 steps an epoch."""

    def make(**changes):
        defaults = {
            "rank": 4,
            "alpha": 8.0,
            "keys": ("self_attn.q_proj", "self_attn.v_proj"),
            "batch_size": 4,
            "epochs": 1,
            "dropout": 0.0,
        }
        return TrainConfig(**{**defaults, **changes})

    return make
