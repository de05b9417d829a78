"""What shells, scripts, other programs and other people put where a value is wanted."""

from __future__ import annotations

NUMBERS = [
    "1e400", "-1e400", "1e308", "1e-400", "5e-324", "1e-320", "nan", "NaN", "-nan", "inf", "-inf", "Infinity", "-1",
    "-0", "0", "+1", "1", "2", "3.7", "-3.7", ".5", "5.", "1e3", "1E3", "1e", "e1", "0x10", "0b11", "0o17", "1_000",
    "1,000", "1 000", "1.000,5", "007", "1/2", "1/0", "٣", "½", "²", "١٢", "三", "Ⅷ", "¼", "１２", "2147483647",
    "2147483648", "4294967295", "4294967296", "-2147483648", "9223372036854775807", "9223372036854775808",
    "18446744073709551615", "1" + "0" * 400, "9" * 4300, "9" * 4301, "-" + "9" * 4300, "0." + "0" * 400 + "1",
    "1" * 309 + ".0", "1j", "1+1", "1e1e1", "--1", "+-1", "0.1.2", "1%", "50%", "1k", "2GB", "∞", "π", "1f", "1L",
    "01e1", "1.0", "0.0", "-0.0", "1e0", "1d5",
]  # fmt: skip
NOTHING = [
    "", " ", "  ", "\t", "\n", "\r\n", "\v", "\f", "\xa0", "\u2003", "\u200b", "\ufeff", "\u2028", "''", "", "\\",
]  # fmt: skip
WORDS = [
    "true", "false", "True", "yes", "no", "on", "null", "None", "~", "undefined", "NaN-1", "auto", "draft",
    "verify", "all", "default", "x", "name with spaces", "ünïcödé", "日本語", "😀", "e\u0301", "İ", "ß", "ſ",
    "A" * 4096, "a" * 300, "a" * 255, "é" * 200, "x" * 100_000, "DRAFT", "Linear", "--", "-", "---", "-x", "--help",
    "--no-such", "--out", "-o", "=", "=x", "a=", "a=b", "a==", "=a=b", "tau=nan", "tau=1e400", "tau=", "a.b.c=1",
    "train.rank=" + "9" * 4301, "__class__=1", "a=[1,2", "a={", "a=!!python/name:x", "a=&x *x", "x:y=z", ":", ",",
    ",,,", ";", "a,b", "a;b", "|", "a|b", "&", "#", "#x", "%", "%s", "%d%n", "%00", "{}", "{0}", "{x}", "{{x}}",
    "${HOME}", "$HOME", "$(id)", "`id`", "!!", "!x", "@", "@x", "@/dev/zero", "a\"b", "a'b", "<x>", "</script>",
    "a\\nb",
]  # fmt: skip
PATTERNS = [
    "[", "]", "*", "**", "?", "(", ")", "+", "^", "$", ".*", "(a+)+$", "(?P<x>", "[a-", "a{1,", "\\d", "\\", "[!x]",
    "*?*",
]  # fmt: skip
PATHS = [
    "/", ".", "..", "./.", "~", "~nobody", "~nobody/x", "~nosuchuser", "~nosuchuser/x", "~/x", "/dev/null",
    "/dev/zero", "/dev/full", "/dev/stdin", "/dev/tty", "/dev/fd/99", "/proc/self/mem", "/proc/self/environ",
    "/proc/1/root", "/etc/passwd", "/nowhere", "/nowhere/x", "nowhere", "nowhere/x", "base", "base/",
    "base/config.json", "base/config.json/x", "base/..", "mine.jsonl", "mine.jsonl/", "corpus", "draft",
    "draft/adapters.safetensors", "draft-peft", "draft.gguf", "recipe.yaml", "../x", "a/" * 2000 + "a", "x/" * 100,
    "//", "///x", "file:///etc/passwd", "http://localhost:1/", "https://example.invalid/x", "C:\\x",
    "\\\\server\\x", "CON", "nul", ".hidden", "...", "x.safetensors", "x.bin", "x.pt", "x.gguf", "x.yaml",
    "x.jsonl", "x.json", "x.png", "x.md", "hf://", "hf://a", "hf://a/b", "hf://a/b@", "hf://a/b@c/d", "hf:/",
    "hf:/\0", "a/b", "a/b/c", "a//b", "a/b@main",
]  # fmt: skip
CONTROL = [
    "\0", "a\0b", "\x01", "\x07", "\x08", "\x1b[31mred", "\x1b]0;title\x07", "\x1bc", "\x7f", "\x9b31m", "\u202e",
    "a\u202eb", "\u2066", "\udcff", "a\udcffb", "\udcc3\udc28", "\ud800", "\udfff", "a\rb", "a\nb", "a\tb",
    "\ufffe", "\uffff", "\U0010ffff", "\u0378",
]  # fmt: skip
ODD = list(dict.fromkeys([*NUMBERS, *NOTHING, *WORDS, *PATTERNS, *PATHS, *CONTROL]))
