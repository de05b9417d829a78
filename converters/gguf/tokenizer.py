"""The tokenizer a GGUF file describes, rebuilt with the ``tokenizers`` library and saved in Hugging Face's form.

``AutoTokenizer.from_pretrained(gguf_file=...)`` would do, were it not that it imports torch, and that it splits
SmolLM's digits by the wrong rule. The rules here are llama.cpp's (src/llama-vocab.cpp) for the vocabularies that files
of the Llama architecture use: byte-level BPE (``gpt2``) and SentencePiece BPE (``llama``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_rsgwm.core.errors import RsgwmError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
    *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>"),
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class ByteLevelRule:
    """How text is cut before byte-level BPE, and what llama.cpp assumes when the file does not say.

    ``split`` is a regular expression, or None for GPT-2's own; ``digits`` cuts out every single digit first;
    ``composed`` puts letters and their marks together (NFC).
    """

    split: str | None = None
    digits: bool = False
    whole_words: bool = False
    add_bos: bool = False
    composed: bool = False


GPT2_RULE = ByteLevelRule()
LLAMA3_RULE = ByteLevelRule(LLAMA3_SPLIT, whole_words=True, add_bos=True)
BYTE_LEVEL_RULES = {
    "default": GPT2_RULE,
    "gpt-2": GPT2_RULE,
    "smollm": ByteLevelRule(digits=True),
    "llama3": LLAMA3_RULE,
    "llama-v3": LLAMA3_RULE,
    "llama-bpe": LLAMA3_RULE,
    "falcon3": LLAMA3_RULE,
    "qwen2": ByteLevelRule(QWEN2_SPLIT, composed=True),
    "tekken": ByteLevelRule(TEKKEN_SPLIT, whole_words=True, add_bos=True),
}


def save_tokenizer(metadata: Mapping[str, Any], folder: Path, where: str, vocab_size: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template of a GGUF file's metadata into ``folder``.

    Raises:
        RsgwmError: no tokenizer in the file, one of a family that is not read (named), or one that does not fit
            the ``vocab_size`` rows of the embedding.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer, named = rebuild(metadata, where, vocab_size)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)
    wrapped.chat_template = _chat_templates(metadata, where)
    wrapped.save_pretrained(str(folder))


def _chat_templates(metadata: Mapping[str, Any], where: str) -> str | dict[str, str] | None:
    """The chat template, or all of several by name, as transformers has them."""
    prefix = "tokenizer.chat_template"
    texts = {key: value for key, value in metadata.items() if key == prefix or key.startswith(f"{prefix}.")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise RsgwmError(f"{where}: {key} is not a text")
    if set(texts) <= {prefix}:
        return texts.get(prefix)
    return {key.removeprefix(f"{prefix}.") if key != prefix else "default": value for key, value in texts.items()}


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Every token that ends a text for llama.cpp, the end of text first.

    These are the ids that the file names (end of text, of a turn, of a message) and the control tokens whose text says
    so (``special_eog_ids`` in llama.cpp's llama-vocab.cpp).
    """
    tokens, kinds = metadata.get("tokenizer.ggml.tokens", ()), metadata.get("tokenizer.ggml.token_type", ())
    ids = [metadata.get(f"tokenizer.ggml.{key}") for key in END_KEYS]
    by_text = {text: index for index, text in enumerate(tokens) if text in END_TEXTS}
    ids += [index for index in by_text.values() if index < len(kinds) and kinds[index] == CONTROL]
    return list(dict.fromkeys(int(index) for index in ids if isinstance(index, int) and 0 <= index < len(tokens)))


def rebuild(metadata: Mapping[str, Any], where: str, vocab_size: int) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer that a GGUF file's metadata describes, and its special tokens by transformers' names.

    Raises:
        RsgwmError: as :func:`save_tokenizer`.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise RsgwmError(f"{where} holds no tokenizer; use the model's Hugging Face folder instead")
    if len(tokens) > vocab_size or len(set(tokens)) != len(tokens):
        raise RsgwmError(f"{where}: {len(tokens)} tokens, {len(set(tokens))} distinct, for {vocab_size} embedding rows")
    model = str(metadata.get("tokenizer.ggml.model"))
    if model not in BUILDERS:
        raise RsgwmError(f"{where}: tokenizer model {model!r} is not read, only {' and '.join(BUILDERS)}")
    named = {}
    for name, key in SPECIAL_TOKENS.items():
        index = metadata.get(f"tokenizer.ggml.{key}")
        if index is None:
            continue
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise RsgwmError(f"{where}: tokenizer.ggml.{key} is {index!r}, outside the {len(tokens)} tokens")
        named[name] = tokens[index]
    try:
        tokenizer, add_bos = BUILDERS[model](metadata, tokens, where)
    except RsgwmError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception, for a merge of unknown tokens say
        raise RsgwmError(f"{where}: its tokenizer cannot be rebuilt: {error}") from error
    _add_special_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", ()))
    _add_frame(tokenizer, metadata, named, add_bos)
    return tokenizer, named


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> tuple[Tokenizer, bool]:
    """GPT-2's BPE over bytes spelled as printable characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kind = metadata.get("tokenizer.ggml.pre", "default")
    rule = BYTE_LEVEL_RULES.get(kind)
    if rule is None:
        raise RsgwmError(
            f"{where}: pre-tokenizer {kind!r} is not known here, and guessing would change every prompt; "
            "use the model's Hugging Face folder instead"
        )
    merges = [_pair(merge) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole_words))
    if rule.composed:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
    if rule.split is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.add_bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE with byte fallback, spaces spelled ▁; merges come from the scores if the file has none."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    merges = [_pair(merge) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    if not merges:
        if scores is None or len(scores) != len(tokens):
            raise RsgwmError(f"{where}: its tokenizer has neither merges nor one score a token")
        merges = merges_from_scores(tokens, [float(score) for score in scores])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    bpe = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalise: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*normalise, normalizers.Replace(" ", "▁")])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, True


Builder = Callable[[Mapping[str, Any], Sequence[str], str], "tuple[Tokenizer, bool]"]
BUILDERS: dict[str, Builder] = {"gpt2": _byte_level, "llama": _sentencepiece}


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges a SentencePiece vocabulary implies: every way to cut a token in two known ones, best score first.

    The order among equals is that of transformers' ``generate_merges``.
    """
    index = {token: position for position, token in enumerate(tokens)}
    scored = []
    for token, score in zip(tokens, scores, strict=True):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in index and token[i:] in index]
        scored += [(pair, score) for pair in sorted(cuts, key=lambda pair: (index[pair[0]], index[pair[1]]))]
    scored.sort(key=lambda item: (item[1], len(item[0][0]), len(item[0][1])), reverse=True)
    return [pair for pair, _ in scored]


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _add_special_tokens(tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    from tokenizers import AddedToken

    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        marked = [token for token, token_kind in zip(tokens, kinds, strict=False) if token_kind == kind]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, normalized=False, special=special) for token in marked])


def _add_frame(tokenizer: Tokenizer, metadata: Mapping[str, Any], named: Mapping[str, str], add_bos: bool) -> None:
    """Put bos and eos around an encoded text, as the file or the vocabulary's family says."""
    from tokenizers import processors

    first = named.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None
    last = named.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if first is None and last is None:
        return
    frame = [part for part in (first, "$A", last) if part is not None]
    special = [(token, tokenizer.token_to_id(token)) for token in {first, last} if token is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=frame,
        pair=[*frame, *("$B" if part == "$A" else part for part in frame)],
        special_tokens=special,
    )
