"""``rsgwm pool train``: several adapters that share one initialisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import COUNT, Number, OneOf
from mlx_rsgwm.cli.options.train import memory_options, saving_options, train_config, train_options
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.base import DEFAULT_BASE
from mlx_rsgwm.training.rounds import MODES, SCHEDULES, Rounds


@click.command(name="train")
@shared.base(DEFAULT_BASE)
@shared.corpus("repeatable", multiple=True, name="folders")
@shared.task("to build a corpus from; repeatable", required=False)
@shared.draft_rows(102)
@shared.verify_rows()
@shared.questions()
@shared.template("plain")
@shared.mask_prompt()
@shared.out("a folder that gets one folder per adapter", required=True)
@click.option(
    "--probe",
    "probed",
    type=Number(0, 1, min_open=True, max_open=True),
    help="After this share of every adapter's steps say how they will merge (rsgwm probe decide), then train on.",
)
@shared.predictors()
@click.option("--stop-after-probe", is_flag=True, help="Do not train on; the same command without it does.")
@click.option(
    "--rounds", type=COUNT, default=0, help="Share the steps out among so many rounds, with a merge after each."
)
@click.option("--round-mode", type=OneOf(MODES), help=f"How rounds are merged.  [default: {Rounds.mode}]")
@click.option("--round-method", metavar="METHOD", help=f"Merge of a round, by name.  [default: {Rounds.method}]")
@click.option("--round-alpha", type=Number(0, min_open=True), help="Length of a round's step.  [default: 1]")
@click.option(
    "--round-schedule",
    type=OneOf(SCHEDULES),
    help=f"What the learning rate decays over: each round, or the whole run.  [default: {Rounds.schedule}]",
)
@shared.settings("a parameter of --round-method", "round_settings")
@train_options
@common_options
def train_pool(
    console: Console,
    base_name: str | None,
    folders: tuple[Path, ...],
    tasks: tuple[str, ...],
    draft_rows: int,
    verify_rows: int,
    folder: Path | None,
    template_name: str,
    mask_prompt: bool,
    out: Path,
    probed: float | None,
    predictors: Path | None,
    stop_after_probe: bool,
    rounds: int,
    round_mode: str | None,
    round_method: str | None,
    round_alpha: float | None,
    round_schedule: str | None,
    round_settings: tuple[str, ...],
    settings: Mapping[str, Any],
    running: Mapping[str, Any],
) -> None:
    """Train a pool: one adapter for each --corpus and --task, with the same settings and the same initial A.

    Finished adapters are skipped, so the same command with --resume goes on where it was cut off. Under mlx.launch the
    adapters are shared out among the processes.

    With --rounds every task starts each round where the merge of the last one ended (ATM); the last round's adapters
    are the pool. Of several processes each reads its own tasks' rows alone; adapters are all that crosses.

    \b
    Examples:
      rsgwm pool train --task change --task groups --out pool
      rsgwm pool train --corpus corpus/a --corpus corpus/b --epochs 1 --out pool --resume
      mlx.launch -n 2 -- rsgwm pool train --corpus corpus/a --corpus corpus/b --out pool
      rsgwm pool train --task change --task groups --steps 24 --rounds 4 --out pool
      rsgwm pool train --task change --task groups --probe 0.05 --out pool
    """
    from mlx_rsgwm.core.distributed import launched_processes
    from mlx_rsgwm.core.progress import SILENT
    from mlx_rsgwm.data.loading import load_data
    from mlx_rsgwm.merging import alternate
    from mlx_rsgwm.models.base import load_base
    from mlx_rsgwm.models.rounded_weights import check_dense
    from mlx_rsgwm.training import pool
    from mlx_rsgwm.training.checkpoints import require_pool_place

    corpora = _corpora(folders, tasks, out)
    given = {
        "mode": round_mode,
        "method": round_method,
        "alpha": round_alpha,
        "schedule": round_schedule,
        "parameters": round_settings,
    }
    config = train_config(console, {}, {**settings, **_rounds(rounds, given)})
    saving = saving_options(out, {}, running)
    _refuse_probing(probed, predictors, stop_after_probe, rounds, len(corpora))
    check_dense(base_name or DEFAULT_BASE, config.qat, console.progress)
    processes = launched_processes()
    require_pool_place(out)
    if processes.writes:
        _build(console, tasks, out, draft_rows, verify_rows, folder, template_name)
    processes.wait()
    named = [*corpora.items()][processes.rank :: processes.size] if config.rounds else [*corpora.items()]
    members = [pool.Member(name, *load_data(folder, None, mask_prompt)) for name, folder in named]
    progress = console.progress if processes.writes else SILENT
    base = load_base(base_name or DEFAULT_BASE, progress=progress)
    memory = memory_options(running)
    told: dict[str, Any] = {}
    if probed is not None:
        young = replace(saving, snapshots=tuple(sorted({*saving.snapshots, probed})), pause=probed)
        pool.train_pool(base, members, config, young, memory, progress, processes)
        saving = replace(young, pause=None, resume="continue")
        processes.wait()
        if processes.writes:
            told = _decide(console, [out / name for name in corpora], probed, predictors)
    if stop_after_probe:
        if processes.writes:
            console.result({"out": str(out), **told})
        return
    if config.rounds:
        told["rounds"] = alternate.train_rounds(
            base, list(corpora), members, config, saving, memory, progress, processes
        )
    else:
        told["trained"] = pool.train_pool(base, members, config, saving, memory, progress, processes)
    processes.wait()
    if processes.writes:
        _tell(console, out, list(corpora), told)


def _corpora(folders: Sequence[Path], tasks: Sequence[str], out: Path) -> dict[str, Path]:
    """Every adapter's corpus by its name; those of tasks lie where they will be made."""
    if not folders and not tasks:
        raise RsgwmError("give at least one --corpus or --task")
    named = [(folder.stem, folder) for folder in folders]
    named += [(Path(task).stem, out / "data" / Path(task).stem) for task in tasks]
    folded = [name.casefold() for name, _ in named]  # one folder on many disks
    if double := sorted({name for name, _ in named if folded.count(name.casefold()) > 1}):
        raise RsgwmError(f"two --corpus or --task are called {double[0]}; adapters are named after them")
    return dict(named)


