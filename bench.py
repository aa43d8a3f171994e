"""Speed and memory beside the peers, both sides alternately in one process. What the README's table of speed is made by.

    python bench.py losses                                            cross-entropy of 4,096 tokens on SmolLM2's head, fp32
    python bench.py losses --dtype bf16 --tokens 2048 --hidden 2048 --vocabulary 128256
    python bench.py load --model SmolLM2-135M-Instruct                an HF folder, bf16

A side that is not installed (transformers, cut-cross-entropy, liger-kernel) is left out, and said so. Prints one JSON line a side, and a table: the median
time of the rounds, its ratio to the first side's, and the memory that one round adds to a fresh process (the highest count of resident bytes, less
that before).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F


def losses(args):
    """{side: function of no arguments}: loss and both gradients. The first is the three matrix products that any of them needs."""
    from nanodistill.losses import linear_cross_entropy, linear_logprobs

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden, generator=generator).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(args.vocabulary, args.hidden, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, args.vocabulary, (args.tokens,), generator=generator)

    def products():
        h, w = hidden.detach(), weight.detach()
        for part in h.split(1024):                                  # as the fused losses do: all logits at once would be slow for their memory alone
            logits = part @ w.T
            logits @ w, logits.T @ part

    def backward(loss):
        hidden.grad = weight.grad = None
        loss.backward()

    def with_entropy():
        logprobs, entropy = linear_logprobs(hidden, weight, targets)
        backward(-(logprobs + 0.01 * entropy).mean())

    sides = {"three matrix products": products,
             "linear_cross_entropy": lambda: backward(linear_cross_entropy(hidden, weight, targets)),
             "linear_logprobs with entropy": with_entropy,
             "naive": lambda: backward(F.cross_entropy(F.linear(hidden, weight).float(), targets))}
    if hasattr(F, "linear_cross_entropy"):
        sides["F.linear_cross_entropy"] = lambda: backward(F.linear_cross_entropy(hidden, weight, targets))
    try:
        from cut_cross_entropy import linear_cross_entropy as cut
        sides["cut-cross-entropy, torch_compile"] = lambda: backward(cut(hidden, weight, targets, impl="torch_compile"))
    except ImportError:
        print("cut-cross-entropy is not installed: left out")
    return sides


def load(args):
    """{side: function of no arguments}: an HF folder's weights into memory, each of them read once."""
    from nanodistill.weights import load as ours

    def read(model):
        return [p.view(torch.int16 if p.dtype == torch.bfloat16 else torch.int32).max() for p in model.parameters()]

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    sides = {"nanodistill": lambda: read(ours(args.model, dtype=dtype))}
    try:
        import transformers
        from transformers.models.llama import modeling_llama         # noqa: F401 -- else the first round would time this import
        transformers.utils.logging.disable_progress_bar()
        sides["transformers"] = lambda: read(transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype))
    except ImportError:
        print("transformers is not installed: left out")
    return sides


def highest():
    """The most resident bytes so far, by Linux's count for this program; getrusage's would start from that of the process that called it."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["losses", "load"])
    parser.add_argument("--tokens", type=int, default=4096, help="rows of the hidden states (default: 4096)")
    parser.add_argument("--hidden", type=int, default=576, help="their width (default: 576, SmolLM2-135M's)")
    parser.add_argument("--vocabulary", type=int, default=49152, help="rows of the head (default: 49152)")
    parser.add_argument("--model", default="", help="HF folder, for load")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="", help="default: fp32 for losses, bf16 for load")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="of all sides in turn, after one that does not count (default: 5)")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)           # how this script calls itself for one side in a fresh process
    args = parser.parse_args()
    args.dtype = args.dtype or {"losses": "fp32", "load": "bf16"}[args.work]
    if args.work == "load" and not (Path(args.model) / "config.json").exists():
        parser.error("load needs --model, an HF folder")
    torch.set_num_threads(args.threads)
    sides = {"losses": losses, "load": load}[args.work](args)
    if args.memory_of:
        before = highest()
        sides[args.memory_of]()
        print(f"added {highest() - before}")
        return

    seconds = {name: [] for name in sides}
    for _ in range(args.rounds + 1):
        for name, side in sides.items():
            begun = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - begun)
    first, table = None, ["| side | seconds, median | of the first | memory added, MiB |", "|---|---|---|---|"]
    for name in sides:
        done = subprocess.run([sys.executable, *sys.argv, "--memory-of", name], capture_output=True, text=True, check=True)
        added = int(done.stdout.rpartition("added ")[2]) / 2**20
        median = statistics.median(seconds[name][1:])
        first = first or median
        print(json.dumps({"work": args.work, "side": name, "seconds": [round(s, 4) for s in seconds[name][1:]], "median": round(median, 4),
                          "ratio": round(median / first, 3), "added_mib": round(added), **{k: getattr(args, k) for k in ("tokens", "hidden", "vocabulary", "dtype", "threads")}}))
        table.append(f"| {name} | {median:.3f} | {median / first:.2f} | {added:.0f} |")
    print("\n".join(["", *table]))


if __name__ == "__main__":
    main()
