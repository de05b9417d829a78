"""Pools that float32 is bad at, through every method: the float64 result, within its bound, or one clear refusal.

Opposed and nearly opposed adapters, equal ones, modules that are zero or missing, huge and tiny updates, denormals,
rank 1, weights that cancel, are negative, huge or tiny.
"""

import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.gram import WholeGram
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.methods import METHODS, sums
from mlx_rsgwm.merging.options import LARGEST, MergeOptions
from mlx_rsgwm.merging.pool import Pool
from mlx_rsgwm.models.adapter import Adapter, LoraSpec

SHAPES = {"model.layers.0.self_attn.q_proj": (12, 10), "model.layers.1.self_attn.q_proj": (12, 10)}
FIRST = next(iter(SHAPES))
SCALE, RANK, FULL = 2.0, 3, 10


def factors(seed, rank=RANK):
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal((rows, rank)) / rows**0.5, rng.standard_normal((rank, columns)) / rank**0.5)
        for name, (rows, columns) in SHAPES.items()
    }


def times(update, number, modules=tuple(SHAPES)):
    return {name: (a, b * number if name in modules else b) for name, (a, b) in update.items()}


def without(update, name):
    return {other: pair for other, pair in update.items() if other != name}


def beside(update, cosine, seed=50):
    """An update of the same norm and the given cosine to ``update``, of a rank higher by RANK."""
    mixed = {}
    for name, (a, b) in update.items():
        own, other = a @ b, np.matmul(*factors(seed)[name])
        unit = own / np.linalg.norm(own)
        other = other - (other * unit).sum() * unit
        wanted = cosine * own + (1 - cosine**2) ** 0.5 * np.linalg.norm(own) * other / np.linalg.norm(other)
        u, sigma, vt = np.linalg.svd(wanted, full_matrices=False)
        mixed[name] = (u[:, : 2 * RANK] * sigma[: 2 * RANK], vt[: 2 * RANK])
    return mixed


A, B, C = factors(1), factors(2), factors(3)
POOLS = {
    "plain": (A, B, C),
    "equal": (A, A, A),
    "opposed": (A, times(A, -1)),
    "opposed and one": (A, times(A, -1), C),
    "two equal against one": (A, A, times(A, -1)),
    "nearly opposed": (A, beside(A, -0.9999)),
    "apart": (A, beside(A, -0.95)),
    "nearly equal": (A, beside(A, 0.9999)),
    "zero module": (A, times(B, 0.0, (FIRST,)), C),
    "module zero in all": tuple(times(one, 0.0, (FIRST,)) for one in (A, B)),
    "missing module": (A, without(B, FIRST)),
    "huge": (times(A, 1e6), B),
    "beyond float32": (times(A, 1e25), B),
    "tiny": (times(A, 1e-12), B),
    "below float32": (times(A, 1e-30), B),
    "all below float32": (times(A, 1e-30), times(B, 1e-30)),
    "tiny module": (times(A, 1e-30, (FIRST,)), B),
    "denormal module": (times(A, 1e-41, (FIRST,)), B),
    "rank 1": (factors(4, 1), factors(5, 1)),
    "other ranks": (factors(4, 1), B),
}
WEIGHTS = {
    "cancelling": (0.1, 0.2, -0.3),
    "negative": (1.0, -0.5, 0.25),
    "nearly cancelling": (1.0, 1.0, -1.999),
    "huge": (1e25, 2e25, 3e25),
    "beyond float32": (1e39, 2e39, 3e39),
    "tiny": (1e-20, 2e-20, 3e-20),
    "one zero": (1.0, 2.0, 0.0),
    "far apart": (1e-8, 1.0, 1.0),
    "zero": (0.0, 0.0, 0.0),
}
# Parameters by which a method has a plain reference: nothing drawn at random, no clustering.
SETTINGS = {
    "knots": {"merge": "linear"},
    "rsgwm": {"space": "product"},
    **{
        name: {"density": 1.0} for name in ("dare_linear", "dare_ties", "della", "della_linear", "peft:dare_linear_svd")
    },
}


