"""A tokenizer or chat template that came with a PEFT adapter and is not the base's is told, whatever way it differs."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.converters.peft.convert import to_peft

FILES = ("tokenizer.json", "tokenizer_config.json")


def edit(name, change):
    def edited(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edited


def add_tokens(content):
    first, count = content["added_tokens"][0], len(content["model"]["vocab"])
    content["added_tokens"] += [{**first, "id": count + i, "content": f"<|tool {i}|>"} for i in range(500)]


def swap_tokens(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


CASES = {
    "the base's": (lambda folder: None, ""),
    "none": (lambda folder: [(folder / name).unlink() for name in FILES], ""),
    "added tokens": (edit("tokenizer.json", add_tokens), "tokens, the base 320 rows, and PEFT saved none"),
    "other ids": (edit("tokenizer.json", swap_tokens), "is not the base's, which is used here"),
    "another end": (
        edit("tokenizer_config.json", lambda content: content.update(eos_token="a")),
        "or end tokens differ",
    ),
    "damaged": (write("tokenizer.json", '{"model": 1}'), "is not compared with the base's"),
    "another template": (
        write("chat_template.jinja", "{{ messages[0].content }}!"),
        "its chat template is not the base's",
    ),
    "a template inside": (
        edit("tokenizer_config.json", lambda content: content.update(chat_template="{{ messages }}")),
        "its chat template is not the base's",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_differs_is_told(name, tiny_base, make_adapter, tmp_path):
    change, told = CASES[name]
    to_peft(make_adapter(0), str(tiny_base), tmp_path / "peft")
    for file in FILES:
        shutil.copyfile(tiny_base / file, tmp_path / "peft" / file)
    change(tmp_path / "peft")
    command = ["convert", "from-peft", str(tmp_path / "peft"), "--out", str(tmp_path / "mlx"), "--base", str(tiny_base)]
    result = CliRunner().invoke(rsgwm, command)
    assert result.exit_code == 0, result.output
    assert (told in result.output) if told else ("base's" not in result.output), result.output
