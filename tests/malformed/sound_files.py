"""A sound file for every reader of files that others may have written, and the call that reads it."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import yaml

from mlx_rsgwm.core import files
from mlx_rsgwm.core.progress import SILENT
from mlx_rsgwm.models import adapter as adapters
from mlx_rsgwm.models.adapter import Adapter, LoraSpec

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "converters" / "gguf")]  # conftest and tiny_llama, in a child process too


@dataclass(frozen=True)
class Reader:
    """``make`` writes a sound input into an empty folder; ``read`` reads the folder after ``file`` was damaged."""

    kind: str
    file: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    count: int = 40


def lora() -> Adapter:
    """A small adapter with importance and initialisation."""
    rng = np.random.default_rng(0)
    weights, module = {}, "model.layers.{}.self_attn.q_proj"
    for layer in range(2):
        weights[f"{module.format(layer)}.lora_a"] = mx.array(rng.standard_normal((32, 2)).astype(np.float32))
        weights[f"{module.format(layer)}.lora_b"] = mx.array(rng.standard_normal((2, 32)).astype(np.float32))
    importance = {f"{role}/{name}": mx.abs(value) for role in ("all", "draft") for name, value in weights.items()}
    init = {name: value for name, value in weights.items() if name.endswith("lora_a")}
    template = {"name": "t", "draft": "{question}", "verify": "{question}{answer}"}
    manifest = {"kind": "trained", "base": {"name": "b", "fingerprint": "f"}, "template": template}
    return Adapter(LoraSpec(2, 2.0, 0.0, ("self_attn.q_proj",), 2), weights, importance, {"steps": "3"}, init, manifest)


def unlisted(folder: Path) -> None:
    """The adapter without its manifest, whose hashes would refuse every change before it is read."""
    lora().save(folder)
    (folder / adapters.MANIFEST_FILE).unlink()


def load_adapter(folder: Path) -> None:
    Adapter.load(folder, lazy=True)
    found = Adapter.load(folder)
    assert all(value is None or isinstance(value, str) for value in (found.base_fingerprint, found.template_hash))


def make_checkpoint(folder: Path) -> None:
    from mlx_rsgwm.training.checkpoints import Checkpoint, write_checkpoint

    small = lora()
    state = Checkpoint(3, small.weights, {"moments": mx.zeros((2,))}, {"history": [[1, "draft", 0.5, 3]], "scores": []})
    write_checkpoint(folder, small.spec, state, {"seed": 1, "config": {"rank": 2}}, {"base": {"name": "b"}}, 3)


def resume(folder: Path) -> None:
    from mlx_rsgwm.training.checkpoints import Saving, read_checkpoint

    read_checkpoint(Saving(folder, resume="continue"), {"seed": 1, "config": {"rank": 2}}, SILENT)


def make_corpus(folder: Path) -> None:
    from mlx_rsgwm.data.corpus import CorpusRow, save_corpus
    from mlx_rsgwm.data.template import TEMPLATES

    rows = [
        CorpusRow("1", "t", "draft", "What is 1 + 1?", "#### 2"),
        CorpusRow("2", "t", "verify", "What is 1 + 2?", "#### 4", False),
    ]
    save_corpus(folder, rows, TEMPLATES["plain"], {"seed": 0})


def read_corpus(folder: Path) -> None:
    from mlx_rsgwm.data.corpus import load_corpus

    found = load_corpus(folder)
    found.describe()
    found.token_rows(tokenizer(), 512, "drop")


def read_rehashed_corpus(folder: Path) -> None:
    """As if the rows had been damaged before the manifest was written."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["rows.jsonl"] = files.sha256_file(folder / "rows.jsonl")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    read_corpus(folder)


ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {"question": "What is 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
        {"question": "b", "answer": "#### 3"},
    ],
    "math": [{"problem": "x?", "solution": r"So \boxed{\frac{1}{2}}."}, {"problem": "y?", "solution": r"\boxed{3}"}],
    "commonsense_qa": [
        {
            "id": "a",
            "question": {
                "stem": "Where?",
                "choices": [{"label": "A", "text": "here"}, {"label": "B", "text": "there"}],
            },
            "answerKey": "A",
        },
        {"id": "b", "question": "Who?", "choices": {"label": ["A", "B"], "text": ["me", "you"]}, "answerKey": "B"},
    ],
    "strategyqa": [{"qid": "a", "question": "Is it?", "answer": True, "facts": ["It is."]}],
    "mawps": [{"input": "How many?", "target": 3.5}],
    "svamp": [{"ID": "a", "Body": "Ann has 3", "Question": "How many?", "Answer": "3.0"}],
    "mine": [
        {"id": "1", "question": "What?", "answer": "It is 7."},
        {"question": "Is it?", "answer": True, "task": "b"},
    ],
}


