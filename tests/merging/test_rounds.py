"""Rounds against a float64 transcription of ATM; the same bits after a stop anywhere; what is refused."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.row_hashes import record_of
from mlx_rsgwm.merging.alternate import render_rounds, retained, train_rounds
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.merging.round_merge import merge_round, on_top
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.slots import AdapterSlots, unwrap
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.config import learning_rate_at
from mlx_rsgwm.training.losses import held_out_nats
from mlx_rsgwm.training.rounds import BY_PRODUCTS, MODES, Rounds, round_steps
from mlx_rsgwm.training.schedule import RateSchedule
from tests.merging.rounds_of_a_pool import NAMES, make_members, run, settings

LORA = LoraSpec(4, 2.0, 0.0, ("self_attn.q_proj",), -1)
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


@pytest.fixture
def members(tmp_path):
    return make_members(tmp_path)


def adapter(seed, rank=4, init=None):
    """A random adapter on two modules of (32, 24); all have much in common, so that a mean has a rank to be cut at."""
    rng, common = np.random.default_rng(seed), np.random.default_rng(0)
    weights = {}
    for module in MODULES:
        drawn, shared = rng.normal(size=(56, rank)), common.normal(size=(56, rank))
        mixed = shared + 0.1 * drawn
        a = mixed[:32] if init is None else init[f"{module}.lora_a"]
        weights[f"{module}.lora_a"] = mx.array(a.astype(np.float32))
        weights[f"{module}.lora_b"] = mx.array(mixed[32:].T.astype(np.float32))
    spec = LoraSpec(rank, 2.0, 0.0, ("self_attn.q_proj",), -1)
    starts = {name: value for name, value in weights.items() if name.endswith(".lora_a")}
    return Adapter(spec, weights, init=starts, manifest={"data": {}}, label=f"task-{seed}")


def dense(made, module):
    a, b = (np.array(made.weights[f"{module}.{leaf}"], dtype=np.float64) for leaf in ("lora_a", "lora_b"))
    return made.spec.scale * a @ b


def cut(matrix, rank):
    u, sigma, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank], float((sigma[rank:] ** 2).sum())


def reference(state, tasks, mode, alpha, rank):
    """θ' of every module in float64, dense, and the numbers that are told, by the definitions."""
    after, lost, products = {}, 0.0, np.zeros((len(tasks),) * 2)
    for module in MODULES:
        before = np.zeros((32, 24)) if state is None else dense(state, module)
        own = [dense(task, module) for task in tasks]
        updates = own if mode == "accumulate" else [task - before for task in own]
        products += [[(one * other).sum() for other in updates] for one in updates]
        mean = sum(updates) / len(updates)
        if mode == "avg_product":
            after[module], away = cut(before + alpha * mean, rank)
        elif mode == "accumulate":
            step, away = cut(alpha * mean, rank)
            after[module] = before + step
        else:
            began = state or Adapter(LORA, {**tasks[0].init, f"{module}.lora_b": mx.zeros((rank, 24))})
            a, b = (
                (1 - alpha) * np.array(began.weights[f"{module}.{leaf}"], dtype=np.float64)
                + alpha * np.mean([np.array(t.weights[f"{module}.{leaf}"], dtype=np.float64) for t in tasks], axis=0)
                for leaf in ("lora_a", "lora_b")
            )
            after[module], away = 2.0 * a @ b, 0.0
        lost += away
    return after, lost, products


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("started", [False, True])
def test_a_rounds_merge_is_that_of_float64(mode, alpha, started):
    config = settings(Rounds(3, mode, alpha=alpha, number=2))
    first = adapter(1)
    shared = {name: np.array(value) for name, value in first.init.items()}
    tasks = [adapter(seed, init=shared if mode != "avg_product" else None) for seed in (2, 3, 4)]
    state = adapter(9, init=shared if mode == "freeze_a" else None) if started else None
    merged = merge_round(state, tasks, config)
    after, lost, products = reference(state, tasks, mode, alpha, 4)
    assert mode not in BY_PRODUCTS or lost > 0
    for module in MODULES:
        error = np.linalg.norm(dense(merged, module) - after[module]) / np.linalg.norm(after[module])
        assert error < 1e-6, (module, error)
    told = merged.manifest["round"]
    norms = np.sqrt(np.diag(products))
    np.testing.assert_allclose(told["update_norms"], norms, rtol=1e-6)
    np.testing.assert_allclose(told["cosines"], products / np.outer(norms, norms), atol=1e-6)
    square = sum((each**2).sum() for each in after.values())
    assert told["norm"] == pytest.approx(square**0.5, rel=1e-6)
    moved = sum(((after[m] - (dense(state, m) if state else 0)) ** 2).sum() for m in MODULES)
    left = moved if mode == "accumulate" else square  # there the state below is not cut
    assert told["discarded"] == pytest.approx(lost / (left + lost), abs=1e-6)
    assert told["step_norm"] == pytest.approx(moved**0.5, rel=1e-5)
    assert merged.spec.rank == (8 if mode == "accumulate" and started else 4)
    if mode == "freeze_a":
        for name in shared:
            assert (np.array(merged.weights[name]) == shared[name]).all()
    if mode == "avg_product":  # factors of the size that learning rates are chosen for
        lengths = np.linalg.norm(np.array(merged.weights[f"{MODULES[0]}.lora_a"]), axis=0)
        np.testing.assert_allclose(lengths, 3**-0.5, rtol=1e-5)


