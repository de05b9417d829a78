"""Calibrations: what is picked, what is kept in the file, what is refused."""

import json

import numpy as np
import pytest

from mlx_rsgwm.core.errors import CheckFailed, RsgwmError
from mlx_rsgwm.core.scoring import area_under_roc, calibration_error
from mlx_rsgwm.evaluation.calibration_set import explain
from mlx_rsgwm.inference.calibration import (
    FILE,
    best_threshold,
    load_calibration,
    save_calibration,
)
from mlx_rsgwm.inference.calibration_fit import Judged, fit, halves
from mlx_rsgwm.inference.draft import Signals
from mlx_rsgwm.inference.policy import accepts
from mlx_rsgwm.inference.risk_control import Target


def drawn(count, yesno=0.5, logprob=1.0, minimum=1.0, attempts=3, seed=0):
    """Drafts of items of different difficulty; each signal separates as strongly as told."""
    rng = np.random.default_rng(seed)
    signals, correct = [], []
    for chance in rng.beta(0.8, 0.8, count):
        labels = rng.random(attempts) < chance
        said = 1 / (1 + np.exp(-(rng.standard_normal(attempts) + yesno * (labels - 0.5))))
        mean = -0.05 * np.exp(rng.standard_normal(attempts) - logprob * labels)
        low = -1.0 * np.exp(rng.standard_normal(attempts) - minimum * labels)
        signals.append([Signals(*map(float, row), 12) for row in zip(said, mean, low, strict=True)])
        correct.append([bool(label) for label in labels])
    return Judged(signals, correct)


def test_the_best_score_is_picked_and_the_combination_beats_its_parts():
    found = fit(drawn(150, yesno=1.5, logprob=1.5, minimum=1.5))
    assert found.score == "combined"
    assert found.auroc["combined"] > max(found.auroc["yesno"], found.auroc["mean_logprob"])
    assert (found.items, found.drafts) == (150, 450)
    assert fit(drawn(150, yesno=6.0, logprob=0.0, minimum=0.0), method="none").auroc["yesno"] > 0.95
    named = fit(drawn(150, yesno=1.5, logprob=1.5, minimum=1.5), score="yesno")
    assert named.score == "yesno"
    assert named.scores == ("yesno", "mean_logprob", "combined")
    assert fit(drawn(150, yesno=1.5, logprob=3.0), scores=("yesno", "mean_logprob")).score == "mean_logprob"


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic", "auto"])
def test_calibration_brings_scores_near_the_truth_on_unseen_items(method):
    found = fit(drawn(200), score="mean_logprob", method=method)
    unseen = drawn(500, seed=1)
    signals, labels, _ = unseen.flat
    raw = found.scorer("mean_logprob").values(signals)
    values = [found.probability("mean_logprob", value) for value in raw]
    assert area_under_roc(values, labels) == pytest.approx(area_under_roc(raw, labels))
    if method != "temperature":  # which has no intercept to bring exp(mean log-probability) down with
        assert calibration_error(values, labels) < 0.06 < calibration_error(raw, labels)
    told = found.reliability["mean_logprob"]
    assert told.ece_after == pytest.approx(calibration_error(values, labels), abs=0.05)
    assert told.ece_before == pytest.approx(calibration_error(raw, labels), abs=0.05)
    assert told.brier_after < told.brier_before


def test_what_is_said_of_a_fit_is_not_said_by_the_fit():
    """Signals without any information: in-sample the combination would seem to know something."""
    found = [fit(drawn(20, 0, 0, 0, seed=seed)).auroc["combined"] for seed in range(8)]
    assert np.mean(found) < 0.53


def test_threshold_by_hand():
    correct = [True, True, False, False, True, False]
    assert best_threshold([0.9, 0.8, 0.3, 0.4, 0.7, 0.1], correct) == 0.7
    assert best_threshold([0.5, 0.6], [True, True]) == 0.0
    assert best_threshold([0.5, 0.6], [False, False]) == 1.0
    assert [accepts(score, 1.0) for score in (0.999, 1.0)] == [False, True]  # no threshold refuses a score of 1


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7, 1.0])
def test_one_rule_accepts_scores_one_by_one_and_all_together(threshold):
    scores = np.array([[0.0, 0.5, 0.7], [0.7, 1.0, np.nextafter(0.7, 0)]])
    together = accepts(scores, threshold)
    assert together.tolist() == [[accepts(score, threshold) for score in row] for row in scores.tolist()]