def write_lines(file: str, rows: list[Any], folder: Path) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_questions(task: str, folder: Path) -> None:
    from mlx_rsgwm.data.questions import load_jsonl, load_questions

    if task == "mine":
        load_jsonl(folder / "mine" / "test.jsonl")
    else:
        load_questions(task, "test", folder)


CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}], "tools": None},
]


def read_examples(folder: Path) -> None:
    from mlx_rsgwm.data.mlx_lm_rows import load_examples

    load_examples(folder / "train.jsonl", mask_prompt=True).token_rows(tokenizer(), 512, "cut")


@cache
def tokenizer() -> Any:
    from conftest import byte_tokenizer
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        byte_tokenizer(Path(folder))
        return PreTrainedTokenizerFast.from_pretrained(folder)


def write_yaml(file: str, value: Any, folder: Path) -> None:
    (folder / file).write_text(yaml.safe_dump(value))


RECIPE = {
    "name": "r",
    "base": "b",
    "data": {"tasks": ["change", "groups"], "rows": 24, "verify_share": 0.5},
    "train": {"rank": 4, "alpha": 8, "keys": ["self_attn.q_proj"], "clip": 1.0},
    "merge": {"method": "ties", "parameters": {"density": 0.3}, "weights": [0.5, 0.5]},
    "loop": {"attempts": 2, "threshold": "auto"},
    "evaluate": {"items": 3, "tasks": ["change"]},
    "export": {"parity": False},
}
FOREIGN = {
    "model": "b",
    "data": "d",
    "iters": 100,
    "batch_size": 4,
    "learning_rate": 1e-4,
    "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
    "lr_schedule": {"name": "cosine_decay", "warmup": 10, "arguments": [1e-4, 100]},
    "optimizer": "adamw",
    "optimizer_config": {"adamw": {"betas": [0.9, 0.98], "weight_decay": 0.1}},
    "grad_accumulation_steps": 2,
}


def read_recipe(folder: Path) -> None:
    from mlx_rsgwm.recipes.run import load_recipe

    load_recipe(str(folder / "recipe.yaml"))


def read_training(folder: Path) -> None:
    from mlx_rsgwm.training.config import TrainConfig
    from mlx_rsgwm.training.mlx_lm_yaml import read_training_file

    TrainConfig.from_mapping(read_training_file(folder / "train.yaml").config)


def records() -> list[Any]:
    from mlx_rsgwm.evaluation.records import DraftRecord, ItemRecord

    draft = DraftRecord("#### 2", "2", True, {"yesno": 0.8}, tokens=4, readings={}, verified={"yesno": 9})
    return [ItemRecord(str(n), "t", "1 + 1?", "2", (draft, draft), "yesno", 0.5, True, 1, 0) for n in range(2)]


def make_items(folder: Path) -> None:
    from mlx_rsgwm.evaluation.records import write_items

    write_items(folder / "items.jsonl", records())
    files.write_json(folder / "report.json", {"format": "mlx-rsgwm/report", "k": 2, "metadata": {}})


def read_run(folder: Path) -> None:
    """What ``rsgwm report write`` does, without drawing."""
    from mlx_rsgwm.evaluation.report.folder import read_report, render_markdown
    from mlx_rsgwm.evaluation.report.summary import summarise_records

    found = read_report(folder)[1]
    render_markdown(summarise_records(found, 2))


def make_journal(folder: Path) -> None:
    from mlx_rsgwm.evaluation.journal import EvaluationJournal

    journal = EvaluationJournal(folder / "journal.jsonl", {"seed": 1})
    journal.add_items("a", records())
    journal.add_timing("a", "0", (1.0, 2.0, None))


def read_journal(folder: Path) -> None:
    from mlx_rsgwm.evaluation.journal import EvaluationJournal

    EvaluationJournal(folder / "journal.jsonl", {"seed": 1})


CALIBRATION = {
    "format": "mlx-rsgwm/calibration",
    "format_version": 1,
    "score": "yesno",
    "threshold": 0.5,
    "combination": None,
    "curves": {},
    "auroc": {"yesno": 0.7},
    "perturbed_auroc": {"yesno": None},
    "reliability": {"yesno": {"ece_before": 0.1, "ece_after": 0.1, "brier_before": 0.1, "brier_after": 0.1}},
    "items": 4,
    "drafts": 8,
    "correct": 3,
}


def write_calibration(folder: Path) -> None:
    files.write_json(folder / "calibration.json", CALIBRATION)


def read_calibration(folder: Path) -> None:
    from mlx_rsgwm.inference.calibration import load_calibration

    load_calibration(folder)


HELD = {"format": "mlx-rsgwm/held-out-drafts", "format_version": 1, "seed": 1}
HELD_ITEM = {"id": "1", "task": "t", "texts": ["#### 2"], "correct": [True], "signals": [], "pair": []}


def read_held_out(folder: Path) -> None:
    from mlx_rsgwm.evaluation.calibration_set import kept_drafts

    kept_drafts(folder / "drafts.jsonl", HELD, 1)


