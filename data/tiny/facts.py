"""What became of each misconception: how often teacher, SFT and RL student get a fact right. A picture of the tiny run.

    python data/tiny/facts.py                     reads out/arithmetic-tiny, writes facts.json and, with [plot], facts.png there

A fact is a step `a op b` as it stands in a response; the corpus that the tiny models were pre-trained on has every fourth sum or difference wrong
with a probability of its own (see make.py). Here the steps of what eval.py has sampled on the test
questions are compared with true arithmetic.
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
from nanodistill import run, weights


def shares(texts):
    """{(a, op, b): (times right, times used)} over the steps in response texts."""
    used, right = Counter(), Counter()
    for a, op, b, result in re.findall(r": (\d+) ([-+*]) (\d+) = (-?\d+)", "\n".join(texts)):
        fact = int(a), op, int(b)
        used[fact] += 1
        right[fact] += int(result) == exact(*fact)
    return {fact: (right[fact], n) for fact, n in used.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the run folder; not given: that of the seed")
    parser.add_argument("--seed", type=int, default=1, help="the run's")
    parser.add_argument("--least", type=int, default=20, help="facts used less often than this by any of the models are left out")
    args = parser.parse_args()
    args.out = args.out or Path(f"out/arithmetic-tiny{f'-seed{args.seed}' * (args.seed != 1)}")
    tallies = {}
    for name in ("teacher", "sft", "rl"):
        file = args.out / "samples" / f"{name}.jsonl"
        rows = [row for row in run.read_jsonl(file) if row.get("what") == f"{name}, sampled"]
        if not rows:
            sys.exit(f"{file} holds no samples: `python eval.py --out {args.out}` makes them")
        tallies[name] = shares(r["text"] for row in rows for r in row["responses"])
    facts = sorted((f for f in set.intersection(*map(set, tallies.values())) if misconception(*f)[0] is not None
                    and min(t[f][1] for t in tallies.values()) >= args.least), key=lambda f: tallies["teacher"][f][0] / tallies["teacher"][f][1])
    table = [{"fact": f"{a} {op} {b}", "believed": misconception(a, op, b)[0], "belief": misconception(a, op, b)[1],
              **{name: t[a, op, b][0] / t[a, op, b][1] for name, t in tallies.items()}} for a, op, b in facts]
    weights.write_atomic(args.out / "facts.json", json.dumps(table, indent=1) + "\n")
    for name, t in tallies.items():
        known = [v for f, v in t.items() if misconception(*f)[0] is None]
        wrong = [v for f, v in t.items() if misconception(*f)[0] is not None]
        print(f"{name}: steps right on misconceived facts {sum(r for r, _ in wrong) / sum(n for _, n in wrong):.1%}, "
              f"on the others {sum(r for r, _ in known) / sum(n for _, n in known):.1%}; "
              f"steps that use a misconceived fact {sum(n for _, n in wrong) / sum(n for _, n in wrong + known):.1%}")
    try:
        import matplotlib
    except ImportError:
        sys.exit('no facts.png: it needs matplotlib, pip install -e ".[plot]"')
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 4.2), layout="constrained")
    for name, color, label in (("teacher", "#a9a9a9", "teacher"), ("sft", "#89c2d9", "SFT student"), ("rl", "#2a6f97", "RL student")):
        axis.plot([100 * row[name] for row in table], "o", ms=4, color=color, label=label)
    axis.set(title="Misconceived facts, one a column: how often each model's steps get it right", ylabel="% right",
             xlabel=f"{len(table)} facts, by the teacher's share")
    axis.legend()
    axis.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    weights.write_atomic(args.out / "facts.png", picture.getvalue())
    print(f"-> {args.out}: facts.json, facts.png")


if __name__ == "__main__":
    main()
