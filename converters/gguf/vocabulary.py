"""A model folder's tokenizer as the metadata of a GGUF file, for the two families that ``gguf_tokenizer`` reads.

llama.cpp has its own tokenizers, and a name in the file says how text is cut before merging. Which name is right is not
guessed from names: what llama.cpp would make of the file is rebuilt by ``gguf_tokenizer``, and must cut every probe as
the folder's own tokenizer does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_rsgwm.converters.gguf.tokenizer import CONTROL, SPECIAL_TOKENS, USER_DEFINED, rebuild
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.base_folder import first_line

NORMAL, UNKNOWN, UNUSED, BYTE = 1, 2, 5, 6  # tokenizer.ggml.token_type, beside CONTROL and USER_DEFINED
# llama.cpp's names for the rules of gguf_tokenizer; the first that cuts every probe rightly is taken.
PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken")
PROBES = (
    "Hello, world! It's 12345 apples; we'LL see 3.14159 of them.\n\n\tdef f(x):\n        return x**2  # done\r\n",
    "  leading, trailing  \n \n  \t\t mixed\u00a0space 2024-01-31 1,000,000 $5.00 100%",
    "café naïve cafe\u0301 Ångström ÜBER straße ΑΒΓ привет мир שלום مرحبا नमस्ते สวัสดี 你好，世界 こんにちは 안녕 🦙🚀 ½",
    "spaces before digits\n\n12\n\n34  56    78\t\t9\n\n\n1234567 a\n\nb  c    d",
    "camelCase HTTPServer snake_case XMLHttpRequest'S don't DON'T <b>x</b> https://a.b/c?d=e&f=1 \\n {}[]()!!??...",
)


def vocabulary(folder: Path, rows: int) -> dict[str, Any]:
    """``tokenizer.*`` metadata for the tokenizer in ``folder``; ``rows`` of the embedding get a token each.

    Raises:
        RsgwmError: no fast tokenizer, or one that llama.cpp would not follow.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # transformers raises what its parts raise
        raise RsgwmError(f"{folder} holds no tokenizer that can be read: {first_line(error)}") from error
    state = json.loads(backend.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise RsgwmError(f"{folder}: a {model.get('type')} tokenizer has no GGUF form here, only BPE")
    # transformers' class of a model may add tokens of its own, which have no row and are of no use.
    by_text = {text: index for text, index in tokenizer.get_vocab().items() if index < rows}
    by_id = {index: text for text, index in by_text.items()}
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(rows)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    pieces = bool(model.get("byte_fallback"))
    common = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": _kinds(tokens, by_id, backend, model.get("unk_token") if pieces else None, pieces),
        **{
            f"tokenizer.ggml.{key}": by_text[text]
            for name, key in SPECIAL_TOKENS.items()
            if (text := getattr(tokenizer, name)) in by_text
        },
        **_frame(tokenizer),
    }
    common |= _chat_templates(tokenizer.chat_template)
    common |= _further_ends(folder, tokenizer.eos_token_id, rows)
    forms = _sentencepiece(tokens, merges) if pieces else _byte_level(merges)
    expected = [tokenizer.encode(text) for text in PROBES]
    for form in forms:
        metadata = {**common, **form}
        try:
            rebuilt, _ = rebuild(metadata, str(folder), rows)
        except RsgwmError:
            continue
        if [rebuilt.encode(text).ids for text in PROBES] == expected:
            return metadata
    raise RsgwmError(
        f"{folder}: llama.cpp has no tokenizer known here that cuts text as this one does, and another would change "
        "every prompt; use llama.cpp's own convert_hf_to_gguf.py"
    )


def _chat_templates(template: Any) -> dict[str, Any]:
    """All chat templates; transformers has several by name, of which ``default`` is the usual one."""
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    if not isinstance(template, dict) or not template:
        return {}
    others = {name: text for name, text in template.items() if name != "default"}
    templates: dict[str, Any] = {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
    if others:
        templates["tokenizer.chat_templates"] = list(others)
    if "default" in template:
        templates["tokenizer.chat_template"] = template["default"]
    return templates


def _further_ends(folder: Path, eos: int | None, rows: int) -> dict[str, int]:
    """Ends of a turn and of a message: the ids beyond the end of text that the model's configuration stops at.

    Raises:
        RsgwmError: more than a file has places for.
    """
    ends: Any = None
    for name in ("generation_config.json", "config.json"):
        if ends is None and (folder / name).is_file():
            ends = files.read_json_object(folder / name).get("eos_token_id")
    ids = ends if isinstance(ends, list) else [ends]
    further = [index for index in ids if isinstance(index, int) and index != eos and 0 <= index < rows]
    if len(further) > 2:
        raise RsgwmError(
            f"{folder} stops at {len(further) + 1} tokens, and a GGUF file has places for three; shorten eos_token_id "
            "in generation_config.json"
        )
    return dict(zip(("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"), further, strict=False))


def _kinds(
    tokens: Sequence[str], by_id: Mapping[int, str], backend: Any, unknown: str | None, pieces: bool
) -> list[int]:
    """llama.cpp's type of every token."""
    added = backend.get_added_tokens_decoder()
    kinds = []
    for index, text in enumerate(tokens):
        if index not in by_id:
            kinds.append(UNUSED)
        elif text == unknown:
            kinds.append(UNKNOWN)
        elif index in added:
            kinds.append(CONTROL if added[index].special else USER_DEFINED)
        elif pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kinds.append(BYTE)
        else:
            kinds.append(NORMAL)
    return kinds


def _frame(tokenizer: Any) -> dict[str, bool]:
    """Whether an encoded text begins with bos and ends with eos."""
    ids = tokenizer.encode("a")
    return {
        "tokenizer.ggml.add_bos_token": bool(ids) and ids[0] == tokenizer.bos_token_id,
        "tokenizer.ggml.add_eos_token": bool(ids) and ids[-1] == tokenizer.eos_token_id,
    }


def _byte_level(merges: list[str]) -> Iterator[dict[str, Any]]:
    for name in PRE_TOKENIZERS:
        yield {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _sentencepiece(tokens: Sequence[str], merges: list[str]) -> Iterator[dict[str, Any]]:
    """llama.cpp merges what has the best score: the earlier a token's first merge, the better."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    scores = [-float(ranks[text]) if text in ranks else -float(len(merges) + 1) for text in tokens]
    for prefix in (True, False):
        yield {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.add_space_prefix": prefix,
        }
