"""``rsgwm fuse``: a model of a base and an adapter, once most of the adapter is known to survive in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.old_names import also_positional
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import FORMAT, SHARE, SOURCE, OneOf
from mlx_rsgwm.core.errors import RsgwmError

# FORMATS and MIN_SHARE of mlx_rsgwm.converters.fuse.fuse, which is slow to import; a test holds them equal.
MIN_SHARE = 0.9
FORMATS = ["keep", "float32", "float16", "bfloat16", "8bit", "4bit", "3bit"]


@click.command()
@click.argument("adapter", type=SOURCE)
@also_positional("out", unless="compare")
@shared.out("a new folder; required but for --compare")
@shared.base()
@click.option(
    "--format",
    "target",
    type=OneOf(FORMATS),
    help="Of the result's weights: as the base's, a float type, or quantised (all layers, groups of 64).  "
    "[default: keep]",
)
@click.option("--bits", "quant", type=FORMAT, help="Instead of --format: 4, or 3,32, or 4,mxfp4.")
@shared.vector()
@shared.vector_weight()
@click.option("--feedback", is_flag=True, help="Round by error feedback (GPTQ) on the adapter's directions.")
@click.option("--compare", is_flag=True, help="Write nothing; compare the ways to few bits on the rows of --data.")
@shared.data()
@shared.data_rows(64)
@click.option(
    "--min-share",
    type=SHARE,
    default=MIN_SHARE,
    show_default=True,
    help="Share of the adapter's update that must survive in that format.",
)
@click.option("--force", is_flag=True, help="Write the model however little survives.")
@common_options
def fuse(
    console: Console,
    adapter: Path | str,
    out: Path | None,
    base_name: str | None,
    target: str | None,
    quant: Any,
    vector: Path | str | None,
    weight: float | None,
    feedback: bool,
    compare: bool,
    data: tuple[str, ...],
    data_rows: int,
    min_share: float,
    force: bool,
) -> None:
    """Work ADAPTER into its base's weights and write the model to a new folder.

    ADAPTER is a folder (ours, mlx-lm's or PEFT's), a .gguf file, a Hub id or hf://owner/name@revision.

    Before anything is written, the share of every layer's update that survives rounding to the format is measured;
    afterwards the written model's logits are compared. Exits 3 when less than the stated share survives.

    --vector puts a quantization vector on ADAPTER first; the format is the vector's unless --bits gives another.
    --compare tries plain rounding, error feedback, the vector, and the adapter beside the rounded base: the loss on
    held-out rows, the share of the update that is kept, the size, and which to take.

    \b
    Examples:
      rsgwm fuse runs/drafter --out drafter-model --format float16
      rsgwm fuse pool/groups --bits 4 --vector vectors/change-4bit --out groups-4bit
      rsgwm fuse pool/groups --bits 3 --compare --data groups
    """
    from mlx_rsgwm.converters.fuse.fuse import fuse as fuse_adapter
    from mlx_rsgwm.merging.quantisation_vector import check_no_vector
    from mlx_rsgwm.models.adapter_sources import load_adapter

    if feedback and quant is None and vector is None:
        raise RsgwmError("--feedback rounds to few bits; say to how many with --bits")
    loaded = load_adapter(adapter, base_name, progress=console.progress)
    check_no_vector(loaded)
    quantvec = load_adapter(vector, base_name, progress=console.progress) if vector is not None else None
    asked = _target(console, target, quant, quantvec, weight)
    if compare:
        if isinstance(asked, str):
            raise RsgwmError("--compare is of the ways to few bits; say to how many with --bits")
        if out is not None or feedback:
            raise RsgwmError(
                "--compare tries error feedback by itself and writes nothing; leave out --feedback and --out"
            )
        _compare(console, loaded, base_name, asked, quantvec, weight, data, data_rows)
        return
    if data or out is None:
        raise RsgwmError("--data is for --compare; without that, --out says where to write")
    grams = _directions(loaded) if feedback else None
    if quantvec is not None:
        loaded = _patched(loaded, quantvec, weight)
    result = fuse_adapter(
        loaded, base_name, out, target=asked, min_share=min_share, force=force, grams=grams, progress=console.progress
    )
    _tell(console, out, result)


def _tell(console: Console, out: Path, result: Mapping[str, Any]) -> None:
    replaced = f", {result['replaced']} parameters replaced" if result["replaced"] else ""
    console.line(
        f"{out}: {result['modules']} modules of {result['base']} fused{replaced}, {result['share']:.1%} of their "
        "updates survive; "
        f"{result['logit_share']:.1%} of the effect on logits, which are off by at most {result['max_abs_logit']:.1e}"
    )
    if narrow := result["in_floats"]:
        console.line(f"in floats, for groups do not divide their columns: {len(narrow)} layers ({narrow[0]} …)")
    if reason := result.get("form_reason"):
        console.line(f"for mlx-lm alone: transformers would not load these arrays as they are meant ({reason})")
    console.result(result)


def _target(console: Console, target: str | None, quant: Any, vector: Any, weight: float | None) -> Any:
    """The name of a format, or a format of few bits: the vector's where there is one and nothing else is given."""
    from mlx_rsgwm.merging.quantisation_vector import vector_format
    from mlx_rsgwm.models.quantisation import SYMMETRIC

    if quant is not None and target is not None:
        raise RsgwmError("--bits and --format both say how to store the result; give one of them")
    if weight is not None and vector is None:
        raise RsgwmError("--lambda is for --vector; name the quantization vector")
    if vector is None:
        chosen = quant or target or "keep"
    else:
        made_for = vector_format(vector)
        if target is not None:
            raise RsgwmError("--vector is for few bits; give --bits instead of --format, or neither")
        if quant is not None and quant != made_for:
            console.progress.warning(f"warning: {vector.where} is for {made_for}, not for {quant}")
        chosen = quant or made_for
    if getattr(chosen, "mode", "") == SYMMETRIC:
        raise RsgwmError(f"MLX stores no {chosen}; give one of its own formats: --bits 4, or 3,32, or 4,mxfp4")
    return chosen


