"""Averages of checkpoints against a float64 transcription; what choosing costs; bad settings."""

import json
import math

import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.training.average_choice import _chosen, candidates, choose
from mlx_rsgwm.training.average_weights import (
    AverageOptions,
    average_ranks,
    effective_count,
    loss_weights,
    step_weights,
)
from mlx_rsgwm.training.averaging import average, mean_of, mean_weights, weigh
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.loop import finish, train
from mlx_rsgwm.training.run_checkpoints import run_checkpoints
from tests.training.averaged_runs import invoke, numbers, reference_weights


def reference_product(arrays, weights, scale, rank):
    """The best rank-r approximation of Σ w ΔW, dense, float64."""
    dense = sum(
        w * scale * a.astype(np.float64) @ b.astype(np.float64) for w, (a, b) in zip(weights, arrays, strict=True)
    )
    u, sigma, vt = np.linalg.svd(dense)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank], (sigma[rank:] ** 2).sum()


@pytest.mark.parametrize(("penalty", "power"), [(0.7, 1.0), (0.5, 0.0), (1.0, 2.5), (1.0, 0.0), (0.9, 400.0)])
def test_weights_are_those_of_a_transcription(penalty, power):
    losses, steps = [1.5, 0.4, 0.9, 0.4, 2.0], [10, 20, 30, 45, 60]
    np.testing.assert_allclose(
        loss_weights(losses, penalty, power), reference_weights(losses, penalty, power), rtol=1e-9, atol=1e-300
    )
    np.testing.assert_allclose(
        step_weights(steps, penalty, power), reference_weights(steps, penalty, power, True), rtol=1e-9, atol=1e-300
    )


def test_ties_share_their_rank_and_effective_counts_are_the_known_ones():
    assert average_ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [2.5, 0.0, 2.5, 1.0]
    for penalty, count in ((0.5, 2.99), (0.7, 5.36), (0.9, 9.18), (1.0, 10.0)):
        weights = step_weights(range(1, 11), penalty, 0.0)
        assert effective_count(weights) == pytest.approx(count, abs=0.005)
    assert loss_weights([0.0, 1.0], 1.0, 1.0)[0] == pytest.approx(1.0)  # a loss of 0 is floored, not divided by


@pytest.mark.parametrize(("metric", "penalty", "power", "last"), [
    ("loss", 0.7, 1.0, 0), ("steps", 0.5, 1.0, 0), ("train-loss", 1.0, 0.0, 4),
])  # fmt: skip
def test_the_mean_of_factors_and_importances_is_that_of_float64(run, tmp_path, metric, penalty, power, last):
    arrays, losses = numbers(run)
    arrays, losses = arrays[-last:], losses[-last:]
    steps = [2 * (1 + place) for place in range(7)][-last:]
    weights = reference_weights(steps if metric == "steps" else losses, penalty, power, metric == "steps")
    averaged = average(run, tmp_path / "out", metric=metric, penalty=penalty, power=power, last=last)
    read = Adapter.load(tmp_path / "out")
    for name, value in {**read.weights, **read.importance}.items():
        expected = sum(weight * each[name] for weight, each in zip(weights, arrays, strict=True))
        error = np.linalg.norm(np.array(value, dtype=np.float64) - expected) / np.linalg.norm(expected)
        assert error < 1e-6, name
    assert {name.partition("/")[0] for name in read.importance} == {"all", "draft", "verify"}
    told = averaged.manifest["average"]
    assert told["metric"] == ("steps" if metric == "steps" else "train-loss")
    assert [row["weight"] for row in told["checkpoints"]] == pytest.approx(weights)
    assert told["effective"] == pytest.approx(1 / sum(weight**2 for weight in weights))
    finished = Adapter.load(run)
    assert read.manifest["kind"] == "averaged"
    assert read.manifest["base"] == finished.manifest["base"]
    assert read.directions.keys() == finished.directions.keys()  # the run's own, bound to the new weights
    assert read.init.keys() == finished.init.keys()
    states = [path / "prompt_states.safetensors" for path in (run, tmp_path / "out")]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_the_mean_of_products_is_that_of_float64_and_the_cosine_is_told(run, tmp_path):
    arrays, losses = numbers(run)
    weights = reference_weights(losses, 0.7, 1.0)
    told = average(run, tmp_path / "product", space="product").manifest["average"]
    factors = average(run).manifest["average"]
    read = Adapter.load(tmp_path / "product")
    scale, rank = read.spec.scale, read.spec.rank
    dot = of_factors = of_products = lost = 0.0
    for module, a, b in read.factors():
        pairs = [(each[f"{module}.lora_a"], each[f"{module}.lora_b"]) for each in arrays]
        expected, discarded = reference_product(pairs, weights, scale, rank)
        made = scale * np.array(a, dtype=np.float64) @ np.array(b, dtype=np.float64)
        assert np.linalg.norm(made - expected) < 1e-6 * np.linalg.norm(expected)
        mean_a, mean_b = (sum(w * pair[i] for w, pair in zip(weights, pairs, strict=True)) for i in (0, 1))
        product = scale * mean_a @ mean_b
        dot, lost = dot + (product * expected).sum(), lost + discarded
        of_factors, of_products = of_factors + (product**2).sum(), of_products + (expected**2).sum()
    assert told["cosine_factor_product"] == pytest.approx(dot / math.sqrt(of_factors * of_products), abs=1e-6)
    assert factors["cosine_factor_product"] == told["cosine_factor_product"]
    assert told["discarded"] == pytest.approx(lost / (of_products + lost), abs=1e-6)
    assert not read.importance  # of other factors it says nothing
    assert not read.init


