"""Algorithms and rewards beside each other: same SFT student, same responses, same updates.

    python bench/compare.py algorithms --small               every arm, a minute or so each
    python bench/compare.py algorithms --seeds 21,22,23      full size; 3 to 12 minutes an arm
    python bench/compare.py budget                           fewer questions asked of the teacher
    python bench/compare.py noise                            wrong votes
    python bench/compare.py data                             what the reward model learns from
    python bench/compare.py kl --picture docs/kl.png         over-optimisation, beside best-of-n

An arm is a run folder, OUT/seed-N/ARM, as the stages make it: the default run is the first, and the
others begin from copies of what they share with it. What is finished is not done again, so the same
command goes on after Ctrl-C, and seeds may run side by side, each by a command of its own. In the
end OUT/algorithms.json (budget.json, ...) and tables are made from all arms that lie there,
`--picture` draws them.

Gold answers and random numbers as rewards come in here alone, as functions given to train_rl.py.
docs/results.md has what came of it.
"""

import argparse
import functools
import json
import math
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import Help
from scipy.stats import t as student_t

import data
import eval as evaluation
import train_rl
import train_sft
from data.arithmetic import Arithmetic
from data.teacher import collect, local
from nanodistill import files, process, run, weights
from nanodistill.model import ScalarModel
from nanodistill.reward import score_sequences
from nanodistill.tokenizer import Tokenizer
from nanodistill.vote import Vote, labels, plurality, together


SMALL = ["--teacher.questions", "2000", "--steps", "20", "--prompts", "256",
         "--eval.questions", "500"]
TINY = Path(data.__file__).parent / "tiny"


@dataclass
class Arm:
    what: str                               # in the table
    train: callable                         # (its folder, its base's folder, args) makes `model`
    base: str = "ppo-model"                 # the arm that it begins from; "": from nothing
    model: str = "rl"                       # what is evaluated
    stages: tuple = ()                      # those of its base that it needs, if it copies none
    samples: str = ""                       # fresh ones that it learns from, beside the folders


# ---- a folder that begins from another ----

def bring(base, folder, *names):
    """Copy what is not there yet, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        source, target, part = base / name, folder / name, folder / f"{name}.part"
        if source.exists() and not target.exists():
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.rmtree(part, ignore_errors=True)
                shutil.copytree(source, part)
                part.rename(target)
            else:
                files.write_atomic(target, source.read_bytes())


def write_rows(path, rows):
    files.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def begin(base, folder, *names):
    """Copy `names`, and with them what the base's stages said of themselves and evaluated."""
    if not (folder / "metrics.jsonl").exists():
        bring(base, folder, *names, "settings.json",
              *(f"samples/{model}.jsonl" for model in ("teacher", "base", "sft")))
        made = {"teacher": "labels.jsonl", "sft": "sft", "rm": "rm"}
        write_rows(folder / "metrics.jsonl",
                   [row for row in files.read_jsonl(base / "metrics.jsonl")
                    if made.get(row["stage"]) in names])


VOTED = "teacher.jsonl", "labels.jsonl", "sft"
SCORED = *VOTED, "student.jsonl", "rm"


# ---- arms of train_rl.py ----

def grouped(args):
    """As many responses a step as PPO has, 4 to a question."""
    return ["--samples", "4", "--prompts", "64" if args.small else "128"]


def common(args, folder):
    return ["--out", str(folder), "--threads", str(args.threads)]


def rl(algorithm, *flags, brings=SCORED, reward=None, change=None):
    """Arm.train of RL. reward: (folder, base) -> a function as train_rl.main takes it. change:
    (folder, base) -> None, what else to do to the folder before, at each start."""
    def train(folder, base, args):
        begin(base, folder, *brings)
        if change:
            change(folder, base)
        train_rl.main([*common(args, folder), "--algorithm", algorithm,
                       *(grouped(args) if algorithm != "ppo" else []), *flags],
                      reward and reward(folder, base))
    return train


def whole(*flags):
    """Arm.train of a run of its own, all stages."""
    def train(folder, base, args):
        train_rl.main([*common(args, folder), "--seed", str(args.seed),
                       *(SMALL if args.small else []),
                       *(grouped(args) if "rloo" in flags else []), *flags])
    return train


def task_of(base):
    config = argparse.Namespace(**json.loads((base / "settings.json").read_text())["sft"])
    return data.task_of(config), config


