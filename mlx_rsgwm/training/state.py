"""The steps of one run and its whole state: what a checkpoint holds and a continued run takes up again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_flatten, tree_unflatten

from mlx_rsgwm.core.distributed import Processes
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.core.random_streams import step_seed
from mlx_rsgwm.core.signals import Interruption
from mlx_rsgwm.data.batching import Batch, TokenRow, make_batch
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.linux_cpu import lazily
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.training.checkpoints import Checkpoint, Paused, Saving, write_checkpoint
from mlx_rsgwm.training.config import TrainConfig, learning_rate_at, make_optimizer
from mlx_rsgwm.training.directions import DirectionSums
from mlx_rsgwm.training.history import Score, StepLoss, mean_loss
from mlx_rsgwm.training.importance import Importance
from mlx_rsgwm.training.layers import recomputed_blocks, trainable
from mlx_rsgwm.training.losses import batch_nats, held_out_nats
from mlx_rsgwm.training.memory import memory_line, memory_now
from mlx_rsgwm.training.reporting import Reports
from mlx_rsgwm.training.snapshots import snapshot_steps, write_snapshot


class TrainingRun:
    """One run on a model that already has its trainable layers."""

    def __init__(
        self,
        model: Any,
        rows: Sequence[TokenRow],
        plan: Sequence[list[int]],
        held_rows: Sequence[TokenRow],
        config: TrainConfig,
        label: str,
        processes: Processes,
    ) -> None:
        self.model, self.rows, self.plan, self.held_rows = model, rows, plan, held_rows
        self.config, self.label, self.processes = config, label, processes
        self.start = trainable(model)
        self.optimizer = make_optimizer(config)
        self.importance = Importance({name: value.shape for name, value in self.start.items()}, config.beta2)
        modules = dict.fromkeys(name.rpartition(".")[0] for name in self.start) if config.directions else {}
        roles = {rows[index].role for step in plan for index in step}
        self.directions = DirectionSums(model, modules, roles, config.directions, config.directions_every)
        self.history: list[StepLoss] = []
        self.scores: list[Score] = []
        self.before: dict[str, float] = {}
        self.padded = self.real = 0
        self.seconds = 0.0
        self.gradient_sum: dict[str, mx.array] = {}
        self.best: tuple[dict[str, mx.array], Importance] | None = None
        self._saved_step = 0
        self._blocks = 0
        self._loss_and_gradients = self._differentiate()

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.history)

    @property
    def best_score(self) -> Score | None:
        """The held-out score with the least loss; None before the first."""
        return min(self.scores, key=lambda score: score.loss, default=None)

    @property
    def kept_step(self) -> int:
        """The step whose weights :meth:`result` gives."""
        best = self.best_score
        return best.step if self.config.select == "best" and best else self.done

    def execute(
        self,
        progress: Progress,
        saving: Saving | None,
        identity: Mapping[str, Any],
        about: Mapping[str, Any],
        reports: Reports,
        interruption: Interruption,
    ) -> None:
        """Take the steps that are left, saving as ``saving`` says.

        Raises:
            RsgwmError: the loss or the weights are not finite; checkpoints written before stay.
            Paused: where ``saving`` says so, after the step was finished and saved.
            KeyboardInterrupt: asked to end; the step was finished and, with ``saving``, saved.
        """
        started, earlier = time.monotonic(), self.seconds
        saving = saving if self.processes.writes else None
        snapshots = snapshot_steps(saving.snapshots, len(self.plan)) if saving else {}
        last_snapshot = max(snapshots, default=0)
        paused = next((step for step, shares in snapshots.items() if saving and saving.pause in shares), math.inf)

        def save(scored: bool = True) -> None:
            if saving is not None:
                # For the averaging of checkpoints; a run that was asked to end does not wait for it.
                held_out = self._held_out_now() if scored else None
                self.seconds = earlier + time.monotonic() - started
                checkpoint = write_checkpoint(
                    saving.folder, self.config.spec(), self.checkpoint(held_out), identity, about, saving.keep
                )
                progress.detail(f"{self.label}: saved {checkpoint}; {memory_line()}")

        with progress.task(self.label, len(self.plan)) as advance, self.looking():
            if self.done:
                advance(self.done, "continued")
            if self.done >= paused:
                raise Paused
            while self.done < len(self.plan) and not self._out_of_patience():
                keep_sum = self.done < last_snapshot
                step = self.step(keep_sum)
                advance(1, f"{step.role} loss {step.loss:.3f}")
                reports.log(step.step, self._numbers(step))
                if step.step in snapshots and saving is not None:
                    record = {"step": step.step, "shares": snapshots[step.step], "loss": step.loss}
                    write_snapshot(saving.folder, self._adapter_now(about), self.gradient_sum, record)
                if step.step >= last_snapshot:
                    self.gradient_sum = {}
                if self.config.validate_every and step.step % self.config.validate_every == 0:
                    score = self.validate()
                    progress.message(f"{self.label}: step {score.step}, held-out loss {score.loss:.4f}")
                    reports.log(step.step, {"held_out_loss": score.loss})
                due = saving is not None and saving.every and step.step % saving.every == 0
                if due or interruption.requested or step.step == paused:
                    save(scored=not interruption.requested)
                if interruption.requested:
                    raise KeyboardInterrupt
                if step.step == paused:
                    raise Paused
            if self._saved_step != self.done:
                save()
        self.seconds = earlier

    def step(self, keep_sum: bool) -> StepLoss:
        """One optimiser step over the plan's next rows."""
        number = self.done
        indices = self.plan[number]
        mx.random.seed(step_seed(self.config.seed, number, self.processes.rank))
        self._blocks = 0
        self.model.train()
        loss, gradients = self._gradients(indices)
        if self.config.freezes_a:  # a gradient of zero: Adam leaves it at that, and so its importance
            gradients = {
                name: mx.zeros_like(value) if name.endswith(".lora_a") else value for name, value in gradients.items()
            }
        role = self.rows[indices[0]].role
        self.importance.update(role, gradients)
        if keep_sum:
            self.gradient_sum = {
                name: self.gradient_sum[name] + value if self.gradient_sum else value
                for name, value in gradients.items()
            }
        if self.config.clip:
            gradients, _ = clip_grad_norm(gradients, self.config.clip)
        self.optimizer.learning_rate = learning_rate_at(self.config, number, len(self.plan))
        updated = self.optimizer.apply_gradients(gradients, trainable(self.model))
        self.model.update(tree_unflatten(list(updated.items())))
        state = (self.optimizer.state, self.importance.moments, self.directions.totals, self.gradient_sum)
        mx.eval(loss, updated, *state)
        value: Any = loss.item()
        if not math.isfinite(value):
            named = [self.rows[index].id for index in indices]
            shown = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
            raise RsgwmError(
                f"{self.label}: the loss is {value} at step {number + 1} ({role} batch of rows {shown}); "
                "lower the learning rate or look at these rows; checkpoints of earlier steps are kept"
            )
        trained = sum(self.rows[index].trained_tokens for index in indices)
        self.history.append(StepLoss(number + 1, role, value, trained))
        self.real += sum(len(self.rows[index].tokens) - 1 for index in indices)
        return self.history[-1]

    def validate(self) -> Score:
        """Score the held-out rows and remember the weights if they are the best so far."""
        sums = held_out_nats(self.model, self.held_rows, self.config.batch_size)
        total = sum(nats for nats, _ in sums.values()) / sum(count for _, count in sums.values())
        best = self.best_score
        score = Score(self.done, total, {role: nats / count for role, (nats, count) in sums.items()})
        self.scores.append(score)
        if self.config.select == "best" and (best is None or total < best.loss):
            self.best = (trainable(self.model), self.importance.copy())
        return score

    def result(self) -> tuple[dict[str, mx.array], Importance]:
        """Weights and importance that the run leaves: the last, or those of the best score."""
        return self.best if self.best else (trainable(self.model), self.importance)

    def settle(self) -> None:
        """Put the weights of :meth:`result` into the model."""
        self.model.update(tree_unflatten(list(self.result()[0].items())))

    def _held_out_now(self) -> float | None:
        """The held-out loss of the present weights; None without held-out rows."""
        if self.scores and self.scores[-1].step == self.done:
            return self.scores[-1].loss
        if not self.held_rows:
            return None
        sums = held_out_nats(self.model, self.held_rows, self.config.batch_size)
        return sum(nats for nats, _ in sums.values()) / sum(count for _, count in sums.values())

    def _adapter_now(self, about: Mapping[str, Any]) -> Adapter:
        """What the run would leave if it ended here, of importance only that of all steps; a warm start is no
        initialisation."""
        weights = trainable(self.model)
        init = {name: value for name, value in self.start.items() if name.endswith(".lora_a")}
        recorded = {} if "warm_start" in about else init
        importance = {name: value for name, value in self.importance.arrays().items() if name.startswith("all/")}
        return Adapter(self.config.spec(), weights, importance, self.importance.metadata(), recorded, {**about})

    def checkpoint(self, held_out: float | None) -> Checkpoint:
        """The whole state at the end of the last step; ``held_out`` is for the record alone."""
        arrays: dict[str, mx.array] = {
            f"optimizer/{name}": self.optimizer.state[name] for name in ("step", "learning_rate")
        }
        for name in self.start:
            arrays |= {f"optimizer/{name}/{key}": value for key, value in self.optimizer.state[name].items()}
        arrays |= self.importance.state("moments/") | self.directions.state("directions/")
        arrays |= {f"gradient_sum/{name}": value for name, value in self.gradient_sum.items()}
        if self.best:
            arrays |= {f"best/{name}": value for name, value in self.best[0].items()}
            arrays |= self.best[1].state("best_moments/")
        window = self.history[min(self._saved_step, max(self.done - 1, 0)) :]
        record = {
            "train_loss_window": mean_loss(window),
            "window_steps": len(window),
            "validation_loss": held_out,
            "importance_steps": self.importance.steps,
            "directions": self.directions.counts(),
            "best_importance_steps": self.best[1].steps if self.best else None,
            "before": self.before,
            "scores": [asdict(score) for score in self.scores],
            "padded": self.padded,
            "real": self.real,
            "seconds": self.seconds,
            "history": [[step.step, step.role, step.loss, step.trained_tokens] for step in self.history],
        }
        self._saved_step = self.done
        importance = self.importance
        return Checkpoint(self.done, trainable(self.model), arrays, record, importance.arrays(), importance.metadata())

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up the state that :meth:`checkpoint` gave."""
        arrays, record = checkpoint.arrays, checkpoint.record
        self.model.update(tree_unflatten(list(checkpoint.weights.items())))
        state: dict[str, Any] = {name: arrays[f"optimizer/{name}"] for name in ("step", "learning_rate")}
        for name in self.start:
            prefix = f"optimizer/{name}/"
            state[name] = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        self.optimizer.state = state
        self.importance.restore(arrays, "moments/", record["importance_steps"])
        if "directions" in record:  # which checkpoints until 0.2 have not
            self.directions.restore(arrays, "directions/", record["directions"])
        self.gradient_sum = {
            name: arrays[f"gradient_sum/{name}"] for name in self.start if f"gradient_sum/{name}" in arrays
        }
        if record["best_importance_steps"]:
            importance = self.importance.copy()
            importance.restore(arrays, "best_moments/", record["best_importance_steps"])
            self.best = ({name: arrays[f"best/{name}"] for name in self.start}, importance)
        self.before = record["before"]
        self.scores = [Score(**score) for score in record["scores"]]
        self.padded, self.real, self.seconds = record["padded"], record["real"], record["seconds"]
        self.history = [StepLoss(*line) for line in record["history"]]
        self._saved_step = checkpoint.step
        mx.eval(self.model.trainable_parameters(), self.optimizer.state, self.importance.moments)

    def _out_of_patience(self) -> bool:
        best = self.best_score
        if not self.config.patience or best is None:
            return False
        return sum(score.step > best.step for score in self.scores) >= self.config.patience

    def _numbers(self, step: StepLoss) -> dict[str, float]:
        rate = learning_rate_at(self.config, step.step - 1, len(self.plan))
        memory = {f"memory/{name}": float(value) for name, value in memory_now().items()}
        return {f"loss/{step.role}": step.loss, "learning_rate": rate, "trained_tokens": step.trained_tokens, **memory}

    def _differentiate(self) -> Any:
        hidden, head = split_head(self.model)

        def loss_of(_: Any, batch: Batch, total: int) -> tuple[mx.array, dict[str, mx.array]]:
            loss = batch_nats(hidden, head, batch) / total
            return loss, self.directions.end()

        return nn.value_and_grad(self.model, loss_of)

    def _gradients(self, indices: Sequence[int]) -> tuple[mx.array, dict[str, mx.array]]:
        """Mean loss over the trained tokens of all ``indices`` and its gradient, in batches and over all processes."""
        size = self.config.batch_size
        total = sum(self.rows[index].trained_tokens for index in indices)
        loss, gradients = mx.zeros(()), {name: mx.zeros(value.shape) for name, value in self.start.items()}
        directions: dict[str, mx.array] = {}
        batches = [self.processes.share(indices[start : start + size]) for start in range(0, len(indices), size)]
        batches = [batch for batch in batches if batch]
        padded = 0
        for position, chosen in enumerate(batches):
            rows = [self.rows[index] for index in chosen]
            batch = make_batch(rows)
            padded += batch.padded_tokens
            self.directions.start(rows, batch.inputs.shape[1], [self.done + index for index in chosen])
            with lazily():
                (part, sums), flat_gradients = self._loss_and_gradients(self.model, batch, total)
            directions |= {name: directions[name] + sums[name] if name in directions else sums[name] for name in sums}
            flat = dict(tree_flatten(flat_gradients))
            if position == 0:
                loss, gradients = part, {name: flat[name] for name in self.start}
            else:
                loss, gradients = loss + part, {name: value + flat[name] for name, value in gradients.items()}
            if position + 1 < len(batches):
                mx.eval(loss, gradients, directions)  # or the activations of all batches would live at once
        summed = self.processes.sum({**gradients, "/loss": loss, "/padded": mx.array(float(padded))})
        everywhere: Any = summed["/padded"].item() if self.processes.size > 1 else padded
        self.padded += int(everywhere)
        # Not in one message with the gradients, whose bits would depend on what else is in it.
        if self.processes.size > 1 and self.directions.totals:
            directions = self.processes.sum(self.directions.complete(directions, self.rows[indices[0]].role))
        self.directions.add(directions)
        self.directions.count([self.rows[index] for index in indices], [self.done + index for index in indices])
        return summed["/loss"], {name: summed[name] for name in self.start}

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Steps are taken inside: blocks are recomputed if the settings say so, and the modules' inputs are seen."""

        def next_seed() -> int:
            self._blocks += 1
            return step_seed(self.config.seed, self.done, self.processes.rank) ^ self._blocks

        recomputed = recomputed_blocks(self.model, next_seed) if self.config.recompute else nullcontext()
        with recomputed, self.directions.watching():
            yield
