"""Families, templates, corpora and batches."""

import random
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.arithmetic import false_equations
from mlx_rsgwm.data.batching import TokenRow, make_batch, plan_epoch
from mlx_rsgwm.data.corpus import load_corpus, make_rows, save_corpus, tokenize
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.synthetic import SPLITS, generate
from mlx_rsgwm.data.template import TEMPLATES, Template
from mlx_rsgwm.data.word_problems import PLAIN
from mlx_rsgwm.evaluation.answers import extract, is_correct


@pytest.mark.parametrize("family", PLAIN)
def test_families_are_seeded_right_and_disjoint(family):
    sets = {split: generate(family, 60, 3, split) for split in SPLITS}
    assert generate(family, 20, 3, "test") == sets["test"][:20]
    assert generate(family, 20, 4, "test") != sets["test"][:20]
    texts = [question.question for questions in sets.values() for question in questions]
    assert len(set(texts)) == len(texts)
    for question in sets["train"]:
        left, right = question.rationale.split("=")
        assert eval(left) == float(right)  # the rationale is a generated line of digits and one operator
        assert float(right) == float(question.gold)
        assert is_correct(extract(question.answer, "strict").value, question.gold)


def test_template_hash_follows_the_wording_only():
    plain = TEMPLATES["plain"]
    renamed = Template("other", plain.draft, plain.verify)
    assert renamed.hash == plain.hash
    assert Template("plain", plain.draft + " ", plain.verify).hash != plain.hash
    assert Template.from_description(plain.describe()) == plain
    with pytest.raises(RsgwmError, match="hash"):
        Template.from_description({**plain.describe(), "draft": "{question}?"})


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render(base, name):
    template = TEMPLATES[name]
    text = base.tokenizer.decode(template.verify_prompt(base.tokenizer, "What is {answer}?", "#### 5"))
    assert "What is {answer}?" in text
    assert "#### 5" in text
    completion = template.completion(base.tokenizer, "1\n#### 1")
    assert completion[-1] == base.tokenizer.eos_token_id


def test_corpus_is_balanced_and_read_back(base, tmp_path):
    questions = generate("change", 30, 1, "train")
    rows = make_rows(questions, 30, 20, 1)
    verdicts = [row.correct for row in rows if row.role == "verify"]
    assert sum(verdicts) == 10
    gold = {question.question: question for question in questions}
    for row in rows:
        if row.role == "verify":
            right = is_correct(extract(row.answer, "strict").value, gold[row.question].gold)
            assert right == row.correct
    saved = save_corpus(tmp_path / "c", rows, TEMPLATES["plain"], {"seed": 1})
    again = load_corpus(tmp_path / "c")
    assert again.rows == tuple(rows)
    assert again.hash == saved.hash
    token_rows, dropped = tokenize(again, base.tokenizer, 1000)
    assert (len(token_rows), dropped) == (50, 0)
    longest = max(len(row.tokens) for row in token_rows)
    fewer, dropped = tokenize(again, base.tokenizer, longest - 1)
    assert dropped >= 1
    assert len(fewer) + dropped == 50
    with pytest.raises(RsgwmError, match="every row of the corpus is longer"):
        tokenize(again, base.tokenizer, 2)


def test_changed_corpus_is_refused(tmp_path):
    save_corpus(tmp_path, make_rows(generate("change", 4, 1, "train"), 4, 2, 1), TEMPLATES["plain"], {})
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(RsgwmError, match="was changed after it was built"):
        load_corpus(tmp_path)


def random_rows(count, seed=0):
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        prompt, completion = rng.randint(1, 30), rng.randint(1, 9)
        tokens = tuple(rng.randint(1, 300) for _ in range(prompt + completion))
        rows.append(TokenRow("verify" if index % 3 == 0 else "draft", tokens, prompt))
    return rows


