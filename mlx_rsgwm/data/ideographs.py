"""Whole numbers in Chinese and Japanese signs: 八, 三十五, 一百零五, 两万.

Only those that a reader cannot take for something else: 八九 (eight or nine), 十几 (some ten) and a colloquial 一百五
(150, not 105) have no value, and signs inside words (星期三, 三角形, 一些) are no numbers.
"""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = {sign: value for value, sign in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_MYRIADS = "万萬"
_RUN = f"[{''.join(_DIGITS)}{''.join(_UNITS)}{_MYRIADS}]"
_COUNTED = (
    "个|個|块|元|円|人|岁|歲|只|本|天|米|公里|公斤|小时|小時|分钟|分鐘|秒|次|件|张|張|条|條|页|頁|名|位|颗|顆|つ|枚|匹"
)
# After what introduces a value, up to a counter or the end of the clause.
IDEOGRAPHS = re.compile(
    rf"(?:(?<=[是为為は：:得到共有剩下负負于於])|(?<![\w]))(?P<number>{_RUN}+)"
    rf"(?=(?P<counter>{_COUNTED})|です|である|だ[。\s]|[\s。．.,，、;；!！)）*]|$)"
)


def read_ideographs(match: re.Match[str]) -> Fraction | None:
    """Value of a match of ``IDEOGRAPHS``; None where it has no one value, and for 一个, which is "a"."""
    text = match["number"]
    if text == "一" and match["counter"]:
        return None
    parts = re.split(f"[{_MYRIADS}]", text)
    values = [_below_myriad(part) for part in parts if part]
    if len(parts) > 2 or not parts[0] or None in values:
        return None
    if len(parts) == 1:
        return values[0]
    rest = values[1] if len(values) == 2 else Fraction(0)
    assert values[0] is not None
    assert rest is not None
    if parts[1] and not parts[1].startswith(("零", "〇")) and rest < 1000:
        return None  # 两万五 is 25,000 when spoken
    return values[0] * 10**4 + rest


def _below_myriad(text: str) -> Fraction | None:
    total, digit, smallest, zero = 0, None, 10**4, False
    for place, sign in enumerate(text):
        if sign in _UNITS:
            unit = _UNITS[sign]
            if unit >= smallest or (digit is None and (unit != 10 or place)) or digit == 0:
                return None
            total, digit, smallest, zero = total + (1 if digit is None else digit) * unit, None, unit, False
        elif digit:
            return None  # 八九
        elif _DIGITS[sign] == 0 and text[place + 1 :]:
            zero = True
        else:
            digit = _DIGITS[sign]
    spoken = digit is not None and smallest in (100, 1000) and not zero
    return None if spoken else Fraction(total + (digit or 0))
