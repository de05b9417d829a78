"""Tokenizers rebuilt from GGUF metadata, compared with their rules and with transformers."""

from __future__ import annotations

import gguf
import pytest

from mlx_rsgwm.converters.gguf.file import open_gguf
from mlx_rsgwm.converters.gguf.read import convert_gguf
from mlx_rsgwm.converters.gguf.tokenizer import merges_from_scores
from tests.converters.gguf.tiny_llama import TOKENS, weights, write_gguf


def test_byte_level_tokenizer_follows_the_smollm_rule(plain, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(plain, tmp_path / "out"))
    # Digits are cut out first, so the two newlines stand alone and merge; GPT-2's rule would part them.
    assert tokenizer.tokenize("hello\n\n12") == ["hell", "o", "ĊĊ", "1", "2"]
    assert tokenizer.encode("<s>he</s>") == [1, TOKENS.index("he"), 2]
    assert tokenizer.decode(tokenizer.encode("été\t1 2")) == "été\t1 2"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert chat == "<s>he</s>"


def test_llama3_tokenizer_begins_with_bos_unless_the_file_says_no(tmp_path):
    from transformers import AutoTokenizer

    silent = write_gguf(tmp_path / "a.gguf", weights(), pre="llama-bpe", add_bos=None)
    denying = write_gguf(tmp_path / "b.gguf", weights(), pre="llama-bpe")
    he = TOKENS.index("he")
    assert AutoTokenizer.from_pretrained(convert_gguf(silent, tmp_path / "out")).encode("he") == [1, he]
    assert AutoTokenizer.from_pretrained(convert_gguf(denying, tmp_path / "no")).encode("he") == [he]


def test_sentencepiece_tokenizer_agrees_with_transformers(tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "c",
        "ab",
        "▁a",
        "▁ab",
    ]
    pieces += ["bc", "abc", "▁abc"]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(1, len(pieces) - 258)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from mlx_rsgwm.converters.gguf.tokenizer import save_tokenizer

    (tmp_path / "out").mkdir()
    save_tokenizer(open_gguf(tmp_path / "a.gguf").metadata, tmp_path / "out", "a.gguf", len(pieces))
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    for text in ("abc ab cab", "abcabc é", "a\nb", "ab  c"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text)[0] == 1
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == text


def test_merges_from_scores_prefers_the_best_token():
    merges = merges_from_scores(["a", "b", "c", "ab", "bc", "abc"], [-9, -9, -9, -2, -1, -3])
    assert merges[:2] == [("b", "c"), ("a", "b")]
    assert set(merges[2:]) == {("a", "bc"), ("ab", "c")}
