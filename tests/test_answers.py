"""An answer is read from a response whole, or not at all: GSM8K's numbers, MMLU-Pro's letters."""

import random
import time
from fractions import Fraction

import pytest

from data.gsm8k import GSM8K
from data.mmlu_pro import MMLUPro


QUESTION = "Which?\n\nA. one\nB. two\nC. a dog\nD. Bb Bb\nE. bb bb"


@pytest.mark.parametrize("text, answer", [
    ("6 * 7 = 42\n#### 42", "42"), ("#### 1,234", "1234"), ("#### 1,234,567.00", "1234567"),
    ("#### $18.00", "18"), ("####72.", "72"), ("#### 3/4", "3/4"), ("#### 6/8", "3/4"),
    ("#### 0.75", "3/4"), ("#### .5", "1/2"), ("#### -5", "-5"), ("#### \u2212$5", "-5"),
    ("#### $-5", "-5"), ("####\n 18 dollars\nI hope this helps 3.", "18"), ("#### 5 + 3 = 8", "8"),
    ("#### **12**", "12"), ("#### 12%", "12"), ("#### 7 #### 9", "9"), ("#### x = 10 apples", "10"),
    ("####\r\n\u00a018", "18"), ("So the answer is 64.", "64"), ("The answer is 3 + 4 = 7.", "7"),
    ("The answer is 3. No, the answer is: $1,200 a year", "1200"), ("The answer is 3\n#### 4", "4"),
    ("42", None), ("#### none", None), ("#### 2/0", None), ("####", None), ("", None),
    ("#### \n\n", None)])
def test_gsm8k_answers(text, answer):
    assert GSM8K().extract_answer(text) == answer


@pytest.mark.parametrize("text, answer", [
    # A heading's own number is none.
    ("#### Step 2: money\n18 - 2 = 16. The answer is 18.", "18"), ("#### Final answer\n8", "8"),
    ("#### 1. The cost\nIt is 5.\n#### 2. The sum\nThe answer is $9.", "9"), ("#### Step 2", None),
    ("#### 1. The cost\nIt is 5.", None), ("#### Step two: 3 + 4 = 7\nThe answer is 30", "30"),
    ("### Final answer:\n\n**8**", "8"), ("#### Total cost: $18", "18"),
    ("#### The total is 18 eggs", "18"), ("#### 18\n#### Check\nIt holds.", "18"),
    # Without marks that lead to a number, the last of the other cues that does.
    ("so $\\boxed{18}$.", "18"), ("\\boxed{x = \\frac{3}{4}}", "3/4"), ("Answer: 18", "18"),
    ("**Answer:** 18", "18"), ("The final answer is 18", "18"), ("ANSWER = $18", "18"),
    ("The answer to the problem is 18", "18"), ("The answer would be 18 eggs", "18"),
    ("The answer is 18. That answer is right.", "18"), ("\\boxed{17} no, the answer is 18", "18"),
    ("The answer is 3\n#### none", "3"), ("The answer is 3\n#### 18 eggs", "18"),
    ("Answer:\n1. Add 2 and 3", None), ("Answer:\n- 5 eggs\n- 3 pears", None),
    # What is not understood is no answer, and what stands before it is not taken for one.
    ("The answer is 5.\n#### 18 or 20", None), ("#### 3 + 4\nSo the answer is 7.", "7"),
    ("The answer is 5. No, the answer is 18 or 20.", None), ("#### 5\n#### 3:30", None),
    # A statement that goes on beyond what is looked at is not known whole.
    ("#### " + "9" * 5000, None), ("#### 1/" + "9" * 5000, None),
    ("The answer is 18" + " " * 400 + "thousand", None)])
def test_gsm8k_cues(text, answer):
    assert GSM8K().extract_answer(text) == answer


@pytest.mark.parametrize("text", [
    "18 or 20", "18-20", "18\u201320", "18 to 20", "18, 20", "18; 20", "18 20", "between 3 and 5",
    "3:30", "5'11", "5 feet 11 inches", "18 dollars and 50 cents", "2024-01-02", "1/2/2024", "3:4",
    "1 in 5", "3 out of 5", "2 + 3", "2 * 3", "2^5", "2\u00b3", "18 + x", "18x", "x >= 18",
    "2\u03c0", "18\\sqrt{2}", "x = 3, y = 5", "x = 3 or x = 5", "--18", "3-1/2", "3/4/5",
    "1/1,000", "3/4.5",
    "\\frac{3}{4+1}", "3 1/0", "3/0", "\\frac{3}{0}", "1,2345", "1,250,50", "1.2.3", "12 345 67",
    "0x1F", "1e400", "1e4000", "10^999", "inf", "nan", "eighteen", "18 twenty", "18 dozen",
    "18 m\u00b2 3", "18 M", "18m", "18 lakh", "18\u4e07", "18 thousandths", "2 thousand 500",
    "5 times", "18\u2082",
    "18 R2", "18 remainder 2", "18 (or 20)", "18 squared", "\u2460", "\u00bd\u00bd", "1\u200b8",
    "18+", "18 or more", "18 thirty", "9" * 130, "5:00 pm", "18 minus x",
    "3 5/4", "0 4/4", "#", "$", "-", "\\frac{}{}", "10^", "1 million 5"])
