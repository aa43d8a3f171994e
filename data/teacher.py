"""Samples the teacher and votes: n responses per question at several temperatures, each labelled.

    python data/teacher.py                          the tiny teacher, 10 samples per question
    python data/teacher.py --temperatures 0.7,1.0 --min-agreement 0.5
    python data/teacher.py --student 1b --teacher-url http://host:8000/v1 --teacher-model NAME

Reads the task's training questions (never their answers). Writes teacher.jsonl, one line per
question as soon as its samples are complete, so that an interrupted run asks only for what is
missing. Then writes labels.jsonl, one line per question, made anew from teacher.jsonl at each
start. The temperatures are our choice; the paper says only that there are several.

What to look at: how many responses were cut off, and how many ended without an answer. The vote
can use neither. More than a few of the first say that --max-new-tokens is too small; of the second,
that the teacher does not answer in the task's form. Their texts are in teacher.jsonl.

With --teacher-url the teacher is whatever model an OpenAI-compatible server serves (its key in
OPENAI_API_KEY). Each answer is written to disk as it comes, to teacher.part.jsonl until its
question is complete. What a server refuses counts as a response without an answer and is marked
"failed", with the reason. server.py says what else can go wrong.
"""

import gc
import json
import math
import os
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import hub, ready, server, task_of
from nanodistill import files, parallel, process, run, settings, vote, weights
from nanodistill.generate import respond
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
    patience: float = flag(10.0, "minutes after which a server that gives nothing is given up; "
                           "one answer may take as long", above=0, most=10000, result=False)
    teacher_extra: str = flag("", "a JSON object merged into each request to a server; null takes "
                              "a key out: '{\"seed\": null, \"top_p\": 0.9}'")
    reasoning: str = flag("keep", "thoughts that a server gives apart from the text: keep them in "
                          "<think> tags before it, so that the student learns to think, or drop "
                          "them", ("keep", "drop"))
    retry_failed: bool = flag(False, "ask a server once more for what it refused or failed at",
                              result=False)

    def problems(self, given):
        found = [f"--{name.replace('_', '-')} does nothing without --teacher-url"
                 for name in ("concurrency", "patience", "teacher_extra", "reasoning",
                              "retry_failed") if name in given and not self.teacher_url]
        # What is not understood ends the run here, not when the first question is asked.
        for name, read, wants in (
                ("temperatures", read_temperatures,
                 "numbers of at least 0 with commas between them, such as 0.7,1.0"),
                ("teacher_extra", read_extra, "a JSON object, without messages or stream, such as "
                 '{"chat_template_kwargs": {"enable_thinking": false}}')):
            try:
                read(getattr(self, name))
            except (ValueError, RecursionError):
                value = getattr(self, name)[:80]
                found.append(f"--{name.replace('_', '-')} {value}: wants {wants}")
        return found


STAGES = {"teacher": Config}


def read_temperatures(text):
    """ "0.7,1.0" -> [0.7, 1.0]. Raises ValueError."""
    temperatures = [float(t) for t in text.split(",")]
    if not all(0 <= t < math.inf for t in temperatures):
        raise ValueError(text)
    return temperatures


def read_extra(text):
    """--teacher-extra -> dict. Raises ValueError for what is no JSON object, or can't be sent."""
    def no_number(name):
        raise ValueError(name)                                   # NaN, Infinity: not JSON

    extra = json.loads(text or "{}", parse_constant=no_number)
    if not isinstance(extra, dict) or "messages" in extra or extra.get("stream"):
        raise ValueError(text)
    json.dumps(extra, allow_nan=False)                           # 1e999
    return extra


# ---- sampling ----

