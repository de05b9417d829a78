"""LoRA-LEGO: clustering against a plain Lloyd in float64 and SciPy, units against their definition, invariances."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.families.lego import _seeds, balanced_units, cluster, lego
from tests.merging.random_layers import layers_with, random_updates

PARAMETERS = {"clusters": 0, "output": "sum", "signs": "aligned", "restarts": 8, "iterations": 30}


def updates(seed, inputs=12, outputs=9, ranks=(3, 2, 4)):
    return random_updates(seed, inputs, outputs, ranks)


module_of = layers_with(PARAMETERS)


def wide(array):
    return np.array(array).astype(np.float64)


def distances(points, centres, aligned):
    apart = np.linalg.norm(points[:, None] - centres[None], axis=2)
    return np.minimum(apart, np.linalg.norm(points[:, None] + centres[None], axis=2)) if aligned else apart


def lloyd(points, seeds, iterations, aligned):
    """Members (n, k) and inertia, the slow way."""
    centres = points[seeds].copy()
    empty = np.zeros(len(seeds), dtype=bool)
    for step in range(iterations + 1):
        apart = distances(points, centres, aligned)
        apart[:, empty] = np.inf
        nearest = apart.argmin(axis=1)
        members = np.zeros((len(points), len(seeds)))
        for index, chosen in enumerate(nearest):
            turned = aligned and points[index] @ centres[chosen] < 0
            members[index, chosen] = -1 if turned else 1
        inertia = (apart.min(axis=1) ** 2).sum()
        if step < iterations:
            counts = np.abs(members).sum(axis=0)
            empty = counts == 0
            centres = members.T @ points / np.maximum(counts, 1)[:, None]
    return members, inertia


def assembled(factors, weights, members, output):
    """LoRA-LEGO, given who is with whom."""
    units, inputs = [], factors[0].a.shape[0]
    for one, weight in zip(factors, weights, strict=True):
        for a, b in zip(wide(one.a).T, weight * wide(one.b), strict=True):
            both = np.sqrt(np.linalg.norm(a) * np.linalg.norm(b))
            units.append(np.concatenate([a * both / np.linalg.norm(a), b * both / np.linalg.norm(b)]))
    units = np.array(units)
    total = np.zeros((inputs, units.shape[1] - inputs))
    for column in members.T:
        if column.any():
            centroid = column @ units / np.abs(column).sum()
            centroid *= (np.abs(column) @ np.linalg.norm(units, axis=1) / np.abs(column).sum()) / np.linalg.norm(
                centroid
            )
            total += np.outer(centroid[:inputs], centroid[inputs:])
    used = (np.abs(members).sum(axis=0) > 0).sum()
    whole = sum(one.rank for one in factors)
    return total * {"sum": np.sqrt(whole / used), "mean": np.sqrt(whole / len(factors) / used), "none": 1.0}[output]


def close(found, expected, tolerance=1e-4):
    assert np.linalg.norm(wide(found) - expected) <= tolerance * np.linalg.norm(expected)


def test_balanced_units():
    factors = updates(1)
    factors[1] = Factors(factors[1].a * mx.array([0.0, 1e3]), factors[1].b * 1e-6)
    units = wide(balanced_units(factors, (1.0, 2.0, -1.0)))
    assert units.shape == (9, 21)
    left, right = units[:, :12], units[:, 12:]
    np.testing.assert_allclose(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1), rtol=1e-5)
    assert not units[3].any()
    expected = wide(factors[0].dense()) + 2 * wide(factors[1].dense()) - wide(factors[2].dense())
    np.testing.assert_allclose(left.T @ right, expected, atol=1e-4)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("iterations", [0, 1, 20])
@pytest.mark.parametrize("seed", range(4))
def test_clustering_is_lloyds(aligned, iterations, seed):
    points = np.random.default_rng(seed).standard_normal((30, 5)).astype(np.float32)
    gram = mx.array(points @ points.T)
    key = mx.random.key(seed)
    found = wide(cluster(gram, 6, key, 4, iterations, aligned))
    seeds = np.array(_seeds(gram, mx.diag(gram), mx.diag(gram) > 0, 6, key, 4, aligned))
    assert all(len(set(row)) == 6 for row in seeds.tolist())  # points once chosen are at distance 0
    each = [lloyd(points.astype(np.float64), row, iterations, aligned) for row in seeds]
    members, _ = min(each, key=lambda one: one[1])
    np.testing.assert_array_equal(found, members)


def test_seeds_follow_the_squared_distance():
    """Two far groups of unequal size: the second seed is nearly always in the other group."""
    rng = np.random.default_rng(0)
    centres = np.repeat([[100, 0, 0], [0, 100, 0]], [20, 3], axis=0)
    points = centres + rng.standard_normal(centres.shape)
    gram = mx.array((points @ points.T).astype(np.float32))
    seeds = np.array(_seeds(gram, mx.diag(gram), mx.diag(gram) > 0, 2, mx.random.key(0), 200, False))
    assert ((seeds[:, 0] < 20) != (seeds[:, 1] < 20)).mean() > 0.97
    assert 0.75 < (seeds[:, 0] < 20).mean() < 0.98  # the first is uniform: 20 of 23


def test_inertia_is_near_scipys():
    from scipy.cluster.vq import kmeans2

    points = np.random.default_rng(5).standard_normal((64, 8)).astype(np.float32)
    members = wide(cluster(mx.array(points @ points.T), 16, mx.random.key(0), 8, 30, False))
    centres = members.T @ points / members.sum(axis=0)[:, None]
    runs = [kmeans2(points, 16, iter=30, minit="++", seed=seed) for seed in range(8)]
    theirs = min(((points - centroid[label]) ** 2).sum() for centroid, label in runs)
    assert ((points - members @ centres) ** 2).sum() < 1.05 * theirs


@pytest.mark.parametrize("output", ["sum", "mean", "none"])
@pytest.mark.parametrize("signs", ["aligned", "kept"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, -1.0)])
def test_formula_given_the_clusters(output, signs, weights):
    factors = updates(2)
    module = module_of(factors, weights, output=output, signs=signs)
    units = balanced_units(factors, weights)
    members = cluster(units @ units.T, 4, module.key, 8, 30, signs == "aligned")
    found = lego(module)
    assert found.rank == 4  # the largest of the pool's
    close(found.dense(), assembled(factors, weights, wide(members), output))


def test_planted_units_are_found():
    rng = np.random.default_rng(3)
    planted = updates(4, ranks=(5,), inputs=40, outputs=30)[0]
    factors = []
    for _ in range(4):
        order, turn = rng.permutation(5), rng.choice([-1.0, 1.0], 5)
        stretch = turn * np.exp(rng.normal(0, 2, 5))
        noisy = wide(planted.a) + 0.01 * rng.standard_normal((40, 5))
        factors.append(
            Factors(
                mx.array((noisy[:, order] * stretch).astype(np.float32)),
                mx.array((wide(planted.b)[order] / stretch[:, None]).astype(np.float32)),
            )
        )
    close(lego(module_of(factors, output="mean")).dense(), wide(planted.dense()), 0.02)


def test_scale_sign_and_order_of_units_do_not_matter():
    factors = updates(5)
    rng = np.random.default_rng(5)
    changed = []
    for one in factors:
        stretch = rng.choice([-1.0, 1.0], one.rank) * np.exp(rng.normal(0, 2, one.rank))
        changed.append(
            Factors(
                one.a * mx.array(stretch.astype(np.float32)),
                one.b / mx.array(stretch.astype(np.float32))[:, None],
            )
        )
    close(lego(module_of(changed)).dense(), wide(lego(module_of(factors)).dense()), 1e-4)


def test_every_unit_alone_gives_the_sum():
    factors = updates(6)
    total = sum(wide(one.dense()) for one in factors)
    for clusters in (9, 50):
        found = lego(module_of(factors, clusters=clusters, restarts=1))
        assert found.rank == 9
        close(found.dense(), total)


def test_equal_adapters_stay_by_the_mean_rank():
    factors = updates(7, ranks=(3,)) * 4
    own = wide(factors[0].dense())
    close(lego(module_of(factors, output="mean")).dense(), own)
    close(lego(module_of(factors, output="sum")).dense(), 2 * own)  # √(12 / 3)
    close(lego(module_of(factors[:1])).dense(), own)


def test_absent_modules_do_not_count():
    factors = updates(8, ranks=(3, 3))
    absent = Factors(mx.zeros((12, 1)), mx.zeros((1, 9)))
    for output in ("sum", "mean"):
        alone = wide(lego(module_of(factors, output=output, restarts=50)).dense())
        close(lego(module_of([*factors, absent], output=output, restarts=50)).dense(), alone)
    nothing = lego(module_of([absent, absent])).dense()
    assert mx.max(mx.abs(nothing)).item() == 0


def test_drawn_by_the_key():
    factors = updates(9, ranks=(8, 8, 8, 8))
    one, again, other = (lego(module_of(factors, key=key, restarts=1, iterations=1)).dense() for key in (1, 1, 2))
    assert mx.array_equal(one, again).item()
    assert not mx.array_equal(one, other).item()