def test_no_part_of_a_number_is_read(text):
    for form in ("#### {}", "The answer is {}", "\\boxed{{{}}}"):
        assert GSM8K().extract_answer(form.format(text)) is None


def grouped(n, mark):
    return f"{n:,}".replace(",", mark)


# Hand-written: how a whole number n, and a decimal of hundredths, may be spelled.
WHOLE = ["{n}", "{n}.", "{n},", "{n}.00", "${n}", "\\${n}", "\u20ac{n}", "{n}\u20ac", "{n} \u20ac",
         "{n} dollars", "{n}kg", "{n} cm^2", "{n}%", "{n}\\%", "({n})", "**{n}**", "*{n}*", "_{n}_",
         "`{n}`", "${n}$", "$\\boxed{{{n}}}$", "\\({n}\\)", "\\text{{{n} eggs}}", "x = {n}",
         "{n}/1", "0 + {n} = {n}", "\u2248 {n}", "about {n}", "{n}e0", "{n} \u00d7 10^0",
         "\\frac{{{n}}}{{1}}", "{n} (2 * 9)", "{n} because 9 * 2 is it", "{n} eggs in 3 days",
         "US${n}", "{n}!", "{n}th",
         "{n} thousandweights", "{comma}", "{comma}.0", "{space}", "{thin}", "{nbsp}", "{quote}",
         "{under}", "{latex}", "{space},00", "{dots},0", "{arabic}", "{wide}", "{n}000e-3", "0{n}"]
LARGE = [("{n} thousand", 10**3), ("{n} hundred", 100), ("{n} Million", 10**6), ("{n}k", 1000),
         ("{n}M", 10**6), ("${n} billion dollars", 10**9), ("{n} \\text{{ thousand}}", 1000),
         ("{n}e3", 1000), ("{n}E+03", 1000), ("{n} \u00d7 10^3", 1000), ("{n}*10**3", 1000),
         ("{n} \\times 10^{{3}}", 1000), ("{n} \u00d7 10\u00b3", 1000),
         ("{n}e-3", Fraction(1, 1000)), ("{n} \u00d7 10\u207b\u00b2", Fraction(1, 100)),
         ("{n} x 10^-2 kg", Fraction(1, 100))]
RATIO = ["{a}/{b}", "{a} / {b}", "{a}\u2044{b}", "\\frac{{{a}}}{{{b}}}",
         "\\dfrac{{{a}}}{{{b}}} hours", "${a}/{b}$", "\\boxed{{\\tfrac{{{a}}}{{{b}}}}}",
         "x = {a}/{b}", "{a}/{b} of a cake"]


def read(text):
    answer = GSM8K().extract_answer(f"Step 1: 7 + 7 = 14\n#### {text}\nThat is it.")
    assert answer == GSM8K().extract_answer(f"I think the answer is {text}"), text
    return answer


def test_every_spelling_of_a_number_reads_as_that_number():
    rng = random.Random(0)
    for n in [1, 9, 18, 999, 1000, 1250, 10**6, *(rng.randrange(1, 10**rng.randrange(1, 10))
                                                  for _ in range(20))]:
        spelled = dict(n=n, comma=f"{n:,}", latex=grouped(n, "{,}"), space=grouped(n, " "),
                       thin=grouped(n, "\u2009"), nbsp=grouped(n, "\u00a0"),
                       quote=grouped(n, "\u2019"), under=grouped(n, "_"), dots=grouped(n, "."),
                       arabic="".join(chr(0x660 + int(d)) for d in str(n)),
                       wide="".join(chr(0xff10 + int(d)) for d in str(n)))
        for form in WHOLE:
            assert read(form.format(**spelled)) == str(n), (form, n)
        for sign in ("-", "\u2212", "-$", "$-", "\u20ac-", "- "):
            assert read(f"{sign}{n}") == f"-{n}"
        for form, times in LARGE:
            assert read(form.format(n=n)) == str(n * times), (form, n)
        for cents in range(10, 100, 17):
            value = str(n + Fraction(cents, 100))
            for text in (f"{n}.{cents}", f"${n:,}.{cents}", f"{n},{cents}",
                         f"{grouped(n, ' ')}.{cents}", f"{grouped(n, ' ')},{cents}"):
                assert read(text) == value, text
        for a, b in ((1, 2), (3, 4), (6, 8), (7, 24)):
            for text in (f"{n} {a}/{b}", f"{n} and {a}/{b}", f"{n}\\frac{{{a}}}{{{b}}} cups"):
                assert read(text) == str(n + Fraction(a, b)), text
            for form in RATIO:
                assert read(form.format(a=n, b=b)) == str(Fraction(n, b)), (form, n, b)
    assert read("1.250,50") == "2501/2" and read("1.250.000") == "1250000" and read(".5") == "1/2"
    assert read("1,00,000") == "100000" and read("0,125") == "1/8" and read("10^3") == "1000"
    assert read("10\u00b3") == "1000" and read("\u00bd") == "1/2" and read("-\u00bd") == "-1/2"
    assert read("\u0661\u066c\u0662\u0663\u0664") == "1234"
    assert read("\uff11\uff0c\uff12\uff15\uff10") == "1250"
    assert read("3\u00bd") == "7/2" and read("18 and a half") == "37/2"
    assert read("-\\frac34") == "-3/4"
    assert read("1.2 million people") == "1200000" and read("10/3 \u2248 3.33") == "333/100"


