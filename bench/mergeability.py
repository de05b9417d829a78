"""Can mergeability be forecast? Adapters with snapshots, what merges did to their pairs, forecasts on left-out tasks.

    python bench/mergeability.py FOLDER [--tasks change,groups,…] [--data DIR] [--seed 0 --seed 1] [--sets 40]

For every seed a pool from one initialisation: an adapter a task, of the embedded families and, with ``--data``, of
the data sets in DIR (``DIR/TASK/train.jsonl`` and ``test.jsonl``). Every pair is measured from the snapshots of 1, 2
and 5 % of training and from the finished adapters; every pair and ``--sets`` random sets of 3 to 5 a seed are merged by
every method and measured by held-out NLL. Then, at every share of training and for every method, ridge (and with
``--models ridge,trees,fingerprint`` more) is judged on left-out tasks.

The last line is JSON: Spearman, R² and AUC by share of training and method with intervals, the null and baselines;
and, of pairs and of larger sets, what deciding by left-out forecasts keeps, on average and at worst, how many adapters
stay resident and what it costs by the rule, beside every single method, routing everything, and the oracle; once among
all methods, once among those that need the weights alone. ``--out`` has fingerprints, too, with their overlap and sign
agreement. ``--ship`` writes predictors as the package has them. Whatever is finished in FOLDER is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.audit.eligibility import rows_of_each
from mlx_rsgwm.bench.public_tasks import public_questions
from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.progress import LineProgress
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.corpus import Corpus, make_rows, save_corpus
from mlx_rsgwm.data.synthetic import FAMILIES, generate
from mlx_rsgwm.data.template import find_template
from mlx_rsgwm.merging.methods import find_method
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import load_adapters
from mlx_rsgwm.models.base import Base, load_base
from mlx_rsgwm.probe.decide import COSTS, ROUTE, WORTH, action_of, shortfall
from mlx_rsgwm.probe.fingerprints import agreement, fingerprint
from mlx_rsgwm.probe.inputs import probed_adapters
from mlx_rsgwm.probe.measure import write_table
from mlx_rsgwm.probe.outcomes import Outcomes, random_sets, read_outcomes
from mlx_rsgwm.probe.predictor import Fitted, file_name, fit_predictor
from mlx_rsgwm.probe.table import Table, read_table
from mlx_rsgwm.probe.validation import PERMUTATIONS
from mlx_rsgwm.studies.merge_outcomes import OutcomeStudy, TaskData, units_of
from mlx_rsgwm.studies.sweep_variants import parse_variants
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.pool import Member, train_pool

SHARES = (0.01, 0.02, 0.05, 1.0)
SHIPPED = (0.05, 1.0)
METHODS = "linear,ties,dare_ties,norm_equalised,rsgwm,regmean"
STAGES = ("train", "measure", "outcomes", "fit")
SIZES = (3, 4, 5)


@dataclass(frozen=True)
class Study:
    """The size of the study and where it is: ``data``, a folder of data sets, for tasks that are no families."""

    folder: Path
    base: str
    tasks: tuple[str, ...]
    data: Path | None
    seeds: tuple[int, ...]
    train_rows: int
    rows: int
    most_tokens: int
    sets: int
    methods: str
    models: tuple[str, ...]
    shares: tuple[float, ...]
    permutations: int
    settings: Mapping[str, Any]

    def pool(self, seed: int) -> Path:
        """The folder of a seed's adapters."""
        return self.folder / f"pool-{seed}"

    def table(self, seed: int, share: float) -> Path:
        """The table of a seed's pairs at a share of training."""
        return self.folder / f"table-{seed}-{share:g}.jsonl"

    def outcomes(self, seed: int) -> Path:
        """What merges of a seed's adapters did."""
        return self.folder / f"outcomes-{seed}.jsonl"

    def adapters(self, seed: int) -> list[Path]:
        """The folders of a seed's adapters."""
        return [self.pool(seed) / task for task in self.tasks]

    def questions(self, task: str, purpose: str, count: int, seed: int) -> Corpus:
        """Rows of a task, whose file may hold fewer."""
        if task in FAMILIES:
            chosen = generate(task, count, seed, purpose)
        else:
            chosen = public_questions(task, purpose, count, seed, self.data)
        return Corpus(tuple(make_rows(chosen, count, 0, seed, at_most=True)), find_template("plain"), {})


