"""What the tests of rounds share: three small tasks, settings for the tiny base, a run, the command."""

import sys

from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.data.corpus import make_rows, save_corpus
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.merging.alternate import train_rounds
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.pool import Member

NAMES = ("change", "groups", "prices")
RSGWM = (sys.executable, "-c", "from mlx_rsgwm.cli.main import main; main()")


def settings(rounds, **changes):
    defaults = {
        "rank": 4, "alpha": 8.0, "keys": ("self_attn.q_proj", "self_attn.v_proj"), "batch_size": 4, "epochs": 1,
        "learning_rate": 1e-2, "directions": 4, "dropout": 0.1, "rounds": rounds,
    }  # fmt: skip
    return TrainConfig(**{**defaults, **changes})


def make_members(folder):
    """Three tasks of 16 draft and 8 verify rows: 6 steps an epoch in batches of 4."""
    made = []
    for seed, name in enumerate(NAMES):
        rows = make_rows(generate(name, 16, seed, "train"), 16, 8, seed)
        made.append(Member(name, save_corpus(folder / "corpus" / name, rows, TEMPLATES["plain"], {"seed": seed})))
    return made


def run(base, members, config, folder, progress=None, resume="continue", every=1):
    saving = Saving(folder, every=every, resume=resume, snapshots=())
    return train_rounds(base, NAMES, members, config, saving, progress=progress or Progress())
