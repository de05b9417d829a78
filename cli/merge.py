"""``rsgwm merge``: several adapters to one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import DECIMAL, DIGITS, PATH, SOURCE, Number, OneOf
from mlx_rsgwm.merging.methods import METHODS
from mlx_rsgwm.merging.options import AUTO, MergeOptions

# Ten that people come for; the others are variants of these, or for comparison with other programs.
USUAL = (
    *("regmean", "rsgwm", "linear", "norm_equalised", "task_arithmetic"),
    *("cat", "ties", "dare_ties", "slerp", "karcher"),
)
WIDTH = 79

if TYPE_CHECKING:
    from mlx_rsgwm.models.adapter import Adapter


@click.command()
@click.argument("adapters", nargs=-1, type=SOURCE)
@shared.out("an adapter folder")
@click.option(
    "--method",
    type=OneOf([AUTO, *METHODS]),
    default=AUTO,
    metavar="METHOD",
    show_default=True,
    help="How to merge; auto goes by what the adapters have kept, and says why; --list shows the methods.",
)
@click.option(
    "--role", default="draft", show_default=True, help="What the result is for: draft, verify, or a role of your own."
)
@shared.settings("any parameter of the method")
@click.option(
    "--at",
    "overrides",
    multiple=True,
    nargs=2,
    metavar="PATTERN NAME=VALUE[,…]",
    help="For modules whose name matches the regular expression: other parameters, method=NAME with its parameters, "
    "weights=1/0.5/…, or ranks=4/8/… that the adapters are brought to first.",
)
@shared.weight()
@shared.rank("the highest of the sources, for cat their sum")
@click.option(
    "--largest",
    type=Number(0, min_open=True),
    default=MergeOptions.largest,
    show_default=True,
    help="Allow a result of up to so many times the norm that its sources and weights account for.",
)
@click.option(
    "--recollect",
    "corpora",
    multiple=True,
    type=PATH,
    metavar="CORPUS",
    help="Rows of an adapter's task, one for each in their order: directions are collected anew while merging, each "
    "layer's under the merged layers below.",
)
@click.option(
    "--plan",
    "plan_file",
    type=PATH,
    help="Merge plan, a YAML file; of rsgwm audit, with method and weights of every module, and the adapters.",
)
@shared.base()
@shared.dry_run("write nothing, print the diagnosis")
@click.option("--list", "list_methods", is_flag=True, help="List the methods that are used most.")
@click.option("--all", "list_all", is_flag=True, help="List all methods with their parameters and sources.")
@common_options
def merge(
    console: Console,
    adapters: tuple[Path | str, ...],
    out: Path | None,
    method: str,
    role: str,
    settings: tuple[str, ...],
    overrides: tuple[tuple[str, str], ...],
    weights: tuple[float, ...],
    rank: int | None,
    largest: float,
    corpora: tuple[Path, ...],
    plan_file: Path | None,
    base_name: str | None,
    dry_run: bool,
    list_methods: bool,
    list_all: bool,
) -> None:
    """Merge ADAPTERS, trained on one base, into one.

    Each is a folder (ours, mlx-lm's or PEFT's), a .gguf file, a Hub id or hf://owner/name@revision; a folder whose
    subfolders are adapters stands for them.

    \b
    Examples:
      rsgwm merge owner/one owner/two --out both
      rsgwm merge pool/* --role draft --out drafter
      rsgwm merge pool/* --role verify --set tau=0.6 --out verifier
      rsgwm merge a b --method ties --set density=0.3 --out mixed
      rsgwm merge a b --method linear --at 'layers\\.2[0-9]' weights=0/1 --out mixed
      rsgwm merge pool/* --method karcher --dry-run
      rsgwm merge a b --method regmean --recollect corpus/a --recollect corpus/b --out mixed
      rsgwm merge --plan plan.yaml --out merged
      rsgwm merge --list --all
    """
    if list_methods or list_all:
        _list(console, list_all)
        return
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.training.checkpoints import claim_adapter_folder

    if not adapters and plan_file is None:
        raise RsgwmError("no adapters given; name at least two adapter folders, or use --list")
    if plan_file is not None and (method != AUTO or settings or overrides or weights or corpora):
        raise RsgwmError(
            "--plan says method, parameters and weights; leave out --method, --set, --at, --weight, --recollect"
        )
    if out is None and not dry_run:
        last = str(adapters[-1])
        near = f"did you mean --out {last}?" if len(adapters) > 2 and not Path(last).exists() else "name one"
        raise RsgwmError(f"no --out folder given; {near}, or look first with --dry-run")
    if out is not None and not dry_run:
        click.get_current_context().with_resource(claim_adapter_folder(out))
    options = MergeOptions(
        method=method,
        role=role,
        parameters=named_values(settings, "--set"),
        weights=weights,
        rank=rank,
        seed=console.seed,
        overrides=tuple(_override(pattern, text) for pattern, text in overrides),
        largest=largest,
    )
    if plan_file is not None:
        names, merged = _by_plan(console, plan_file, adapters, options, base_name)
    else:
        names, merged = _by_method(console, adapters, options, corpora, base_name)
    if out is not None and not dry_run:
        merged.save(out)
    _print_result(console, names, merged.manifest["merge"], "nothing written" if dry_run else str(out))


def _by_method(
    console: Console,
    adapters: Sequence[Path | str],
    options: MergeOptions,
    corpora: Sequence[Path],
    base_name: str | None,
) -> tuple[list[str], Adapter]:
    from mlx_rsgwm.audit.advice import advice_before_merge
    from mlx_rsgwm.merging.merge import merge as merge_adapters
    from mlx_rsgwm.models.adapter_sources import load_adapters

    loaded = load_adapters(adapters, base_name, lazy=True, hashes=False, progress=console.progress)

    def say_verdict() -> None:
        if advice := advice_before_merge(loaded):
            console.line(f"audit: {advice}")

    recollection = None
    if corpora:
        from mlx_rsgwm.merging.recollect import open_recollection

        recollection = open_recollection(loaded, corpora, base_name, console.seed, console.progress)
    merged = merge_adapters(
        loaded, options, console.progress, base=base_name, recollection=recollection, once_checked=say_verdict
    )
    return [adapter.where for adapter in loaded], merged


def _by_plan(
    console: Console,
    plan_file: Path,
    adapters: Sequence[Path | str],
    options: MergeOptions,
    base_name: str | None,
) -> tuple[list[str], Adapter]:
    from mlx_rsgwm.audit.carry_out import merge_by_plan
    from mlx_rsgwm.audit.plan import read_plan

    plan = read_plan(plan_file)
    merged = merge_by_plan(plan, adapters, options, console.progress, base_name)
    outcome = merged.manifest["merge"]["outcome"]["truncated"]
    console.line(f"plan: {len(plan.modules)} modules; Q_min {outcome['q_min']:.3f}, D {outcome['dominance']:.3f}")
    return [adapter.adapter for adapter in plan.adapters], merged


def _print_result(console: Console, adapters: Sequence[str], merge: dict[str, Any], out: str) -> None:
    diagnosis = merge["diagnosis"]
    overall = diagnosis["overall"]
    console.line(
        f"{out}: {merge['method']} of {len(adapters)} adapters for the {merge['role']} role, rank {merge['rank']}"
    )
    if "chosen_because" in merge:
        console.line(f"{merge['method']} was chosen: {merge['chosen_because']} (--method takes another)")
    for path, collected in zip(adapters, merge.get("recollected", ()), strict=False):
        rows_read = ", ".join(f"{count} {role} rows" for role, count in collected["rows"].items())
        console.line(f"directions of {path}: recollected from {rows_read}")
    for warning in merge["warnings"]:
        console.line(f"warning: {warning}")
    console.line(f"norm of the update: {overall['norm_share']:.3f} of the sources' mean")
    for path, cosine, norm in zip(adapters, overall["cosines"], overall["source_norms"], strict=True):
        console.line(f"cosine to {path}: {cosine:.3f} (its norm: {norm:.4g})")
    console.line(f"cosine to the mean product: {overall['cosine_to_mean_product']:.3f}")
    console.line(f"lost to the rank: {overall['discarded']:.2%} of the squared norm")
    for suffix, what in (("_a", "lora_a"), ("_b", "lora_b"), ("", "the update")):
        if f"kept{suffix}" in overall:
            shown = ", ".join(f"{share:.0%}" for share in overall[f"kept{suffix}"])
            both = overall[f"overlap{suffix}"]
            console.line(f"kept of {what}: {shown}; by all adapters {both:.0%} of what any keeps")
    worst = min(diagnosis["modules"].items(), key=lambda item: item[1]["norm_share"])
    console.line(f"weakest module: {worst[0]}, norm {worst[1]['norm_share']:.3f} of the sources' mean")
    console.result({"out": out, "merge": {**merge, "diagnosis": diagnosis}})


def _list(console: Console, everything: bool) -> None:
    if everything:
        _print_all(console)
    else:
        _print_usual(console)
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


def _print_usual(console: Console) -> None:
    """The usual methods and what they take, so that both fit a screen of 24 lines and 80 columns."""
    console.line(f"{AUTO:<15} the first of regmean, rsgwm, norm_equalised, linear to suit")
    for name in USUAL:
        console.line(_cut(f"{name:<15} {METHODS[name].summary}"))
        taken = [parameter for parameter in METHODS[name].parameters if parameter != "truncate"]
        if taken:
            console.line(_cut(f"{'':<15} --set {', '.join(taken)}"))
    console.line(f"{len(METHODS) - len(USUAL)} more, and what all parameters mean: rsgwm merge --list --all")


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 2].rsplit(' ', 1)[0]} …"


def _print_all(console: Console) -> None:
    for name, method in METHODS.items():
        console.line(f"{name}: {method.summary} ({method.source})")
        for parameter, meaning in method.parameters.items():
            choices = f" [{', '.join(str(choice) for choice in meaning.choices)}]" if meaning.choices else ""
            console.line(f"    {parameter}={meaning.default}{choices}  {meaning.meaning}")


def named_values(texts: Sequence[str], option: str) -> dict[str, Any]:
    """``NAME=VALUE`` texts as a mapping; whole and decimal numbers become numbers."""
    from mlx_rsgwm.core.errors import RsgwmError

    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise RsgwmError(f"{option} wants NAME=VALUE, found {text!r}")
        pairs[name] = _value(value)
    return pairs


def _value(text: str) -> Any:
    if DIGITS.fullmatch(text) and len(text) < 20:
        return int(text)
    if DECIMAL.fullmatch(text):
        return float(text)
    return {"true": True, "false": False, "null": None}.get(text, text)


def _override(pattern: str, text: str) -> Any:
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.merging.options import Override

    pairs = named_values(text.split(","), "--at")
    weights = _numbers(pairs.pop("weights", ""), f"--at {pattern}: weights")
    ranks = _numbers(pairs.pop("ranks", ""), f"--at {pattern}: ranks")
    if any(rank != int(rank) for rank in ranks):
        raise RsgwmError(f"--at {pattern}: ranks are whole numbers, found {'/'.join(f'{rank:g}' for rank in ranks)}")
    method = str(pairs.pop("method", ""))
    return Override(pattern, pairs, weights, method, tuple(map(int, ranks)))


def _numbers(text: Any, what: str) -> tuple[float, ...]:
    from mlx_rsgwm.core.errors import RsgwmError

    numbers = [_value(piece) for piece in str(text).split("/") if piece]
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
        raise RsgwmError(f"{what} are numbers with / between them, found {text!r}")
    return tuple(map(float, numbers))