def adapter(update):
    """With importance 1, so that what is weighed by importance has a plain reference, and one recorded lora_a."""
    rank = max(a.shape[1] for a, _ in update.values())
    weights = {}
    for name, (a, b) in update.items():
        weights[f"{name}.lora_a"] = mx.array(a.astype(np.float32))
        weights[f"{name}.lora_b"] = mx.array((b / SCALE).astype(np.float32))
    importance = {f"draft/{name}": mx.ones(value.shape) for name, value in weights.items()}
    spec = LoraSpec(rank, SCALE, 0.0, ("self_attn.q_proj",), 2)
    return Adapter(spec, weights, importance, manifest={"base": {"fingerprint": "f"}})


def dense(update):
    """ΔW in float64 of what float32 kept of the factors; zero where a module is missing."""
    found = {}
    for name, shape in SHAPES.items():
        a, b = update.get(name, (np.zeros((shape[0], 1)), np.zeros((1, shape[1]))))
        a, b = a.astype(np.float32).astype(np.float64), (b / SCALE).astype(np.float32).astype(np.float64)
        found[name] = SCALE * a @ b
    return found


# --- float64 references: updates (T, in, out), weights (T,) to the merged update ------------------------------------


def mean(updates, weights):
    return np.tensordot(weights / weights.sum(), updates, 1)


def total(updates, weights):
    return np.tensordot(weights, updates, 1)


def elected(updates, weights, normalise=True):
    shares = updates * weights[:, None, None]
    net, size = shares.sum(axis=0), np.abs(shares).sum(axis=0)
    sign = np.where(np.abs(net) > 1e-6 * size, np.sign(net), 0)
    agree = (np.sign(shares) == sign) & (sign != 0)
    chosen = (shares * agree).sum(axis=0)
    strength = (np.abs(weights)[:, None, None] * agree).sum(axis=0)
    return chosen / np.where(strength > 0, strength, 1) if normalise else chosen


def trimmed(updates, density):
    kept = []
    for update in updates:
        magnitudes = np.sort(np.abs(update).ravel())[::-1]
        kept.append(update * (np.abs(update) >= magnitudes[max(1, int(density * update.size)) - 1]))
    return np.stack(kept)


def lengths(updates):
    """Norms, with 1 for an update that is missing, or as good as missing: its square is at float32's end."""
    return [norm if (norm := np.linalg.norm(update)) > 1e-17 else 1.0 for update in updates]


def slerp(updates, weights):
    x, y = updates
    t = weights[1] / weights.sum()
    norms = lengths(updates)
    cosine = np.clip((x * y).sum() / norms[0] / norms[1], -1, 1)
    if abs(cosine) > 0.9995:
        return (1 - t) * x + t * y
    theta = np.arccos(cosine)
    return (np.sin((1 - t) * theta) * x + np.sin(t * theta) * y) / np.sin(theta)


def sphere(steps):
    def merged(updates, weights):
        weights = weights / weights.sum()
        norms = np.array([np.linalg.norm(u) for u in updates])
        units = [u / n for u, n in zip(updates, lengths(updates), strict=True)]
        point = sum(w * u for w, u in zip(weights, units, strict=True))
        if not np.linalg.norm(point):
            return point
        point = point / np.linalg.norm(point)
        for _ in range(steps):
            tangent = 0.0
            for w, u in zip(weights, units, strict=True):
                inner = np.clip((u * point).sum(), -1, 1)
                theta = np.arccos(inner)
                tangent = tangent + w * (theta / np.sin(theta) if theta > 1e-9 else 1.0) * (u - inner * point)
            length = np.linalg.norm(tangent)
            if length < 1e-9:
                break
            point = np.cos(length) * point + np.sin(length) * tangent / length
        return point * (weights * norms).sum()

    return merged


def model_stock(updates, weights):
    count = len(updates)
    norms = lengths(updates)
    pairs = [
        (updates[i] * updates[j]).sum() / norms[i] / norms[j] for i in range(count) for j in range(count) if i != j
    ]
    cosine = np.mean(pairs)
    return count * cosine / (1 + (count - 1) * cosine) * updates.mean(axis=0)


