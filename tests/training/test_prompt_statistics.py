"""What training keeps of its prompts: of which questions, of the bare base, after the last round, at no one's cost."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.data.corpus import make_rows, save_corpus
from mlx_rsgwm.data.mlx_lm_rows import load_examples
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models import prompt_states as reading
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.prompt_states import depth_of, prompt_states
from mlx_rsgwm.models.prompt_statistics import PromptStatistics, statistics_of_pool
from mlx_rsgwm.training import prompt_statistics as sampling
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.loop import finish, train
from mlx_rsgwm.training.prompt_statistics import sample_prompts
from mlx_rsgwm.training.rounds import Rounds


class Told(Progress):
    """Remembers what was said."""

    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


def test_they_are_of_the_corpus_questions_in_the_bare_base(base, corpus, config, tmp_path):
    prompts = [
        corpus.template.draft_prompt(base.tokenizer, text) for text in dict.fromkeys(r.question for r in corpus.rows)
    ]
    expected = PromptStatistics.of_states(
        prompt_states(base, prompts, 1), depth_of(base), base.fingerprint, corpus.template.hash
    )
    saving = Saving(tmp_path / "run", every=0, snapshots=())
    finish(train(base, corpus, config(learning_rate=1e-2), saving=saving), saving)
    adapter = Adapter.load(saving.folder)
    (kept,) = statistics_of_pool([adapter]).values()
    assert (kept.questions, kept.layer, kept.base) == (13, 1, base.fingerprint)
    assert kept.template == corpus.template.hash == adapter.template_hash
    np.testing.assert_allclose(kept.mean, expected.mean, atol=1e-5)
    np.testing.assert_allclose(kept.covariance(), expected.covariance(), atol=1e-5)
    assert not list((saving.folder / "checkpoints").rglob("prompt_states*"))
    names = {name for name in json.loads((saving.folder / "manifest.json").read_text())["files"] if "states" in name}
    assert names == {"prompt_states.safetensors"}


def test_steps_are_not_touched(base, corpus, config, monkeypatch):
    with_states = train(base, corpus, config())
    monkeypatch.setattr(reading, "split_blocks", lambda model: None)
    progress = Told()
    without = train(base, corpus, config(), progress=progress)
    assert with_states.prompt_states
    assert not without.prompt_states
    assert [text for text in progress.messages if "no prompt states are kept" in text] == [
        "train: no prompt states are kept to route by: the layers of this base cannot be reached one by one, so it has "
        "no states to route by"
    ]
    assert with_states.content_hash() == without.content_hash()


def test_a_large_corpus_is_sampled_by_the_seed(base, config, tmp_path):
    rows = make_rows(generate("groups", 90, 1, "train"), 90, 0, 1)
    corpus = save_corpus(tmp_path / "corpus", rows, TEMPLATES["plain"], {"seed": 1})
    first, again, other = (sample_prompts(base, corpus, config(seed=seed)) for seed in (1, 1, 2))
    everything = {tuple(TEMPLATES["plain"].draft_prompt(base.tokenizer, row.question)) for row in rows}
    assert len(first) == len({*map(tuple, first)}) == 64
    assert first == again != other
    assert {*map(tuple, first)} < everything
    lengths = sorted(map(len, everything))
    short = sample_prompts(base, corpus, config(max_tokens=lengths[20]))
    assert 20 < len(short) < 64
    assert max(map(len, short)) <= lengths[20]


def test_too_few_questions_cost_no_adapter(base, config, tmp_path):
    rows = make_rows(generate("change", 4, 1, "train"), 4, 4, 1)
    corpus = save_corpus(tmp_path / "corpus", rows, TEMPLATES["plain"], {"seed": 1})
    progress = Told()
    adapter = train(base, corpus, config(), progress=progress)
    assert not adapter.prompt_states
    assert any("of at least 5 questions, found 4" in text for text in progress.messages)


def test_rows_without_a_template_have_none(base, config, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": f"This is line {number}."}) + "\n" for number in range(8)))
    progress = Told()
    adapter = train(base, load_examples(path, False), config(), progress=progress)
    assert not adapter.prompt_states
    assert not any("prompt states" in text for text in progress.messages)


def test_the_last_round_alone_reads_them(base, corpus, config, monkeypatch):
    """14 steps in two rounds."""
    read = []
    states = sampling.StateReader.states
    monkeypatch.setattr(sampling.StateReader, "states", lambda self, prompts: read.append(1) or states(self, prompts))
    for number, count in ((1, 0), (2, 1)):
        settings = replace(config(epochs=2), rounds=Rounds(2, number=number))
        adapter = train(base, corpus, settings)
        assert (bool(adapter.prompt_states), len(read)) == (bool(count), count)


def test_a_merge_has_none(base, corpus, config, tmp_path):
    pool = []
    for seed in (1, 2):
        adapter = train(base, corpus, config(seed=seed))
        adapter.save(tmp_path / f"a{seed}")
        pool.append(Adapter.load(tmp_path / f"a{seed}"))
    merged = merge(pool, MergeOptions("linear"))
    assert all(adapter.prompt_states for adapter in pool)
    assert not merged.prompt_states


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_states_of_a_half_precision_base(base, corpus, config, dtype):
    base.model.set_dtype(dtype)
    adapter = train(base, corpus, config())
    assert {value.dtype for value in adapter.prompt_states.values()} == {mx.float32}
    assert all(mx.all(mx.isfinite(value)).item() for value in adapter.prompt_states.values())
