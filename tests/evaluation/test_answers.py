"""Answer extraction on hand-labelled texts, and equality by exact value."""

import pytest

from mlx_rsgwm.errors import RsgwmError
from mlx_rsgwm.evaluation.answers import answer_kind, extract, is_correct

CASES = [
    # strict: the number after the last marker of four or more signs, and nothing else
    ("strict", "16 - 3 - 4 = 9\n9 * 2 = 18\n#### 18", "18"),
    ("strict", "##### 18", "18"),
    ("strict", "####18", "18"),
    ("strict", "#### 18.", "18"),
    ("strict", "#### $1,080", "1080"),
    ("strict", "#### $18.00", "18"),
    ("strict", "#### -5", "-5"),
    ("strict", "#### −5", "-5"),
    ("strict", "#### -$5", "-5"),
    ("strict", "#### 0.50", "0.5"),
    ("strict", "#### .5", "0.5"),
    ("strict", "#### 3/4", "3/4"),
    ("strict", "#### 25%", "25"),
    ("strict", "#### 18 dollars", "18"),
    ("strict", "#### **18**", "18"),
    ("strict", "#### 12\nQuestion: next?\n#### 13", "13"),
    ("strict", "The answer is 18.", None),
    ("strict", "### 18", None),
    ("strict", "####", None),
    ("strict", "#### unknown 7", None),
    ("strict", "", None),
    ("strict", "#### " + "9" * 5000, None),
    # flexible: the last number wherever it stands
    ("flexible", "The answer is 18.", "18"),
    ("flexible", "She pays $3,600/year in total", "3600"),
    ("flexible", "1,234,567 people", "1234567"),
    ("flexible", "so 10-5", "5"),
    ("flexible", "it fell to -5", "-5"),
    ("flexible", "10 - 5 = 5, that is (-3)", "-3"),
    ("flexible", "a loss of -$20.50!", "-20.5"),
    ("flexible", "half, or 1/2", "1/2"),
    ("flexible", "about 2 1/2 cups", "5/2"),
    ("flexible", "28/4=7", "7"),
    ("flexible", "25 % of them", "25"),
    ("flexible", r"it is \frac{3}{8}", "3/8"),
    ("flexible", "1, 2, 3", "3"),
    ("flexible", "I do not know.", None),
    # choice
    ("choice", "#### B", "B"),
    ("choice", "#### (c)", "C"),
    ("choice", "A bank needs one. The answer is (D).", "D"),
    ("choice", "answer: b", "B"),
    ("choice", "E", "E"),
    ("choice", "B. library", "B"),
    ("choice", "I think (A) is wrong and (C) is right", "C"),
    ("choice", "So it must be C.", "C"),
    ("choice", "A good question I cannot solve", None),
    ("choice", "#### none", None),
    # yesno
    ("yesno", "#### yes", "yes"),
    ("yesno", "#### No.", "no"),
    ("yesno", "True", "yes"),
    ("yesno", "No ducks here, so the answer is yes.", "yes"),
    ("yesno", "Yes at first sight, but no", "no"),
    ("yesno", "Nobody knows", None),
    ("yesno", "#### 12", None),
    # math
    ("math", r"Hence $\boxed{\frac{7}{25}}$.", "7/25"),
    ("math", r"first \boxed{3}, then \boxed{x^{2}+1}", "x^{2}+1"),
    ("math", "#### (3,1)", "(3,1)"),
    ("math", r"#### \boxed{12}", "12"),
    ("math", "The answer is $5$.", "5"),
    ("math", r"\boxed{unclosed", None),
    # text
    ("text", "France, so\n#### Paris", "Paris"),
    ("text", "It is\nParis", "Paris"),
    ("text", "  ", None),
]


@pytest.mark.parametrize(("kind", "text", "expected"), CASES, ids=[f"{k}-{t[-24:]!r}" for k, t, _ in CASES])
def test_extraction(kind, text, expected):
    found = extract(text, kind)
    assert found.value == expected
    assert found.status == ("refusal" if expected is None else "answer")


@pytest.mark.parametrize(
    ("value", "gold", "same"),
    [
        ("18", "18", True),
        ("18.0", "18", True),
        ("1,080", "1080", True),
        ("$5", "5.00", True),
        ("1/2", "0.5", True),
        ("2 1/2", "2.5", True),
        (r"\frac12", r"\dfrac{1}{2}", True),
        ("25%", "25", True),
        ("-3", "3", False),
        ("0.3333333333333333", "1/3", False),  # floats would say yes
        ("100000000000000001", "100000000000000000", False),  # so would these
        ("Yes", "yes", True),
        ("yes", "no", False),
        ("b", "B", True),
        (r"\left( 3, 1 \right)", "(3,1)", True),
        (r"x=5", "5", True),
        (r"90^\circ", "90", True),
        (r"5\text{ cm}", "5cm", True),
        ("new  york", "New York.", True),
        (None, "5", False),
        ("", "0", False),
    ],
)
def test_equality(value, gold, same):
    assert is_correct(value, gold) is same


def test_answer_kind():
    assert [answer_kind(task) for task in ("gsm8k", "math", "commonsense_qa", "strategyqa", "mine")] == [
        "strict",
        "math",
        "choice",
        "yesno",
        "strict",
    ]
    assert [answer_kind("mine", gold) for gold in ("12", "yes", "B", r"\sqrt{2}", "Paris")] == [
        "strict",
        "yesno",
        "choice",
        "math",
        "text",
    ]


def test_unknown_kind():
    with pytest.raises(RsgwmError, match="unknown answer kind 'loose'"):
        extract("1", "loose")
