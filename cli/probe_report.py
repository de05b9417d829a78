"""``rsgwm probe report``: fitted predictors side by side, and what drives each merge method."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import PATH


@click.command()
@click.argument("predictors", type=PATH)
@shared.page("fingerprints, and predicted against measured")
@common_options
def report(console: Console, predictors: Path, page: Path | None) -> None:
    """Show the PREDICTORS that `rsgwm probe fit` left in a folder.

    How well each predicts left-out tasks; of fingerprints which measures count, and what methods have in common beside
    the figures of their source. The page has fingerprints as bars, and predicted against measured.

    \b
    Examples:
      rsgwm probe report predictors
      rsgwm probe report predictors --html probe.html
    """
    from mlx_rsgwm.core.tables import text_page
    from mlx_rsgwm.probe.fingerprints import agreement, fingerprint, sections
    from mlx_rsgwm.probe.predictor import read_predictors

    fitted = read_predictors(predictors)
    console.line(text_page(sections(fitted)))
    if page is not None:
        from mlx_rsgwm.probe.page import write_page

        write_page(fitted, page)
        console.line(f"page: {page}")
    prints = {each.method: fingerprint(each) for each in fitted if each.kind == "fingerprint"}
    common = agreement(prints)
    console.result(
        {
            "predictors": [{"method": each.method, "model": each.kind, **each.about["left_out"]} for each in fitted],
            "fingerprints": prints,
            "agreement": None if common is None else vars(common),
        }
    )
