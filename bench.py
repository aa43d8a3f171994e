"""Speed and memory beside the peers, both sides alternately in one process. What the README's table of speed is made by.

    python bench.py losses                                            cross-entropy of 4,096 tokens on SmolLM2's head, fp32
    python bench.py losses --dtype bf16 --tokens 2048 --hidden 2048 --vocabulary 128256
    python bench.py load --model SmolLM2-135M-Instruct                an HF folder, bf16

A side that is not installed (transformers, cut-cross-entropy, liger-kernel) is left out, and said so. Prints one JSON line a side, and a table: the median
time of the rounds, its ratio to the first side's (to that of the matrix products above it), and the memory that a round adds to a fresh process at its highest.
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F


def losses(args):
    """{side: function of no arguments}: loss and both gradients. The first sides are the matrix products alone that any of them needs."""
    from nanodistill.losses import linear_cross_entropy, linear_logprobs

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden, generator=generator).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(args.vocabulary, args.hidden, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, args.vocabulary, (args.tokens,), generator=generator)

    def products(recomputed):
        """Logits (twice if recomputed), gradient of hidden, gradient of weight, 1,024 tokens at a time: the size that is fastest here."""
        h, w = hidden.detach(), weight.detach()
        logits, dh, dw = h.new_empty(min(1024, len(h)), len(w)), torch.empty_like(h), torch.empty_like(w)
        for part, into in zip(h.split(1024), dh.split(1024)):
            chunk = logits[:len(part)]
            for _ in range(1 + recomputed):
                torch.mm(part, w.T, out=chunk)
            torch.mm(chunk, w, out=into)
            torch.mm(chunk.T, part, out=dw)

    def backward(loss):
        loss.backward()
        hidden.grad = weight.grad = None

    def with_entropy():
        logprobs, entropy = linear_logprobs(hidden, weight, targets)
        backward(-(logprobs + 0.01 * entropy).mean())

    sides = {"three matrix products": lambda: products(False),
             "linear_cross_entropy": lambda: backward(linear_cross_entropy(hidden, weight, targets)),
             "naive": lambda: backward(F.cross_entropy(F.linear(hidden, weight).float(), targets))}
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
    sides["F.linear_cross_entropy, chunk 512"] = lambda: backward(F.linear_cross_entropy(hidden, weight, targets, options=options))
    cut = peer("cut_cross_entropy.torch_compile", "torch_compile_linear_cross_entropy")
    if cut:
        sides["cut-cross-entropy, torch_compile"] = lambda: backward(cut(hidden, weight, targets))
    sides |= {"four matrix products": lambda: products(True), "linear_logprobs with entropy": with_entropy}
    liger = peer("liger_kernel.chunked_loss.fused_linear_ppo", "_ChunkedSelectiveLogProbFunction")
    if liger:
        sides["Liger, selective logprobs, no entropy"] = lambda: backward(-liger.apply(hidden, weight, targets, None, 1.0, 4096).mean())
    return sides


def peer(module, name):
    """A function of a package that may be missing; of a package whose own __init__ needs Triton, which CPUs have not, the one file."""
    package = module.partition(".")[0]
    found = importlib.util.find_spec(package)
    if not found:
        return print(f"{package} is not installed: left out")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        for loaded in [m for m in sys.modules if m.partition(".")[0] == package]:
            del sys.modules[loaded]
        parent = ""
        for part in module.split(".")[:-1]:                             # empty packages in place of the real ones
            parent = f"{parent}.{part}".lstrip(".")
            sys.modules[parent] = types.ModuleType(parent)
            sys.modules[parent].__path__ = [str(Path(found.origin).parent.joinpath(*parent.split(".")[1:]))]
        return getattr(importlib.import_module(module), name)


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


def resident(count):
    """Bytes of this process in memory by Linux's count: "VmRSS" now, "VmHWM" the most since it was last reset."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{count}:")[1].split()[0])


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
        if args.work != "load":
            sides[args.memory_of]()                                 # what is compiled or imported in the first round stays out of the count
        Path("/proc/self/clear_refs").write_text("5")               # resets VmHWM
        before = resident("VmRSS")
        sides[args.memory_of]()
        print(f"added {resident('VmHWM') - before}")
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
        first = median if first is None or name.endswith("matrix products") else first
        print(json.dumps({"work": args.work, "side": name, "seconds": [round(s, 4) for s in seconds[name][1:]], "median": round(median, 4),
                          "ratio": round(median / first, 3), "added_mib": round(added), **{k: getattr(args, k) for k in ("tokens", "hidden", "vocabulary", "dtype", "threads")}}))
        table.append(f"| {name} | {median:.3f} | {median / first:.2f} | {added:.0f} |")
    print("\n".join(["", *table]))


if __name__ == "__main__":
    main()
