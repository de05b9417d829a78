"""``rsgwm calibrate`` and ``rsgwm data negatives`` on the tiny base."""

import json

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.data.corpus import load_corpus
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.evaluation import judging
from mlx_rsgwm.evaluation.records import DraftRecord
from mlx_rsgwm.inference.calibration import FILE, load_calibration


def invoke(*arguments):
    return CliRunner().invoke(rsgwm, [str(argument) for argument in arguments])


@pytest.fixture
def adapters(make_adapter, tmp_path):
    for seed, name in ((1, "drafter"), (2, "verifier")):
        make_adapter(seed).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def half_right(monkeypatch):
    """A tiny random model answers nothing right; let every draft with an even number of letters count as right."""

    def judge(question, draft, scores, *more):
        return DraftRecord(draft.text, "1", len(draft.text) % 2 == 0, scores)

    monkeypatch.setattr(judging, "judge", judge)


def calibrate(folder, base, *more):
    return invoke(
        "calibrate", "--base", base, "--drafter", folder / "drafter", "--verifier", folder / "verifier",
        "--task", "change", "--items", 16, "--attempts", 2, "--max-tokens", 6, "--drafts-file", folder / "held.jsonl",
        "--quiet", *more,
    )  # fmt: skip


def test_calibrate_then_ask_by_the_combined_score(adapters, tiny_base, half_right):
    made = calibrate(adapters, tiny_base, "--json", "--score", "combined", "--curve", "platt")
    assert made.exit_code == 0, made.stderr
    result = json.loads(made.stdout.splitlines()[-1])
    assert result["drafts"] == 32
    assert result["curves"]["combined"]["method"] == "platt"
    assert "ECE before" in made.stderr
    kept = load_calibration(adapters / "verifier")
    assert (kept.score, kept.threshold) == ("combined", result["threshold"])
    before = (adapters / "held.jsonl").stat().st_mtime_ns
    assert calibrate(adapters, tiny_base).exit_code == 0
    assert (adapters / "held.jsonl").stat().st_mtime_ns == before, "kept drafts are used again"

    assert calibrate(adapters, tiny_base, "--score", "combined").exit_code == 0
    asked = invoke(
        "ask", "What is 2 + 2?", "--base", tiny_base, "--drafter", adapters / "drafter",
        "--verifier", adapters / "verifier", "--max-tokens", 6, "--attempts", 2, "--json",
    )  # fmt: skip
    assert asked.exit_code == 0, asked.stderr
    answer = json.loads(asked.stdout.splitlines()[-1])
    assert answer["score_name"] == "combined"
    assert answer["threshold"] == load_calibration(adapters / "verifier").threshold
    assert "calibrated with another" not in asked.stderr
    other = invoke(
        "ask", "What is 2 + 2?", "--base", tiny_base, "--drafter", adapters / "drafter",
        "--verifier", adapters / "verifier", "--max-tokens", 6, "--attempts", 3, "--json",
    )  # fmt: skip
    assert "calibrated with another attempts (2, now 3); its threshold" in other.stderr
    assert "may not hold here; take --attempts 2, or calibrate again with: rsgwm calibrate" in other.stderr


def test_a_bound_that_cannot_be_held_leaves_the_verifier_alone(adapters, tiny_base, half_right):
    failed = calibrate(adapters, tiny_base, "--target-far", 0.05)
    assert failed.exit_code == 3
    assert "8 test items cannot bound the false-accept rate by 0.05" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    assert not (adapters / "verifier" / FILE).exists()
    assert (adapters / "held.jsonl").is_file(), "the drafts are kept, so another try costs nothing"
    easy = calibrate(adapters, tiny_base, "--target-far", 0.97, "--confidence", 0.6, "--json")
    assert easy.exit_code == 0, easy.stderr
    bound = json.loads(easy.stdout.splitlines()[-1])["risk_bound"]
    assert bound["bound"] <= 0.97
    assert (bound["items"], bound["check"]) == (8, "auto")
    assert calibrate(
        adapters, tiny_base, "--target-far", 0.97, "--confidence", 0.6, "--check", "none"
    ).exit_code == 0  # fmt: skip
    asked = invoke(
        "ask", "What is 2 + 2?", "--base", tiny_base, "--drafter", adapters / "drafter",
        "--verifier", adapters / "verifier", "--max-tokens", 6, "--attempts", 2,
    )  # fmt: skip
    assert "risk bound was tested with --check none, and drafts are now checked with auto" in asked.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--score", "mean_logprop"], "did you mean 'mean_logprob'?"),
        (["--curve", "magic"], "there are auto, none, temperature, platt, isotonic"),
        (["--target-far", 1.2], "not in the range 0<x<1"),
        (["--items", 0], "'--items': 0 is not in the range"),
        (["--attempts", 0], "'--attempts': 0 is not in the range"),
        (["--verifier", "nowhere"], "nowhere does not exist"),
    ],
)
def test_calibrate_refuses(adapters, tiny_base, options, message):
    found = calibrate(adapters, tiny_base, *options)
    assert found.exit_code == 2
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not (adapters / "held.jsonl").exists()


