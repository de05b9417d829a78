"""Several adapters as the verifier, however a shell hands them over: ask, calibrate, eval."""

import json

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.evaluation import judging
from mlx_rsgwm.evaluation.records import DraftRecord
from mlx_rsgwm.evaluation.report.folder import read_items
from mlx_rsgwm.inference.calibration import load_calibration
from mlx_rsgwm.models.adapter import Adapter

NAMES = ("change", "groups", "prices")
LOOP = ("--attempts", 2, "--max-tokens", 6)
QUESTION = "What is 2 + 2?"


def invoke(*arguments):
    return CliRunner().invoke(rsgwm, [str(argument) for argument in arguments])


def result_of(*arguments):
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture
def folder(make_adapter, tmp_path, monkeypatch):
    """A drafter and a pool; calibrations of pools are kept in a cache of this test."""
    monkeypatch.setenv("RSGWM_CACHE", str(tmp_path / "cache"))
    for seed, name in enumerate(("drafter", *NAMES)):
        adapter = make_adapter(seed)
        adapter.manifest["data"] = {"hash": name}
        adapter.save(tmp_path / ("pool" if seed else "") / name)
    return tmp_path


@pytest.fixture
def half_right(monkeypatch):
    """A tiny random model answers nothing right; let every draft with an even number of letters count as right."""

    def judge(question, draft, scores, verified=None, *more):
        return DraftRecord(draft.text, "1", len(draft.text) % 2 == 0, scores, verified=verified or {})

    monkeypatch.setattr(judging, "judge", judge)


def ask(folder, *verifier):
    return result_of("ask", *LOOP, "--drafter", folder / "drafter", "--verifier", *verifier, "--threshold", 1)


def test_however_a_pool_is_given_it_says_the_same(folder):
    pool = [folder / "pool" / name for name in NAMES]
    expected, told = ask(folder, *pool, QUESTION)
    assert "(change 0." in told or "(groups 0." in told or "(prices 0." in told
    for step in expected["steps"]:
        assert set(step["adapters"]) == set(NAMES)
        assert step["won"] == max(step["adapters"], key=step["adapters"].get)
        assert step["score"] == max(step["adapters"].values())
    assert len({step["won"] for step in expected["steps"]} | {expected["score"]}) > 1
    for given in (
        [*reversed(pool), QUESTION],
        [pool[0], "--verifier", pool[2], QUESTION, "--verifier", pool[1]],
        [folder / "pool" / "*", QUESTION],
        [folder / "pool", QUESTION],
        [folder / "pool", pool[1], "--quiet", QUESTION],  # one of them twice
    ):
        assert ask(folder, *given)[0] == expected
    assert "groups are the same adapter, which verifies once" in ask(folder, folder / "pool", pool[1], QUESTION)[1]
    mean, _ = ask(folder, folder / "pool", "--combine", "mean", QUESTION)
    for step in mean["steps"]:
        assert step["score"] == pytest.approx(sum(step["adapters"].values()) / len(NAMES))
    single, told = ask(folder, pool[1], QUESTION)
    assert all("adapters" not in step for step in single["steps"])


def test_calibrate_then_ask_then_eval(folder, half_right):
    pool = [folder / "pool" / name for name in NAMES]
    kept = ("--task", "change", "--items", 16, "--drafts-file", folder / "held.jsonl", "--curve", "platt")
    written, made = [], {}
    for combine, given in (("max", pool), ("learned", pool[::-1])):
        pair = ("--drafter", folder / "drafter", "--verifier", *given, "--combine", combine, *LOOP)
        made[combine], _ = result_of("calibrate", *pair, *kept)
        assert made[combine]["made_for"]["combine"] == combine
        assert len(made[combine]["made_for"]["verifier"]) == 3
        stored = load_calibration(folder / "cache" / "calibrations" / made[combine]["out"].rpartition("/")[2])
        assert stored.threshold == made[combine]["threshold"]
        written.append((folder / "held.jsonl").stat().st_mtime_ns)
    assert made["max"]["out"] != made["learned"]["out"]
    assert written[0] == written[1], "another rule takes the drafts that are there"
    assert "learned" not in made["max"]
    assert set(made["learned"]["learned"]) == {"yesno", "mean_logprob", "combined"}

    for combine, result in made.items():
        pair = ("--drafter", folder / "drafter", "--verifier", *pool, "--combine", combine, *LOOP)
        answer, told = result_of("ask", QUESTION, *pair)
        assert (answer["threshold"], answer["score_name"]) == (result["threshold"], result["score"])
        assert "calibrated with another" not in told
        assert set(answer["steps"][0]["adapters"]) == set(NAMES)

    pair = ("--drafter", folder / "drafter", "--verifier", folder / "pool", *LOOP)
    report, _ = result_of("eval", *pair, "--task", "change", "--items", 4, "--timed", 0, "--out", folder / "report")
    assert (report["score"], report["threshold"]) == (made["max"]["score"], made["max"]["threshold"])
    assert set(report["metadata"]["adapters"]["verifier"]) == set(NAMES)
    for item in read_items(folder / "report" / "items.jsonl"):
        for draft in item.drafts:
            assert set(draft.scores) <= set(draft.adapters) == {"yesno", "mean_logprob", "combined"}
            for score, values in draft.adapters.items():
                assert draft.won[score] == max(values, key=values.get)
            assert draft.scores["yesno"] == max(draft.adapters["yesno"].values())
            assert draft.verified["mean_logprob"] % 3 == 0


def test_what_cannot_verify_is_refused_in_one_line(folder, make_base_of, make_adapter):
    (folder / "empty").mkdir()
    pool = folder / "pool"
    other = Adapter.load(pool / "change")
    other.manifest["base"] = {**other.manifest["base"], "fingerprint": "0" * 64, "name": "another"}
    other.save(folder / "stranger")
    merged = Adapter.load(pool / "change")
    merged.manifest["merge"] = {"role": "draft", "sources": []}
    merged.save(folder / "to-draft")
    for verifier, message in (
        ([pool / "x*"], "x* matches nothing"),
        ([folder / "empty"], "empty holds no adapters.safetensors"),
        ([pool, folder / "stranger"], "stranger for another"),
        ([pool, folder / "to-draft"], "to-draft was merged to draft, not to verify"),
        ([pool / "change", "--combine", "mean"], "combine mean takes a verifier of several adapters"),
        ([pool, "--combine", "learned"], "rsgwm calibrate --combine learned"),
        ([pool, "--combine", "sum"], "'sum' is not one of its values"),
        ([pool / "change", folder / "nowhere"], "nowhere"),
    ):
        done = invoke("ask", *LOOP, "--quiet", "--drafter", folder / "drafter", QUESTION, "--verifier", *verifier)
        assert done.exit_code == 2, done.output
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
