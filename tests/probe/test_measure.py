"""The table of pairs: its rows and blocks, going on after a stop, and what cannot be measured."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import mlx.core as mx
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.probe import measure
from mlx_rsgwm.probe.inputs import probed_adapters
from mlx_rsgwm.probe.measure import measure_pairs, pair_blocks, write_table
from mlx_rsgwm.probe.table import read_table


@pytest.fixture
def folders(make_adapter, tmp_path):
    """Five adapters on disk."""
    return [make_adapter(seed).save(tmp_path / f"task-{seed}") for seed in range(5)]


@pytest.mark.parametrize(("count", "block"), [(2, 8), (5, 2), (9, 3), (8, 8), (7, 1)])
def test_blocks_have_every_pair_once_and_few_adapters(count, block):
    blocks = list(pair_blocks(count, block))
    assert sorted(pair for pairs in blocks for pair in pairs) == list(combinations(range(count), 2))
    assert max(len({place for pair in pairs for place in pair}) for pairs in blocks) <= 2 * block


def test_rows_do_not_depend_on_blocks(folders):
    adapters, _ = probed_adapters(folders)
    whole, blocks = (
        {pair: row for rows in measure_pairs(adapters, block=size) for pair, row in rows.items()} for size in (8, 2)
    )
    assert whole.keys() == blocks.keys() == set(combinations(range(5), 2))
    for pair, row in whole.items():
        assert blocks[pair].measures == pytest.approx(row.measures, rel=1e-6, abs=1e-9)
        assert blocks[pair].adapters == row.adapters
        assert row.tasks == tuple(f"task-{place}" for place in pair)


def test_a_table_that_was_cut_off_goes_on(folders, tmp_path, monkeypatch):
    adapters, at = probed_adapters(folders)
    monkeypatch.setattr(measure, "BLOCK", 2)
    write_table(tmp_path / "whole.jsonl", adapters, at)
    whole = read_table(tmp_path / "whole.jsonl").in_order()
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(lines[:4]) + lines[4][:20])
    seen = []
    monkeypatch.setattr(measure, "pair_measures", lambda modules: seen.append(1) or {"x": 1.0})
    write_table(cut, adapters, at)
    assert len(seen) == 10 - 3  # what was there is not measured again
    rows = read_table(cut).in_order()
    assert [row.adapters for row in rows] == [row.adapters for row in whole]
    assert [row.adapters for row in whole] == list(combinations(map(str, folders), 2))
    assert read_table(cut).by_pair().keys() == read_table(tmp_path / "whole.jsonl").by_pair().keys()


def test_a_table_of_other_adapters_is_refused_or_replaced(folders, tmp_path):
    path = tmp_path / "table.jsonl"
    write_table(path, *probed_adapters(folders[:2]))
    before = path.read_text()
    other, at = probed_adapters(folders[1:3])
    with pytest.raises(RsgwmError, match="other settings"):
        write_table(path, other, at)
    assert path.read_text() == before
    write_table(path, other, at, replace_other=True)
    assert read_table(path).rows[0].adapters == tuple(str(folder) for folder in folders[1:3])


def snapshot(make_adapter, folder, seed, shares=(0.02, 0.05)):
    """A snapshot below the folder of a finished adapter."""
    young = make_adapter(seed, size=0.01)
    path = young.save(folder / "snapshots" / "step-000003")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest |= {"kind": "snapshot", "step": 3, "shares": list(shares)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    gradient = {name: mx.ones(value.shape) * (seed + 1) for name, value in young.weights.items()}
    mx.save_safetensors(str(path / "gradient.safetensors"), gradient)
    return path


def test_snapshots_are_measured_at_their_share(folders, make_adapter):
    young = [snapshot(make_adapter, folder, seed) for seed, folder in enumerate(folders[:2])]
    adapters, at = probed_adapters(folders[:2], 0.05)
    (row,) = next(measure_pairs(adapters)).values()
    assert at == 0.05
    assert row.tasks == ("task-0", "task-1")
    assert row.adapters == tuple(map(str, folders[:2]))  # as the outcomes of the finished adapters call them
    assert row.measures["training_gradient_cosine"] == pytest.approx(1)
    (finished,) = next(measure_pairs(probed_adapters(folders[:2])[0])).values()
    assert "training_gradient_cosine" not in finished.measures
    assert row.measures["task_vector_l2"] < finished.measures["task_vector_l2"] / 5
    assert probed_adapters(young)[1] == 0.05
    with pytest.raises(RsgwmError, match=r"no snapshot at 0\.01"):
        probed_adapters(folders[:2], 0.01)
    with pytest.raises(RsgwmError, match=r"different fractions of training.*at 1"):
        probed_adapters([folders[0], young[1]])
    with pytest.raises(RsgwmError, match="different fractions"):
        probed_adapters([young[0], snapshot(make_adapter, folders[2], 2, (0.5,))])


def test_an_adapter_before_its_first_step_is_refused(make_adapter, folders, tmp_path):
    still = make_adapter(7)
    zero = {n: mx.zeros(v.shape) if n.endswith("lora_b") else v for n, v in still.weights.items()}
    path = replace(still, weights=zero).save(tmp_path / "still")
    with pytest.raises(RsgwmError, match=r"no optimiser step was taken, every update is zero: .*still"):
        probed_adapters([folders[0], path])


def test_what_has_nothing_in_common_is_refused(make_adapter, tmp_path):
    sources = [
        make_adapter(seed, keys=(key,)).save(tmp_path / key)
        for seed, key in enumerate(("self_attn.q_proj", "self_attn.v_proj"))
    ]
    out = tmp_path / "table.jsonl"
    with pytest.raises(RsgwmError, match="no module in common"):
        write_table(out, *probed_adapters(sources))
    assert not out.exists()
    with pytest.raises(RsgwmError, match="a pair is two adapters, found 1"):
        probed_adapters(sources[:1])


def test_modules_in_common_that_only_one_changes(make_adapter, tmp_path):
    keys = ("self_attn.q_proj", "self_attn.v_proj")
    sources = []
    for seed, zeroed in enumerate(keys):
        adapter = make_adapter(seed, keys=keys)
        weights = {n: mx.zeros(v.shape) if n.endswith(f"{zeroed}.lora_b") else v for n, v in adapter.weights.items()}
        sources.append(replace(adapter, weights=weights).save(tmp_path / str(seed)))
    with pytest.raises(RsgwmError, match="change no module both"):
        write_table(tmp_path / "table.jsonl", *probed_adapters(sources))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}\n", "no table"),
        ("", "no table"),
        ('{"about": {"kind": "pair-table", "version": 1, "at": 1.0}}\n', "no pairs"),
        ('{"about": {"kind": "pair-table", "version": 1, "at": 7}}\n', "share of training"),
        ('{"about": {"kind": "pair-table", "version": 1, "at": 1}}\n{"adapters": ["a", "a"]}\n', "line 2 is damaged"),
        (
            '{"about": {"kind": "pair-table", "version": 1, "at": 1}}\n{"adapters": ["a", "b"], "tasks": ["a", "b"], '
            '"modules": 3, "measures": {"x": "y"}}\n',
            "line 2 is damaged",
        ),
        ("not json\n", "no table"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, line, message):
    path = tmp_path / "table.jsonl"
    path.write_text(line)
    with pytest.raises(RsgwmError, match=message):
        read_table(path)
