"""A drafter and a verifier are compared by manifest, and their base by fingerprint, before any weight is loaded."""

import itertools
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.inference import open as opening
from mlx_rsgwm.inference.open import find_base
from mlx_rsgwm.inference.pair import check_pair, pair_doubts, pair_problems
from mlx_rsgwm.models.adapter import Adapter, LoraSpec

POOL = [{"name": "change", "manifest_sha256": "a1"}, {"name": "groups", "manifest_sha256": "a2"}]
OTHER = [{"name": "change", "manifest_sha256": "b1"}, {"name": "groups", "manifest_sha256": "b2"}]


def adapter(name, role=None, sources=POOL, fingerprint="f" * 64, base="base", **manifest):
    made = {"base": {"name": base, "fingerprint": fingerprint}, **manifest} if fingerprint else {**manifest}
    if role is not None:
        made["merge"] = {"role": role, "sources": sources}
    weights = {"model.layers.0.self_attn.q_proj.lora_a": mx.zeros((4, 2))}
    return Adapter(LoraSpec(2, 1.0, 0.0, ("self_attn.q_proj",), -1), weights, manifest=made, path=Path(name))


def test_a_pair_of_one_pool_is_passed_without_a_word():
    assert check_pair(adapter("d", "draft"), adapter("v", "verify")) == []


@pytest.mark.parametrize("roles", list(itertools.product(["draft", "verify", "own", None], repeat=2)))
def test_every_pair_of_roles(roles):
    """Only a role that contradicts its place is refused; what has no role or one of its own is the user's business."""
    problems = pair_problems(adapter("d", roles[0]), adapter("v", roles[1]))
    wrong = (roles[0] == "verify") + (roles[1] == "draft")
    if wrong == 2:
        assert problems == ["drafter and verifier are swapped: d was merged to verify, v to draft"]
    else:
        assert len(problems) == wrong
        assert all("give another" in problem for problem in problems)


def test_pools_bases_and_manifests_that_differ():
    (doubt,) = pair_doubts(adapter("d", "draft"), adapter("v", "verify", OTHER))
    assert "different pools" in doubt
    (doubt,) = pair_doubts(adapter("d", "draft"), adapter("v", data={"hash": "x"}))
    assert "v was not merged" in doubt
    (doubt,) = pair_doubts(adapter("x", "draft"), adapter("x", "draft"))
    assert "the same adapter" in doubt
    with pytest.raises(RsgwmError, match=r"d was made for base .* and v for other"):
        check_pair(adapter("d", "draft"), adapter("v", "verify", fingerprint="e" * 64, base="other"))
    # An adapter of mlx-lm's own says nothing, and that is told.
    (doubt,) = check_pair(adapter("d", fingerprint=None), adapter("v", "verify"))
    assert doubt.startswith("d has no record of training or merging")
    (doubt,) = check_pair(adapter("d", fingerprint=None), adapter("v"))
    assert doubt.startswith("d and v have no record")


@pytest.mark.parametrize("merge", [None, [], "draft", {"role": 5, "sources": 7}, {"role": "draft", "sources": [1, {}]}])
def test_manifests_that_are_not_ours_do_not_crash(merge):
    strange = adapter("d", merge=merge)
    assert pair_problems(strange, adapter("v", "verify")) == []


@pytest.fixture
def bases(tmp_path, monkeypatch):
    """Bases as folders by name; nothing may be loaded."""
    prints = {"base": "f" * 64, "moved": "f" * 64, "other": "e" * 64}

    def resolve(name, progress):
        if name not in prints:
            raise RsgwmError(f"base {name!r} does not exist")
        return name

    monkeypatch.setattr(opening, "resolve_base", resolve)
    monkeypatch.setattr("mlx_rsgwm.models.base.resolve_base", resolve)
    monkeypatch.setattr(opening, "fingerprint_of", lambda name: prints[name])
    monkeypatch.setattr(opening, "load_base", lambda *arguments, **options: pytest.fail("weights were loaded"))


def test_the_base_is_the_recorded_one(bases, monkeypatch):
    pair = [adapter("d", "draft"), adapter("v", "verify")]
    assert find_base(pair, None) == "base"
    assert find_base(pair, "moved") == "moved"
    with pytest.raises(RsgwmError, match=r"d was made for base \(fingerprint f{12}\), not for other \(e{12}\)"):
        find_base(pair, "other")
    with pytest.raises(RsgwmError, match="adapters of different bases"):
        find_base([pair[0], adapter("v", fingerprint="e" * 64)], None)
    with pytest.raises(RsgwmError, match="that d records cannot be had; say where it is with --base"):
        find_base([adapter("d", base="gone")], None)
    # A folder of the recorded name that holds another model by now.
    with pytest.raises(RsgwmError, match="was made for other"):
        find_base([adapter("d", base="other")], None)