def test_validation_loss_goes_first_where_every_checkpoint_has_it(base, corpus, config, tmp_path):
    saving = Saving(tmp_path / "run", every=2, keep=9, snapshots=())
    held = corpus
    finish(train(base, corpus, config(), held, saving=saving), saving)
    averaged = average(tmp_path / "run")
    assert averaged.manifest["average"]["metric"] == "validation-loss"
    scored = [row["validation_loss"] for row in averaged.manifest["average"]["checkpoints"]]
    assert [row["weight"] for row in averaged.manifest["average"]["checkpoints"]] == pytest.approx(
        reference_weights(scored, 0.7, 1.0)
    )


def test_dora_is_averaged_by_its_factors_and_magnitudes(base, corpus, config, tmp_path):
    saving = Saving(tmp_path / "run", every=2, keep=9, snapshots=())
    finish(train(base, corpus, config(fine_tune_type="dora", learning_rate=1e-2), saving=saving), saving)
    averaged = average(tmp_path / "run", penalty=1.0, power=0.0)
    arrays, _ = numbers(tmp_path / "run")
    for name in (name for name in averaged.weights if name.endswith(".m")):
        expected = sum(each[name] for each in arrays) / len(arrays)
        np.testing.assert_allclose(np.array(averaged.weights[name]), expected, rtol=1e-6)
    with pytest.raises(RsgwmError, match="no plain product"):
        average(tmp_path / "run", space="product")


