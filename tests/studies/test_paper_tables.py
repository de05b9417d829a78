"""The paper's tables on the tiny base: every row measured, printed beside the paper's, resumed without the model."""

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.studies.paper_tables import Setting, file_name, measure_table, table_notes, table_rows

VARIANTS = ("default", "balanced", "phase-2 prompts")


@pytest.fixture
def run(make_adapter, tmp_path):
    for seed, name in ((1, "drafter"), (2, "verifier")):
        make_adapter(seed).save(tmp_path / "run" / name)
    return tmp_path / "run"


@pytest.mark.parametrize("table", [1, 2, 3])
def test_a_table(table, run, base, tmp_path, monkeypatch):
    config = LoopConfig(2, 0.4, "yesno", Sampling(max_tokens=4))
    setting = Setting(config, (1, 2) if table > 1 else (1,), 1, 6)
    arguments = (
        table, base, dict.fromkeys(VARIANTS, run), generate("change", 3, 1, "test"), dict.fromkeys(VARIANTS, setting),
        tmp_path / "out",
    )  # fmt: skip
    found = measure_table(*arguments)
    rows, notes = table_rows(found), " ".join(table_notes(found))
    assert len(rows) == 1 + 2 * len(found["rows"])
    assert all(len(row) == len(rows[0]) for row in rows)
    shown = {row[0]: row for row in rows}
    if table == 1:
        column = rows[0].index("false accepts")
        assert shown["GWM-DV-V2, paper"][column] == "0.0115"
        assert "0.0575" in notes
        assert found["rows"][0]["verifier"] == "drafter"
        assert "[" in shown["Single-GWM, here"][2]
    if table == 2:
        assert [row["threshold"] for row in found["rows"]] == [0.7, 0.5, 0.5]
        assert "asked in other words" in notes
        names = [file_name(row["name"]) for row in found["rows"][1:]]
        scores = [(tmp_path / "out" / f"{name}.jsonl").read_text() for name in names]
        assert scores[0] != scores[1]
        assert "(" in shown["τ 0.5 (smoke), here"][2]
    if table == 3:
        assert "template=chat" in notes
    monkeypatch.setattr(DraftVerify, "draft_many", lambda *rest: pytest.fail("drafted again"))
    assert measure_table(*arguments) == found


def test_there_is_no_table_4(base, tmp_path):
    with pytest.raises(RsgwmError, match="1, 2 and 3, found 4"):
        measure_table(4, base, {}, [], {}, tmp_path)
