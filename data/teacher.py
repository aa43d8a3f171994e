"""Samples the teacher and votes: n responses a question at several temperatures, then one label for each.

    python data/teacher.py                                         the tiny teacher, 10 samples a question
    python data/teacher.py --temperatures 0.7,1.0 --min-agreement 0.5
    python data/teacher.py --task gsm8k --student 1b --teacher-url http://host:8000/v1 --teacher-model meta-llama/Llama-3.1-70B-Instruct

Reads the task's training questions (never their answers). Writes teacher.jsonl, one line a question as soon as its samples are complete,
so that an interrupted run asks only for what is missing; and labels.jsonl, one line a question, made anew from teacher.jsonl each time.
The temperatures are our choice; the paper says only that there are several.

With --teacher-url the teacher is whatever model an OpenAI-compatible server serves (its key in OPENAI_API_KEY); each answer is on disk as it comes.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import ready, server, task_of
from nanodistill import run, settings, vote, weights
from nanodistill.generate import generate
from nanodistill.settings import Common, flag
from nanodistill.tokenizer import Tokenizer


@dataclass
class Config(Common):
    samples: int = flag(10, "responses per question", least=1)
    temperatures: str = flag("0.7,0.8,0.9,1.0,1.1", "sampling temperatures, taken in turn by a "
                             "question's samples")
    min_agreement: float = flag(None, "a question whose winning answer has a smaller share of the "
                                "samples is dropped", least=0, most=1)
    concurrency: int = flag(32, "requests under way at once, to a teacher behind a server",
                            least=1, result=False)

    def problems(self, given):
        rules = [(self.concurrency and "concurrency" in given and not self.teacher_url,
                  "--concurrency does nothing without --teacher-url")]
        try:
            good = all(0 <= t < math.inf for t in read_temperatures(self.temperatures))
        except ValueError:
            good = False
        rules.append((not good, f"--temperatures {self.temperatures}: wants numbers of at least 0 "
                      "with commas between them, such as 0.7,1.0"))
        return [message for wrong, message in rules if wrong]


STAGES = {"teacher": Config}


def read_temperatures(text):
    """ "0.7,1.0" -> [0.7, 1.0]. Raises ValueError."""
    return [float(t) for t in text.split(",")]


def local(model, tokenizer, task, max_new_tokens, slots):
    """A sampler for `collect`: the model in this process."""
    def sampler(questions, temperatures, seed):
        samples = generate(model, [tokenizer.prompt_ids(task.prompt(q["question"])) for q in questions], n=len(temperatures),
                           temperature=temperatures, max_new_tokens=max_new_tokens, eos_ids=tokenizer.eos_ids,
                           pad_id=tokenizer.pad_id, slots=slots, seed=seed)
        for i, j, sample in samples:
            yield questions[i]["id"], j, tokenizer.decode(sample.tokens), sample.ended, len(sample.tokens)
    return sampler


def collect(path, questions, task, sampler, temperatures, description):
    """Sample each question once at each of `temperatures`, appending a line a question to `path` as soon as it is complete.

    `sampler(questions, temperatures, seed)` yields (question id, index into temperatures, text, ended, tokens). Questions that the file already has
    are not asked again. Returns the rows {"id", "question", "responses"} in the order of `questions`. Ctrl-C ends the program with what is complete on disk.
    """
    rows = {row["id"]: row for row in run.read_jsonl(path)}
    if any([r["temperature"] for r in row["responses"]] != temperatures for row in rows.values()):
        sys.exit(f"{path} was sampled with other --samples or --temperatures. Give the same ones, "
                 "another --out, or delete it.")
    todo = {q["id"]: q for q in questions if q["id"] not in rows}
    append, waiting, spent, begun = run.Appender(path), {}, 0, time.time()
    # The stream depends on what is there, so a resumed run does not repeat the noise of the first questions on the next.
    samples = sampler(list(todo.values()), temperatures, torch.initial_seed() + len(rows))
    bar = run.Bar(total=len(questions), initial=len(questions) - len(todo), desc=description,
                  unit="q")
    with run.interruptible() as stop, bar:
        for id_, j, text, ended, tokens in samples:
            waiting.setdefault(id_, {})[j] = {"text": text, "temperature": temperatures[j], "ended": ended,
                                              "answer": task.extract_answer(text, todo[id_]["question"]) if ended else None}
            spent += tokens
            if len(waiting[id_]) == len(temperatures):
                responses = waiting.pop(id_)
                rows[id_] = {**todo[id_], "responses": [responses[k] for k in range(len(temperatures))]}
                append(rows[id_])
                bar.update()
                bar.set_postfix_str(f"{spent / (time.time() - begun):.0f} tokens/s", refresh=False)
            if stop():
                samples.close()
                sys.exit(f"stopped: {len(rows)} questions are in {path}; the same command goes on")
    return [rows[q["id"]] for q in questions]


def label(rows, folder, min_agreement):
    """Vote over the answers in each row, write labels.jsonl and return the votes."""
    votes, lines = [], []
    for row in rows:
        answers = [r["answer"] for r in row["responses"]]
        votes.append(vote.majority(answers, min_agreement))
        lines.append({"id": row["id"], "vote": votes[-1].answer, "agreement": votes[-1].agreement, "n": votes[-1].n,
                      "labels": vote.labels(answers, votes[-1])})
    weights.write_atomic(folder / "labels.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return votes


def main(argv=None):
    configs = settings.parse("teacher", STAGES, __doc__, argv)
    config = configs["teacher"]
    if config.dry_run:
        return print(ready.dry_run("teacher", configs))
    ready.check("teacher", configs)
    folder, device, dtype = run.start(configs, "teacher")
    task = task_of(config)
    questions = task.questions("train")[:config.questions or None]
    metrics = run.Metrics(folder, "teacher")
    temperatures = read_temperatures(config.temperatures)
    temperatures = [temperatures[j % len(temperatures)] for j in range(config.samples)]
    if config.teacher_url:
        def sampler(questions, temperatures, seed):
            prompts = {q["id"]: task.prompt(q["question"]) for q in questions}
            return server.generate(
                config.teacher_url, config.teacher_model, os.environ.get("OPENAI_API_KEY", ""),
                prompts, temperatures, config.max_new_tokens, folder / "teacher.part.jsonl",
                config.concurrency, seed=seed)
    else:
        source = weights.resolve(config.teacher, "teacher", config.teacher_revision)
        tokenizer = Tokenizer(source)
        longest = max(len(tokenizer.prompt_ids(task.prompt(q["question"]))) for q in questions)
        slots = run.fitted("teacher", config, weights.load_config(source), dtype, device, longest,
                           config.max_new_tokens, jobs=len(questions) * config.samples).slots
        sampler = local(weights.load(source, device=device, dtype=dtype), tokenizer, task,
                        config.max_new_tokens, slots)
    rows = collect(folder / "teacher.jsonl", questions, task, sampler, temperatures, "teacher")
    (folder / "teacher.part.jsonl").unlink(missing_ok=True)

    votes = label(rows, folder, config.min_agreement)
    measured = vote.summary(votes)
    metrics(len(questions), **measured, seconds=metrics.seconds())
    print(f"teacher: {len(questions)} questions, {config.samples} samples each; vote kept "
          f"{measured['kept']:.1%} of them, mean agreement {measured['agreement']:.1%} "
          f"-> {folder / 'labels.jsonl'}")


if __name__ == "__main__":
    run.guard(main)
