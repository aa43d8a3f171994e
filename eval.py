"""Stage 4, evaluation: teacher, base, SFT student and RL student on the same test questions, with intervals and paired tests.

    python eval.py                                          the tiny run
    python eval.py --models out/arithmetic-tiny/rl,data/tiny/teacher
    python eval.py --task mmlu_pro --models out/gsm8k-1b/rl            a student on another task than its own

Reads the HF folders of a run; gold answers are read here and nowhere else. Writes report.json, report.md and, with the [plot] extra, curves.png.
For each model: greedy accuracy with a Wilson 95% interval; and of k samples at temperature 1 their mean accuracy (mean@k), that of their
majority (maj@k), and the share of questions that any of them gets right (pass@k). For each two models: the difference of greedy accuracies with the 95%
interval of paired differences, and McNemar's exact p. For the reward model: AUC against the vote on held-out training questions, and against
gold on test questions, beside that of each model's own sequence log-probability.
"""

import io
import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from data import hub, prompts_of, ready, response_ids, task_of
from nanodistill import fit, run, settings, vote, weights
from nanodistill.generate import generate
from nanodistill.model import ScalarModel
from nanodistill.reward import score_sequences
from nanodistill.settings import Common, flag
from nanodistill.stats import auc, measure, paired, wilson
from nanodistill.tokenizer import Tokenizer


# ---- config ----

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


# ---- samples, and gold ----

def true_accuracy(task, split, ids, texts):
    """{"true_accuracy": share of the responses that are right by gold}, of those whose question has a gold answer; else {}.

    A diagnostic: what trains gets this number for its log, never the answers.
    """
    gold, questions = task.gold(split), {q["id"]: q["question"] for q in task.questions(split)}
    right = [task.equal(task.extract_answer(text, questions[id_]), gold[id_])
             for id_, text in zip(ids, texts) if id_ in gold]
    return {"true_accuracy": sum(right) / len(right)} if right else {}


class Samples:
    """The samples of one model, in a file that a stopped evaluation goes on from.

    Its first line says what they were made from; a file of something else is begun anew.
    `config`: the settings; `path`: the model's folder.
    """

    def __init__(self, file, path, config):
        origin = {"model": run.digest(path), **{k: getattr(config, k) for k in (
            "task", "data", "seed", "max_new_tokens", "dtype", "date")}}
        file.parent.mkdir(exist_ok=True)
        rows = run.read_jsonl(file)
        if rows[:1] != [origin]:
            weights.write_atomic(file, json.dumps(origin) + "\n")
        self.rows = {(row["what"], row["id"]): row["responses"] for row in rows[1:]
                     if rows[0] == origin}
        self.append = run.Appender(file)

    def __call__(self, what, questions, n, temperature, prompts, model, tokenizer, task, slots,
                 max_new_tokens):
        """[[{"text", "answer", "ended", "tokens", "logprob"}] * n] for each question.

        logprob: of all tokens. A question without a prompt, which was too long, has no answer.
        """
        none = [{"text": "", "answer": None, "ended": False, "tokens": [], "logprob": 0.0}] * n
        have = {id_: rows for (kind, id_), rows in self.rows.items()
                if kind == what and len(rows) >= n}
        todo = [q for q in questions if q["id"] in prompts and q["id"] not in have]
        done = generate(model, [prompts[q["id"]] for q in todo], ids=[q["id"] for q in todo], n=n,
                        temperature=temperature, max_new_tokens=max_new_tokens, slots=slots,
                        eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id,
                        seed=torch.initial_seed())
        total = n * len(questions)
        for i, j, s in run.Bar(done, total=total, initial=total - n * len(todo), desc=what,
                               unit="response"):
            text, q = tokenizer.decode(s.tokens), todo[i]
            answer = task.extract_answer(text, q["question"]) if s.ended else None
            row = have.setdefault(q["id"], [None] * n)
            row[j] = {"text": text, "answer": answer, "ended": s.ended, "tokens": s.tokens,
                      "logprob": sum(s.logprobs)}
            if None not in row:
                self.append({"what": what, "id": q["id"], "responses": row})
        return [have.get(q["id"], none)[:n] for q in questions]