def test_few_drafts_or_one_class_fit_nothing():
    only_right = Judged([[Signals(0.5, -0.1, -0.2, 3)]], [[True]])
    pair = [Signals(0.9, -0.5, -1.0, 3), Signals(0.1, -0.1, -0.2, 3)]
    found = fit(only_right, Judged([pair], [[True, False]]))
    assert found.score == "yesno"  # gold against perturbed gold decides
    assert (found.threshold, found.curves, found.auroc["yesno"]) == (0.0, {}, None)
    assert found.probability("yesno", 0.5) is None
    assert found.scores == ("yesno", "mean_logprob")
    for options in ({"score": "combined"}, {"method": "platt"}):
        with pytest.raises(RsgwmError, match=r"8 right and as many wrong drafts.*found 1 right and 0 wrong"):
            fit(only_right, **options)
    with pytest.raises(CheckFailed):
        fit(only_right, target=Target(0.1))


def test_names_are_checked():
    with pytest.raises(RsgwmError, match="score must be auto or one of"):
        fit(drawn(5), score="vibes")
    with pytest.raises(RsgwmError, match="method must be auto, none"):
        fit(drawn(5), method="magic")


def test_a_risk_bound_is_tested_on_items_that_decided_nothing():
    drafts = drawn(300, 2.0, 2.0, 2.0)
    found = fit(drafts, target=Target(0.2))
    assert found.risk_bound is not None
    assert found.threshold == found.risk_bound.threshold
    first, second = halves(300, 42)
    assert sorted([*first, *second]) == list(range(300))
    accepted, wrong = drafts.take(second).scored(found.scorer(found.score)).counts(found.threshold)
    assert (accepted, wrong) == (found.risk_bound.accepted, found.risk_bound.wrong)
    # What the test half says must not reach the score: turned labels there change nothing but the risk bound.
    turned = Judged(
        drafts.signals,
        [[not label for label in item] if index in set(second) else item for index, item in enumerate(drafts.correct)],
    )
    with pytest.raises(CheckFailed, match="test items cannot bound"):
        fit(turned, target=Target(0.2))


def test_drafts_that_a_check_refuses_are_not_accepted_in_the_bound():
    drafts = drawn(300, 2.0, 2.0, 2.0)
    with pytest.raises(CheckFailed):
        fit(drafts, target=Target(0.03))
    refused = [[not right for right in item] for item in drafts.correct]  # a check that finds every wrong draft
    found = fit(Judged(drafts.signals, drafts.correct, refused, "auto"), target=Target(0.03))
    assert found.risk_bound is not None
    assert (found.risk_bound.wrong, found.risk_bound.check) == (0, "auto")
    assert found.curves == fit(Judged(drafts.signals, drafts.correct), target=Target(0.3)).curves
    with pytest.raises(CheckFailed):  # nothing is accepted at all
        fit(
            Judged(drafts.signals, drafts.correct, [[True] * len(item) for item in drafts.correct], "auto"),
            target=Target(0.3),
        )
    with pytest.raises(ValueError, match="the same drafts"):
        Judged(drafts.signals, drafts.correct, refused[1:], "auto")


