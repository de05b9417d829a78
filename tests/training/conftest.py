"""What the training tests share: a small corpus with both roles, settings for the tiny base, and a run's files."""

import pytest

from mlx_rsgwm.data.corpus import make_rows, save_corpus
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.loop import finish, train


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


@pytest.fixture
def run(base, corpus, config, tmp_path):
    """A finished run of 14 steps with checkpoints 2, 4, …, 14."""
    saving = Saving(tmp_path / "run", every=2, keep=20, snapshots=())
    settings = config(epochs=2, learning_rate=1e-2, dropout=0.1, directions=4)
    finish(train(base, corpus, settings, saving=saving), saving)
    return saving.folder