def main(argv=None):
    configs = settings.parse("eval", STAGES, __doc__, argv)
    config = configs["eval"]
    if config.dry_run:
        return print(ready.dry_run("eval", configs))
    ready.check("eval", configs)
    folder, device, dtype = run.start(configs, "eval")
    task = task_of(config)
    metrics = run.Metrics(folder, "eval")
    if config.models:
        folders = {name: hub.resolve(name, "models") for name in config.models.split(",")}
    else:
        folders = {} if config.teacher_url else {
            "teacher": hub.resolve(config.teacher, "teacher", config.teacher_revision)}
        folders |= {"base": hub.resolve(config.student, "student", config.revision),
                    "sft": folder / "sft", "rl": folder / "rl"}
        for name in [name for name, path in folders.items() if not weights.complete(path)]:
            print(f"eval: {folders.pop(name)} holds no whole model: left out")
    questions = task.questions("test")[:config.questions or None]
    gold = task.gold("test")
    labels = {} if config.models else {
        row["id"]: row for row in run.read_jsonl(folder / "labels.jsonl", "id", "vote")}
    held_out = [q for q in (task.questions("train") if labels else [])
                if run.held_out(q["id"]) and labels.get(q["id"], {}).get("vote") is not None]

    # ---- every model on the test questions ----
    report = {"seed": config.seed, "task": config.task, "models": {}, "pairs": {}}
    right, sampled, held_out_samples = {}, {}, []
    for name, path in folders.items():
        extra, n = held_out if name == "rl" else [], config.samples
        if not questions + extra:
            continue
        tokenizer, shape = Tokenizer(path, config.date), weights.load_config(path)
        prompts = prompts_of(task, tokenizer, questions + extra,
                             shape.max_position_embeddings - config.max_new_tokens)
        slots = run.fitted("eval", config, shape, dtype, device, max(map(len, prompts.values())),
                           config.max_new_tokens, batch=fit.SCORED, jobs=n * len(prompts)).slots
        model = weights.load(path, device=device, dtype=dtype)
        file = name if not config.models else f"{Path(name).name}-{run.digest(path)[:8]}"
        samples = Samples(folder / "samples" / f"{file}.jsonl", path, config)
        how = prompts, model, tokenizer, task, slots, config.max_new_tokens
        if extra:
            held_out_samples = samples(f"{name}, held-out questions", extra, n, 1.0, *how)
        if not questions:
            continue
        greedy = samples(f"{name}, greedy", questions, 1, 0.0, *how)
        sampled[name] = samples(f"{name}, sampled", questions, n, 1.0, *how)
        right[name] = [task.equal(s["answer"], gold.get(q["id"]))
                       for q, (s,) in zip(questions, greedy)]
        low, high = wilson(sum(right[name]), len(questions))
        hits = [[task.equal(s["answer"], gold.get(q["id"])) for s in row]
                for q, row in zip(questions, sampled[name])]
        # Of t answers that lead together each counts 1 / t; a missing answer never leads.
        leaders = [vote.plurality([s["answer"] for s in row]) for row in sampled[name]]
        majority = [sum(task.equal(v, gold.get(q["id"])) for v in tied) / max(len(tied), 1)
                    for q, tied in zip(questions, leaders)]
        every = [s for row in sampled[name] for s in row]
        report["models"][name] = {
            "greedy": {"accuracy": sum(right[name]) / len(questions), "low": low, "high": high,
                       "n": len(questions)},
            f"mean@{n}": sum(map(sum, hits)) / (len(questions) * n),
            f"maj@{n}": sum(majority) / len(questions),
            f"pass@{n}": sum(map(any, hits)) / len(questions),
            "length": sum(len(s["tokens"]) for s in every) / len(every),
            "cut_off": sum(not s["ended"] for s in every) / len(every),
            "no_answer": sum(s["ended"] and s["answer"] is None for s in every) / len(every)}
        del model
    for b, a in combinations(right, 2):
        report["pairs"][f"{a}-{b}"] = paired(right[a], right[b])

    # ---- the reward model ----
    if not config.models and weights.complete(folder / "rm"):
        tokenizer = Tokenizer(folder / "rm", config.date)
        model = weights.load(folder / "rm", ScalarModel, device=device, dtype=dtype)

        def scores(pairs, own):
            """Scores of [(question, response)]; `own`: their tokens are this tokenizer's."""
            return score_sequences(model, [
                tokenizer.prompt_ids(task.prompt(q["question"]))
                + response_ids(tokenizer, r, own) for q, r in pairs], fit.SCORED)

        figures = {"auc": {}, "auc_gold": {}, "auc_own_logprob": {}, "held_out": {}}
        for name, file in (("teacher", "teacher.jsonl"), ("sft", "student.jsonl"), ("rl", None)):
            rows = dict(zip((q["id"] for q in held_out), held_out_samples))
            if file:
                rows = {row["id"]: row["responses"]
                        for row in run.read_jsonl(folder / file, "id", "responses")}
            pairs = [(q, r) for q in held_out for r in rows.get(q["id"], [])]
            if pairs:
                figures["held_out"][name] = measure(
                    scores(pairs, name != "teacher"),
                    [task.equal(r["answer"], labels[q["id"]]["vote"]) for q, r in pairs])
                figures["auc"][name] = figures["held_out"][name]["auc"]
            elif held_out and file:
                print(f"eval: {folder / file} has no response to a held-out question: the reward "
                      f"model's figures on the responses of {name} are left out")
            if name in sampled:
                pairs = [(q, s) for q, row in zip(questions, sampled[name]) for s in row]
                truth = [task.equal(s["answer"], gold.get(q["id"])) for q, s in pairs]
                figures["auc_gold"][name] = auc(scores(pairs, name != "teacher"), truth)
                figures["auc_own_logprob"][name] = auc([s["logprob"] for _, s in pairs], truth)
        report["reward_model"] = figures

    # ---- the votes, the RL run, the durations ----
    if labels and not config.models:
        votes = [vote.Vote(row["vote"], row["agreement"], row["n"]) for row in labels.values()]
        kept = [row for row in labels.values() if row["vote"] is not None]
        train_gold = task.gold("train")
        right = [task.equal(r["vote"], train_gold[r["id"]]) for r in kept if r["id"] in train_gold]
        report["votes"] = vote.summary(votes) | ({"accuracy": sum(right) / len(right)} if right else {})
    steps = [row for row in run.read_metrics(folder, "rl").values() if "score" in row]
    if steps:
        keys = [k for k in ("score", "true_accuracy", "kl", "length", "ended") if k in steps[0]]
        ends = {"start": steps[:5], "end": steps[-5:]}
        report["ppo"] = {when: {k: sum(row[k] for row in rows) / len(rows) for k in keys}
                         for when, rows in ends.items()}
    report["seconds"] = {stage: round(row["seconds"], 1) for stage in ("teacher", "sft", "rm", "rl")
                         for row in run.read_metrics(folder, stage).values() if "seconds" in row}
    report["seconds"]["eval"] = round(metrics.seconds(), 1)
    weights.write_atomic(folder / "report.json", json.dumps(report, indent=1) + "\n")
    text = markdown(report, config)
    weights.write_atomic(folder / "report.md", text)
    print("\n" + text)
    written = "report.md, report.json"
    try:
        plot(report, folder)
        written += ", curves.png"
    except ImportError:
        print('no curves.png: it needs matplotlib, pip install -e ".[plot]"')
    print(f"eval: -> {folder}: {written}")


