"""Several processes at one job, started by ``mlx.launch``: each takes its share, and the result is that of one process.

Adapters of a pool, merges of a sweep and batches of items are shared out whole, and each process writes files of its
own. Training one adapter shares out every batch and sums the gradients: losses are sums divided by the trained tokens
of the whole step, so the sum over processes is that of one, whatever the shares' sizes. Every process then holds the
same parameters; only the first writes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.errors import RsgwmError

CHUNK = 1 << 24  # bytes of one message


@dataclass(frozen=True)
class Processes:
    """This process's ``rank`` among ``size``; ``group`` is MLX's, None for one process."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def writes(self) -> bool:
        """Whether this process writes files and speaks: the first one does."""
        return self.rank == 0

    def share(self, rows: Sequence[int]) -> list[int]:
        """Every size-th row: rows are sorted by length, so shares are alike."""
        return list(rows[self.rank :: self.size])

    def wait(self) -> None:
        """Until every process is here.

        Raises:
            RsgwmError: one of them has ended.
        """
        if self.size > 1:
            self._all_sum(mx.ones(()))

    def broadcast(self, content: bytes | None, owner: int) -> bytes:
        """What the process ``owner`` gives as ``content``, in every process; the others' is not looked at.

        Raises:
            RsgwmError: a process has ended.
        """
        if self.size == 1:
            return content or b""
        mine = (content or b"") if self.rank == owner else b""
        sizes = np.zeros(2, dtype=np.int32)  # whole messages, and the rest
        sizes[:] = divmod(len(mine), CHUNK)
        chunks, rest = np.array(self._all_sum(mx.array(sizes))).tolist()
        pieces = []
        for start in range(0, chunks * CHUNK + rest, CHUNK):
            length = min(CHUNK, chunks * CHUNK + rest - start)
            piece = np.zeros(length, dtype=np.uint8)
            if self.rank == owner:
                piece[:] = np.frombuffer(mine[start : start + length], dtype=np.uint8)
            pieces.append(np.array(self._all_sum(mx.array(piece))).tobytes())
        return b"".join(pieces)

    def _all_sum(self, values: mx.array) -> mx.array:
        try:
            total = mx.distributed.all_sum(values, group=self.group)
            mx.eval(total)
        except RuntimeError as error:
            raise RsgwmError(
                f"another process of this run has ended ({error}); start the command again, what is finished is kept"
            ) from error
        return total

    def sum(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The sum over processes of every array, in one float32 message."""
        if self.size == 1:
            return dict(arrays)
        flat = mx.concatenate([value.astype(mx.float32).reshape(-1) for value in arrays.values()])
        total = self._all_sum(flat)
        summed, start = {}, 0
        for name, value in arrays.items():
            summed[name] = total[start : start + value.size].reshape(value.shape).astype(value.dtype)
            start += value.size
        return summed


ALONE = Processes()


def launched_processes() -> Processes:
    """The processes ``mlx.launch`` started this one among; :data:`ALONE` without it."""
    if not any(name in os.environ for name in ("MLX_RANK", "MLX_HOSTFILE", "OMPI_COMM_WORLD_RANK", "PMI_RANK")):
        return ALONE
    group = mx.distributed.init()
    return Processes(group.rank(), group.size(), group) if group.size() > 1 else ALONE
