"""The embedded task: its answers are right, its splits are apart, its parser survives anything."""

import random
import subprocess
import sys
import time

import pytest

from data import TASKS, arithmetic, dry_run
from data.arithmetic import Arithmetic, Problem, draw_problem, exact, work
from data.task import Task
from data.tiny.make import example
from nanodistill.settings import Common


def test_every_valid_order_gives_the_answer_in_true_steps():
    rng = random.Random(0)
    paths = 0
    for _ in range(300):
        problem = draw_problem(rng)
        assert 3 <= sum(len(factors) for _, factors in problem.terms) <= 5
        answers = {work(problem, rng) for _ in range(10)}
        paths += len(answers)
        for text in answers:
            *steps, last = text.split("\n")
            assert last == f"#### {problem.answer}"
            for i, step in enumerate(steps):
                head, a, op, b, equals, result = step.rsplit(" ", 5)
                assert head == f"Step {i + 1}:" and equals == "="
                a, b = int(a), int(b)
                assert int(result) == {"+": a + b, "-": a - b, "*": a * b}[op] >= 0
    # A vote means something only if samples take different paths.
    assert paths / 300 > 5


def test_the_answer_by_hand():
    """The story's numbers, read by a person, against the terms behind it."""
    problem = draw_problem(random.Random(2))
    assert problem.question == (
        "Ann has 4 pens. Eva is 2 years old. She gives 3 to each of 2 friends. She gets 3 pens a "
        "day for 4 days. How many pens does Ann have now?")
    assert problem.answer == 10


def test_a_false_belief_changes_the_answer():
    problem = Problem("", [(1, (20,)), (-1, (3, 4))], 8)
    texts = {work(problem, random.Random(i), lambda a, op, b: exact(a, op, b) + (op == "*"))
             for i in range(9)}
    assert texts == {"Step 1: 3 * 4 = 13\nStep 2: 20 - 13 = 7\n#### 7",
                     "Step 1: 4 * 3 = 13\nStep 2: 20 - 13 = 7\n#### 7"}


def test_splits_are_apart_and_follow_the_seed():
    task = Arithmetic(seed=1, train=400, test=200)
    train, test = ({q["question"] for q in task.questions(split)} for split in ("train", "test"))
    assert len(train) == 400 and len(test) == 200 and not train & test
    assert task.questions("train") == Arithmetic(seed=1, train=400).questions("train")
    assert not train & {q["question"] for q in Arithmetic(seed=2, train=400).questions("train")}
    pretraining = {example(random.Random(i))[0] for i in range(300)}
    everything = {q["question"] for seed in range(3)
                  for q in Arithmetic(seed, test=300).questions("test")}
    assert not pretraining & everything


def test_questions_carry_no_gold():
    for row in Arithmetic(seed=1, train=20).questions("train"):
        assert set(row) == {"id", "question"}


@pytest.mark.parametrize("text, answer", [
    ("Step 1: 2 + 3 = 5\n#### 5", "5"), ("#### -3", "-3"), ("####05", "5"),
    ("#### 1\n#### 2 \n", "2"), ("5", None), ("####", None), ("#### 5 pens", None), ("", None),
    ("#### " + "9" * 5000, None), ("#### ٣", None)])
def test_extract_answer(text, answer):
    assert Arithmetic().extract_answer(text) == answer


def test_extract_answer_takes_any_text_in_little_time():
    rng, start = random.Random(0), time.time()
    for _ in range(2000):
        Arithmetic().extract_answer("".join(rng.choices("#### -0123456789\n\x00é", k=40)))
    Arithmetic().extract_answer("####" + " " * 10**6 + "x")
    assert time.time() - start < 5


def test_equal():
    task = Arithmetic()
    assert task.equal("5", "5") and not task.equal("5", "6") and not task.equal(None, None)


def test_as_a_script_it_shows_its_rows(tmp_path):
    done = subprocess.run([sys.executable, arithmetic.__file__], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert "arithmetic: 6000 questions in train, 1000 questions in test" in done.stdout
    question, gold = Arithmetic().rows("train")["arithmetic-0-train-0"]
    for part in (f"arithmetic-0-train-0: {question}", f"prompt: {question}", f"gold: {gold}"):
        assert f"\n{part}\n" in done.stdout


# ---- what every task has ----

class Letters(Task):
    """What a new task defines, at its least."""
    name, published, instruction = "letters", {"train": 3, "test": 1}, "Say one letter."

    def rows(self, split):
        rows = {"letters-0": ("Before c: a or b?", "b"), "letters-1": ("Next to c?", "d"),
                "letters-2": ("Which do you like?", None)}
        return rows if split == "train" else {"letters-3": ("Next to e?", "f")}

    def extract_answer(self, text, question=""):
        return (question[-2:-1] if text == "the latter" else text[-1:]) or None


def test_a_new_task_needs_rows_and_extract_answer():
    task = Letters(seed=5, data="here", flawed=True)
    assert task.questions("train")[1:] == [{"id": "letters-1", "question": "Next to c?"},
                                           {"id": "letters-2", "question": "Which do you like?"}]
    assert task.gold("train") == {"letters-0": "b", "letters-1": "d"}
    assert task.gold("test") == {"letters-3": "f"}
    assert task.prompt("Next to e?") == "Next to e?\n\nSay one letter."
    assert (task.seed, task.data, task.flawed, task.source()) == (5, "here", True, "here")
    for call in (Task().rows, Task().extract_answer):
        with pytest.raises(NotImplementedError):
            call("train")


def test_each_task_stands_wherever_a_task_must():
    choices = Common.__dataclass_fields__["task"].metadata["choices"]
    assert {*TASKS} == {*choices} == {*dry_run.PROMPTS}
    for name, kind in TASKS.items():
        assert issubclass(kind, Task) and kind.name == name
        assert {*kind.published} == {"train", "test"}


def test_true_accuracy_by_hand():
    """Right: "the latter" to letters-0, and "so d". A question without gold does not count."""
    task, asked = Letters(), ["letters-0", "letters-0", "letters-2", "letters-1", "letters-1"]
    texts = ["the latter", "it is z", "b", "", "so d"]
    assert task.true_accuracy("train", asked, texts) == {"true_accuracy": 2 / 4}
    assert task.true_accuracy("train", ["letters-2"], ["b"]) == {}
    assert task.true_accuracy("test", ["letters-3"], ["f"]) == {"true_accuracy": 1.0}