# ---- report ----

def markdown(report, config):
    """report.json as a page for people."""
    k = config.samples
    lines = [f"# {report['task']}, seed {report['seed']}", ""]
    if not report["models"]:
        lines += ["There are no test questions with answers, and so no accuracies: put test.jsonl, "
                  "with a `question` and an `answer` a line, beside train.jsonl."]
        return "\n".join(lines + rest(report)) + "\n"
    lines += [
        f"| model | greedy | 95% interval | mean@{k} | maj@{k} | pass@{k} | length | cut off "
        "| no answer |", "|---|---|---|---|---|---|---|---|---|"]
    for name, m in report["models"].items():
        g = m["greedy"]
        lines.append(
            f"| {name} | {g['accuracy']:.1%} | {g['low']:.1%} to {g['high']:.1%} "
            f"| {m[f'mean@{k}']:.1%} | {m[f'maj@{k}']:.1%} | {m[f'pass@{k}']:.1%} "
            f"| {m['length']:.1f} | {m['cut_off']:.1%} | {m['no_answer']:.1%} |")
    n = next(iter(report["models"].values()))["greedy"]["n"]
    lines += ["", f"{n} test questions; length in tokens. Two models on the same questions, greedy:", "",
              "| pair | difference, points | 95% interval | p (McNemar) |", "|---|---|---|---|"]
    lines += [f"| {name} | {100 * p['difference']:+.1f} | {100 * p['low']:+.1f} to {100 * p['high']:+.1f} | {p['p']:.2g} |" for name, p in report["pairs"].items()]
    return "\n".join(lines + rest(report)) + "\n"