REFERENCES = {
    "linear": mean,
    "task_arithmetic": total,
    "cat": total,
    "slerp": slerp,
    "multislerp": sphere(1),
    "karcher": sphere(10),
    "model_stock": model_stock,
    "ties": lambda updates, weights: elected(trimmed(updates, 0.2), weights),
    "fusion_bench:ties": lambda updates, weights: 0.3 * elected(trimmed(updates, 0.2), weights, normalise=False),
    "dare_linear": mean,
    "dare_ties": elected,
    "della": elected,
    "della_linear": mean,
    "magnitude_prune": lambda updates, weights: mean(trimmed(updates, 0.5), weights),
    "knots": mean,
    "peft:cat": total,
    "peft:svd": total,
    "peft:dare_linear_svd": total,
}
TESTED = [name for name in METHODS if name != "paper-literal"]  # a preset of rsgwm for factor space


def second_moment(x):
    return WholeGram(x.T @ x / len(x))


def run(method, updates, weights, monkeypatch, rank=FULL, **options):
    """The merged products in float64, by module, and the merge's manifest."""
    parameters = SETTINGS.get(method, {})
    adapters = [adapter(update) for update in updates]
    if "directions" in METHODS[method].needs:

        def grams(pool, role):
            rng = np.random.default_rng(9)
            for module in pool.modules:
                width = pool.shape(module)[0]
                inputs = [rng.standard_normal((4 * width, width)) for _ in pool.sources]
                yield tuple(second_moment(x) for x in inputs)

        monkeypatch.setattr(Pool, "grams", grams)
    found = merge(adapters, MergeOptions(method, parameters=parameters, weights=weights, rank=rank, **options))
    products = {
        name: found.spec.scale * np.array(a).astype(np.float64) @ np.array(b).astype(np.float64)
        for name, a, b in found.factors()
    }
    return products, found.manifest["merge"]


def check(method, updates, weights, monkeypatch, rank=FULL):
    """Right to float32, finite and within the bound, or refused in one line that says what to do."""
    try:
        found, described = run(method, updates, weights, monkeypatch, rank)
    except RsgwmError as error:
        text = str(error)
        assert re.search("weight|changes nothing|too large|cannot merge|collapses|ranks|exactly two|threshold", text)
        assert "has values that are not finite" not in text
        return text
    sources = [dense(update) for update in updates]
    used = np.array(weights or (1.0,) * len(updates))
    as_sum = sums(METHODS[method], described["parameters"]) or METHODS[method].scales
    for name, value in found.items():
        assert np.isfinite(value).all()
        norms = np.array([np.linalg.norm(source[name]) for source in sources])
        factor = described["parameters"].get("lambda", 1.0)
        allowed = factor * ((np.abs(used) * norms).sum() if as_sum else norms[used != 0].max())
        assert np.linalg.norm(value) <= LARGEST * allowed * (1 + 1e-3) + 1e-18
        if method in REFERENCES:
            expected = REFERENCES[method](np.stack([source[name] for source in sources]), used)
            # What cancels is right to the rounding of what was summed.
            share = np.abs(used) / (1 if as_sum else abs(used.sum()))
            size = max(np.linalg.norm(expected), factor * (share * norms).sum())
            assert np.linalg.norm(value - expected) <= 3e-4 * size + 1e-18, (name, np.linalg.norm(value), size)
    return None


@pytest.mark.parametrize("method", TESTED)
@pytest.mark.parametrize("name", POOLS)
def test_nasty_updates(monkeypatch, method, name):
    check(method, POOLS[name], (), monkeypatch)


@pytest.mark.parametrize("method", [name for name in TESTED if name != "slerp"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_nasty_weights(monkeypatch, method, name):
    check(method, POOLS["plain"], WEIGHTS[name], monkeypatch)


def opposing(cosine):
    return A, beside(A, cosine)


@pytest.mark.parametrize("weights", [(0.1, 0.2, -0.3), (1.0, 1.0, -2.0), (1e6, -1e6 + 1e-3, 0.0)])
@pytest.mark.parametrize("method", ["linear", "karcher", "multislerp", "dare_linear", "breadcrumbs", "magnitude_prune"])
def test_weights_that_cancel_in_floats_are_told_as_those_that_cancel(monkeypatch, method, weights):
    with pytest.raises(RsgwmError, match=f"weights must not sum to zero, {method} is a mean"):
        run(method, (A, B, C), weights, monkeypatch)


@pytest.mark.parametrize("updates", [(A, A, A), (A, times(A, 2.0), A)])
@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "sce", "breadcrumbs_ties"])
def test_a_sum_that_is_only_rounding_elects_nobody(method, updates):
    """.1 u + .2 u - .3 u leaves 1e-8 u, whose sign would elect a side."""
    from mlx_rsgwm.merging.steps.sign_election import elected_sum

    stacked = np.stack([dense(update)[FIRST] for update in updates]).astype(np.float32)
    weights = (0.1, 0.2, -0.3) if updates[1] is A else (0.1, 0.1, -0.3)
    ballots = weights if method == "sce" else None
    found = elected_sum([mx.array(one) for one in stacked], weights, ballots=ballots)
    assert not mx.any(found).item()


