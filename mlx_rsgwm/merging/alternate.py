"""Training a pool in rounds (ATM, arXiv 2411.03055): every task from one state, a merge, and on from there.

``rounds/round-NN/`` below the pool's folder has the round's adapters while they are needed, ``merged`` (the state that
the next round starts with) and ``round.json``, written last: a round with one is done. The last round's adapters are
the pool. Of several processes each needs the rows of its own tasks alone: adapters and figures are all that crosses.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.distributed import ALONE, Processes
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.folders import exclusive, new_folder
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.resume import content_key, differing, json_values
from mlx_rsgwm.data.batching import ROLES, TokenRow
from mlx_rsgwm.merging.round_merge import check_rounds, merge_round, on_top
from mlx_rsgwm.models.adapter import Adapter, is_complete
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.slots import AdapterSlots, unwrap
from mlx_rsgwm.training.checkpoints import Saving, drop_state, require_pool_place
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.loop import float_type, plan_of
from mlx_rsgwm.training.losses import held_out_nats
from mlx_rsgwm.training.memory import MemoryOptions
from mlx_rsgwm.training.pool import Member, check_finished, train_pool
from mlx_rsgwm.training.rounds import ACCUMULATE, FREEZE_A, Rounds
from mlx_rsgwm.training.warm_start import WarmStart

FOLDER = "rounds"
MERGED = "merged"
RECORD_FILE = "round.json"
SCORED_ROWS = 8  # of each role, where a task has no held-out rows
CROSSES = (
    "adapter folders: weights, importance, directions, mean and covariance of prompt states, manifest with hashes of "
    "what rows ask",
    "losses and counts of each task's own rows",
)


def train_rounds(
    base: Base,
    names: Sequence[str],
    members: Sequence[Member],
    config: TrainConfig,
    saving: Saving,
    memory: MemoryOptions | None = None,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Train a pool in the rounds of ``config``, into ``saving.folder``; returns a JSON object for each round.

    ``names`` are all tasks', ``members`` those that this process trains: every size-th from its rank on. What is
    finished is skipped; what is not continues as ``saving.resume`` says, to the same bits.

    Raises:
        RsgwmError: steps that the rounds cannot share, rounds that were made otherwise, whatever training and merging
            raise.
    """
    if len(names) < 2:
        raise RsgwmError(f"rounds merge a pool of two tasks or more, found {', '.join(names) or 'none'}")
    check_rounds(config, len(names))
    require_pool_place(saving.folder)
    given = [member.name for member in members]
    if given != list(names[processes.rank :: processes.size]):
        raise RsgwmError(
            f"process {processes.rank} of {processes.size} trains other tasks of {', '.join(names)}: {given}"
        )
    for name in (FOLDER, MERGED):
        if name in names:
            raise RsgwmError(f"with rounds no task can be called {name}, which is a folder of the pool")
    run = _RoundsRun(base, tuple(names), tuple(members), config, saving, memory, progress, processes)
    with ExitStack() as stack:
        if processes.writes:
            stack.enter_context(exclusive(saving.folder))
        return run.execute()


