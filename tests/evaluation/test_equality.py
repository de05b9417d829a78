"""Equality of answers by exact value: numbers, amounts with units, mathematics and words."""

import pytest

from mlx_rsgwm.evaluation.answers import is_correct


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
        ("10 m s⁻¹", "10 m/s", True),
        ("10 m s⁻²", "10 m/s", False),
        ("10 s⁻¹", "10 s", False),
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


@pytest.mark.parametrize(
    ("value", "gold", "equal"),
    [
        (r"\{1,2\} \cup \{3\}", r"\{1,2,3\}", True),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("(1,2]", "[1,2]", False),
        (r"\frac{1}{3}", "0.33", False),
        (r"2\pi", "6.28", False),
        ("Paris", "5", False),
    ],
)
def test_mathematics_is_compared_by_math_verify(value, gold, equal):
    pytest.importorskip("math_verify")
    assert is_correct(value, gold) is equal


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        ("3.11.40", "3.11.4"), ("192.168.0.1", "192.168.0.10"), ("0.10.0", "0.1.0"), ("v3.10", "v3.1"),
        ("Python 3.1", "Python 3.10"), ("Apollo 1", "Apollo 11"), ("2024-05-01", "2024-05-02"), ("-19", "COVID-19"),
        ("10 g", "10 kg"), ("5 cm", "5 m"), ("3 km", "3 miles"), ("3 hours", "3 minutes"), ("20 °C", "20 °F"),
        ("5 MW", "5 mW"), ("5 Gb", "5 GB"), ("10 m/s", "10 km/h"), ("5 cm^2", "5 cm^3"), ("3 apples", "3 oranges"),
        ("5 square meters", "5 meters"), (r"18\pi\text{ cm}", r"18\pi\text{ m}"), ("5 ft 3 in", "5 ft 4 in"),
        ("3:45 am", "3:45 pm"), ("12 pm", "12 am"), ("3:45", "3:45 pm"), ("12:30", "12"),
        ("{1,4}", "(1, 4)"), ("1, 4", "(1, 4)"), ("[1,4]", "(1,4)"), ("2/3", "2:3"), ("x=5", "y=5"),
        ("$5 million", "5"), ("5 million", "5 billion"), ("€5", "$5"), ("25%", "$25"),
        ("ice cream", "icecream"), ("therapist", "the rapist"), ("C+", "C++"),
    ],
)  # fmt: skip
def test_another_version_unit_time_or_word_is_wrong(value, gold):
    pytest.importorskip("math_verify")
    assert not is_correct(value, gold)
    assert not is_correct(gold, value)


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        ("10", "10 kg"), ("10 kg", "10"), ("5 KG", "5 kg"), ("10 kilograms", "10 kg"), ("3 hrs", "3 hours"),
        ("20 degrees Celsius", "20 °C"), ("3:45 p.m.", "3:45 pm"), ("5,000,000", "$5 million"), ("£1.2m", "£1,200,000"),
        ("25 percent", "25%"), ("$3.50", "3.50 dollars"), ("5 MB", "5 megabytes"), (r"5\text{ cm}^2", "5 cm^2"),
        (r"18\pi", r"18\pi\text{ square inches}"), ("2 : 3", "2:3"), (r"\{1,4\}", "{4, 1}"), ("1,4", r"\{1,4\}"),
        ("x=-3 or x=3", "x=3 or x=-3"), ("cafe\u0301", "caf\u00e9"), ("apollo  11", "Apollo 11"), ("3.11.4", "3.11.4"),
    ],
)  # fmt: skip
def test_the_same_amount_or_text_in_another_spelling_is_right(value, gold):
    pytest.importorskip("math_verify")
    assert is_correct(value, gold)
    assert is_correct(gold, value)


@pytest.mark.parametrize(
    ("value", "gold", "equal"),
    [
        ("10² kg", "10 kg", False), ("10² kg", "100 kg", True), ("10^2 kg", "100", True), ("10²", "10", False),
        ("10²", "100", True), ("5 m²", "5 m", False), ("x²", "x^2", True), ("2³ cm", "8 cm", True), ("2³", "2", False),
        ("5 m", "500 cm", True), ("5 m", "5 km", False), ("5 m", "5 cm", False), ("5 km", "5000 metres", True),
        ("2 hours", "120 minutes", True), ("2 hours", "2 minutes", False), ("90 s", "1.5 min", True),
        ("$5", "500 cents", True), ("$5", "5 cents", False), ("1.5 kg", "1500 g", True), ("3 ft", "36 inches", True),
        ("3 ft", "1 yard", True), ("1 mile", "1.6 km", False), ("5 m", "5 s", False), ("5 l", "5 kg", False),
        ("-5 kg", "-5000 g", True), ("-5 kg", "5000 g", False), ("-5 kg", "5 kg", False),
        ("€5", "500 cents", False), ("500 m²", "5 cm²", False), ("5", "500 cm", False),
        ("10⁻² kg", "10 kg", False), ("10⁻² kg", "100 kg", False), ("10⁻² kg", "0.01 kg", True),
        ("10⁻² kg", "10", False),
        ("10^{-2} kg", "10 g", True), ("10⁺² kg", "100 kg", True), ("10**-2 kg", "10 kg", False),
        ("10⁻²", "0.01 kg", True),
        ("2⁻¹ m", "50 cm", True), ("0⁻¹ kg", "0 kg", False), ("10^x kg", "10 kg", False), ("10⁻²⁰⁰ kg", "10 kg", False),
        ("5 × 10⁻² kg", "0.05 kg", True), ("5 × 10⁻² kg", "5 kg", False), ("3·10⁻³ m", "3 mm", True),
        ("1.5e-3 kg", "1.5 g", True), ("1.5e-3 kg", "1.5 kg", False), (r"10^{-2}\text{ kg}", "0.01 kg", True),
        (r"10⁻² \text{ kg}", "10 kg", False), ("-10² kg", "10 kg", False), ("10⁻² xy", "10 xy", False),
        ("10 m⁻¹", "10 m", False), ("10 s⁻¹", "10 s", False), ("10^{1.5} kg", "10 kg", False),
    ],
)  # fmt: skip
def test_exponents_and_units_are_part_of_an_amount(value, gold, equal):
    pytest.importorskip("math_verify")
    assert is_correct(value, gold) is equal
    assert is_correct(gold, value) is equal
