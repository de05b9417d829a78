"""``rsgwm merge``: several adapters to one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options.paths import PATH, SOURCE


@click.command()
@click.argument("adapters", nargs=-1, type=SOURCE)
@click.option("--out", type=PATH, help="Adapter folder to write.")
@click.option("--method", default="rsgwm", show_default=True, help="Name of a method; --list shows all.")
@click.option("--role", default="draft", show_default=True, help="draft, verify, or a role of your own.")
@click.option("--tau", type=float, help="rsgwm: quantile of the mask, in (0, 1); default 0.30 draft, 0.50 verify.")
@click.option("--signal", help="rsgwm: importance used: per_role (default), shared, or a signal's name.")
@click.option("--space", help="factor or product, where the method has both.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any parameter of the method.")
@click.option(
    "--at",
    "overrides",
    multiple=True,
    nargs=2,
    metavar="PATTERN NAME=VALUE[,…]",
    help="Other parameters, or weights=1/0.5/…, for modules whose name matches the regular expression.",
)
@click.option("--weight", "weights", multiple=True, type=float, help="One for each adapter, in their order.")
@click.option("--rank", type=int, help="Rank of the result; default: the highest of the sources, for cat their sum.")
@click.option(
    "--largest",
    type=float,
    help="Allow a result of up to so many times the norm that its sources and weights account for.  [default: 40]",
)
@click.option(
    "--base", "base_name", help="Base of adapters in other formats.  [default: the one that each of them names]"
)
@click.option("--dry-run", is_flag=True, help="Print the diagnosis, write nothing.")
@click.option("--list", "list_methods", is_flag=True, help="List the methods with their parameters and sources.")
@common_options
def merge(
    console: Console,
    adapters: tuple[Path | str, ...],
    out: Path | None,
    method: str,
    role: str,
    tau: float | None,
    signal: str | None,
    space: str | None,
    settings: tuple[str, ...],
    overrides: tuple[tuple[str, str], ...],
    weights: tuple[float, ...],
    rank: int | None,
    largest: float | None,
    base_name: str | None,
    dry_run: bool,
    list_methods: bool,
) -> None:
    """Merge ADAPTERS, trained on one base, into one.

    Each is a folder (ours, mlx-lm's or PEFT's), a .gguf file, a Hub id or hf://owner/name@revision; a folder whose
    subfolders are adapters stands for them.

    \b
    Examples:
      rsgwm merge pool/* --role draft --out drafter
      rsgwm merge pool/* --role verify --tau 0.6 --out verifier
      rsgwm merge a b --method ties --set density=0.3 --out mixed
      rsgwm merge a b --method linear --at 'layers\\.2[0-9]' weights=0/1 --out mixed
      rsgwm merge pool/* --method karcher --dry-run
      rsgwm merge --list
    """
    if list_methods:
        _list(console)
        return
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.merging.merge import merge as merge_adapters
    from mlx_rsgwm.merging.options import MergeOptions
    from mlx_rsgwm.models.adapter import is_complete
    from mlx_rsgwm.models.adapter_sources import load_adapters

    if not adapters:
        raise RsgwmError("no adapters given; name at least two adapter folders, or use --list")
    if out is None and not dry_run:
        raise RsgwmError("no --out folder given; name one, or look first with --dry-run")
    if out is not None and is_complete(out) and not dry_run:
        raise RsgwmError(f"{out} already holds a finished adapter; choose another folder or remove it")
    named = {"tau": tau, "signal": signal, "space": space}
    options = MergeOptions(
        method=method,
        role=role,
        parameters={name: value for name, value in named.items() if value is not None} | _pairs(settings, "--set"),
        weights=weights,
        rank=rank,
        seed=console.seed,
        overrides=tuple(_override(pattern, text) for pattern, text in overrides),
        **({} if largest is None else {"largest": largest}),
    )
    loaded = load_adapters(adapters, base_name, lazy=True, hashes=False, progress=console.progress)
    merged = merge_adapters(loaded, options, console.progress, base=base_name)
    if not dry_run:
        assert out is not None
        merged.save(out)
    _tell(console, [one.where for one in loaded], merged.manifest["merge"], "nothing written" if dry_run else str(out))


def _tell(console: Console, adapters: Sequence[str], merge: dict[str, Any], out: str) -> None:
    found = merge["diagnosis"]
    overall = found["overall"]
    console.line(
        f"{out}: {merge['method']} of {len(adapters)} adapters for the {merge['role']} role, rank {merge['rank']}"
    )
    for warning in merge["warnings"]:
        console.line(f"warning: {warning}")
    console.line(f"norm of the update: {overall['norm_share']:.3f} of the sources' mean")
    for path, cosine, norm in zip(adapters, overall["cosines"], overall["source_norms"], strict=True):
        console.line(f"cosine to {path}: {cosine:.3f} (its norm: {norm:.4g})")
    console.line(f"cosine to the mean product: {overall['cosine_to_mean_product']:.3f}")
    console.line(f"lost to the rank: {overall['discarded']:.2%} of the squared norm")
    for suffix, what in (("_a", "lora_a"), ("_b", "lora_b"), ("", "the update")):
        if f"kept{suffix}" in overall:
            kept = ", ".join(f"{share:.0%}" for share in overall[f"kept{suffix}"])
            both = overall[f"overlap{suffix}"]
            console.line(f"kept of {what}: {kept}; by all adapters {both:.0%} of what any keeps")
    worst = min(found["modules"].items(), key=lambda item: item[1]["norm_share"])
    console.line(f"weakest module: {worst[0]}, norm {worst[1]['norm_share']:.3f} of the sources' mean")
    console.result({"out": out, "merge": {**merge, "diagnosis": found}})


def _list(console: Console) -> None:
    from mlx_rsgwm.merging.methods import METHODS

    for name, method in METHODS.items():
        console.line(f"{name}: {method.summary} ({method.source})")
        for parameter, meaning in method.parameters.items():
            choices = f" [{', '.join(str(choice) for choice in meaning.choices)}]" if meaning.choices else ""
            console.line(f"    {parameter}={meaning.default}{choices}  {meaning.meaning}")
    console.result(
        {
            name: {
                "summary": method.summary,
                "source": method.source,
                "needs": list(method.needs),
                "parameters": {key: parameter.default for key, parameter in method.parameters.items()},
            }
            for name, method in METHODS.items()
        }
    )


def _pairs(texts: Sequence[str], option: str) -> dict[str, Any]:
    from mlx_rsgwm.core.errors import RsgwmError

    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise RsgwmError(f"{option} wants NAME=VALUE, found {text!r}")
        pairs[name] = _value(value)
    return pairs


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "null": None}.get(text, text)


def _override(pattern: str, text: str) -> Any:
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.merging.options import Override

    pairs = _pairs(text.split(","), "--at")
    weights = str(pairs.pop("weights", ""))
    try:
        numbers = tuple(float(weight) for weight in weights.split("/") if weight)
    except ValueError:
        raise RsgwmError(f"--at {pattern}: weights are numbers with / between them, found {weights!r}") from None
    return Override(pattern, pairs, numbers)
