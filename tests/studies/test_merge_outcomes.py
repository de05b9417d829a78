"""Outcomes of merges: retention against losses taken one by one, going on after a stop, and in several processes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mlx_rsgwm.core.distributed import Processes
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.batching import TokenRow
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.probe.outcomes import BASE, SINGLE, OutcomeRow, Outcomes, Scores, random_sets, read_outcomes
from mlx_rsgwm.studies import merge_outcomes
from mlx_rsgwm.studies.merge_outcomes import OutcomeStudy, TaskData, summary_rows, units_of
from mlx_rsgwm.studies.sweep_variants import parse_variants
from mlx_rsgwm.training.losses import held_out_nats


def token_rows(seed, count=8):
    rng = np.random.default_rng(seed)
    return [TokenRow("draft", tuple(rng.integers(1, 60, n).tolist()), 3) for n in rng.integers(6, 12, count)]


@pytest.fixture
def pool(make_adapter, tmp_path):
    return [replace(make_adapter(seed, size=0.3), label=f"task-{seed}") for seed in range(3)]


@pytest.fixture
def data():
    return [TaskData(f"rows-{seed}", token_rows(seed)) for seed in range(3)]


VARIANTS = parse_variants(["linear,ties:density=0.5"])
UNITS = units_of(3, VARIANTS, [(0, 1, 2)])


def test_units_are_alone_pairs_and_sets():
    assert len(UNITS) == 2 * 3 + (3 + 1) * 2
    assert [unit.method for unit in UNITS[:2]] == [BASE, SINGLE]
    assert {unit.members for unit in UNITS[6:]} == {(0, 1), (0, 2), (1, 2), (0, 1, 2)}


def test_scores_are_those_of_the_merge_on_each_members_rows(base, pool, data, tmp_path):
    outcomes = OutcomeStudy(base, pool, data, tmp_path / "out.jsonl").execute(UNITS)
    assert len(outcomes.rows) == len(UNITS)
    merged = merge([pool[0], pool[2]], MergeOptions("ties", "draft", {"density": 0.5}))
    slots = AdapterSlots(base)
    slots.load("merged", merged)
    row = outcomes.rows[frozenset(("task-0", "task-2")), "ties:density=0.5"]
    with slots.using("merged"):
        for place in (0, 2):
            nats, count = held_out_nats(slots.model, data[place].rows, 1)["draft"]
            assert row.scores[f"task-{place}"].nats == pytest.approx(nats, rel=1e-4)
            assert row.scores[f"task-{place}"].tokens == count
            right = 0
            for each in data[place].rows:
                logits = np.array(slots.model(np_tokens(each.tokens[:-1])))[0]
                right += sum(logits[p - 1].argmax() == each.tokens[p] for p in each.trained_positions())
            assert row.scores[f"task-{place}"].right == right
    assert read_outcomes(tmp_path / "out.jsonl").rows == outcomes.rows


def np_tokens(tokens):
    import mlx.core as mx

    return mx.array([tokens])


def test_a_study_that_was_cut_off_goes_on(base, pool, data, tmp_path, monkeypatch):
    whole = OutcomeStudy(base, pool, data, tmp_path / "whole.jsonl").execute(UNITS)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(lines[:9]) + lines[9][:30])
    made = []
    monkeypatch.setattr(merge_outcomes, "merge", lambda *given: made.append(1) or merge(*given))
    assert OutcomeStudy(base, pool, data, cut).execute(UNITS).rows == whole.rows
    assert len(made) == 8 - 2
    more = units_of(3, parse_variants(["linear,ties:density=0.5,norm_equalised"]), [(0, 1, 2)])
    assert OutcomeStudy(base, pool, data, cut).execute(more).methods == ["linear", "ties:density=0.5", "norm_equalised"]
    assert len(made) == 10
    with pytest.raises(RsgwmError, match="other settings"):
        OutcomeStudy(base, pool, [data[0], data[0], data[0]], cut)


def test_processes_take_turns_and_their_files_are_read_together(base, pool, data, tmp_path):
    class Here(Processes):
        def wait(self):
            pass

    path = tmp_path / "out.jsonl"
    for rank in (0, 1):
        OutcomeStudy(base, pool, data, path, processes=Here(rank, 2)).execute(UNITS)
    counts = [len((tmp_path / name).read_text().splitlines()) - 1 for name in ("out.jsonl", "out.1.jsonl")]
    assert counts == [7, 7]
    assert read_outcomes(path).rows == OutcomeStudy(base, pool, data, tmp_path / "alone.jsonl").execute(UNITS).rows


def test_a_refused_merge_is_an_outcome(base, pool, data, tmp_path):
    bare = [replace(adapter, importance={}) for adapter in pool]
    units = units_of(3, parse_variants(["rsgwm"]), [])
    outcomes = OutcomeStudy(base, bare, data, tmp_path / "out.jsonl").execute(units)
    row = outcomes.rows[frozenset(("task-0", "task-1")), "rsgwm"]
    assert "importance" in row.refused
    assert row.scores == {}
    with pytest.raises(RsgwmError, match="no merge"):
        outcomes.retentions()


def test_questions_are_answered_as_well(base, make_adapter, tmp_path):
    pool = [replace(make_adapter(seed), label=f"task-{seed}") for seed in range(2)]
    questions = generate("change", 3, 1, "test")
    data = [TaskData("change", token_rows(1), questions)] * 2
    outcomes = OutcomeStudy(base, pool, data, tmp_path / "out.jsonl").execute(units_of(2, VARIANTS[:1], []))
    row = outcomes.rows[frozenset(("task-0", "task-1")), "linear"]
    assert all((scores.items, scores.correct) == (3, 0) for scores in row.scores.values())  # random weights


def scores(nats, right, margin=None):
    return Scores(nats, right, 10, 0, 0, None if margin is None else {"nll": margin, "tokens": 0.05})


def example(merged_nats=12.0, margin=0.1):
    rows = {}
    for name in ("a", "b"):
        rows[frozenset((name,)), BASE] = OutcomeRow((name,), BASE, {name: scores(20.0, 2)})
        rows[frozenset((name,)), SINGLE] = OutcomeRow((name,), SINGLE, {name: scores(10.0, 8, margin)})
    both = {"a": scores(merged_nats, 6), "b": scores(21.0, 2)}
    rows[frozenset(("a", "b")), "linear"] = OutcomeRow(("a", "b"), "linear", both)
    return Outcomes({"tasks": {"a": "a", "b": "b"}, "adapters": {"a": "", "b": ""}}, rows)


def test_retention_by_hand():
    """One of ten tokens a nat: base 2, alone 1, merged 1.2 and 2.1 nats a token."""
    (kept,) = example().retentions()
    assert kept.shares == pytest.approx({"a": np.exp(-0.2), "b": np.exp(-1.1)})
    assert kept.floored == pytest.approx({"a": 0.8, "b": -0.1})
    assert kept.worst == pytest.approx(np.exp(-1.1))
    assert kept.mean == pytest.approx((np.exp(-0.2) + np.exp(-1.1)) / 2)
    (kept,) = example().retentions("tokens")
    assert kept.shares == pytest.approx({"a": 6 / 8, "b": 2 / 8})
    assert kept.floored == pytest.approx({"a": 4 / 6, "b": 0})
    assert example(margin=1.5).retentions()[0].floored == {}  # a gain of 1 nat is within its error
    with pytest.raises(RsgwmError, match="give --items"):
        example().retentions("answers")
    rows = list(summary_rows(example(), "nll"))
    assert rows[1][:3] == ["linear", "1", "0"]
    assert rows[1][-1] == "-0.100"


def test_random_sets_are_the_same_for_a_seed_and_all_different():
    names = list("abcdef")
    sets = random_sets(names, (3, 4, 5), 20, 7)
    assert sets == random_sets(names, (3, 4, 5), 20, 7) != random_sets(names, (3, 4, 5), 20, 8)
    assert len(set(sets)) == 20
    assert {len(each) for each in sets} == {3, 4, 5}
    assert len(random_sets(list("abc"), (3, 4), 20, 7)) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"members": [], "method": "linear", "scores": {}, "refused": ""},
        {"members": ["a"], "method": "linear", "scores": {}, "refused": ""},
        {"members": ["a"], "method": "x", "scores": {"a": {"nats": 1, "right": 5, "tokens": 3}}, "refused": ""},
        {"members": ["a"], "method": "x", "scores": {"a": {"nats": "y", "right": 0, "tokens": 3}}, "refused": ""},
        {"members": ["a"], "method": "x", "scores": {"a": {"what": 1}}, "refused": ""},
        7,
    ],
)
def test_damaged_outcomes_are_one_line(tmp_path, row):
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps({"about": {"kind": "merge-outcomes", "version": 1}}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(RsgwmError, match="line 2 is damaged"):
        read_outcomes(path)
    path.write_text("{}\n")
    with pytest.raises(RsgwmError, match="no file of rsgwm probe outcomes"):
        read_outcomes(path)
