"""Is an adapter worth keeping? Its loss on rows it has not seen, beside the base's, with the error of the difference.

After gradience (``audit/eligibility.py``) with a margin of two standard errors of the paired difference in place of 0:
what is measured is the completion's tokens alone, found by offsets in the text as a whole and weighted alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.data.batching import ROLES, TokenRow
from mlx_rsgwm.data.corpus import Corpus, make_rows
from mlx_rsgwm.data.loading import load_data
from mlx_rsgwm.data.question_files import is_question_file
from mlx_rsgwm.data.row_hashes import record_of
from mlx_rsgwm.data.template import Template, find_template
from mlx_rsgwm.evaluation.slices import Slice, read_slice
from mlx_rsgwm.evaluation.stats.bootstrap import percentile_interval, resampled
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.training.losses import row_nats

ELIGIBLE, UNCERTAIN, WEAK, UNKNOWN = "ELIGIBLE", "UNCERTAIN", "FLAGGED_WEAK", "UNKNOWN"
STANDARD_ERRORS = 2.0
RESAMPLES = 1000
FEWEST_ROWS = 8
MOST_TOKENS = 1024
BATCH = 8


@dataclass(frozen=True)
class Eligibility:
    """``verdict`` on an adapter by ``gain``, nats a completion token that it saves over the base.

    ``low`` and ``high``: the middle 95 % of the gain when rows are resampled; ``margin``: two standard errors of it.
    ``seen``: rows left out because the adapter was trained on them. Of an adapter without data only the verdict.
    """

    verdict: str = UNKNOWN
    confidence: str = "low"
    data: str | None = None
    base_nll: float | None = None
    adapter_nll: float | None = None
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    rows: int = 0
    tokens: int = 0
    seen: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def held_out_rows(data: str, adapter: Adapter, base: Base, count: int, seed: int) -> tuple[list[TokenRow], int]:
    """Up to ``count`` draft rows of a task, a file of questions, a corpus or a file of rows, that the adapter was not
    trained on, in the words that it was trained with; and how many it was trained on, which are left out.

    Raises:
        RsgwmError: what cannot be read; nothing that is new to the adapter.
    """
    path = Path(data)
    if path.exists() and not is_question_file(data):
        rows, _ = load_data(path, None)[0].token_rows(base.tokenizer, MOST_TOKENS, "drop")
    else:
        questions, _ = read_slice(Slice(data, count, seed=seed))
        described = adapter.manifest.get("template")
        template = Template.from_description(described) if described else find_template("plain")
        corpus = Corpus(tuple(make_rows(questions, len(questions), 0, seed)), template, {})
        rows, _ = corpus.token_rows(base.tokenizer, MOST_TOKENS, "drop")
    record = record_of(adapter.manifest, adapter.name)
    new: list[TokenRow] = []
    seen = 0
    for row in (row for row in rows if row.role == ROLES[0]):
        if len(new) == count:
            break
        if record.has(row.keys):
            seen += 1
        else:
            new.append(row)
    if len(new) < FEWEST_ROWS:
        told = f"; {seen} were left out, since it was trained on them" if seen else ""
        raise RsgwmError(
            f"{data} has {len(new)} rows to judge {adapter.where} by, at least {FEWEST_ROWS} are needed{told}"
        )
    return new, seen


def rows_of_each(
    data: Sequence[str], adapters: Sequence[Adapter], base: Base, count: int, seed: int
) -> list[tuple[str, list[TokenRow], int]]:
    """For every adapter the name of its data, its :func:`held_out_rows` there, and how many were left out.

    ``data``: one for all adapters, or one for each in their order.

    Raises:
        RsgwmError: another number of them, and as :func:`held_out_rows`.
    """
    if len(data) not in (1, len(adapters)):
        raise RsgwmError(
            f"--data is given once for all adapters or once for each: {len(adapters)} adapters, {len(data)}"
        )
    each = list(data) * (len(adapters) if len(data) == 1 else 1)
    return [
        (name, *held_out_rows(name, adapter, base, count, seed)) for name, adapter in zip(each, adapters, strict=True)
    ]


@dataclass(frozen=True)
class Measured:
    """An adapter on held-out rows: ``base`` and ``alone`` (rows,) float64, nats of each row's completion under the base
    and under the adapter; ``tokens`` (rows,) of it; ``seen`` as in :class:`Eligibility`.
    """

    data: str
    rows: tuple[TokenRow, ...]
    base: np.ndarray
    alone: np.ndarray
    tokens: np.ndarray
    seen: int = 0

    def mean(self, nats: np.ndarray) -> float:
        """Nats a completion token, of nats by row."""
        return float(nats.sum() / self.tokens.sum())

    def eligibility(self, seed: int = DEFAULT_SEED) -> Eligibility:
        """The verdict on the adapter; 1000 resamples of rows, the same for base and adapter."""
        gain, low, high, error = token_weighted(self.base - self.alone, self.tokens, seed)
        verdict, confidence = verdict_of(gain, STANDARD_ERRORS * error)
        return Eligibility(
            verdict, confidence, self.data, self.mean(self.base), self.mean(self.alone), gain, low, high,
            STANDARD_ERRORS * error, len(self.rows), int(self.tokens.sum()), self.seen,
        )  # fmt: skip


def measure(slots: AdapterSlots, name: str, rows: Sequence[TokenRow], data: str, seen: int = 0) -> Measured:
    """The adapter in the slot ``name`` beside the base on ``rows``."""
    base, alone = (nats_under(slots, slot, rows) for slot in (None, name))
    tokens = np.array([len(row.trained_positions()) for row in rows])
    return Measured(data, tuple(rows), base, alone, tokens, seen)


def nats_under(slots: AdapterSlots, name: str | None, rows: Sequence[TokenRow]) -> np.ndarray:
    """Nats of every row's completion (rows,) float64, under the adapter in a slot or under the base."""
    with slots.using(name):
        return row_nats(slots.model, rows, BATCH)[0]


def token_weighted(differences: np.ndarray, tokens: np.ndarray, seed: int) -> tuple[float, float, float, float]:
    """Σ differences / Σ tokens of rows, its 95 % bootstrap interval over rows, and its standard error."""

    def mean(drawn: np.ndarray) -> float:
        return float(differences[drawn].sum() / tokens[drawn].sum())

    drawn = resampled(mean, len(tokens), seed, RESAMPLES)
    return (mean(np.arange(len(tokens))), *percentile_interval(drawn), float(drawn.std(ddof=1)))


def verdict_of(gain: float, margin: float) -> tuple[str, str]:
    """Verdict and confidence: high where the gain is beyond twice the margin either way."""
    if gain > margin:
        return ELIGIBLE, "high" if gain > 2 * margin else "medium"
    if gain >= -margin:
        return UNCERTAIN, "medium"
    return WEAK, "high" if gain < -2 * margin else "medium"