@pytest.mark.parametrize("text, answer", [
    ("so\nThe answer is (C)", "C"), ("The answer is C.", "C"), ("The answer is **C**", "C"),
    ("**Answer:** B", "B"), ("**Answer**: B", "B"), ("Answer: $\\boxed{B}$", "B"), ("C", "C"),
    ("The answer is \\boxed{\\text{B}}.", "B"), ("C.", "C"), ("(C)", "C"), ("**C**", "C"),
    ("the answer is (b)", "B"), ("The correct answer is option B.", "B"),
    ("The answer is B: two", "B"), ("The answer is B because of A.", "B"),
    ("The answer is A because", "A"),
    ("The answer is\n\n**B**", "B"), ("The answer is two.", "B"), ("The answer is a dog", "C"),
    ("The answer is Bb Bb", "D"), ("The answer is bb bb", "E"), ("I do not know", None),
    ("The answer is A. No, the answer is B.", "B"), ("The answer is F", None), ("", None),
    ("The answer is unclear", None), ("The answer is", None),
    # The last cue that leads to an answer; the last line where none does.
    ("The answer is (D). That answer follows from (A).", "D"), ("\\boxed{C}", "C"),
    ("The answer is (D). That answer is right.", "D"), ("\\boxed{\\text{C}} as said", "C"),
    ("$\\boxed{\\textbf{(C)}}$", "C"), ("The answer is A, or \\boxed{B}.", "B"),
    ("The answer is as follows.\nC", "C"), ("Answer: B\nAnswer: see above", "B"),
    ("The answer is (A). No, the answer is (F).", None), # beyond the options
    # Two letters are no answer; a letter that something is said of is none either.
    ("The answer is (A) or (B)", None), ("The answer is A and B.", None), ("A, B, and C", None),
    ("The answer is C, since A and B fail", "C"), ("The answer is B and A is wrong", "B"),
    ("The answer is two because it is", "B"), ("The answer is two cats", None),
    ("The answer is Bb Bb because", "D"), ("The answer is BB BB because", None)])
def test_mmlu_pro_answers(text, answer):
    assert MMLUPro().extract_answer(text, QUESTION) == answer


@pytest.mark.parametrize("text, answer", [
    ("10", "A"), ("10.", "A"), ("$10$", "A"), ("10 because of that", "A"), ("\\boxed{10}", "A"),
    ("105", None), ("10.5", None), ("10,000", None), ("10 thousand", None), ("10%", None),
    ("10 or 20", None), ("-10", None), ("two dogs", "D"), ("two dogs. They bark", "D"),
    ("[1, 2] because", "E"), ("two", "C"), ("two cats", None)])
def test_mmlu_pro_options_are_read_whole(text, answer):
    options = "Which?\n\nA. 10\nB. 20\nC. two\nD. two dogs\nE. [1, 2]"
    assert MMLUPro().extract_answer(f"The answer is {text}", options) == answer


def test_any_text_is_read_without_raising():
    hypothesis = pytest.importorskip("hypothesis")
    pieces = hypothesis.strategies.sampled_from(
        ["####", "answer is", "The answer is (", "$", "-", "1,234", "/", "\\boxed{", "A", "j",
         "two", "\n", "\u0660", "\u0130", "B. ", "\\frac{", "}{", "1 250", "e9", "^", "=", "\u00bd",
         " million", "\u00b3", "0", ".", ",", "'", "\ud800"])
    texts = hypothesis.strategies.lists(
        hypothesis.strategies.one_of(pieces, hypothesis.strategies.text()))

    @hypothesis.given(texts.map("".join))
    @hypothesis.settings(deadline=None, max_examples=400)
    def read_any(text):
        number = GSM8K().extract_answer(text)
        letter = MMLUPro().extract_answer(text, QUESTION)
        # What is read reads back as itself.
        assert number is None or GSM8K().extract_answer("#### " + number) == number
        assert letter is None or letter in "ABCDE"
    read_any()


@pytest.mark.parametrize("piece", [
    "answer is ", "####", "#### 1", "(", "1,", " ", "\n", "-", "\u0130", "answer is (", "\\boxed{",
    "#### =", "answer to ", "answer", "9", "1 ", "\\frac{1}{", "million ", "answer is A and ",
    "#### a"])
def test_time_is_linear(piece):
    begun = time.process_time()
    for task in (GSM8K(), MMLUPro()):
        text = piece * (1_000_000 // len(piece))
        for begun_with in ("", "#### ", "answer is "):
            task.extract_answer(begun_with + text, QUESTION)
    assert time.process_time() - begun < 5
