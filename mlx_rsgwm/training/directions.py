"""Second moments of the inputs of an adapter's modules, summed up in forward passes that happen anyway.

Of the inputs X of a module Σ XᵀXΩ is kept for a fixed test matrix Ω (in, k), and the diagonal of Σ XᵀX; see
:mod:`mlx_rsgwm.models.directions` for the file that they become and :mod:`mlx_rsgwm.linalg.gram` for what they say.
All tokens count, those of the prompt too: an adapter's update acts on each. Padding does not, nor does a row's last
token, which is no input. While training every nth token is taken, each row's first by its number and the step's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.data.batching import TokenRow
from mlx_rsgwm.linalg.gram import test_matrix
from mlx_rsgwm.models.hooks import inputs_seen
from mlx_rsgwm.models.split import split_head

SEED = 0  # of Ω: one for all adapters, so that their sketches can be added up


@dataclass(frozen=True)
class Input:
    """A distinct input of adapted modules: its length, how often one forward pass has it, and what has it.

    ``of``: "states" (rows, length, in) of all tokens, "targets" (targets, in) of the trained ones alone (the head's),
    or "ids" (rows, length), which stand for one-hot vectors (the embedding's).
    """

    width: int
    calls: int
    of: str


def module_inputs(model: Any, names: Iterable[str]) -> tuple[dict[str, Input], dict[str, str]]:
    """The distinct inputs of the modules ``names`` by the first module that has it, and for every module which that is.

    The model is tried on a few tokens, without computing them.
    """
    inputs: dict[str, Input] = {}
    owners: dict[str, str] = {}
    seen: list[tuple[mx.array, str]] = []
    modules: dict[str, Any] = dict(model.named_modules())

    def look(name: str, x: mx.array) -> None:
        owner = owners.setdefault(name, next((owner for other, owner in seen if other is x), name))
        if owner != name:
            return
        seen.append((x, name))
        kind = "ids" if mx.issubdtype(x.dtype, mx.integer) else "states" if x.ndim > 2 else "targets"
        calls = inputs[name].calls + 1 if name in inputs else 1
        inputs[name] = Input(modules[name].lora_a.shape[0], calls, kind)

    hidden, head = split_head(model)
    training = model.training
    model.eval()
    with inputs_seen(model, names, look):
        states = hidden(mx.arange(4)[None])
        head(states.reshape(-1, states.shape[-1])[:3])
    model.train(training)
    return inputs, owners


def token_positions(rows: Sequence[TokenRow], length: int, every: int, firsts: Sequence[int]) -> np.ndarray:
    """Every nth position of each row, flattened in a batch of ``length`` columns; of row i from ``firsts[i]`` % n.

    (positions,) int32, where a batch of R rows has R · ``length`` places.
    """
    ranges = [
        index * length + np.arange(first % every, len(row.tokens) - 1, every)
        for index, (row, first) in enumerate(zip(rows, firsts, strict=True))
    ]
    return np.concatenate(ranges).astype(np.int32)


class DirectionSums:
    """Sums over the inputs of modules of a model, by role; ``rank`` is k, 0 for whole matrices.

    Use: inside :meth:`watching` call :meth:`start`, run the model, and hand what :meth:`end` gives to :meth:`add`.
    """

    def __init__(self, model: Any, names: Iterable[str], roles: Iterable[str], rank: int, every: int) -> None:
        self.model, self.rank, self.every = model, rank, every
        self.inputs, self.owners = module_inputs(model, names)
        self.totals: dict[str, mx.array] = {}
        for role in sorted(set(roles)):
            for owner, entry in self.inputs.items():
                self.totals |= {f"{role}/{owner}.{leaf}": mx.zeros(s) for leaf, s in self._shapes(entry).items()}
        self.tokens: dict[str, int] = {}  # summed up by "{role}/states" and "{role}/targets"
        self.rows: dict[str, int] = {}
        self._role = ""
        self._positions: mx.array | None = None
        self._targets = 0
        self._sums: dict[str, mx.array] = {}

    @property
    def nbytes(self) -> int:
        """Memory that the sums take."""
        return sum(total.nbytes for total in self.totals.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the modules' inputs; nothing is summed outside of :meth:`start` and :meth:`end`."""
        with inputs_seen(self.model, self.inputs, self.see):
            yield

    def start(self, rows: Sequence[TokenRow], length: int, numbers: Sequence[int]) -> None:
        """Begin a batch of rows of one role, padded to ``length``; ``numbers``: where each one's nth tokens begin."""
        positions = token_positions(rows, length, self.every, numbers)
        self._role, self._sums = rows[0].role, {}
        self._targets = sum(row.trained_tokens for row in rows)
        self._positions = mx.array(positions)

    def end(self) -> dict[str, mx.array]:
        """The batch's sums, float32 in the shapes of ``totals``, not computed yet.

        What runs after (a block that is recomputed) is not counted again.
        """
        sums, self._sums, self._positions = self._sums, {}, None
        return sums

    def add(self, sums: Mapping[str, mx.array]) -> None:
        """Take a step's sums (lazily: the caller evaluates ``totals``)."""
        for name, value in sums.items():
            self.totals[name] = self.totals[name] + value

    def count(self, rows: Sequence[TokenRow], numbers: Sequence[int]) -> None:
        """Count the rows of a step and their tokens; of several processes each counts all."""
        role = rows[0].role
        self.rows[role] = self.rows.get(role, 0) + len(rows)
        taken = {
            f"{role}/states": len(token_positions(rows, 0, self.every, numbers)),
            f"{role}/targets": sum(row.trained_tokens for row in rows),
        }
        for name, number in taken.items():
            self.tokens[name] = self.tokens.get(name, 0) + number

    def complete(self, sums: Mapping[str, mx.array], role: str) -> dict[str, mx.array]:
        """A step's sums with zeros for what no token of this process was handed to."""
        names = [name for name in self.totals if name.startswith(f"{role}/")]
        return {name: sums[name] if name in sums else mx.zeros_like(self.totals[name]) for name in names}

    def _shapes(self, entry: Input) -> dict[str, tuple[int, ...]]:
        """What is kept of an input."""
        if entry.of == "ids":
            return {"diagonal": (entry.width,)}
        if not 0 < self.rank < entry.width:
            return {"gram": (entry.width, entry.width)}
        return {"sketch": (entry.width, self.rank), "diagonal": (entry.width,)}

    def see(self, name: str, x: mx.array) -> None:
        """Sum up over ``x``, input (rows, tokens, width) of a module that owns it; an embedding's (rows, tokens)."""
        if self._positions is None:
            return
        entry = self.inputs[name]
        # make_batch puts the trained positions first and pads behind them
        rows = x[: self._targets] if entry.of == "targets" else x.reshape(-1, *x.shape[2:])[self._positions]
        for leaf, value in self._products(mx.stop_gradient(rows), entry).items():
            key = f"{self._role}/{name}.{leaf}"
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    def _products(self, rows: mx.array, entry: Input) -> dict[str, mx.array]:
        if entry.of == "ids":
            return {"diagonal": mx.zeros((entry.width,)).at[rows].add(mx.ones(rows.shape))}
        wide = rows.astype(mx.float32)
        if not 0 < self.rank < entry.width:
            return {"gram": wide.T @ wide}
        projected = wide @ test_matrix(entry.width, self.rank, SEED)
        return {"sketch": wide.T @ projected, "diagonal": mx.square(wide).sum(axis=0)}

    # --- what becomes of them -----------------------------------------------------------------------------------

    def arrays(self) -> dict[str, mx.array]:
        """What ``directions.safetensors`` holds: means over the tokens of the roles that had any."""
        means = {}
        for name, total in self.totals.items():
            role, _, rest = name.partition("/")
            entry = self.inputs[rest.rpartition(".")[0]]
            tokens = self.tokens.get(f"{role}/{'targets' if entry.of == 'targets' else 'states'}", 0)
            if tokens:
                means[name] = total / (tokens * entry.calls)
        return means

    def metadata(self) -> dict[str, str]:
        """What ``directions.safetensors`` says about itself."""
        roles = sorted(self.rows)
        return {
            "k": str(self.rank),
            "seed": str(SEED),
            "every": str(self.every),
            "shared": json.dumps({name: owner for name, owner in self.owners.items() if owner != name}),
            **{f"rows/{role}": str(self.rows[role]) for role in roles},
            **{f"tokens/{role}": str(self.tokens[f"{role}/states"]) for role in roles},
        }

    def state(self, prefix: str) -> dict[str, mx.array]:
        """The sums under ``{prefix}{role}/{module}.…``, for a checkpoint."""
        return {prefix + name: total for name, total in self.totals.items()}

    def counts(self) -> dict[str, dict[str, int]]:
        """The counts that belong to :meth:`state`."""
        return {"tokens": self.tokens, "rows": self.rows}

    def restore(self, arrays: Mapping[str, mx.array], prefix: str, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Take up what :meth:`state` and :meth:`counts` gave."""
        self.totals = {name: arrays[prefix + name] for name in self.totals}
        self.tokens, self.rows = dict(counts["tokens"]), dict(counts["rows"])
