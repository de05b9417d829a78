"""A base's tokenizer and chat template as hashes of what they do: tools rewrite their files when they save them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError

PROBES = (
    "Hello, world! It's 12345 apples; we'LL see 3.14159 of them.\n\n\tdef f(x):\n        return x**2  # done\r\n",
    "  leading, trailing  \n \n  \t\t mixed\u00a0space 2024-01-31 1,000,000 $5.00 100%",
    "café naïve cafe\u0301 Ångström ÜBER straße ΑΒΓ привет мир שלום مرحبا नमस्ते สวัสดี 你好，世界 こんにちは 안녕 🦙🚀 ½",
)
OTHER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "tiktoken.model")


def tokenizer_hash(folder: Path) -> str:
    """Hex SHA-256 of every token's id, of how probe texts are cut, and of which tokens begin and end a text.

    Raises:
        RsgwmError: tokenizer.json is damaged.
    """
    settings = _settings(folder)
    ends = {name: _text(settings.get(name)) for name in ("bos_token", "eos_token")}
    if not (folder / "tokenizer.json").is_file():
        others = {name: files.sha256_file(folder / name) for name in OTHER_FILES if (folder / name).is_file()}
        return files.sha256_json({"files": others, "ends": ends})
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except Exception as error:  # the library raises bare Exception
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RsgwmError(f"the tokenizer in {folder} cannot be loaded: {text}") from error
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0])):
        digest.update(f"{index} {token}\n".encode("utf-8", "surrogatepass"))
    cuts = [_cut(tokenizer, text) for text in PROBES]
    return files.sha256_json({"vocabulary": digest.hexdigest(), "cuts": cuts, "ends": ends})


def chat_template_hash(folder: Path) -> str:
    """Hex SHA-256 of the chat template, wherever it stands; empty where there is none."""
    file = folder / "chat_template.jinja"
    template: Any = files.read_text(file) if files.is_present(file) else None
    if template is None and (folder / "chat_template.json").is_file():
        template = files.read_json_object(folder / "chat_template.json").get("chat_template")
    template = template or _settings(folder).get("chat_template")
    if isinstance(template, list):  # several by name, as transformers 4 wrote them
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default") or named
    return files.sha256_json(template) if template else ""


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return files.read_json_object(file) if files.is_present(file) else {}


def _text(token: Any) -> str | None:
    """A special token's text; some files have a table of its properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _cut(tokenizer: Any, text: str) -> list[int] | None:
    try:
        ids: list[int] = tokenizer.encode(text).ids
        return ids
    except Exception:  # a word-level vocabulary without a token for unknown words refuses texts
        return None
