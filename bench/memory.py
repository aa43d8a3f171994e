"""What cross-entropy takes with larger vocabularies and with more tokens, fused and naive.

    python bench/memory.py --dtype bf16 --picture docs/memory.png

Backs docs/speed.md's picture of memory, docs/memory.png: MiB beyond inputs and both gradients. Each
point is `bench/losses.py` in a process of its own. Naive goes as far as its logits take 2 GiB.
"""

import json
from pathlib import Path

import common
from tqdm import tqdm


SIDES = "linear_cross_entropy", "naive"


def measure(args, panels):
    """{(side, axis): {thousands: MiB}}; prints each point as a JSON line."""
    size, taken = common.DTYPES[args.dtype].itemsize, {}
    losses = [str(Path(__file__).with_name("losses.py")),
              "--dtype", args.dtype, "--threads", str(args.threads)]
    for side in SIDES:
        for axis, values in panels.items():
            points = taken[side, axis] = {}
            for value in tqdm(values, desc=f"{side}, {axis}"):
                shape = {"tokens": args.tokens, "vocabulary": args.vocabulary,
                         "hidden": args.hidden, axis: 1024 * value}
                tokens, vocabulary, hidden = shape.values()
                if side == "naive" and tokens * vocabulary * size > 2**31:
                    continue
                sizes = [word for name, n in shape.items() for word in (f"--{name}", str(n))]
                gradients = (tokens + vocabulary) * hidden * size
                points[value] = round((common.added(side, losses + sizes) - gradients) / 2**20)
                print(json.dumps({"work": "memory", "side": side, **shape, "dtype": args.dtype,
                                  "beyond_gradients_mib": points[value]}))
    return taken


def draw(path, panels, taken):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for plot, (axis, values) in zip(axes, panels.items()):
        for side in SIDES:
            points = taken[side, axis]
            plot.plot(points.keys(), points.values(), marker="o", label=side)
        plot.set(xlabel=f"{axis}, thousands", xscale="log", yscale="log", xticks=values,
                 xticklabels=values)
        plot.minorticks_off()
    axes[0].set_ylabel("MiB beyond inputs and gradients")
    axes[0].legend()
    figure.savefig(path, dpi=150)


def main():
    parser = common.flags(__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="where the vocabulary varies")
    parser.add_argument("--vocabulary", type=int, default=49152, help="where the tokens vary")
    parser.add_argument("--hidden", type=int, default=576, help="width of the hidden states")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32, 64, 128, 256],
                        help="thousands (of 1,024) of words")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64],
                        help="thousands (of 1,024) of tokens")
    parser.add_argument("--picture", help="a .png to draw; needs matplotlib")
    args = parser.parse_args()
    panels = {"vocabulary": args.vocabularies, "tokens": args.lengths}
    taken = measure(args, panels)
    for axis, values in panels.items():
        print(f"\n| {axis}, thousands | {' | '.join(map(str, values))} |")
        print("|" + "---|" * (len(values) + 1))
        for side in SIDES:
            row = [str(taken[side, axis].get(value, "")) for value in values]
            print(f"| {side}, MiB | {' | '.join(row)} |")
    if args.picture:
        draw(args.picture, panels, taken)


if __name__ == "__main__":
    main()
