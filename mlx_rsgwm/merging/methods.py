"""The table of merge methods: every name, what it computes, what it takes, what it needs, where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import mlx.core as mx

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.nearest import advice, nearest
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.linalg.metric import Solved
from mlx_rsgwm.merging import pool_metric
from mlx_rsgwm.merging.families import fisher, peft_compat, task_vectors
from mlx_rsgwm.merging.families import linear as combine
from mlx_rsgwm.merging.families.compress_then_merge import compress_then_merge
from mlx_rsgwm.merging.families.knots import MERGES as KNOTS_MERGES
from mlx_rsgwm.merging.families.knots import knots
from mlx_rsgwm.merging.families.lego import lego
from mlx_rsgwm.merging.families.regmean import PARAMETERS as REGMEAN
from mlx_rsgwm.merging.families.regmean import regmean
from mlx_rsgwm.merging.families.rsgwm import rsgwm, survey_importance
from mlx_rsgwm.merging.layer import Layer
from mlx_rsgwm.merging.options import MergeOptions, Override
from mlx_rsgwm.merging.parameters import Parameter
from mlx_rsgwm.merging.pool import Pool
from mlx_rsgwm.merging.steps.elementwise import elementwise
from mlx_rsgwm.merging.steps.masks import NORMALISATIONS, SCOPES
from mlx_rsgwm.merging.weights import LARGEST_WEIGHT, cancel

# The drafter keeps the top 70 % of a task's parameters, the verifier the top 50 %.
ROLE_TAU: Mapping[str, float] = MappingProxyType({"draft": 0.30, "verify": 0.50})


@dataclass(frozen=True)
class Method:
    """One row: ``merge`` turns a module of the pool into its merged update.

    ``survey`` is a pass over the whole pool before it. ``needs``: importance, directions. ``rank``: of the result
    unless the user says, ``highest`` or ``sum`` of the sources'. ``sums``: weights are coefficients, not shares of a
    mean, so they may sum to zero; ``scales``: they multiply the updates, whatever is made of those. ``by_numpy``: it
    computes with NumPy alone, so that modules can be computed in threads. ``check`` finds
    what is wrong with parameters together, each being in its range. ``remedy``: what to change when the result comes
    out too small or too large.
    """

    merge: Callable[[Layer], Factors | Solved | mx.array]
    summary: str
    source: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    survey: Callable[[Pool, Mapping[str, Any]], Any] | None = None
    needs: tuple[str, ...] = ()
    rank: str = "highest"
    sums: bool = False
    scales: bool = False
    by_numpy: bool = False
    check: Callable[[Mapping[str, Any]], list[str]] | None = None
    remedy: str = "leave out the adapter that opposes the others, give other weights, or use another method"

    def with_defaults(self, **defaults: Any) -> Mapping[str, Parameter]:
        """The same parameters with other defaults, for a preset."""
        return {
            name: Parameter(**{**vars(parameter), "default": defaults.get(name, parameter.default)})
            for name, parameter in self.parameters.items()
        }


MASK_REMEDY = "use the quantile scope 'tensor', the reference 'init', a lower tau or another method"
SUM_REMEDY = "give other weights or another lambda, or use another method"


def spaces(*allowed: str) -> Parameter:
    """The parameter ``space``; the first is the default."""
    return Parameter(allowed[0], "merge the factors A and B, or the products ΔW", choices=allowed)


_RSGWM = Method(
    rsgwm,
    "importance-weighted mean of what each adapter's top parameters changed, for a role",
    "RS-GWM, equations 1 and 2; docs/methods.md",
    {
        "space": spaces("factor", "product"),
        "tau": Parameter(None, "quantile of the mask; 0.30 to draft, 0.50 to verify", 0, 1, True, True),
        "signal": Parameter("per_role", "importance used: per_role, shared (over all batches), or a signal's name"),
        "scope": Parameter("tensor", "what the quantile is taken over", choices=SCOPES),
        "reference": Parameter("init", "what an entry that no mask keeps falls back to", choices=("init", "zero")),
        "normalise": Parameter(
            "norm",
            "importances over their mean and their update's norm, over their mean, as they are, or ranks",
            choices=NORMALISATIONS,
        ),
        "epsilon": Parameter(1e-8, "added to the denominator", 0, 1, True, True),
    },
    survey_importance,
    needs=("importance",),
    remedy=MASK_REMEDY,
)


def _check_elementwise(parameters: Mapping[str, Any]) -> list[str]:
    problems = task_vectors.check(parameters)
    if parameters["space"] == "factor" and parameters.get("normalise") == "none":
        problems.append("normalise none in factor space would weigh A and B, and so the product twice; use product")
    return problems


def _elementwise(row: task_vectors.TaskVectorMethod) -> Method:
    parameters = {name: replace(parameter, default=row.defaults[name]) for name, parameter in row.parameters.items()}
    return Method(
        elementwise(row.merge),
        row.summary,
        row.source,
        {"space": spaces("product", "factor"), **parameters},
        sums=row.defaults.get("normalise") == "none",
        check=_check_elementwise,
        remedy="use another density, or another method" if "density" in parameters else Method.remedy,
    )


def _peft(kind: str) -> Method:
    parameters = {}
    if kind.removesuffix("_svd") not in ("linear", "cat", "svd", ""):
        parameters["density"] = Parameter(0.5, "share of the entries that is kept", 0, 1)
    if "ties" in kind:
        parameters["majority_sign_method"] = Parameter(
            "total", "sign of the sum, or of the majority", choices=peft_compat.MAJORITY_SIGN_METHODS
        )
    return Method(
        peft_compat.TYPES[kind],
        f"what PEFT's add_weighted_adapter computes for {kind}, its mistakes included",
        f"PEFT 0.21.2 combination_type={kind}",
        parameters,
        rank="sum" if kind == "cat" else "highest",
        sums=True,
        remedy="give other weights, or use a method without peft:, which merges the products",
    )


_TABLE: Mapping[str, Method] = MappingProxyType(
    {
        "rsgwm": _RSGWM,
        "paper-literal": Method(
            rsgwm,
            "Algorithm 1 as printed: one signal for all roles, one quantile over all parameters, nothing normalised",
            "RS-GWM, Algorithm 1; docs/methods.md on what it leaves open",
            _RSGWM.with_defaults(signal="shared", scope="global", reference="zero", normalise="none"),
            survey_importance,
            needs=("importance",),
            remedy=MASK_REMEDY,
        ),
        "linear": Method(
            combine.linear,
            "weighted mean",
            "the exact mean of the products; mergekit linear; in factor space the mean of A and of B",
            {"space": spaces("product", "factor")},
        ),
        "task_arithmetic": Method(
            combine.combination(combine.scaled_weights),
            "weighted sum",
            "Ilharco et al., 2023; mergekit task_arithmetic",
            {"lambda": task_vectors.LAMBDA},
            sums=True,
            remedy=SUM_REMEDY,
        ),
        "norm_equalised": Method(
            combine.combination(combine.norm_equalised),
            "weighted mean of adapters brought to equal norm",
            "gradience, merge/recommend.py and plan.py",
            {
                "definition": Parameter(
                    "global", "equal norms over the adapter, or in every module", choices=("global", "geometric")
                )
            },
            combine.survey_norms,
        ),
        "cat": Method(
            combine.combination(combine.scaled_weights),
            "weighted sum without truncation: the ranks add up",
            "PEFT cat, with exact scales",
            {"lambda": task_vectors.LAMBDA},
            rank="sum",
            sums=True,
            remedy=SUM_REMEDY,
        ),
        "slerp": Method(
            combine.combination(combine.slerp),
            "spherical interpolation of two",
            "Shoemake, 1985; mergekit slerp",
            survey=combine.two_adapters,
        ),
        "multislerp": Method(
            combine.combination(combine.multislerp),
            "spherical mean in one tangent step",
            "mergekit karcher with one step; mergekit's multislerp means this step, and takes none",
        ),
        "karcher": Method(
            combine.combination(combine.karcher),
            "Riemannian mean of the directions at the mean length",
            "mergekit karcher",
            {"iterations": Parameter(10, "at most so many steps", 1, 1000, integer=True)},
        ),
        "model_stock": Method(
            combine.combination(combine.model_stock),
            "mean shrunk by the angle between the updates",
            "Jang et al., 2024; mergekit model_stock",
            remedy="the adapters have too little in common for this method; use linear, ties or another",
        ),
        **{name: _elementwise(row) for name, row in task_vectors.FAMILY.items()},
        "fisher": Method(
            fisher.fisher,
            "mean weighted entry by entry by the squared importance",
            "Matena and Raffel, 2022; fusion_bench fisher_merging",
            {
                "space": spaces("product", "factor"),
                "signal": Parameter("per_role", "importance used: per_role, shared, or a signal's name"),
                "normalise": Parameter(
                    "l2", "weights of an adapter over their norm, or as they are", choices=("l2", "none")
                ),
                "minimum": Parameter(1e-6, "added to every weight", 0),
                "floor": Parameter(
                    "relative",
                    "unit of minimum: the adapter's root mean square, or 1",
                    choices=("relative", "absolute"),
                ),
            },
            fisher.survey_fisher,
            needs=("importance",),
        ),
        "regmean": Method(
            regmean,
            "the update whose outputs are nearest to every adapter's on its own inputs",
            "Jin et al., 2023; fusion_bench regmean",
            REGMEAN,
            needs=("directions",),
            by_numpy=True,
            remedy="set a larger ridge (--set ridge=0.01), or collect directions on more rows",
        ),
        "knots": Method(
            knots,
            "bring the updates to one basis by a joint SVD, merge there",
            "Stoica et al., 2025 (arXiv 2410.19735); fusion_bench",
            {
                "merge": Parameter("ties", "how the aligned updates are merged", choices=tuple(KNOTS_MERGES)),
                "density": Parameter(1.0, "share of an aligned update's entries that is kept", 0, 1, open_low=True),
                "part": Parameter("v", "what is merged: V_t, or diag(S) V_t", choices=("v", "sv")),
                "threshold": Parameter(1e-4, "singular values up to this are dropped", 0),
                "lambda": task_vectors.LAMBDA,
            },
        ),
        "compress_then_merge": Method(
            compress_then_merge,
            "bring the updates to two shared bases of the result's rank, merge their coordinates there",
            "He et al., 2026 (arXiv 2606.03723), its authors' code",
            {
                "merge": Parameter("linear", "how the coordinates are merged", choices=tuple(KNOTS_MERGES)),
                "density": Parameter(0.25, "share of the coordinates that is kept", 0, 1, open_low=True),
                "beta": Parameter(0.25, "norms in the bases: 0 all alike, 1 as they are", 0, 1),
                "components": Parameter(0, "number of directions; 0 for the highest rank of the pool", 0, integer=True),
                "lambda": task_vectors.LAMBDA,
            },
        ),
        "lego": Method(
            lego,
            "cluster the rank-one units of all adapters; a cluster is a unit of the result",
            "Zhao et al., 2025 (arXiv 2409.16167); scaling: the docstring",
            {
                "clusters": Parameter(0, "number of units; 0 for the highest rank of the pool", 0, integer=True),
                "output": Parameter(
                    "mean",
                    "norm of the result: of a sum, of one adapter, or of the units",
                    choices=("sum", "mean", "none"),
                ),
                "signs": Parameter("aligned", "whether a unit may be turned round", choices=("aligned", "kept")),
                "restarts": Parameter(8, "of the clustering", 1, 1000, integer=True),
                "iterations": Parameter(30, "of the clustering", 1, 1000, integer=True),
            },
            scales=True,
        ),
        **{f"peft:{kind}": _peft(kind) for kind in peft_compat.TYPES},
    }
)
# Any result that is cut to a rank can be cut by what that does to its outputs, where the inputs' directions are known.
_PLAIN = replace(pool_metric.PARAMETERS["truncate"], default="plain")
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        name: method
        if name.startswith("peft:")
        else replace(method, parameters={**method.parameters, "truncate": method.parameters.get("truncate", _PLAIN)})
        for name, method in _TABLE.items()
    }
)


def needs_directions(method: Method, parameters: Mapping[str, Any]) -> bool:
    """Whether a merge with these parameters looks at the adapters' inputs."""
    return "directions" in method.needs or parameters.get("truncate") == "metric"


