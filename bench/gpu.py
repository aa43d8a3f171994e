"""What a CUDA device is asked to do: launches, waits, copies and CUDA graphs of each piece of work.

    python bench/gpu.py

Backs docs/log.md's table of them. Needs a card, or a stub of its driver that logs what it is asked
and runs no kernel (FAKE_CUDA names the stub's folder): then the table says "emulated". The pieces
of work are the stages' own functions, on random weights of 1b's width. Each runs once before it is
counted. Before the table stand the lines of ours that waited, with how often, as
torch.cuda.set_sync_debug_mode sees it: of waits for events and of `torch.cuda.synchronize` it knows
nothing. What is recorded into a CUDA graph counts as launched on a card, and not on the stub.
"""

import contextlib
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import common
import ppo
import torch
from plan import BF16, STUB, arguments, new, sample, stage

import train_rl
from data import TASKS, ready
from nanodistill import fit, generate, losses, run, settings
from nanodistill.model import CausalLM
from nanodistill.presets import SIZES


ROOT = f"{Path(__file__).resolve().parents[1]}/"
BENCH = f"{ROOT}bench/"
# Of the profiler's names of CUDA's calls and copies, and of the lines that the stub logs.
COLUMNS = {"launches": r"^launch|LaunchKernel", "waits": r"^sync|Synchronize$",
           "to device, pageable": r"^memcpy H2D pageable|HtoD \(Pageable",
           "pinned": r"^memcpy H2D pinned|HtoD \(Pinned", "to host": r"^memcpy D2H|DtoH",
           "recordings": "^capture begin|StreamBeginCapture",
           "replays": "^graph launch|cudaGraphLaunch"}


# ---- counting ----

def counted(work, *args):
    """-> Counter of what the device was asked for by `work(*args)`, by COLUMNS and by the line
    of ours that waited; and the most bytes that there were, weights and all."""
    found = Counter()

    def note(message, *_):
        frame = sys._getframe()
        while frame and (not frame.f_code.co_filename.startswith(ROOT)
                         or frame.f_code.co_filename.startswith(BENCH)):
            frame = frame.f_back
        if "synchronizing CUDA" in str(message):
            code = frame and frame.f_code.co_filename[len(ROOT):]
            found[f"{code}:{frame.f_lineno}" if frame else "elsewhere"] += 1

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(), logged() as lines:
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for line in lines:
        found.update(name for name, pattern in COLUMNS.items() if re.search(pattern, line))
    return found, torch.cuda.max_memory_allocated()


@contextlib.contextmanager
def logged():
    """A list that holds, afterwards, a line for each call of CUDA and each copy."""
    lines = []
    if STUB:
        with tempfile.NamedTemporaryFile("r") as file:
            STUB.fake_log(file.name.encode())
            yield lines
            STUB.fake_log(b"")
            lines += file.read().splitlines()
    else:
        activities = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profile:
            yield lines
        lines += [event.name for event in profile.events()]


# ---- the pieces of work ----

def heads(shape, tokens=2048):
    """{loss: function}: the fused losses of bf16 hidden states and a trained fp32 head."""
    weight = torch.randn(shape.vocab_size, shape.hidden_size, device="cuda").requires_grad_()
    targets = torch.zeros(tokens, dtype=torch.long, device="cuda")

    def loss(value):
        weight.grad = None
        hidden = torch.randn(tokens, shape.hidden_size, device="cuda", dtype=BF16)
        value(hidden.requires_grad_()).backward()
    return {name: lambda value=value: loss(value) for name, value in {
        "linear_cross_entropy": lambda h: losses.linear_cross_entropy(
            h, weight, targets, ignore_index=None),
        "linear_logprobs": lambda h: losses.linear_logprobs(
            h, weight, targets, ignore_index=None)[0].sum(),
        "linear_logprobs, entropy": lambda h: sum(losses.linear_logprobs(
            h, weight, targets, ignore_index=None)).sum(),
        "linear_distillation": lambda h: losses.linear_distillation(h, weight, h, weight)}.items()}


def ppo_steps(folder, steps):
    """train_rl.py's `steps` first steps, of a small random model."""
    flags = {"steps": steps, "prompts": 16, "samples": 1, "max-new-tokens": 16, "slots": 8,
             "micro-batch": 4, "threads": 1, "seed": 0, "kl-limit": 1e9, "out": folder}
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    shutil.rmtree(folder / "rl", ignore_errors=True)
    configs = settings.parse("rl", train_rl.STAGES, "", argv)
    ready.check("rl", configs)
    train_rl.train(configs["rl"], *run.start(configs, "rl"))


def whole_step():
    """Count two PPO steps less one. On the stub the CPU computes the values, by the emulator that
    lies beside it; a CUDA graph, which has none, runs its step, and attention is as before
    flash."""
    modes = [contextlib.nullcontext]
    if STUB:
        from emulate import Emulate
        modes = [lambda: torch.compiler.set_stance("force_eager"), Emulate,
                 lambda: mock.patch.object(torch.cuda, "get_device_capability", lambda _: (7, 5)),
                 lambda: mock.patch.object(generate, "recorded",
                                           lambda step, _: SimpleNamespace(replay=step))]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        ppo.prepare(folder, TASKS["arithmetic"](0))
        for mode in modes:
            stack.enter_context(mode())
        (one, _), (two, peak) = (counted(ppo.quietly, ppo_steps, folder, n)
                                 for n in (1, 2))
    two.subtract(one)
    return two, peak


# ---- the table ----

def table(layers):
    shape = replace(SIZES["1b"].shape, num_hidden_layers=layers)
    rows, device = [], "emulated" if STUB else torch.cuda.get_device_name()

    def row(name, found, peak):
        numbers = " | ".join(str(found[column]) for column in COLUMNS)
        rows.append(f"| {name} | {numbers} | {peak / 2**20:,.0f} | {device} |")
        lines = [f"{n} {at}" for at, n in found.most_common() if n > 0 and at not in COLUMNS]
        print(f"{name}: waits at {', '.join(lines) or 'no line'}", flush=True)

    def sampled(model, tokens, how):
        sample(model, [[1] * 32] * 8, tokens, 8, how == "CUDA graphs")

    model = new(CausalLM, shape, BF16).requires_grad_(False)
    for how in ("eager", "CUDA graphs"):
        sampled(model, 41, how)
        few, _ = counted(sampled, model, 33, how)
        many, peak = counted(sampled, model, 41, how)
        row(f"generate, 8 x 41 tokens, {how}", many, peak)
        many.subtract(few)
        row(f"8 decode steps of it, {how}", many, peak)
    del model

    def all_of(prefix, works):
        for name, work in works.items():
            work()
            row(prefix + name, *counted(work))

    for name in fit.LEARN:
        all_of(f"{name}, ", stage(name, shape, 0, 8, 64, 64))
    all_of("", heads(shape))
    row("rl, a whole small step", *whole_step())
    print(f"\n| work | {' | '.join(COLUMNS)} | peak, MiB | device |")
    print("|" + "---|" * (len(COLUMNS) + 3), *rows, sep="\n")


def main():
    parser = common.flags(__doc__)
    parser.add_argument("--layers", type=int, default=4, help="of a model of 1b's width")
    table(arguments(parser).layers)


if __name__ == "__main__":
    main()