def train_pools(study: Study, base: Base) -> None:
    """Train every seed's adapters that are not finished; a run that was cut off goes on."""
    for seed in study.seeds:
        members = []
        for task in study.tasks:
            rows = study.questions(task, "train", study.train_rows, seed).rows
            provenance = {"seed": seed, "tasks": [task], "split": "train"}
            corpus = save_corpus(study.folder / f"data-{seed}" / task, rows, find_template("plain"), provenance)
            members.append(Member(task, corpus))
        config = TrainConfig(**{"epochs": 1, **study.settings, "seed": seed, "init_seed": seed})
        train_pool(base, members, config, Saving(study.pool(seed), resume="continue"), progress=LineProgress())


def measure(study: Study) -> None:
    """Every seed's pairs at every share of training."""
    for seed in study.seeds:
        for share in SHARES:
            adapters, at = probed_adapters(study.adapters(seed), share)
            write_table(study.table(seed, share), adapters, at, progress=LineProgress())


def merge_all(study: Study, base: Base) -> None:
    """Every seed's pairs and random sets by every method."""
    for seed in study.seeds:
        adapters = load_adapters(study.adapters(seed))
        data = [
            TaskData(task, held_out(study, base, task, adapter))
            for task, adapter in zip(study.tasks, adapters, strict=True)
        ]
        places = [str(place) for place in range(len(adapters))]
        sets = [tuple(map(int, members)) for members in random_sets(places, SIZES, study.sets, seed)]
        units = units_of(len(adapters), parse_variants([study.methods]), sets)
        OutcomeStudy(base, adapters, data, study.outcomes(seed), progress=LineProgress()).execute(units)


def held_out(study: Study, base: Base, task: str, adapter: Adapter) -> list[Any]:
    """Test rows of a task that the adapter was not trained on, as far as ``most_tokens`` reach; two at least."""
    if task in FAMILIES or study.data is None:
        rows = rows_of_each([task], [adapter], base, study.rows, 1)[0][1]
    else:
        rows, _ = study.questions(task, "test", study.rows, 1).token_rows(base.tokenizer, 1024, "drop")
    before = np.cumsum([0, *(len(row.tokens) for row in rows)])[:-1]
    return rows[: max(2, int((before < study.most_tokens).sum()))]


def of_all_seeds(study: Study, share: float) -> tuple[Table, Outcomes]:
    """Tables and outcomes of all seeds together; adapters are named by seed and task, so that none meets another."""
    tables = [_renamed_table(read_table(study.table(seed, share)), seed) for seed in study.seeds]
    outcomes = [_renamed_outcomes(read_outcomes(study.outcomes(seed)), seed) for seed in study.seeds]
    names = {name: digest for each in tables for name, digest in each.about["adapters"].items()}
    tasks = {name: task for each in outcomes for name, task in each.tasks.items()}
    rows = {key: row for each in outcomes for key, row in each.rows.items()}
    table = Table({**tables[0].about, "adapters": names}, tuple(row for each in tables for row in each.rows))
    return table, Outcomes({**outcomes[0].about, "adapters": names, "tasks": tasks}, rows)


def _renamed_table(table: Table, seed: int) -> Table:
    rows = tuple(
        replace(row, adapters=(_name(row.adapters[0], seed), _name(row.adapters[1], seed))) for row in table.rows
    )
    adapters = {_name(each, seed): digest for each, digest in table.about["adapters"].items()}
    return Table({**table.about, "adapters": adapters}, rows)


def _renamed_outcomes(outcomes: Outcomes, seed: int) -> Outcomes:
    about = dict(outcomes.about)
    for field in ("adapters", "tasks", "data", "rows", "questions"):
        about[field] = {_name(each, seed): value for each, value in about[field].items()}
    rows = {}
    for (members, method), row in outcomes.rows.items():
        scores = {_name(each, seed): value for each, value in row.scores.items()}
        names = tuple(_name(each, seed) for each in row.members)
        rows[frozenset(_name(each, seed) for each in members), method] = replace(row, members=names, scores=scores)
    return Outcomes(about, rows)


