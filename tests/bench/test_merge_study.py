"""What stands in for whole second moments in the merge study."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_rsgwm.bench.merge_study import led


def test_leading_directions_and_the_diagonal_of_the_rest():
    inputs = np.random.default_rng(0).standard_normal((60, 12)) * np.geomspace(8, 0.1, 12)
    gram = inputs.T @ inputs
    values, vectors = np.linalg.eigh(gram)
    best = vectors[:, -4:] @ np.diag(values[-4:]) @ vectors[:, -4:].T
    expected = best + np.diag(np.diag(gram - best))
    np.testing.assert_allclose(np.array(led(mx.array(gram.astype(np.float32)), 4)), expected, rtol=1e-4, atol=1e-3)
    by_all = np.array(led(mx.array(gram.astype(np.float32)), 12))
    np.testing.assert_allclose(by_all, gram, rtol=1e-4, atol=1e-3)
