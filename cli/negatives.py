"""``rsgwm data negatives``: verifier pairs from drafts that adapters wrote themselves."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import SHARE


@click.command()
@shared.adapter("it drafts", required=True, name="sources")
@shared.task()
@shared.base()
@shared.verify_rows()
@shared.draft_rows(0, "gold ones, put before the others")
@click.option(
    "--share",
    type=SHARE,
    default=0.75,
    show_default=True,
    help="Share of the wrong answers that are drafts; the rest is perturbed gold.",
)
@shared.items(None, "training ones to draft on", "--verify-rows")
@shared.offset("those that the adapters were trained on")
@shared.drafts(2, "by each adapter", name="attempts")
@shared.temperature()
@shared.top_p()
@shared.max_tokens()
@shared.batch_rows()
@shared.questions()
@shared.template()
@shared.out("a corpus folder", required=True)
@common_options
def negatives(
    console: Console,
    sources: tuple[Path, ...],
    tasks: tuple[str, ...],
    base_name: str | None,
    verify_rows: int,
    draft_rows: int,
    share: float,
    items: int | None,
    offset: int,
    attempts: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    batch_rows: int,
    folder: Path | None,
    template_name: str | None,
    out: Path,
) -> None:
    """Build a corpus whose wrong answers are mistakes that adapters made themselves.

    Adapters draft on training questions (never on those for calibration or test), gold says which drafts are right, and
    right and wrong answers to the same question make a pair. A verifier trained on its drafters' own mistakes tells
    these apart; one that knows perturbed gold answers only may not.

    \b
    Examples:
      rsgwm data negatives --adapter runs/demo/drafter --task change --task groups --offset 200 --out corpus/own
      rsgwm data negatives --adapter pool/change --task change --draft-rows 144 --verify-rows 160 --out corpus/change
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.data.corpus import CorpusRow, save_corpus
    from mlx_rsgwm.data.hard_negatives import make_mixed_rows
    from mlx_rsgwm.data.select import select_questions
    from mlx_rsgwm.data.template import Template, find_template
    from mlx_rsgwm.evaluation.judging import label_drafts
    from mlx_rsgwm.inference.loop import DraftVerify
    from mlx_rsgwm.inference.open import load_base_for, slots_of
    from mlx_rsgwm.inference.policy import LoopConfig
    from mlx_rsgwm.inference.sampling import Sampling
    from mlx_rsgwm.models.adapter_sources import load_adapters

    if verify_rows < 2 or verify_rows % 2:
        raise RsgwmError(f"--verify-rows must be even and at least 2, for they come in pairs, found {verify_rows}")
    wanted = items or verify_rows
    config = LoopConfig(attempts, sampling=Sampling(temperature, top_p, max_tokens, console.seed))
    chosen = {
        task: select_questions(task, "train", max(wanted, draft_rows), console.seed, folder, offset) for task in tasks
    }
    for task, selection in chosen.items():
        if selection.note(task):
            console.line(selection.note(task))
    adapters = load_adapters(sources, base_name, progress=console.progress)
    described = [one.manifest["template"] for one in adapters if one.manifest.get("template")]
    if not template_name and not described:
        raise RsgwmError(f"{sources[0]} does not say which prompt template it was trained with; give --template")
    template = find_template(template_name) if template_name else Template.from_description(described[0])
    base = load_base_for(adapters, base_name, console.progress)
    slots = slots_of(base, {f"from-{index}": adapter for index, adapter in enumerate(adapters)})
    pipelines = [DraftVerify(slots, template, name, None, config) for name in slots.names()]

    rows: list[CorpusRow] = []
    counts: dict[str, dict[str, int]] = {}
    for task, selection in chosen.items():
        found = selection.questions
        drafts = label_drafts(pipelines, found[:wanted], batch_rows, console.progress)
        mixed = make_mixed_rows(found[:wanted], drafts, verify_rows // 2, share, console.seed)
        rows += [CorpusRow(f"{q.id}/draft", q.task, "draft", q.question, q.answer) for q in found[:draft_rows]]
        rows += mixed.rows
        labels = [correct for item in drafts for _, correct in item]
        counts[task] = {
            "drafts": len(labels),
            "right": sum(labels),
            "drafted_pairs": mixed.drafted_pairs,
            "perturbed_pairs": mixed.perturbed_pairs,
        }
        console.line(
            f"{task}: {sum(labels)} of {len(labels)} drafts right; {mixed.drafted_pairs} pairs with a wrong draft, "
            f"{mixed.perturbed_pairs} with perturbed gold"
        )
        if mixed.missing:
            console.line(
                f"{task}: {mixed.missing} more were to have a wrong draft, but there are no more; --items and "
                "--drafts give more"
            )
    origin = [{"name": one.name, "files": one.manifest.get("files", {})} for one in adapters]
    sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "attempts": attempts}
    provenance = {"from": origin, "share": share, "offset": offset, **sampling, "counts": counts}
    corpus = save_corpus(
        out,
        rows,
        template,
        {"seed": console.seed, "tasks": list(tasks), "split": "train", "negatives": provenance},
        [text for selection in chosen.values() for text in selection.file_questions],
    )
    console.line(f"corpus: {out}")
    console.result(
        {
            "out": str(out),
            "counts": corpus.manifest["counts"],
            "negatives": counts,
            "hash": corpus.hash,
            "template": template.hash,
        }
    )
