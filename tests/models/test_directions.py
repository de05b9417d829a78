"""The file of directions: what is read back is the second moment of the rows it was made of, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.core.safetensors_io import read_safetensors, write_safetensors
from mlx_rsgwm.linalg.gram import SketchedGram, WholeGram, test_matrix
from mlx_rsgwm.models.adapter import DIRECTIONS_FILE, Adapter
from mlx_rsgwm.models.adapter_sidecars import put_beside
from mlx_rsgwm.models.directions import load_directions

RANK, SEED, WIDTH = 8, 3, 32
Q, K, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))


def rows_of(count: int, seed: int, width: int = WIDTH) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, width)) * 0.6 ** np.arange(width)) @ rng.standard_normal((width, width))


ROWS = {"draft": rows_of(300, 1), "verify": rows_of(100, 2)}


def arrays_of(rows: dict[str, np.ndarray] = ROWS) -> dict[str, mx.array]:
    """q_proj as a sketch, down_proj whole."""
    arrays = {}
    omega = np.array(test_matrix(WIDTH, RANK, SEED)).astype(np.float64)
    for role, x in rows.items():
        gram = x.T @ x / len(x)
        arrays[f"{role}/{Q}.sketch"] = mx.array((gram @ omega).astype(np.float32))
        arrays[f"{role}/{Q}.diagonal"] = mx.array(np.diag(gram).astype(np.float32))
        arrays[f"{role}/{DOWN}.gram"] = mx.array(gram.astype(np.float32))
    return arrays


METADATA = {
    "k": str(RANK), "seed": str(SEED), "shared": json.dumps({K: Q}),
    "tokens/draft": "300", "tokens/verify": "100",
}  # fmt: skip


@pytest.fixture
def folder(make_adapter, tmp_path: Path) -> Path:
    make_adapter(1, keys=("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")).save(tmp_path / "adapter")
    put(tmp_path / "adapter")
    return tmp_path / "adapter"


def put(folder: Path, arrays: dict[str, mx.array] | None = None, **metadata: str) -> None:
    adapter = Adapter.load(folder)
    of_weights = {"weights_sha256": adapter.manifest["files"]["adapters.safetensors"]}
    put_beside(adapter, DIRECTIONS_FILE, arrays or arrays_of(), {**METADATA, **of_weights, **metadata}, {}, {})


def dense(gram: SketchedGram | WholeGram) -> np.ndarray:
    return gram.dense()


def test_a_role_s_rows_alone(folder: Path) -> None:
    for role, x in ROWS.items():
        grams = load_directions(folder, role)
        assert set(grams) == {Q, K, DOWN}
        gram = x.T @ x / len(x)
        np.testing.assert_allclose(dense(grams[DOWN]), gram, rtol=1e-6, atol=1e-6 * np.trace(gram))
        sketched = grams[Q]
        assert isinstance(sketched, SketchedGram)
        left_out = gram - np.array(sketched.factor) @ np.array(sketched.factor).T
        assert np.linalg.norm(left_out, "nuc") <= (sketched.missed + 1e-6) * np.trace(gram)
        assert grams[K] is sketched


def test_all_is_the_mean_over_the_tokens_of_all_roles(folder: Path) -> None:
    together = np.concatenate(list(ROWS.values()))
    expected = together.T @ together / 400
    grams = load_directions(folder, "all")
    np.testing.assert_allclose(dense(grams[DOWN]), expected, rtol=1e-5, atol=1e-6 * np.trace(expected))
    sketched = grams[Q]
    np.testing.assert_allclose(np.array(sketched.diagonal), np.diag(expected), rtol=1e-5)
    left_out = expected - np.array(sketched.factor) @ np.array(sketched.factor).T
    assert np.linalg.norm(left_out, "nuc") <= (sketched.missed + 1e-6) * np.trace(expected)


def test_read_in_any_order_and_again(folder: Path) -> None:
    grams = load_directions(folder, "draft")
    first = {name: dense(grams[name]) for name in (K, DOWN, Q)}
    other = load_directions(folder, "draft")
    for name in (Q, DOWN, K, Q, DOWN):
        np.testing.assert_array_equal(dense(other[name]), first[name])


def test_an_embedding_s_diagonal_is_all_there_is(folder: Path) -> None:
    counts = mx.array(np.arange(50, dtype=np.float32))
    put(folder, {f"{role}/model.embed_tokens.diagonal": counts for role in ROWS})
    gram = load_directions(folder, "draft")["model.embed_tokens"]
    np.testing.assert_array_equal(dense(gram), np.diag(np.arange(50)))
    assert gram.missed == 0


def refused(folder: Path, match: str, role: str = "draft") -> None:
    with pytest.raises(RsgwmError, match=match):
        load_directions(folder, role)


def test_none_of_the_role(folder: Path) -> None:
    put(folder, arrays_of({"draft": ROWS["draft"]}), **{"tokens/verify": "0"})
    refused(
        folder, r"no directions of the role verify \(there are draft\); collect them: rsgwm directions col", "verify"
    )
    assert set(load_directions(folder, "all")) == {Q, K, DOWN}


def test_no_file(folder: Path) -> None:
    (folder / DIRECTIONS_FILE).unlink()
    refused(folder, "adapter has no directions; collect them: rsgwm directions collect .*adapter --corpus ROWS")
    write_safetensors(folder / "grams.safetensors", {Q: mx.eye(4)})
    refused(folder, "grams.safetensors of an earlier version, .* no directions; collect them: rsgwm directions collect")


def test_too_few_tokens_for_k(folder: Path) -> None:
    put(folder, **{"tokens/draft": "7"})
    refused(folder, "come from 7 tokens, too few for k = 8; collect them on more rows")


def test_whole_matrices_need_no_more_tokens_than_they_have(folder: Path) -> None:
    whole = {name: array for name, array in arrays_of().items() if name.endswith(".gram")}
    put(folder, whole, k="1000", shared="{}")
    np.testing.assert_allclose(
        dense(load_directions(folder, "draft")[DOWN]), ROWS["draft"].T @ ROWS["draft"] / 300, atol=1e-5
    )


def test_of_other_weights(folder: Path, make_adapter) -> None:
    stale = (folder / DIRECTIONS_FILE).read_bytes()
    make_adapter(2, keys=("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")).save(folder)
    refused(folder, "has no directions; collect them")  # an adapter that is saved over another takes its place
    (folder / DIRECTIONS_FILE).write_bytes(stale)
    refused(folder, "belongs to earlier weights of this folder; collect it anew")


@pytest.mark.parametrize(
    ("name", "shape"),
    [(f"draft/{Q}.sketch", (WIDTH, RANK + 1)), (f"draft/{DOWN}.gram", (WIDTH, 5)), (f"draft/{Q}.more", (WIDTH, 5))],
)
def test_arrays_of_other_shapes(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    put(folder, {**arrays_of(), name: mx.zeros(shape)})
    refused(folder, "the directions of .*_proj have other arrays or shapes than they need")


def test_an_array_is_missing(folder: Path) -> None:
    put(folder, {other: value for other, value in arrays_of().items() if other != f"draft/{Q}.sketch"})
    refused(folder, "q_proj have other arrays or shapes", "all")


def test_damaged_values_and_metadata(folder: Path) -> None:
    put(folder, {**arrays_of(), f"draft/{Q}.diagonal": mx.full((WIDTH,), float("nan"))})
    with pytest.raises(AdapterError, match=r"the directions of .*q_proj are not finite"):
        load_directions(folder, "draft")[Q]
    put(folder, {**arrays_of(), f"draft/{Q}.diagonal": mx.full((WIDTH,), -1.0)})
    with pytest.raises(AdapterError, match=r"the directions of .*q_proj have negative squares"):
        load_directions(folder, "draft")[Q]
    put(folder, {**arrays_of(), f"draft/{DOWN}.gram": mx.zeros((WIDTH, WIDTH), mx.bfloat16)})
    refused(folder, "the directions of .*down_proj are not float32")
    broken_headers = (
        {"k": "many"}, {"k": "-1"}, {"seed": "-1"}, {"tokens/draft": "-5"}, {"tokens/draft": "x"},
        {"shared": "[1]"}, {"shared": "{"}, {"shared": "[" * 100_000},
    )  # fmt: skip
    for broken in broken_headers:
        put(folder, **broken)
        refused(folder, "what it says of its directions is damaged; collect them anew")
    assert read_safetensors(folder / DIRECTIONS_FILE)[1]["format"] == "mlx"