@pytest.mark.parametrize("mode", BY_PRODUCTS)
def test_a_merge_that_is_not_finite_is_refused(mode):
    shared = {name: np.array(value) for name, value in adapter(1).init.items()}
    tasks = [adapter(seed, init=shared) for seed in (2, 3)]
    for task in tasks:
        task.weights = {name: value * 1e15 for name, value in task.weights.items()}
    with pytest.raises(RsgwmError, match="the merge of round 2 has values that are not finite"):
        merge_round(adapter(9, init=shared), tasks, settings(Rounds(3, mode, number=2)))


def test_another_method_merges_the_updates_of_the_round():
    """Task arithmetic with λ: θ + λ Σ (ΔW_t − θ), which is no mean of the ΔW_t."""
    config = settings(Rounds(2, method="task_arithmetic", parameters={"lambda": 0.4}, number=2))
    state, tasks = adapter(9), [adapter(seed) for seed in (2, 3)]
    merged = merge_round(state, tasks, config)
    for module in MODULES:
        before = dense(state, module)
        step = 0.4 * sum(dense(task, module) - before for task in tasks)
        # The method's own merge has the rank of a task's update and the state's; then θ' has the adapters'.
        expected, _ = cut(before + cut(step, 8)[0], 4)
        assert np.linalg.norm(dense(merged, module) - expected) < 2e-5 * np.linalg.norm(expected)
    assert merged.manifest["round"]["method_discarded"] > 0


