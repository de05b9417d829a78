"""One file of a user's own through every command: built, trained, merged, calibrated, evaluated."""

import json
import random
import shutil

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.data.corpus import load_corpus
from mlx_rsgwm.data.row_hashes import RowRecord, folded, record_of
from mlx_rsgwm.evaluation import judging
from mlx_rsgwm.evaluation.records import DraftRecord, read_items
from mlx_rsgwm.inference.calibration import FILE as CALIBRATION_FILE
from mlx_rsgwm.inference.calibration import load_calibration

ROWS = [{"question": f"What is {n} plus 3?", "answer": f"{n} + 3 = {n + 3}\n#### {n + 3}"} for n in range(60)]


def invoke(*arguments, code=0):
    made = CliRunner().invoke(rsgwm, [*(str(argument) for argument in arguments), "--json"])
    assert made.exit_code == code, made.output
    return json.loads(made.stdout.splitlines()[-1]), made.stderr


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base):
    """A drafter and a verifier, merged from two adapters that were trained on the training share of one file."""
    folder = tmp_path_factory.mktemp("own")
    mine = write(folder / "mine.jsonl", ROWS)
    built, told = invoke("data", "build", "--task", mine, "--out", folder / "corpus", "--draft-rows", 12,
                         "--verify-rows", 12)  # fmt: skip
    assert built["counts"]["mine"] == {"draft": 12, "verify": 12}
    assert "of 60 rows, from its train share" in told
    for name, seed in (("a", 1), ("b", 2)):
        invoke("train", "--base", tiny_base, "--corpus", folder / "corpus", "--rank", 2, "--steps", 2, "--seed", seed,
               "--max-seq-length", 512, "--out", folder / name)  # fmt: skip
    for role in ("draft", "verify"):
        invoke("merge", folder / "a", folder / "b", "--method", "linear", "--role", role, "--out", folder / role)
    return folder


def evaluate(folder, base, *more, code=0):
    return invoke(
        "eval", "--base", base, "--drafter", folder / "draft", "--verifier", folder / "verify", "--max-tokens", 4,
        "--attempts", 2, "--timed", 0, "--score", "yesno", "--threshold", 0.5, *more, code=code,
    )  # fmt: skip


def test_no_row_is_on_two_sides_of_the_whole_line(trained, tiny_base, tmp_path, monkeypatch):
    judge = lambda question, draft, scores, *more: DraftRecord(draft.text, "1", len(draft.text) % 2 == 0, scores)  # noqa: E731
    monkeypatch.setattr(judging, "judge", judge)
    corpus = load_corpus(trained / "corpus")
    used = RowRecord.of(row.question for row in corpus.rows)
    for name in ("a", "draft", "verify"):
        manifest = json.loads((trained / name / "manifest.json").read_text())
        assert record_of(manifest, name).used == used.used
    mine = write(tmp_path / "renamed.jsonl", random.Random(3).sample(ROWS, 60))
    invoke("calibrate", "--base", tiny_base, "--drafter", trained / "draft", "--verifier", trained / "verify",
           "--task", mine, "--max-tokens", 4, "--attempts", 2)  # fmt: skip
    calibrated = RowRecord.from_description(load_calibration(trained / "verify").row_hashes, "")
    assert not calibrated.used & used.used
    monkeypatch.undo()
    table = tmp_path / "mine.csv"
    table.write_text("question,answer\n" + "".join(f"{row['question']},x\n" for row in ROWS))
    for file in (trained / "mine.jsonl", mine, table):
        result, told = evaluate(trained, tiny_base, "--task", file, "--out", tmp_path / f"report-{file.name}")
        asked = {folded(record.question) for record in read_items(tmp_path / f"report-{file.name}" / "items.jsonl")}
        assert result["n"] == len(asked) < 20
        assert not RowRecord.of(asked).used & (used | calibrated).used
        assert "from its test share" in told
        assert result["overlap"]["headline"] == ""
    halves = [write(tmp_path / f"{name}.jsonl", ROWS[start::2]) for start, name in ((0, "x"), (1, "y"))]
    over_two, _ = evaluate(trained, tiny_base, "--task", halves[0], "--task", halves[1])
    assert over_two["n"] == result["n"]