def gold(folder, base):
    task, _ = task_of(base)
    right, asked = task.gold("train"), {q["id"]: q["question"] for q in task.questions("train")}
    return lambda ids, texts: [
        float(task.equal(task.extract_answer(text, asked[id_]), right[id_]))
        for id_, text in zip(ids, texts)]


def at_random(folder, base):
    rng = random.Random(0)
    return lambda ids, texts: [float(rng.random() < 0.5) for _ in ids]


def nothing(folder, base):
    return lambda ids, texts: [0.0] * len(ids)


def learned(folder, base, vote=0.0):
    """The base's reward model as a function: it needs no vote on a question. Where there is one,
    it has this share of the score."""
    task, config = task_of(base)
    tokenizer, model = Tokenizer(base / "rm", config.date), weights.load(base / "rm", ScalarModel)
    asked = {q["id"]: q["question"] for q in task.questions("train")}
    voted = {row["id"]: row["vote"] for row in files.read_jsonl(folder / "labels.jsonl")
             if row["vote"] is not None and vote}

    def reward(ids, texts):
        found = score_sequences(model, [
            tokenizer.prompt_ids(task.prompt(asked[id_])) + tokenizer.encode(text)
            + tokenizer.eos_ids[:1] for id_, text in zip(ids, texts)], 64)
        # One that was cut off has no text: it earns nothing.
        found = [bool(text) / (1 + math.exp(-score)) for text, score in zip(texts, found)]
        return [(1 - vote) * score + vote * task.equal(task.extract_answer(text), voted[id_])
                if id_ in voted else score for id_, text, score in zip(ids, texts, found)]
    return reward


class Twice(Arithmetic):
    """With 6,000 training questions more, after the same ones."""
    def __init__(self, *settings):
        super().__init__(*settings, train=12000)


def more_questions(folder, base):
    """A line without a vote for each training question that the teacher was not asked."""
    rows = files.read_jsonl(base / "labels.jsonl")
    task, known = task_of(base)[0], {row["id"] for row in rows}
    if {q["id"] for q in task.questions("train")} <= known:
        data.TASKS["arithmetic"] = Twice
        task = task_of(base)[0]
    rows += [{"id": q["id"], "vote": None, "agreement": 0.0, "n": 0, "labels": []}
             for q in task.questions("train") if q["id"] not in known]
    write_rows(folder / "labels.jsonl", rows)


def wrong_votes(share):
    """-> change: for a `share` of the votes another answer takes the vote's place in the teacher's
    responses, and the vote's that one's: votes, labels, and votes with the student follow. (Those
    of which the teacher never says another stay.)"""
    def change(folder, base):
        rng = random.Random(f"wrong votes {share}")
        asked, rows = (files.read_jsonl(base / name) for name in ("teacher.jsonl", "labels.jsonl"))
        said, others = {row["id"]: row for row in asked}, {}
        for row in rows:
            others[row["id"]] = [r["answer"] for r in said[row["id"]]["responses"]
                                 if r["answer"] not in (None, row["vote"]) and row["vote"]]
        able, voted = [row for row in rows if others[row["id"]]], sum(bool(r["vote"]) for r in rows)
        for row in rng.sample(able, min(round(share * voted), len(able))):
            responses, wrong = said[row["id"]]["responses"], rng.choice(others[row["id"]])
            swapped = {row["vote"]: wrong, wrong: row["vote"]}
            by_answer = {a: [r for r in responses if r["answer"] == a] for a in swapped}
            responses = [{**rng.choice(by_answer[swapped[r["answer"]]]),
                          "temperature": r["temperature"]} if r["answer"] in swapped else r
                         for r in responses]
            said[row["id"]]["responses"], row["vote"] = responses, wrong
            row["labels"] = [r["answer"] == wrong for r in responses]
        write_rows(folder / "teacher.jsonl", asked)
        write_rows(folder / "labels.jsonl", rows)
    return change


def vote_of_both(folder, base):
    """change: the vote of teacher and student, as --rm-votes both takes it, is labels.jsonl's."""
    said = {row["id"]: [r["answer"] for r in row["responses"]]
            for row in files.read_jsonl(base / "teacher.jsonl")}
    votes = {id_: Vote(None, 0.0, 0) for id_ in said}             # the student may not be asked all
    votes |= {row["id"]: together(said[row["id"]], [r["answer"] for r in row["responses"]])
              for row in files.read_jsonl(base / "student.jsonl")}
    write_rows(folder / "labels.jsonl", [
        {"id": id_, "vote": vote.answer, "agreement": vote.agreement, "n": vote.n,
         "labels": labels(said[id_], vote)} for id_, vote in votes.items()])


