"""What a run folder holds -> report.md and report.html, pages for people, and curves.png.

    python -m nanodistill.report out/arithmetic-tiny        draws them anew

eval.py writes report.json, then calls `draw`. report.html is one file that needs no network: its
code is nanodistill/report.html, its data are put into it here. Of metrics.jsonl, eval.jsonl,
rollouts.jsonl and settings.json it shows what there is. curves.png needs matplotlib, the [plot]
extra.
"""

import argparse
import io
import json
import math
import sys
from collections import Counter
from pathlib import Path

from nanodistill import files, process, rollouts, run, settings
from nanodistill.health import bands, health


# ---- page ----

def row(*cells):
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def head(*cells):
    """The first lines of a table, after an empty one."""
    return ["", row(*cells), f"|{'---|' * len(cells)}"]


def algorithm_of(config):
    """Its name, from RL's settings; "PPO" in those that know no other."""
    return config.get("algorithm", "ppo").upper()


def markdown(report, algorithm="PPO"):
    """The page of a report. It has accuracies where there were test questions with answers."""
    lines = [f"# {report['task']}, seed {report['seed']}"]
    lines += accuracies(report) if report["models"] else [
        "", "There are no test questions with answers, and so no accuracies: put test.jsonl, with "
        "a `question` and an `answer` per line, beside train.jsonl."]
    if "votes" in report:
        lines += votes(report["votes"])
    if "reward_model" in report:
        lines += reward_model(report["reward_model"])
    if "ppo" in report:
        lines += ppo(report["ppo"], algorithm)
    seconds = ", ".join(f"{stage} {t:.0f}" for stage, t in report["seconds"].items())
    return "\n".join([*lines, "", f"Seconds: {seconds}."]) + "\n"


def accuracies(report):
    """A row per model, and one per pair of models."""
    first = next(iter(report["models"].values()))
    at_k = [key for key in first if "@" in key]                  # mean@8, maj@8, pass@8
    lines = head("model", "greedy", "95% interval", *at_k, "length", "ended", "no answer")
    for name, m in report["models"].items():
        g = m["greedy"]
        lines.append(row(
            name, f"{g['accuracy']:.1%}", f"{g['low']:.1%} to {g['high']:.1%}",
            *(f"{m[key]:.1%}" for key in at_k), f"{m['length']:.1f}",
            f"{1 - m['cut_off']:.1%}", f"{m['no_answer']:.1%}"))
    lines += ["", f"{first['greedy']['n']} test questions; length in tokens. Two models on the "
              "same questions, greedy:"]
    lines += head("pair", "difference, points", "95% interval", "p (McNemar)")
    for name, p in report["pairs"].items():
        lines.append(row(name, f"{100 * p['difference']:+.1f}",
                         f"{100 * p['low']:+.1f} to {100 * p['high']:+.1f}", f"{p['p']:.2g}"))
    return lines


def votes(v):
    """A sentence on the teacher's vote."""
    gold = f"; right by gold (a diagnostic) {v['accuracy']:.1%}." if "accuracy" in v else \
        ". No training question has a gold answer to compare with."
    lines = ["", f"Teacher's vote: {v['kept']:.1%} of the training questions kept, mean agreement "
             f"{v['agreement']:.1%}{gold}"]
    if "both" in v:
        right = f"; right by gold {v['both']['accuracy']:.1%}" if "accuracy" in v["both"] else ""
        lines += ["", "The reward model's labels are of a second vote on these, with half the say "
                  f"for the SFT student: {v['both']['kept']:.1%} of them have one{right}."]
    return lines


