"""``rsgwm convert``: adapters between this project's folders and PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.old_names import also_positional
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import ANY_NUMBER, PATH, SOURCE, OneOf

if TYPE_CHECKING:
    from mlx_rsgwm.converters.peft.bulk import FolderResult
    from mlx_rsgwm.converters.peft.convert import Converted

VERIFY = "Read the result back: the same updates from both folders, the same bits there and back."

strict_option = click.option(
    "--strict", is_flag=True, help="Refuse what PEFT only warns of: selected modules without arrays."
)
language_only_option = click.option(
    "--language-only", is_flag=True, help="Leave out what was trained of a tower for images or sound."
)


@click.command("to-peft")
@click.argument("adapter", type=SOURCE)
@also_positional("out")
@shared.out("a new folder; required")
@shared.base()
@click.option("--verify", is_flag=True, help=VERIFY)
@shared.certificate("put beside the result")
@common_options
def convert_to_peft(
    console: Console, adapter: Path | str, out: Path, base_name: str | None, verify: bool, certificate: Path | None
) -> None:
    """Write ADAPTER to a new folder as PEFT loads it.

    ADAPTER is a folder of ours or mlx-lm's, or a folder of them, a .gguf file, a Hub id or hf://owner/name@revision.

    Example: rsgwm convert to-peft runs/drafter --out drafter-peft --verify
    """
    from mlx_rsgwm.converters.parity.certificate import embed_certificate
    from mlx_rsgwm.converters.peft import convert as peft
    from mlx_rsgwm.converters.peft.bulk import is_mlx, is_whole_peft, to_peft_verified
    from mlx_rsgwm.core.folders import new_folder, require_empty
    from mlx_rsgwm.models.adapter_sources import load_adapter

    def convert(source: Path | str, target: Path) -> Converted:
        require_empty(target)
        with new_folder(target) as work:
            if verify:
                converted = to_peft_verified(source, base_name, work, console.progress)
            else:
                converted = peft.convert_to_peft(source, base_name, work, console.progress)
            if certificate is not None:
                embed_certificate(certificate, load_adapter(source, base_name, lazy=True), work)
        return converted._replace(out=target)

    _run(console, adapter, out, is_mlx, is_whole_peft, convert, "PEFT adapter")


@click.command("from-peft")
@click.argument("folder", type=PATH)
@also_positional("out")
@shared.out("a new folder; required")
@shared.base("required")
@click.option("--verify", is_flag=True, help=VERIFY)
@strict_option
@language_only_option
@common_options
def convert_from_peft(
    console: Console, folder: Path, out: Path, base_name: str | None, verify: bool, strict: bool, language_only: bool
) -> None:
    """Write the PEFT adapter in FOLDER, or every one below it, to a new folder as mlx-lm loads it.

    What PEFT ignores or warns of is told in notes.

    Example: rsgwm convert from-peft drafter-peft --out drafter --base smollm2-135m --verify
    """
    from mlx_rsgwm.converters.base_layers import read_base_layers
    from mlx_rsgwm.converters.peft import convert as peft
    from mlx_rsgwm.converters.peft.bulk import adapter_folders, from_peft_verified, is_peft
    from mlx_rsgwm.converters.peft.layout import PeftReading
    from mlx_rsgwm.core.folders import require_empty
    from mlx_rsgwm.models.adapter import is_complete
    from mlx_rsgwm.models.base import resolve_base

    if is_peft(folder) or not adapter_folders(folder, is_peft):
        require_empty(out)
        peft.check_peft(folder)
    if base_name is None:
        raise click.UsageError("missing option --base")
    layers = read_base_layers(base_name, resolve_base(base_name, console.progress))

    def convert(source: Path, target: Path) -> Converted:
        reading = PeftReading(strict=strict, language_only=language_only)
        return (from_peft_verified if verify else peft.convert_from_peft)(source, layers, target, reading)

    _run(console, folder, out, is_peft, is_complete, convert, "adapter")


@click.command("from-mlx")
@click.argument("folder", type=PATH)
@also_positional("out")
@shared.out("a new folder; required")
@click.option("--scale", type=ANY_NUMBER, help="What multiplies B·A, where an old configuration can mean two values.")
@common_options
def convert_from_mlx(console: Console, folder: Path, out: Path, scale: float | None) -> None:
    """Write the mlx-lm adapter in FOLDER, or every one below it, to a new folder as mlx-lm loads it today.

    For adapters of old versions: until 0.14.1 mlx-lm multiplied by scale·alpha/rank, later by scale.

    Example: rsgwm convert from-mlx old-adapter --out adapter --scale 20
    """
    from mlx_rsgwm.converters.mlx_lm import convert_from_mlx as convert_one
    from mlx_rsgwm.converters.peft.bulk import is_mlx
    from mlx_rsgwm.models.adapter import is_complete

    _run(
        console, folder, out, is_mlx, is_complete, lambda source, target: convert_one(source, target, scale), "adapter"
    )


@click.command("to-gguf")
@click.argument("source", metavar="SOURCE", type=SOURCE)
@also_positional("out")
@shared.out("a .gguf file, or a folder for those of a folder of adapters; required")
@shared.base()
@click.option(
    "--outtype",
    "dtype",
    type=OneOf(["f32", "f16", "bf16", "q8_0"]),
    help="Type of the file's matrices.  [default: f32 for an adapter, a model's own float type]",
)
@common_options
def convert_to_gguf(console: Console, source: Path | str, out: Path, base_name: str | None, dtype: str | None) -> None:
    """Write the adapter SOURCE, or the model in that folder (of `rsgwm fuse`), to a GGUF file, and read it back.

    An adapter is a folder (ours, mlx-lm's or PEFT's), a Hub id or hf://owner/name@revision. llama.cpp applies an
    adapter with --lora, and runs a model with -m. Of a folder of adapters, each becomes NAME.gguf in the
    folder --out.

    Example: rsgwm convert to-gguf runs/drafter --out drafter.gguf
    """
    from mlx_rsgwm.converters.base_layers import shared_base_layers
    from mlx_rsgwm.converters.gguf.adapter import to_gguf
    from mlx_rsgwm.converters.gguf.write import is_model, model_to_gguf
    from mlx_rsgwm.converters.peft.bulk import is_mlx
    from mlx_rsgwm.converters.peft.convert import Converted
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.models.adapter_sources import load_adapter
    from mlx_rsgwm.models.fit_check import base_of

    if isinstance(source, Path) and is_model(source) and not is_mlx(source):
        if base_name is not None:
            raise RsgwmError(f"{source} is a model, not an adapter; leave --base out")
        written = model_to_gguf(source, out, dtype, console.progress)
        console.line(f"{out}: GGUF model, {written['architecture']}, {written['tensors']} tensors, {written['dtype']}")
        console.result(written)
        return

    def convert(folder: Path | str, target: Path) -> Converted:
        adapter = load_adapter(folder, base_name, progress=console.progress)
        name, path = base_of(adapter, base_name, console.progress)
        to_gguf(adapter, shared_base_layers(name, path), target, dtype or "f32")
        return Converted(target, name, adapter.spec, len(adapter.modules()))

    kind = dtype or "f32"
    _run(console, source, out, is_mlx, Path.is_file, convert, f"GGUF adapter ({kind})", ".gguf", dtype=kind)


@click.command("from-gguf")
@click.argument("source", metavar="FILE", type=PATH)
@also_positional("out")
@shared.out("a new folder; required")
@shared.base()
@click.option(
    "--quantised", is_flag=True, help="Keep matrices in Q4_0, Q4_1 and Q8_0 as they are: an MLX model, not torch's."
)
@common_options
def convert_from_gguf(console: Console, source: Path, out: Path, base_name: str | None, quantised: bool) -> None:
    """Write the adapter, or the base model, in the .gguf FILE to a new folder.

    Commands take a .gguf file as an adapter, or as --base in float32, by themselves. A quantised folder needs an eighth
    of that memory (Q4_0), for training too; its values are those of the file.

    \b
    Examples:
      rsgwm convert from-gguf model-Q4_0.gguf --out model --quantised
      rsgwm convert from-gguf drafter.gguf --out drafter --base smollm2-135m
    """
    from mlx_rsgwm.converters.gguf.read import convert_gguf
    from mlx_rsgwm.converters.gguf.read_adapter import convert_from_gguf as convert_adapter
    from mlx_rsgwm.converters.gguf.read_adapter import is_gguf_adapter
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.models.base_folder import describe_folder

    if is_gguf_adapter(source):
        if quantised:
            raise RsgwmError(f"{source} is an adapter, not a model; leave --quantised out")
        _print_result(console, out, "adapter", convert_adapter(source, base_name, out, console.progress))
        return
    if base_name is not None:
        raise RsgwmError(f"{source} is a model, not an adapter; leave --base out")
    facts = describe_folder(convert_gguf(source, out, console.progress, quantised))
    console.line(f"{out}: {facts['architecture']}, {facts['bytes_on_disk'] / 1e6:,.0f} MB")
    console.result({"out": out, "quantised": quantised, **facts})


@click.command("check")
@click.argument("peft", type=PATH)
@click.argument("adapter", type=PATH)
@common_options
def check(console: Console, peft: Path, adapter: Path) -> None:
    """Prove that a PEFT folder and an mlx-lm folder hold the same adapter, or name the first layer that differs.

    Exits 3 when they differ.

    Example: rsgwm convert check drafter-peft drafter
    """
    from mlx_rsgwm.converters.base_layers import local_base_layers
    from mlx_rsgwm.converters.module_names import Names
    from mlx_rsgwm.converters.peft.verify import require_equal
    from mlx_rsgwm.models.adapter import Adapter

    manifest = Adapter.load(adapter, lazy=True).manifest
    described = manifest.get("base") or {}
    layers = local_base_layers(str(described.get("name") or ""))
    modules = require_equal(peft, adapter, layers.names if layers else Names(described.get("model_type")))
    console.line(f"{peft} and {adapter} are the same adapter: {modules} modules")
    console.result({"peft": peft, "adapter": adapter, "modules": modules, "passed": True})


def _run(
    console: Console,
    source: Path | str,
    out: Path,
    is_adapter: Callable[[Path], bool],
    is_result: Callable[[Path], bool],
    convert: Callable[[Any, Path], Converted],
    noun: str,
    suffix: str = "",
    **about: Any,
) -> None:
    """Convert one adapter, or every one below a folder that is none itself, to its name with ``suffix``.

    ``about``: what the result of one says beyond its facts.
    """
    from mlx_rsgwm.converters.peft.bulk import adapter_folders, convert_all

    if isinstance(source, str) or is_adapter(source) or not adapter_folders(source, is_adapter):
        _print_result(console, out, noun, convert(source, out), **about)
    else:
        _report(console, convert_all(source, out, is_adapter, is_result, convert, suffix, console.progress))


def _print_result(console: Console, out: Path, noun: str, result: Converted, **about: Any) -> None:
    console.line(
        f"{out}: {noun} for {result.base}, rank {result.spec.rank}, scale {result.spec.scale:g}, "
        f"{result.modules} modules"
    )
    for note in result.notes:
        console.line(f"note: {note}")
    console.result({"out": out, **_facts(result), **about})


def _facts(result: Converted) -> dict[str, Any]:
    facts = {
        "base": result.base,
        "rank": result.spec.rank,
        "scale": result.spec.scale,
        "modules": result.modules,
    }
    return {**facts, "notes": list(result.notes)} if result.notes else facts


def _report(console: Console, outcomes: Sequence[FolderResult]) -> None:
    from mlx_rsgwm.core.errors import raise_problems

    for outcome in outcomes:
        if outcome.converted is not None:
            console.line(f"{outcome.out}: rank {outcome.converted.spec.rank}, {outcome.converted.modules} modules")
            for note in outcome.converted.notes:
                console.line(f"note: {outcome.out}: {note}")
        else:
            console.line(f"{outcome.out}: {'failed' if outcome.error else 'there already'}")
    failed = [outcome for outcome in outcomes if outcome.error]
    console.result(
        {
            "converted": [{"out": entry.out, **_facts(entry.converted)} for entry in outcomes if entry.converted],
            "kept": [entry.out for entry in outcomes if entry.converted is None and not entry.error],
            "failed": [{"source": entry.source, "error": entry.error} for entry in failed],
        }
    )
    raise_problems(
        f"{len(failed)} of {len(outcomes)} adapters were not converted", [str(entry.error) for entry in failed]
    )
