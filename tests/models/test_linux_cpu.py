"""The CPU's quicker ways give the same values, and gradients, as the plain ones."""

from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_rsgwm.models import cpu_threads, linux_cpu, linux_products, quicken


@pytest.fixture(autouse=True)
def on_linux(monkeypatch):
    for module in (linux_cpu, linux_products, quicken):
        monkeypatch.setattr(module, "applies", lambda: True)


def test_model_is_the_same(tiny_base):
    from mlx_lm.utils import load_model

    ids = mx.array([[3, 4, 5, 200], [9, 8, 7, 6]])
    plain, quick = (load_model(tiny_base)[0] for _ in range(2))
    quicken.quicken(quick)
    assert type(quick.model.layers[0].mlp) is quicken.GatedMlp
    assert (
        type(quick.model.layers[0].self_attn).__call__.__globals__["scaled_dot_product_attention"]
        is linux_products.attention
    )
    assert type(quick.model.layers[0].self_attn.q_proj) is quicken.QuickLinear
    assert type(quick.model.embed_tokens) is quicken.QuickEmbedding
    assert mx.allclose(plain(ids), quick(ids), rtol=1e-5, atol=1e-5).item()
    assert plain.parameters().keys() == quick.parameters().keys()

    def loss(model):
        return mx.square(model(ids)).mean()

    for (name, expected), (same, found) in zip(gradients(plain, loss), gradients(quick, loss), strict=True):
        assert name == same
        assert mx.allclose(expected, found, rtol=1e-3, atol=1e-6).item()


def gradients(model, loss):
    from mlx.utils import tree_flatten

    return tree_flatten(nn.value_and_grad(model, loss)(model)[1])


def test_cross_entropy_and_its_gradient():
    logits = mx.random.normal((7, 50)) * 30
    targets = mx.array([0, 49, 3, 3, 7, 1, 2])
    for function in (
        lambda f: f(logits, targets).sum(),
        lambda f: mx.grad(lambda x: f(x, targets).sum())(logits).sum(),
    ):
        assert function(linux_cpu.cross_entropy).item() == pytest.approx(
            function(nn.losses.cross_entropy).item(), abs=1e-3
        )
    ours, theirs = (
        mx.grad(lambda x, f=f: f(x, targets).sum())(logits) for f in (linux_cpu.cross_entropy, nn.losses.cross_entropy)
    )
    assert mx.allclose(ours, theirs, atol=1e-5).item()


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("size", [1001, linux_cpu.SMALL, 3 * linux_cpu.BLOCK + 17])
def test_exp_is_exp(size, lazy):
    x = mx.linspace(-80, 80, size)
    with linux_cpu.lazily() if lazy else nullcontext():
        assert mx.allclose(linux_cpu.exp(x), mx.exp(x), rtol=1e-5, atol=0).item()


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 7), (5, 333, 199), (2, 9, 130, 130)])
@pytest.mark.parametrize(
    ("quick", "plain"),
    [
        (lambda x, y: linux_cpu.gated(x, y), lambda x, y: nn.silu(x) * y),
        (lambda x, y: linux_products._softmax(x) * y, lambda x, y: mx.softmax(x, axis=-1) * y),
        (lambda x, y: linux_cpu.exp(x / 9) * y, lambda x, y: mx.exp(x / 9) * y),
    ],
)
def test_values_and_gradients_whatever_the_size_and_where(shape, quick, plain, lazy):
    """Above and below the sizes that go to NumPy, inside and outside of :func:`cpu.lazily`: the same, gradients too."""
    x, y = (mx.random.normal(shape, key=mx.random.key(seed)) * 9 for seed in (0, 1))

    def both(function):
        value, gradients = mx.value_and_grad(lambda a, b: function(a, b).sum(), argnums=(0, 1))(x, y)
        return [function(x, y), value, *gradients]

    with linux_cpu.lazily() if lazy else nullcontext():
        found = both(quick)
    for actual, expected in zip(found, both(plain), strict=True):
        assert mx.allclose(actual, expected, rtol=1e-4, atol=1e-4 * mx.abs(expected).max().item()).item()
    assert mx.isfinite(found[0]).all().item()