# ---- arms of train_sft.py: what is done with as many responses without RL ----

def fine_tuned(folder, student, args, config):
    """SFT of the `student`, an HF folder, on the folder's rows that are labelled good."""
    most = ["--max-new-tokens", str(config.max_new_tokens)]
    train_sft.main([*common(args, folder), *most, "--student", str(student), "--teacher", "tiny",
                    "--task", "arithmetic", "--seed", str(config.seed), "--date", config.date,
                    "--learning-rate", args.rate, "--epochs", "3"])
    evaluation.main([*common(args, folder), *most, "--models", str(folder / "sft"),
                     *(["--questions", SMALL[-1]] if args.small else [])])


def sampled(base, args, name, model):
    """Fresh rows of `model`, as many responses as RL learns from, shared by the arms of a seed."""
    task, config = task_of(base)
    rows = {row["id"]: row for row in files.read_jsonl(base / "labels.jsonl") if row["vote"]}
    questions = [q for q in task.questions("train") if q["id"] in rows]
    n = round((20 * 256 if args.small else 60 * 512) / len(questions))
    path = base.parent / f"{name}.jsonl"
    there = len(files.read_jsonl(path))
    torch.manual_seed(config.seed + 2**20)               # other samples than the teacher stage's
    sampler = local(weights.load(model), Tokenizer(model, config.date), task,
                    config.max_new_tokens, 256)
    begun = time.monotonic()
    rows = collect(path, questions, task, sampler, [1.0] * n, name)
    # Only the first arm has to wait for them.
    if there < len(questions):
        run.Metrics(base.parent, name)(0, seconds=time.monotonic() - begun)
    return rows


def best_of(choose):
    """Arm.train of SFT on the one response per question that `choose` names: (rows, base) -> index
    or None for each row."""
    def train(folder, base, args):
        rows, (_, config) = sampled(base, args, "sft-samples", base / "sft"), task_of(base)
        if not (folder / "labels.jsonl").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_rows(folder / "teacher.jsonl", rows)
            write_rows(folder / "labels.jsonl", [
                {"id": row["id"], "vote": None, "agreement": 0.0, "n": len(row["responses"]),
                 "labels": [i == best for i in range(len(row["responses"]))]}
                for row, best in zip(rows, choose(rows, base))])
        fine_tuned(folder, base / "sft", args, config)
    return train


def first_by_vote(rows, base):
    votes = {row["id"]: row["vote"] for row in files.read_jsonl(base / "labels.jsonl")}
    return [next((i for i, r in enumerate(row["responses"]) if r["answer"] == votes[row["id"]]),
                 None) for row in rows]


def best_by_model(rows, base):
    reward = learned(base, base)
    flat = reward([row["id"] for row in rows for _ in row["responses"]],
                  [r["text"] if r["ended"] else "" for row in rows for r in row["responses"]])
    n = len(rows[0]["responses"])
    return [int(np.argmax(flat[i:i + n])) for i in range(0, len(flat), n)]


def the_first(rows, base):
    return [0 for _ in rows]


