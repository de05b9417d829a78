"""``peft:*`` against PEFT itself: real PEFT models of a tiny Llama, every combination type, and where PEFT is wrong."""

from __future__ import annotations

import copy
import math
import os
import warnings
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.converters.peft.convert import from_peft, to_peft
from mlx_rsgwm.linalg.lowrank import Factors, truncate, truncate_dense
from mlx_rsgwm.merging.families.linear import combination, weighted_mean
from mlx_rsgwm.merging.families.peft_compat import MAJORITY_SIGN_METHODS, RULES, TYPES, keep_masks
from mlx_rsgwm.merging.layer import Layer
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.adapter import Adapter, is_complete

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

KEY = mx.random.key(5)
PAIR, TRIPLE, FOUR = ((4, 8.0, False), (4, 4.0, False)), ((4, 8.0, False),) * 3, ((8, 16.0, False),) * 4
RANK_STABILISED = ((4, 8.0, True), (4, 2.0, False))
RANK_ONE = ((1, 2.0, False), (1, 5.0, True))
MIXED = ((2, 8.0, False), (6, 6.0, True), (4, 4.0, False))
POOLS = {  # (rank, alpha, rank-stabilised) of each adapter, and weights
    "two": (PAIR, (0.5, 0.5)),
    "two, unequal": (PAIR, (0.8, 0.3)),
    "three, one negative": (TRIPLE, (1.0, -0.6, 0.3)),
    "four": (FOUR, (0.25, 0.4, 0.1, 0.25)),
    "rank-stabilised first": (RANK_STABILISED, (0.7, 0.5)),
    "rank one": (RANK_ONE, (0.5, -0.5)),
    "mixed ranks": (MIXED, (0.5, 0.9, -0.4)),
}


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def torch_base(make_torch_llama, tmp_path_factory):
    folder = make_torch_llama(tmp_path_factory.mktemp("base"), 0, 2, 96)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)

    def fresh():
        return copy.deepcopy(model)

    return fresh


@pytest.fixture(scope="module")
def make_pool(torch_base):
    """Maker of a PEFT model with one random adapter a0, a1, … for each (rank, alpha, rank-stabilised)."""

    def make(specs, targets=None, seed=0):
        torch.manual_seed(seed)
        model = None
        for index, (rank, alpha, stabilised) in enumerate(specs):
            modules = targets[index] if targets else ["q_proj", "k_proj", "o_proj", "down_proj"]
            config = peft.LoraConfig(
                r=rank, lora_alpha=alpha, use_rslora=stabilised, target_modules=modules, init_lora_weights=False
            )
            if model is None:
                model = peft.get_peft_model(torch_base(), config, adapter_name="a0")
            else:
                model.add_adapter(f"a{index}", config)
        return model

    return make


def lora_layers(model):
    return {
        name: layer
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, peft.tuners.lora.Linear)
    }


def ours_of(tensor):
    return mx.array(tensor.detach().float().numpy().T)


def module_of(name, layer, weights, parameters):
    """What our driver would show of a PEFT layer."""
    factors, scales = [], []
    for index in range(len(weights)):
        adapter = f"a{index}"
        if adapter in layer.lora_A:
            scale = layer.scaling[adapter]
            factors.append(
                Factors(ours_of(layer.lora_A[adapter].weight), ours_of(layer.lora_B[adapter].weight) * scale)
            )
        else:
            scale = 1.0
            factors.append(Factors(mx.zeros((layer.in_features, 1)), mx.zeros((1, layer.out_features))))
        scales.append(scale)
    return Layer(name, tuple(factors), tuple(scales), tuple(weights), KEY, parameters=parameters)


def parameters_of(kind, density, method):
    taken = {} if kind in ("linear", "cat", "svd") else {"density": density}
    return {**taken, "majority_sign_method": method} if "ties" in kind else taken


