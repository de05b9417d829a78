"""Options of every command that runs the draft–verify loop, and the pipeline they ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from mlx_rsgwm.cli.console import Console
from mlx_rsgwm.cli.options.paths import SOURCE, SOURCES

if TYPE_CHECKING:
    from mlx_rsgwm.inference.calibration import Calibration
    from mlx_rsgwm.inference.loop import DraftVerify
    from mlx_rsgwm.models.adapter import Adapter

F = TypeVar("F", bound=Callable[..., Any])
Source = str | Path

DEMO = Path("runs/demo")

# What drafts and what reads; the rest decides.
PIPELINE_OPTIONS = (
    click.option(
        "--base", "base_name", help="Hub id, folder, .gguf or alias.  [default: the one that the adapters record]"
    ),
    click.option("--drafter", type=SOURCE, help=f"The drafter: {SOURCES}.  [default: {DEMO}/drafter]"),
    click.option(
        "--verifier",
        type=SOURCE,
        help=f"The verifier, likewise; give both or neither.  [default: {DEMO}/verifier]",
    ),
    click.option("--attempts", default=3, show_default=True, help="Drafts in all, the first included."),
    click.option("--temperature", default=0.7, show_default=True),
    click.option("--top-p", default=0.9, show_default=True),
    click.option("--max-tokens", default=256, show_default=True, help="Longest draft."),
    click.option("--verify-template", help="Other words for the verifier, to see what misaligned prompts cost."),
    click.option(
        "--template-mismatch",
        default="refuse",
        show_default=True,
        help="refuse or warn, when an adapter was trained with another template.",
    ),
    click.option("--template", "template_name", help="plain or chat; default: the one the drafter was trained with."),
)
DECISION_OPTIONS = (
    click.option(
        "--score",
        default="auto",
        show_default=True,
        help="yesno, mean_logprob, combined, or auto: by the verifier's calibration.",
    ),
    click.option(
        "--threshold", default="auto", show_default=True, help="In [0, 1]; auto: the verifier's calibration, else 0.7."
    ),
    click.option(
        "--mode",
        default="adaptive",
        show_default=True,
        help="adaptive, parallel or sequential: the same answers in different time.",
    ),
    click.option("--abstain", is_flag=True, help="Say nothing when no draft is accepted, instead of the best one."),
)


def pipeline_options(command: F) -> F:
    """Add the options that :func:`build_pipeline` needs; the command takes them as keywords and hands them on."""

    @functools.wraps(command)
    def with_pair(*arguments: Any, drafter: Source | None, verifier: Source | None, **options: Any) -> Any:
        drafter, verifier = settle_pair(drafter, verifier)
        return command(*arguments, drafter=drafter, verifier=verifier, **options)

    decorated: Any = with_pair
    for option in reversed(PIPELINE_OPTIONS):
        decorated = option(decorated)
    return decorated


def settle_pair(drafter: Source | None, verifier: Source | None) -> tuple[Source, Source]:
    """Both sources: the demo's when none is given. With one of them the other is never guessed."""
    from mlx_rsgwm.core.errors import RsgwmError

    if drafter is None and verifier is None:
        return DEMO / "drafter", DEMO / "verifier"
    if drafter is not None and verifier is not None:
        return drafter, verifier
    given, missing = ("drafter", "verifier") if verifier is None else ("verifier", "drafter")
    folder = drafter or verifier
    beside = folder.parent / missing if isinstance(folder, Path) else None
    hint = f" (there is {beside})" if beside is not None and beside.is_dir() else ""
    raise RsgwmError(f"--{given} {folder} without --{missing}; give both{hint}")


def loop_options(command: F) -> F:
    """Add all options; the command takes them as keywords and hands them to :func:`build_pipeline`."""
    for option in reversed(DECISION_OPTIONS):
        command = option(command)
    return pipeline_options(command)


def load_pair(console: Console, options: Mapping[str, Any]) -> dict[str, Adapter]:
    """Drafter and verifier for commands that look at them before a pipeline is opened with them."""
    from mlx_rsgwm.models.adapter_sources import load_adapter

    base = options["base_name"]
    return {role: load_adapter(options[role], base, progress=console.progress) for role in ("drafter", "verifier")}


def build_pipeline(
    console: Console,
    options: Mapping[str, Any],
    calibrate: Callable[[DraftVerify], Calibration] | None = None,
    calibration: Literal["stored"] | None = "stored",
) -> DraftVerify:
    """The pipeline that the options ask for; see :func:`~mlx_rsgwm.inference.open.open_pipeline`."""
    from mlx_rsgwm.inference.open import open_pipeline

    names = ("attempts", "temperature", "top_p", "max_tokens", "verify_template", "template_mismatch")
    decisions = {name: options[name] for name in ("mode", "abstain") if name in options}
    threshold = options.get("threshold", "auto")
    return open_pipeline(
        options["drafter"],
        options["verifier"],
        options["base_name"],
        template=options["template_name"],
        score=options.get("score", "auto"),
        threshold="auto" if threshold == "auto" else _threshold(threshold),
        seed=console.seed,
        calibration=calibration,
        calibrate=calibrate,
        progress=console.progress,
        **{name: options[name] for name in names},
        **decisions,
    )


def _threshold(text: str) -> float:
    from mlx_rsgwm.core.errors import RsgwmError

    try:
        return float(text)
    except ValueError:
        raise RsgwmError(f"--threshold must be auto or a number in [0, 1], found {text!r}") from None
