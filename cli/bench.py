"""``rsgwm bench``: how fast this machine does the work, beside torch and beside another time."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import PATH, POSITIVE, SOURCE, TIMES, Whole


@click.command("latency")
@shared.base("the adapter's own, else smollm2-135m")
@click.option("--adapter", type=SOURCE, help="Adapter: one.  [default: a seeded random one of rank 16]")
@click.option("--works", default="", help="Some of forward,lora,fused,train,merge,loop.  [default: all]")
@click.option(
    "--prompt-tokens",
    type=Whole(2),
    default=128,
    show_default=True,
    help="Tokens of the prompt that prefill runs.",
)
@click.option("--new-tokens", type=POSITIVE, default=32, show_default=True, help="Tokens that decode runs one by one.")
@shared.batch_size(2)
@click.option("--pool-size", type=Whole(2, 1000), default=4, show_default=True, help="Adapters that are merged.")
@click.option(
    "--trials", type=TIMES, default=5, show_default=True, help="Timed trials of either side, after one of warm-up."
)
@shared.dtype(["auto", "float32", "float16", "bfloat16"], "auto is bfloat16 on Metal, else float32")
@shared.device()
@shared.out("a JSON file; table and plot go beside it")
@common_options
def bench_latency(
    console: Console,
    base_name: str | None,
    adapter: Path | None,
    works: str,
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int,
    pool_size: int,
    trials: int,
    dtype: str,
    device: str,
    out: Path | None,
) -> None:
    """Time the works of a user in MLX and torch; the last line is JSON.

    Prefill, decode, the same with an adapter unfused and fused, a training step, a merge, draft–verify.

    \b
    Examples:
      rsgwm bench latency --works forward --prompt-tokens 64 --new-tokens 16
      rsgwm bench latency --out bench/results/mine.json
    """
    from mlx_rsgwm.bench.latency import WORKS, LatencyConfig, measure_latency
    from mlx_rsgwm.bench.outcome import save_outcome, table

    config = LatencyConfig(
        base=base_name or _base_of(adapter),
        adapter="" if adapter is None else str(adapter),
        works=works or ",".join(WORKS),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rows=batch_size,
        pool=pool_size,
        trials=trials,
        dtype=dtype,
        device=device,
        seed=console.seed,
    )
    result = measure_latency(config, console.progress)
    if out is not None:
        written = save_outcome(result, out)
        console.progress.message(f"wrote {', '.join(map(str, written))}")
    console.line(table(result))
    if not console.json:
        console.line(json.dumps(result["rows"]))
    console.result(result)


@click.command("compare")
@click.argument("before", type=PATH)
@click.argument("after", type=PATH)
@click.option("--anyway", is_flag=True, help="Compare results of different settings, too.")
@common_options
def bench_compare(console: Console, before: Path, after: Path, anyway: bool) -> None:
    """Compare the results BEFORE and AFTER of `rsgwm bench latency --out`: of two machines, or of one at two times.

    Example: rsgwm bench compare bench/results/before.json bench/results/after.json
    """
    from mlx_rsgwm.bench.outcome import compare, comparison_table, load_outcome

    comparison = compare(load_outcome(before), load_outcome(after), anyway)
    console.line(comparison_table(comparison))
    console.result(comparison)


def _base_of(adapter: Path | None) -> str:
    """The base that an adapter records, else the embedded one."""
    from mlx_rsgwm.models.adapter import Adapter

    described = Adapter.load(adapter, lazy=True).manifest.get("base") if adapter is not None else None
    return str((described or {}).get("name") or "smollm2-135m")
