"""``auto``: which method a pool gets, why, and what was given instead of a method's name."""

import json

import mlx.core as mx
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions, Override


def of(adapter, *, size=1.0, **without):
    """An adapter of another size, or without some of what it kept."""
    adapter.weights = {
        name: value * (size if name.endswith("lora_b") else 1) for name, value in adapter.weights.items()
    }
    for field, kept in without.items():
        setattr(adapter, field, kept)
    return adapter


def told(*adapters, **options):
    return merge(list(adapters), MergeOptions(**options)).manifest["merge"]


def test_the_best_that_every_adapter_has_what_it_needs_for(make_adapter):
    first, second = make_adapter(0), make_adapter(1)
    got = told(first, second)
    assert (got["method"], got["parameters"]["space"], got["parameters"]["signal"]) == ("rsgwm", "factor", "draft")
    assert got["chosen_because"] == "every adapter has importance, and not every one directions"
    assert told(first, second, role="verify")["parameters"]["tau"] == 0.5
    got = told(first, of(second, init={}))
    assert (got["method"], got["parameters"]["space"]) == ("rsgwm", "product")
    assert "products are merged" in got["chosen_because"]
    shared = {name: value for name, value in first.importance.items() if name.startswith("all/")}
    assert told(of(first, importance=shared), make_adapter(1))["parameters"]["signal"] == "all"
    got = told(of(first, importance={}), make_adapter(1))
    assert got["method"] == "linear"
    assert got["chosen_because"].startswith("not every adapter has directions or importance, and their norms are 1.0")
    got = told(first, of(make_adapter(1), size=3.0))
    assert got["method"] == "norm_equalised"
    assert got["chosen_because"].endswith("-fold apart")


def test_a_named_method_is_that_and_no_reason_is_kept(make_adapter):
    got = told(make_adapter(0), make_adapter(1), method="ties")
    assert got["method"] == "ties"
    assert "chosen_because" not in got


def test_the_chosen_merge_is_the_named_one_to_the_bit(make_adapter):
    adapters = [make_adapter(0), make_adapter(1)]
    chosen, named = (merge(adapters, MergeOptions(method)).weights for method in ("auto", "rsgwm"))
    assert all(mx.array_equal(value, named[name]).item() for name, value in chosen.items())


def test_parameters_and_weights_settle_it_too(make_adapter):
    pair = [make_adapter(0), make_adapter(1)]
    assert told(*pair, parameters={"tau": 0.6})["parameters"]["tau"] == 0.6
    with pytest.raises(RsgwmError, match="has no parameter 'definition'; name one that has: --method norm_equalised"):
        told(*pair, parameters={"definition": "geometric"})
    got = told(*pair, weights=(2.0, -1.0))
    assert got["method"] == "linear"
    assert got["chosen_because"].startswith("rsgwm would not take what was given; ")
    assert told(*pair, overrides=(Override("q_proj", {"tau": 0.2}),))["method"] == "rsgwm"
    assert told(*pair, role="critic")["method"] == "linear"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"density": 0.5}, "has no parameter 'density'; name one that has: --method ties, "),
        ({"tua": 0.5}, "did you mean 'tau' in the place of 'tua'"),
        ({"nothing": 1}, "rsgwm merge --list"),
    ],
)
def test_parameters_of_other_methods_are_refused_with_a_way_on(make_adapter, parameters, message):
    with pytest.raises(RsgwmError, match=message):
        told(make_adapter(0), make_adapter(1), parameters=parameters)


def test_a_merge_beside_its_own_sources_is_named(make_adapter, tmp_path):
    folders = [make_adapter(seed).save(tmp_path / f"a{seed}") for seed in range(3)]
    merged = merge(folders[:2], MergeOptions()).save(tmp_path / "m")
    (warning,) = told(merged, folders[1])["warnings"]
    expected = f"{merged} was merged from {folders[1]}, which counts again here; name the adapters to take"
    assert warning == expected
    path = folders[1] / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "collected": True}))  # as what is put beside it does
    (warning,) = told(merged, folders[1])["warnings"]
    assert warning == expected
    assert not told(merged, folders[2])["warnings"]


def test_directions_go_first(make_adapter):
    pair = [make_adapter(seed) for seed in range(2)]
    for adapter in pair:
        grams = {f"draft/{name}.gram": mx.eye(a.shape[0]) for name, a, _ in adapter.factors()}
        of(adapter, directions=grams, directions_metadata={"k": "0", "seed": "0", "tokens/draft": "50"})
    assert (told(*pair)["method"], told(*pair)["chosen_because"]) == (
        "regmean",
        "every adapter has directions of its layers' inputs",
    )
    assert told(*pair, role="verify")["method"] == "rsgwm"  # none of that role
    assert told(*pair, parameters={"tau": 0.4})["method"] == "rsgwm"
    assert told(of(pair[0], directions={}), pair[1])["method"] == "rsgwm"
