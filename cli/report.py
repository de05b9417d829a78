"""``rsgwm report write`` and ``rsgwm compare``: reports from recorded items, without a model."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import NEW_FILE, PATH


@click.command()
@click.argument("run", type=PATH)
@shared.out("a folder, by default RUN itself")
@click.option(
    "--lm-eval", "against", is_flag=True, help="List the drafts that lm_eval's GSM8K filters judge otherwise."
)
@click.option("--tables", "tables_file", type=NEW_FILE, help="Write the tables alone here, too: .md, .tex or .csv.")
@common_options
def report(console: Console, run: Path, out: Path | None, against: bool, tables_file: Path | None) -> None:
    """Write the report of RUN anew (report.html, report.md, plot.png, report.json) from its items.jsonl.

    \b
    Examples:
      rsgwm report write runs/demo
      rsgwm report write runs/demo/report --tables tables.tex
    """
    from mlx_rsgwm.core import files
    from mlx_rsgwm.core.tables import page_writer, write_page
    from mlx_rsgwm.evaluation.report.folder import (
        TITLE,
        notes,
        read_report,
        render_table,
        report_folder,
        sections,
        write_report,
    )
    from mlx_rsgwm.studies.lm_eval import disagreements

    if tables_file is not None:
        page_writer(tables_file)
    run = report_folder(run)
    summary, records = read_report(run)
    written = write_report(out or run, records, summary["k"], summary["metadata"], seed=console.seed)
    console.line(render_table(written))
    console.line(f"report: {out or run}")
    if tables_file is not None:
        write_page(tables_file, TITLE, sections(written), notes(written))
        console.line(f"tables: {tables_file}")
    if against:
        differing = disagreements(records)
        files.write_json((out or run) / "lm-eval.json", differing)
        console.line(
            f"judged otherwise by lm_eval's filters: {len(differing)}, listed in {(out or run) / 'lm-eval.json'}"
        )
        written["lm_eval_disagreements"] = differing
    console.result(written)


@click.command()
@click.argument("run_a", type=PATH)
@click.argument("run_b", type=PATH)
@click.option(
    "--of", "modes", default="draft_verify", show_default=True, help="drafter, draft_verify, or A,B: one each."
)
@click.option("--tails", is_flag=True, help="Also how sure the verifiers were of wrong answers that they accepted.")
@shared.out("a file: .md, .tex or .csv")
@common_options
def compare(console: Console, run_a: Path, run_b: Path, modes: str, tails: bool, out: Path | None) -> None:
    """Compare RUN_A and RUN_B on the items they share: exact McNemar, paired bootstrap, corrected for several tests.

    \b
    Examples:
      rsgwm compare runs/a runs/b
      rsgwm compare runs/demo runs/demo/paper --out table.tex
      rsgwm compare runs/demo runs/demo/paper --tails
    """
    from mlx_rsgwm.core.tables import aligned, page_writer, write_page
    from mlx_rsgwm.evaluation.report.comparison import compare_runs, comparison_notes, comparison_rows
    from mlx_rsgwm.evaluation.report.folder import read_report

    if out is not None:
        page_writer(out)
    first, second = (read_report(run)[1] for run in (run_a, run_b))
    comparison = compare_runs(first, second, modes, (str(run_a), str(run_b)), console.seed)
    console.line(aligned(comparison_rows(comparison)))
    console.line("\n".join(comparison_notes(comparison)))
    if tails:
        from mlx_rsgwm.evaluation.tails.accepted_wrong import compare_tails, tails_text

        comparison["tails"] = compare_tails(first, second, (str(run_a), str(run_b)), console.seed)
        console.line(tails_text(comparison["tails"]))
    if out is not None:
        write_page(out, f"{run_a} and {run_b}", [("", comparison_rows(comparison))], comparison_notes(comparison))
        console.line(f"comparison: {out}")
    console.result(comparison)
