"""What became of each misconception: how often teacher, SFT and RL student get a fact right.

    python data/tiny/facts.py         reads out/arithmetic-tiny; writes facts.json there and, with
                                      the [plot] extra, facts.png

A fact is a step `a op b` as it stands in a response. In the corpus that the tiny models were
pre-trained on every fourth sum or difference is wrong, with a probability of its own (make.py).
Here the steps in what eval.py has sampled on the test questions are compared with true arithmetic.
"""

import argparse
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.arithmetic import exact
from data.tiny.make import misconception
from nanodistill import files


def shares(texts):
    """{(a, op, b): (times right, times used)} over the steps in response texts."""
    used, right = Counter(), Counter()
    for a, op, b, result in re.findall(r": (\d+) ([-+*]) (\d+) = (-?\d+)", "\n".join(texts)):
        fact = int(a), op, int(b)
        used[fact] += 1
        right[fact] += int(result) == exact(*fact)
    return {fact: (right[fact], n) for fact, n in used.items()}


def table_of(tallies, least):
    """[{"fact", "believed", "belief", and each model's share of right steps}], a row for each
    misconceived fact that every model used `least` times, in the order of the teacher's share.

    tallies: {model: `shares` of its texts}.
    """
    share = {name: {fact: right / n for fact, (right, n) in t.items()}
             for name, t in tallies.items()}
    facts = [fact for fact in set.intersection(*map(set, tallies.values()))
             if misconception(*fact)[0] is not None
             and min(t[fact][1] for t in tallies.values()) >= least]
    facts.sort(key=share["teacher"].get)
    return [{"fact": " ".join(map(str, fact)), "believed": misconception(*fact)[0],
             "belief": misconception(*fact)[1], **{name: share[name][fact] for name in tallies}}
            for fact in facts]


def describe(name, tally):
    """A line on a model's steps."""
    known = [count for fact, count in tally.items() if misconception(*fact)[0] is None]
    wrong = [count for fact, count in tally.items() if misconception(*fact)[0] is not None]
    (right, used), (right_of_wrong, used_of_wrong) = (
        map(sum, zip(*counts)) for counts in (known, wrong))
    return (f"{name}: steps right on misconceived facts {right_of_wrong / used_of_wrong:.1%}, on "
            f"the others {right / used:.1%}; steps that use a misconceived fact "
            f"{used_of_wrong / (used_of_wrong + used):.1%}")


def label(row):
    """A fact of the table in words."""
    a, op, b = row["fact"].split()
    return f"{a} {op} {b} = {exact(int(a), op, int(b))}, not {row['believed']}"


def plot(table, path):
    """The table as a picture: a line per fact, from the teacher's share of right steps to the RL
    student's. Needs matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.21 * len(table)), layout="constrained")
    lines = range(len(table))
    teacher, sft, rl = ([100 * row[name] for row in table] for name in ("teacher", "sft", "rl"))
    worse = ["#bc4749" if end < start else "#c9dce6" for start, end in zip(teacher, rl)]
    axis.hlines(lines, teacher, rl, colors=worse, lw=3, zorder=1)
    for shares, color, name in ((teacher, "#a9a9a9", "teacher"), (sft, "#89c2d9", "SFT student"),
                                (rl, "#2a6f97", "RL student")):
        axis.scatter(shares, lines, s=26, color=color, label=name, zorder=2)
    axis.set(title=f"How often the steps on {len(table)} misconceived facts are right",
             xlabel="% right (red: fewer of the RL student's than of the teacher's)",
             xlim=(-3, 103), ylim=(len(table) - 0.4, -0.6))
    axis.set_yticks(lines, [label(row) for row in table], fontsize=8)
    figure.legend(ncols=3, loc="outside lower center")
    axis.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    files.write_atomic(path, picture.getvalue())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the run folder; not given: that of the seed")
    parser.add_argument("--seed", type=int, default=1, help="the run's")
    parser.add_argument("--least", type=int, default=20,
                        help="facts that a model used less often than this are left out")
    args = parser.parse_args()
    args.out = args.out or Path(f"out/arithmetic-tiny{f'-seed{args.seed}' * (args.seed != 1)}")
    tallies = {}
    for name in ("teacher", "sft", "rl"):
        file = args.out / "samples" / f"{name}.jsonl"
        rows = [row for row in files.read_jsonl(file) if row.get("what") == f"{name}, sampled"]
        if not rows:
            sys.exit(f"{file} holds no samples: `python eval.py --out {args.out}` makes them")
        tallies[name] = shares(r["text"] for row in rows for r in row["responses"])
    table = table_of(tallies, args.least)
    files.write_atomic(args.out / "facts.json", json.dumps(table, indent=1) + "\n")
    for name, tally in tallies.items():
        print(describe(name, tally))
    try:
        plot(table, args.out / "facts.png")
    except ImportError:
        sys.exit('no facts.png: it needs matplotlib, pip install -e ".[plot]"')
    print(f"-> {args.out}: facts.json, facts.png")


if __name__ == "__main__":
    main()
