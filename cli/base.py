"""``rsgwm base``: fetch a base model, and say what it is.

A name is a Hugging Face Hub id, a folder, a .gguf file of the Llama architecture, or the alias smollm2-135m.
"""

from __future__ import annotations

import click

from mlx_rsgwm.cli.console import Console, common_options


@click.command()
@click.argument("name")
@common_options
def pull(console: Console, name: str) -> None:
    """Fetch and convert a base model, so that later commands need no network.

    NAME is a Hugging Face Hub id, a folder, a .gguf file of the Llama architecture, or the alias smollm2-135m.

    Example: rsgwm base pull smollm2-135m
    """
    from mlx_rsgwm.models.base import resolve_base
    from mlx_rsgwm.models.base_folder import fingerprint_of

    folder = resolve_base(name, console.progress)
    fingerprint = fingerprint_of(folder)
    console.line(f"{name} is ready: {folder}")
    console.result({"name": name, "folder": str(folder), "fingerprint": fingerprint})


@click.command()
@click.argument("name")
@common_options
def info(console: Console, name: str) -> None:
    """Say what a base model is (it is fetched first if need be).

    NAME is a Hugging Face Hub id, a folder, a .gguf file of the Llama architecture, or the alias smollm2-135m.

    Example: rsgwm base info smollm2-135m
    """
    from mlx_rsgwm.models.base import resolve_base
    from mlx_rsgwm.models.base_folder import describe_folder

    facts = {"name": name, **describe_folder(resolve_base(name, console.progress))}
    quantization = facts["quantization"]
    shown = {
        "name": name,
        "folder": facts["folder"],
        "fingerprint": facts["fingerprint"],
        "architecture": facts["architecture"],
        "parameters": f"{facts['parameters']:,}",
        "dtype": ", ".join(facts["dtypes"]),
        "quantisation": ", ".join(f"{key} {value}" for key, value in (quantization or {}).items()) or "none",
        "chat template": "yes" if facts["chat_template"] else "no",
        "size on disk": f"{facts['bytes_on_disk'] / 1e6:,.0f} MB",
    }
    for label, value in shown.items():
        console.line(f"{label:<14}{value}")
    console.result(facts)
