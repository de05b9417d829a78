"""``rsgwm bench``: how fast this machine does the work, beside torch."""

from __future__ import annotations

import json

import click

from mlx_rsgwm.cli.console import Console, common_options


@click.group()
def bench() -> None:
    """Measure latency against torch."""


@bench.command("latency")
@click.option("--base", default="smollm2-135m", show_default=True, help="Hub id, folder, .gguf file or smollm2-135m.")
@click.option("--adapter", default="", help="Adapter folder; default: a seeded random one of rank 16.")
@click.option("--prompt-tokens", default=128, show_default=True, help="Tokens of the prompt that prefill runs.")
@click.option("--new-tokens", default=32, show_default=True, help="Tokens that decode runs one by one.")
@click.option("--trials", default=5, show_default=True, help="Timed trials of either side, after one of warm-up.")
@click.option("--dtype", default="auto", show_default=True, help="auto (bfloat16 on Metal, else float32) or a name.")
@click.option(
    "--device", default="auto", show_default=True, help="Torch's: auto (MPS, else the CPU), mps, cuda or cpu."
)
@common_options
def bench_latency(
    console: Console,
    base: str,
    adapter: str,
    prompt_tokens: int,
    new_tokens: int,
    trials: int,
    dtype: str,
    device: str,
) -> None:
    """Time prefill and decode in MLX and torch, with and without an adapter; the last line is JSON.

    Example: rsgwm bench latency --prompt-tokens 64 --new-tokens 16
    """
    from mlx_rsgwm.bench.latency import LatencyConfig, measure_latency, table

    config = LatencyConfig(
        base=base,
        adapter=adapter,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        trials=trials,
        dtype=dtype,
        device=device,
        seed=console.seed,
    )
    result = measure_latency(config, console.progress)
    console.line(table(result))
    if not console.json:
        console.line(json.dumps(result))
    console.result(result)