def _patched(adapter: Any, vector: Any, weight: float | None) -> Any:
    from mlx_rsgwm.merging.quantisation_vector import patch

    share = 1.0 if weight is None else weight
    patched = patch(adapter, vector, share)
    patched.label = f"{adapter.where} + {share:g} · {vector.where}"
    return patched


def _directions(adapter: Any) -> Any:
    """Second moments of the adapter's inputs, by module, over all roles."""
    from mlx_rsgwm.models.directions import ALL, load_directions, role_grams

    if adapter.own_folder is not None:
        return load_directions(adapter.own_folder, ALL)
    if not adapter.directions:
        raise RsgwmError(f"{adapter.where} has no directions (rsgwm directions collect ADAPTER --corpus ROWS)")
    return role_grams(lambda: dict(adapter.directions), adapter.directions_metadata, ALL, adapter.where)


def _compare(
    console: Console,
    adapter: Any,
    base_name: str | None,
    quant: Any,
    vector: Any,
    weight: float | None,
    data: tuple[str, ...],
    count: int,
) -> None:
    from mlx_rsgwm.audit.eligibility import rows_of_each
    from mlx_rsgwm.inference.open import load_base_for
    from mlx_rsgwm.studies.rounding_remedies import compare_remedies

    if not data:
        raise RsgwmError("--compare needs --data: rows of the adapter's task that are new to it")
    base = load_base_for([adapter, *([vector] if vector is not None else [])], base_name, console.progress)
    new_to = adapter if vector is None else _patched(adapter, vector, weight)
    ((name, rows, seen),) = rows_of_each(data, [new_to], base, count, console.seed)
    comparison = compare_remedies(
        base, adapter, quant, rows, vector, 1.0 if weight is None else weight,
        _directions(adapter) if adapter.directions else None, console.seed, console.progress,
    )  # fmt: skip
    told = {"adapter": adapter.where, "base": base.name, "data": name, "seen": seen, **comparison.to_dict()}
    console.line(render(told))
    console.result(told)


def render(told: Mapping[str, Any]) -> str:
    """The table that a person reads: every way, then the recommendation."""
    from mlx_rsgwm.studies.rounding_remedies import CALLED

    width = max(map(len, CALLED.values()))
    lines = [f"{'way':{width}}     loss   worse (95 %)             kept  error  survives       MB"]
    for row in told["remedies"]:
        worse = f"{row['worse']:.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
        lines.append(
            f"{CALLED[row['remedy']]:{width}}  {row['nll']:7.4f}  {worse:27} {row['kept']:5.0%}  {row['error']:5.2f}  "
            f"{row['survives']:8.0%} {row['bytes'] / 1e6:8.2f}"
        )
    lines += [f"{CALLED[name]:{width}}  not tried: {reason}" for name, reason in told["not_tried"].items()]
    lines.append(
        f"{told['rows']} rows, {told['tokens']} tokens; without rounding {told['float_nll']:.4f}, "
        f"the rounded base alone {told['base_nll']:.4f}"
    )
    lines.append(f"take {CALLED[told['recommended']]}: {told['reason']}")
    chosen = next(row for row in told["remedies"] if row["remedy"] == told["recommended"])
    if chosen["survives"] < MIN_SHARE:
        lines.append(f"{chosen['survives']:.0%} of what is rounded survives: rsgwm fuse needs --min-share or --force")
    return "\n".join(lines)
