"""What the benchmarks share: sides run in turn, memory of fresh processes, SmolLM2's shape.

Importing this puts the repository's root on the path: do it before anything of ours.

A *side* is a function of no arguments that does a whole work once, as we or as a peer does it. All
sides run in turn in one process, so that whatever disturbs the machine meets each of them. Memory
is measured apart, in a fresh process per side, by Linux's count of it.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanodistill.model import CausalLM, init_weights
from nanodistill.presets import SIZES


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is, and the default of each flag."""


def flags(doc, dtype="fp32"):
    """A parser with the flags of every benchmark."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help)
    parser.add_argument("--dtype", choices=[*DTYPES], default=dtype, help="of the weights")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser


def compare(parser, sides_of, bases=(), warm=True, tokens=False):
    """Run all sides in turn; print a JSON line per side, and a table.

    Args:
        sides_of: parsed arguments -> {name: side}.
        bases: sides that those after them are compared with; else all are with the first.
        warm: a side's memory is that of its second run.
        tokens: sides return how many tokens were of use; their rate is printed, not the memory.
    """
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side that count")
    # How a benchmark calls itself for one side in a fresh process.
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sides = sides_of(args)
    if args.memory_of:
        return print("added", peak(sides[args.memory_of], warm))

    seconds, results = {name: [] for name in sides}, {name: [] for name in sides}
    for _ in range(args.rounds + 1):
        for name, side in sides.items():
            begun = time.perf_counter()
            results[name].append(side())
            seconds[name].append(time.perf_counter() - begun)

    told = {name: value for name, value in vars(args).items() if name != "memory_of"}
    column = "useful tokens a second" if tokens else "memory added, MiB"
    table = ["", f"| side | seconds, median | of the first | {column} |", "|---|---|---|---|"]
    base = None
    for name in sides:
        # Whatever is compiled or imported in the first round stays out of the count.
        taken, made = seconds[name][1:], results[name][1:]
        median = statistics.median(taken)
        base = median if base is None or name in bases else base
        if tokens:
            rates = [count / s for count, s in zip(made, taken)]
            key, value = "tokens_a_second", round(statistics.median(rates), 1)
        else:
            key, value = "added_mib", round(added(name, sys.argv) / 2**20)
        print(json.dumps({
            "work": Path(sys.argv[0]).stem, "side": name, "seconds": [round(s, 4) for s in taken],
            "median": round(median, 4), key: value, "ratio": round(median / base, 3), **told}))
        table.append(f"| {name} | {median:.3f} | {median / base:.2f} | {value} |")
    print("\n".join(table))


def added(side, command):
    """Bytes that a run of `side` adds to a fresh process at its highest.

    `command`: a benchmark that ends in `compare`, and its flags.
    """
    out = subprocess.check_output([sys.executable, *command, "--memory-of", side], text=True)
    return int(out.rpartition("added ")[2])


def peak(side, warm):
    """Bytes that a run of `side`, its second if `warm`, adds to this process at its highest."""
    if warm:
        side()
    # Linux begins a new count of the highest.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    side()
    return resident("VmHWM") - before


def resident(count):
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at the highest."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{count}:")[1].split()[0])


def installed(*packages):
    """Are the packages that a peer needs there? Says which one is not."""
    for package in packages:
        if not importlib.util.find_spec(package):
            print(f"{package} is not installed: left out")
            return False
    return True


def smollm2(layers, dtype):
    """A random model of SmolLM2-135M's shape; and transformers' on the same weights, or None."""
    shape = replace(SIZES["135m"].shape, num_hidden_layers=layers)
    ours = init_weights(CausalLM(shape), torch.Generator().manual_seed(0)).to(dtype)
    if not installed("transformers"):
        return ours, None
    import transformers

    config = asdict(shape)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    del config["rope_scaling"], config["model_type"]
    config = transformers.LlamaConfig(**config, attn_implementation="sdpa")
    theirs = transformers.LlamaForCausalLM(config).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    theirs.generation_config.eos_token_id = None
    return ours, theirs
