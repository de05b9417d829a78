"""``rsgwm pool route``: fit what chooses, for every question, the adapter of a pool that answers it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

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
    "of every adapter's task, in the order of their names, or a folder that has all under these names; repeatable. "
    "Without, the router is made of what training kept",
    False,
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
    help="The drafter answers where the first choice is less than so far above the second; 0: never, 1: always.  "
    "[default: 0; without --corpus 0.9]",
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
    margin: float | None,
    rows: int,
    base_name: str | None,
    template_name: str | None,
    replace: bool,
) -> None:
    """Fit a router for the adapters in the folder POOL; it is kept there, in router.safetensors.

    A router reads a question with the lower layers of the bare base and chooses the adapter whose task it looks like.
    `rsgwm ask`, `rsgwm eval` and others take the folder with --router: the chosen adapter drafts, all on one base.

    Without --corpus it needs no rows: it chooses by distance to the mean and covariance of prompt states that training
    kept beside each adapter. How often it is right cannot be said then. The drafter answers a question that is between
    two tasks (--margin); one of no task at all goes to some adapter all the same.

    \b
    Examples:
      rsgwm pool route runs/demo/pool --corpus runs/demo/data
      rsgwm pool route runs/demo/pool
      rsgwm pool route pool --corpus corpus/change --corpus corpus/groups
      rsgwm ask "Tom has 3 boxes of 8 pens. How many pens?" --router pool --drafter drafter --verifier verifier
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.core.folders import exclusive
    from mlx_rsgwm.inference.open import find_base, load_base_for, template_of
    from mlx_rsgwm.inference.routed import ROUTER_FILE, save_router
    from mlx_rsgwm.inference.routing import UNTRIED_MARGIN, fit_router, router_of_statistics
    from mlx_rsgwm.models.adapter_sources import load_adapters
    from mlx_rsgwm.models.prompt_statistics import statistics_of_pool

    _refuse_without_corpus(corpora)
    adapters = load_adapters([pool], base_name, lazy=True, progress=console.progress)
    with exclusive(pool):
        if (pool / ROUTER_FILE).exists() and not replace:
            raise RsgwmError(f"{pool / ROUTER_FILE} is there already; --replace it")
        if corpora:
            asked = _questions_of(adapters, corpora, rows)
            base = load_base_for(adapters, base_name, console.progress)
            template = template_of(adapters, template_name)
            router = fit_router(base, template, asked, rule, layer, margin or 0.0, console.seed)
        else:
            if base_name is not None:
                find_base(adapters, base_name)
            router = router_of_statistics(statistics_of_pool(adapters), UNTRIED_MARGIN if margin is None else margin)
        path = save_router(router, pool, adapters)
    _tell(console, router, path)


def _refuse_without_corpus(corpora: Sequence[Path]) -> None:
    """Raise for options that say how rows are read, where there are none."""
    from mlx_rsgwm.core.errors import RsgwmError

    context = click.get_current_context()
    flags = {"rule": "--rule", "layer": "--lower-layers", "rows": "--rows", "template_name": "--template"}
    given = [flag for name, flag in flags.items() if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if context.params["rule"] in ("auto", "distance"):
        given = [flag for flag in given if flag != "--rule"]
    if given and not corpora:
        raise RsgwmError(f"{', '.join(given)}: for --corpus; what training kept has its rule, layer and template")


def _questions_of(adapters: Sequence[Adapter], corpora: Sequence[Path], rows: int) -> dict[str, list[str]]:
    """The first ``rows`` different questions of each adapter's corpus, by its name."""
    return {
        adapter.name: list(dict.fromkeys(row.question for row in corpus.rows))[:rows]
        for adapter, corpus in zip(adapters, _corpora_of(adapters, corpora), strict=True)
    }


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
    accuracies = router.about.get("accuracy")
    for rule, accuracy in (accuracies or {}).items():
        chosen = ", taken" if rule == router.rule else ""
        console.line(
            f"{rule:<10}  {accuracy:.3f} of {sum(counts.values())} left-out questions to the right adapter{chosen}"
        )
    if accuracies is None:
        console.line(
            f"distance, from what training kept of {sum(counts.values())} questions; without rows of the tasks nobody "
            "knows how often it is right (--corpus tells)"
        )
        if router.margin:
            console.line(f"the drafter answers where the first choice is less than {router.margin} above the second")
    console.line(f"router: {path}")
    told = {"rule": router.rule, "layer": router.layer, "margin": router.margin}
    console.result({"router": str(path), **told, "questions": counts, "accuracy": accuracies})
