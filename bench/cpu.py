"""Why ``mlx_rsgwm/cpu.py`` exists: on Linux's CPU, the plain and the quicker way of the same thing, timed in turns.

    python bench/cpu.py

The last line is JSON: milliseconds (medians) and the ratio plain / quicker of every row.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable

import mlx.core as mx

ROWS = 11


def milliseconds(work: Callable[[], mx.array]) -> float:
    """One evaluation, on the clock."""
    started = time.perf_counter()
    mx.eval(work())
    return 1000 * (time.perf_counter() - started)


def compare(plain: Callable[[], mx.array], quick: Callable[[], mx.array]) -> dict[str, float]:
    """Medians of interleaved trials after one warm-up of each."""
    milliseconds(plain), milliseconds(quick)
    times = [(milliseconds(plain), milliseconds(quick)) for _ in range(ROWS)]
    before, after = (statistics.median(column) for column in zip(*times, strict=True))
    return {"plain_ms": round(before, 3), "quick_ms": round(after, 3), "ratio": round(before / after, 2)}


def main() -> None:
    """Shapes of SmolLM2-135M: a SwiGLU gate of 16 × 56 tokens, the output head for 32 rows, one projection."""
    gate = mx.random.normal((16, 56, 1536))
    head, row = mx.random.normal((49152, 576)), mx.random.normal((32, 1, 576))
    weight, states = mx.random.normal((1536, 576)), mx.random.normal((16, 56, 576))
    mx.eval(gate, head, row, weight, states)
    rows = {
        "exponential": compare(lambda: mx.exp(gate), lambda: mx.power(math.e, gate)),
        "head, 32 rows": compare(lambda: row @ head.T, lambda: row.reshape(-1, 576) @ head.T),
        "projection, 16 x 56 tokens": compare(lambda: states @ weight.T, lambda: states.reshape(-1, 576) @ weight.T),
    }
    for name, row_times in rows.items():
        print(f"{name:<28}{row_times['plain_ms']:>9.1f} ms {row_times['quick_ms']:>9.1f} ms  x{row_times['ratio']}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
