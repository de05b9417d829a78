"""What a merge is made of, against dense float64 products, and the closed form against what is measured."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_rsgwm.audit.outcomes import Outcome, structure_of
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions


def product(adapter, module):
    a, b = (np.array(adapter.weights[f"{module}.{leaf}"]).astype(np.float64) for leaf in ("lora_a", "lora_b"))
    return adapter.spec.scale * a @ b


def cosine(first, second):
    return (first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second)


@pytest.mark.parametrize(("method", "rank"), [("linear", 4), ("linear", 68), ("ties", 8), ("norm_equalised", 4)])
def test_shares_are_mean_cosines(unlike, method, rank):
    sources = [unlike[0], unlike[3]]
    merged = merge(sources, MergeOptions(method, rank=rank, weights=() if method == "norm_equalised" else (1.0, 2.0)))
    structure = structure_of(merged, sources)
    for index, source in enumerate(sources):
        expected = np.mean([cosine(product(source, name), product(merged, name)) for name in merged.modules()])
        assert structure.truncated.shares[index] == pytest.approx(expected, abs=1e-6)
    if method == "ties":
        assert structure.untruncated is None
        assert structure.predicted is None
        return
    weights = {"linear": (1 / 3, 2 / 3)}.get(method) or inverse_norms(sources)
    for index, source in enumerate(sources):
        sums = {n: sum(w * product(s, n) for w, s in zip(weights, sources, strict=True)) for n in merged.modules()}
        expected = np.mean([cosine(product(source, name), sums[name]) for name in merged.modules()])
        assert structure.untruncated.shares[index] == pytest.approx(expected, abs=1e-5)


def inverse_norms(sources):
    norms = [np.sqrt(sum(np.square(product(s, name)).sum() for name in s.modules())) for s in sources]
    return [norms[1] / sum(norms), norms[0] / sum(norms)]


def test_the_closed_form_is_exact_for_orthogonal_updates(make_adapter):
    first, second = make_adapter(0, rank=4, init_seed=0, size=0.3), make_adapter(1, rank=4, init_seed=1, size=0.1)
    for name in first.weights:  # the second's inputs and outputs are made orthogonal to the first's
        mine, other = np.array(first.weights[name]), np.array(second.weights[name])
        basis = np.linalg.qr(mine if name.endswith("lora_a") else mine.T)[0]
        rest = other - (basis @ (basis.T @ other) if name.endswith("lora_a") else (other @ basis) @ basis.T)
        second.weights[name] = second.weights[name] * 0 + rest.astype(np.float32)
    for rank, weights in ((8, (0.5, 0.5)), (4, (0.5, 0.5)), (4, (0.2, 0.8)), (2, (0.3, 0.7))):
        merged = merge([first, second], MergeOptions("linear", rank=rank, weights=weights))
        structure = structure_of(merged, [first, second])
        assert structure.predicted.shares == pytest.approx(structure.truncated.shares, abs=1e-4)
        squares = np.square(structure.untruncated.shares).sum()
        assert squares == pytest.approx(1.0, abs=0.05)  # a balanced orthogonal pair comes to .707 each


def test_signs_stay_and_dominance_is_that_of_the_two_that_differ_most():
    outcome = Outcome((0.6, -0.2, 0.3))
    assert outcome.quality == -0.2
    assert outcome.dominance == pytest.approx((0.6 + 0.2) / (0.6 + 0.2))
    assert Outcome((0.5, 0.5)).dominance == 0.0


def test_a_merge_of_one_source_is_refused(unlike):
    merged = merge(unlike[:2], MergeOptions("linear"))
    with pytest.raises(RsgwmError, match="at least two sources, found 1"):
        structure_of(merged, unlike[:1])
