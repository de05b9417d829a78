"""The predictors that come with the package, and what decides where they do not speak.

They were fitted by ``bench/mergeability.py`` (docs/lab-notes/mergeability.md) to adapters of one base at two shares of
training. Everywhere else the rule of the measures decides, and says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.probe.decide import Decision, decide, feasible
from mlx_rsgwm.probe.predictor import Predictor, PredictorRefusal, read_predictors
from mlx_rsgwm.probe.table import Table

FOLDER = Path(__file__).parent / "predictors"


def shipped_predictors(table: Table, adapters: Sequence[Adapter] = ()) -> list[Predictor]:
    """Those that were fitted at the table's share of training and to its base and measures.

    ``adapters``: those that are to be merged; a method that needs what they have not kept is left out.

    Raises:
        PredictorRefusal: there are none, and why.
    """
    everything = [each for folder in sorted(FOLDER.glob("at-*")) for each in read_predictors(folder)]
    fitting = [each for each in everything if each.about["at"] == table.at]
    if not fitting:
        shares = " and ".join(f"{share:g}" for share in sorted({each.about["at"] for each in everything}))
        raise PredictorRefusal(f"the package's predictors were fitted at {shares} of training, not at {table.at:g}")
    if not table.about.get("base"):
        raise PredictorRefusal("the adapters do not say which weights they were trained on, as rsgwm's own do")
    for predictor in fitting:
        predictor.check(table)
    return feasible(fitting, adapters)


def decide_by_default(table: Table, adapters: Sequence[Adapter] = ()) -> Decision:
    """What to do with the ``adapters`` of a table by the package's predictors, or by the rule, and then why by that."""
    try:
        return decide(table, shipped_predictors(table, adapters))
    except PredictorRefusal as refusal:
        return replace(decide(table), reason=str(refusal))