@dataclass
class _RoundsRun:
    """One pool's rounds; ``state`` is where the next one starts, None at the bare base."""

    base: Base
    names: tuple[str, ...]
    members: tuple[Member, ...]
    config: TrainConfig
    saving: Saving
    memory: MemoryOptions | None
    progress: Progress
    processes: Processes
    state: Adapter | None = None
    scored: dict[str, list[TokenRow]] = field(default_factory=dict)

    @property
    def rounds(self) -> Rounds:
        """The rounds' settings."""
        assert self.config.rounds is not None
        return self.config.rounds

    def place(self, number: int) -> Path:
        """The folder of a round."""
        return self.saving.folder / FOLDER / f"round-{number:02d}"

    def execute(self) -> list[dict[str, Any]]:
        """All rounds that are not done, then the pool of the last."""
        self._check_members()
        records: list[dict[str, Any]] = []
        for number in range(1, self.rounds.count + 1):
            before = self.state
            record = self._record(number)
            if record is None:
                self._train(number)
                record = self._merge(number, records)
            elif number == self.rounds.count and not self._published():
                self._train(number)
            self._share(self.place(number) / MERGED, 0)
            if number == self.rounds.count:
                self._publish(number, before)
            self._clear(number)
            self.state = Adapter.load(self.place(number) / MERGED)
            records.append(record)
        return records

    def _check_members(self) -> None:
        """Read every own task's rows once, for what is scored, and to know that the rounds can share the steps."""
        problems = []
        for member in self.members:
            rows, _ = member.data.token_rows(self.base.tokenizer, self.config.max_tokens, self.config.long_rows)
            try:
                plan_of(rows, replace(self.config, rounds=self.rounds.at(1)))
            except RsgwmError as error:
                problems.append(f"{member.name}: {error}")
            held = member.held_out
            if held is not None:
                rows = held.token_rows(self.base.tokenizer, self.config.max_tokens, self.config.long_rows)[0]
            else:
                rows = [row for role in ROLES for row in [r for r in rows if r.role == role][:SCORED_ROWS]]
            self.scored[member.name] = rows
            last = replace(self.config, rounds=self.rounds.at(self.rounds.count))
            check_finished(self.saving.folder / member.name, self.base, member, last)
        raise_problems("rounds", problems)

    # --- a round ------------------------------------------------------------------------------------------------

    def _key(self, number: int) -> str:
        """Of all that a round depends on, but for the rows, which every task's trainer compares itself."""
        before = None if self.state is None else self.state.content_hash()
        settings = replace(self.config, rounds=self.rounds.at(number)).describe()
        return content_key([settings, self.base.fingerprint, float_type(self.base.model), list(self.names), before])

    def _record(self, number: int) -> dict[str, Any] | None:
        """What a round that is done told; None for one that is not.

        Raises:
            RsgwmError: it was made with other settings or rows.
        """
        path = self.place(number) / RECORD_FILE
        content = files.read_bytes(path) if self.processes.writes and path.is_file() else b""
        text = self.processes.broadcast(content, 0)
        if not text:
            return None
        record = _read_record(text, path)
        told, key = record.get("tasks") or {}, self._key(number)
        rows = [
            line
            for member in self.members
            for name, value in _rows_of(member).items()
            for line in differing((told.get(member.name) or {}).get(name), value, f"{member.name}.{name}")
        ]
        if record.get("key") != key or rows:
            raise RsgwmError(
                f"{path.parent} was made with other settings or rows ({'; '.join(rows) or 'its key differs'}); "
                "remove the folder or choose another"
            )
        return record

    def _train(self, number: int) -> None:
        config = replace(self.config, rounds=self.rounds.at(number))
        saving = replace(self.saving, folder=self.place(number), snapshots=())
        below = self.rounds.mode == ACCUMULATE
        start = None
        if self.state is not None and not below:
            start = WarmStart.load(self.place(number - 1) / MERGED)
        unwrap(self.base.model)
        train_pool(
            self.base, self.members, config, saving, self.memory, self.progress,
            warm_start=start, beneath=self.state if below else None,
        )  # fmt: skip
        self.processes.wait()
        for position, name in enumerate(self.names):
            self._share(self.place(number) / name, position % self.processes.size)

    def _merge(self, number: int, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Merge a round's adapters, score the result on every task, and write the record."""
        folder, place = self.place(number) / MERGED, self.place(number)
        if self.processes.writes and not is_complete(folder):
            adapters = [Adapter.load(place / name, lazy=True) for name in self.names]
            config = replace(self.config, rounds=self.rounds.at(number))
            merged = merge_round(self.state, adapters, config, self.progress)
            with new_folder(folder) as work:
                merged.save(work)
        self.processes.wait()
        self._share(folder, 0)
        merged = Adapter.load(folder)
        tasks = self._tasks(number, merged, records[0]["tasks"] if records else None)
        record: dict[str, Any] = json_values(
            {"key": self._key(number), **merged.manifest["round"], "tasks": tasks, "between_parties": list(CROSSES)}
        )
        if self.processes.writes:
            files.write_json(place / RECORD_FILE, record)
        self.processes.wait()
        return record

    def _tasks(self, number: int, merged: Adapter, first: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
        """Every task's losses in nats per token: of the bare base, of its own adapter and of the merged one."""
        told: dict[str, dict[str, Any]] = {}
        slots = AdapterSlots(self.base)
        own_names = {member.name: member for member in self.members}
        for position, name in enumerate(self.names):
            content = b""
            if name in own_names:
                member = own_names[name]
                adapter = Adapter.load(self.place(number) / name)
                by_itself = on_top(self.state, adapter) if self.rounds.mode == ACCUMULATE else adapter
                losses = {"own": self._loss(slots, by_itself, name), "merged": self._loss(slots, merged, name)}
                losses["base"] = first[name]["base"] if first else self._loss(slots, None, name)
                about = {**_rows_of(member), "scored_rows": len(self.scored[name])}
                content = json.dumps({**about, **losses, "retained": retained(losses)}).encode()
            told[name] = json.loads(self.processes.broadcast(content, position % self.processes.size))
        unwrap(self.base.model)
        return told

    def _loss(self, slots: AdapterSlots, adapter: Adapter | None, name: str) -> float:
        if adapter is not None:
            slots.load("scored", adapter)
        with slots.using(None if adapter is None else "scored"):
            sums = held_out_nats(slots.model, self.scored[name], self.config.batch_size)
        return sum(nats for nats, _ in sums.values()) / sum(count for _, count in sums.values())

    # --- the pool that is left ------------------------------------------------------------------------------------

    def _published(self) -> bool:
        """Whether every process has the pool."""
        done = all(is_complete(self.saving.folder / name) for name in self.names)
        return all(self.processes.broadcast(b"\1" if done else b"\0", rank) == b"\1" for rank in self._ranks())

    def _publish(self, number: int, before: Adapter | None) -> None:
        """Save the last round's adapters as the pool; of mode accumulate with what they were trained on top of."""
        for member in self.members:
            folder = self.saving.folder / member.name
            if is_complete(folder):
                with exclusive(folder):  # whoever wrote it may have been killed before its last step
                    drop_state(folder)
                continue
            adapter = Adapter.load(self.place(number) / member.name)
            told = self.rounds.at(0)
            if told.mode == ACCUMULATE:
                adapter = on_top(before, adapter)
            elif told.mode == FREEZE_A:  # which never moved: factors can be merged as those of a pool in one piece
                adapter.init = {name: value for name, value in adapter.weights.items() if name.endswith(".lora_a")}
            described = {"count": told.count, "mode": told.mode, "between_parties": list(CROSSES)}
            adapter.manifest["rounds"] = described
            adapter.save(folder)
        self.processes.wait()
        for position, name in enumerate(self.names):
            self._share(self.saving.folder / name, position % self.processes.size)

    def _clear(self, number: int) -> None:
        """Remove a done round's adapters, which nothing needs any more."""
        self.processes.wait()
        for name in self.names:
            shutil.rmtree(self.place(number) / name, ignore_errors=True)
        self.processes.wait()

    def _ranks(self) -> range:
        return range(self.processes.size)

    def _share(self, folder: Path, owner: int) -> None:
        """See to it that every process has the adapter folder of the process ``owner``.

        Where they share a disk it is there already; to others its files are sent.
        """
        if self.processes.size == 1:
            return
        there = b"\1" if is_complete(folder) else b"\0"
        if all(self.processes.broadcast(there, rank) == b"\1" for rank in self._ranks()):
            return
        sends = self.processes.rank == owner
        listed = [path.name for path in folder.glob("[!.]*") if path.is_file()] if sends else []
        names = json.loads(self.processes.broadcast(json.dumps(sorted(listed)).encode(), owner))
        with new_folder(folder) if there == b"\0" else nullcontext() as work:
            for name in names:
                content = self.processes.broadcast(files.read_bytes(folder / name) if sends else None, owner)
                if work is not None:
                    files.write_bytes(work / name, content)


def _read_record(content: bytes, path: Path) -> dict[str, Any]:
    """A round's record.

    Raises:
        RsgwmError: it is not what was written there.
    """
    try:
        record = files.parse_json(content.decode())
    except ValueError:  # of bytes that are no text, too
        record = None
    if not isinstance(record, dict) or not {"key", "number", "norm", "cosines", "discarded", "tasks"} <= record.keys():
        raise RsgwmError(f"{path} is damaged; remove it, and the round is made again from what is there")
    return record


def _rows_of(member: Member) -> dict[str, str | None]:
    """What a task was trained and scored on, by its hash; None where it has no held-out rows."""
    return {"data": member.data.hash, "held_out": member.held_out.hash if member.held_out else None}


def retained(losses: Mapping[str, float]) -> float | None:
    """The share of what a task's own adapter gained over the base that the merged one has; None where it gained
    nothing.
    """
    gained = losses["base"] - losses["own"]
    return (losses["base"] - losses["merged"]) / gained if gained > 1e-6 else None


def render_rounds(records: Sequence[Mapping[str, Any]]) -> str:
    """The table a person reads: of every round each task's loss by its own adapter and the merged one."""
    names = list(records[0]["tasks"])
    width = max(12, *(len(name) for name in names))
    head = "  ".join(f"{name:>{width}}" for name in names)
    lines = [f"round  {head}  retained  cosine    norm  discarded    (own → merged, nats per token)"]
    for record in records:
        losses = [f"{record['tasks'][name]['own']:.3f} → {record['tasks'][name]['merged']:.3f}" for name in names]
        shares = [task["retained"] for task in record["tasks"].values() if task["retained"] is not None]
        shown = f"{sum(shares) / len(shares):8.3f}" if shares else "       –"
        lines.append(
            f"{record['number']:5d}  {'  '.join(f'{text:>{width}}' for text in losses)}  {shown}  "
            f"{mean_cosine(record):6.3f}  {record['norm']:6.3f}  {record['discarded']:9.2%}"
        )
    return "\n".join(lines)


def mean_cosine(record: Mapping[str, Any]) -> float:
    """The mean cosine between two tasks' updates of a round."""
    rows: list[list[float]] = record["cosines"]
    pairs = [rows[i][j] for i in range(len(rows)) for j in range(i)]
    return sum(pairs) / len(pairs)