def local(model, tokenizer, task, max_new_tokens, slots):
    """A sampler for `collect`: the model in this process. What exceeds its positions fails."""
    def sampler(questions, temperatures, seed):
        prompts = {q["id"]: tokenizer.prompt_ids(task.prompt(q["question"])) for q in questions}
        positions = model.config.max_position_embeddings
        for id_, ids in prompts.items():
            if len(ids) + max_new_tokens > positions:
                why = (f"its prompt of {len(ids)} tokens and --max-new-tokens {max_new_tokens} "
                       f"exceed the model's {positions} positions")
                for j in range(len(temperatures)):
                    yield id_, j, {"text": "", "ended": False, "failed": why}, []
        fits = {id_: ids for id_, ids in prompts.items()
                if len(ids) + max_new_tokens <= positions}
        for id_, j, text, sample in respond(
                model, tokenizer, fits, n=len(temperatures), temperature=temperatures,
                max_new_tokens=max_new_tokens, slots=slots, seed=seed):
            yield id_, j, {"text": text, "ended": sample.ended}, sample.tokens
    return sampler


ROW = {"id": str, "question": str, "responses": list}
RESPONSE = {"text": str, "temperature": (int, float), "ended": bool, "answer": (str, type(None))}


def read_rows(path, keep_tokens=False):
    """{question id: row} of what `collect` wrote; of rows with the same id the first counts.

    Raises SystemExit that names file and line of a row that `collect` did not write.
    """
    shape, rows = RESPONSE | ({"tokens": list} if keep_tokens else {}), {}
    for i, row in enumerate(files.read_jsonl(path)):
        server.check_row(path, i, row, ROW)
        for response in row["responses"]:
            server.check_row(path, i, response, shape, " a response,")
        rows.setdefault(row["id"], row)
    return rows


def collect(path, questions, task, sampler, temperatures, description, keep_tokens=False,
            alone=False):
    """Sample each question once at each of `temperatures`. Append one line per question to `path`,
    as soon as its samples are complete.

    Args:
        sampler: `sampler(questions, temperatures, seed)` yields (question id, index into
            temperatures, response, tokens), or None where nothing has come for a moment. A
            response is {"text", "ended"}, with "failed": why, if there is no sample. `tokens` is a
            list of ids, or anything as long as that. A sample follows from seed, id and index
            alone.
        keep_tokens: each response has "tokens" too, the ids that were sampled.
        alone: of several processes the first asks all questions; else each asks some.
    Questions that the file already has are not asked again. Prints the `shares` of the whole.
    Returns the rows {"id", "question", "responses"} in the order of `questions`. Ctrl-C ends the
    program; what is complete is on disk.
    """
    run.merge(path, itemgetter("id"))
    rows = read_rows(path, keep_tokens)
    if any([r["temperature"] for r in row["responses"]] != temperatures for row in rows.values()):
        sys.exit(f"{path} was sampled with other --samples or --temperatures. Give the same ones, "
                 "another --out, or delete it.")
    asked = {q["id"]: q["question"] for q in questions}
    other = [id_ for id_, row in rows.items() if row["question"] != asked.get(id_, row["question"])]
    if other:
        sys.exit(f"{path} holds another text of question {other[0]} than is asked now "
                 f"({len(other)} differ). Give another --out, or delete it and what was made from "
                 "it.")
    todo, idle = [q for q in questions if q["id"] not in rows], alone and parallel.rank() > 0
    # The first process's view counts: it may be writing already.
    todo = parallel.gather(todo)[0]
    there = len(questions) - len(todo)
    todo = {q["id"]: q for q in ([] if idle else todo if alone else parallel.deal(todo))}
    append, waiting, spent = files.Appender(run.own_file(path)), {}, 0
    begun = time.monotonic()
    bar = run.Bar(total=there + len(todo), initial=there, desc=description, unit="q")
    samples = (x for x in ()) if idle else sampler(list(todo.values()), temperatures,
                                                   torch.initial_seed())
    with process.interruptible() as stop, bar, closing(samples):
        for sample in samples:
            if stop():
                break
            if sample is None:
                continue
            id_, j, response, tokens = sample
            text, ended = response["text"], response["ended"]
            answer = task.extract_answer(text, todo[id_]["question"]) if ended else None
            kept = {"text": text, "temperature": temperatures[j], "ended": ended, "answer": answer}
            if "failed" in response:
                kept["failed"] = response["failed"]
            if keep_tokens:
                kept["tokens"] = list(tokens)
            waiting.setdefault(id_, {})[j] = kept
            spent += len(tokens)
            if len(waiting[id_]) == len(temperatures):
                responses = waiting.pop(id_)
                rows[id_] = {**todo[id_], "responses": [responses[k] for k in sorted(responses)]}
                append(rows[id_])
                bar.update()
                seconds = time.monotonic() - begun
                if seconds:
                    bar.set_postfix_str(f"{spent / seconds:.0f} tokens/s", refresh=False)
        stopped = parallel.any_(stop())
    if parallel.world() > 1:
        run.merge(path, itemgetter("id"))
        rows = read_rows(path, keep_tokens)
    if stopped:
        # Spares a second at exit: the last garbage collection skips all that torch made.
        gc.freeze()
        sys.exit(f"stopped: {len(rows)} questions are in {path}; the same command goes on")
    rows = [rows[id_] for id_ in asked]
    show(rows, path, description)
    return rows


