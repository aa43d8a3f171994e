"""Word problems about small whole numbers: the embedded task, in the manner of GSM8K.

A problem is a story with several quantities, 3 to 5 of which are combined by adding, subtracting
and multiplying; half of the stories also mention a number that does not matter. It is answered in
steps (`python data/arithmetic.py` shows another):

    Ann has 7 pens. She buys 3 boxes of 3 pens. She loses 5. Tom is 8 years old. How many pens does
    Ann have now?

    Step 1: 7 - 5 = 2
    Step 2: 3 * 3 = 9
    Step 3: 9 + 2 = 11
    #### 11

Most problems can be worked along many valid orders, each of which meets other arithmetic facts. So
several samples of a model take different paths, and a vote over their answers is worth more than
one of them. No question is in both splits: a hash of its text decides which one it may belong to.
"""

import functools
import hashlib
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.task import Task, show


NAMES = [("Ann", "She", "her"), ("Eva", "She", "her"), ("Mia", "She", "her"), ("Zoe", "She", "her"),
         ("Ben", "He", "him"), ("Leo", "He", "him"), ("Max", "He", "him"), ("Tom", "He", "him")]
ITEMS = ["pens", "cards", "books", "coins", "apples", "shells", "stamps", "toys"]

# Sentences for a term of the sum: {x} alone, or {x} times {y}. {He}, {him}: the hero; {friend}:
# another person.
GAIN = ["{He} finds {x} more.", "{He} buys {x} {items}.", "{friend} gives {him} {x}."]
LOSE = ["{He} loses {x}.", "{He} gives {x} to {friend}.", "{He} sells {x} {items}."]
GAIN_PRODUCT = ["{He} buys {x} boxes of {y} {items}.", "{He} gets {x} {items} a day for {y} days.",
                "{x} friends give {him} {y} each."]
LOSE_PRODUCT = ["{He} gives {x} to each of {y} friends.", "{He} sells {x} boxes of {y}.",
                "{He} loses {x} a day for {y} days."]
ASIDE = ["{friend} is {x} years old.", "{friend} has {x} {others}.", "The shop is {x} miles away."]

LARGEST = 16                    # no total that a correct working passes through is above this


@dataclass
class Problem:
    question: str
    terms: list             # of (sign, factors); above: (+1, (7,)), (+1, (3, 3)), (-1, (5,))
    answer: int


def draw_problem(rng):
    """One random problem from a `random.Random`."""
    while True:
        # 3, 4 or 5 quantities: a start, then single terms and products of two factors.
        shapes = rng.choice([[1, 1], [2], [1, 2], [1, 2], [1, 1, 1], [2, 2], [1, 1, 2]])
        terms = [(1, (rng.randint(3, 12),))]
        for factors in shapes:
            most = 9 if factors == 1 else 5
            numbers = tuple(rng.randint(2, most) for _ in range(factors))
            terms.append((rng.choice((1, -1)), numbers))
        values = [sign * (f[0] * f[1] if len(f) == 2 else f[0]) for sign, f in terms]
        gained, lost = sum(v for v in values if v > 0), -sum(v for v in values if v < 0)
        if gained <= LARGEST and gained > lost:
            break
    name, he, him = rng.choice(NAMES)
    items = rng.choice(ITEMS)

    def fill(sentence, numbers):
        return sentence.format(x=numbers[0], y=numbers[-1], He=he, him=him, items=items,
                               friend=rng.choice([n for n, _, _ in NAMES if n != name]),
                               others=rng.choice([i for i in ITEMS if i != items]))

    events = []
    for sign, factors in terms[1:]:
        if len(factors) == 2:
            sentences = GAIN_PRODUCT if sign > 0 else LOSE_PRODUCT
        else:
            sentences = GAIN if sign > 0 else LOSE
        events.append(fill(rng.choice(sentences), factors))
    if rng.random() < 0.5:
        events.append(fill(rng.choice(ASIDE), (rng.randint(2, 20),)))
    rng.shuffle(events)
    question = [f"{name} has {terms[0][1][0]} {items}.", *events,
                f"How many {items} does {name} have now?"]
    return Problem(" ".join(question), terms, sum(values))


def exact(a, op, b):
    """The true result of a op b, op one of + - *."""
    return a + b if op == "+" else a - b if op == "-" else a * b


def work(problem, rng, compute=exact):
    """A worked answer along a random valid order.

    At each step either a product is worked out or two terms are combined: gains add up, losses add
    up, and a gain and a loss leave the difference of the larger and the smaller. `compute(a, op,
    b)` gives each step's result, so that a caller can write the answers of someone who gets some
    facts wrong (see data/tiny/make.py).
    """
    terms, lines = list(problem.terms), []
    while len(terms) > 1 or len(terms[0][1]) == 2:
        products = [(i,) for i, (_, factors) in enumerate(terms) if len(factors) == 2]
        singles = [i for i, (_, factors) in enumerate(terms) if len(factors) == 1]
        pairs = [(i, j) for i in singles for j in singles if i != j]
        chosen = rng.choice(products * 2 + pairs)       # a product has two orders, as a pair has
        if len(chosen) == 1:
            sign, (a, b) = terms[chosen[0]]
            if rng.random() < 0.5:
                a, b = b, a
            op = "*"
        else:
            (sign, (a,)), (other, (b,)) = (terms[i] for i in chosen)
            op = "+" if sign == other else "-"
            if op == "-" and a < b:
                sign, a, b = other, b, a
        result = compute(a, op, b)
        lines.append(f"Step {len(lines) + 1}: {a} {op} {b} = {result}")
        terms = [term for i, term in enumerate(terms) if i not in chosen] + [(sign, (result,))]
    sign, (value,) = terms[0]
    return "\n".join([*lines, f"#### {sign * value}"])


def split_of(question):
    """ "test" or "train": one question in eight may only ever be a test question, by its hash."""
    return "test" if hashlib.sha256(question.encode()).digest()[0] % 8 == 0 else "train"


@functools.cache
def draw_split(seed, split, size):
    """{id: Problem}, `size` distinct problems of a split."""
    rng = random.Random(f"arithmetic-{seed}-{split}")   # a string seeds alike on every platform
    problems = {}
    while len(problems) < size:
        problem = draw_problem(rng)
        if split_of(problem.question) == split:
            problems[problem.question] = problem        # a question drawn twice counts once
    return {f"arithmetic-{seed}-{split}-{i}": p for i, p in enumerate(problems.values())}


class Arithmetic(Task):
    """`seed` draws the questions; `train` and `test` are how many. Nothing is read, so `data` and
    `flawed` change nothing. The tiny models know the answers' form: there is no instruction."""
    name, published = "arithmetic", {"train": 6000, "test": 1000}

    def __init__(self, seed=0, data="", flawed=False, train=6000, test=1000):
        super().__init__(seed, data, flawed)
        self.sizes = {"train": train, "test": test}

    def source(self):
        """Where the rows come from, for messages."""
        return f"seed {self.seed}"

    def rows(self, split):
        """{id: (question, answer as text)}."""
        drawn = draw_split(self.seed, split, self.sizes[split])
        return {id_: (problem.question, str(problem.answer)) for id_, problem in drawn.items()}

    def extract_answer(self, text, question=""):
        """The whole number after the last ####, without leading zeros, or None. Never raises."""
        if "####" not in text:
            return None
        found = re.match(r"\s*(-?[0-9]{1,9})\s*$", text.rpartition("####")[2])
        return str(int(found[1])) if found else None


if __name__ == "__main__":
    show(Arithmetic)
