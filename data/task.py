"""What a task is: questions, how they are asked, how an answer is read, and when two are the same.

A new task takes

    1. a file in data/ with a class derived from `Task`: its `name`, `published`, `instruction`,
       `rows` and `extract_answer`. data/rows.py reads JSONL and parquet for it;
    2. a line in TASKS of data/__init__.py;
    3. its name among the choices of --task in nanodistill/settings.py;
    4. a line in PROMPTS of data/dry_run.py: how long its prompts are.

Stages read gold answers through `gold` alone. `questions` carries none, so that no stage that
trains gets one with its questions.
"""

import argparse
import sys


class Task:
    """Base class of all tasks. A split is "train" or "test"; no question is in both.

    Args:
        seed: the run's. What is drawn at random, if anything, follows from it.
        data: the path of own rows, --data; "" for the task's published ones.
        flawed: keep the questions whose rows contradict themselves, --flawed.
    """
    name = ""                       # as --task and the beginning of each question's id
    published = {}                  # {split: number of questions}, for plans before any row is read
    instruction = ""                # what a prompt says behind the question; says the answer's form

    def __init__(self, seed=0, data="", flawed=False):
        self.seed, self.data, self.flawed = seed, data, flawed
        self.loaded = {}            # {split: rows}, for tasks that read files: each is read once

    # ---- what each task defines ----

    def rows(self, split):
        """{id: (question, gold answer or None)}, always in the same order.

        An id is the same in every run with the same rows: samples and the held-out share follow
        from it. Raises OSError, ValueError or ImportError where the rows can't be read.
        """
        raise NotImplementedError

    def extract_answer(self, text, question=""):
        """The answer that a response ends on, as normalised text, or None. Never raises.

        `question`: for tasks whose answers refer to it, as a letter does to an option.
        """
        raise NotImplementedError

    def source(self):
        """Where the rows come from, for messages."""
        return str(self.data)

    # ---- what all share ----

    def questions(self, split):
        """[{"id", "question"}] of a split. Without answers."""
        return [{"id": id_, "question": row[0]} for id_, row in self.rows(split).items()]

    def gold(self, split):
        """{id: answer as text} of the rows with one. For evaluation and diagnostics only: nothing
        that trains may call it."""
        return {id_: gold for id_, (_, gold) in self.rows(split).items() if gold is not None}

    def prompt(self, question):
        """The user's message that asks a model the question; the same in every stage."""
        return f"{question}\n\n{self.instruction}".rstrip()

    def equal(self, answer, other):
        """Are two extracted answers the same? None equals nothing."""
        return answer is not None and answer == other

    def true_accuracy(self, split, ids, texts):
        """{"true_accuracy": the share of responses that are right by gold}, of those whose question
        has a gold answer; {} where none has.

        A diagnostic: what trains gets this number for its log, never the answers.
        """
        gold, questions = self.gold(split), {q["id"]: q["question"] for q in self.questions(split)}
        right = [self.equal(self.extract_answer(text, questions[id_]), gold[id_])
                 for id_, text in zip(ids, texts) if id_ in gold]
        return {"true_accuracy": sum(right) / len(right)} if right else {}


def show(Kind):
    """`python data/<task>.py [DATA]`: the splits' sizes; a question, its prompt and its gold."""
    parser = argparse.ArgumentParser(description="The splits' sizes; a question, its prompt, gold.")
    parser.add_argument("data", nargs="?", default="", help="own rows, as --data of the stages")
    try:
        task = Kind(data=parser.parse_args().data)
        rows = {split: task.rows(split) for split in ("train", "test")}
    except (OSError, ValueError, ImportError) as error:
        sys.exit(str(error))
    sizes = ", ".join(f"{len(rows[split])} questions in {split}" for split in rows)
    print(f"{task.name}: {sizes}, from {task.source()}")
    for id_, (question, gold) in [*rows["train"].items(), *rows["test"].items()][:1]:
        print(f"\n{id_}: {question}\n\nprompt: {task.prompt(question)}\n\ngold: {gold}")
