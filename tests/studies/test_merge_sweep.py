"""The merge sweep on the tiny base: what it measures against the slow way, resuming, refusals, statistics, output."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.scoring import area_under_roc
from mlx_rsgwm.data.batching import TokenRow
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.evaluation.stats.intervals import wilson
from mlx_rsgwm.evaluation.stats.paired import mcnemar
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.inference.verifier import verdict_ids
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.adapter import DIRECTIONS_FILE, WEIGHTS_FILE, Adapter
from mlx_rsgwm.models.adapter_sidecars import put_beside
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.studies import merge_sweep as module
from mlx_rsgwm.studies.merge_sweep import Measured, Outcome, Plan, Sweep
from mlx_rsgwm.studies.sweep_meter import LabelledAnswer, Meter
from mlx_rsgwm.studies.sweep_report import plot_sweep, render_markdown, render_table, write_sweep
from mlx_rsgwm.studies.sweep_summary import summarise_sweeps
from mlx_rsgwm.studies.sweep_variants import Variant, parse_variants
from mlx_rsgwm.training.losses import held_out_loss

TASKS = ("change", "compare")


def make_plan(pool, methods=("linear", "rsgwm"), **settings):
    questions = tuple(q for task in TASKS for q in generate(task, 3, 0, "test"))
    return Plan(pool, tuple(parse_variants(methods)), questions, TEMPLATES["plain"], max_tokens=4, **settings)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("linear,ties", ["linear", "ties"]),
        ("ties:density=0.2/0.5", ["ties:density=0.2", "ties:density=0.5"]),
        (
            "rsgwm:space=factor/product,tau=0.3/0.5,linear",
            [*(f"rsgwm:space={s},tau={t}" for s in ("factor", "product") for t in (0.3, 0.5)), "linear"],
        ),
        ("rsgwm,rsgwm:space=factor,rsgwm:tau=0.3", ["rsgwm", "rsgwm:tau=0.3"]),  # the second is the first
        ("task_arithmetic:lambda=1e0,cat", ["task_arithmetic:lambda=1.0", "cat"]),  # one sum, two ranks
    ],
)
def test_variants(text, labels):
    found = parse_variants([text])
    assert [variant.label for variant in found] == labels
    assert parse_variants([",".join(labels)]) == found


def test_all_is_every_method_once():
    found = [variant.label for variant in parse_variants(["all"])]
    assert {"rsgwm", "paper-literal", "linear", "slerp"} <= set(found)
    assert not any(":" in label for label in found)
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linaer", "did you mean 'linear'"),
        ("rsgwm:tau=1.5,ties:density=2", "tau must be in (0, 1), found 1.5; density must be in"),
        ("linear:tau=0.5", "linear has no parameter 'tau'"),
        ("tau=0.5", "expected METHOD:NAME=VALUE, found 'tau=0.5'"),
    ],
)
def test_bad_variants(text, message):
    with pytest.raises(RsgwmError) as found:
        parse_variants([text])
    assert message in str(found.value)


def test_every_candidate_is_measured_on_the_same(base, pool, tmp_path):
    measured = Sweep(base, make_plan(pool, judged=2, extras={"joint": pool[0]}), tmp_path / "out").execute()
    assert [(o.name, o.kind, o.task) for o in measured.outcomes] == [
        ("base", "base", ""),
        ("change", "adapter", "change"),
        ("compare", "adapter", "compare"),
        ("joint", "extra", ""),
        ("linear", "merge", ""),
        ("rsgwm", "merge", ""),
    ]
    by_name = {outcome.name: outcome for outcome in measured.outcomes}
    assert {a.kind for a in measured.answers} == {"gold", "perturbed", "draft"}
    assert {a.question for a in measured.answers} == {0, 1, 3, 4}
    for outcome in measured.outcomes:
        assert len(outcome.drafts) == len(outcome.gold) == 6
        assert all(len(scores) == len(measured.answers) for scores in outcome.scores.values())
    assert by_name["joint"].scores == by_name["change"].scores != by_name["base"].scores
    assert set(by_name["linear"].diagnosis) == {"draft"}  # one merge serves both roles
    assert set(by_name["rsgwm"].diagnosis) == {"draft", "verify"}
    assert by_name["linear"].diagnosis["draft"]["norm"] > 0
    merges = Sweep(base, make_plan(pool, judged=2, alone=False), tmp_path / "out").execute()
    assert merges.outcomes == measured.outcomes[-2:]


def test_loss_and_scores_are_those_of_the_merge(base, pool, tmp_path):
    plan = make_plan(pool, ("rsgwm",))
    sweep = Sweep(base, plan, tmp_path / "out")
    measured = sweep.execute()
    found = measured.outcomes[-1]
    slots = AdapterSlots(base)
    for role in ("draft", "verify"):
        slots.load(role, merge(list(pool), MergeOptions("rsgwm", role, seed=42)))
    rows = []
    for question in plan.questions:
        prompt = plan.template.draft_prompt(base.tokenizer, question.question)
        tokens = (*prompt, *plan.template.completion(base.tokenizer, question.answer))
        rows.append(TokenRow("draft", tokens, len(prompt)))
    with slots.using("draft"):
        expected = held_out_loss(base.model, rows, 4)["draft"]
    nats, tokens = np.array(found.gold).T
    assert nats.sum() / tokens.sum() == pytest.approx(expected, rel=1e-5)
    answer = measured.answers[1]
    prompt = plan.template.verify_prompt(base.tokenizer, plan.questions[answer.question].question, answer.text.strip())
    with slots.using("verify"):
        logits = base.model(mx.array([prompt]))[0, -1]
    yes, no = (mx.logsumexp(logits[mx.array(ids)]) for ids in verdict_ids(plan.template, base.tokenizer))
    assert found.scores["yesno"][1] == pytest.approx(mx.sigmoid(yes - no).item(), rel=1e-4)
    tokens = mx.array([*plan.template.draft_prompt(base.tokenizer, plan.questions[0].question), *answer.tokens])
    with slots.using("verify"):
        logits = base.model(tokens[None])[0, -len(answer.tokens) - 1 : -1]
    picked = mx.take_along_axis(logits, mx.array(answer.tokens)[:, None], axis=-1)[:, 0]
    expected = mx.exp((picked - mx.logsumexp(logits, axis=-1)).mean()).item()
    assert found.scores["mean_logprob"][1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("ends", [False, True])
def test_drafts_along_gold_are_greedy_drafts(base, make_adapter, ends):
    """Whatever the gold completion has in common with the draft, the draft is that of token-by-token decoding."""
    questions = [q for task in TASKS for q in generate(task, 4, 0, "test")]
    slots = AdapterSlots(base)
    meter = Meter(slots, questions, TEMPLATES["plain"], 8, 3)
    meter.load("one", make_adapter(3, size=0.5))
    greedy = Sampling(0.0, 1.0, 8, 0)
    plain = meter.written("one", dict(enumerate(meter.prompts)), greedy)
    end = base.tokenizer.eos_token_id
    if ends:  # a token that the model does write plays the end of text
        end = plain[0].tokens[3]
        meter._end_ids = frozenset({end})
        plain = meter.written("one", dict(enumerate(meter.prompts)), greedy)
        assert plain[0].finished
        assert len(plain[0].tokens) <= 3
    for index, found in plain.items():
        same = found.tokens[: 2 * index]  # gold parts from the draft ever later, in the end not at all
        other = (99,) if len(same) < len(found.tokens) else ()
        meter.completions[index] = (*same, *other, end)
    drafts, nats = meter.drafts("one")
    assert drafts == [plain[index] for index in range(len(questions))]
    assert all(loss > 0 for loss in nats)


def test_a_sweep_goes_on_where_it_was_cut(base, pool, tmp_path, monkeypatch):
    out = tmp_path / "out"
    whole = Sweep(base, make_plan(pool, ("linear", "karcher")), tmp_path / "whole").execute()
    merged = []

    def cut(adapters, options, *rest):
        if options.method == "karcher":
            raise KeyboardInterrupt
        merged.append(options.method)
        return merge(adapters, options, *rest)

    monkeypatch.setattr(module, "merge", cut)
    with pytest.raises(KeyboardInterrupt):
        Sweep(base, make_plan(pool, ("linear", "karcher")), out).execute()
    assert merged == ["linear", "linear"]  # the reference drafter, the candidate
    monkeypatch.setattr(module, "merge", lambda *rest: (merged.append(rest[1].method), merge(*rest))[1])
    again = Sweep(base, make_plan(pool, ("linear", "karcher")), out).execute()
    assert merged[2:] == ["karcher"]
    assert again.outcomes == whole.outcomes
    assert again.answers == whole.answers


def test_what_a_result_depends_on(base, pool, tmp_path, make_adapter):
    out = tmp_path / "out"

    def made(plan):
        before = {path.name for path in (out / "measured").glob("*.json")} if out.exists() else set()
        Sweep(base, plan, out).execute()
        return sorted(
            {path.name.rpartition("-")[0] for path in (out / "measured").glob("*.json") if path.name not in before}
        )

    everything = ["base", "change", "compare", "linear", "rsgwm"]
    plan = make_plan(pool)
    assert made(plan) == everything
    assert made(plan) == []
    assert made(make_plan(pool, ("linear", "rsgwm", "rsgwm:tau=0.4"))) == ["rsgwm-tau-0.4"]
    assert made(replace(plan, rank=2)) == everything  # other reference drafts, so other answers for all
    assert made(replace(plan, questions=plan.questions[:-1])) == everything
    make_adapter(7).save(pool[1])
    assert made(plan) == everything
    with_grams = make_plan(pool, ("linear", "rsgwm", "regmean"))
    assert made(with_grams) == ["regmean"]  # refused: there are no directions
    for folder in pool:
        adapter = Adapter.load(folder)
        grams = {f"{role}/{name}.gram": a @ a.T for name, a, _ in adapter.factors() for role in ("draft", "verify")}
        about = {"weights_sha256": adapter.manifest["files"][WEIGHTS_FILE], "k": "0", "seed": "0", "shared": "{}"}
        put_beside(adapter, DIRECTIONS_FILE, grams, {**about, "tokens/draft": "9", "tokens/verify": "9"}, {}, {})
    assert made(with_grams) == ["regmean"]
    assert Sweep(base, with_grams, out).execute().outcomes[-1].drafts


def test_refused_merges_are_rows(base, pool, make_adapter, tmp_path):
    third = make_adapter(2)
    third.importance = {}
    third.manifest["task"] = "groups"
    folders = (*pool, third.save(tmp_path / "pool" / "groups"))
    measured = Sweep(base, make_plan(folders, ("slerp", "rsgwm", "linear")), tmp_path / "out").execute()
    summary = write_sweep(tmp_path / "out", [measured])
    assert set(summary["refused"]) == {"slerp", "rsgwm"}
    assert "exactly two adapters, found 3" in summary["refused"]["slerp"]["reason"]
    assert "importance" in summary["refused"]["rsgwm"]["reason"]
    assert [row["name"] for row in summary["rows"] if row["kind"] == "merge"] == ["linear"]
    for text in (render_table(summary), (tmp_path / "out" / "sweep.md").read_text()):
        assert "slerp merges exactly two adapters" in text
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == summary


def test_plan_refuses(pool):
    with pytest.raises(RsgwmError, match="several are called change"):
        make_plan((*pool, pool[0]))
    with pytest.raises(RsgwmError, match="no questions"):
        Plan(pool, (), (), TEMPLATES["plain"])
    with pytest.raises(RsgwmError, match=f"1 weights for {len(pool)} adapters"):
        make_plan(pool, weights=(1.0,))


def invented(seed=0, items=30, names=("good", "bad")):
    """A sweep whose outcomes are drawn: the first merge is right and certain more often than the second."""
    rng = np.random.default_rng(seed)
    questions = tuple(Question(f"{task}{n}", task, f"{task} {n}?", "", "1") for task in TASKS for n in range(items))
    answers = tuple(
        LabelledAnswer(n, kind, "1", (1,), kind == "gold" or (kind == "draft" and n % 2 == 0))
        for n in range(len(questions))
        for kind in ("gold", "perturbed", "draft")
    )

    def outcome(name, kind, skill, task=""):
        scores = [float(rng.normal(skill * answer.correct)) for answer in answers]
        drafts = tuple(("1", bool(rng.random() < skill / 2)) for _ in questions)
        gold = tuple((float(rng.random()), int(rng.integers(1, 9))) for _ in questions)
        return Outcome(
            name, kind, task, "", drafts, gold, {"mean_logprob": tuple(scores), "yesno": tuple(scores[::-1])}
        )

    outcomes = [outcome(task, "adapter", 1.6, task) for task in TASKS] + [outcome("joint", "extra", 1.4)]
    outcomes += [outcome(name, "merge", skill) for name, skill in zip(names, (1.5, 0.4), strict=True)]
    return Measured(questions, answers, tuple(outcomes))


def test_statistics_against_the_slow_way():
    sweeps = [invented(0), invented(1)]
    summary = summarise_sweeps(sweeps)
    rows = {row["name"]: row for row in summary["rows"]}
    hits = {
        name: [right for one in sweeps for o in one.outcomes if o.name == name for _, right in o.drafts]
        for name in rows
    }
    assert summary["best"]["accuracy"] == "good"
    assert [row["name"] for row in summary["rows"]] == sorted(hits, key=lambda name: -sum(hits[name]))
    good, bad = rows["good"], rows["bad"]
    expected = wilson(sum(hits["bad"]), 120)
    assert bad["accuracy"] == {**expected.to_dict(), "macro": pytest.approx(expected.value)}
    paired = mcnemar(hits["good"], hits["bad"]).to_dict()
    assert {name: bad["against_best"]["accuracy"][name] for name in paired} == pytest.approx(paired)
    assert bad["against_best"]["accuracy"]["tied"] is False
    assert bad["against_best"]["accuracy"]["high"] < 0
    assert good["against_best"]["accuracy"]["difference"] == 0
    areas, losses = [], []
    for one in sweeps:
        outcome = next(o for o in one.outcomes if o.name == "bad")
        for low in (0, 30):
            chosen = [n for n, a in enumerate(one.answers) if low <= a.question < low + 30]
            labels = [one.answers[n].correct for n in chosen]
            areas.append(area_under_roc([outcome.scores["mean_logprob"][n] for n in chosen], labels))
            nats, tokens = np.array(outcome.gold[low : low + 30]).T
            losses.append(nats.sum() / tokens.sum())
    assert bad["auroc"]["mean_logprob"]["all"]["value"] == pytest.approx(np.mean(areas))
    assert bad["nll"]["value"] == pytest.approx(np.mean(losses))
    assert bad["auroc"]["mean_logprob"]["all"]["n"] == 360
    assert bad["auroc"]["mean_logprob"]["drafts"]["n"] == 120
    kept = bad["retention"]["own"]["change"]
    own = sum(right for one in sweeps for _, right in one.outcomes[0].drafts[:30])
    mine = sum(right for one in sweeps for _, right in one.outcomes[4].drafts[:30])
    assert kept["value"] == pytest.approx(mine / own)
    assert kept["low"] < kept["value"] < kept["high"]
    assert set(bad["retention"]) == {"own", "joint"}


def test_p_values_are_corrected_over_the_merges_compared():
    """Holm by hand: the smallest of m times m, the next times m - 1, never falling; adapters are not counted."""
    one = invented(0)
    good = next(o for o in one.outcomes if o.name == "good")

    def worse(name, count):
        flipped = iter(range(count))
        drafts = tuple((text, right and next(flipped, None) is None) for text, right in good.drafts)
        return replace(good, name=name, drafts=drafts)

    measured = replace(one, outcomes=(*one.outcomes, worse("near", 3), worse("far", 7)))
    rows = {row["name"]: row["against_best"]["accuracy"] for row in summarise_sweeps([measured])["rows"]}
    first, second, third = sorted(rows[name]["p_value"] for name in ("bad", "near", "far"))
    expected = [min(3 * first, 1), min(max(3 * first, 2 * second), 1)]
    expected.append(min(max(expected[-1], third), 1))
    assert sorted(rows[name]["p_value_holm"] for name in ("bad", "near", "far")) == pytest.approx(expected)
    assert not any("p_value_holm" in rows[name] for name in ("good", "joint", "change"))
    assert 0.01 < rows["far"]["p_value"] < 0.05 > first


def test_intervals_cover_as_they_say():
    """A bootstrap interval of an AUROC that is .5 by construction holds .5 about 19 times of 20."""
    inside = 0
    for seed in range(60):
        found = summarise_sweeps([invented(seed, items=25)], resamples=300)
        rate = next(row for row in found["rows"] if row["name"] == "bad")["auroc"]["yesno"]["all"]
        inside += rate["low"] <= 0.5 <= rate["high"]
    assert 52 <= inside <= 60


def test_a_class_that_is_missing_is_left_out():
    one = invented()
    answers = tuple(replace(a, correct=False) if a.kind == "draft" and a.question < 30 else a for a in one.answers)
    summary = summarise_sweeps([replace(one, answers=answers)])
    row = summary["rows"][0]
    assert row["auroc"]["mean_logprob"]["drafts"] is not None  # the other task still has both
    answers = tuple(replace(a, correct=False) if a.kind == "draft" else a for a in one.answers)
    summary = summarise_sweeps([replace(one, answers=answers)])
    assert summary["rows"][0]["auroc"]["mean_logprob"]["drafts"] is None
    assert "–" in render_table(summary)


def test_sweeps_that_do_not_belong_together():
    one = invented()
    with pytest.raises(RsgwmError, match="differ in tasks"):
        summarise_sweeps([one, replace(one, questions=one.questions[:30])])
    with pytest.raises(RsgwmError, match="no merge sweep"):
        summarise_sweeps([])


def test_a_merge_refused_once_is_not_ranked():
    one, other = invented(0), invented(1)
    refused = tuple(Outcome(o.name, o.kind, refused="it collapses") if o.name == "bad" else o for o in other.outcomes)
    summary = summarise_sweeps([one, replace(other, outcomes=refused)])
    assert summary["refused"] == {"bad": {"sweeps": 1, "reason": "it collapses"}}
    assert "1 of 2" in render_markdown(summary)


def test_plot_is_a_picture(tmp_path):
    plot_sweep(summarise_sweeps([invented()]), tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RsgwmError, match="cannot write"):
        plot_sweep(summarise_sweeps([invented()]), tmp_path / "none" / "sweep.png")


def test_labels_read_back():
    assert parse_variants([Variant("rsgwm", {"tau": 0.5, "space": "product"}).label]) == [
        Variant("rsgwm", {"tau": 0.5, "space": "product"})
    ]
