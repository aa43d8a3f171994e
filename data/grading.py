"""What eval.py asks of a model: its flags, the samples, and which of them are right.

train_rl.py takes the flags from here: it runs eval.py at its end.
"""

import json
from dataclasses import dataclass

import torch

from nanodistill import files, parallel, run, vote
from nanodistill.generate import respond
from nanodistill.settings import Common, flag


@dataclass
class Config(Common):
    models: str = flag("", "models to compare instead of the run's, separated by commas: folders, "
                       "hub names or sizes")
    flawed: bool = flag(False, "keep the questions whose rows contradict themselves; they are "
                        "named and left out otherwise")
    samples: int = flag(8, "k of mean@k, maj@k and pass@k", least=1)

    def problems(self, given):
        idle = self.flawed and self.task == "arithmetic"
        return ["--flawed does nothing: no question of --task arithmetic contradicts itself"] * idle


STAGES = {"eval": Config}


class Samples:
    """The samples of one model, in a file that a stopped evaluation goes on from.

    The file's first line says what they were made from; a file of something else is begun anew.

    Args:
        file: Path of that file. path: the model's folder. config: the settings.
        prompts: {id: prompt ids} of the questions that may be asked.
        slots: sequences sampled at once.
    """

    def __init__(self, file, path, config, task, model, tokenizer, prompts, slots):
        self.task, self.model, self.tokenizer = task, model, tokenizer
        self.prompts, self.slots, self.max_new_tokens = prompts, slots, config.max_new_tokens
        origin = {"model": files.digest(path), **{k: getattr(config, k) for k in (
            "task", "data", "seed", "max_new_tokens", "dtype", "date")}}
        self.file = file
        file.parent.mkdir(exist_ok=True)
        if parallel.rank() == 0 and files.read_jsonl(file)[:1] != [origin]:
            for part in file.parent.glob(f"{file.name}.[0-9]*"):
                part.unlink()
            files.write_atomic(file, json.dumps(origin) + "\n")
        self.read()

    def read(self):
        """The samples of all processes: {(what, question id): responses}."""
        run.merge(self.file, lambda row: (
            row.get("what"), row.get("id"), len(row.get("responses", ()))))
        # Of a question that was asked for more samples later, those count.
        rows = sorted(files.read_jsonl(self.file)[1:], key=lambda row: len(row["responses"]))
        self.rows = {(row["what"], row["id"]): row["responses"] for row in rows}

    def __call__(self, what, questions, n, temperature):
        """[[{"text", "answer", "ended", "tokens", "logprob"}] * n for each question].

        logprob: of all tokens. A question without a prompt, which was too long, has no answer.
        `what` names these samples in the file and beside the progress bar.
        """
        none = [{"text": "", "answer": None, "ended": False, "tokens": [], "logprob": 0.0}] * n
        have = {id_: rows for (kind, id_), rows in self.rows.items()
                if kind == what and len(rows) >= n}
        texts = {q["id"]: q["question"] for q in questions}
        todo = [id_ for id_ in texts if id_ in self.prompts and id_ not in have]
        # The first process's view counts: it may be writing already.
        todo = parallel.deal(parallel.gather(todo)[0])
        todo = {id_: self.prompts[id_] for id_ in todo}
        append = files.Appender(run.own_file(self.file))
        done = respond(self.model, self.tokenizer, todo, n=n, temperature=temperature,
                       max_new_tokens=self.max_new_tokens, slots=self.slots,
                       seed=torch.initial_seed())
        total = n * (len(have) + len(todo))
        for id_, j, text, s in run.Bar(done, total=total, initial=n * len(have), desc=what,
                                       unit="response"):
            answer = self.task.extract_answer(text, texts[id_]) if s.ended else None
            row = have.setdefault(id_, [None] * n)
            row[j] = {"text": text, "answer": answer, "ended": s.ended, "tokens": s.tokens,
                      "logprob": sum(s.logprobs)}
            if None not in row:
                append({"what": what, "id": id_, "responses": row})
        append.file.close()
        if parallel.world() > 1:
            self.read()
            have |= {id_: rows for (kind, id_), rows in self.rows.items() if kind == what}
        return [have.get(q["id"], none)[:n] for q in questions]


def graded(task, truth, questions, samples):
    """[[is it right? of each sample] of each question].

    Args:
        truth: {id: right answer}, by gold or by the vote; to a question without one none is right.
        samples: [[{"answer", ...}] of each question].
    """
    return [[task.equal(s["answer"], truth.get(q["id"])) for s in row]
            for q, row in zip(questions, samples)]


def told(task, response, truth):
    """What eval.jsonl keeps of a response; "right" where `truth`, the gold answer, is known."""
    kept = {key: response[key] for key in ("text", "answer", "ended")}
    return kept if truth is None else {**kept, "right": task.equal(response["answer"], truth)}


def transcript(task, split, questions, gold, said, labels=None):
    """Lines of eval.jsonl, a dict per question: what was said to it, and what of that is right.

    {"id", "split", "question", "gold", "vote", "agreement", "vote_right", "models": {name:
    {"greedy": response, "sampled": [response]}}}; a response is {"text", "answer", "ended",
    "right"}. Without gold, or where nothing was voted on, those keys are absent.

    Args:
        gold: {id: answer}. said: {name: {"greedy" or "sampled": [[response] of each question]}}.
        labels: {id: row of labels.jsonl}; None: the votes are over the teacher's samples in `said`.
    """
    lines, teachers = [], said.get("teacher", {}).get("sampled")
    for k, q in enumerate(questions):
        truth, voted = gold.get(q["id"]), {}
        if labels is not None:
            voted = {key: labels[q["id"]][key] for key in ("vote", "agreement")}
        elif teachers:
            found = vote.majority([r["answer"] for r in teachers[k]])
            voted = {"vote": found.answer, "agreement": found.agreement}
        if truth is not None and voted.get("vote") is not None:
            voted["vote_right"] = task.equal(voted["vote"], truth)
        line = {**q, "split": split, **({} if truth is None else {"gold": truth}), **voted,
                "models": {}}
        for name, by in said.items():
            its = {how: [told(task, r, truth) for r in rows[k]] for how, rows in by.items()
                   if rows and rows[k]}
            if "greedy" in its:
                its["greedy"], = its["greedy"]
            if its:
                line["models"][name] = its
        lines.append(line)
    return lines
