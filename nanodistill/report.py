"""report.json and metrics.jsonl of a run folder -> report.md, a page for people, and curves.png.

    python -m nanodistill.report out/arithmetic-tiny        draws both anew

eval.py writes report.json, then calls `draw`. curves.png needs matplotlib, the [plot] extra.
"""

import argparse
import io
import json
import sys
from pathlib import Path

from nanodistill import files, process, run


# ---- page ----

def row(*cells):
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def head(*cells):
    """The first lines of a table, after an empty one."""
    return ["", row(*cells), f"|{'---|' * len(cells)}"]


def markdown(report):
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
        lines += ppo(report["ppo"])
    seconds = ", ".join(f"{stage} {t:.0f}" for stage, t in report["seconds"].items())
    return "\n".join([*lines, "", f"Seconds: {seconds}."]) + "\n"


def accuracies(report):
    """A row per model, and one per pair of models."""
    first = next(iter(report["models"].values()))
    at_k = [key for key in first if "@" in key]                  # mean@8, maj@8, pass@8
    lines = head("model", "greedy", "95% interval", *at_k, "length", "cut off", "no answer")
    for name, m in report["models"].items():
        g = m["greedy"]
        lines.append(row(
            name, f"{g['accuracy']:.1%}", f"{g['low']:.1%} to {g['high']:.1%}",
            *(f"{m[key]:.1%}" for key in at_k), f"{m['length']:.1f}", f"{m['cut_off']:.1%}",
            f"{m['no_answer']:.1%}"))
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
    return ["", f"Teacher's vote: {v['kept']:.1%} of the training questions kept, mean agreement "
            f"{v['agreement']:.1%}{gold}"]


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


def ppo(ends):
    """A row for the first steps and one for the last."""
    lines = head("PPO, sampled on training questions", "score", "true accuracy",
                 "KL, nats per response", "length", "ended")
    for when, r in ends.items():
        true = f"{r['true_accuracy']:.1%}" if "true_accuracy" in r else "no gold"
        lines.append(row(f"{when} (mean of at most 5 steps)", f"{r['score']:.2f}", true,
                         f"{r['kl']:.2f}", f"{r['length']:.1f}", f"{r['ended']:.1%}"))
    return lines


# ---- pictures ----

def plot(report, sft, rl, path):
    """Over the steps the held-out SFT loss, and PPO's score, true accuracy, KL and length; and the
    models' accuracies. `sft`, `rl`: {step: values} of run.read_metrics. Needs matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    curves = [("SFT: held-out loss", sft, "held_out_loss"), ("PPO: score", rl, "score"),
              ("PPO: true accuracy (diagnostic)", rl, "true_accuracy"),
              ("PPO: KL to the SFT student, nats", rl, "kl"), ("PPO: length, tokens", rl, "length")]
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
    """Print the page; write report.md and, with matplotlib, curves.png into the run folder.

    Returns the names of what was written.
    """
    page, written = markdown(report), ["report.md"]
    sft, rl = (run.read_metrics(folder, stage) for stage in ("sft", "rl"))
    print("\n" + page)
    files.write_atomic(folder / "report.md", page)
    try:
        plot(report, sft, rl, folder / "curves.png")
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
