"""The curves of several runs, such as three seeds, in one picture; or their accuracies.

    python data/tiny/curves.py out/arithmetic-tiny out/arithmetic-tiny-seed2 --to docs/curves.png
    python data/tiny/curves.py out/arithmetic-tiny out/arithmetic-tiny-seed2 --bars docs/bars.png

As curves.png of one run (nanodistill/report.py): each line is the mean of the runs, its band goes
from the lowest to the highest, and a dot is a run's accuracy. `--bars` has each run's models with
their 95% intervals. Reads metrics.jsonl and report.json; needs the [plot] extra.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanodistill import files, run


COLORS = ["#a9a9a9", "#d9d9d9", "#89c2d9", "#2a6f97"]                  # teacher, base, SFT, RL
CURVES = [("SFT: held-out loss", "sft", "held_out_loss"), ("PPO: score", "rl", "score"),
          ("PPO: true accuracy (diagnostic)", "rl", "true_accuracy"),
          ("PPO: KL to the SFT student, nats", "rl", "kl"), ("PPO: length, tokens", "rl", "length")]


def together(curves):
    """[{step: value} of each run] -> (steps (S,), values (runs, S)), over the steps that all runs
    span. A run that measured between two of them is joined by a straight line."""
    first, last = max(min(c) for c in curves), min(max(c) for c in curves)
    steps = sorted({step for c in curves for step in c if first <= step <= last})
    return np.array(steps), np.array([np.interp(steps, [*c], [*c.values()]) for c in curves])


def plot(runs, path):
    """The picture of [(report, {stage: {step: values}}) of each run]. Needs matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for axis, (title, stage, key) in zip(axes.flat, CURVES):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        curves = [{step: values[key] for step, values in steps[stage].items() if key in values}
                  for _, steps in runs]
        if all(curves):
            steps, values = together(curves)
            axis.plot(steps, values.mean(axis=0), color="#2a6f97")
            axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color="#2a6f97",
                              alpha=0.2, lw=0)
    axis, names = axes.flat[5], [*runs[0][0]["models"]]
    accuracy = np.array([[100 * report["models"][name]["greedy"]["accuracy"] for name in names]
                         for report, _ in runs])                       # (runs, models)
    axis.bar([Path(name).name for name in names], accuracy.mean(axis=0), color=COLORS[-len(names):])
    for each in accuracy:
        axis.plot(range(len(names)), each, "o", ms=4, color="black")
    axis.set(title="test accuracy, greedy, %")
    figure.suptitle(f"{len(runs)} runs: mean, lowest to highest" if len(runs) > 1 else "1 run")
    save(figure, path, plt)


def bars(runs, path):
    """The greedy accuracies of each run's models with their intervals."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [*runs[0][0]["models"]]
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for k, (name, color) in enumerate(zip(names, COLORS[-len(names):])):
        greedy = [report["models"][name]["greedy"] for report, _ in runs]
        at = [i + 0.2 * (k - (len(names) - 1) / 2) for i in range(len(runs))]
        rows = [[100 * g[key] for g in greedy] for key in ("accuracy", "low", "high")]
        axis.bar(at, rows[0], 0.19, color=color, label=Path(name).name, capsize=3, yerr=[
            np.subtract(rows[0], rows[1]), np.subtract(rows[2], rows[0])])
        for x, y, high in zip(at, rows[0], rows[2]):
            axis.text(x, high + 1, f"{y:.1f}", ha="center", fontsize=8)
    axis.set(xticks=range(len(runs)), xticklabels=[f"seed {r['seed']}" for r, _ in runs],
             ylabel="greedy accuracy, %", ylim=(0, 112))
    figure.legend(ncols=len(names), loc="outside upper center")
    save(figure, path, plt)


def save(figure, path, plt):
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    files.write_atomic(path, picture.getvalue())


def read(folder):
    """A finished run's (report, {stage: {step: values}})."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{folder / 'report.json'}: {error}. `python eval.py --out {folder}` makes it")
    return report, {stage: run.read_metrics(folder, stage) for stage in ("sft", "rl")}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="run folders of the same task")
    parser.add_argument("--to", type=Path, help="draw the curves there, a .png")
    parser.add_argument("--bars", type=Path, help="draw the accuracies there")
    args = parser.parse_args(argv)
    runs = [read(folder) for folder in args.folders]
    models = [[*report["models"]] for report, _ in runs]
    if models != models[:1] * len(models):
        sys.exit(f"the runs compared other models: {models}")
    try:
        for draw, path in ((plot, args.to), (bars, args.bars)):
            if path:
                draw(runs, path)
                print(f"-> {path}")
    except ImportError:
        sys.exit('it needs matplotlib, pip install -e ".[plot]"')


if __name__ == "__main__":
    main()
