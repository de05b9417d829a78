"""``rsgwm hub push`` and ``rsgwm hub pull``: adapters on the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.convert import language_only_option, strict_option
from mlx_rsgwm.cli.old_names import also_positional
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import PATH, SOURCE


@click.command()
@click.argument("adapter", type=SOURCE)
@click.argument("repo")
@shared.base()
@click.option("--public", is_flag=True, help="Make a new repository public; it is private otherwise.")
@click.option("--licence", default="apache-2.0", show_default=True, help="The Hub's identifier of the licence.")
@click.option("--mlx", "with_mlx", is_flag=True, help="Put mlx-lm's layout beside PEFT's, in the folder mlx/.")
@shared.certificate("publish it with the adapter")
@click.option("--report", type=PATH, help="An evaluation's report.json, for the card's metrics.")
@shared.dry_run("send nothing, print every file and the card")
@common_options
def push(
    console: Console,
    adapter: Path | str,
    repo: str,
    base_name: str | None,
    public: bool,
    licence: str,
    with_mlx: bool,
    certificate: Path | None,
    report: Path | None,
    dry_run: bool,
) -> None:
    """Publish ADAPTER in PEFT's layout to the Hub repository REPO (owner/name), with a model card.

    ADAPTER is a folder (ours, mlx-lm's or PEFT's), a .gguf file, a Hub id or hf://owner/name@revision. The access token
    comes from `hf auth login` or HF_TOKEN and is never shown.

    Example: rsgwm hub push runs/drafter me/drafter --dry-run
    """
    from mlx_rsgwm.converters.hub import hub
    from mlx_rsgwm.core.files import read_text

    with tempfile.TemporaryDirectory(prefix="rsgwm-push-") as temporary:
        staged = hub.stage(
            adapter,
            repo,
            Path(temporary) / "repo",
            base=base_name,
            licence=licence,
            with_mlx=with_mlx,
            certificate=certificate,
            report=report,
        )
        for name, size in staged.contents:
            console.line(f"{size:>12,}  {name}")
        result = {
            "repo": repo,
            "base": staged.base,
            "private": not public,
            "dry_run": dry_run,
            "files": dict(staged.contents),
        }
        if dry_run:
            card = read_text(staged.folder / hub.CARD_FILE)
            console.line(f"\n{card}")
            console.line(f"dry run: nothing was sent to {repo}")
            console.result({**result, "card": card})
            return
        url = hub.push(staged, repo, private=not public)
    console.line(f"{repo}: {len(staged.contents)} files, {url}")
    console.result({**result, "url": url})


@click.command()
@click.argument("repo")
@also_positional("out")
@shared.out("a new folder; required")
@shared.base()
@shared.revision("main")
@click.option("--keep-peft", is_flag=True, help="Keep PEFT's layout instead of converting it.")
@strict_option
@language_only_option
@common_options
def pull(
    console: Console,
    repo: str,
    out: Path,
    base_name: str | None,
    revision: str | None,
    keep_peft: bool,
    strict: bool,
    language_only: bool,
) -> None:
    """Fetch the adapter REPO (owner/name), PEFT's or mlx-lm's, from the Hub to a new folder, as mlx-lm loads it.

    Example: rsgwm hub pull me/drafter --out drafter --base smollm2-135m
    """
    from mlx_rsgwm.converters.hub import hub
    from mlx_rsgwm.converters.peft.layout import PeftReading
    from mlx_rsgwm.core.errors import RsgwmError

    if keep_peft and (strict or language_only):
        raise RsgwmError("--keep-peft keeps the adapter as it is; leave out --strict and --language-only")
    pulled = hub.pull(
        repo,
        out,
        base=base_name,
        revision=revision,
        keep_peft=keep_peft,
        reading=PeftReading(strict=strict, language_only=language_only),
        progress=console.progress,
    )
    console.line(f"{out}: {repo} for {pulled['base'] or 'a base it does not name'}, {pulled['layout']} layout")
    for note in pulled.get("notes", ()):
        console.line(f"note: {note}")
    console.result(pulled)