def rest(report):
    """The lines of the page that need no test questions."""
    lines = []
    if "votes" in report:
        v = report["votes"]
        lines += ["", f"Teacher's vote: {v['kept']:.1%} of the training questions kept, mean "
                  f"agreement {v['agreement']:.1%}"
                  + (f"; right by gold (a diagnostic) {v['accuracy']:.1%}." if "accuracy" in v
                     else ". No training question has a gold answer to compare with.")]
    if "reward_model" in report:
        figures = report["reward_model"]
        lines += ["", "| reward model on the responses of | AUC, vote | accuracy, vote | calibration error | AUC, gold | own log-probability's AUC, gold |", "|---|---|---|---|---|---|"]
        for name, f in figures["held_out"].items():
            lines.append(f"| {name} | {f['auc']:.3f} | {f['accuracy']:.3f} | {f['ece']:.3f} | "
                         + " | ".join(f"{figures[key][name]:.3f}" if name in figures[key] else "" for key in ("auc_gold", "auc_own_logprob")) + " |")
        lines += ["", "AUC against the vote: training questions held out from every stage. Against gold: test questions."]
    if "ppo" in report:
        lines += ["", "| PPO, sampled on training questions | score | true accuracy | KL, nats "
                  "a response | length | ended |", "|---|---|---|---|---|---|"]
        for when, r in report["ppo"].items():
            true = f"{r['true_accuracy']:.1%}" if "true_accuracy" in r else "no gold"
            lines.append(f"| {when} (mean of at most 5 steps) | {r['score']:.2f} | {true} | "
                         f"{r['kl']:.2f} | {r['length']:.1f} | {r['ended']:.1%} |")
    lines += ["", "Seconds: " + ", ".join(f"{s} {t:.0f}" for s, t in report["seconds"].items()) + "."]
    return lines


def plot(report, folder):
    """curves.png: held-out SFT loss, PPO's score, true accuracy, KL and length over steps, and the models' accuracies. Needs matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    sft = [(step, row["held_out_loss"]) for step, row in run.read_metrics(folder, "sft").items() if "held_out_loss" in row]
    rl = [row for row in run.read_metrics(folder, "rl").values() if "score" in row]
    panels = [("SFT: held-out loss", sft)] + [(title, [(row["step"], row[key]) for row in rl if key in row]) for title, key in (
        ("PPO: score", "score"), ("PPO: true accuracy (diagnostic)", "true_accuracy"), ("PPO: KL to the SFT student, nats", "kl"), ("PPO: length, tokens", "length"))]
    for axis, (title, points) in zip(axes.flat, panels):
        axis.plot(*zip(*points) if points else ([], []), color="#2a6f97")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axis, names = axes.flat[5], list(report["models"])
    greedy = [report["models"][name]["greedy"] for name in names]
    heights = [100 * g["accuracy"] for g in greedy]
    # At 0% and 100% rounding may put the accuracy a hair outside of its interval.
    errors = [[max(100 * (g["accuracy"] - g["low"]), 0) for g in greedy],
              [max(100 * (g["high"] - g["accuracy"]), 0) for g in greedy]]
    axis.bar([Path(name).name for name in names], heights, yerr=errors, capsize=4, color=["#a9a9a9", "#d9d9d9", "#89c2d9", "#2a6f97"][-len(names):])
    axis.set(title="test accuracy, greedy, 95% intervals", ylabel="%")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    weights.write_atomic(folder / "curves.png", picture.getvalue())


if __name__ == "__main__":
    run.guard(main)
