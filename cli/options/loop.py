"""Options of every command that runs the draft–verify loop, and the pipeline they ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from mlx_rsgwm.cli.console import Console
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import AUTO_SHARE, PATH, SOURCE, OneOf
from mlx_rsgwm.cli.options.paths import SOURCES, SeveralOption
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.inference.draft import DRAFTS
from mlx_rsgwm.inference.policy import CHECKS, MODES, LoopConfig
from mlx_rsgwm.inference.pool import RULES
from mlx_rsgwm.inference.scores import SCORES

if TYPE_CHECKING:
    from mlx_rsgwm.inference.calibration import Calibration
    from mlx_rsgwm.inference.loop import DraftVerify
    from mlx_rsgwm.models.adapter import Adapter

F = TypeVar("F", bound=Callable[..., Any])
Source = str | Path

DEMO = Path("runs/demo")

# Pipeline: what drafts and what reads. The rest decides over their drafts.
PIPELINE_OPTIONS = (
    shared.base(),
    click.option("--drafter", type=SOURCE, help=f"The drafter: {SOURCES}.  [default: {DEMO}/drafter]"),
    click.option(
        "--verifier",
        cls=SeveralOption,
        multiple=True,
        type=SOURCE,
        help="The verifier, likewise; give both or neither. Several, as pool/* or a folder of adapters, read each "
        f"draft together.  [default: {DEMO}/verifier]",
    ),
    click.option(
        "--combine",
        type=OneOf(RULES),
        default="max",
        show_default=True,
        help="What several verifiers say together; learned is fitted by rsgwm calibrate.",
    ),
    click.option(
        "--router",
        type=PATH,
        help="Pool with a router (rsgwm pool route): the adapter it chooses drafts; the drafter, where none is sure.",
    ),
    shared.attempts(),
    click.option(
        "--drafts",
        type=OneOf(DRAFTS),
        default=LoopConfig.drafts,
        show_default=True,
        help="What drafts: sampling; the first of eight grafted chains; mixed: those eight once every sampled draft is "
        "rejected.",
    ),
    shared.layer(),
    shared.temperature(),
    shared.top_p(),
    shared.max_tokens(),
    shared.template(text="the one that the drafter was trained with"),
)


def score_option(auto: str) -> Any:
    """``--score``; ``auto``: what the automatic choice is."""
    text = f"Score of a draft; auto is {auto}."
    return click.option("--score", type=OneOf(["auto", *SCORES]), default="auto", show_default=True, help=text)


def check_option() -> Any:
    """``--check``; in evaluations it adds rows and changes none."""
    text = "Do not accept a draft that states a false equation, whatever its score; auto: where answers are numbers."
    return click.option("--check", type=OneOf(CHECKS), default="auto", show_default=True, help=text)


DECISION_OPTIONS = (
    score_option("by the verifier's calibration"),
    click.option(
        "--threshold",
        type=AUTO_SHARE,
        default="auto",
        show_default=True,
        help="Score to accept from; auto is by the verifier's calibration, else 0.7.",
    ),
    check_option(),
    click.option("--abstain", is_flag=True, help="Say nothing when no draft is accepted, instead of the best one."),
)


def template_options(hidden: bool) -> tuple[Any, ...]:
    """For experiments with verifiers that are asked in other words than they were trained with."""
    return (
        click.option(
            "--verify-template",
            type=OneOf(list(TEMPLATES)),
            hidden=hidden,
            help="Other words for the verifier, to see what misaligned prompts cost.",
        ),
        click.option(
            "--template-mismatch",
            type=OneOf(["refuse", "warn"]),
            default="refuse",
            show_default=True,
            hidden=hidden,
            help="What becomes of an adapter that was trained with another template.",
        ),
    )


def mode_option(hidden: bool) -> Any:
    """``--mode``: the same answers in different time."""
    text = "Order of drafting and scoring; the same answers in different time."
    kind, default = OneOf(MODES), LoopConfig.mode
    return click.option("--mode", type=kind, default=default, show_default=True, hidden=hidden, help=text)


def pipeline_options(command: F, hidden: bool = False, pairs_only: bool = True) -> F:
    """Add the options that :func:`build_pipeline` needs; the command takes them as keywords and hands them on.

    ``pairs_only``: drafter and verifier are settled before the command sees them.
    """

    @functools.wraps(command)
    def with_pair(*arguments: Any, drafter: Source | None, verifier: tuple[Source, ...], **options: Any) -> Any:
        drafter, verifier = settle_pair(drafter, verifier)
        return command(*arguments, drafter=drafter, verifier=verifier, **options)

    decorated: Any = with_pair if pairs_only else command
    for option in reversed((*PIPELINE_OPTIONS, *template_options(hidden))):
        decorated = option(decorated)
    return decorated


def settle_pair(drafter: Source | None, verifier: tuple[Source, ...]) -> tuple[Source, tuple[Source, ...]]:
    """Both sources: the demo's when none is given. With one of them the other is never guessed."""
    from mlx_rsgwm.core.errors import RsgwmError

    if drafter is None and not verifier:
        return DEMO / "drafter", (DEMO / "verifier",)
    if drafter is not None and verifier:
        return drafter, verifier
    given, missing = ("verifier", "drafter") if verifier else ("drafter", "verifier")
    folder = drafter or verifier[0]
    beside = folder.parent / missing if isinstance(folder, Path) else None
    hint = f" (there is {beside})" if beside is not None and beside.is_dir() else ""
    hint += f"; rsgwm ask and chat take --adapter {folder} for one that answers alone"
    raise RsgwmError(f"--{given} {folder} without --{missing}; give both{hint}")


def loop_options(experiments: bool = True, pairs_only: bool = True) -> Callable[[F], F]:
    """Add all options; the command takes them as keywords and hands them to :func:`build_pipeline`.

    Without ``experiments`` those are hidden that only an experiment needs.
    """

    def decorate(command: F) -> F:
        for option in reversed((*DECISION_OPTIONS, mode_option(not experiments))):
            command = option(command)
        return pipeline_options(command, not experiments, pairs_only)

    return decorate


def load_pair(console: Console, options: Mapping[str, Any]) -> tuple[Adapter, tuple[Adapter, ...]]:
    """Drafter and verifiers for commands that look at them before a pipeline is opened with them."""
    from mlx_rsgwm.inference.pair import load_verifier
    from mlx_rsgwm.models.adapter_sources import load_adapter

    base = options["base_name"]
    drafter = load_adapter(options["drafter"], base, progress=console.progress)
    return drafter, load_verifier(options["verifier"], base, console.progress)


def build_pipeline(
    console: Console,
    options: Mapping[str, Any],
    calibrate: Callable[[DraftVerify], Calibration] | None = None,
    calibration: Literal["stored"] | None = "stored",
) -> DraftVerify:
    """The pipeline that the options ask for; see :func:`~mlx_rsgwm.inference.open.open_pipeline`."""
    from mlx_rsgwm.inference.open import open_pipeline

    names = (
        "combine",
        "attempts",
        "temperature",
        "top_p",
        "max_tokens",
        "verify_template",
        "template_mismatch",
        "drafts",
        "layer",
    )
    decisions = {name: options[name] for name in ("mode", "abstain", "check") if name in options}
    return open_pipeline(
        options["drafter"],
        options["verifier"],
        options["base_name"],
        router=options["router"],
        template=options["template_name"],
        score=options.get("score", "auto"),
        threshold=options.get("threshold", "auto"),
        seed=console.seed,
        calibration=calibration,
        calibrate=calibrate,
        progress=console.progress,
        **{name: options[name] for name in names},
        **decisions,
    )
