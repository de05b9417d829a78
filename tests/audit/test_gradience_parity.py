"""Every number of an audit beside gradience 0.11's, and where the two differ on purpose."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mlx_rsgwm.audit.pool_audit import audit
from mlx_rsgwm.audit.verdicts import IMBALANCED, PRESETS, SAFE, Verdict, verdict_of
from mlx_rsgwm.converters.peft.bulk import to_peft_verified

pytest.importorskip("torch")
pytest.importorskip("gradience")
CLOSE = {"rel": 1e-6, "abs": 1e-12}


def as_published(name):
    """Thresholds of one of our presets in gradience's tree: the spectral ratio, looked at last."""
    return replace(PRESETS[name], by="magnitude_ratio", imbalance_first=False)


@pytest.fixture
def folders(unlike, tmp_path):
    """The adapters as our folders and as PEFT's."""
    ours = [adapter.save(tmp_path / f"mlx-{index}") for index, adapter in enumerate(unlike)]
    for index, folder in enumerate(ours):
        to_peft_verified(folder, None, tmp_path / f"peft-{index}")
    return ours, [tmp_path / f"peft-{index}" for index in range(len(ours))]


def test_an_adapter_has_gradiences_numbers(folders):
    from gradience.vnext.audit import audit_lora_peft_dir

    for label, ours, peft in zip("012345", *folders, strict=True):
        theirs = audit_lora_peft_dir(peft, compute_udr=False)
        for source in (ours, peft):
            (adapter,) = audit([source]).adapters
            told = adapter.to_dict()
            for name in ("stable_rank_mean", "stable_rank_median", "stable_rank_weighted_mean", "effective_rank_mean"):
                assert told[name] == pytest.approx(getattr(theirs, name), **CLOSE), (label, name)
            assert told["utilisation_mean"] == pytest.approx(theirs.utilization_mean, **CLOSE)
            assert told["energy_rank_90_p50"] == theirs.energy_rank_90_p50
            assert told["energy_rank_90_p90"] == theirs.energy_rank_90_p90
            assert len(adapter.modules) == len(theirs.layers)
            for module in adapter.modules:
                (layer,) = [layer for layer in theirs.layers if layer.name.endswith(module.name)]
                assert module.stable_rank == pytest.approx(layer.stable_rank, **CLOSE)
                assert module.effective_rank == pytest.approx(layer.effective_rank, **CLOSE)
                ranks = [layer.energy_rank_90, layer.energy_rank_95, layer.energy_rank_99]
                assert [module.energy_rank(share) for share in (0.90, 0.95, 0.99)] == ranks


@pytest.mark.parametrize("preset", ["post", "conservative", "permissive"])
def test_a_pair_has_gradiences_numbers_and_verdicts(folders, preset):
    from gradience.vnext.merge import VerdictThresholds, merge_audit

    theirs_of = {"post": VerdictThresholds, "conservative": VerdictThresholds.conservative}
    thresholds = theirs_of.get(preset, VerdictThresholds.permissive)()
    ours, peft = folders
    audited, seen = audit(ours, as_published(preset)), set()
    for pair, (first, second) in zip(audited.pairs, combinations(peft, 2), strict=True):
        theirs = merge_audit(str(first), str(second), thresholds=thresholds)
        assert pair.verdict == theirs.aggregate["overall_verdict"]
        assert pair.mean_overlap == pytest.approx(theirs.aggregate["compatibility_score"], abs=5e-5)  # rounded there
        assert len(pair.modules) == len(theirs.layer_verdicts)
        for module in pair.modules:
            (layer,) = [each for each in theirs.layer_verdicts if each["layer_name"].endswith(module.name)]
            seen.add(layer["verdict"])
            check_module(module, layer, audited.thresholds)
    assert {"redundant", "conflicting"} < seen, "the adapters show too few kinds of pairs"


def check_module(module, layer, thresholds):
    metrics, told = layer["metrics"], module.to_dict()
    assert module.verdict.name == layer["verdict"]
    assert module.verdict.confidence == pytest.approx(layer["confidence"], **CLOSE)
    assert module.conflicts(thresholds) == layer["conflict_dimensions"]
    assert np.allclose(told["principal_cosines"], metrics["principal_angle_cosines"], rtol=1e-6, atol=1e-9)
    assert told["norms"] == pytest.approx([metrics["frobenius_norm_a"], metrics["frobenius_norm_b"]], **CLOSE)
    assert told["energy_ranks"] == [metrics["effective_rank_a"], metrics["effective_rank_b"]]
    assert told["stable_ranks"] == pytest.approx([metrics["stable_rank_a"], metrics["stable_rank_b"]], **CLOSE)
    names = {
        "mean_overlap": "mean_overlap",
        "max_overlap": "max_overlap",
        "agreement": "directional_agreement",
        "magnitude_ratio": "magnitude_ratio",
        "magnitude_bounded_ratio": "scale_bounded_ratio",
        "magnitude_log_ratio": "scale_log_ratio",
        "frobenius_ratio": "frobenius_ratio",
        "frobenius_bounded_ratio": "frob_bounded_ratio",
        "frobenius_log_ratio": "frob_log_ratio",
    }
    for ours, theirs in names.items():
        assert told[ours] == pytest.approx(metrics[theirs], **CLOSE), ours


def test_the_text_looks_at_the_norms_first_where_the_package_looks_at_overlap():
    """The deliberate difference: 0.11 calls disjoint directions safe, however unequal in size; the text does not."""
    ratios = {"magnitude_ratio": 30.0, "frobenius_ratio": 20.0}
    assert verdict_of(0.1, 0.0, ratios, as_published("post")) == Verdict(SAFE, 0.5)
    assert verdict_of(0.1, 0.0, ratios, PRESETS["post"]) == Verdict(IMBALANCED, 1.0)


def test_scale_is_in_our_singular_values(unlike):
    """gradience audits an adapter without its scale; ratios are the same, norms are the update's."""
    half = replace(unlike[0], spec=replace(unlike[0].spec, scale=unlike[0].spec.scale / 2))
    full, halved = audit([unlike[0], half]).adapters
    assert halved.norm == pytest.approx(full.norm / 2)
    assert halved.stable_rank_mean == pytest.approx(full.stable_rank_mean)