def _tell(console: Console, out: Path, names: Sequence[str], told: Mapping[str, Any]) -> None:
    from mlx_rsgwm.merging.alternate import render_rounds
    from mlx_rsgwm.training.pool import pool_summary, render_pool

    if "rounds" in told:
        console.line(render_rounds(told["rounds"]))
    rows = pool_summary(out, names)
    console.line(render_pool(rows))
    console.result({"out": str(out), **told, "adapters": rows})


def _refuse_probing(probed: float | None, predictors: Path | None, stop: bool, rounds: int, adapters: int) -> None:
    if probed is None and (predictors is not None or stop):
        raise RsgwmError("--predictors and --stop-after-probe are for --probe; give the share of training to probe at")
    if probed is not None and rounds:
        raise RsgwmError("--probe looks at adapters that are trained apart; leave it out, or leave out --rounds")
    if probed is not None and adapters < 2:
        raise RsgwmError("--probe takes a pool of two or more adapters")


def _decide(console: Console, folders: Sequence[Path], share: float, predictors: Path | None) -> dict[str, Any]:
    """What :func:`~mlx_rsgwm.probe.decide.decide` says of a pool's young adapters, which is shown."""
    from mlx_rsgwm.cli.probe_decide import decider_of, tell_decision
    from mlx_rsgwm.probe.decide import apart
    from mlx_rsgwm.probe.inputs import young_adapters
    from mlx_rsgwm.probe.measure import measured_table

    young = young_adapters(folders, share)
    # Which statistics the finished ones will have is not known yet, so no method is left out for them.
    decision = decider_of(predictors, None)(measured_table(young, share, console.progress), ())
    tell_decision(console, decision)
    alone = apart(decision)
    for name in alone:
        console.line(f"{name} merges with none of the others: train it on for routing alone (rsgwm pool route)")
    return {"probe": {"at": share, **decision.to_dict(), "apart": alone}}


def _rounds(count: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The setting ``rounds`` of the options; empty without them.

    Raises:
        RsgwmError: options of rounds without --rounds.
    """
    from mlx_rsgwm.cli.merge import named_values

    chosen = {name: value for name, value in given.items() if value}
    if not count:
        if chosen:
            raise RsgwmError("--round-mode and other --round- options, and --set, are for --rounds; give their number")
        return {}
    if "parameters" in chosen:
        chosen["parameters"] = named_values(chosen["parameters"], "--set")
    return {"rounds": {"count": count, **chosen}}


def _build(
    console: Console,
    tasks: tuple[str, ...],
    out: Path,
    draft_rows: int,
    verify_rows: int,
    questions: Path | None,
    template_name: str,
) -> None:
    """Write the corpora of ``tasks`` below ``out``, where they are not already."""
    from mlx_rsgwm.data.corpus import make_rows, save_corpus
    from mlx_rsgwm.data.question_files import is_question_file
    from mlx_rsgwm.data.select import select_questions
    from mlx_rsgwm.data.template import find_template

    for task in tasks:
        own_file = is_question_file(task)
        wanted = None if own_file else max(draft_rows, 2 * verify_rows, 1)
        chosen = select_questions(task, "train", wanted, console.seed, questions)
        if chosen.note(task):
            console.progress.message(chosen.note(task))
        rows = make_rows(chosen.questions, draft_rows, verify_rows, console.seed, at_most=own_file)
        provenance = {"seed": console.seed, "tasks": [task], "split": chosen.split}
        folder = out / "data" / Path(task).stem
        save_corpus(folder, rows, find_template(template_name), provenance, chosen.file_questions)