def test_an_overlap_is_refused_or_stands_above_the_result(trained, tiny_base, tmp_path):
    corpus = load_corpus(trained / "corpus")
    rows = [{"id": f"r{n}", "question": row.question.upper(), "answer": "1"} for n, row in enumerate(corpus.rows[:3])]
    other = [{"id": f"o{n}", "question": f"Name number {n}!", "answer": str(n)} for n in range(5)]
    mixed, alone = write(tmp_path / "mixed.jsonl", other + rows), write(tmp_path / "alone.jsonl", other)
    error, _ = evaluate(trained, tiny_base, "--task", mixed, "--out", tmp_path / "r", code=2)
    assert "3 of 8 test questions were trained or calibrated on (drafter 3, verifier 3), such as r0" in error["error"]
    assert not (tmp_path / "r").exists()
    result, told = evaluate(trained, tiny_base, "--task", mixed, "--out", tmp_path / "r", "--allow-overlap")
    headline = "NOT A TEST: 3 of 8 items were trained or calibrated on (drafter 3, verifier 3)"
    assert result["overlap"]["headline"] == headline
    assert headline in told
    assert (tmp_path / "r" / "report.md").read_text().split("\n")[2] == headline
    page = (tmp_path / "r" / "report.html").read_text()
    assert page.index(f'<p class="alarm">{headline}</p>') < page.index("<header>")  # above the verdict
    assert json.loads((tmp_path / "r" / "report.json").read_text())["overlap"]["items"] == 3
    whole, _ = evaluate(trained, tiny_base, "--task", alone)
    assert whole["n"] == 5
    assert whole["overlap"]["items"] == 0
    error, _ = invoke("calibrate", "--base", tiny_base, "--drafter", trained / "draft", "--verifier",
                      trained / "verify", "--task", trained / "mine.jsonl", "--split", "train", code=2)  # fmt: skip
    assert "calibration questions were trained or calibrated on" in error["error"]


def test_calibration_with_nothing_right_is_refused(trained, tiny_base, tmp_path):
    before = sorted(trained.rglob("*"))
    error, _ = invoke("calibrate", "--base", tiny_base, "--drafter", trained / "draft", "--verifier",
                      trained / "verify", "--task", trained / "mine.jsonl", "--max-tokens", 4, code=2)  # fmt: skip
    assert "none of" in error["error"]
    assert "cannot be calibrated" in error["error"]
    assert sorted(trained.rglob("*")) == before


def test_text_answers_get_verify_rows(tmp_path):
    names = ["Paris", "Rome", "Oslo", "Paris, France", "COVID-19", "Lima", "Cairo", "the blue whale"]
    mine = write(tmp_path / "geo.jsonl", [{"question": f"Q{n}?", "answer": name} for n, name in enumerate(names)])
    built, _ = invoke("data", "build", "--task", mine, "--split", "all", "--out", tmp_path / "c")
    assert built["counts"]["geo"] == {"draft": 8, "verify": 8}
    gold = {f"Q{n}?": f"#### {name}" for n, name in enumerate(names)}
    for row in load_corpus(tmp_path / "c").rows:
        assert (row.answer == gold[row.question]) == (row.correct is not False)
        if row.correct is False:
            assert {row.answer, gold[row.question]} != {"#### Paris", "#### Paris, France"}
    single = write(tmp_path / "one.jsonl", [{"question": "Q?", "answer": "Paris"}])
    built, told = invoke("data", "build", "--task", single, "--split", "all", "--out", tmp_path / "d")
    assert built["counts"]["one"] == {"draft": 1, "verify": 0}
    assert "0 verify rows instead of 100: no wrong answer can be made" in told