def test_steps_are_dealt_out_evenly_with_every_role_in_the_last_round():
    plan = [[index] for index in range(24)]
    roles = ["draft"] * 20 + ["verify"] * 4
    for count in (2, 4, 8):
        shares = [round_steps(plan, roles, Rounds(count, number=number)) for number in range(1, count + 1)]
        assert sorted(step for share in shares for step in share) == plan
        assert {len(share) for share in shares} == {24 // count}
        assert {roles[step[0]] for step in shares[-1]} == {"draft", "verify"}
        verify = [sum(roles[step[0]] == "verify" for step in share) for share in shares]
        assert max(verify) - min(verify) <= 1
    with pytest.raises(
        RsgwmError, match="24 rounds of 1 step each have no room for draft and verify in the last; take"
    ):
        round_steps(plan, roles, Rounds(24, number=1))
    assert round_steps(plan, ["draft"] * 24, Rounds(24, number=24)) == [[23]]
    with pytest.raises(RsgwmError, match="24 steps cannot be shared out among 5 rounds alike; take 2, 3, 4, 6"):
        round_steps(plan, roles, Rounds(5, number=1))


@pytest.mark.parametrize("changes", [
    {"warmup": 0.2}, {"warmup": 0.2, "schedule": "cosine"}, {"schedule": "constant"},
    {"schedule": "constant", "warmup": 0.0, "lr_schedule": RateSchedule("linear_schedule", (1e-2, 1e-4, 20), 3)},
])  # fmt: skip
def test_a_schedule_of_the_run_goes_on_from_round_to_round(changes):
    alone = settings(None, **changes)
    expected = [learning_rate_at(alone, step, 24) for step in range(24)]
    of_run = [settings(Rounds(4, schedule="run").at(number), **changes) for number in range(1, 5)]
    assert [learning_rate_at(config, step, 6) for config in of_run for step in range(6)] == expected
    anew = [settings(Rounds(4).at(number), **changes) for number in range(1, 5)]
    each = [learning_rate_at(alone, step, 6) for step in range(6)]
    assert [learning_rate_at(config, step, 6) for config in anew for step in range(6)] == each * 4
    assert "schedule" not in anew[0].describe()["rounds"]  # of rounds made before there was a choice
    assert of_run[0].describe()["rounds"]["schedule"] == "run"


@pytest.mark.parametrize("mode", MODES)
def test_a_pool_of_rounds_starts_each_round_at_the_merge(base, members, tmp_path, mode):
    records = run(base, members, settings(Rounds(3, mode)), tmp_path / "pool")
    assert [record["number"] for record in records] == [1, 2, 3]
    pool = [Adapter.load(tmp_path / "pool" / name) for name in NAMES]
    merged = Adapter.load(tmp_path / "pool/rounds/round-02/merged")
    assert not merged.prompt_states
    for name, one in zip(NAMES, pool, strict=True):
        assert one.manifest["task"] == name
        assert len(one.manifest["history"]) == 2  # of 6 steps
        assert one.directions
        assert one.prompt_states
        assert {signal.partition("/")[0] for signal in one.importance} == {"all", "draft", "verify"}
        assert one.manifest["rounds"]["between_parties"][0].startswith("adapter folders")
        assert one.spec.rank == (12 if mode == "accumulate" else 4)
    final = records[-1]
    for task in final["tasks"].values():
        assert task["own"] < task["base"]
        assert task["scored_rows"] == 16
    seen = record_of(pool[0].manifest, "change")  # in what is merged, the other tasks' rows are
    for member in members:
        other = member.data.record()
        assert other.used <= seen.used
    if mode == "freeze_a":
        for name, value in merged.weights.items():
            if name.endswith(".lora_a"):
                assert all((one.weights[name] == value).all().item() for one in pool)
        by_factors = merge(pool, MergeOptions(method="rsgwm"))
        for name, value in merged.weights.items():
            if name.endswith(".lora_a"):
                assert (by_factors.weights[name] == value).all().item()
    # What the table says of the last round is what the adapters are.
    again = merge_round(
        merged, [Adapter.load(tmp_path / "pool" / name) for name in NAMES], settings(Rounds(3, mode, number=3))
    )
    if mode != "accumulate":  # whose pool holds the state already
        assert again.manifest["round"]["cosines"] == final["cosines"]
    for method in ("linear", "regmean"):
        merge(pool, MergeOptions(method=method))
    assert not list((tmp_path / "pool/rounds/round-03").glob("change*"))
    assert "retained" in render_rounds(records)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2])
def test_a_round_begins_with_the_loss_where_the_last_one_ended(base, members, tmp_path, mode, count):
    """Of the bare base the first, of the merge the second: a step's batch is all rows of its role here."""
    config = settings(Rounds(count, mode), dropout=0.0, batch_size=16, epochs=count, learning_rate=5e-2)
    run(base, members, config, tmp_path / "pool")
    slots = AdapterSlots(base)
    slots.load("merged", Adapter.load(tmp_path / "pool/rounds/round-01/merged"))
    for member in members:
        role, loss = Adapter.load(tmp_path / "pool" / member.name).manifest["history"][0][1:3]
        rows = [row for row in member.data.token_rows(base.tokenizer, 1024, "drop")[0] if row.role == role]
        ends = []
        for slot in (None, "merged"):
            with slots.using(slot):
                [(nats, tokens)] = held_out_nats(slots.model, rows, 16).values()
            ends.append(nats / tokens)
        assert loss == pytest.approx(ends[count - 1], rel=1e-4)
        assert abs(ends[0] - ends[1]) > 0.02
    unwrap(base.model)
    if count == 2 and mode != "accumulate":
        merged = files.sha256_file(tmp_path / "pool/rounds/round-01/merged/adapters.safetensors")
        assert Adapter.load(tmp_path / "pool/change").manifest["warm_start"]["hash"] == merged