def test_without_a_record_the_choice_is_told(bases, monkeypatch):
    from mlx_rsgwm.core.progress import Progress

    told = []

    class Listening(Progress):
        def message(self, text):
            told.append(text)

    monkeypatch.setattr(opening, "DEFAULT_BASE", "base")
    assert find_base([adapter("d", fingerprint=None)], None, Listening()) == "base"
    assert told == ["d does not say what its base is; taking base, --base names another"]
    # Of two adapters the one that knows decides for both.
    assert find_base([adapter("d", fingerprint=None), adapter("v", base="moved")], None) == "moved"


QUESTION = "Ada has 3 pens and gets 4 more. How many?"


def by_hand(base, drafter, verifier, config):
    """The pipeline as its parts make it."""
    from mlx_rsgwm.data.template import TEMPLATES
    from mlx_rsgwm.inference.loop import DraftVerify
    from mlx_rsgwm.models.slots import AdapterSlots

    slots = AdapterSlots(base)
    for name, adapter in (("drafter", drafter), ("verifier", verifier)):
        if adapter is not None:
            slots.load(name, adapter)
    return DraftVerify(slots, TEMPLATES["plain"], "drafter", "verifier" if verifier else None, config)


def test_an_opened_pipeline_answers_as_its_parts_do(base, make_adapter, tmp_path):
    from mlx_rsgwm.inference.open import open_pipeline
    from mlx_rsgwm.inference.policy import LoopConfig
    from mlx_rsgwm.inference.sampling import Sampling

    drafter, verifier = (make_adapter(seed).save(tmp_path / f"{seed}") for seed in (1, 2))
    config = LoopConfig(2, 0.3, "yesno", Sampling(0.9, 0.8, 6, 5), "sequential", abstain=True)
    settings = {
        "attempts": 2, "threshold": 0.3, "score": "yesno", "temperature": 0.9, "top_p": 0.8, "max_tokens": 6, "seed": 5,
        "mode": "sequential", "abstain": True, "check": "none",
    }  # fmt: skip
    for judge in (verifier, None):
        parts = [None if path is None else Adapter.load(path) for path in (drafter, judge)]
        expected = by_hand(base, *parts, config).answer(QUESTION)
        for where in (None, base.name, base):
            opened = open_pipeline(str(drafter), judge, where, **settings)
            assert opened.config == config
            assert opened.answer(QUESTION) == expected


def test_score_and_threshold_are_settled_once(base, make_adapter, tmp_path):
    from dataclasses import replace

    from mlx_rsgwm.inference.calibration import Calibration, NothingToTellApart, save_calibration
    from mlx_rsgwm.inference.open import open_pipeline

    drafter, verifier = (make_adapter(seed).save(tmp_path / f"{seed}") for seed in (1, 2))
    calibration = Calibration("yesno", 0.4, None, {}, {}, {}, {}, 6, 12, 5)

    def settled(**settings):
        found = open_pipeline(drafter, verifier, base, **settings)
        return found.config.score, found.config.threshold

    def nothing(pipeline):
        raise NothingToTellApart("all right")

    assert settled() == ("mean_logprob", 0.7)
    assert settled(calibrate=lambda pipeline: calibration) == ("yesno", 0.4)
    assert settled(calibrate=nothing) == ("mean_logprob", 0.7)
    save_calibration(verifier, calibration)
    assert settled() == ("yesno", 0.4)
    assert settled(threshold=0.9) == ("yesno", 0.9)
    assert settled(score="mean_logprob") == ("mean_logprob", 0.7)  # the calibration's threshold is of another score
    assert settled(calibration=None) == ("mean_logprob", 0.7)
    save_calibration(verifier, replace(calibration, correct=0))
    with pytest.raises(RsgwmError, match="fitted on 12 drafts of which none were right"):
        settled()
    with pytest.raises(RsgwmError, match="calibration of the bare base was fitted"):
        open_pipeline(drafter, None, base, calibration=replace(calibration, correct=0))


def test_without_a_template_it_is_asked_for(base, make_adapter, tmp_path):
    from mlx_rsgwm.inference.open import open_pipeline

    drafter = make_adapter(1)
    del drafter.manifest["template"]
    with pytest.raises(RsgwmError, match="does not say which prompt template it was trained with; give --template"):
        open_pipeline(drafter, None, base)
    assert open_pipeline(drafter, None, base, template="plain").template.name == "plain"


class Told:
    """What a pipeline says while it is opened."""

    def __init__(self):
        from mlx_rsgwm.core.progress import Progress

        self.lines = []
        self.progress = Progress()
        self.progress.message = self.progress.warning = self.lines.append


@pytest.fixture
def pool_of_three(base, make_adapter, tmp_path):
    """Folders of three adapters, and of a drafter that says it was merged from them."""
    from mlx_rsgwm.core.files import sha256_file

    folders = [make_adapter(seed).save(tmp_path / "pool" / name) for seed, name in enumerate("abc")]
    drafter = make_adapter(7)
    sources = [{"name": path.name, "manifest_sha256": sha256_file(path / "manifest.json")} for path in folders]
    drafter.manifest["merge"] = {"role": "draft", "sources": sources}
    return drafter.save(tmp_path / "drafter"), folders