def _name(folder: str, seed: int) -> str:
    return f"{seed}/{Path(folder).name}"


def forecasts(study: Study) -> dict[str, Any]:
    """Figures on left-out tasks by share of training, method and model, fingerprints, and decisions."""
    result: dict[str, Any] = {"left_out": {}, "fingerprints": {}, "decisions": {}}
    for share in study.shares:
        table, outcomes = of_all_seeds(study, share)
        fitted = {
            (method, kind): fit_predictor(table, outcomes, method, kind, permutations=study.permutations)
            for method in outcomes.methods
            for kind in study.models
        }
        result["left_out"][f"{share:g}"] = {
            f"{method}, {kind}": each.predictor.about["left_out"] for (method, kind), each in fitted.items()
        }
        prints = {m: fingerprint(each.predictor) for (m, kind), each in fitted.items() if kind == "fingerprint"}
        common = agreement(prints)
        result["fingerprints"][f"{share:g}"] = {"beta": prints, "common": None if common is None else vars(common)}
        by_first = {method: each for (method, kind), each in fitted.items() if kind == study.models[0]}
        alone = _from_weights(table)
        blind = {
            method: fit_predictor(alone, outcomes, method, study.models[0], permutations=1)
            for method in outcomes.methods
            if not find_method(method).needs
        }
        result["decisions"][f"{share:g}"] = {
            f"{what}{tail}": decisions(of, larger)
            for what, larger in (("pairs", False), ("larger", True))
            for tail, of in (("", by_first), (", by weights alone", blind))
        }
        print(f"at {share:g}: " + ", ".join(_told(name, each) for name, each in by_first.items()), flush=True)
    return result


def ship(study: Study, folder: Path) -> None:
    """Write what the package ships: ridge on what weights alone tell, at 5 % of training and at its end."""
    for share in SHIPPED:
        table, outcomes = of_all_seeds(study, share)
        alone = _from_weights(table)
        for method in outcomes.methods:
            predictor = fit_predictor(alone, outcomes, method).predictor
            predictor.save(make_folder(folder / f"at-{share:g}") / file_name(method, predictor.kind))


def _from_weights(table: Table) -> Table:
    """Without what not every adapter comes with."""
    kept_out = {"fisher_overlap", "training_gradient_cosine"}
    rows = tuple(
        replace(row, measures={name: value for name, value in row.measures.items() if name not in kept_out})
        for row in table.rows
    )
    return Table(table.about, rows)


def _told(method: str, fitted: Fitted) -> str:
    estimate = fitted.validation.spearman
    return f"{method} {estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def decisions(fitted: Mapping[str, Fitted], larger: bool = False) -> dict[str, Any]:
    """Of the pairs, or the ``larger`` sets, that every method merged: the strategies beside each other, as measured.

    Retention is the mean of a set's members, 1 where they are routed. Cost is the rule's, of what was measured; regret
    is above the oracle, which knows it.
    """
    sets = set.intersection(*(set(each.examples.sets) for each in fitted.values()))
    chosen_sets = sorted(members for members in sets if (len(members) > 2) == larger)
    measured = {m: _of(each, each.examples.y, chosen_sets) for m, each in fitted.items()}
    predicted = {m: _of(each, each.validation.predicted, chosen_sets) for m, each in fitted.items()}
    costs = {m: _cost(m) + np.maximum(WORTH - values, 0.0) for m, values in measured.items()}
    expected = {
        m: _cost(m)
        + np.array([shortfall(value, _errors(fitted[m], s)) for value, s in zip(values, chosen_sets, strict=True)])
        for m, values in predicted.items()
    }
    every = {**measured, ROUTE: np.ones(len(chosen_sets))}
    costs, expected = ({**each, ROUTE: np.full(len(chosen_sets), COSTS[ROUTE])} for each in (costs, expected))
    chosen = {f"always {method}": [method] * len(chosen_sets) for method in every}
    for name, by in (("decided", expected), ("oracle", costs)):
        chosen[name] = [min(by, key=lambda method: by[method][place]) for place in range(len(chosen_sets))]
    least = np.min(list(costs.values()), axis=0)
    resident = np.array([len(members) for members in chosen_sets])
    return {name: _strategy(methods, every, costs, least, resident) for name, methods in chosen.items()}


