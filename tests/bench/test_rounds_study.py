"""What the study of rounds compares: the same questions by joint training, one-shot merges and rounds."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_rsgwm.bench.rounds_study import JOINT, ONCE, compared
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.studies.merge_sweep import Measured, Outcome


def measured(rights, seed):
    """A run of 20 questions of two tasks, by name what was answered rightly."""
    questions = tuple(Question(f"{seed}-{i}", "a" if i < 10 else "b", f"{seed} {i}?", "", "1") for i in range(20))
    outcomes = [Outcome(name, "merge", drafts=tuple(("", bool(ok)) for ok in right)) for name, right in rights.items()]
    return Measured(questions, (), tuple(outcomes))


def test_shares_of_joint_training_are_of_the_same_questions():
    rng = np.random.default_rng(0)
    joint = [rng.random(20) < 0.9 for _ in range(3)]
    once = [rng.random(20) < 0.5 for _ in range(3)]
    rounds = [right & (rng.random(20) < 0.95) for right in joint]
    told = compared(
        {
            ONCE: [measured({"linear": once[s], JOINT: joint[s]}, s) for s in range(3)],
            "mean-2": [measured({"linear": rounds[s], "ties": joint[s]}, s) for s in range(3)],
        }
    )
    assert told[ONCE][JOINT]["of_joint"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 60}
    assert told["mean-2"]["ties"]["of_joint"]["value"] == 1.0
    assert "over_once" not in told["mean-2"]["ties"]
    share = told["mean-2"]["linear"]["of_joint"]
    assert share["value"] == pytest.approx(np.mean(rounds) / np.mean(joint))
    assert share["low"] < share["value"] < share["high"] <= 1.0  # paired: what joint training misses rounds miss, too
    over = told["mean-2"]["linear"]["over_once"]
    assert over["difference"] == pytest.approx(np.mean(rounds) - np.mean(once))
    assert over["low"] > 0