@pytest.mark.parametrize("cosine", [-0.5, -0.95, -0.999, -1.0])
@pytest.mark.parametrize("method", ["model_stock", "slerp", "karcher", "multislerp", "linear"])
def test_opposed_adapters(monkeypatch, method, cosine):
    """Where the formula has no answer the adapters are named as what they are; where it has one, it is that."""
    updates = opposing(cosine) if cosine > -1 else (A, times(A, -1))
    told = check(method, updates, (), monkeypatch)
    if method == "model_stock":
        assert "model_stock cannot merge these adapters" in told
        assert "oppose one another" in told
    elif cosine == -1.0:
        assert re.search("opposite|cancel|collapses", told)
        assert "quantile" not in told


def test_the_bound_names_the_module_the_limit_and_the_way_round_it(monkeypatch):
    weights = (1.0, 1.0, -1.999)
    with pytest.raises(RsgwmError, match=r"blows up in 2 of 2 modules \(model.*: 2.*e\+03 times .* limit is 40\)"):
        run("linear", (A, B, C), weights, monkeypatch)
    found, described = run("linear", (A, B, C), weights, monkeypatch, largest=1e5)
    sources = np.stack([dense(update)[FIRST] for update in (A, B, C)])
    expected = mean(sources, np.array(weights))
    assert np.linalg.norm(found[FIRST] - expected) < 1e-4 * np.linalg.norm(expected)
    assert described["largest"] == 1e5
    assert any("times as large" in warning for warning in described["warnings"])


def test_a_large_result_below_the_bound_is_told(monkeypatch):
    """RegMean on few, unlike rows: the directions without input are free."""

    def grams(pool, role):
        rng = np.random.default_rng(0)
        for module in pool.modules:
            width = pool.shape(module)[0]
            inputs = [rng.standard_normal((3 * width, width)) * 10.0 ** -rng.uniform(0, 2, width) for _ in pool.sources]
            yield tuple(second_moment(x) for x in inputs)

    monkeypatch.setattr(Pool, "grams", grams)
    merged = merge([adapter(A), adapter(B)], MergeOptions("regmean", rank=FULL, parameters={"off_diagonal": 1.0}))
    overall = merged.manifest["merge"]["diagnosis"]["overall"]
    sources = [dense(one) for one in (A, B)]
    allowed = sum(max(np.linalg.norm(one[name]) for one in sources) ** 2 for name in SHAPES) ** 0.5
    assert overall["growth"] == pytest.approx(overall["norm"] / allowed, rel=1e-5)
    told = [warning for warning in merged.manifest["merge"]["warnings"] if "times as large" in warning]
    assert bool(told) == (overall["growth"] > 2)


def test_finite_adapters_are_not_called_otherwise(monkeypatch):
    with pytest.raises(RsgwmError, match=r"too large for float32: its update's norm is above 1.8e\+19"):
        run("linear", POOLS["beyond float32"], (), monkeypatch)


@pytest.mark.parametrize("method", ["rsgwm", "fisher", "regmean"])
def test_what_weighs_by_importance_refuses_negative_weights(monkeypatch, method):
    with pytest.raises(RsgwmError, match=r"weights must not be negative, found -0\.5"):
        run(method, (A, B, C), (1.0, -0.5, 0.25), monkeypatch)


@pytest.mark.parametrize(("method", "advice"), [("linear", "opposes the others"), ("task_arithmetic", "lambda")])
def test_the_remedy_is_the_methods_own(monkeypatch, method, advice):
    with pytest.raises(RsgwmError, match=f"collapses .*{advice}") as caught:
        run(method, (A, times(A, -1)), (), monkeypatch)
    assert "quantile" not in str(caught.value)