def _errors(fitted: Fitted, members: tuple[str, ...]) -> np.ndarray:
    """Of the forecasts for sets without a task of ``members``, if there are any: the rest would know of the outcome."""
    tasks = fitted.examples.tasks[fitted.examples.sets.index(members)]
    apart = np.array([not tasks & each for each in fitted.examples.tasks])
    errors: np.ndarray = fitted.validation.measured - fitted.validation.predicted
    return errors[apart] if apart.any() else errors


def _strategy(
    methods: Sequence[str],
    retained: Mapping[str, np.ndarray],
    costs: Mapping[str, np.ndarray],
    least: np.ndarray,
    members: np.ndarray,
) -> dict[str, float]:
    retention = np.array([retained[method][place] for place, method in enumerate(methods)])
    cost = np.array([costs[method][place] for place, method in enumerate(methods)])
    routed = np.array([method == ROUTE for method in methods])
    return {
        "sets": len(methods),
        "retention": float(retention.mean()),
        "worst": float(retention.min()),
        "adapters_resident": float(np.where(routed, members, 1).mean()),
        "cost": float(cost.mean()),
        "regret": float((cost - least).mean()),
    }


def _cost(method: str) -> float:
    return COSTS[action_of(method)]


def _of(fitted: Fitted, values: np.ndarray, sets: Sequence[tuple[str, ...]]) -> np.ndarray:
    return values[[fitted.examples.sets.index(members) for members in sets]]


def parsed() -> tuple[Study, list[str], Path | None, Path | None]:
    """The study, its stages, and where its result and predictors to ship go."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tasks", default=",".join(FAMILIES))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seed", action="append", type=int, help="repeat; default: 0, 1")
    parser.add_argument("--train-rows", type=int, default=400)
    parser.add_argument("--rows", type=int, default=64, help="held-out rows of each task")
    parser.add_argument("--most-tokens", type=int, default=4096, help="of them together")
    parser.add_argument("--sets", type=int, default=40, help="random sets of 3 to 5 a seed")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--models", default="ridge,fingerprint")
    parser.add_argument(
        "--share", type=float, action="append", help="of training, to fit at; repeat; default: all four"
    )
    parser.add_argument("--permutations", type=int, default=PERMUTATIONS, help="of the null")
    parser.add_argument("--layers", type=int, default=-1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this; repeatable")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ship", type=Path, help="a folder for predictors as the package ships them")
    given = parser.parse_args()
    settings = {
        "num_layers": given.layers,
        "rank": given.rank,
        "alpha": 2.0 * given.rank,
        "learning_rate": given.learning_rate,
        "batch_size": given.batch_size,
    }
    tasks, models, seeds = tuple(given.tasks.split(",")), tuple(given.models.split(",")), tuple(given.seed or (0, 1))
    study = Study(
        given.folder, given.base, tasks, given.data, seeds, given.train_rows, given.rows, given.most_tokens,
        given.sets, given.methods, models, tuple(given.share or SHARES), given.permutations, settings,
    )  # fmt: skip
    return study, given.stage or list(STAGES), given.out, given.ship


def main() -> None:
    """Parse, run, print."""
    study, stages, out, shipped = parsed()
    base = load_base(study.base) if {"train", "outcomes"} & set(stages) else None
    result: dict[str, Any] = {"versions": versions(), "tasks": study.tasks, "seeds": study.seeds}
    if "train" in stages and base is not None:
        train_pools(study, base)
    if "measure" in stages:
        measure(study)
    if "outcomes" in stages and base is not None:
        merge_all(study, base)
    if "fit" in stages:
        result |= forecasts(study)
    if shipped is not None:
        ship(study, shipped)
    give_result(result, out, {name: result[name] for name in result if name != "fingerprints"})


if __name__ == "__main__":
    main()