def test_losses_of_own_states_in_accumulate_are_those_of_both_parts(base, members, tmp_path):
    records = run(base, members, settings(Rounds(2, "accumulate")), tmp_path / "pool")
    slots = AdapterSlots(base)
    slots.load("own", Adapter.load(tmp_path / "pool/change"))
    rows, _ = members[0].data.token_rows(base.tokenizer, 1024, "drop")
    chosen = [row for role in ("draft", "verify") for row in [r for r in rows if r.role == role][:8]]
    with slots.using("own"):
        sums = held_out_nats(slots.model, chosen, 4).values()
    assert records[-1]["tasks"]["change"]["own"] == pytest.approx(
        sum(n for n, _ in sums) / sum(c for _, c in sums), rel=1e-5
    )


def test_on_top_is_the_sum_with_importance_of_the_upper_part_alone():
    upper, state = adapter(1), adapter(2, rank=8)
    upper.importance = {f"all/{name}": mx.abs(value) for name, value in upper.weights.items()}
    both = on_top(state, upper)
    for module in MODULES:
        expected = dense(upper, module) + dense(state, module)
        np.testing.assert_allclose(dense(both, module), expected, rtol=1e-5, atol=1e-5)
        kept = both.importance[f"all/{module}.lora_b"]
        assert kept.shape == (12, 24)
        assert (kept[4:] == 0).all().item()
    assert both.shape_problems() == []


def test_retention_is_none_where_nothing_was_gained():
    assert retained({"base": 2.0, "own": 1.0, "merged": 1.25}) == 0.75
    assert retained({"base": 1.0, "own": 1.0, "merged": 1.25}) is None


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rounds", "changes", "message"), [
    (Rounds(4), {}, "change: 6 steps cannot be shared out among 4 rounds alike; take 2, 3, 6 rounds, or 8 steps"),
    (Rounds(2, method="rsgwm", parameters={"tau": 0.3, "signal": "all"}), {}, "needs space=product"),
    (Rounds(2, method="regmean"), {"directions": 0}, "training keeps none"),
    (Rounds(2, method="nosuch"), {}, "nosuch"),
    (Rounds(2, method="fisher", parameters={"signal": "draft"}), {}, "importance of all batches: signal=shared"),
    (Rounds(2, method="slerp"), {}, "slerp merges two adapters, and the rounds are of 3 tasks"),
    (Rounds(6), {}, "6 rounds of 1 step each have no room for draft and verify"),
    (Rounds(2, method="ties", parameters={"density": 2}), {}, "density must be in"),
    (None, {}, "have no rounds"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_any_training(base, members, tmp_path, rounds, changes, message):
    with pytest.raises(RsgwmError, match=message.replace("(", r"\(")):
        run(base, members, settings(rounds, **changes), tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"count": 0}, "count = 0"), ({"count": 2, "mode": "nosuch"}, "mode = 'nosuch'"),
    ({"count": 2, "alpha": 0}, "alpha = 0 is not above 0, at most 100"),
    ({"count": 2, "alpha": float("nan")}, "alpha = nan"), ({"count": 2, "alpha": 101}, "at most 100"),
    ({"count": 2, "number": 3}, "number = 3"),
    ({"count": 2, "schedule": "whole"}, "schedule = 'whole' is not of round, run"),
    ({"count": 2, "mode": "freeze_a", "method": "ties"}, "averages factors"),
])  # fmt: skip
def test_settings_out_of_range_are_named(arguments, message):
    with pytest.raises(RsgwmError, match=message):
        Rounds(**arguments)


def test_settings_that_would_move_a_frozen_a_are_refused():
    with pytest.raises(RsgwmError, match="weight_decay 0"):
        settings(Rounds(2, "freeze_a"), optimizer="adamw", weight_decay=0.1)
    with pytest.raises(RsgwmError, match="rounds are for lora"):
        settings(Rounds(2), fine_tune_type="dora")