def test_a_test_file_is_never_calibrated_on(trained, tiny_base, tmp_path):
    """Without a calibration, a file that the adapters do not know is asked whole, however few rows it has."""
    other = write(
        tmp_path / "other.jsonl", [{"question": f"How much is {n} less 1?", "answer": n - 1} for n in range(5)]
    )
    shutil.copytree(trained / "verify", tmp_path / "verify")
    (tmp_path / "verify" / CALIBRATION_FILE).unlink(missing_ok=True)
    result, told = invoke(
        "eval", "--base", tiny_base, "--drafter", trained / "draft", "--verifier", tmp_path / "verify", "--task", other,
        "--max-tokens", 4, "--attempts", 2, "--timed", 0,
    )  # fmt: skip
    assert result["metadata"]["tasks"][0]["split"] == "all"
    assert result["metadata"]["tasks"][0]["items"] == 5
    assert "not calibrated: its score is mean_logprob" in told


def test_calibrating_within_eval_is_checked_like_any(trained):
    """Of a file that the adapters know the calibration share is taken, and what was trained on is refused."""
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.evaluation.contamination import draw_calibration, rows_seen

    mine = str(trained / "mine.jsonl")
    seen = rows_seen({"drafter": trained / "draft"})
    drawn = draw_calibration([mine], 24, 0, None, seen, False, only_known_files=True)
    assert len(drawn.record.in_files) == 60
    assert len(drawn.questions) == len(drawn.record.used) > 0
    assert not drawn.record.used & seen["drafter"].used
    assert "from its calibration share" in drawn.notes[0]
    with pytest.raises(RsgwmError, match="calibration questions were trained or calibrated on"):
        draw_calibration([mine], 24, 0, None, {"drafter": drawn.record}, False)
    allowed = draw_calibration([mine], 24, 0, None, {"drafter": drawn.record}, True)
    count = len(drawn.questions)
    assert f"NOT HELD OUT: {count} of {count} items were trained or calibrated on (drafter {count})" in allowed.notes
    assert draw_calibration([mine], 24, 0, None, {}, False, only_known_files=True).questions == ()


def test_rows_trained_on_in_another_format_are_recognised(trained, tiny_base, tmp_path):
    """Text that was rendered by hand, asked again as questions from a CSV file."""
    form = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    texts = [{"text": form.format(**row)} for row in ROWS[:4]]
    invoke("train", "--base", tiny_base, "--corpus", write(tmp_path / "texts.jsonl", texts), "--rank", 2, "--steps", 1,
           "--out", tmp_path / "a")  # fmt: skip
    table = tmp_path / "asked.csv"
    table.write_text("id,question,answer\n" + "".join(f"{n},{ROWS[n]['question']},1\n" for n in (59, 3, 9, 1)))
    pair = ("--drafter", tmp_path / "a", "--verifier", tmp_path / "a", "--base", tiny_base, "--task", table)
    for command in (("eval", "--template", "plain"), ("calibrate", "--split", "all", "--template", "plain")):
        error, _ = invoke(*command, *pair, code=2)
        assert "2 of 4 " in error["error"]
        assert "(drafter 2, verifier 2), such as 3;" in error["error"]