def masks_of(kind, modules):
    """The masks our random types draw, in the order and the layout in which PEFT asks torch.bernoulli for its own."""
    drawn = []
    for module in modules:
        if kind.endswith("_svd"):  # small enough for one band of rows
            shape = module.factors[0].a.shape[0], module.factors[0].b.shape[1]
            present = [bool(mx.any(one.b).item()) for one in module.factors]
            draws = [(shape, mx.random.split(module.key, 1)[0])]
        else:
            chosen = [one for one in module.factors if mx.any(one.b).item()]
            present = [True] * len(chosen)
            draws = list(zip((chosen[0].a.shape, chosen[0].b.shape), mx.random.split(module.key), strict=True))
        for shape, key in draws:
            masks = np.array(keep_masks(len(present), math.prod(shape), module.parameters["density"], key))
            for mask, there in zip(masks.reshape(-1, *shape), present, strict=True):
                drawn += [torch.tensor(mask.T.astype(np.float32))] if there else []
    return drawn


def merge_with_peft(monkeypatch, model, name, kind, modules, weights, density=None, method="total", **options):
    masks = masks_of(kind, modules) if kind.startswith("dare") and density < 1 else []

    def bernoulli(probabilities):
        mask = masks.pop(0)
        assert mask.shape == probabilities.shape
        assert bool((probabilities == density).all())
        return mask

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    names = [f"a{index}" for index in range(len(weights))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density 1.0 is")
        model.base_model.add_weighted_adapter(
            names, list(weights), name, kind, density=density, majority_sign_method=method, **options
        )
    assert not masks, f"PEFT left {len(masks)} masks unused"


def relative_error(found, expected):
    found, expected = (np.array(one).astype(np.float64) for one in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def product(layer, adapter="merged"):
    """PEFT's B A as (in, out), without its scaling, in float64."""
    a, b = (getattr(layer, leaf)[adapter].weight.detach().double() for leaf in ("lora_A", "lora_B"))
    return (b @ a).numpy().T


def tolerance_of(dense, rank):
    """1e-5, or what float32 leaves of a truncation whose first dropped singular value is close to the last kept one.

    By Wedin's theorem a rounding error of e σ₁ turns the kept subspace by e σ₁ / (σ_r − σ_r₊₁); 1e-6 is a few ulps for
    each side.
    """
    sigma = np.linalg.svd(np.array(dense).astype(np.float64), compute_uv=False)
    return max(1e-5, 1e-6 * sigma[0] / (sigma[rank - 1] - sigma[rank])) if rank < len(sigma) else 1e-5


def check_against_peft(monkeypatch, model, kind, weights, density=0.5, method="total"):
    layers = lora_layers(model)
    ranks = [model.peft_config[f"a{index}"].r for index in range(len(weights))]
    modules = [module_of(n, layer, weights, parameters_of(kind, density, method)) for n, layer in layers.items()]
    arguments = (kind, modules, weights, density, method)
    merge_with_peft(monkeypatch, model, "merged", *arguments)
    if kind.endswith("svd"):  # once more without truncation
        highest = max(min(layer.in_features, layer.out_features) for layer in layers.values())
        merge_with_peft(monkeypatch, model, "whole", *arguments, svd_rank=highest, svd_full_matrices=False)
    rank = sum(ranks) if kind == "cat" else max(ranks)
    assert model.peft_config["merged"].r == rank
    for module, layer in zip(modules, layers.values(), strict=True):
        found = TYPES[kind](module)
        if kind.endswith("svd"):
            dense = np.array(found.dense() if isinstance(found, Factors) else found).astype(np.float64)
            whole = product(layer, "whole")
            # Of very many products one may lie so near a threshold that rounding decides: 1 in 100 000 may differ.
            other = np.abs(dense - whole) > 1e-5 * np.abs(whole).max()
            assert other.sum() <= whole.size // 100_000, module.name
            assert relative_error(np.where(other, whole, dense), whole) < 1e-5, module.name
            cut = truncate(found, rank) if isinstance(found, Factors) else truncate_dense(found, rank, KEY, exact=True)
            if not other.any():
                assert relative_error(cut.factors.dense(), product(layer)) < tolerance_of(dense, rank), module.name
        else:
            a, b = (getattr(layer, leaf)["merged"].weight.detach().numpy().T for leaf in ("lora_A", "lora_B"))
            mine, theirs = ([one for one in side.T if one.any()] for side in (np.array(found.a), a))
            assert relative_error(mine, theirs) < 1e-5, module.name
            mine, theirs = ([one for one in side if one.any()] for side in (np.array(found.b), b))
            assert relative_error(mine, theirs) < 1e-5, module.name
            assert relative_error(found.dense(), product(layer)) < 1e-5, module.name


def cases(density_free):
    for pool, (specs, _) in POOLS.items():
        for kind in TYPES:
            if (kind in ("linear", "cat", "svd")) == density_free and not (
                kind in RULES and len({s[0] for s in specs}) > 1
            ):
                yield pytest.param(kind, pool, id=f"{kind}, {pool}")


@pytest.mark.parametrize(("kind", "pool"), list(cases(True)))
def test_types_without_pruning(monkeypatch, make_pool, kind, pool):
    specs, weights = POOLS[pool]
    check_against_peft(monkeypatch, make_pool(specs), kind, weights)


@pytest.mark.parametrize(("kind", "pool"), list(cases(False)))
def test_types_that_prune(monkeypatch, make_pool, kind, pool):
    specs, weights = POOLS[pool]
    check_against_peft(monkeypatch, make_pool(specs, seed=1), kind, weights, 0.4)


@pytest.mark.parametrize("density", [0.1, 0.75, 1.0])
@pytest.mark.parametrize("method", MAJORITY_SIGN_METHODS)
@pytest.mark.parametrize("kind", [name for name in TYPES if "ties" in name])
def test_elections(monkeypatch, make_pool, kind, method, density):
    check_against_peft(monkeypatch, make_pool(FOUR, seed=2), kind, (0.4, 0.2, -0.3, 0.4), density, method)


@pytest.mark.parametrize("kind", TYPES)
def test_adapters_that_differ_in_modules(monkeypatch, make_pool, kind):
    model = make_pool(PAIR, [["q_proj", "v_proj"], ["v_proj", "down_proj"]], seed=3)
    check_against_peft(monkeypatch, model, kind, (0.6, -0.9), 0.6)


@pytest.mark.parametrize("kind", TYPES)
def test_folders_made_by_peft_merge_as_peft_merges_them(monkeypatch, make_pool, tmp_path, kind):
    """All the way: PEFT's folders, converted, merged by name. Random types keep all: their masks would differ."""
    specs = PAIR if kind in RULES else MIXED
    model, weights = make_pool(specs, seed=7), (0.7, -0.4, 0.5)[: len(specs)]
    model.save_pretrained(tmp_path)
    folders = [from_peft(tmp_path / f"a{index}").save(tmp_path / f"ours-{index}") for index in range(len(specs))]
    density = 1.0 if kind.startswith("dare") else 0.6
    parameters = parameters_of(kind, density, "frequency")
    merged = merge(folders, MergeOptions(method=f"peft:{kind}", parameters=parameters, weights=weights))
    merge_with_peft(monkeypatch, model, "merged", kind, [], weights, density, "frequency")
    assert merged.spec.rank == model.peft_config["merged"].r
    layers = lora_layers(model)
    assert set(merged.modules()) == set(layers)
    for name, a, b in merged.factors():
        found, expected = np.array(a @ b * merged.spec.scale), product(layers[name])
        whole = TYPES[kind](module_of(name, layers[name], weights, parameters))
        dense = whole.dense() if isinstance(whole, Factors) else whole
        limit = tolerance_of(dense, merged.spec.rank) if kind.endswith("svd") else 1e-5
        assert relative_error(found, expected) < limit, name


# --- where PEFT is wrong ------------------------------------------------------------------------------------------


def applied(layer, adapter):
    """What PEFT adds to the base weight, (in, out), in float64."""
    return layer.get_delta_weight(adapter).detach().double().numpy().T


def whole_error(pairs):
    """‖found − expected‖ / ‖expected‖ over all modules together."""
    squares = [(np.sum((found - expected) ** 2), np.sum(expected**2)) for found, expected in pairs]
    return math.sqrt(sum(s[0] for s in squares) / sum(s[1] for s in squares))


def test_factor_linear_of_peft_is_not_the_mean_and_ours_is(monkeypatch, make_pool):
    model = make_pool(((16, 32.0, False),) * 2, seed=4)
    merge_with_peft(monkeypatch, model, "merged", "linear", [], (0.5, 0.5))
    theirs, ours = [], []
    for name, layer in lora_layers(model).items():
        mean = (applied(layer, "a0") + applied(layer, "a1")) / 2
        theirs.append((applied(layer, "merged"), mean))
        found = combination(weighted_mean)(module_of(name, layer, (0.5, 0.5), {}))
        ours.append((np.array(found.dense()).astype(np.float64), mean))
    assert whole_error(ours) < 1e-6
    # The terms between adapters, (A₁B₂ + A₂B₁)s/2, are as large as the mean itself.
    assert 0.9 < whole_error(theirs) < 1.15


@pytest.mark.parametrize("kind", TYPES)
def test_peft_overscales_when_its_first_adapter_is_rank_stabilised(monkeypatch, make_pool, kind):
    """Merged arrays hold the sources' scalings; PEFT keeps the first adapter's flag, and so scales by √r again."""
    specs, rank = ((4, 8.0, True), (4, 8.0, False)), 8 if kind == "cat" else 4
    for order, expected in ((specs, math.sqrt(rank)), (specs[::-1], 1.0)):
        model = make_pool(order, seed=5)
        merge_with_peft(monkeypatch, model, "merged", kind, [], (0.5, 0.5), 1.0)
        for layer in lora_layers(model).values():
            assert layer.scaling["merged"] == pytest.approx(expected)
            assert relative_error(applied(layer, "merged"), expected * product(layer)) < 1e-6


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_rank_stabilised_sums_of_peft_are_wrong_and_ours_are_right(monkeypatch, make_pool, kind):
    model = make_pool(((4, 8.0, True),) * 2, seed=6)
    rank = 8
    merge_with_peft(monkeypatch, model, "merged", kind, [], (0.5, 0.5), svd_rank=rank)
    for name, layer in lora_layers(model).items():
        mean = (applied(layer, "a0") + applied(layer, "a1")) / 2
        found = truncate(TYPES[kind](module_of(name, layer, (0.5, 0.5), {})), rank).factors.dense()
        assert relative_error(found, mean) < 1e-5
        assert relative_error(applied(layer, "merged"), math.sqrt(rank) * mean) < 1e-5


# --- trained adapters ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_adapters():
    """The adapters of the finished demo run that ``RSGWM_DEMO`` names."""
    named = os.environ.get("RSGWM_DEMO")
    if not named:
        pytest.skip("RSGWM_DEMO names no finished demo run")
    folders = sorted(path for path in Path(named, "pool").glob("*") if is_complete(path))
    if len(folders) < 2:
        pytest.skip(f"{named} has no finished pool")
    return [Adapter.load(folder) for folder in folders]


def bare_model(adapter):
    """Linear layers under the names and with the shapes of an adapter's modules, and nothing else."""
    model = torch.nn.Module()
    for name, a, b in adapter.factors():
        *path, last = name.split(".")
        place = model
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.add_module(last, torch.nn.Linear(a.shape[0], b.shape[1], bias=False))
    return model


def loaded_by_peft(adapters, folder):
    """A PEFT model of bare layers with these adapters, which go by way of PEFT folders on disk."""
    model = None
    for index, adapter in enumerate(adapters):
        path = to_peft(adapter, "smollm2-135m", folder / f"a{index}")
        if model is None:
            config = peft.LoraConfig.from_pretrained(path)
            config.task_type = None  # a language model it is not
            model = peft.PeftModel.from_pretrained(bare_model(adapter), path, adapter_name="a0", config=config)
        else:
            model.load_adapter(path, adapter_name=f"a{index}")
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_trained_adapters(monkeypatch, demo_adapters, tmp_path, kind):
    kept = [name for name in demo_adapters[0].weights if ".0." in name or ".29." in name]
    if kind.endswith("svd"):  # a whole SVD takes PEFT a while: the first block and the last
        demo_adapters = [
            replace(one, weights={n: one.weights[n] for n in kept}, importance={}, init={}) for one in demo_adapters
        ]
    weights = (0.4, 0.3, -0.2, 0.5)[: len(demo_adapters)]
    check_against_peft(monkeypatch, loaded_by_peft(demo_adapters, tmp_path), kind, weights, 0.3)
