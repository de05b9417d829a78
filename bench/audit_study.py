"""Does a plan of ``rsgwm audit`` repair what is lopsided, and leave alone what is not?

    python bench/audit_study.py [--out results.json]
    python bench/audit_study.py FOLDER [--rows 32] [--pool strain] [--seed 0] [--tables kept.md] [--out results.json]

Without a folder: in the weights. Five pairs are built to the ranks and norm ratios of the published ones ("From
Diagnosis to Guarded Repair", Study 16): random directions, singular values k^-p, ratios of the modules lognormal
around the pair's. The falls p of both and the spread were chosen from a grid of 0.2 so that the closed form comes near
the four published figures of a pair: three numbers for four, so this shows that such adapters exist and what a real
merge makes of them, and predicts nothing. Every pair is merged naively (the mean), by its plan, and by both definitions
of equal norms; Q_min and D of what is saved stand beside those of the sum before it was cut to its rank, and beside
what the closed form says. The balanced control is a pair whose plan is the mean everywhere: its merge must have the
mean's bits.

With the folder of ``bench/merge_study.py``: in behaviour. Every pool that is trained there is merged as a whole (the
mean, equal norms, by its plan, and as ``rsgwm merge`` does by itself), and every pair of it (the mean, and by
itself). Each merge is measured on test questions that none of the adapters was trained on: nats a completion token,
and the retention of each source, (base − merged) / (base − alone), 1 where all is kept and 0 where the merge is no
better than the base, with 95 % intervals from 1000 resamples of rows, the same for all. Last comes how often a
verdict held: of how many pairs that were called safe at least .95 of both was kept, with Wilson's interval (pairs of
a pool share adapters, so that it is too narrow). Whatever is measured is kept in FOLDER/audit, and not measured
again.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.audit.carry_out import merge_by_plan
from mlx_rsgwm.audit.outcomes import structure_of
from mlx_rsgwm.audit.plan import plan_of
from mlx_rsgwm.audit.pool_audit import audit
from mlx_rsgwm.audit.verdicts import IMBALANCED
from mlx_rsgwm.bench.audit_retention import study
from mlx_rsgwm.bench.merge_study import POOLS, TWO_POOLS
from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.core.tables import Rows, text_page
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.adapter import Adapter, LoraSpec

KEYS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS, WIDTH = 12, 2048
NAIVE = MergeOptions("linear", weights=(0.5, 0.5))
CONTROLS = {
    "equal norms, global": MergeOptions("norm_equalised", parameters={"definition": "global"}),
    "equal norms, by module": MergeOptions("norm_equalised", parameters={"definition": "geometric"}),
}


@dataclass(frozen=True)
class Published:
    """A published pair: ranks, the first's norm over the second's, and (Q_min, D) of the naive and recommended merge.

    ``falls``: p of the singular values k^-p of both; ``spread``: of the modules' ratios, a standard deviation of their
    logarithm; ``largest``: the largest of them, where it is known.
    """

    name: str
    ranks: tuple[int, int]
    ratio: float
    naive: tuple[float, float]
    recommended: tuple[float, float]
    falls: tuple[float, float]
    spread: float
    largest: float | None = None


PAIRS = (
    Published("01", (16, 16), 3.1, (0.189, 0.668), (0.280, 0.523), (0.2, 1.0), 0.4),
    Published("02", (16, 16), 2.1, (0.345, 0.452), (0.345, 0.452), (0.6, 0.8), 0.2),
    Published("03", (16, 8), 8.4, (0.038, 0.928), (0.685, 0.002), (1.0, 0.4), 0.0),
    Published("04", (64, 8), 19.7, (0.017, 0.966), (0.679, 0.030), (0.2, 0.4), 1.0, 875.0),
    Published("06", (16, 8), 11.3, (0.126, 0.776), (0.560, 0.167), (1.4, 1.2), 1.0),
)


def module_ratios(pair: Published, count: int) -> np.ndarray:
    """Ratios of ``count`` modules, whose logarithms have just the pair's mean and spread."""
    drawn = np.random.default_rng(0).standard_normal(count)
    ratios: np.ndarray = pair.ratio * np.exp(pair.spread * (drawn - drawn.mean()) / drawn.std())
    if pair.largest is not None:
        ratios[ratios.argmax()] = pair.largest
    return ratios


def build(pair: Published, folder: Path) -> list[Path]:
    """The two adapters, saved."""
    names = [f"model.layers.{layer}.{key}" for layer in range(LAYERS) for key in KEYS]
    rng = np.random.default_rng(int(pair.name))
    ones = np.ones(len(names))
    sizes = (module_ratios(pair, len(names)), ones)
    return [
        _adapter(names, rank, fall, size, rng).save(folder / f"{pair.name}-{side}")
        for side, rank, fall, size in zip("ab", pair.ranks, pair.falls, sizes, strict=True)
    ]


