"""Samples the teacher and votes: n responses a question at several temperatures, then one label for each.

    python data/teacher.py                                         the tiny teacher, 10 samples a question
    python data/teacher.py --temperatures 0.7,1.0 --min-agreement 0.5

Reads the task's training questions (never their answers). Writes teacher.jsonl, one line a question as soon as its samples are complete,
so that an interrupted run asks only for what is missing; and labels.jsonl, one line a question, made anew from teacher.jsonl each time.
The temperatures are our choice; the paper says only that there are several. A server as the teacher is not here yet.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import TASKS
from nanodistill import run, vote, weights
from nanodistill.generate import generate
from nanodistill.tokenizer import Tokenizer


@dataclass
class Config:
    teacher: str = run.flag("tiny", "the teacher: a preset or an HF folder")
    student: str = run.flag("tiny", "the student; here it only names the run folder")
    task: str = run.flag("arithmetic", "what is asked", tuple(TASKS))
    questions: int = run.flag(0, "training questions used; 0 = all")
    samples: int = run.flag(10, "responses a question")
    temperatures: str = run.flag("0.7,0.8,0.9,1.0,1.1", "sampling temperatures, taken in turn by a question's samples")
    min_agreement: float = run.flag(0.3, "a question whose winning answer has a smaller share of the samples is dropped")
    max_new_tokens: int = run.flag(512, "a response is cut off here")
    slots: int = run.flag(64, "sequences sampled at once")
    seed: int = run.flag(1, "questions and samples follow from it")
    out: str = run.flag("", "run folder; empty = out/<task>-<student>")
    device: str = run.flag("auto", "cuda, cpu or auto")
    dtype: str = run.flag("auto", "of the arithmetic; auto = bf16 on CUDA, fp32 on CPU", ("auto", "bf16", "fp32"))
    threads: int = run.flag(0, "CPU threads; 0 = PyTorch's choice")


TINY = dict(min_agreement=0.4, max_new_tokens=56, slots=256)


def collect(path, questions, task, tokenizer, model, temperatures, max_new_tokens, slots, description):
    """Sample each question once at each of `temperatures`, appending a line a question to `path` as soon as it is complete.

    Questions that the file already has are not asked again. Returns the rows {"id", "question", "responses"} in the order of `questions`.
    Ctrl-C ends the program with what is complete on disk.
    """
    rows = {row["id"]: row for row in run.read_jsonl(path)}
    todo = [q for q in questions if q["id"] not in rows]
    # The stream depends on what is there, so a resumed run does not repeat the noise of the first questions on the next.
    generator = torch.Generator(model.head.device).manual_seed(torch.initial_seed() + len(rows))
    append, waiting = run.Appender(path), {}
    samples = generate(model, [tokenizer.prompt_ids(task.prompt(q["question"])) for q in todo], n=len(temperatures),
                       temperature=temperatures, max_new_tokens=max_new_tokens, eos_ids=tokenizer.eos_ids,
                       pad_id=tokenizer.pad_id, slots=slots, generator=generator)
    with run.interruptible() as stop, tqdm(total=len(questions), initial=len(questions) - len(todo), desc=description, unit="q") as bar:
        for i, j, sample in samples:
            text = tokenizer.decode(sample.tokens)
            waiting.setdefault(i, {})[j] = {"text": text, "temperature": temperatures[j], "ended": sample.ended,
                                            "answer": task.extract_answer(text) if sample.ended else None}
            if len(waiting[i]) == len(temperatures):
                responses = waiting.pop(i)
                rows[todo[i]["id"]] = {**todo[i], "responses": [responses[k] for k in range(len(temperatures))]}
                append(rows[todo[i]["id"]])
                bar.update()
            if stop():
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
    config = run.parse(Config, __doc__, TINY, argv)
    folder, device, dtype = run.start(config, "teacher")
    task, source = TASKS[config.task](seed=config.seed), weights.resolve(config.teacher, "teacher")
    questions = task.questions("train")[:config.questions or None]
    metrics = run.Metrics(folder, "teacher")
    temperatures = [float(t) for t in config.temperatures.split(",")]
    temperatures = [temperatures[j % len(temperatures)] for j in range(config.samples)]
    tokenizer, model = Tokenizer(source), weights.load(source, device=device, dtype=dtype)
    rows = collect(folder / "teacher.jsonl", questions, task, tokenizer, model, temperatures,
                   config.max_new_tokens, config.slots, "teacher")

    votes = label(rows, folder, config.min_agreement)
    measured = vote.summary(votes)
    metrics(len(questions), **measured, seconds=metrics.seconds())
    print(f"teacher: {len(questions)} questions, {config.samples} samples each; vote kept {measured['kept']:.1%} of them, "
          f"mean agreement {measured['agreement']:.1%} -> {folder / 'labels.jsonl'}")


if __name__ == "__main__":
    main()
