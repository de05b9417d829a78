"""Why ``models/linux_cpu.py`` and ``models/linux_products.py`` exist: plain and quicker ways of the same, in turns.

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

from mlx_rsgwm.models.linux_cpu import ones_where, order_statistics
from mlx_rsgwm.models.linux_products import attention, product

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
    """A SwiGLU gate, a projection and attention of SmolLM2-135M for 16 × 56 tokens; the median of one of TinyLlama's
    factors of rank 16."""
    gate, factor = mx.random.normal((16, 56, 1536)), mx.random.normal((2048 * 16,))
    mask = gate > 0
    states, weight = mx.random.normal((16, 56, 576)), mx.random.normal((1536, 576))
    queries, keys, values = (mx.random.normal((16, heads, 56, 64)) for heads in (9, 3, 3))
    mx.eval(gate, factor, mask, states, weight, queries, keys, values)
    rows = {
        "exponential": compare(lambda: mx.exp(gate), lambda: mx.power(math.e, gate)),
        "mask, 16 x 56 x 1536": compare(lambda: gate * mask, lambda: gate * ones_where(mask)),
        "median of 32768": compare(
            lambda: mx.partition(factor, 16384)[16384], lambda: order_statistics(factor, 16384)[0]
        ),
        "product, 16 x 56 x 576 x 1536": compare(lambda: states @ weight.T, lambda: product(states, weight)),
        "attention, 16 x 9 x 56 x 64": compare(
            lambda: mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.125, mask="causal"),
            lambda: attention(queries, keys, values, None, 0.125, "causal"),
        ),
    }
    for name, row_times in rows.items():
        print(f"{name:<31}{row_times['plain_ms']:>9.1f} ms {row_times['quick_ms']:>9.1f} ms  x{row_times['ratio']}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
