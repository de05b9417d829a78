"""``rsgwm serve``: many adapters and verified answers on one base, behind OpenAI's API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import PAIR, PATH, POSITIVE, SOURCE, Number, OneOf, Whole
from mlx_rsgwm.cli.options.paths import SOURCES

if TYPE_CHECKING:
    from mlx_rsgwm.serving.library import Library
    from mlx_rsgwm.serving.settings import ServerSettings

DEMO = Path("runs/demo")
PORTS = Whole(0, 65535)
SECONDS = Number(0, 86_400)


@click.command()
@shared.base()
@click.option(
    "--adapter",
    "adapters",
    type=SOURCE,
    multiple=True,
    help=f"Adapter: {SOURCES}; as NAME=SOURCE it is served under that name, else under its folder's. Repeatable.",
)
@click.option(
    "--verified",
    type=PAIR,
    multiple=True,
    help="Pair that answers together, as NAME=DRAFTER+VERIFIER: drafts are verified, and answers say how far they can "
    "be trusted. Several verifiers, as +VERIFIER+VERIFIER or a folder of them, read together. Repeatable.",
)
@click.option(
    "--conversations",
    type=OneOf(["last", "refuse"]),
    default="last",
    show_default=True,
    help="What a pair, trained on single questions, does with earlier turns: read the last, or refuse them all.",
)
@click.option("--adapter-dir", type=PATH, help="Folder below which adapters may be loaded while the server runs.")
@click.option("--max-adapters", type=POSITIVE, default=64, show_default=True, help="Models beside the base, at most.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen at.")
@click.option("--port", type=PORTS, default=8080, show_default=True, help="Port to listen at; 0 takes a free one.")
@click.option("--api-key-file", type=PATH, help="File of keys, one a line, of which a request must send one.")
@click.option("--admin-key-file", type=PATH, help="Likewise, for loading and unloading adapters.")
@click.option("--cors-origin", multiple=True, metavar="ORIGIN", help="Origin of a page that may ask from a browser.")
@click.option("--allowed-host", multiple=True, metavar="NAME", help="Another name that clients call the server by.")
@shared.batch_rows()
@click.option("--queue", type=POSITIVE, default=64, show_default=True, help="Requests that may wait, at most.")
@click.option(
    "--memory-limit",
    type=Number(0.01, 10_000),
    metavar="GB",
    help="Memory for the caches of texts under way.  [default: half of what is free]",
)
@shared.max_tokens(512)
@click.option("--timeout", type=SECONDS, default=600, show_default=True, help="Longest time of an answer in seconds.")
@click.option(
    "--drain", type=SECONDS, default=30, show_default=True, help="Seconds that answers have to end once it is stopped."
)
@common_options
def serve(
    console: Console, base_name: str | None, adapters: tuple[Any, ...], verified: tuple[str, ...], **options: Any
) -> None:
    """Serve a base, adapters on it and verified answers to every client of OpenAI's API.

    The base is in memory once. Each adapter is a model by its name; requests for several are written in one batch. With
    nothing named the pair of `rsgwm demo` is served, or a small base where there is none.

    \b
    Examples:
      rsgwm serve
      rsgwm serve --base smollm2-135m
      rsgwm serve --adapter sums=pool/change --adapter compare=pool/compare
      rsgwm serve --verified checked=drafter+verifier
      rsgwm serve --adapter-dir adapters --port 8081
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.serving.admission import Limits

    try:
        from mlx_rsgwm.serving.opening import Served, run
    except ModuleNotFoundError as error:
        raise RsgwmError(f"{error.name} is not installed; pip install 'mlx-rsgwm[serve]'") from None
    settings = _settings(options)
    memory = options["memory_limit"]
    limits = Limits(options["batch_rows"], options["queue"], None if memory is None else int(memory * 1e9))

    def begun(address: str, library: Library) -> None:
        names = [model.name for model in library.models()]
        console.line(f"serving {', '.join(names)}\n{address}/v1 (Ctrl-C ends)")

    pairs = _pairs(verified)
    if not adapters and not pairs and base_name is None and (DEMO / "drafter").is_dir():
        pairs = {"demo": (DEMO / "drafter", [DEMO / "verifier"])}
    served = Served(base_name, _named(adapters), pairs, options["max_adapters"])
    run(served, limits, settings, begun, console.progress)
    console.line("stopped")
    console.result({"stopped": True})


def _settings(options: dict[str, Any]) -> ServerSettings:
    from mlx_rsgwm.serving.settings import ServerSettings, read_keys

    names = ("host", "port", "adapter_dir", "max_tokens", "timeout", "drain")
    return ServerSettings(
        api_keys=read_keys(options["api_key_file"]),
        admin_keys=read_keys(options["admin_key_file"]),
        cors_origins=options["cors_origin"],
        allowed_hosts=options["allowed_host"],
        history=options["conversations"],
        **{name: options[name] for name in names},
    )


def _named(sources: tuple[Path | str, ...]) -> dict[str, Path | str]:
    """Adapters by the names that they are served under.

    Raises:
        RsgwmError: two of one name.
    """
    from mlx_rsgwm.core.errors import RsgwmError

    named: dict[str, Path | str] = {}
    for source in sources:
        name, equals, rest = str(source).partition("=")
        if equals and "/" not in name and not name.startswith("hf:"):
            source = SOURCE.convert(rest, None, None)
        else:
            name = str(source).rstrip("/").rpartition("/")[2].partition("@")[0]
        if name in named:
            raise RsgwmError(f"two adapters are named {name}; write --adapter NAME={source}")
        named[name] = source
    return named


def _pairs(given: tuple[str, ...]) -> dict[str, tuple[Path | str, list[Path | str]]]:
    """Drafter and verifiers by the names that they are served under.

    Raises:
        RsgwmError: two of one name, or a drafter without a verifier.
    """
    from mlx_rsgwm.core.errors import RsgwmError

    pairs: dict[str, tuple[Path | str, list[Path | str]]] = {}
    for text in given:
        name, _, sources = text.partition("=")
        drafter, *verifiers = sources.split("+")
        if not drafter or not verifiers or not all(verifiers):
            raise RsgwmError(f"--verified {text} wants NAME=DRAFTER+VERIFIER")
        if name in pairs:
            raise RsgwmError(f"two pairs are named {name}; give them different names")
        pairs[name] = SOURCE.convert(drafter, None, None), [SOURCE.convert(each, None, None) for each in verifiers]
    return pairs
