"""Stage 4, evaluation: teacher, base, SFT student and RL student on the same test questions.

    python eval.py                                              the tiny run
    python eval.py --models out/arithmetic-tiny/rl,data/tiny/teacher
    python eval.py --task mmlu_pro --models out/gsm8k-1b/rl     a student on a task not its own

Reads the HF folders of a run, and the gold answers, which nothing was trained on. Writes samples/,
what the models said; eval.jsonl, the same with what is right of it, a line per question;
report.json; and, drawn from these by nanodistill/report.py, report.md, report.html and, with the
[plot] extra, curves.png. The report has

    of each model           greedy accuracy with a Wilson 95% interval; of k samples at temperature
                            1 their mean accuracy (mean@k), that of their majority (maj@k), and the
                            share of questions that any of them gets right (pass@k)
    of each two models      the difference of greedy accuracies with the 95% interval of paired
                            differences, and McNemar's exact p
    of the reward model     AUC against the vote on held-out training questions, and against gold
                            on test questions, beside that of each model's own log-probabilities
    of the vote and of PPO  how it went, by gold too; seconds of each stage
"""

import json
from itertools import chain, combinations
from pathlib import Path

from data import hub, prompts_of, ready, response_ids, task_of
from data.grading import STAGES, Samples, graded, transcript
from nanodistill import files, fit, parallel, process, run, settings, vote, weights
from nanodistill.model import ScalarModel
from nanodistill.report import draw
from nanodistill.reward import score_sequences
from nanodistill.stats import auc, measure, paired, wilson, within
from nanodistill.tokenizer import Tokenizer


# ---- models ----

def folders_of(config, folder):
    """{name: HF folder} of what is compared: what --models names, else the run's own models."""
    if config.models:
        return {name: hub.resolve(name, "models") for name in config.models.split(",")}
    folders = {} if config.teacher_url else {
        "teacher": hub.resolve(config.teacher, "teacher", config.teacher_revision)}
    folders |= {"base": hub.resolve(config.student, "student", config.revision),
                "sft": folder / "sft", "rl": folder / "rl"}
    for name in [name for name, path in folders.items() if not weights.complete(path)]:
        print(f"eval: {folders.pop(name)} holds no whole model: left out")
    return folders


def answers(name, path, jobs, config, task, folder, device, dtype):
    """Load a model and let it answer.

    jobs: {what: (questions, n samples of each, temperature)}.
    Returns {what: [[sample] * n for each question]}; see Samples.
    """
    tokenizer, shape = Tokenizer(path, config.date), weights.load_config(path)
    asked = {q["id"]: q for questions, *_ in jobs.values() for q in questions}
    prompts = prompts_of(task, tokenizer, asked.values(),
                         shape.max_position_embeddings - config.max_new_tokens)
    slots = run.fitted("eval", config, shape, dtype, device, max(map(len, prompts.values())),
                       config.max_new_tokens, batch=fit.SCORED,
                       jobs=config.samples * len(prompts)).slots
    model = weights.load(path, device=device, dtype=dtype)
    file = name if not config.models else f"{Path(name).name}-{files.digest(path)[:8]}"
    samples = Samples(folder / "samples" / f"{file}.jsonl", path, config, task, model, tokenizer,
                      prompts, slots)
    return {what: samples(f"{name}, {what}", *job) for what, job in jobs.items()}


# ---- figures ----

def model_figures(task, gold, questions, greedy, sampled):
    """(the figures of one model, [is its greedy answer right?] for the paired tests).

    greedy, sampled: [[sample] * n for each question], n of greedy is 1.
    """
    count, n, every = len(questions), len(sampled[0]), list(chain.from_iterable(sampled))
    right = list(chain.from_iterable(graded(task, gold, questions, greedy)))
    low, high = wilson(sum(right), count)
    hits = graded(task, gold, questions, sampled)
    # Of t answers that lead together each counts 1 / t; a missing answer never leads.
    leaders = [vote.plurality([s["answer"] for s in row]) for row in sampled]
    majority = [sum(task.equal(answer, gold.get(q["id"])) for answer in tied) / max(len(tied), 1)
                for q, tied in zip(questions, leaders)]
    figures = {
        "greedy": {"accuracy": sum(right) / count, "low": low, "high": high, "n": count},
        f"mean@{n}": sum(map(sum, hits)) / (count * n),
        f"maj@{n}": sum(majority) / count,
        f"pass@{n}": sum(map(any, hits)) / count,
        "length": sum(len(s["tokens"]) for s in every) / len(every),
        "cut_off": sum(not s["ended"] for s in every) / len(every),
        "no_answer": sum(s["ended"] and s["answer"] is None for s in every) / len(every)}
    return figures, right