def shares(rows):
    """Of the responses in rows of `collect`: {"cut_off", "no_answer", "failed"}, the fraction that
    was cut off, the fraction that ended without an answer, and the fraction that failed."""
    responses = [r for row in rows for r in row["responses"]]
    failed = sum("failed" in r for r in responses)
    counts = {"cut_off": sum(not r["ended"] for r in responses) - failed,
              "no_answer": sum(r["ended"] and r["answer"] is None for r in responses),
              "failed": failed}
    return {name: count / max(len(responses), 1) for name, count in counts.items()}


def show(rows, path, description):
    """Print the `shares`, what to do where one is large, and the questions of what failed."""
    share = shares(rows)
    print(f"{description}: {share['cut_off']:.1%} of the responses were cut off, "
          f"{share['no_answer']:.1%} ended without an answer")
    advice = []
    if share["cut_off"] > 0.1:
        advice.append("more --max-new-tokens would let more of them end")
    if share["no_answer"] > 0.1:
        advice.append(f"look at texts in {path}: an answer is found only in the form that the "
                      "task asks for")
    if advice:
        print(f"{description}: {'; '.join(advice)}")
    failed = {row["id"]: r["failed"] for row in rows for r in row["responses"] if "failed" in r}
    if failed:
        named = "; ".join(f"{id_} ({why})" for id_, why in list(failed.items())[:3])
        count = "1 question" if len(failed) == 1 else f"{len(failed)} questions"
        print(f"{description}: {share['failed']:.1%} of the responses, to {count}, were not to be "
              f"had: {named}{'; ...' if len(failed) > 3 else ''}")


def reopen(path, journal):
    """Move questions with a failed response from `path` back to the journal, less what failed."""
    rows = read_rows(path)
    failed = [id_ for id_, row in rows.items() if any("failed" in r for r in row["responses"])]
    if failed:
        append = files.Appender(journal)
        for row in map(rows.pop, failed):
            for j, r in enumerate(row["responses"]):
                if "failed" not in r:
                    append({"id": row["id"], "j": j, "temperature": r["temperature"],
                            "text": r["text"], "ended": r["ended"]})
        append.file.close()
        rest = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()]
        files.write_atomic(path, "".join(rest))


# ---- the vote ----

