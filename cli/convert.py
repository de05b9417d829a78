"""``rsgwm convert``: adapters between this project's folders and PEFT's."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options


@click.group()
def convert() -> None:
    """Turn an adapter into PEFT's format, or back, without changing a bit of it."""


@convert.command("to-peft")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", help="Base model to name in the result; default: the one the adapter was trained on.")
@common_options
def convert_to_peft(console: Console, adapter: Path, out: Path, base: str | None) -> None:
    """Write ADAPTER (an mlx-lm adapter folder) to the new folder OUT as PEFT loads it.

    Example: rsgwm convert to-peft runs/drafter drafter-peft
    """
    from mlx_rsgwm.adapter import Adapter
    from mlx_rsgwm.converters.peft import require_empty, to_peft
    from mlx_rsgwm.errors import RsgwmError

    require_empty(out)
    source = Adapter.load(adapter)
    name = base or (source.manifest.get("base") or {}).get("name")
    if not name:
        raise RsgwmError(f"{adapter} does not say which base model it is for; give --base")
    to_peft(source, name, out)
    modules = len(source.modules())
    console.line(f"{out}: PEFT adapter for {name}, rank {source.spec.rank}, {modules} modules")
    console.result({"out": out, "base": name, "rank": source.spec.rank, "modules": modules})


@convert.command("from-peft")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="Base model: Hub id, folder, .gguf file or smollm2-135m.")
@common_options
def convert_from_peft(console: Console, folder: Path, out: Path, base: str) -> None:
    """Write the PEFT adapter in FOLDER to the new folder OUT as mlx-lm loads it.

    Example: rsgwm convert from-peft drafter-peft drafter --base smollm2-135m
    """
    from mlx_rsgwm.converters.peft import from_peft_on, require_empty

    require_empty(out)
    adapter = from_peft_on(folder, base, console.progress)
    adapter.save(out)
    modules, scale = len(adapter.modules()), adapter.spec.scale
    console.line(f"{out}: adapter for {base}, rank {adapter.spec.rank}, scale {scale:g}, {modules} modules")
    console.result({"out": out, "base": base, "rank": adapter.spec.rank, "scale": scale, "modules": modules})