FILES = {"teacher": "teacher.jsonl", "sft": "student.jsonl"}     # of the stages before


def held_out_responses(folder, held_out, of_rl):
    """{name: [[response] to each held-out question]}; teacher's and SFT student's are on file, the
    RL student's were sampled here."""
    found = {}
    for name, file in FILES.items():
        rows = {row["id"]: row["responses"]
                for row in files.read_jsonl(folder / file, "id", "responses")}
        found[name] = [rows.get(q["id"], []) for q in held_out]
    return {**found, "rl": of_rl}


def scores(model, tokenizer, task, questions, samples, own):
    """Scores of all samples in turn. `own`: their tokens are this tokenizer's."""
    return score_sequences(model, [
        tokenizer.prompt_ids(task.prompt(q["question"])) + response_ids(tokenizer, s, own)
        for q, row in zip(questions, samples) for s in row], fit.SCORED)


def reward_figures(model, tokenizer, task, held_out, votes, responses, questions, gold, sampled):
    """The reward model on {name: [[response] to each question]}: `responses` to the `held_out`
    questions by {id: vote}, `sampled` ones to the test `questions` by {id: gold answer}; and what
    it and the vote tell of the responses to one held-out question, by gold where there is some."""
    figures = {"auc": {}, "auc_gold": {}, "auc_own_logprob": {}, "held_out": {}, "within": {}}
    held_out_gold = task.gold("train")
    for name, rows in responses.items():
        own = name != "teacher"
        if any(rows):
            truth = list(chain.from_iterable(graded(task, votes, held_out, rows)))
            found = scores(model, tokenizer, task, held_out, rows, own)
            figures["held_out"][name] = measure(found, truth)
            figures["auc"][name] = figures["held_out"][name]["auc"]
            ids = [q["id"] for q, row in zip(held_out, rows) for _ in row]
            right = list(chain.from_iterable(graded(task, held_out_gold, held_out, rows)))
            figures["within"][name] = {"reward_model": within(ids, found, right),
                                       "vote": within(ids, truth, right)}
        elif rows:
            print(f"eval: {FILES[name]} has no response to a held-out question: the reward model's "
                  f"figures on the responses of {name} are left out")
        if name in sampled:
            truth = list(chain.from_iterable(graded(task, gold, questions, sampled[name])))
            logprobs = [s["logprob"] for row in sampled[name] for s in row]
            figures["auc_gold"][name] = auc(
                scores(model, tokenizer, task, questions, sampled[name], own), truth)
            figures["auc_own_logprob"][name] = auc(logprobs, truth)
    return figures


def vote_figures(task, labels, gold):
    """How the vote went; and, a diagnostic, how often it is right, where there is gold."""
    right = [task.equal(row["vote"], gold[row["id"]]) for row in labels
             if row["vote"] is not None and row["id"] in gold]
    votes = [vote.Vote(row["vote"], row["agreement"], row["n"]) for row in labels]
    return vote.summary(votes) | ({"accuracy": sum(right) / len(right)} if right else {})


def second_vote(folder):
    """Rows as in labels.jsonl of the vote that the teacher's and the student's answers give."""
    theirs, its = ({row["id"]: [r["answer"] for r in row["responses"]]
                    for row in files.read_jsonl(folder / file, "id", "responses")}
                   for file in FILES.values())
    votes = {id_: vote.together(theirs[id_], its[id_]) for id_ in its if id_ in theirs}
    return [{"id": id_, "vote": v.answer, "agreement": v.agreement, "n": v.n}
            for id_, v in votes.items()]


