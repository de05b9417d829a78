"""What a sanitize does to arrays is found from markers alone: every kind of change, against what it does to values."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.converters.checkpoint_form import put_parts
from mlx_rsgwm.converters.weight_map import WeightMap

SHAPES = {
    "layers.0.square.weight": (6, 6),
    "layers.1.square.weight": (6, 6),
    "layers.0.fused.weight": (12, 6),
    "layers.0.norm.weight": (6,),
    "layers.0.conv.weight": (6, 1, 4),
    "layers.0.experts.0.up.weight": (8, 6),
    "layers.0.experts.1.up.weight": (8, 6),
    "layers.0.stacked": (2, 16, 6),
}
VECTOR = mx.array([0.5, 1.0, 2.0, 3.0, 1.0, 0.25])


def in_place(arrays):
    arrays["layers.0.square.weight"] *= VECTOR[:, None]
    return arrays


def split(arrays):
    fused = arrays.pop("layers.0.fused.weight")
    arrays["layers.0.a.weight"], arrays["layers.0.b.weight"] = mx.split(2 * fused, 2)
    return arrays


def stack(arrays):
    arrays["layers.0.switch.up.weight"] = mx.stack(
        [arrays.pop(f"layers.0.experts.{expert}.up.weight") for expert in range(2)]
    )
    return arrays


def halves(arrays):
    both = arrays.pop("layers.0.stacked")
    return {**arrays, "gate": both[:, :8], "up": both[:, 8:]}


def scaled_halves(arrays):
    arrays = halves(arrays)
    return {**arrays, "up": 0.5 * arrays["up"]}


def changed(name, change):
    return lambda arrays: {**arrays, name: change(arrays[name])}


AFFINE = {
    "nothing": lambda arrays: arrays,
    "renamed": lambda arrays: {f"model.{name}": value for name, value in arrays.items()},
    "transposed square": changed("layers.0.square.weight", mx.transpose),
    "scaled": changed("layers.1.square.weight", lambda value: value * 0.5859),
    "scaled by row in place": in_place,
    "shifted": changed("layers.0.norm.weight", lambda value: value + 1.0),
    "scaled and shifted": changed("layers.0.norm.weight", lambda value: 0.5 * value - 2),
    "convolution": changed("layers.0.conv.weight", lambda value: value.moveaxis(2, 1)),
}


@pytest.fixture
def arrays():
    rng = np.random.default_rng(2)
    return {name: mx.array(rng.standard_normal(shape).astype(np.float32)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", AFFINE)
def test_a_link_does_to_an_array_what_sanitize_does(name, arrays):
    found = WeightMap(AFFINE[name], SHAPES)
    expected = AFFINE[name]({key: value + 0 for key, value in arrays.items()})
    assert set(found.names()) == set(expected)
    for parameter, value in expected.items():
        link = found.link(parameter)
        ours = link.apply(arrays[link.source])
        np.testing.assert_allclose(np.array(ours), np.array(value), rtol=1e-6)
        np.testing.assert_allclose(np.array(link.undo(ours)), np.array(arrays[link.source]), rtol=1e-6, atol=1e-6)
    changes = [parameter for parameter in expected if not found.link(parameter).plain]
    assert len(changes) == (name not in ("nothing", "renamed"))


@pytest.mark.parametrize(("change", "factor"), [(split, 2.0), (stack, 1.0), (halves, 1.0)])
def test_rows_are_traced_to_their_source(change, factor, arrays):
    found = WeightMap(change, SHAPES)
    expected = change({key: value + 0 for key, value in arrays.items()})
    for parameter in sorted(set(expected) - set(SHAPES)):
        link = found.link(parameter)
        assert link.scale == factor
        blocks = []
        for parts in link.parts:
            rows = [arrays[p.source][p.expert] if p.expert is not None else arrays[p.source] for p in parts]
            blocks.append(np.concatenate([np.array(r)[p.rows] for r, p in zip(rows, parts, strict=True)]))
        made = factor * (np.stack(blocks) if expected[parameter].ndim == 3 else blocks[0])
        np.testing.assert_array_equal(made, np.array(expected[parameter]))


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value / mx.sqrt(mx.sum(value * value)),
        lambda value: value * VECTOR,  # by column
        lambda value: value + value.T,
        lambda value: value * 0,
        lambda value: value.reshape(3, 12),
        lambda value: value[:, ::-1],
    ],
)
def test_what_is_no_such_change_is_not_taken_for_one(change):
    assert WeightMap(changed("layers.0.square.weight", change), SHAPES).link("layers.0.square.weight") is None


def test_other_layers_are_carried_over_from_the_first_and_numbers_in_names_are_not_mixed_up():
    shapes = {f"layers.{i}.x{j}.weight": (4, 4) for i in range(12) for j in range(2)}
    found = WeightMap(lambda arrays: {name: 3 * value.T for name, value in arrays.items()}, shapes)
    for name in shapes:
        link = found.link(name)
        assert (link.source, link.axes, link.scale) == (name, (1, 0), 3.0)


def test_a_number_that_is_no_layer_is_looked_at_by_itself():
    shapes = {f"layers.{i}.experts.{j}.weight": (4, 4) for i in range(3) for j in range(3)}
    found = WeightMap(lambda arrays: {name: 3 * value.T for name, value in arrays.items()}, shapes)
    assert all(found.link(name).source == name for name in shapes)


PER_LAYER = {
    "factor": lambda layer, value: (3 if layer < 3 else 4) * value.T,
    "source": lambda layer, value: 3 * value.T,
    "order": lambda layer, value: 3 * (value.T if layer < 3 else value),
    "offset": lambda layer, value: 3 * value.T + (layer == 3),
}


# The order within a stack that is too large to look at is taken from its first layer (docs/formats.md).
@pytest.mark.parametrize(("name", "large"), [(n, big) for n in PER_LAYER for big in (0, 1) if (n, big) != ("order", 1)])
def test_a_layer_that_is_treated_otherwise_is_not_taken_for_its_neighbour(name, large, monkeypatch):
    """Squares; then stacks of experts, too large to look at each element of."""
    monkeypatch.setattr("mlx_rsgwm.converters.weight_map.LARGE", 8 if large else 1 << 26)
    shapes = {f"layers.{i}.{expert}.weight": (4, 4) for i in range(4) for expert in ("a", "b")}
    rng = np.random.default_rng(3)
    arrays = {key: mx.array(rng.standard_normal(shape).astype(np.float32)) for key, shape in shapes.items()}

    def sanitize(values):
        made = {}
        for layer in range(4):
            pair = [PER_LAYER[name](layer, values[f"layers.{layer}.{expert}.weight"]) for expert in ("a", "b")]
            swapped = name == "source" and layer == 3
            made[f"layers.{layer}.both"] = mx.stack(pair[::-1] if swapped else pair)
        return made

    found, expected = WeightMap(sanitize, shapes), sanitize(arrays)
    for parameter, value in expected.items():
        link = found.link(parameter)
        if link is None:
            continue  # refused by name
        blocks = []
        for (part,) in link.parts:
            source = np.array(arrays[part.source])
            blocks.append((source.T if part.transposed else source)[part.rows])
        scale = np.reshape(link.scale, (-1, *np.shape(link.scale)[1:], 1)) if np.ndim(link.scale) else link.scale
        np.testing.assert_allclose(np.stack(blocks) * scale, np.array(value), rtol=1e-6)
    assert sum(found.link(parameter) is not None for parameter in expected) >= 3


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_shifted_parameter_goes_back_without_being_rounded(dtype):
    link = WeightMap(changed("layers.0.norm.weight", lambda value: value + 1.0), SHAPES).link("layers.0.norm.weight")
    value = mx.array([0.003, 1.0, 1.25, 0.5, -0.001, 3.0]).astype(dtype)
    back = link.undo(value)
    assert mx.array_equal((back.astype(mx.float32) + 1).astype(dtype), value)
    assert back.dtype == mx.float32
    exact = link.undo(mx.array([1.0, 1.25, 0.5, 1.5, 2.0, 0.75]).astype(dtype))
    assert exact.dtype == dtype


@pytest.mark.parametrize("limit", [8, 1 << 26])
def test_markers_of_computed_stacks_do_not_stay_in_memory(limit, monkeypatch):
    monkeypatch.setattr("mlx_rsgwm.converters.weight_map.LARGE", limit)
    shapes = {f"layers.{i}.experts.{j}.up.weight": (256, 128) for i in range(12) for j in range(2)}

    def sanitize(arrays):
        experts = {i: [arrays[f"layers.{i}.experts.{j}.up.weight"] for j in range(2)] for i in range(12)}
        return {f"layers.{i}.switch.up.weight": mx.stack(pair) for i, pair in experts.items()}

    found = WeightMap(sanitize, shapes)
    names = found.names()
    assert found.link(names[0]) is not None
    before = mx.get_active_memory()
    for name in names:
        link = found.link(name)
        assert [part.source for (part,) in link.parts] == [
            name.replace("switch", f"experts.{expert}") for expert in range(2)
        ]
    assert mx.get_active_memory() - before < 256 * 128 * 2 * 4  # less than one stack


@pytest.mark.parametrize(
    ("change", "name"),
    [(split, "layers.0.a.weight"), (split, "layers.0.b.weight"), (stack, "layers.0.switch.up.weight"),
     (halves, "gate"), (halves, "up"), (scaled_halves, "up")],
)  # fmt: skip
def test_a_changed_part_put_back_comes_out_of_sanitize(change, name, arrays):
    value = mx.random.normal(change(dict(arrays))[name].shape)
    others = {other: kept for other, kept in change(dict(arrays)).items() if other != name}
    link = WeightMap(change, SHAPES).link(name)
    assert link is not None
    assert link.axes is None
    put_parts(arrays, link, value)
    after = change(dict(arrays))
    np.testing.assert_allclose(np.array(after.pop(name)), np.array(value), rtol=1e-6)
    assert all(mx.array_equal(after[other], others[other]).item() for other in others)