def fresh_teacher(folder, base, args):
    """SFT on fresh samples of the teacher that agree with its vote."""
    rows, (_, config) = sampled(base, args, "teacher-samples", TINY / "teacher"), task_of(base)
    votes = {row["id"]: row for row in files.read_jsonl(base / "labels.jsonl")}
    if not (folder / "labels.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "teacher.jsonl", rows)
        write_rows(folder / "labels.jsonl", [
            {**votes[row["id"]], "n": len(row["responses"]),
             "labels": [r["answer"] == votes[row["id"]]["vote"] for r in row["responses"]]}
            for row in rows])
    fine_tuned(folder, base / "sft", args, config)


def more(student=None):
    """Arm.train of SFT on what the base's SFT had, from the base's student or from another."""
    def train(folder, base, args):
        bring(base, folder, "teacher.jsonl", "labels.jsonl")
        fine_tuned(folder, student or base / "sft", args, task_of(base)[1])
    return train


def chances(n, of):
    """Probabilities (of,) that the i-th of `of` samples, from the worst, is the best of a random n
    of them."""
    return np.array([math.comb(i, n - 1) / math.comb(of, n) for i in range(of)])


def best_of_n(folder, base, args):
    """Score and truth of the best of n samples of the SFT student, n = 1 to 64, into
    best-of-n.json: over all choices of n among 64 samples of each question."""
    task, config = task_of(base)
    rows = {row["id"] for row in files.read_jsonl(base / "labels.jsonl") if row["vote"]}
    questions = [q for q in task.questions("train") if q["id"] in rows
                 and not run.held_out(q["id"])][:100 if args.small else 500]
    torch.manual_seed(config.seed + 2**20)
    folder.mkdir(parents=True, exist_ok=True)
    sampler = local(weights.load(base / "sft"), Tokenizer(base / "sft", config.date), task,
                    config.max_new_tokens, 256)
    rows = collect(folder / "samples.jsonl", questions, task, sampler, [1.0] * 64, "best-of-n")
    ids = [row["id"] for row in rows for _ in range(64)]
    texts = [r["text"] if r["ended"] else "" for row in rows for r in row["responses"]]
    scores = np.array(learned(folder, base)(ids, texts)).reshape(-1, 64)
    right = np.array(gold(folder, base)(ids, texts)).reshape(-1, 64)
    order, curve = np.argsort(scores, axis=1, kind="stable"), []
    for n in (1, 2, 4, 8, 16, 32, 64):
        curve.append({"n": n, "kl": math.log(n) - (n - 1) / n, **{
            name: float((np.take_along_axis(values, order, 1) @ chances(n, 64)).mean())
            for name, values in (("score", scores), ("true_accuracy", right))}})
    files.write_atomic(folder / "report.json", json.dumps(curve, indent=1))


# ---- the arms ----

BEFORE = "teacher", "sft"
VOTE, FUNCTION = ["--reward", "vote"], ["--value-from", "policy"]
DISTILL = [*FUNCTION, "--gamma", "0", "--kl-coef", "1", "--no-eos-penalty", "0", "--reference",
           "teacher"]
TEACHERS, BOTH = ["--rm.rm-votes", "teacher"], ["--rm.rm-votes", "both"]
LABELLED = *VOTED, "student.jsonl"
FIRST = Arm("PPO, reward model", whole(*TEACHERS), "")
BOTHS = Arm("PPO, reward model of both votes (the default)", rl("ppo", *BOTH, brings=LABELLED))
RLOO = Arm("RLOO, reward model", rl("rloo"))
RLOO_BOTHS = Arm("RLOO, reward model of both votes", rl(
    "rloo", brings=(*LABELLED, "rm")), "ppo-both")
BY_VOTE = Arm("RLOO, vote", rl("rloo", *VOTE, brings=VOTED))
ARMS = {
    "algorithms": {
        "ppo-model": FIRST, "ppo-both": BOTHS, "rloo-model": RLOO, "rloo-both": RLOO_BOTHS,
        "grpo-model": Arm("GRPO, reward model", rl("grpo")),
        # Scores over their deviation are some five times larger: so is the KL that holds them.
        "grpo-kl": Arm("GRPO, reward model, KL coefficient 0.25", rl("grpo", "--kl-coef", "0.25")),
        "ppo-vote": Arm("PPO, vote", rl("ppo", *VOTE, *FUNCTION, brings=VOTED)),
        "rloo-vote": BY_VOTE,
        "grpo-vote": Arm("GRPO, vote", rl("grpo", *VOTE, brings=VOTED)),
        "rloo-vote-both": Arm("RLOO, vote of both", rl(
            "rloo", *VOTE, brings=VOTED, change=vote_of_both)),
        "rloo-either": Arm("RLOO, vote; reward model where there is none", rl(
            "rloo", reward=functools.partial(learned, vote=1.0))),
        "rloo-mean": Arm("RLOO, mean of vote and reward model", rl(
            "rloo", reward=functools.partial(learned, vote=0.5))),
        "rloo-self": Arm("RLOO, its own vote", rl("rloo", "--reward", "self", brings=VOTED)),
        "rloo-gold": Arm("RLOO, gold", rl("rloo", brings=VOTED, reward=gold)),
        "rloo-random": Arm("RLOO, random", rl("rloo", brings=VOTED, reward=at_random)),
        "kdrl": Arm("PPO, reward model, near to the teacher",
                    rl("ppo", "--reference", "teacher")),
        "distill": Arm("on-policy distillation", rl(
            "ppo", *DISTILL, brings=VOTED, reward=nothing)),
        "best-vote": Arm("SFT, best of n by vote", best_of(first_by_vote), model="sft",
                         stages=BEFORE, samples="sft-samples"),
        "best-model": Arm("SFT, best of n by reward model", best_of(best_by_model), model="sft",
                          stages=(*BEFORE, "rm"), samples="sft-samples"),
        "best-random": Arm("SFT, one of n at random", best_of(the_first), model="sft",
                           stages=BEFORE, samples="sft-samples"),
        "sft-more": Arm("SFT, more of the same", more(), model="sft",
                        stages=BEFORE),
        "sft-fresh": Arm("SFT, fresh teacher samples", fresh_teacher, model="sft",
                         stages=BEFORE, samples="teacher-samples"),
        "teacher-sft": Arm("the teacher, on its own vote", more(TINY / "teacher"), model="sft",
                           stages=("teacher",))},
    "budget": {
        f"{n}-{kind}": arm for n, epochs in ((250, 12), (500, 12), (1000, 9), (2000, 6), (6000, 3))
        for kind, arm in {
            "model": Arm(f"{n} questions asked, reward model", whole(
                *TEACHERS, "--teacher.questions", str(n), "--sft.epochs", str(epochs),
                "--algorithm", "rloo"), ""),
            "vote": Arm(f"{n} questions asked, vote", BY_VOTE.train, f"{n}-model"),
            "all": Arm(f"{n} questions asked, reward model on all", rl(
                "rloo", change=more_questions, reward=learned), f"{n}-model")}.items()},
    "noise": {
        "ppo-model": FIRST, "rloo-model": RLOO, "ppo-both": BOTHS, "rloo-both": RLOO_BOTHS,
        "rloo-vote": BY_VOTE,
        **{f"noise-{share}-{kind}": arm for share in (10, 20, 40) for kind, arm in {
            **{name: Arm(f"{share}% of the votes wrong, RLOO, reward model{of}", rl(
                "rloo", *flags, brings=LABELLED, change=wrong_votes(share / 100)))
               for name, of, flags in (("model", "", TEACHERS), ("both", " of both votes", BOTH))},
            "vote": Arm(f"{share}% of the votes wrong, RLOO, vote", rl(
                "rloo", *VOTE, brings=VOTED, change=wrong_votes(share / 100)))}.items()}},
    "data": {
        "ppo-model": FIRST, "rloo-model": RLOO, "ppo-both": BOTHS, "rloo-both": RLOO_BOTHS,
        **{f"rm-{name}": Arm(f"RLOO, reward model: {what}", rl(
            "rloo", *TEACHERS, *flags, brings=LABELLED[:4 - (name == "samples")]))
           for name, what, flags in (
               ("teacher", "teacher's responses alone", ["--rm.rm-data", "teacher"]),
               ("student", "student's responses alone", ["--rm.rm-data", "student"]),
               # Its scores have no zero, which a probability needs.
               ("bt", "Bradley-Terry", ["--rm.rm-loss", "bt", "--score", "logit",
                                        "--whiten-scores"]),
               ("last", "the last token alone", ["--rm.token-loss", "0"]),
               ("epochs", "two passes", ["--rm.epochs", "2"]),
               ("samples", "12 responses of the student a question", ["--rm.samples", "12"]))}},
    "kl": {
        "ppo-model": FIRST,
        **{f"kl-{kl}": Arm(f"PPO, reward model, KL coefficient {kl}", rl(
            "ppo", "--kl-coef", kl)) for kl in ("0.2", "0.01", "0")},
        "kl-0-fast": Arm("PPO, reward model, KL coefficient 0, 2.5 times the rate", rl(
            "ppo", "--kl-coef", "0", "--learning-rate", "5e-4")),
        "best-of-n": Arm("best of n", best_of_n, model="")},
}


# ---- figures ----

def judged(path, gold):
    """{"greedy", "mean", "pass": {question id: 0 to 1}} of a file of eval.py's samples."""
    found = {"greedy": {}, "mean": {}, "pass": {}, "answers": {}}
    for row in files.read_jsonl(path)[1:]:
        id_, answers = row["id"], [r["answer"] for r in row["responses"]]
        right = [answer is not None and answer == gold.get(id_) for answer in answers]
        if row["what"].endswith("greedy"):
            found["greedy"][id_] = float(right[0])
        elif row["what"].endswith("sampled"):
            found["mean"][id_], found["pass"][id_] = float(np.mean(right)), float(any(right))
            found["answers"][id_] = answers
    return found


def interval(differences):
    """(mean, half of its 95% interval) of differences on questions, an array per seed: the wider of
    that over all questions and Student's over the seeds' means."""
    means = [d.mean() for d in differences]
    half = 1.96 * math.sqrt(sum(d.var() / len(d) for d in differences)) / len(means)
    if len(means) > 1:
        between = np.std(means, ddof=1) / math.sqrt(len(means))
        half = max(half, student_t.ppf(0.975, len(means) - 1) * between)
    return float(np.mean(means)), float(half)


def group_of(answers, right):
    """How the teacher's own samples do on a question: "right", "wrong" or "tied" majority; "never":
    none of them is right."""
    if right not in answers:
        return "never"
    leaders = plurality(answers)
    return "tied" if len(leaders) > 1 else "right" if leaders == [right] else "wrong"


def seconds_of(folder, stages):
    return sum(row["seconds"] for stage in stages
               for row in run.read_metrics(folder, stage).values() if "seconds" in row)


def samples_of(arm, folder):
    """The file of eval.py's samples of what an arm made."""
    path, = (folder / "samples").glob({"rl": "rl.jsonl", "sft": "sft-*.jsonl"}[arm.model])
    return path


def figures(arm, seeds):
    """Of an arm in the `seeds` where it is finished: {seed: (its folder, its base's folder)}."""
    by_seed, gains, groups = {}, {"greedy": [], "mean": [], "pass": []}, {}
    for seed, (folder, base) in seeds.items():
        gold = task_of(base)[0].gold("test")
        ours, sft, teacher = (judged(p, gold) for p in (
            samples_of(arm, folder), base / "samples" / "sft.jsonl",
            base / "samples" / "teacher.jsonl"))
        for key in gains:
            gains[key].append(np.array([ours[key][id_] - sft[key][id_] for id_ in ours[key]]))
        for id_, answers in teacher["answers"].items():
            groups.setdefault(group_of(answers, gold[id_]), []).append(
                (teacher["mean"][id_], sft["greedy"][id_], ours["greedy"][id_]))
        steps = [row for row in run.read_metrics(folder, "rl").values() if "score" in row]
        by_seed[seed] = {
            "greedy": float(np.mean([*ours["greedy"].values()])),
            "sft": float(np.mean([*sft["greedy"].values()])),
            "mean": float(np.mean([*ours["mean"].values()])),
            "pass": float(np.mean([*ours["pass"].values()])),
            "gain": {key: interval(gains[key][-1:]) for key in gains},
            "seconds": seconds_of(base, arm.stages) + seconds_of(base.parent, [arm.samples])
            + seconds_of(folder, ("teacher", "sft", "rm", "rl")),
            **({key: float(np.mean([row[key] for row in steps[-5:]])) for key in ("kl", "score")}
               if steps and arm.model == "rl" else {})}
    return {"what": arm.what, "seeds": by_seed,
            "gain": {key: interval(rows) for key, rows in gains.items()},
            "groups": {name: {"questions": len(rows), **dict(zip(
                ("teacher", "sft", "greedy"), map(float, np.mean(rows, axis=0))))}
                for name, rows in groups.items()}}


def points(estimate):
    """In points, with its interval, what `interval` found."""
    mean, half = (100 * x for x in estimate)
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def table(results):
    """Markdown: a row per arm."""
    def mean(result, key):
        values = [seed[key] for seed in result["seeds"].values() if key in seed]
        return float(np.mean(values)) if values else math.nan

    lines = ["| arm | seeds | greedy | - SFT, points | mean@8 - SFT | pass@8 - SFT | KL | score "
             "| seconds |", "|" + "---|" * 9]
    for result in results.values():
        gains = map(points, result["gain"].values())
        lines.append("| " + " | ".join([
            result["what"], str(len(result["seeds"])), f"{mean(result, 'greedy'):.1%}", *gains,
            f"{mean(result, 'kl'):.2f}", f"{mean(result, 'score'):.2f}",
            f"{mean(result, 'seconds'):.0f}"]) + " |")
    return "\n".join(lines).replace("nan", "")


def table_of_pairs(arms, there, other):
    """Markdown: each arm less the arm `other` on the same questions of the same seeds. there:
    {arm's name: {seed: (its folder, its base's folder)}}."""
    lines = [f"| less {arms[other].what} | seeds | greedy, points | mean@8 |", "|" + "---|" * 4]
    for name in there:
        found = {"greedy": [], "mean": []}
        for seed in there[name].keys() & there[other].keys():
            gold = task_of(there[name][seed][0])[0].gold("test")
            ours, its = (judged(samples_of(arms[a], there[a][seed][0]), gold)
                         for a in (name, other))
            for key, rows in found.items():
                rows.append(np.array([ours[key][id_] - its[key][id_] for id_ in ours[key]]))
        if name != other and found["mean"]:
            lines.append(f"| {arms[name].what} | {len(found['mean'])} | "
                         + " | ".join(map(points, map(interval, found.values()))) + " |")
    return "\n".join(lines)


def table_of_groups(results):
    """Markdown: greedy accuracy of an arm where the majority of the teacher's 8 samples is right,
    wrong, tied, and where none of them is right; the SFT student's in brackets."""
    names = "right", "wrong", "tied", "never"
    first = next(iter(results.values()))["groups"]
    counts = [first[name]["questions"] if name in first else 0 for name in names]
    lines = ["| greedy where the teacher's majority is | " + " | ".join(
        f"{name}: {count / sum(counts):.0%}" for name, count in zip(names, counts)) + " |",
        "|" + "---|" * (len(names) + 1)]
    for result in results.values():
        groups = [result["groups"].get(name) for name in names]
        lines.append(f"| {result['what']} | " + " | ".join(
            "" if g is None else f"{g['greedy']:.1%} ({g['sft']:.1%})" for g in groups) + " |")
    return "\n".join(lines)


# ---- pictures ----

def forest(results, plt):
    """Gains over the SFT student with their intervals, an arm each."""
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.33 * len(results)), layout="constrained")
    for shift, key, color in ((-0.12, "greedy", "#2a6f97"), (0.12, "mean", "#e07a1f")):
        rows = [result["gain"][key] for result in results.values()]
        axis.errorbar([100 * m for m, _ in rows], [i + shift for i in range(len(rows))],
                      xerr=[100 * half for _, half in rows], fmt="o", ms=4, color=color,
                      label={"greedy": "greedy", "mean": "of 8 samples, mean"}[key])
    axis.axvline(0, color="black", lw=0.8)
    axis.set(yticks=range(len(results)), xlabel="points above the SFT student, 95% intervals",
             yticklabels=[result["what"] for result in results.values()])
    axis.invert_yaxis()
    axis.grid(alpha=0.3, axis="x")
    axis.legend()
    return figure