def reward_model(figures):
    """A row per model whose responses it scored."""
    lines = head("reward model on the responses of", "AUC, vote", "accuracy, vote",
                 "calibration error", "AUC, gold", "own log-probability's AUC, gold")
    for name, f in figures["held_out"].items():
        gold = [figures[key].get(name) for key in ("auc_gold", "auc_own_logprob")]
        lines.append(row(name, *(f"{f[key]:.3f}" for key in ("auc", "accuracy", "ece")),
                         *("" if auc is None else f"{auc:.3f}" for auc in gold)))
    lines += ["", "AUC against the vote: training questions held out from every stage. "
              "Against gold: test questions."]
    if not figures.get("within"):
        return lines
    lines += head("among the responses to one held-out question", "AUC, gold: reward model", "vote",
                  "all scored alike: reward model", "vote")
    for name, by in figures["within"].items():
        lines.append(row(name, *("" if value is None else f"{value:.3f}" for value in (
            by[judge].get(key) for key in ("within_auc", "alike")
            for judge in ("reward_model", "vote")))))
    return lines


def ppo(ends, algorithm):
    """A row for the first steps and one for the last."""
    lines = head(f"{algorithm}, sampled on training questions", "score", "true accuracy",
                 "KL, nats per response", "length", "ended")
    for when, r in ends.items():
        true = f"{r['true_accuracy']:.1%}" if "true_accuracy" in r else "no gold"
        lines.append(row(f"{when} (mean of at most 5 steps)", f"{r['score']:.2f}", true,
                         f"{r['kl']:.2f}", f"{r['length']:.1f}", f"{r['ended']:.1%}"))
    return lines


# ---- report.html ----

TEMPLATE = Path(__file__).with_name("report.html")
# Bytes that questions and rollouts may have in it, so that it stays below 2 MB.
BUDGET = {"test": 1_100_000, "train": 260_000, "rollouts": 430_000}


def curves(measured, most=200):
    """{stage: {step: values}} -> {stage: {measurement: [[step, value]]}}, at most so many, the last
    one among them."""
    found = {stage: {} for stage in measured}
    for stage, steps in measured.items():
        for step, values in steps.items():
            for key, x in values.items():
                if type(x) in (int, float) and key != "step":
                    found[stage].setdefault(key, []).append([step, rollouts.short(x)])
    return {stage: {key: points[::-math.ceil(len(points) / most)][::-1]
                    for key, points in by.items()} for stage, by in found.items()}


def counted(line):
    """A line of eval.jsonl, made short: "texts", and of each model what was "greedy", a list of one
    response or none, and what was "sampled", one response for each answer and how many gave it.

    A response is [answer, right, ended, its text's number].
    """
    texts, models = {}, {}

    def told(r):
        return [r["answer"], r.get("right"), r["ended"], texts.setdefault(r["text"], len(texts))]
    for name, by in line["models"].items():
        greedy, sampled = [by["greedy"]] if "greedy" in by else [], by.get("sampled", [])
        kinds = Counter((r["answer"], r["ended"]) for r in sampled)
        # Where the greedy one is among them, it stands for its kind.
        one = {(r["answer"], r["ended"]): r for r in sampled + greedy}
        models[name] = {"greedy": [told(r) for r in greedy],
                        "sampled": [[*told(one[kind]), n] for kind, n in kinds.most_common()]}
    return {**line, "texts": [*texts], "models": models}


def compact(x):
    return json.dumps(x, separators=(",", ":"))


def first_that_fit(rows, budget):
    """The first rows that have `budget` bytes together as JSON."""
    taken = []
    for row in rows:
        budget -= len(compact(row))
        if budget < 0:
            break
        taken.append(row)
    return taken


def from_all_over(rows):
    """The same rows, so that any first few of them are of steps all over the run, the last step and
    the first one before all."""
    steps = sorted({row["step"] for row in rows})
    order, gap = dict.fromkeys(steps[-1:] + steps[:1]), len(steps)
    while gap > 1:
        gap = gap // 2
        order |= dict.fromkeys(steps[::gap])
    return sorted(rows, key=lambda row: [*order].index(row["step"]))