def find_method(name: str) -> Method:
    """The row called ``name``; RsgwmError with the nearest names when there is none."""
    if name in METHODS:
        return METHODS[name]
    raise RsgwmError(f"unknown method {name!r}; {advice(name, METHODS)}")


def resolved(options: MergeOptions, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The parameters of ``options``' method, checked, with the defaults filled in; ``values`` override for a module.

    Raises:
        RsgwmError: unknown names and values out of range, all in one error.
    """
    method = find_method(options.method)
    given = {**options.parameters, **(values or {})}
    problems = []
    for name, value in given.items():
        if name not in method.parameters:
            near = nearest(name, method.parameters)
            known = f"did you mean {near!r}?" if near else f"it takes {', '.join(method.parameters) or 'none'}"
            problems.append(f"{options.method} has no parameter {name!r}; {known}")
        elif value is not None and (problem := method.parameters[name].problem(name, value)):
            problems.append(problem)
    settled = {
        name: parameter.default if given.get(name) is None else given[name]
        for name, parameter in method.parameters.items()
    }
    if "tau" in settled and settled["tau"] is None:
        settled["tau"] = ROLE_TAU.get(options.role)
        if settled["tau"] is None:
            problems.append(f"role {options.role!r} has no tau of its own; give one, in (0, 1)")
    if "signal" in settled and not problems:
        settled["signal"] = {"per_role": options.role, "shared": "all"}.get(settled["signal"], settled["signal"])
    if not problems and method.check:
        problems += method.check(settled)
    raise_problems("merge options", problems)
    return settled


def method_for(options: MergeOptions, override: Override | None) -> tuple[str, dict[str, Any]]:
    """Name and parameters of the method for the modules of an ``override``, or of the merge itself for None.

    Raises:
        RsgwmError: unknown names, values out of range, a method that needs more than the modules themselves.
    """
    if override is None:
        return options.method, resolved(options)
    if not override.method:
        return options.method, resolved(options, override.parameters)
    method = find_method(override.method)
    parameters = resolved(replace(options, method=override.method, parameters=override.parameters))
    if method.needs or method.survey or needs_directions(method, parameters):
        raise RsgwmError(
            f"merge options: {override.method} looks at more than single modules, so it cannot be the method of some; "
            f"found in {override.pattern!r}"
        )
    return override.method, parameters


def sums(method: Method, parameters: Mapping[str, Any]) -> bool:
    """Whether the method with these parameters sums by weight, so that the weights are not shares of a mean."""
    if "lambda" in parameters and "normalise" in parameters:
        return bool(parameters["normalise"] == "none")
    return method.sums


def weight_problems(options: MergeOptions, count: int) -> list[str]:
    """What is wrong with the weights of ``options`` for ``count`` adapters, those of single modules included."""
    resolved(options)  # refuses what no weights can mend
    given = [(options.weights, None), *((override.weights, override) for override in options.overrides)]
    problems = [
        f"{len(override.ranks)} ranks for {count} adapters in {override.pattern!r}; give one for each"
        for override in options.overrides
        if override.ranks and len(override.ranks) != count
    ]
    for weights, override in given:
        if weights:
            problems += _problems_of(weights, *method_for(options, override), count)
    return problems


def _problems_of(weights: Sequence[float], name: str, parameters: Mapping[str, Any], count: int) -> list[str]:
    method = find_method(name)
    as_sum = sums(method, parameters)
    if len(weights) != count:
        return [f"{len(weights)} weights for {count} adapters; give one for each"]
    if not any(weights):
        return ["every weight is zero, so nothing would be merged"]
    # By importance or by squared errors, and those are not below 0.
    if (method.needs or needs_directions(method, parameters)) and min(weights) < 0:
        return [f"{name} averages: weights must not be negative, found {min(weights)}"]
    if cancel(weights) and not as_sum:
        return [f"weights must not sum to zero, {name} is a mean"]
    if (as_sum or method.scales) and max(map(abs, weights)) > LARGEST_WEIGHT:
        return [f"weights must not be above {LARGEST_WEIGHT:g} for {name}"]
    return []
