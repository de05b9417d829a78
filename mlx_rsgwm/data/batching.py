"""Rows to batches: bucketed by length, one role a batch, little padding, every row used once an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.data.row_hashes import RowKeys

ROLES = ("draft", "verify")
NO_KEYS = RowKeys()


@dataclass(frozen=True)
class TokenRow:
    """One training row: token ids of prompt and completion, and how many of them are prompt (at least 1).

    ``id`` names the row to people; ``cut`` says that its end was left out to fit. ``untrained`` are positions behind
    the prompt that are not trained: what others say between the assistant's turns. ``notes`` say what a chat template
    left out of the row or what was changed for it. ``keys`` are what the row is recognised by elsewhere.
    """

    role: str
    tokens: tuple[int, ...]
    prompt_length: int
    id: str = ""
    cut: bool = False
    untrained: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    keys: RowKeys = NO_KEYS

    @property
    def trained_tokens(self) -> int:
        """How many tokens the loss is taken of."""
        return len(self.tokens) - self.prompt_length - len(self.untrained)

    def trained_positions(self) -> np.ndarray:
        """Positions (n,) of the trained tokens in the row, ascending integers."""
        positions = np.arange(self.prompt_length, len(self.tokens))
        return np.setdiff1d(positions, self.untrained, assume_unique=True) if self.untrained else positions


def row_notes(rows: Sequence[TokenRow]) -> list[str]:
    """What the notes of ``rows`` say, each once, with the lines of the rows that it is said of (``1-3, 7``)."""
    lines: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        file, _, line = row.id.rpartition(":")
        for note in row.notes:
            lines.setdefault((note, file), []).append(int(line))
    return [
        f"{note} ({len(at)} of {len(rows)} rows: {file} line{'s' * (len(at) > 1)} {_ranges(at)})"
        for (note, file), at in lines.items()
    ]


def tell_rows(rows: Sequence[TokenRow], dropped: int, max_tokens: int, progress: Progress) -> None:
    """Say what is odd about the rows of one pass over data, and how many rows the pass leaves out."""
    for note in row_notes(rows):
        progress.message(note)
    if dropped:
        progress.message(f"{dropped} of {len(rows) + dropped} rows have more than {max_tokens} tokens and are left out")


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


@dataclass(frozen=True)
class Batch:
    """Model inputs and the positions whose next token is trained.

    ``inputs`` (rows, length) int32, right-padded with 0; ``positions`` (targets,) int32 into the flattened inputs;
    ``targets`` (targets,) int32; ``weights`` (targets,) float32, 0 for entries that only round the count up.
    Padding is never an input position that is trained: causal attention keeps it from every real one.
    """

    role: str
    inputs: mx.array
    positions: mx.array
    targets: mx.array
    weights: mx.array
    real_tokens: int
    trained_tokens: int

    @property
    def padded_tokens(self) -> int:
        """Cells of ``inputs`` that hold padding."""
        return self.inputs.size - self.real_tokens


def make_batch(rows: Sequence[TokenRow], length_step: int = 8, target_step: int = 32) -> Batch:
    """Pad rows of one role to a batch; lengths round up to ``length_step`` so that few shapes occur."""
    longest = max(len(row.tokens) for row in rows) - 1
    length = -(-longest // length_step) * length_step
    inputs = np.zeros((len(rows), length), dtype=np.int32)
    positions, targets = [], []
    for index, row in enumerate(rows):
        tokens = np.asarray(row.tokens, dtype=np.int32)
        inputs[index, : len(tokens) - 1] = tokens[:-1]
        # Position p predicts token p + 1, so the first trained position is the prompt's last token.
        trained = row.trained_positions()
        positions.append(index * length + trained - 1)
        targets.append(tokens[trained])
    flat_positions, flat_targets = np.concatenate(positions), np.concatenate(targets)
    count = len(flat_targets)
    padded = -(-count // target_step) * target_step
    weights = np.zeros(padded, dtype=np.float32)
    weights[:count] = 1.0
    return Batch(
        role=rows[0].role,
        inputs=mx.array(inputs),
        positions=mx.array(np.pad(flat_positions, (0, padded - count)).astype(np.int32)),
        targets=mx.array(np.pad(flat_targets, (0, padded - count)).astype(np.int32)),
        weights=mx.array(weights),
        real_tokens=sum(len(row.tokens) - 1 for row in rows),
        trained_tokens=count,
    )


def plan_steps(rows: Sequence[TokenRow], batch_size: int, seed: int, epochs: int, steps: int = 0) -> list[list[int]]:
    """The batches of a whole run: of ``epochs``, or of as many as ``steps`` above 0 need."""
    plan: list[list[int]] = []
    epoch = 0
    while len(plan) < steps or (not steps and epoch < epochs):
        plan += plan_epoch(rows, batch_size, seed, epoch)
        epoch += 1
    return plan[:steps] if steps else plan


def plan_epoch(rows: Sequence[TokenRow], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of the rows of every batch of one epoch, in training order.

    Rows of one role are shuffled, sorted by length (so equal lengths meet differently each epoch), cut into batches,
    and the batches of all roles shuffled together. The last batch of a role may be smaller; no row is dropped.
    """
    rng = np.random.default_rng([seed, epoch])
    batches: list[list[int]] = []
    for role in ROLES:
        indices = np.array([index for index, row in enumerate(rows) if row.role == role], dtype=np.int64)
        indices = rng.permutation(indices)
        lengths = np.array([len(rows[index].tokens) for index in indices])
        ordered = indices[np.argsort(lengths, kind="stable")] if len(indices) else indices
        batches += [ordered[start : start + batch_size].tolist() for start in range(0, len(ordered), batch_size)]
    return [batches[index] for index in rng.permutation(len(batches))]