def test_rounds_of_other_settings_or_rows_are_not_gone_on_from(base, members, tmp_path):
    run(base, members, settings(Rounds(2), steps=2), tmp_path / "pool")
    with pytest.raises(RsgwmError, match=r"other settings|another pool"):
        run(base, members, settings(Rounds(2), steps=2, learning_rate=2e-2), tmp_path / "pool")
    changed = [replace(members[0], data=members[1].data), *members[1:]]
    with pytest.raises(RsgwmError):
        train_rounds(base, NAMES, changed, settings(Rounds(2), steps=2), Saving(tmp_path / "pool", resume="continue"))
    for name in NAMES:  # rounds are compared by themselves, too
        (tmp_path / "pool" / name / "manifest.json").unlink()
    with pytest.raises(RsgwmError, match="round-01 was made with other settings or rows"):
        run(base, members, settings(Rounds(2), steps=2, learning_rate=2e-2), tmp_path / "pool")
    held = [replace(members[0], held_out=members[0].data), *members[1:]]  # by which its losses would be told
    with pytest.raises(RsgwmError, match=r"rows \(change.held_out"):
        run(base, held, settings(Rounds(2), steps=2), tmp_path / "pool")
    with pytest.raises(RsgwmError, match="round-01 was made with other settings"):
        run(load_base(base.path, "bfloat16"), members, settings(Rounds(2), steps=2), tmp_path / "pool")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b'{"key": 1'])
def test_a_damaged_record_is_told_and_made_again_without_it(base, members, tmp_path, content):
    config = settings(Rounds(2), steps=2)
    before = run(base, members, config, tmp_path / "pool")
    record = tmp_path / "pool/rounds/round-02/round.json"
    record.write_bytes(content)
    if content:  # an empty one is none
        with pytest.raises(RsgwmError, match=r"round-02/round.json is damaged; remove it"):
            run(base, members, config, tmp_path / "pool")
        record.unlink()
    assert run(base, members, config, tmp_path / "pool") == before


@pytest.mark.parametrize("name", ["rounds", "merged"])
def test_folders_of_the_pool_are_no_tasks(base, members, tmp_path, name):
    named = [replace(members[0], name=name), *members[1:]]
    with pytest.raises(RsgwmError, match=f"no task can be called {name}"):
        train_rounds(base, (name, *NAMES[1:]), named, settings(Rounds(2)), Saving(tmp_path / "pool"))
    assert not (tmp_path / "pool").exists()


def test_one_task_or_a_single_run_has_no_rounds(base, members, tmp_path):
    with pytest.raises(RsgwmError, match="two tasks or more"):
        train_rounds(base, NAMES[:1], members[:1], settings(Rounds(2)), Saving(tmp_path / "pool"))
    (tmp_path / "c.yaml").write_text(f"base: {base.path}\nrounds: {{count: 2}}\nsteps: 2\n")
    refused = CliRunner().invoke(
        rsgwm,
        [
            "train",
            "--config",
            str(tmp_path / "c.yaml"),
            "--corpus",
            str(tmp_path / "corpus/change"),
            "--out",
            str(tmp_path / "x"),
        ],
    )
    assert refused.exit_code == 2
    assert "rsgwm pool train --rounds" in refused.stderr


def test_the_command_trains_in_rounds_and_shows_them(tiny_base, members, tmp_path):
    corpora = [part for name in NAMES for part in ("--corpus", str(tmp_path / "corpus" / name))]
    command = ["pool", "train", "--base", str(tiny_base), *corpora, "--rounds", "2", "--round-method", "ties", "--set",
               "density=0.5", "--steps", "2", "--batch-size", "4", "--rank", "4", "--alpha", "8", "--directions", "4",
               "--out", str(tmp_path / "pool"), "--json"]  # fmt: skip
    done = CliRunner().invoke(rsgwm, command)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert [record["number"] for record in told["rounds"]] == [1, 2]
    assert "own → merged" in done.stderr
    lone = CliRunner().invoke(rsgwm, [*command[:4], *corpora, "--round-mode", "freeze_a", "--out", str(tmp_path / "x")])
    assert lone.exit_code == 2
    assert "are for --rounds" in lone.stderr