def _adapter(names: Sequence[str], rank: int, fall: float, sizes: np.ndarray, rng: np.random.Generator) -> Adapter:
    sigma = np.arange(1, rank + 1) ** -fall
    weights = {}
    for name, size in zip(names, sizes, strict=True):
        root = np.sqrt(size * sigma / np.linalg.norm(sigma))
        inputs, outputs = (np.linalg.qr(rng.standard_normal((WIDTH, rank)))[0] for _ in range(2))
        weights[f"{name}.lora_a"] = mx.array((inputs * root).astype(np.float32))
        weights[f"{name}.lora_b"] = mx.array((outputs * root).T.astype(np.float32))
    return Adapter(LoraSpec(rank, 1.0, 0.0, KEYS, LAYERS), weights, manifest={"kind": "built"})


def study_pair(pair: Published, folder: Path) -> dict[str, Any]:
    """Every merge of one pair, and whether a plan that is the mean gives the mean's bits."""
    sources = build(pair, folder)
    audited = audit(sources)
    plan, (measured,) = plan_of(audited), audited.pairs
    naive, recommended = merge(sources, NAIVE), merge_by_plan(plan)
    merged = {"naive": naive, "recommended": recommended}
    merged |= {name: merge(sources, options) for name, options in CONTROLS.items()}
    mean = all(module.method == "linear" and set(module.weights) == {0.5} for module in plan.modules.values())
    ratios = [module.frobenius_ratio for module in measured.modules]
    return {
        "pair": pair.name,
        "ranks": pair.ranks,
        "ratio": float(np.exp(np.mean(np.log(ratios)))),
        "largest_ratio": max(ratios),
        "verdict": measured.verdict,
        "imbalanced": sum(module.verdict.name == IMBALANCED for module in measured.modules),
        "modules": len(measured.modules),
        "plan_is_the_mean": mean,
        "same_bits_as_the_mean": same_bits(naive, recommended),
        "published": {"naive": pair.naive, "recommended": pair.recommended},
        "merges": {name: structure_of(each, sources).to_dict() for name, each in merged.items()},
    }


def same_bits(first: Adapter, second: Adapter) -> bool:
    """Whether two adapters have the same arrays."""
    return first.weights.keys() == second.weights.keys() and all(
        mx.array_equal(first.weights[name], second.weights[name]).item() for name in first.weights
    )


def tables_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Rows]]:
    """The pairs, and of each its merges: Q_min and D."""
    pairs = [["pair", "ranks", "norms", "largest", "verdict", "imbalanced modules", "plan", "bits of the mean"]]
    merges = [["pair", "merge", "as saved", "before the cut", "predicted", "published"]]
    for row in rows:
        pairs.append(
            [
                *(row["pair"], "/".join(map(str, row["ranks"])), f"{row['ratio']:.1f} ×"),
                *(f"{row['largest_ratio']:.0f} ×", row["verdict"], f"{row['imbalanced']} of {row['modules']}"),
                "the mean" if row["plan_is_the_mean"] else "rebalanced",
                "yes" if row["same_bits_as_the_mean"] else "no",
            ]
        )
        for name, structure in row["merges"].items():
            published = row["published"].get(name)
            kinds = [_told(structure[kind]) for kind in ("truncated", "untruncated", "predicted")]
            merges.append([row["pair"], name, *kinds, "{:.3f} {:.3f}".format(*published) if published else ""])
    return [("Pairs", pairs), ("Q_min and D", merges)]


def _told(outcome: Mapping[str, Any] | None) -> str:
    return f"{outcome['q_min']:.3f} {outcome['dominance']:.3f}" if outcome else "–"


def structural() -> dict[str, Any]:
    """The five pairs.

    Raises:
        RuntimeError: a merge by a plan that is the mean is not the mean's bits.
    """
    with tempfile.TemporaryDirectory() as temporary:
        rows = [study_pair(pair, Path(temporary)) for pair in PAIRS]
    print(text_page(tables_of(rows)))
    if not all(row["same_bits_as_the_mean"] for row in rows if row["plan_is_the_mean"]):
        raise RuntimeError("a plan that is the mean did not give the mean's bits")
    return {"pairs": rows}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="what bench/merge_study.py trained")
    parser.add_argument("--rows", type=int, default=32, help="test questions of each adapter")
    parser.add_argument("--pool", action="append", choices=list(POOLS), help="repeat; default: balanced, strain")
    parser.add_argument("--seed", action="append", type=int, help="repeat; default: 0, 1, 2")
    parser.add_argument("--tables", type=Path, help="write the tables here, too (.md, .tex, .csv)")
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    options = parser.parse_args()
    if options.folder is not None:
        pools, seeds = options.pool or list(TWO_POOLS), options.seed or [0, 1, 2]
        result = study(options.folder, options.rows, pools, seeds, options.tables)
    else:
        result = structural()
    shown = {"rows": result["rows"], "verdicts": result["verdicts"]} if "verdicts" in result else result
    give_result({"versions": versions(), **result}, options.out, shown)


if __name__ == "__main__":
    main()
