"""``rsgwm bench``: how fast this machine does the work, beside torch and beside another time."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options.paths import PATH


@click.command("latency")
@click.option("--base", default="smollm2-135m", show_default=True, help="Hub id, folder, .gguf file or smollm2-135m.")
@click.option("--adapter", default="", help="Adapter folder; default: a seeded random one of rank 16.")
@click.option("--works", default="", help="Some of forward,lora,fused,train,merge,loop.  [default: all]")
@click.option("--prompt-tokens", default=128, show_default=True, help="Tokens of the prompt that prefill runs.")
@click.option("--new-tokens", default=32, show_default=True, help="Tokens that decode runs one by one.")
@click.option("--rows", default=2, show_default=True, help="Rows of a training step, of --prompt-tokens tokens each.")
@click.option("--pool", default=4, show_default=True, help="Adapters that are merged.")
@click.option("--trials", default=5, show_default=True, help="Timed trials of either side, after one of warm-up.")
@click.option("--dtype", default="auto", show_default=True, help="auto (bfloat16 on Metal, else float32) or a name.")
@click.option(
    "--device", default="auto", show_default=True, help="Torch's: auto (MPS, CUDA, else the CPU), mps, cuda or cpu."
)
@click.option("--out", type=PATH, help="JSON file to write; table and plot go beside it.")
@common_options
def bench_latency(
    console: Console,
    base: str,
    adapter: str,
    works: str,
    prompt_tokens: int,
    new_tokens: int,
    rows: int,
    pool: int,
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
        base=base,
        adapter=adapter,
        works=works or ",".join(WORKS),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rows=rows,
        pool=pool,
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

    found = compare(load_outcome(before), load_outcome(after), anyway)
    console.line(comparison_table(found))
    console.result(found)