def test_several_adapters_verify(base, pool_of_three, make_adapter, tmp_path):
    from mlx_rsgwm.inference.open import open_pipeline

    drafter, folders = pool_of_three
    settings = {"threshold": 1, "score": "mean_logprob", "max_tokens": 5}
    told = Told()
    opened = open_pipeline(drafter, folders, base, progress=told.progress, **settings)
    assert sorted(opened.verifiers) == ["a", "b", "c"]
    assert not told.lines, "a pool that the drafter was merged from is as it should be"
    answer = opened.answer(QUESTION)
    for given in (folders[::-1], tmp_path / "pool", str(tmp_path / "pool" / "*"), [*map(Adapter.load, folders)]):
        assert open_pipeline(drafter, given, base, **settings).answer(QUESTION) == answer
    for given in ([folders[1]], folders[1]):
        single = open_pipeline(drafter, given, base, **settings)
        assert single.verifiers == ("verifier",)
        assert single.by_adapter(single.reader.signals([QUESTION], [single.as_draft("7")])[0], "yesno") == {}

    told = Told()
    same = Path(shutil.copytree(folders[0], tmp_path / "again"))
    twice = open_pipeline(drafter, [*folders, same], base, progress=told.progress, **settings)
    assert len(twice.verifiers) == 3
    assert told.lines == [f"warning: {same} and {folders[0]} are the same adapter, which verifies once"]
    assert twice.answer(QUESTION) == answer

    told = Told()
    stranger = make_adapter(9)
    stranger.manifest["data"] = {"hash": "x"}
    stranger.save(tmp_path / "stranger")
    open_pipeline(drafter, [*folders[:2], tmp_path / "stranger"], base, progress=told.progress, **settings)
    assert len(told.lines) == 1
    assert f"was merged from a, b, c; {tmp_path / 'stranger'} is not among them, or changed since" in told.lines[0]


def test_several_verifiers_that_do_not_belong(base, pool_of_three, make_adapter, tmp_path):
    from mlx_rsgwm.inference.open import open_pipeline

    drafter, folders = pool_of_three
    other = make_adapter(9)
    other.manifest["base"] = {**other.manifest["base"], "fingerprint": "e" * 64, "name": "another"}
    other.save(tmp_path / "other")
    with pytest.raises(RsgwmError, match=r"cannot draft and verify together.*drafter was made for .*other for another"):
        open_pipeline(drafter, [*folders, tmp_path / "other"], base)
    chat = make_adapter(9)
    chat.manifest["template"] = {**chat.manifest["template"], "hash": "0" * 64}
    chat.save(tmp_path / "chat")
    with pytest.raises(RsgwmError, match="the verifier chat was trained with another prompt template"):
        open_pipeline(drafter, [*folders, tmp_path / "chat"], base)
    with pytest.raises(RsgwmError, match="a list without an adapter"):
        open_pipeline(drafter, [], base)


def test_what_verifiers_are_called():
    from mlx_rsgwm.inference.pair import roles_of

    assert [*roles_of([adapter("x/a")])] == ["verifier"]
    assert [*roles_of([adapter("x/a"), adapter("x/b")])] == ["a", "b"]
    assert [*roles_of([adapter("x/a"), adapter("y/a")])] == ["x/a", "y/a"]
    assert [*roles_of([adapter("x/a"), adapter("x/drafter")])] == ["x/a", "x/drafter"]
    loose = [Adapter(LoraSpec(2, 1.0, 0.0, ("q",), -1), {}) for _ in range(2)]
    assert [*roles_of(loose)] == ["verifier 1", "verifier 2"]


def test_a_learned_rule_is_fitted_and_then_used(base, pool_of_three, tmp_path, monkeypatch):
    import mlx_rsgwm as rs
    from mlx_rsgwm.data.synthetic import generate
    from mlx_rsgwm.evaluation import judging
    from mlx_rsgwm.evaluation.records import DraftRecord

    def judge(question, draft, scores, *more):
        return DraftRecord(draft.text, "1", len(draft.text) % 2 == 0, scores)

    monkeypatch.setattr(judging, "judge", judge)
    monkeypatch.setenv("RSGWM_CACHE", str(tmp_path / "cache"))
    drafter, folders = pool_of_three
    pair = {"verifier": folders, "base": base, "combine": "learned", "max_tokens": 5, "attempts": 2}
    with pytest.raises(RsgwmError, match="the learned rule has to be fitted first"):
        rs.open_pipeline(drafter, **pair)
    pipeline = rs.open_pipeline(drafter, **pair, calibration=None)
    calibration = rs.calibrate(pipeline, generate("change", 16, 3, "calibration"))
    assert calibration.score in calibration.learned
    answer = pipeline.answer(QUESTION)
    again = rs.open_pipeline(drafter, **{**pair, "verifier": folders[::-1]})
    assert again.calibration == calibration
    assert again.answer(QUESTION) == answer
    with pytest.raises(RsgwmError, match="a pool whose rule is learned, not max"):
        rs.open_pipeline(drafter, folders, base, calibration=calibration)
    with pytest.raises(RsgwmError, match="not of a pool of 2 adapters"):
        rs.open_pipeline(drafter, **{**pair, "verifier": folders[:2]}, calibration=calibration)