def ppo_figures(steps):
    """Means over the first five steps and over the last five."""
    keys = [k for k in ("score", "true_accuracy", "kl", "length", "ended") if k in steps[0]]
    return {when: {k: sum(row[k] for row in rows) / len(rows) for k in keys}
            for when, rows in (("start", steps[:5]), ("end", steps[-5:]))}


def main(argv=None):
    configs = settings.parse("eval", STAGES, __doc__, argv)
    config = configs["eval"]
    if config.dry_run:
        return print(ready.dry_run("eval", configs))
    ready.check("eval", configs)
    folder, device, dtype = run.start(configs, "eval")
    metrics, task, n = run.Metrics(folder, "eval"), task_of(config), config.samples

    # ---- 1. models, questions, gold; in a run also the votes and the held-out questions ----
    folders = folders_of(config, folder)
    questions, gold = task.questions("test")[:config.questions or None], task.gold("test")
    labels = {} if config.models else {
        row["id"]: row for row in files.read_jsonl(folder / "labels.jsonl", "id", "vote")}
    votes = {id_: row["vote"] for id_, row in labels.items() if row["vote"] is not None}
    scored = not config.models and weights.complete(folder / "rm")
    # A reward model is judged by the vote that it has learned.
    second = second_vote(folder) if scored and settings.load(folder).get("rm", {}).get(
        "rm_votes") == "both" else []
    if second:
        votes = {row["id"]: row["vote"] for row in second if row["vote"] is not None}
    held_out = [q for q in (task.questions("train") if labels else [])
                if run.held_out(q["id"]) and q["id"] in votes]

    # ---- 2. each model answers the test questions, the RL student the held-out ones too ----
    said = {}                                     # {name: {what: samples}}
    for name, path in folders.items():
        jobs = {"held-out questions": (held_out, n, 1.0)} if (
            scored and held_out and name == "rl") else {}
        if questions:
            jobs |= {"greedy": (questions, 1, 0.0), "sampled": (questions, n, 1.0)}
        if jobs:
            said[name] = answers(name, path, jobs, config, task, folder, device, dtype)
    sampled = {name: samples["sampled"] for name, samples in said.items() if questions}

    # ---- 3. each model, and each two of them ----
    report = {"seed": config.seed, "task": config.task, "models": {}, "pairs": {}}
    right = {}
    for name in sampled:
        report["models"][name], right[name] = model_figures(
            task, gold, questions, said[name]["greedy"], sampled[name])
    for b, a in combinations(right, 2):
        report["pairs"][f"{a}-{b}"] = paired(right[a], right[b])

    # ---- 4. the reward model, if there is one ----
    responses = held_out_responses(
        folder, held_out, said.get("rl", {}).get("held-out questions", []))
    if scored:
        tokenizer = Tokenizer(folder / "rm", config.date)
        model = weights.load(folder / "rm", ScalarModel, device=device, dtype=dtype)
        report["reward_model"] = reward_figures(
            model, tokenizer, task, held_out, votes, responses, questions, gold, sampled)

    # ---- 5. the vote, PPO, the durations ----
    if labels:
        report["votes"] = vote_figures(task, labels.values(), task.gold("train"))
        if second:
            report["votes"]["both"] = vote_figures(task, second, task.gold("train"))
    steps = [row for row in run.read_metrics(folder, "rl").values() if "score" in row]
    if steps:
        report["ppo"] = ppo_figures(steps)
    report["seconds"] = {stage: round(row["seconds"], 1) for stage in ("teacher", "sft", "rm", "rl")
                         for row in run.read_metrics(folder, stage).values() if "seconds" in row}
    report["seconds"]["eval"] = round(metrics.seconds(), 1)

    # ---- 6. the report, and what is drawn from it ----
    if parallel.rank():
        return
    lines = transcript(task, "test", questions, gold, {
        name: {how: samples[how] for how in ("greedy", "sampled")}
        for name, samples in said.items() if questions})
    lines += transcript(task, "train", held_out, task.gold("train"), {
        name: {"sampled": rows} for name, rows in responses.items()}, labels)
    files.write_atomic(folder / "eval.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    files.write_atomic(folder / "report.json", json.dumps(report, indent=1) + "\n")
    print(f"eval: -> {folder}: {', '.join(['report.json', 'eval.jsonl', *draw(report, folder)])}")


if __name__ == "__main__":
    process.guard(main)
