"""Seeds of random streams by what they are for, so that work done in another order, or resumed, draws the same numbers.

A stream is named by the run's seed and its own place (a training step, a module); nothing draws from a shared state.
"""

from __future__ import annotations

import hashlib

# Of an unseeded run, in the command line, in recipes and in the library alike; the paper's.
DEFAULT_SEED = 42


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of the random stream for one training step of one process, in [0, 2⁶⁴)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "big")


def module_seed(seed: int, module: str) -> int:
    """Seed of the random masks and sketches that a merge draws for one module, in [0, 2⁶⁴)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{module}".encode()).digest()[:8], "little")