def test_what_was_fused_into_a_base_is_known(trained, tiny_base, tmp_path):
    """Rows of the adapter in the base: refused in evaluation, told by ``loss``, recorded by what is trained on it."""
    fused, other = tmp_path / "fused", tmp_path / "other"
    result, _ = invoke("fuse", trained / "a", "--out", fused, "--base", tiny_base, "--force")
    assert "row_hashes" not in result
    new = [{"prompt": f"Name number {n}!", "completion": str(n)} for n in range(3)]
    invoke("train", "--base", fused, "--corpus", write(tmp_path / "new.jsonl", new), "--rank", 2, "--steps", 1,
           "--out", other)  # fmt: skip
    used = record_of(json.loads((trained / "a" / "manifest.json").read_text()), "").used
    again = record_of(json.loads((other / "manifest.json").read_text()), "")
    assert used < again.used
    assert not again.unknown
    corpus = load_corpus(trained / "corpus")
    asked = write(tmp_path / "asked.jsonl", [{"question": row.question, "answer": "1"} for row in corpus.rows[:3]])
    bare = tmp_path / "bare"
    shutil.copytree(other, bare)
    manifest = json.loads((bare / "manifest.json").read_text())
    (bare / "manifest.json").write_text(json.dumps({**manifest, "data": None, "row_hashes": None}))
    for command in (("eval",), ("eval", "--base", fused), ("calibrate",)):
        error, _ = invoke(*command, "--drafter", bare, "--verifier", bare, "--task", asked, "--split", "all",
                          "--template", "plain", code=2)  # fmt: skip
        assert "3 of 3 " in error["error"]
        assert "(base 3)" in error["error"]
    rows = write(tmp_path / "rows.jsonl", [{"prompt": row.question, "completion": "1"} for row in corpus.rows[:3]])
    told = CliRunner().invoke(rsgwm, ["loss", str(rows), "--base", str(fused), "--adapter", str(bare)]).output
    assert "NOT NEW: base was trained on what 3 of the 3 rows ask" in told
    assert f"NOT NEW: {bare} was trained on what 3 of the 3 rows ask" in told


def test_items_asked_twice_are_told(trained, tiny_base, tmp_path):
    rows = [{"id": n, "question": f"Which is {'abcab'[n]}?", "answer": str(n % 3)} for n in range(5)]
    result, told = evaluate(trained, tiny_base, "--task", write(tmp_path / "x.jsonl", rows), "--out", tmp_path / "r")
    line = "2 of 5 items ask what another item asks, and count each time"
    assert line in told
    assert f"{line}." in (tmp_path / "r" / "report.md").read_text()
    assert (result["n"], result["overlap"]["repeated"]) == (5, 2)
    write(tmp_path / "x.jsonl", [{**row, "answer": str(row["id"])} for row in rows])
    error, _ = invoke("eval", "--base", tiny_base, "--drafter", trained / "draft", "--verifier", trained / "verify",
                      "--task", tmp_path / "x.jsonl", code=2)  # fmt: skip
    assert "2 questions have two different gold answers: lines 1 ('0') and 4 ('3')" in error["error"]


def test_two_files_of_one_name_are_no_pool(tmp_path):
    (tmp_path / "a").mkdir()
    files = [write(folder / "mine.jsonl", ROWS) for folder in (tmp_path, tmp_path / "a")]
    error, _ = invoke("pool", "train", "--task", files[0], "--task", files[1], "--out", tmp_path / "pool", code=2)
    assert "two --corpus or --task are called mine" in error["error"]
    other = write(tmp_path / "a" / "Mine.jsonl", ROWS)  # one folder where a disk does not tell them apart
    error, _ = invoke("pool", "train", "--task", files[0], "--task", other, "--out", tmp_path / "pool", code=2)
    assert "two --corpus or --task are called Mine" in error["error"]
    assert not (tmp_path / "pool").exists()


def test_a_row_given_twice_is_calibrated_on_once(tmp_path):
    """The halves of a risk bound must not share rows: one fits, the other tests."""
    from mlx_rsgwm.evaluation.contamination import draw_calibration

    doubled = [{**row, "question": row["question"].upper()} for row in ROWS] + ROWS
    once, twice = write(tmp_path / "once.jsonl", ROWS), write(tmp_path / "twice.jsonl", doubled)
    alone = draw_calibration([str(once)], 60, 0, None, {}, False)
    for tasks in ([str(twice)], [str(once), str(twice)]):
        drawn = draw_calibration(tasks, 60, 0, None, {}, False)
        assert (len(drawn.questions), drawn.record) == (len(alone.questions), alone.record)
