"""Answers that a text takes back, and those it stands by, in many languages."""

from fractions import Fraction

import pytest

from mlx_rsgwm.data.numbers import parse_number
from mlx_rsgwm.evaluation.answers import extract


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 12. Wait, that is wrong; 11 is right.", "11"),
        ("The answer is 12. Wait, that is incorrect. The right number is 11.", "11"),
        ("The answer is 12. Oops, a mistake: 11 is correct.", "11"),
        ("The answer is 12. Wait, was that wrong? No, it is correct.", "12"),
        ("The answer is 12. Wait, let me check. Yes, that is right.", "12"),
    ],
)
def test_a_correction_counts_in_any_word_order(text, answer):
    assert extract(text, "flexible").value == answer


CORRECTED = [
    ("flexible math", "\\boxed{12}. Hmm, 12 is wrong, 11 is correct.", "11"),
    ("flexible math", "The answer is 12. On second thought, 11.", "11"),
    ("flexible math", "The answer is 12. No: 11.", "11"),
    ("flexible", "Die Antwort ist 12. Moment, das ist falsch; 11 ist richtig.", "11"),
    ("flexible", "The answer is 12. 11 is correct, 12 is wrong.", "11"),
    ("flexible", "The answer is 12. No, 18. That is 3 boxes of 6.", "18"),
    ("flexible", "The answer is 12. No, 11. Hmm, no: 10.", "10"),
    ("flexible", "The answer is 12? No, 11.", "11"),
    ("flexible", "The answer is 12. It should be 11.", "11"),
    ("flexible", "The answer is 12. That can't be right.", None),
    ("flexible", "#### 12\nWait, that is wrong; it is 11.", "11"),
    ("strict", "#### 12\nWait, that is wrong; it is 11.", "12"),  # the marker and nothing else
    # it stands by its answer
    ("flexible math", "The answer is 12. No, 30 would be too few.", "12"),
    ("flexible math", "The answer is 12. No other value works.", "12"),
    ("flexible", "The answer is 12. Wait until 5 pm to leave.", "12"),
    ("flexible", "The answer is 12. Actually, 3 more would be needed for a party.", "12"),
    ("flexible", "The answer is 12. If you think that is wrong, write to me at 5.", "12"),
    ("flexible math", "The answer is 12. Let me double check: 3 * 4 = 12.", "12"),
    ("flexible", "The answer is 12. Let me check: 20 - 8 = 12, and 12 + 8 = 20.", "12"),
    ("flexible", "The answer is 12. I am sure that 12 is correct and 11 is wrong.", "12"),
    ("flexible", "The answer is 12. 11 is wrong.", "12"),
    ("flexible", "The answer is 12. EDIT: fixed a typo.", "12"),
    ("choice", "The answer is C. C is wrong; B is right.", "B"),
    ("choice", "The answer is C. No, a dog is no bank.", "C"),
    ("yesno", "The answer is no. No, dogs cannot fly.", "no"),
    ("yesno", "The answer is no. It is false that dogs fly.", "no"),
    ("yesno", "The answer is yes. No, wait: no.", "no"),
]


@pytest.mark.parametrize(
    ("kind", "text", "answer"), [(kind, text, answer) for kinds, text, answer in CORRECTED for kind in kinds.split()]
)
def test_the_answer_that_is_taken_back_is_not_read(kind, text, answer):
    pytest.importorskip("math_verify")
    assert extract(text, kind).value == answer


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 24, but that's wrong. It's 20.", "\\boxed{24} is wrong. It's 20.",
        "The answer is 24. Not quite: 20.", "The answer is 24. Scrap that, 20.",
        "The answer is 24. Let me redo this: 4 * 5 = 20.", "Antwort: 24. Quatsch, 20.",
        "La réponse est 24. Oups, 20.", "La respuesta es 24. Ay, 20.", "La risposta è 24. Ops, 20.",
        "Ответ: 24. Ой, 20.", "The answer is 24. Ugh, 20.", "The answer is 24. Darn, it's 20.",
        "The answer is 24 (or 20 if the cat is left out).", "The answer is 24. Zut alors, 20.",
        "The answer is 24. Blimey... 20.", "答案是24。哦，20。",
    ],
)  # fmt: skip
def test_another_number_after_a_few_words_leaves_no_first_one(text):
    assert extract(text, "flexible").value in ("20", None)


@pytest.mark.parametrize(
    "after",
    [
        "Confidence: 95%", "Hope this helps!", "That is, 2 dozen.", "In other words, 2 dozen.", "Each child gets 6.",
        "A wrong answer would be 20.", "It is not 20.", "In whole dollars, 24.", "Check: 6 * 4 = 24.",
        "No one else came.",
        "Students often make the mistake of answering 20.", "I hope that's right!", "Nothing is wrong with 2 dozen.",
    ],
)  # fmt: skip
def test_what_else_is_said_after_an_answer_leaves_it_standing(after):
    assert extract(f"The answer is 24. {after}", "flexible").value == "24"


# Each language's own words for an answer, and for taking it back with a new value.
GIVEN_AND_TAKEN_BACK = {
    "The answer is {}.": [
        "No, {}.", "No: {}.", "Nope. {}.", "On second thought, {}.", "Correction: {}.", "Make that {}.", "Hold on. {}.",
        "Hmm... {}.", "Oops, {}.", "I meant {}.", "My mistake, it should be {}.", "That's wrong; it is {}.",
        "I misread it. The correct value is {}.", "Let me recheck. It is {}.", "I take that back: {}.", "Rather, {}.",
    ],
    "\\boxed{{{}}}": ["No, {}.", "Hmm, that is not right; {} is right.", "Wait, it should be {}."],
    "Die Antwort ist {}.": ["Nein, {}.", "Korrektur: {}.", "Das ist falsch, {} ist richtig.", "Das stimmt nicht: {}."],
    "La réponse est {}.": ["Non, {}.", "Je me suis trompé, c'est {}.", "C'est faux : {}.", "Attendez, c'est {}."],
    "La respuesta es {}.": ["No, {}.", "Perdón, son {}.", "Me equivoqué: son {}.", "Eso es incorrecto; es {}."],
    "La risposta è {}.": ["No, {}.", "Anzi, {}.", "È sbagliato: {}.", "Ho sbagliato, è {}."],
    "A resposta é {}.": ["Não, {}.", "Na verdade, é {}.", "Me enganei: é {}."],
    "Het antwoord is {}.": ["Nee, {}.", "Wacht, {}.", "Dat is fout: {}."],
    "Svaret är {}.": ["Nej, {}."], "Odpowiedź: {}.": ["Nie, {}."], "Cevap: {}.": ["Hayır, {}."],
    "Ответ: {}.": ["Нет, {}.", "Точнее, {}.", "Это неверно: {}."],
    "答案是{}。": ["不对，应该是{}。", "更正：{}。", "我算错了，是{}。"], "答えは{}です。": ["間違えました、{}です。"],
    "उत्तर: {}।": ["नहीं, {}।"], "الإجابة هي {}.": ["لا، {}."],
}  # fmt: skip


@pytest.mark.parametrize(
    ("given_as", "instead"), [(first, then) for first, thens in GIVEN_AND_TAKEN_BACK.items() for then in thens]
)
@pytest.mark.parametrize(("first", "then"), [("47", "53"), ("7", "-2"), ("3.5", ".5"), ("12", "12")])
def test_a_correction_counts_in_every_language(given_as, instead, first, then):
    text = f"{given_as.format(first)} {instead.format(then)}"
    assert parse_number(extract(text, "flexible").value or "") == Fraction(then), text
