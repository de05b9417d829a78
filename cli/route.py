"""``rsgwm pool route``: fit what chooses, for every question, the adapter of a pool that answers it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import COUNT, PATH, SHARE, OneOf

if TYPE_CHECKING:
    from mlx_rsgwm.data.corpus import Corpus
    from mlx_rsgwm.inference.routing import Router
    from mlx_rsgwm.models.adapter import Adapter

RULES = ("distance", "nearest", "classifier")  # of inference.routing, which help does not load


@click.command()
@click.argument("pool", type=PATH)
@shared.corpus(
    "of every adapter's task, in the order of their names, or a folder that has all under these names; repeatable",
    True,
    True,
    "corpora",
)
@click.option(
    "--rule",
    type=OneOf(["auto", *RULES]),
    default="auto",
    show_default=True,
    help="By distance to each task's mean, votes of the nearest questions, or a classifier; auto: what is right most "
    "often on left-out questions.",
)
@click.option("--lower-layers", "layer", type=COUNT, help="Layers that read a prompt.  [default: a quarter]")
@click.option(
    "--margin",
    type=SHARE,
    default=0.0,
    show_default=True,
    help="The drafter answers where the first choice is less than so far above the second; 0: never, 1: always.",
)
@shared.rows(256)
@shared.base()
@shared.template(text="the one that the adapters were trained with")
@shared.replace()
@common_options
def route(
    console: Console,
    pool: Path,
    corpora: tuple[Path, ...],
    rule: str,
    layer: int | None,
    margin: float,
    rows: int,
    base_name: str | None,
    template_name: str | None,
    replace: bool,
) -> None:
    """Fit a router for the adapters in the folder POOL; it is kept there, in router.safetensors.

    A router reads a question with the lower layers of the bare base and chooses the adapter whose task it looks like.
    `rsgwm ask`, `rsgwm eval` and others take the folder with --router: the chosen adapter drafts, all on one base.

    \b
    Examples:
      rsgwm pool route runs/demo/pool --corpus runs/demo/data
      rsgwm pool route pool --corpus corpus/change --corpus corpus/groups
      rsgwm ask "Tom has 3 boxes of 8 pens. How many pens?" --router pool --drafter drafter --verifier verifier
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.core.folders import exclusive
    from mlx_rsgwm.inference.open import load_base_for, template_of
    from mlx_rsgwm.inference.routed import ROUTER_FILE
    from mlx_rsgwm.inference.routing import fit_router
    from mlx_rsgwm.models.adapter_sources import load_adapters

    adapters = load_adapters([pool], base_name, lazy=True, progress=console.progress)
    with exclusive(pool):
        if (pool / ROUTER_FILE).exists() and not replace:
            raise RsgwmError(f"{pool / ROUTER_FILE} is there already; --replace it")
        data = _corpora_of(adapters, corpora)
        asked = {
            adapter.name: list(dict.fromkeys(row.question for row in corpus.rows))[:rows]
            for adapter, corpus in zip(adapters, data, strict=True)
        }
        base = load_base_for(adapters, base_name, console.progress)
        template = template_of(adapters, template_name)
        router = fit_router(base, template, asked, rule, layer, margin, console.seed)
        router.save(pool / ROUTER_FILE)
    _tell(console, router, pool / ROUTER_FILE)


def _corpora_of(adapters: Sequence[Adapter], paths: Sequence[Path]) -> list[Corpus]:
    """Each adapter's corpus: of one folder, what is there under the adapters' names; else as they were given."""
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.data.corpus import load_corpus

    names = [adapter.name for adapter in adapters]
    if len(paths) == 1 and all((paths[0] / name).is_dir() for name in names):
        paths = [paths[0] / name for name in names]
    if len(paths) != len(names):
        told = ", ".join(names)
        raise RsgwmError(
            f"give a corpus of each adapter, in their order ({told}), or a folder that has all under their names"
        )
    corpora = [load_corpus(path) for path in paths]
    of = {adapter.manifest.get("data", {}).get("hash"): adapter.name for adapter in adapters}
    for adapter, corpus in zip(adapters, corpora, strict=True):
        if of.get(corpus.hash, adapter.name) != adapter.name:
            raise RsgwmError(f"the corpus given for {adapter.name} is what {of[corpus.hash]} was trained on; reorder")
    return corpora


def _tell(console: Console, router: Router, path: Path) -> None:
    counts = router.about["questions"]
    for rule, accuracy in router.about["accuracy"].items():
        chosen = ", taken" if rule == router.rule else ""
        console.line(
            f"{rule:<10}  {accuracy:.3f} of {sum(counts.values())} left-out questions to the right adapter{chosen}"
        )
    console.line(f"router: {path}")
    told = {"rule": router.rule, "layer": router.layer, "margin": router.margin}
    console.result({"router": str(path), **told, "questions": counts, "accuracy": router.about["accuracy"]})