def test_the_command_prints_weights_and_warns_of_few(run, tmp_path):
    done = invoke("average", run, "--out", tmp_path / "out", "--penalty", 0.1, "--power", 3, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["effective"] < 2
    assert "warning: the average is worth 1." in done.stderr
    assert "step-000014" in done.stderr
    again = invoke("average", run, "--out", tmp_path / "out")
    assert again.exit_code == 2
    assert "already holds a finished adapter" in again.stderr


def test_choosing_tries_every_setting_and_says_what_it_costs(run, base, corpus, tmp_path):
    checkpoints = run_checkpoints([run])
    rows, _ = corpus.token_rows(base.tokenizer, 1024, "drop")
    choice = choose(base, checkpoints, rows, AverageOptions(), fixed=("power",))
    assert choice.settings == len(candidates(7, AverageOptions(), ("power",))) == 12
    assert choice.options.power == 1.0
    assert choice.loss <= choice.nested + 1e-9  # on these rows no other setting is better
    done = invoke(
        "average",
        run,
        "--out",
        tmp_path / "out",
        "--choose",
        corpus.folder if hasattr(corpus, "folder") else tmp_path / "corpus",
        "--json",
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["penalty"] == told["choice"]["penalty"]
    assert "NOT NEW" in done.stderr  # the run was trained on these rows


@pytest.mark.parametrize("space", ["factor", "product"])
def test_what_choosing_scores_is_the_average(run, space):
    options = AverageOptions(space=space)
    weighted = weigh(run_checkpoints([run]), options)
    expected = mean_of(weighted, options).weights
    scored = mean_weights(weighted, options).weights
    assert list(scored) == list(expected)
    for name, value in scored.items():
        assert (value == expected[name]).all().item()


def test_choosing_on_the_rows_that_weigh_is_told(base, corpus, config, tmp_path):
    saving = Saving(tmp_path / "run", every=2, keep=20, snapshots=())
    settings = config(epochs=1, learning_rate=1e-2)
    finish(train(base, corpus, settings, corpus, progress=Progress(), saving=saving), saving)
    done = invoke("average", tmp_path / "run", "--choose", tmp_path / "corpus", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "validation losses are of these rows" in done.stderr
    done = invoke(
        "average",
        tmp_path / "run",
        "--choose",
        tmp_path / "corpus",
        "--metric",
        "steps",
        "--out",
        tmp_path / "by-steps",
    )
    assert "validation losses are of these rows" not in done.stderr


def test_the_nested_split_finds_a_choice_by_chance():
    """Settings that differ by noise alone: the best looks better than it is, and the nested loss does not."""
    rng = np.random.default_rng(0)
    gaps = []
    for trial in range(400):
        nats = np.vstack([np.ones((2, 60)), 1 + rng.normal(0, 1, (30, 60))])
        chosen = _chosen([AverageOptions()] * 30, nats, np.ones(60, dtype=np.int64), trial)
        gaps.append((chosen.loss, chosen.nested))
    apparent, nested = np.mean(gaps, axis=0)
    assert apparent < 0.8
    assert abs(nested - 1) < 0.02  # three standard errors


@pytest.mark.parametrize(("arguments", "message"), [
    (["--penalty", "0"], "--penalty"), (["--penalty", "1.1"], "--penalty"), (["--penalty", "nan"], "--penalty"),
    (["--power", "-1"], "--power"), (["--last", "1"], "last = 1 is not 0 (all) or at least 2"),
    (["--last", "9"], "the last 9 checkpoints are asked for, and there are 7"),
    (["--metric", "validation-loss"], "there are train-loss, steps"),
])  # fmt: skip
def test_bad_settings_are_refused_in_a_line(run, tmp_path, arguments, message):
    done = invoke("average", run, "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 4
    assert not (tmp_path / "out").exists()


def test_a_choice_that_the_newest_checkpoint_matches_is_told():
    nats = np.ones((3, 20))  # the newest, the uniform mean, one setting
    counts = np.ones(20, dtype=np.int64)
    assert (
        "the newest checkpoint alone is no worse: loss 1.0000" in _chosen([AverageOptions()], nats, counts, 0).warning
    )
    nats[0] = 1.001
    assert _chosen([AverageOptions()], nats, counts, 0).warning == ""


def test_a_mean_of_products_tells_that_it_has_no_importance(run, tmp_path):
    told = "an average of products has no importance"
    assert told in invoke("average", run, "--space", "product", "--out", tmp_path / "product").stderr
    assert told not in invoke("average", run, "--out", tmp_path / "factor").stderr


def test_many_equal_losses_with_a_tiny_penalty_share_the_weight():
    assert loss_weights([1.0] * 9 + [2.0], 1e-90, 1.0) == pytest.approx([1 / 9] * 9 + [0.0])
    assert step_weights([5] * 9 + [1], 1e-90, 1.0) == pytest.approx([1 / 9] * 9 + [0.0])


def test_an_average_is_an_adapter_like_others(run, base, tmp_path):
    """It merges with another by importance and by directions, and its rows are known."""
    from mlx_rsgwm.data.row_hashes import record_of
    from mlx_rsgwm.merging.merge import merge
    from mlx_rsgwm.merging.options import MergeOptions

    average(run, tmp_path / "averaged", progress=Progress())
    for method in ("rsgwm", "regmean", "linear"):
        merge([run, tmp_path / "averaged"], MergeOptions(method=method))
    averaged = Adapter.load(tmp_path / "averaged")
    assert record_of(averaged.manifest, "averaged") == record_of(Adapter.load(run).manifest, "run")
    assert averaged.base_problem(base.name, base.fingerprint) == ""


def test_weighing_leaves_checkpoints_in_order(run):
    weighted = weigh(run_checkpoints([run]), AverageOptions(last=3))
    assert [each.step for each in weighted.checkpoints] == [10, 12, 14]
    assert weighted.weights.sum() == pytest.approx(1.0)