def test_batch_trains_completion_tokens_and_nothing_else():
    rows = [row for row in random_rows(20) if row.role == "draft"]
    batch = make_batch(rows)
    count = int(batch.weights.sum().item())
    assert count == batch.trained_tokens == sum(len(row.tokens) - row.prompt_length for row in rows)
    width = batch.inputs.shape[1]
    inputs = np.array(batch.inputs)
    found = {}
    for position, target in zip(batch.positions.tolist()[:count], batch.targets.tolist()[:count], strict=True):
        found.setdefault(position // width, []).append((position % width, target))
    for index, row in enumerate(rows):
        expected = [(at - 1, row.tokens[at]) for at in range(row.prompt_length, len(row.tokens))]
        assert found[index] == expected
        assert inputs[index, : len(row.tokens) - 1].tolist() == list(row.tokens[:-1])
        assert not inputs[index, len(row.tokens) - 1 :].any()
    assert not np.array(batch.weights)[count:].any()
    assert batch.padded_tokens == sum(width - len(row.tokens) + 1 for row in rows)


def test_epoch_uses_every_row_once_in_batches_of_one_role():
    rows = random_rows(50)
    plan = plan_epoch(rows, 8, seed=1, epoch=0)
    assert sorted(index for batch in plan for index in batch) == list(range(50))
    for batch in plan:
        assert len({rows[index].role for index in batch}) == 1
    assert plan == plan_epoch(rows, 8, seed=1, epoch=0)
    assert plan != plan_epoch(rows, 8, seed=1, epoch=1)


def test_bucketing_pads_little():
    rows = random_rows(400)
    batches = [make_batch([rows[i] for i in batch]) for batch in plan_epoch(rows, 8, 1, 0)]
    padded, real = sum(b.padded_tokens for b in batches), sum(b.real_tokens for b in batches)
    unsorted = [make_batch(rows[i : i + 8]) for i in range(0, 400, 8)]
    assert padded / (padded + real) < 0.5 * sum(b.padded_tokens for b in unsorted) / sum(
        b.padded_tokens + b.real_tokens for b in unsorted
    )
    assert all(left.inputs.dtype == right.inputs.dtype == mx.int32 for left, right in pairwise(batches))


def test_wrong_answers_that_a_calculator_cannot_find():
    questions = generate("change", 80, 1, "train")
    wrong = [row for row in make_rows(questions, 0, 80, 1) if row.correct is False]
    assert any(false_equations(row.answer) for row in wrong)  # by default some are slips
    rows = make_rows(questions, 0, 80, 1, true_equations=True)
    gold = {question.question: question for question in questions}
    for row in rows:
        if row.correct is False:
            left, result = row.answer.split("\n")[0].split("=")
            assert eval(left) == float(result)  # a generated line of digits and one operator
            assert not is_correct(extract(row.answer, "strict").value, gold[row.question].gold)
    assert sum(row.correct is False for row in rows) == 40
    certain = [Question("q", "t", "What is 2 and 2?", "7 + 7 = 15\n2 + 2 = 5", "5")]
    with pytest.raises(RsgwmError, match="only 0 of 1 questions"):
        make_rows(certain, 0, 1, 1, true_equations=True)


def test_another_corpus_is_not_written_over(tmp_path):
    rows = make_rows(generate("change", 4, 1, "train"), 4, 2, 1)
    first = save_corpus(tmp_path, rows, TEMPLATES["plain"], {"seed": 1}, replace=False)
    assert save_corpus(tmp_path, rows, TEMPLATES["plain"], {"seed": 1}, replace=False).hash == first.hash
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for others, seed in ((rows[:-1], 1), (rows, 2)):
        with pytest.raises(RsgwmError, match="already holds another corpus; --replace it"):
            save_corpus(tmp_path, others, TEMPLATES["plain"], {"seed": seed}, replace=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(save_corpus(tmp_path, rows[:-1], TEMPLATES["plain"], {"seed": 1}).rows) == len(rows) - 1


@pytest.mark.parametrize("manifest", ['{"format": "mlx-rsgwm/adapter"}', "{}"])
def test_what_is_no_corpus_is_not_replaced_by_one(tmp_path, manifest):
    rows = make_rows(generate("change", 4, 1, "train"), 4, 2, 1)
    (tmp_path / "manifest.json").write_text(manifest)
    for replace in (False, True):
        with pytest.raises(RsgwmError, match="holds something else than a corpus"):
            save_corpus(tmp_path, rows, TEMPLATES["plain"], {"seed": 1}, replace=replace)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"manifest.json": manifest}
    (tmp_path / "manifest.json").write_text('{"format": "mlx-rsg')  # what is left of one may be a corpus
    assert save_corpus(tmp_path, rows, TEMPLATES["plain"], {"seed": 1}).rows == tuple(rows)
