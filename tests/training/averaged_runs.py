"""What the tests of averages share: a run's numbers, weights by a transcription, the command."""

import json
import math

import mlx.core as mx
import numpy as np
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.training.checkpoints import checkpoint_folders


def reference_weights(values, penalty, power, newest_first=False):
    """Position by sorting, ties by the mean of their positions: a transcription in plain Python."""
    order = sorted(values, reverse=newest_first)
    positions = [sum(i for i, other in enumerate(order) if other == value) / order.count(value) for value in values]
    if newest_first:
        raw = [penalty**rank * (value / max(values)) ** power for rank, value in zip(positions, values, strict=True)]
    else:
        raw = [penalty**rank * (1 / max(value, 1e-8)) ** power for rank, value in zip(positions, values, strict=True)]
    return [weight / math.fsum(raw) for weight in raw]


def numbers(folder):
    """Every checkpoint's arrays in float64 by name, oldest first, and their recorded training losses."""
    folders = checkpoint_folders(folder)[::-1]
    arrays = [
        {
            **{
                name: np.array(value, dtype=np.float64)
                for name, value in mx.load(str(path / "adapters.safetensors")).items()
            },
            **{
                name: np.array(value, dtype=np.float64)
                for name, value in mx.load(str(path / "importance.safetensors")).items()
            },
        }
        for path in folders
    ]
    losses = [json.loads((path / "manifest.json").read_text())["record"]["train_loss_window"] for path in folders]
    return arrays, losses


def invoke(*arguments):
    return CliRunner().invoke(rsgwm, [str(argument) for argument in arguments])