def label(rows, folder, min_agreement):
    """Vote over the answers in each row, write labels.jsonl and return the votes.

    Raises SystemExit, and leaves no labels.jsonl, if the vote drops every question.
    """
    votes, lines = [], []
    for row in rows:
        answers = [r["answer"] for r in row["responses"]]
        votes.append(vote.majority(answers, min_agreement))
        lines.append({"id": row["id"], "vote": votes[-1].answer, "agreement": votes[-1].agreement,
                      "n": votes[-1].n, "labels": vote.labels(answers, votes[-1])})
    if all(v.answer is None for v in votes):
        (folder / "labels.jsonl").unlink(missing_ok=True)        # older ones, of another vote
        without = sum(not any(r["answer"] for r in row["responses"]) for row in rows)
        sys.exit(f"teacher: the vote dropped all {len(rows)} questions, so there is nothing to "
                 f"learn: {without} have no response with an answer (see the shares above and "
                 f"{folder / 'teacher.jsonl'}),\nthe others a tie, or less agreement than "
                 f"--min-agreement {min_agreement}. More --samples or less --min-agreement helps "
                 "against those.")
    if parallel.rank() == 0:
        files.write_atomic(folder / "labels.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    return votes


def main(argv=None):
    configs = settings.parse("teacher", STAGES, __doc__, argv)
    config = configs["teacher"]
    if config.dry_run:
        return print(ready.dry_run("teacher", configs))
    ready.check("teacher", configs)
    # It holds for this start alone: settings.json does not hand it on to the next.
    retry_failed, config.retry_failed = config.retry_failed, False
    folder, device, dtype = run.start(configs, "teacher")
    task = task_of(config)
    questions = task.questions("train")[:config.questions or None]
    metrics = run.Metrics(folder, "teacher")
    temperatures = read_temperatures(config.temperatures)
    temperatures = [temperatures[j % len(temperatures)] for j in range(config.samples)]
    path, journal = folder / "teacher.jsonl", folder / "teacher.part.jsonl"
    if config.teacher_url:
        if retry_failed and parallel.rank() == 0:
            reopen(path, journal)

        def sampler(asked, temperatures, seed):
            prompts = {q["id"]: task.prompt(q["question"]) for q in asked}
            return server.generate(
                config.teacher_url, config.teacher_model, os.environ.get("OPENAI_API_KEY", ""),
                prompts, temperatures, config.max_new_tokens, journal, config.concurrency,
                patience=60 * config.patience, seed=seed, extra=read_extra(config.teacher_extra),
                reasoning=config.reasoning, retry_failed=retry_failed,
                answered=len(asked) < len(questions))
    else:
        source = hub.resolve(config.teacher, "teacher", config.teacher_revision)
        run.made_from(folder, "teacher.jsonl", source.resolve())
        tokenizer, shape = Tokenizer(source, config.date), weights.load_config(source)
        lengths = [len(tokenizer.prompt_ids(task.prompt(q["question"]))) for q in questions]
        most = shape.max_position_embeddings - config.max_new_tokens
        longest = max((n for n in lengths if n <= most), default=None)
        if longest is None:
            sys.exit(f"teacher: --max-new-tokens {config.max_new_tokens} and the shortest prompt, "
                     f"of {min(lengths)} tokens, exceed the teacher's "
                     f"{shape.max_position_embeddings} positions: fewer of them.")
        slots = run.fitted("teacher", config, shape, dtype, device, longest,
                           config.max_new_tokens, jobs=len(questions) * config.samples).slots
        sampler = local(weights.load(source, device=device, dtype=dtype), tokenizer, task,
                        config.max_new_tokens, slots)
    # The vote is over all questions. Until they are sampled, no stage may use an earlier vote.
    (folder / "labels.jsonl").unlink(missing_ok=True)
    rows = collect(path, questions, task, sampler, temperatures, "teacher",
                   alone=bool(config.teacher_url))
    share = shares(rows)
    if config.teacher_url and share["failed"]:
        print("teacher: --retry-failed asks for those once more")
    # Samples of questions that this start did not ask for stay.
    if parallel.rank() == 0 and {row["id"] for row in files.read_jsonl(journal)} <= {
            q["id"] for q in questions}:
        journal.unlink(missing_ok=True)

    votes = label(rows, folder, config.min_agreement)
    measured = vote.summary(votes)
    metrics(len(questions), **measured, **share, seconds=metrics.seconds())
    print(f"teacher: {len(questions)} questions, {config.samples} samples each; vote kept "
          f"{measured['kept']:.1%} of them, mean agreement {measured['agreement']:.1%} "
          f"-> {folder / 'labels.jsonl'}")


if __name__ == "__main__":
    process.guard(main)