@pytest.mark.parametrize(
    "rows", [(1,), (2, linux_products.ROWS // 2), (linux_products.ROWS,), (3, 67), (linux_products.TALL + 1,)]
)
@pytest.mark.parametrize("cores", [1, 3])
def test_products_and_their_gradients(rows, cores, monkeypatch):
    """Few rows, many and very many, on one thread and several: the products of float64, and MLX's gradients."""
    monkeypatch.setattr(cpu_threads, "cores", lambda: cores)
    x, weight = mx.random.normal((*rows, 600)), mx.random.normal((70, 600))
    expected = np.array(x).astype(np.float64) @ np.array(weight).astype(np.float64).T
    assert np.allclose(linux_products.product(x, weight), expected, rtol=1e-4, atol=1e-3)
    assert np.allclose(linux_products.product(x[..., ::2], weight[:, ::2]), x[..., ::2] @ weight[:, ::2].T, atol=1e-3)
    found, plain = (
        mx.grad(lambda x, weight, f=f: (f(x, weight) ** 2).sum(), argnums=(0, 1))(x, weight)
        for f in (linux_products.product, lambda x, weight: x @ weight.T)
    )
    for actual, wanted in zip(found, plain, strict=True):
        assert mx.allclose(actual, wanted, rtol=1e-3, atol=1e-2).item()


@pytest.mark.skipif(cpu_threads.numpys_openblas() is None, reason="NumPy has another BLAS")
def test_one_blas_thread_holds_until_the_last_who_asked_leaves():
    count = cpu_threads.numpys_openblas().scipy_openblas_get_num_threads64_
    before = count()
    first, second = cpu_threads.one_blas_thread(), cpu_threads.one_blas_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as threads may, in the order in which they came
    assert count() == 1
    second.__exit__(None, None, None)
    assert count() == before


@pytest.mark.parametrize("size", [5, linux_cpu.SMALL])
def test_gates_far_out_are_zero_or_whole(size):
    up = mx.full((size,), 3.0)
    assert mx.array_equal(linux_cpu.gated(mx.full((size,), -200.0), up), mx.zeros((size,))).item()
    assert mx.array_equal(linux_cpu.gated(mx.full((size,), 200.0), up), mx.full((size,), 600.0)).item()


def test_dropout_is_mlx_dropout():
    x = mx.random.normal((50, 40))
    plain, quick = nn.Dropout(0.3), linux_cpu.Dropout(0.3)
    results = []
    for layer in (plain, quick):
        mx.random.seed(3)
        results.append(layer(x))
    assert mx.allclose(*results, rtol=1e-6).item()
    assert (results[1] == 0).any().item()
    quick.eval()
    assert mx.array_equal(quick(x), x).item()
    assert linux_cpu.Dropout(0.0)(x) is x


def test_other_devices_are_left_alone(tiny_base, monkeypatch):
    from mlx_lm.utils import load_model

    monkeypatch.setattr(quicken, "applies", lambda: False)
    model = load_model(tiny_base)[0]
    quicken.quicken(model)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize("shape", [(2, 4, 2, 5, 5), (1, 6, 2, 1, 7), (3, 4, 4, 3, 8), (5, 6, 3, 90, 111)])
@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "additive", "per head"])
def test_attention_and_its_gradients(shape, kind):
    batch, heads, groups, length, seen = shape
    queries = mx.random.normal((batch, heads, length, 8))
    keys, values = (mx.random.normal((batch, groups, seen, 8)) for _ in range(2))
    causal = mx.tri(length, seen, seen - length, dtype=mx.bool_)
    mask = {
        "none": None,
        "causal": "causal",
        "boolean": mx.broadcast_to(causal, (batch, 1, length, seen)),
        "additive": mx.where(causal, 0.0, -1e9),
        "per head": mx.random.normal((batch, heads, length, seen)),
    }[kind]

    def loss(function):
        return lambda *arrays: (function(*arrays) ** 3).sum()

    ours = loss(lambda q, k, v: linux_products.attention(q, k, v, None, 0.3, mask))
    theirs = loss(lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask))
    assert ours(queries, keys, values).item() == pytest.approx(theirs(queries, keys, values).item(), rel=1e-4)
    for mine, expected in zip(
        *(mx.grad(f, argnums=(0, 1, 2))(queries, keys, values) for f in (ours, theirs)), strict=True
    ):
        assert mx.allclose(mine, expected, rtol=1e-3, atol=1e-5).item()


def test_attention_hands_on_what_is_not_float32():
    queries, keys, values = (mx.random.normal((1, 2, 3, 8)).astype(mx.bfloat16) for _ in range(3))
    found = linux_products.attention(queries, keys, values, None, 0.3, "causal")
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, mask="causal")
    assert mx.array_equal(found, expected).item()


@pytest.mark.parametrize("places", [(0,), (7,), (62,), (0, 1), (7, 8), (3, 3, 40), (61, 62), (0, 20, 62)])
@pytest.mark.parametrize("quick", [True, False])
def test_order_statistics_are_what_sorting_puts_there(monkeypatch, places, quick):
    monkeypatch.setattr(linux_cpu, "applies", lambda: quick)
    values = mx.round(mx.random.normal((3, 63)) * 8) / 8  # many are equal
    before = values.tolist()
    expected = mx.sort(values, axis=-1)[:, list(places)]
    assert mx.array_equal(linux_cpu.order_statistics(values, *places), expected).item()
    flat = values.reshape(-1)
    assert mx.array_equal(linux_cpu.order_statistics(flat, *places), mx.sort(flat)[list(places)]).item()
    assert values.tolist() == before


@pytest.mark.parametrize("mask", [mx.array([[True, False], [False, True]]), mx.array([[1.0, 0.0], [0.0, 2.0]])])
def test_ones_where_a_mask_is_true(mask):
    ones = linux_cpu.ones_where(mask.T)
    assert ones.tolist() == [[1, 0], [0, 1]]
    assert (mx.full((2, 2), 0.5) * ones).dtype == mx.float32


@pytest.mark.parametrize("count", [1, 8, 63])
def test_the_largest_are_found(count):
    values = mx.random.normal((3, 63))
    best = mx.sort(mx.take_along_axis(values, linux_cpu.largest(values, count), axis=-1), axis=-1)
    assert mx.array_equal(best, mx.sort(values, axis=-1)[:, 63 - count :]).item()


def test_what_no_gradient_asks_for_is_not_computed():
    """In NumPy the product comes without its sigmoid: one array more in memory, not two."""
    if not linux_cpu.applies():
        pytest.skip("MLX computes on Metal here")
    gate, up = mx.random.normal((512, 2048)), mx.random.normal((512, 2048))
    mx.eval(gate, up)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(linux_cpu.gated(gate, up))
    assert mx.get_peak_memory() - before < 1.5 * gate.nbytes
