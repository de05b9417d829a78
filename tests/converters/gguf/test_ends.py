"""What ends a text, and chat templates, on the way into GGUF and out of it; a file that was cut off."""

from __future__ import annotations

import json
import shutil

import pytest

from mlx_rsgwm.converters.gguf.read import convert_gguf
from mlx_rsgwm.converters.gguf.tokenizer import end_ids
from mlx_rsgwm.converters.gguf.write import model_to_gguf
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.base import load_base


@pytest.fixture
def folder(tiny_base, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny_base, copy)
    return copy


@pytest.mark.parametrize("ends", [[0], [0, 5], [0, 7, 9]])
def test_every_end_survives(folder, tmp_path, ends):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    model_to_gguf(folder, tmp_path / "model.gguf")
    back = convert_gguf(tmp_path / "model.gguf", tmp_path / "back")
    assert load_base(str(back)).tokenizer.eos_token_ids == set(ends)
    assert load_base(str(folder)).tokenizer.eos_token_ids == set(ends)


def test_more_ends_than_places_are_refused(folder, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5, 6, 7]}))
    with pytest.raises(RsgwmError, match="stops at 4 tokens"):
        model_to_gguf(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("named", "kinds", "expected"),
    [
        ({"eos_token_id": 1, "eot_token_id": 2}, [3, 3, 3, 1], [1, 2]),
        ({"eos_token_id": 1, "eom_token_id": 0}, [1, 1, 1, 1], [1, 0]),
        ({"eos_token_id": 1}, [1, 3, 3, 1], [1, 2]),  # a control token called <|im_end|>
        ({"eos_token_id": 1}, [1, 3, 1, 1], [1]),  # an ordinary token of that text
        ({"eos_token_id": 1, "eot_token_id": 99}, [1, 3, 1, 1], [1]),
        ({"eos_token_id": 2, "eot_token_id": 2}, [1, 3, 3, 1], [2]),
        ({}, [1, 3, 1, 1], []),
    ],
)
def test_ends_that_a_file_names(named, kinds, expected):
    metadata = {f"tokenizer.ggml.{key}": value for key, value in named.items()}
    metadata |= {"tokenizer.ggml.tokens": ["<pad>", "<eos>", "<|im_end|>", "a"], "tokenizer.ggml.token_type": kinds}
    assert end_ids(metadata) == expected


def test_all_chat_templates_survive(folder, tmp_path):
    from transformers import AutoTokenizer

    templates = {"default": "{{ messages[0].content }}", "tool_use": "tools: {{ tools }}", "rag": "r"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder)
    model_to_gguf(folder, tmp_path / "model.gguf")
    back = convert_gguf(tmp_path / "model.gguf", tmp_path / "back")
    assert AutoTokenizer.from_pretrained(back).chat_template == templates


@pytest.fixture
def cut_off(monkeypatch):
    """Let a share of what gguf writes arrive: a full disk, of which its writer is told or not."""
    import gguf

    def install(share):
        close = gguf.GGUFWriter.close

        def cut(writer):
            paths = [file.name for file in writer.fout]
            close(writer)
            for path in paths:
                with open(path, "r+b") as file:
                    file.truncate(int(share * file.seek(0, 2)))

        monkeypatch.setattr(gguf.GGUFWriter, "close", cut)

    return install


@pytest.mark.parametrize("share", [0.999, 0.7, 0.1])
def test_a_file_that_was_cut_gets_no_name(folder, tmp_path, cut_off, share):
    cut_off(share)
    with pytest.raises(RsgwmError):
        model_to_gguf(folder, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("share", [0.999, 0.7, 0.1])
def test_an_adapter_that_was_cut_gets_no_name(folder, tmp_path, make_adapter, cut_off, share):
    from mlx_rsgwm.converters.base_layers import read_base_layers
    from mlx_rsgwm.converters.gguf.adapter import to_gguf

    cut_off(share)
    with pytest.raises(RsgwmError):
        to_gguf(make_adapter(0), read_base_layers("base", folder), tmp_path / "adapter.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
