"""Leaks between training and test questions: found by kind, and only where they are."""

from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.evaluation.contamination import contamination, find_contamination

TRAIN = {
    "t1": "Ada has 12 pens and gets 7 more. How many pens does Ada have now?",
    "t2": "A train leaves the old station at noon and travels for three long hours to the sea. How far is it?",
}


def ask(name, text):
    return Question(name, "task", text, "", "1")


def test_kinds():
    questions = [
        ask("same", "ada has 12 pens, and gets 7 more.  How many pens does Ada have now"),
        ask("other numbers", "Ada has 1,450 pens and gets 9 more. How many pens does Ada have now?"),
        ask("near", TRAIN["t2"].replace("sea", "lake")),
        ask("new", "Ada sold 12 pens to a train driver. How far is it?"),
    ]
    found = {match.test: (match.kind, match.train) for match in find_contamination(questions, TRAIN)}
    assert found == {"same": ("exact", "t1"), "other numbers": ("numbers", "t1"), "near": ("near", "t2")}
    counts = contamination(questions, TRAIN)
    assert (counts["exact"], counts["numbers"], counts["near"]) == (1, 1, 1)
    assert (counts["test"], counts["train"]) == (4, 2)


def test_nothing_to_find():
    assert find_contamination([ask("a", "Something else entirely?")], TRAIN) == []
    assert find_contamination([ask("a", "")], {}) == []


def test_the_embedded_families_never_repeat_a_question_word_for_word():
    train = {q.id: q.question for q in generate("change", 144, 42, "train")}
    counts = contamination(generate("change", 60, 42, "test"), train)
    assert counts["exact"] == 0
    assert counts["numbers"] > 0  # their making: the same words around other numbers


def test_words_of_any_script_and_signs_of_arithmetic():
    from mlx_rsgwm.evaluation.contamination import words_of

    different = [
        ("What is 3 + 4?", "What is 3 - 4?"),
        ("Сколько у Анны 5 яблок?", "Кто купил 5 груш?"),
        ("太郎は5個のりんごを持っています", "花子は5冊の本を読みました"),
        ("كم تفاحة مع 5 أولاد", "متى وصل 5 رجال"),
        ("Find f(x) = x^2", "Find f(x) = x/2"),
    ]
    for one, other in different:
        assert words_of(one) != words_of(other)
    same = [("What's 1,080?", "WHAT’S 1080"), ("well-known", "well known"), ("１２ 個", "12個"), ("5 − 3", "5-3")]
    for one, other in same:
        assert words_of(one) == words_of(other)