def negatives(folder, base, *more):
    return invoke(
        "data", "negatives", "--base", base, "--adapter", folder / "drafter", "--adapter", folder / "verifier",
        "--task", "change", "--task", "compare", "--verify-rows", 8, "--max-tokens", 6, "--out", folder / "corpus",
        "--quiet", *more,
    )  # fmt: skip


def test_negatives_makes_a_corpus(adapters, tiny_base):
    made = negatives(adapters, tiny_base, "--draft-rows", 3, "--offset", 5, "--json")
    assert made.exit_code == 0, made.stderr
    result = json.loads(made.stdout.splitlines()[-1])
    assert result["counts"] == {task: {"draft": 3, "verify": 8} for task in ("change", "compare")}
    assert result["negatives"]["change"] == {"drafts": 32, "right": 0, "drafted_pairs": 3, "perturbed_pairs": 1}
    corpus = load_corpus(adapters / "corpus")
    assert [row.correct for row in corpus.rows if row.role == "verify"] == [True, False] * 8
    known = {question.question for question in generate("change", 13, 42, "train")[5:]}
    assert {row.question for row in corpus.rows if row.task == "change"} <= known
    recorded = corpus.manifest["negatives"]
    assert [source["name"] for source in recorded["from"]] == ["drafter", "verifier"]
    assert all("adapters.safetensors" in source["files"] for source in recorded["from"])
    assert (recorded["share"], recorded["offset"], corpus.manifest["split"]) == (0.75, 5, "train")
    assert corpus.describe()["negatives"] == recorded  # what the manifest of an adapter trained on it will say
    refused = negatives(adapters, tiny_base, "--draft-rows", 3, "--offset", 5)
    assert refused.exit_code == 2
    assert "already holds a corpus; --replace it" in refused.stderr
    again = negatives(adapters, tiny_base, "--draft-rows", 3, "--offset", 5, "--replace", "--json")
    assert json.loads(again.stdout.splitlines()[-1])["hash"] == corpus.hash


def test_negatives_says_when_there_are_not_enough_mistakes(adapters, tiny_base, monkeypatch):
    monkeypatch.setattr(judging, "judge", lambda question, draft, *more: DraftRecord(draft.text, "1", True))
    made = negatives(adapters, tiny_base)
    assert made.exit_code == 0, made.stderr
    assert "3 more were to have a wrong draft, but there are no more" in made.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--verify-rows", 7], "must be even"),
        (["--share", 1.5], "not in the range 0<=x<=1"),
        (["--items", 0], "not in the range x>=1"),
        (["--draft-count", 0], "'--draft-count': 0 is not in the range"),
        (["--adapter", "nowhere"], "nowhere does not exist"),
        (["--template", "chat"], "another prompt template"),
    ],
)
def test_negatives_refuses(adapters, tiny_base, options, message):
    found = negatives(adapters, tiny_base, *options)
    assert found.exit_code == 2
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not (adapters / "corpus").exists()


@pytest.mark.parametrize("correct", [0, 32])
def test_a_calibration_that_saw_one_class_is_refused(adapters, tiny_base, half_right, correct):
    assert calibrate(adapters, tiny_base, "--score", "yesno", "--curve", "none").exit_code == 0
    path = adapters / "verifier" / FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "correct": correct}))
    pair = ("--drafter", adapters / "drafter", "--verifier", adapters / "verifier", "--attempts", 1, "--max-tokens", 2)
    refused = invoke("ask", "What is 2 + 2?", *pair)
    assert refused.exit_code == 2
    assert "drafts of which" in refused.stderr
    assert invoke("ask", "What is 2 + 2?", *pair, "--score", "yesno", "--threshold", "0.5").exit_code == 0