def budget_curve(results, plt):
    """Greedy accuracy against the number of questions that the teacher was asked."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (kind, label) in enumerate((
            ("sft", "SFT"), ("vote", "RLOO, vote"), ("model", "RLOO, reward model"),
            ("all", "RLOO, reward model, on questions without a vote too"))):
        names = [name for name in results if name.endswith("vote" if kind == "sft" else kind)]
        key = "sft" if kind == "sft" else "greedy"
        rows = [[seed[key] for seed in results[name]["seeds"].values()] for name in names]
        half = [0 if kind == "sft" else 100 * results[name]["gain"]["greedy"][1] for name in names]
        budgets = [int(name.split("-")[0]) for name in names]
        # Side by side, or their intervals hide each other.
        axis.errorbar([1.03**(i - 1.5) * n for n in budgets], [100 * np.mean(row) for row in rows],
                      yerr=half, marker="o", label=label)
    axis.set(xscale="log", xlabel="questions asked of the teacher", ylabel="greedy accuracy, %")
    budgets = sorted({int(name.split("-")[0]) for name in results})
    axis.set_xticks(budgets, [f"{n:,}" for n in budgets])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def overoptimised(root, results, plt):
    """Score and truth against the square root of the KL, and Gao et al.'s fits (arXiv 2210.10760):
    with d = sqrt(KL), best of n gains d (a - b d), RL d (a - b log d)."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    seed = next(iter(next(iter(results.values()))["seeds"]))
    curves = {result["what"]: [row for row in run.read_metrics(
        root / f"seed-{seed}" / name, "rl").values() if "score" in row]
        for name, result in results.items()}
    best = root / f"seed-{seed}" / "best-of-n" / "report.json"
    curves["best of n = 1 to 64"] = json.loads(best.read_text()) if best.exists() else []
    fits = {}
    for (what, rows), color in zip(curves.items(), plt.cm.viridis(np.linspace(0, 0.9, 6))):
        width = 1 if "n =" in what else 5                       # steps are noisy
        if len(rows) < width:                                    # this seed has no such arm yet
            continue
        for axis, key in zip(axes, ("score", "true_accuracy")):
            d, y = (np.convolve([f(row) for row in rows], np.ones(width) / width, "valid")
                    for f in (lambda row: math.sqrt(max(row["kl"], 0)), lambda row, k=key: row[k]))
            axis.plot(d, 100 * y if key != "score" else y, "o-" if width == 1 else "-", ms=4,
                      color="#e07a1f" if width == 1 else color, label=what)
            far = d > 0.05
            shape = d if width == 1 else np.log(np.maximum(d, 1e-9))
            x = np.stack([d, -d * shape], axis=1)[far]
            a, b = np.linalg.lstsq(x, y[far] - y[0], rcond=None)[0]
            fits.setdefault(what, {})[key] = {"a": float(a), "b": float(b)}
            axis.plot(d[far], (y[0] + x @ (a, b)) * (1 if key == "score" else 100), ":",
                      color="grey", lw=1)
    axes[0].set(title="score: what is maximised", ylabel="score")
    axes[1].set(title="true accuracy: what is meant", ylabel="%")
    for axis in axes:
        axis.set(xlabel="square root of the KL from the SFT student, nats per response")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure, fits


