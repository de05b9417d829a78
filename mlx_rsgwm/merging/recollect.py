"""Directions collected anew while merging: a layer's inputs come from the layers below as they were merged.

Recorded directions are of inputs under each adapter by itself. In the merged model a layer sees what the merged layers
below make of the rows, errors of the merge and of its rank included. So the rows of every adapter go through the model
block by block: the block is run with the adapter's own layers to look at their inputs, its modules are merged, and the
merged block gives what the next one sees (RegMean++, Nguyen et al., 2025, arXiv 2508.03121).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.batching import ROLES, TokenRow, make_batch, plan_epoch, tell_rows
from mlx_rsgwm.inference.open import load_base_for
from mlx_rsgwm.linalg.gram import Gram
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.pool import Pool
from mlx_rsgwm.merging.pool_metric import ModuleGrams
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.directions import ALL, role_grams
from mlx_rsgwm.models.fit_check import fitting_modules
from mlx_rsgwm.models.hooks import block_names, inputs_seen
from mlx_rsgwm.models.linux_cpu import lazily
from mlx_rsgwm.models.split import Hidden, split_blocks
from mlx_rsgwm.training.collect_directions import draw_rows, load_rows
from mlx_rsgwm.training.directions import DirectionSums
from mlx_rsgwm.training.layers import adapted
from mlx_rsgwm.training.loop import TrainingData

# Inputs of up to so many features have whole matrices, longer ones sketches of so many columns: one block's at a time.
COLUMNS = 1024


def check_one_each(adapters: Sequence[Any], corpora: Sequence[Any]) -> None:
    """Raise unless there are as many corpora as adapters."""
    if len(corpora) != len(adapters):
        raise RsgwmError(
            "directions are recollected from rows of every adapter's own task, one corpus for each in their order: "
            f"{len(adapters)} adapters, {len(corpora)} corpora"
        )


@dataclass(frozen=True)
class Recollection:
    """Rows of every adapter's task, in the adapters' order, and the base that they are run through: up to ``rows`` of
    each, drawn by ``seed``, 0 for all.
    """

    base: Base
    data: Sequence[TrainingData]
    rows: int = 256
    batch_rows: int = 8
    max_tokens: int = 1024
    seed: int = 0
    progress: Progress = SILENT

    def start(self, adapters: Sequence[Adapter], role: str) -> LayerByLayer:
        """What collects directions of ``role`` (of all roles, for one that rows do not have) as merging goes on.

        Raises:
            AdapterError: an adapter does not fit the base.
            RsgwmError: not one corpus for each adapter, adapters of different modules or with layers outside of the
                blocks, no row of the role, a base whose layers cannot be run one by one.
        """
        check_one_each(adapters, self.data)
        model: Any = self.base.model
        blocks, names = split_blocks(model), block_names(model)
        if blocks is None or len(blocks) != len(names):
            raise RsgwmError(f"{self.base.name}: its layers cannot be run one by one; merge by recorded directions")
        modules = [fitting_modules(self.base, adapter) for adapter in adapters]
        problems = [
            f"{adapter.where} and {adapters[0].where} adapt different modules (e.g. {min(adapted.keys() ^ modules[0])})"
            for adapter, adapted in zip(adapters, modules, strict=True)
            if adapted.keys() != modules[0].keys()
        ]
        problems += [f"{name} is in no layer" for name in modules[0] if _block_of(name, names) is None]
        raise_problems("directions cannot be recollected layer by layer", problems)
        tasks = [self._task(*pair, role) for pair in zip(adapters, self.data, modules, strict=True)]
        return LayerByLayer(model, blocks, names, tasks, role if role in ROLES else ALL)

    def _task(self, adapter: Adapter, data: TrainingData, modules: Mapping[str, Any], role: str) -> _Task:
        fitting, dropped = data.token_rows(self.base.tokenizer, self.max_tokens, "drop")
        tell_rows(fitting, dropped, self.max_tokens, self.progress)
        rows = [row for row in fitting if role not in ROLES or row.role == role]
        if not rows:
            raise RsgwmError(f"the rows for {adapter.where} have none of the role {role}")
        rows = draw_rows(rows, self.rows, self.seed)
        columns = min(COLUMNS, sum(len(row.tokens) - 1 for row in rows))
        weights = {name: value.astype(mx.float32) for name, value in adapter.weights.items()}
        spec = replace(adapter.spec, dropout=0.0)
        with adapted(self.base.model, modules, spec, weights):
            sums = DirectionSums(self.base.model, modules, {row.role for row in rows}, columns, every=1)
        task = _Task(adapter.where, spec, weights, sums)
        for indices in plan_epoch(rows, self.batch_rows, seed=0, epoch=0):
            batch = [rows[index] for index in indices]
            sums.count(batch, indices)
            task.batches.append(_Batch(batch, indices, make_batch(batch).inputs))
        return task


def open_recollection(
    adapters: Sequence[Adapter],
    corpora: Sequence[TrainingData | str | Path],
    base: str | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Recollection:
    """What :func:`~mlx_rsgwm.merging.merge.merge` takes to collect directions anew: rows read, base loaded.

    ``corpora`` are rows of every adapter's task, in the adapters' order, or where they are; the base is the one that
    the adapters record unless given.

    Raises:
        RsgwmError: not one corpus for each adapter, rows that cannot be read, adapters of several bases.
    """
    check_one_each(adapters, corpora)
    data = [
        load_rows(Path(corpus), adapter) if isinstance(corpus, (str, Path)) else corpus
        for corpus, adapter in zip(corpora, adapters, strict=True)
    ]
    return Recollection(load_base_for(adapters, base, progress), data, seed=seed, progress=progress)


@dataclass
class _Batch:
    """Rows on their way through the model; ``states`` are ids at first, then what the last block gave."""

    rows: list[TokenRow]
    numbers: Sequence[int]
    states: mx.array


@dataclass
class _Task:
    """An adapter with its rows."""

    where: str
    spec: LoraSpec
    weights: Mapping[str, mx.array]
    sums: DirectionSums
    batches: list[_Batch] = field(default_factory=list)


class LayerByLayer:
    """Second moments of a block's modules, as the blocks below were merged: merge each before the next is asked for."""

    def __init__(
        self, model: Any, blocks: Sequence[Hidden], names: Sequence[str], tasks: Sequence[_Task], role: str
    ) -> None:
        self._model, self._blocks, self._names, self._tasks, self._role = model, blocks, names, tasks, role
        self._modules = dict(model.named_modules())
        self._merged: dict[str, Factors] = {}
        self._next = 0

    def order(self, module: str) -> tuple[int, str]:
        """The key by which modules have to come."""
        return _block_of(module, self._names) or 0, module

    def grams(self, pool: Pool) -> Iterator[Sequence[Gram]]:
        """For every module of ``pool``, which has them in :meth:`order`, the T second moments of its inputs."""
        block, readers = -1, []
        for module in pool.modules:
            if self.order(module)[0] != block:
                block = self.order(module)[0]
                inside = [name for name in pool.modules if self.order(name)[0] == block]
                self._advance(block)
                readers = [self._collected(task, inside) for task in self._tasks]
            yield ModuleGrams(readers, module, pool.shape(module)[0])

    def take(self, module: str, merged: Factors) -> None:
        """A module's merged update, whose outputs the blocks above see."""
        self._merged[module] = merged

    def describe(self) -> list[dict[str, Any]]:
        """For the merge's manifest: rows and tokens by adapter."""
        return [{"rows": task.sums.rows, "tokens": task.sums.tokens} for task in self._tasks]

    def _advance(self, block: int) -> None:
        """Run the rows through the merged blocks up to ``block``."""
        for index in range(self._next, block):
            inside = [name for name in self._merged if _block_of(name, self._names) == index]
            rank = max((self._merged[name].rank for name in inside), default=1)
            weights = {
                f"{name}.{leaf}": array
                for name in inside
                for leaf, array in (("lora_a", self._merged[name].a), ("lora_b", self._merged[name].b))
            }
            with self._adapted(inside, LoraSpec(rank, 1.0, 0.0, (), -1), weights):
                for task in self._tasks:
                    for batch in task.batches:
                        batch.states = self._blocks[index](batch.states)
                        mx.eval(batch.states)
        self._next = block

    def _collected(self, task: _Task, inside: Sequence[str]) -> Mapping[str, Gram]:
        """Second moments of the inputs of the modules ``inside`` the next block, under the task's own adapter."""
        sums, owners = task.sums, [name for name in task.sums.inputs if name in inside]
        weights = {name: value for name, value in task.weights.items() if name.rpartition(".")[0] in inside}
        with self._adapted(inside, task.spec, weights), inputs_seen(self._model, owners, sums.see):
            for batch in task.batches:
                sums.start(batch.rows, batch.states.shape[1], batch.numbers)
                with lazily():
                    self._blocks[self._next](batch.states)  # never computed; inputs inside it are looked at
                step = sums.end()
                sums.add(step)
                mx.eval([sums.totals[name] for name in step])  # those of other blocks are not there yet, or no more
        arrays = {
            name: mean for name, mean in sums.arrays().items() if name.partition("/")[2].rpartition(".")[0] in owners
        }
        mx.eval(arrays)
        sums.totals = {name: total for name, total in sums.totals.items() if name not in arrays}
        return role_grams(lambda: dict(arrays), sums.metadata(), self._role, task.where)

    def _adapted(
        self, inside: Iterable[str], spec: LoraSpec, weights: Mapping[str, mx.array]
    ) -> AbstractContextManager[None]:
        return adapted(self._model, {name: self._modules[name] for name in inside}, spec, weights)


def _block_of(module: str, names: Sequence[str]) -> int | None:
    """The number of the block that a module is in."""
    return next((index for index, name in enumerate(names) if module.startswith(f"{name}.")), None)
