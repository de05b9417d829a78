"""The diagnosis of a weighted mean from the coordinates that it was truncated in, against dense float64 products."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions


def product(adapter, module):
    a, b = (np.array(adapter.weights[f"{module}.{leaf}"]).astype(np.float64) for leaf in ("lora_a", "lora_b"))
    return adapter.spec.scale * a @ b


def cosine(first, second):
    return (first * second).sum() / (np.linalg.norm(first) * np.linalg.norm(second))


@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 0.5), (1.0, -0.6, 0.5), (1.0, 1e-6, 1.0), (3.0, 0.0, 1.0)])
def test_the_diagnosis_is_that_of_the_dense_updates(make_adapter, weights):
    # Alone in a module an adapter of no weight would leave nothing there, which is refused.
    keys = ("self_attn.q_proj", "mlp.down_proj") if min(map(abs, weights), default=1) > 1e-3 else ("self_attn.q_proj",)
    pool = [
        make_adapter(0),
        make_adapter(1, rank=6, init_seed=1, size=3.0, keys=keys),
        make_adapter(2, rank=3, init_seed=2, size=0.02),
    ]
    merged = merge(pool, MergeOptions("linear", rank=5, weights=weights))
    for name, row in merged.manifest["merge"]["diagnosis"]["modules"].items():
        result = product(merged, name)
        sources = [product(each, name) if name in each.modules() else np.zeros_like(result) for each in pool]
        norms = [np.linalg.norm(source) for source in sources]
        assert row["source_norms"] == pytest.approx(norms, rel=1e-4, abs=1e-6)
        assert row["norm"] == pytest.approx(np.linalg.norm(result), rel=1e-4)
        expected = [cosine(source, result) if norm else 0.0 for source, norm in zip(sources, norms, strict=True)]
        assert row["cosines"] == pytest.approx(expected, abs=1e-4)
        assert row["cosine_to_mean_product"] == pytest.approx(cosine(sum(sources), result), abs=1e-4)
