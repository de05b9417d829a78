"""What people, programs and enemies write into YAML: in the place of a value, and in the place of a file."""

from __future__ import annotations

import json

from tests.outside.odd_values import CONTROL, NOTHING, NUMBERS, PATHS, PATTERNS, WORDS

BOMB = "[&a [x,x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b], "
BOMB += "&d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d], [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]]"
# Written as they are: numbers of YAML 1.1, 1.2 and neither, nulls, truth values, collections, tags, aliases, broken.
PLAIN = [
    *(text for text in NUMBERS), ".nan", ".NaN", ".inf", "-.inf", "+.Inf", "0b101", "0o14", "014", "0x",
    "0xFFFFFFFFFFFFFFFFFF", "0x" + "F" * 5000,
    "1_0.0_1", "190:20:30", "1:1", "1e+400", "-1e+400", "1.e5", "1e-5", "+.5", "1__0", "_1",
    "10e", "- 1", "1 2", "1,2", "2024-01-01", "2024-13-45", "2001-12-14t21:59:43.10-05:00", "12:30:45", "null", "~",
    "Null", "NULL", "", "true", "True", "TRUE", "yes", "Yes", "on", "off", "No", "y", "n", "[]", "{}", "[[]]", "[{}]",
    "[null]", "[1, two]", "[1, 2, 3]", "[.nan]", "[1e400]", "['']", "[change, change]", "{a: 1}", "{1: 2}",
    "{null: null}", "{[1]: 2}", "{{a: 1}: 2}", "{a: {b: {c: 1}}}", "{a: 1, a: 2}", "{<<: {a: 1}}", "{<<: 3}",
    "{<<: [1, 2]}", "{__class__: x}", "? a", "- a", "? [a]\n  : b", "!!str 1", "!!int '1'", "!!int x", "!!float nan",
    "!!float x", "!!bool maybe", "!!null x", "!!seq x", "!!map x", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]",
    "!!binary aGVsbG8=", "!!binary '*'", "!!timestamp 2024-01-01", "!!timestamp x", "!!merge x", "!!value =", "=",
    "<<", "!x y", "!", "! x", "!<x> y", "!!x", "!<tag:yaml.org,2002:int> 3", "!!python/object:os.system x",
    "!!python/object/apply:os.system ['touch new/ran']", "!!python/name:os.system", "!!python/module:os",
    "!!python/tuple [1, 2]", "!!python/object/new:type [x, [], {}]", "!!python/none ''", "!!python/complex 1j",
    "!!python/long '1'", "&a 1", "&a [*a]", "&a {a: *a}", "*a", "*undefined", "&a", "& x", "*", BOMB,
    "[" * 200 + "]" * 200, "{a: " * 200 + "1" + "}" * 200, "[" * 5000, "[" * 5000 + "]" * 5000,
    "[" + "1," * 3000 + "1]", "{" + ",".join(f"k{n}: 1" for n in range(1000)) + "}", "x" * 100_000,
    "'" + "x " * 50_000 + "'", "|\n  text", ">\n  text", "|+9\n  text", "'", '"', "'x", '"x', '"\\x"', '"\\uD800"',
    '"\\ud83d\\ude00"', '"\\0"', '"\\e[31m"', "'a''b'", '"a\\nb"', "`x", "@x", "%x", "x: y", "x:", ": x", "x #y",
    "#x", "x\n  y", "x\ny: 1", "x\n- y", "\tx", "x\ty", "{", "}", "[", "]", "{]", "[}", ",", "--- x", "...",
    "\n---\nx: 1", "\n...\n", "%YAML 9.9", "\x85", "\u2028", "\ufeff1", "1\ufeff", "\u200b1", "\x07", "\x00",
    "\x1b[31m", "\ud800", "\udcff",
]  # fmt: skip
QUOTED = [json.dumps(text) for text in (*NUMBERS, *NOTHING, *WORDS, *PATTERNS, *PATHS, *CONTROL) if len(text) < 5000]
ODD_YAML = list(dict.fromkeys([*PLAIN, *QUOTED]))


def odd_files(sound: str) -> dict[str, bytes]:
    """Files that are, or are not, YAML, by what is odd of them; ``sound`` is a document that is read."""
    text = sound.encode()
    first = sound.partition("\n")[0]
    return {
        "nothing": b"", "spaces": b"   \n", "a line feed": b"\n", "a comment": b"# nothing\n",
        "only a mark": b"\xef\xbb\xbf", "a mark": b"\xef\xbb\xbf" + text,
        "two marks": b"\xef\xbb\xbf\xef\xbb\xbf" + text, "utf-16": sound.encode("utf-16"),
        "utf-16 without a mark": sound.encode("utf-16-le"), "utf-32": sound.encode("utf-32"),
        "latin-1": b"# \xe9\n" + text, "nul": text[:5] + b"\0" + text[5:], "nul at the end": text + b"\0",
        "a control character": text + b"# \x07\n", "a c1 character": text + b"# \xc2\x85x\n",
        "an escape": text + b"# \x1b[31m\n", "windows": text.replace(b"\n", b"\r\n"),
        "an old mac": text.replace(b"\n", b"\r"), "tabs": b"\t" + text, "the first half": text[: len(text) // 2],
        "twice": text + text, "two documents": text + b"---\n" + text,
        "an end": text + b"...\n", "an end, and more": text + b"...\nx\n",
        "a first key twice": text + first.encode() + b"\n", "a directive": b"%YAML 1.1\n---\n" + text,
        "a future": b"%YAML 9.9\n---\n" + text, "an unknown directive": b"%X y\n---\n" + text,
        "another tag": b"%TAG ! tag:x,2000:\n---\n" + text, "a list": b"- a\n- b\n", "a text": b"text\n",
        "a number": b"1\n", "nulls": b"null\n", "a truth": b"true\n", "json": b'{"a": 1}', "not json": b'{"a": 1,,}',
        "brackets": b"[" * 5000, "braces": b"{" * 5000, "dashes": b"- " * 5000, "questions": b"? " * 5000,
        "quotes": b"'" * 99_999, "stars": b"*a " * 1000, "ampersands": b"&a " * 1000, "exclamations": b"!" * 100_000,
        "colons": b":" * 100_000, "depth": b"\n".join(b" " * n + b"a:" for n in range(3000)),
        "an object": b"!!python/object/apply:os.system [x]",
        "an object as a key": b"? !!python/object/apply:os.system [x]\n: 1\n", "itself": b"&a {a: *a}\n",
        "itself merged": b"&a {<<: *a}\n", "a bomb": b"a: " + BOMB.encode(),
        "many keys": b"".join(b"k%d: 1\n" % n for n in range(2000)), "a long key": b"k" * 100_000 + b": 1\n",
        "no text key": b"1: 2\n", "null key": b"~: 2\n", "a list as a key": b"? [a]\n: 1\n",
        "a mapping as a key": b"? {a: 1}\n: 1\n", "dunder": b"__class__: x\n__init__: y\n",
        "html": b"<!doctype html><p>404", "pickle": b"\x80\x04\x95\x0b", "zip": b"PK\x03\x04" + bytes(30),
        "safetensors": bytes([8]) + bytes(7) + b'{"a":{}}',
    }  # fmt: skip