def make_base_folder(folder: Path) -> None:
    from conftest import make_base

    with tempfile.TemporaryDirectory() as made:
        shutil.copytree(make_base(Path(made) / "tiny"), folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())))


def make_sharded_base(folder: Path) -> None:
    make_base_folder(folder)
    names = sorted(mx.load(str(folder / "model.safetensors")))
    table = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


def look_at_base(folder: Path) -> None:
    from mlx_rsgwm.models.base_folder import check_folder, describe_folder

    describe_folder(check_folder(folder))


def load_whole_base(folder: Path) -> None:
    from mlx_rsgwm.models.base import load_base

    load_base(str(folder), "float32")


def make_gguf(folder: Path) -> None:
    from tiny_llama import weights, write_gguf

    write_gguf(folder / "model.gguf", weights())


def read_gguf(folder: Path) -> None:
    from mlx_rsgwm.converters.gguf.file import open_gguf

    found = open_gguf(folder / "model.gguf")
    unreadable = {text.split(" (")[0] for text in found.unreadable()}
    for name in found.tensors:
        if name not in unreadable:
            found.read(name, 0, 4)


def convert_gguf(folder: Path) -> None:
    from mlx_rsgwm.converters.gguf.read import convert_gguf as convert

    convert(folder / "model.gguf", folder / "out")


def make_peft(folder: Path) -> None:
    from mlx_rsgwm.converters.peft.convert import to_peft

    to_peft(lora(), "b", folder)
    shutil.rmtree(folder / "mlx_rsgwm")


def read_peft(folder: Path) -> None:
    from mlx_rsgwm.converters.peft.convert import check_peft, from_peft

    check_peft(folder)
    from_peft(folder)


def make_pool(folder: Path) -> None:
    lora().save(folder / "b")
    unlisted(folder / "a")


def merge_pool(folder: Path) -> None:
    from mlx_rsgwm.merging.merge import merge
    from mlx_rsgwm.merging.options import MergeOptions

    merge([folder / "a", folder / "b"], MergeOptions("linear"))


def questions_reader(task: str) -> Reader:
    file = f"{task}/test.jsonl"
    return Reader("jsonl", file, partial(write_lines, file, ROWS[task]), partial(read_questions, task))


READERS = {
    "adapter-weights": Reader("safetensors", "adapters.safetensors", unlisted, load_adapter, 60),
    "adapter-importance": Reader("safetensors", "importance.safetensors", unlisted, load_adapter),
    "adapter-config": Reader("json", "adapter_config.json", unlisted, load_adapter, 60),
    "adapter-manifest": Reader("json", "manifest.json", lora().save, load_adapter, 60),
    "checkpoint-manifest": Reader("json", "checkpoints/step-000003/manifest.json", make_checkpoint, resume, 60),
    "corpus-manifest": Reader("json", "manifest.json", make_corpus, read_corpus, 60),
    "corpus-rows": Reader("jsonl", "rows.jsonl", make_corpus, read_rehashed_corpus),
    **{f"questions-{task}": questions_reader(task) for task in ROWS},
    "examples": Reader("jsonl", "train.jsonl", partial(write_lines, "train.jsonl", CHATS), read_examples, 60),
    "recipe": Reader("yaml", "recipe.yaml", partial(write_yaml, "recipe.yaml", RECIPE), read_recipe, 80),
    "training-file": Reader(
        "yaml", "train.yaml", partial(write_yaml, "train.yaml", RECIPE["train"]), read_training, 60
    ),
    "mlx-lm-file": Reader("yaml", "train.yaml", partial(write_yaml, "train.yaml", FOREIGN), read_training, 80),
    "items": Reader("jsonl", "items.jsonl", make_items, read_run),
    "journal": Reader("jsonl", "journal.jsonl", make_journal, read_journal),
    "calibration": Reader("json", "calibration.json", write_calibration, read_calibration),
    "held-out-drafts": Reader(
        "jsonl", "drafts.jsonl", partial(write_lines, "drafts.jsonl", [{"about": HELD}, HELD_ITEM]), read_held_out
    ),
    "base-config": Reader("json", "config.json", make_base_folder, look_at_base),
    "base-weights": Reader("safetensors", "model.safetensors", make_base_folder, look_at_base),
    "base-index": Reader("json", "model.safetensors.index.json", make_sharded_base, look_at_base),
    "base-loaded": Reader("json", "config.json", make_base_folder, load_whole_base, 24),
    "gguf": Reader("gguf", "model.gguf", make_gguf, read_gguf, 120),
    "gguf-converted": Reader("gguf", "model.gguf", make_gguf, convert_gguf, 20),
    "peft-config": Reader("json", "adapter_config.json", make_peft, read_peft, 60),
    "peft-weights": Reader("safetensors", "adapter_model.safetensors", make_peft, read_peft),
    "merged": Reader("safetensors", "a/adapters.safetensors", make_pool, merge_pool),
}
