"""Who answers in ``ask`` and ``chat``: a pair, one adapter, a fused model or a bare base; and the options for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from mlx_rsgwm.cli.console import Console
from mlx_rsgwm.cli.options.kinds import SOURCE
from mlx_rsgwm.cli.options.loop import DEMO, build_pipeline, loop_options, settle_pair
from mlx_rsgwm.cli.options.paths import SOURCES

if TYPE_CHECKING:
    from mlx_rsgwm.inference.loop import DraftVerify
    from mlx_rsgwm.inference.speaker import Speaker

F = TypeVar("F", bound=Callable[..., Any])

# What only a pair takes; from the command line they are refused beside --adapter, for nothing would read them.
OF_PAIRS = (
    "combine", "router", "attempts", "score", "threshold", "check", "abstain", "mode", "verify_template", "drafts",
    "layer",
)  # fmt: skip


def speaker_options(command: F) -> F:
    """Add the options that :func:`open_speaker_or_pair` needs; the command takes them as keywords and hands them on."""
    system = "System message for one that answers alone, where the chat template has a place for it."
    adapter = f"Adapter: {SOURCES}; it answers alone. With --base and no adapter the base does, or a fused model."
    decorated: Any = loop_options(experiments=False, pairs_only=False)(command)
    for option in (
        click.option("--system", default="", metavar="TEXT", help=system),
        click.option("--adapter", type=SOURCE, help=adapter),
    ):
        decorated = option(decorated)
    return decorated


def open_speaker_or_pair(console: Console, options: Mapping[str, Any]) -> DraftVerify | Speaker:
    """What the options name, loaded: a pair as a pipeline, anything else as a speaker.

    Raises:
        RsgwmError: nothing is named and there is no demo's pair; what does not go together; whatever loading raises.
    """
    from mlx_rsgwm.core.errors import RsgwmError

    alone = options["adapter"] is not None
    paired = options["drafter"] is not None or bool(options["verifier"])
    if alone and paired:
        raise RsgwmError("--adapter answers alone; leave it out, or leave out --drafter and --verifier")
    if not alone and not paired and options["base_name"] is None:
        if not (DEMO / "drafter").is_dir():
            raise RsgwmError(
                "nobody to ask: name an adapter (--adapter), a model (--base), or a drafter and a verifier (--drafter, "
                "--verifier); after `rsgwm demo` its pair answers"
            )
        paired = True
    if paired:
        if options["system"]:
            raise RsgwmError("--system: a pair is asked in the words it was trained with; leave it out")
        drafter, verifier = settle_pair(options["drafter"], options["verifier"])
        return build_pipeline(console, {**options, "drafter": drafter, "verifier": verifier})
    _refuse_what_pairs_take()
    return _speaker(console, options)


def _speaker(console: Console, options: Mapping[str, Any]) -> Speaker:
    from mlx_rsgwm.inference.speaker import open_speaker

    return open_speaker(
        options["adapter"],
        options["base_name"],
        template=options["template_name"],
        system=options["system"],
        seed=console.seed,
        progress=console.progress,
        **{name: options[name] for name in ("temperature", "top_p", "max_tokens")},
    )


def _refuse_what_pairs_take() -> None:
    from mlx_rsgwm.core.errors import RsgwmError

    context = click.get_current_context()
    given = [name for name in OF_PAIRS if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise RsgwmError(f"{shown}: only a drafter with a verifier takes it; leave it out, or give both")


def adapter_named(text: str) -> Path | str | None:
    """What was written behind ``/adapter``, as ``--adapter`` takes it; None for ``none``."""
    source: Path | str = SOURCE.convert(text, None, None)
    return None if text == "none" else source
