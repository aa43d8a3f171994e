"""Real tasks: rows in, answers out. Hand-written rows here; the whole data sets where shared/assets is at hand."""

import json
import time

import pytest

from data.gsm8k import GSM8K
from data.mmlu_pro import MMLUPro, split_of

QUESTION = "Which?\n\nA. one\nB. two\nC. a dog\nD. Bb Bb\nE. bb bb"


@pytest.mark.parametrize("text, answer", [
    ("6 * 7 = 42\n#### 42", "42"), ("#### 1,234", "1234"), ("#### 1,234,567.00", "1234567"), ("#### $18.00", "18"), ("####72.", "72"), ("#### 3/4", "3/4"),
    ("#### 6/8", "3/4"), ("#### 0.75", "3/4"), ("#### .5", "1/2"), ("#### -5", "-5"), ("#### \u2212$5", "-5"), ("#### $-5", "-5"), ("####\n 18 dollars\nI hope this helps 3.", "18"),
    ("#### 5 + 3 = 8", "8"), ("#### **12**", "12"), ("#### 12%", "12"), ("#### 7 #### 9", "9"), ("#### x = 10 apples", "10"),
    ("####\r\n\u00a018", "18"), ("So the answer is 64.", "64"), ("The answer is 3. No, the answer is: $1,200 a year", "1200"), ("The answer is 3 + 4 = 7.", "7"), ("The answer is 3\n#### 4", "4"), ("The answer is 3\n#### none", None),
    ("42", None), ("#### none", None), ("#### 2/0", None), ("####", None), ("", None), ("#### \n\n", None)])
def test_gsm8k_answers(text, answer):
    assert GSM8K().extract_answer(text) == answer


@pytest.mark.parametrize("text, answer", [
    ("so\nThe answer is (C)", "C"), ("The answer is C.", "C"), ("The answer is **C**", "C"), ("**Answer:** B", "B"), ("Answer: $\\boxed{B}$", "B"), ("The answer is \\boxed{\\text{B}}.", "B"),
    ("C", "C"), ("C.", "C"), ("(C)", "C"), ("**C**", "C"), ("the answer is (b)", "B"), ("The correct answer is option B.", "B"), ("The answer is B because of A.", "B"), ("The answer is A because", "A"),
    ("The answer is\n\n**B**", "B"), ("The answer is B: two", "B"), ("The answer is two.", "B"), ("The answer is a dog", "C"), ("The answer is Bb Bb", "D"), ("The answer is bb bb", "E"),
    ("The answer is A. No, the answer is B.", "B"), ("The answer is F", None), ("The answer is unclear", None), ("I do not know", None), ("", None), ("The answer is", None)])
def test_mmlu_pro_answers(text, answer):
    assert MMLUPro().extract_answer(text, QUESTION) == answer


def test_any_text_is_read_without_raising():
    hypothesis = pytest.importorskip("hypothesis")
    pieces = hypothesis.strategies.sampled_from(["####", "answer is", "The answer is (", "$", "-", "1,234", "/", "\\boxed{", "A", "j", "two", "\n", "\u0660", "\u0130", "B. "])

    @hypothesis.given(hypothesis.strategies.lists(hypothesis.strategies.one_of(pieces, hypothesis.strategies.text())).map("".join))
    @hypothesis.settings(deadline=None, max_examples=300)
    def read(text):
        number, letter = GSM8K().extract_answer(text), MMLUPro().extract_answer(text, QUESTION)
        assert number is None or GSM8K().extract_answer("#### " + number) == number       # what is read reads back as itself
        assert letter is None or letter in "ABCDE"
    read()


@pytest.mark.parametrize("piece", ["answer is ", "####", "#### 1", "(", "1,", " ", "\n", "-", "\u0130", "answer is (", "\\boxed{", "#### ="])
def test_time_is_linear(piece):
    begun = time.time()
    for task in (GSM8K(), MMLUPro()):
        task.extract_answer(piece * (2_000_000 // len(piece)), QUESTION)
    assert time.time() - begun < 5


def rows(folder, name, lines):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_gsm8k_rows_without_a_number_are_reported_and_left_out(tmp_path, capsys):
    rows(tmp_path, "test.jsonl", [{"question": "a", "answer": "x\n#### 7"}, {"question": "b", "answer": "x"}])
    assert GSM8K(data=str(tmp_path)).gold("test") == {"gsm8k-test-0": "7"}
    assert "gsm8k-test-1" in capsys.readouterr().out
    assert len(GSM8K(data=str(tmp_path), flawed=True).questions("test")) == 2
    assert "answer" not in GSM8K(data=str(tmp_path)).questions("test")[0]


def test_mmlu_pro_rows_that_contradict_themselves_are_reported_and_left_out(tmp_path, capsys):
    good = {"question_id": 1, "question": "Which?", "options": ["x", "y", "z"], "answer": "B", "answer_index": 1}
    rows(tmp_path, "test.jsonl", [good, {**good, "question_id": 2, "answer": "C"}, {**good, "question_id": 3, "answer_index": 7, "answer": "H"},
                                  {**good, "question_id": 4, "options": ["y", "y", "z"]}])
    task = MMLUPro(data=str(tmp_path))
    assert {**task.gold("train"), **task.gold("test")} == {"mmlu_pro-1": "B"}
    assert "question_id 2, 3, 4 contradict" in capsys.readouterr().out
    question, = task.questions(split_of(1))
    assert question == {"id": "mmlu_pro-1", "question": "Which?\n\nA. x\nB. y\nC. z"}
    assert "The answer is (X)" in task.prompt(question["question"])


def test_a_missing_data_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="test.jsonl"):
        GSM8K(data=str(tmp_path)).gold("test")


def test_every_gsm8k_answer_reads_back(assets):
    task = GSM8K(data=str(assets / "gsm8k"))
    for split, size in (("train", 7473), ("test", 1319)):
        gold = task.gold(split)
        assert len(gold) == size
        for form in ("#### {}", "So it is 1.\n#### ${}.00\nDone.", "####{} dollars", "#### **{}**"):
            assert all(task.extract_answer(form.format(f"{int(a):,}")) == a for a in gold.values() if "/" not in a)
    assert sum("/" in a for a in gold.values()) == 0


def test_every_mmlu_pro_answer_reads_back(assets):
    pytest.importorskip("pyarrow")
    task = MMLUPro(data=str(assets / "mmlu_pro"), flawed=True)
    sizes = {split: len(task.questions(split)) for split in ("train", "test")}
    assert sum(sizes.values()) == 12032 and 0.3 < sizes["test"] / 12032 < 0.37
    for split in sizes:
        gold = task.gold(split)
        for q in task.questions(split):
            for form in ("so\nThe answer is ({}).", "{}", "({})", "**{}**", "{}.", "The answer is {}", "Answer: {}"):
                assert task.extract_answer(form.format(gold[q["id"]]), q["question"]) == gold[q["id"]], (q["id"], form)
