"""``rsgwm serve``: many adapters and verified answers on one base, behind OpenAI's API."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import COUNT, PAIR, PATH, POSITIVE, SOURCE, Number, OneOf, Whole
from mlx_rsgwm.cli.options.paths import SOURCES
from mlx_rsgwm.inference.draft import DRAFTS
from mlx_rsgwm.inference.policy import CHECKS
from mlx_rsgwm.inference.pool import RULES

if TYPE_CHECKING:
    from mlx_rsgwm.serving.library import Library, Pair
    from mlx_rsgwm.serving.settings import ServerSettings

DEMO = Path("runs/demo")
SETTING = re.compile(r",(?=[a-z]+=)")  # where a setting of a pair begins
# What may follow a pair, and its kind; as in `rsgwm ask`.
OF_PAIRS: dict[str, click.ParamType] = {
    "drafts": OneOf(DRAFTS),
    "layer": COUNT,
    "router": PATH,
    "combine": OneOf(RULES),
    "check": OneOf(CHECKS),
}
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
    "be trusted. Several verifiers, as +VERIFIER+VERIFIER or a folder of them, read together. Settings that ask has, "
    "too, may follow: ,drafts=KIND ,layer=N ,router=POOL ,combine=RULE ,check=WHICH. Repeatable.",
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
      rsgwm serve --verified chains=drafter+verifier,drafts=mixed
      rsgwm serve --verified routed=drafter+verifier,router=pool
      rsgwm serve --adapter-dir adapters --port 8081
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.serving.admission import Limits

    try:
        from mlx_rsgwm.serving.library import Pair
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
        pairs = {"demo": Pair(DEMO / "drafter", [DEMO / "verifier"])}
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


def _pairs(given: tuple[str, ...]) -> dict[str, Pair]:
    """Pairs by the names that they are served under.

    Raises:
        RsgwmError: two of one name, a drafter without a verifier, or a setting that there is not.
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.serving.library import Pair

    pairs: dict[str, Pair] = {}
    for text in given:
        name, _, rest = text.partition("=")
        sources, *settings = SETTING.split(rest)
        drafter, *verifiers = [SOURCE.convert(each, None, None) for each in sources.split("+") if each]
        if not verifiers or sources.count("+") != len(verifiers):
            raise RsgwmError(f"--verified {text} wants NAME=DRAFTER+VERIFIER")
        if name in pairs:
            raise RsgwmError(f"two pairs are named {name}; give them different names")
        pairs[name] = Pair(drafter, verifiers, **_pair_settings(text, settings))
    return pairs


def _pair_settings(text: str, settings: list[str]) -> dict[str, Any]:
    """What follows a pair, ``KEY=VALUE`` each, as fields of :class:`Pair`."""
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.core.nearest import nearest

    values: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in OF_PAIRS or key in values:
            near = nearest(key, OF_PAIRS)
            said = "is given twice" if key in values else "is no setting of a pair" + (f"; {near} is" if near else "")
            raise RsgwmError(f"--verified {text}: {key} {said}; there are {', '.join(OF_PAIRS)}")
        try:
            values[key] = OF_PAIRS[key].convert(value, None, None)
        except click.BadParameter as error:
            raise RsgwmError(f"--verified {text}: {key}: {error.message}") from None
    return values