def html(report, folder, config):
    """The text of report.html: the template, and what lies in the run folder as JSON in it.

    config: RL's settings, or {}.
    """
    measured = {stage: run.read_metrics(folder, stage) for stage in ("sft", "rm", "rl")}
    steps = [values for values in measured["rl"].values() if "score" in values]
    lines = files.read_jsonl(folder / "eval.jsonl", "id", "question", "models")
    kept = rollouts.read(folder / "rollouts.jsonl")
    data = {"algorithm": algorithm_of(config), "report": report, "curves": curves(measured),
            "bands": bands(steps), "health": health(report, steps, config), "questions": [],
            "of": {"rollouts": len(kept)}}
    for split in ("test", "train"):
        rows = [counted(line) for line in lines if line.get("split") == split]
        data["of"][split] = len(rows)
        data["questions"] += first_that_fit(rows, BUDGET[split])
    data["rollouts"] = sorted(first_that_fit(from_all_over(kept), BUDGET["rollouts"]),
                              key=lambda row: (row["step"], row["i"]))
    # JSON knows no nan; nor must a response close the script element that it stands in.
    data = json.loads(json.dumps(data), parse_constant=lambda _: None)
    data = compact(data).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", data, 1)


# ---- pictures ----

def plot(report, sft, rl, path, algorithm="PPO"):
    """Over the steps the held-out SFT loss, and RL's score, true accuracy, KL and length; and the
    models' accuracies. `sft`, `rl`: {step: values} of run.read_metrics. Needs matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    curves = [("SFT: held-out loss", sft, "held_out_loss"), *(
        (f"{algorithm}: {title}", rl, key) for title, key in (
            ("score", "score"), ("true accuracy (diagnostic)", "true_accuracy"),
            ("KL to the reference, nats", "kl"), ("length, tokens", "length")))]
    for axis, (title, steps, key) in zip(axes.flat, curves):
        points = [(step, values[key]) for step, values in steps.items() if key in values]
        axis.plot(*zip(*points) if points else ([], []), color="#2a6f97")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axis, greedy = axes.flat[5], [m["greedy"] for m in report["models"].values()]
    # At 0% and 100% rounding may put the accuracy a hair outside of its interval.
    errors = [[max(100 * (g["accuracy"] - g["low"]), 0) for g in greedy],
              [max(100 * (g["high"] - g["accuracy"]), 0) for g in greedy]]
    colors = ["#a9a9a9", "#d9d9d9", "#89c2d9", "#2a6f97"]        # teacher, base, SFT, RL
    axis.bar([Path(name).name for name in report["models"]], [100 * g["accuracy"] for g in greedy],
             yerr=errors, capsize=4, color=colors[-len(greedy):])
    axis.set(title="test accuracy, greedy, 95% intervals", ylabel="%")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    files.write_atomic(path, picture.getvalue())


def draw(report, folder):
    """Print the page; write report.md, report.html and, with matplotlib, curves.png into the run
    folder.

    Returns the names of what was written.
    """
    try:
        config = settings.load(folder).get("rl", {})
    except ValueError as error:
        sys.exit(str(error))
    page, written = markdown(report, algorithm_of(config)), ["report.md", "report.html"]
    sft, rl = (run.read_metrics(folder, stage) for stage in ("sft", "rl"))
    print("\n" + page)
    files.write_atomic(folder / "report.md", page)
    files.write_atomic(folder / "report.html", html(report, folder, config))
    try:
        plot(report, sft, rl, folder / "curves.png", algorithm_of(config))
        written.append("curves.png")
    except ImportError:
        print('no curves.png: it needs matplotlib, pip install -e ".[plot]"')
    return written


def main():
    parser = argparse.ArgumentParser(prog="python -m nanodistill.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the run folder")
    folder = parser.parse_args().folder
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        markdown(report).encode()                        # it fails here, or is whole
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        sys.exit(f"{folder / 'report.json'} is missing: `python eval.py --out {folder}` makes it")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        sys.exit(f"{folder / 'report.json'} is no report of eval.py ({type(error).__name__}: "
                 f"{error}). `python eval.py --out {folder}` makes it anew")
    print(f"-> {folder}: {', '.join(draw(report, folder))}")


if __name__ == "__main__":
    process.guard(main)