def test_the_file_holds_everything(tmp_path):
    for options in ({}, {"method": "isotonic", "score": "yesno"}, {"target": Target(0.3)}):
        found = fit(drawn(120, 2.0, 2.0, 2.0), made_for={"base": "abc", "attempts": 3}, **options)
        save_calibration(tmp_path, found)
        again = load_calibration(tmp_path)
        assert again == found
        signals, _, _ = drawn(20, seed=3).flat
        one, other = again.scorer(again.score), found.scorer(found.score)
        assert one.values(signals).tolist() == other.values(signals).tolist()
    written = json.loads((tmp_path / "calibration.json").read_text())
    written["promise"] = written.pop("risk_bound")  # as earlier versions wrote it
    (tmp_path / "calibration.json").write_text(json.dumps(written))
    assert load_calibration(tmp_path) == found
    assert again.differences({"base": "abc", "attempts": 3}) == []
    assert again.differences({"base": "other", "attempts": 3, "more": 1}) == ["base"]
    assert load_calibration(tmp_path / "nowhere") is None


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """What a file of a calibration holds."""
    folder = tmp_path_factory.mktemp("stored")
    save_calibration(folder, fit(drawn(60)))
    return json.loads((folder / FILE).read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "something"}, "not a calibration of this version"),
        ({"format_version": 99}, "not a calibration of this version"),
        ({"threshold": 1.5}, "threshold must be in"),
        ({"threshold": "high"}, "threshold"),
        ({"score": "vibes"}, "score must be one of"),
        ({"drafts": None}, "drafts"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"score": "combined", "combination": None}, "there is no combination"),
        ({"curves": {"vibes": {"method": "platt"}}}, "score must be one of"),
        ({"curves": {"yesno": {"method": "platt", "slope": -2}}}, "json: calibration curve: slope must be above 0"),
        ({"correct": 10**6}, "1000000 right of .* drafts"),
        ({"items": -1}, "drafts of -1 items cannot be"),
        ({"auroc": {"yesno": 5}}, r"auroc of yesno must be in \[0, 1\], found 5"),
        (
            {
                "risk_bound": {
                    **dict.fromkeys(("threshold", "far", "bound"), 0.5),
                    "confidence": 7,
                    "attempts": 1,
                    "items": 5,
                    "accepted": 3,
                    "wrong": 0,
                }
            },
            "risk bound: confidence 7.0 after 1 attempts cannot be",
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, stored, change, message):
    (tmp_path / FILE).write_text(json.dumps({**stored, **change}))
    with pytest.raises(RsgwmError, match=message):
        load_calibration(tmp_path)


def test_what_the_first_runs_wrote_is_still_read(tmp_path):
    former = {
        "score": "mean_logprob",
        "threshold": 0.85,
        "auroc": {"yesno": 0.4, "mean_logprob": 0.82},
        "perturbed_auroc": {"yesno": 0.44, "mean_logprob": None},
        "drafts": 96,
        "correct": 40,
        "template_hash": "abc",
    }
    (tmp_path / FILE).write_text(json.dumps(former))
    found = load_calibration(tmp_path)
    assert (found.score, found.threshold, found.scores) == ("mean_logprob", 0.85, ("yesno", "mean_logprob"))
    (tmp_path / FILE).write_text(json.dumps({"score": "yesno", "threshold": 0.5}))
    with pytest.raises(RsgwmError, match="rsgwm calibrate"):
        load_calibration(tmp_path)


def test_yesno_at_chance_is_not_offered_and_that_is_told():
    useless = drawn(60, yesno=0.0, logprob=0.0, minimum=0.0)
    found = fit(useless, scores=("yesno", "mean_logprob"))
    assert (found.score, found.at_chance) == ("mean_logprob", ("yesno",))
    assert fit(useless, scores=("yesno",)).score == "yesno"  # asked for alone: nothing else could be taken
    assert fit(useless, score="yesno").at_chance == ()
    better = fit(drawn(60, yesno=3.0, logprob=0.0), scores=("yesno", "mean_logprob"))
    assert (better.score, better.at_chance) == ("yesno", ())
    assert "yesno not offered (no better than chance" in explain(found)
    assert "not offered" not in explain(better)


def test_yesno_ahead_by_luck_alone_is_not_taken():
    lucky = next(
        candidate
        for candidate in (drawn(12, yesno=0.0, logprob=0.0, seed=seed) for seed in range(40))
        if (areas := fit(candidate, score="yesno").auroc)["yesno"] > max(0.55, areas["mean_logprob"])
    )
    assert fit(lucky, scores=("yesno", "mean_logprob")).score == "mean_logprob"