# ---- the command ----

def needed(arms, names):
    """The arms of these names, and those that they begin from, which come first in ARMS too."""
    found = set()
    for name in names:
        while name:
            found.add(name)
            name = arms[name].base
    return {name: arm for name, arm in arms.items() if name in found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("what", choices=[*ARMS], help="the arms")
    parser.add_argument("--seeds", default="21", help="with commas between them")
    parser.add_argument("--arms", default="", help="of these names alone, with commas between them")
    parser.add_argument("--against", default="", help="one of them: a table of all less this one")
    parser.add_argument("--small", action="store_true", help="a third of the questions, 20 steps "
                        "of 256 responses, 500 test questions")
    parser.add_argument("--rate", default="5e-4", help="of the arms of SFT alone")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--out", type=Path, help="not given: out/compare or out/compare-small")
    parser.add_argument("--picture", type=Path, help="draw it there; needs the [plot] extra")
    parser.add_argument("--arm", help=argparse.SUPPRESS)     # of this process alone
    args = parser.parse_args()
    root = args.out or Path("out/compare-small" if args.small else "out/compare")
    arms = ARMS[args.what]
    named = [*filter(None, [*args.arms.split(","), args.against])]
    unknown = {*named} - arms.keys()
    if unknown:
        parser.error(f"no arm {', '.join(sorted(unknown))}: {args.what} has {', '.join(arms)}")
    arms = needed(arms, named if args.arms else arms)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    if args.arm:
        args.seed, = seeds
        arm, folder = arms[args.arm], root / f"seed-{args.seed}"
        # The stages do so themselves; what is sampled and scored before them is here.
        torch.set_num_threads(args.threads)
        return arm.train(folder / args.arm, folder / arm.base, args)

    # ---- each arm in a process of its own ----
    for name, seed in ((name, seed) for name in arms for seed in seeds):
        if (root / f"seed-{seed}" / name / "report.json").exists():
            continue
        print(f"\n==== {name}, seed {seed}: {arms[name].what}", flush=True)
        done = subprocess.run([sys.executable, *sys.argv, "--seeds", str(seed), "--arm", name])
        if done.returncode:
            sys.exit(f"{name}, seed {seed} ended with {done.returncode}; the same command goes on")

    # ---- the table and the picture, of all that lies there ----
    there = {name: {int(path.name[5:]): (path / name, path / (arm.base or name))
                    for path in sorted(root.glob("seed-*"))
                    if (path / name / "report.json").exists()}
             for name, arm in arms.items() if arm.model}
    there = {name: seeds for name, seeds in there.items() if seeds}
    results = {name: figures(arms[name], seeds) for name, seeds in there.items()}
    extra = {}
    if args.picture:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        if args.what == "kl":
            figure, extra["fits"] = overoptimised(root, results, plt)
        else:
            figure = (budget_curve if args.what == "budget" else forest)(results, plt)
        figure.savefig(args.picture, dpi=110)
    files.write_atomic(root / f"{args.what}.json", json.dumps({**results, **extra}, indent=1))
    print(table(results), table_of_groups(results), sep="\n\n")
    if args.against in there:
        print("", table_of_pairs(arms, there, args.against), sep="\n")


if __name__ == "__main__":
    process.guard(main)
