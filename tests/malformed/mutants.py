"""Damaged files from sound ones, by number: the same number gives the same bytes on every machine.

A mutant either has its bytes changed, or is taken apart (JSON, JSON lines, YAML, the header of safetensors), has one of
its values replaced by a nasty one, and is put together again, so that the damage reaches what lies behind the parser.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import yaml

HUGE, DEEP = "\x01huge\x01", "\x01deep\x01"  # stand for texts that json.dumps cannot or may not write
SPELLED = {json.dumps(HUGE): "9" * 5000, json.dumps(DEEP): "[" * 20000}
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**32 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        HUGE,
        DEEP,
        "",
        " ",
        "0",
        "1e5",
        "nan",
        "null",
        "\x00",
        "a\nb",
        "é" * 3,
    ),
    *("../../x", "/etc/passwd", "model.layers.0", "\ud800", "x" * 70000, [], {}, [[]], [None], [0, 0], [-1, 2**40]),
    *({"": None}, {"a": {"b": 1}}, [{"a": 1}], {"0": [1, 2]}, [["a", "b"]], [True, "x", 1.5]),
)
INTEGERS = (0, 1, 2, 8, 9, 12, 2**7, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


def mutate(kind: str, sound: bytes, number: int) -> bytes:
    """Mutant ``number`` of a file of ``kind`` (safetensors, json, jsonl, yaml or gguf)."""
    rng = random.Random(f"{kind}/{number}")
    structured = STRUCTURED[kind]
    if number % 4 and structured is not None:
        return structured(sound, rng)
    data = sound
    for _ in range(rng.choice((1, 1, 2, 5))):
        data = rng.choice(BYTEWISE)(data, rng)
    return data


def _place(data: bytes, rng: random.Random) -> int:
    """A position, mostly near the beginning, where headers are."""
    end = len(data) if rng.random() < 0.4 else min(len(data), 400)
    return rng.randrange(end) if end else 0


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)]


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else data


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    new = rng.choice((b"\x00" * 8, b"\xff" * 8, rng.randbytes(4), b"\xc3\x28", b"}", b'"', b"\n", b"-", b"9" * 30))
    return data[:at] + new + data[at + len(new) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.choice((rng.randbytes(3), b"\x00", b"{", b"[" * 3, b",", b"\xef\xbb\xbf", b": ")) + data[at:]


def _delete(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 8, 40)) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at : at + rng.choice((1, 8, 60))] * 2 + data[at:]


def _extend(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 8, 100)))


def _integer(data: bytes, rng: random.Random) -> bytes:
    """A number of 4 or 8 bytes set to one that counts, lengths or offsets must not have."""
    value, form = rng.choice(INTEGERS), rng.choice(("<I", "<Q", "<Q"))
    at = _place(data, rng)
    return data[:at] + struct.pack(form, value % 2 ** (8 * struct.calcsize(form))) + data[at + struct.calcsize(form) :]


BYTEWISE = (_cut, _flip, _overwrite, _insert, _delete, _repeat, _extend, _integer)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a tree of JSON values, the whole first."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from _places(child, (*path, key))


def damaged(tree: Any, rng: random.Random) -> Any:
    """A copy of a tree with one value replaced, removed, renamed or added."""
    whole = [copy.deepcopy(tree)]
    *parents, last = rng.choice(list(_places(whole))[1:])
    target: Any = whole
    for key in parents:
        target = target[key]
    action = rng.random()
    if action < 0.65:
        target[last] = copy.deepcopy(rng.choice(NASTY))
    elif action < 0.8:
        del target[last]
    elif isinstance(target, dict):
        target[rng.choice(("unknown", "", f"{last} ", "../up"))] = (
            target.pop(last) if action < 0.9 else rng.choice(NASTY)
        )
    else:
        target.append(copy.deepcopy(target[last]))
    return whole[0] if whole else None


def spelled(tree: Any) -> str:
    """JSON text, with numbers and depths that ``json.dumps`` would not write."""
    text = json.dumps(tree)
    for stand_in, real in SPELLED.items():
        text = text.replace(stand_in, real)
    return text


def _json(data: bytes, rng: random.Random) -> bytes:
    return spelled(damaged(json.loads(data), rng)).encode()


def _json_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = spelled(damaged(json.loads(lines[at]), rng))
    return "\n".join(lines).encode() + rng.choice((b"\n", b"\n", b"\r\n\n", b""))


def _yaml(data: bytes, rng: random.Random) -> bytes:
    tree = damaged(yaml.safe_load(data), rng)
    if rng.random() < 0.5:
        return spelled(tree).encode()  # JSON is YAML
    text = yaml.safe_dump(tree)
    snippets = (
        "!!python/object/apply:os.system [ls]",
        "2024-13-45",
        "&a [*a]",
        "*nowhere",
        "1e5",
        ".inf",
        "0x_",
        "? [a]",
    )
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    if rng.random() < 0.5 and ":" in lines[at]:
        lines[at] = f"{lines[at].partition(':')[0]}: {rng.choice(snippets)}"
    return "\n".join(lines).encode()


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    text = spelled(damaged(json.loads(data[8 : 8 + length]), rng)).encode()
    stated = len(text) if rng.random() < 0.9 else rng.choice(INTEGERS) % 2**64
    return struct.pack("<Q", stated) + text + data[8 + length :]


def _gguf(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 3))):
        data = _integer(data, rng)
    return data


STRUCTURED: dict[str, Callable[[bytes, random.Random], bytes] | None] = {
    "safetensors": _safetensors,
    "json": _json,
    "jsonl": _json_lines,
    "yaml": _yaml,
    "gguf": _gguf,
}
