"""What every stage does around its own work: run folder, JSONL, checkpoints, signals, devices.

All that a stage reads and writes lies in one run folder:

    settings.json                         every stage's settings (settings.py)
    teacher.jsonl  labels.jsonl           append-only; a torn last line is dropped and redone
    student.jsonl  metrics.jsonl
    sft/  rm/  rl/                        HF folders, and resume.pt while a stage is under way
    report.md  report.json  curves.png
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from nanodistill import fit, settings


def pick_device(name):
    """The torch.device that `--device` means. Raises ValueError where there is none of its kind."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
              "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in usable if usable[kind]))
    if not usable[name]:
        why = f"this PyTorch ({torch.__version__}) is not built for it" if name == "mps" or not \
            torch.backends.cuda.is_built() else "PyTorch finds no card (look at nvidia-smi)"
        raise ValueError(f"--device {name}: {why}. --device auto takes what is there")
    return torch.device(name)


def pick_dtype(name, device):
    """The dtype of the arithmetic that `--dtype` means on a device."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def start(configs, stage):
    """Make the run folder, write its settings, fix the threads, seed everything.

    Returns (folder Path, device, dtype of the arithmetic).
    """
    config = configs[stage]
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    settings.save(folder, stage, configs)
    if config.threads:
        torch.set_num_threads(config.threads)
    # Each stage has a random stream of its own.
    seed = random.Random(f"{stage} {config.seed}").getrandbits(32)
    random.seed(seed)
    torch.manual_seed(seed)
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    return folder, device, pick_dtype(config.dtype, device)


def fitted(stage, config, model, dtype, device, prompt, response, batch=0, jobs=0):
    """--slots, --micro-batch and --checkpoint as given, else the fastest that fit: a fit.Choice.

    Args:
        prompt, response: tokens of the longest of each.
        batch: sequences per optimizer step.
        jobs: samples to be drawn.
    Raises SystemExit with what would fit, where nothing does.
    """
    try:
        choice = fit.choose(
            stage, model, dtype, fit.free_bytes(device), batch=batch, prompt=prompt,
            response=response, jobs=jobs, device=device.type, slots=config.slots,
            micro_batch=getattr(config, "micro_batch", 0),
            checkpoint=getattr(config, "checkpoint", None))
    except ValueError as error:
        sys.exit(str(error))
    print(f"{stage}: {choice.line}")
    return choice


def memory_is_full(error):
    """Did a RuntimeError come for want of memory? The CPU's allocator has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def halve_when_full(work, size, flag, *args):
    """`work(size, *args)`; where memory runs out, again with half the size. -> (result, size).

    `work` must begin anew each time. Where size 1 is too much the error stays: see `guard`.
    """
    while True:
        try:
            return work(size, *args), size
        except RuntimeError as error:
            if not memory_is_full(error) or size == 1:
                raise
        # Not inside `except`, where the traceback still holds the failed attempt's tensors.
        size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"\nout of memory: once more, and from here on, with {flag} {size}", file=sys.stderr)


def guard(main):
    """Run a script. What is no fault of the program ends in a message and not in a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped at once. What was saved is whole; the same command goes on from there.")
    except RuntimeError as error:
        if not memory_is_full(error):
            raise
        sys.exit("out of memory, though as little as possible was tried at once. What was saved is "
                 "whole. Fewer --max-new-tokens, a smaller --student or more memory would do.")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES):
            raise
        sys.exit(f"{error}. What was there is whole, and the same command goes on from there once "
                 "it can be written to.")


class Bar(tqdm):
    """A progress bar that ends in [passed < left of the whole]."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("bar_format", "{l_bar}{bar}| {n_fmt}/{total_fmt} "
                          "[{elapsed}<{remaining} of {whole}, {rate_fmt}{postfix}]")
        super().__init__(*args, **kwargs)

    @property
    def format_dict(self):
        d = super().format_dict
        done = d["n"] - d["initial"]
        whole = d["elapsed"] * (d["total"] - d["initial"]) / done if done and d["total"] else None
        return {**d, "whole": "?" if whole is None else self.format_interval(whole)}


def held_out(question_id, share=0.05):
    """Is a training question among the `share` that no stage trains on?

    By a hash of its id: the same ones in every stage.
    """
    return int.from_bytes(hashlib.sha256(question_id.encode()).digest()[:4], "big") < share * 2**32


# ---- JSONL ----

def read_jsonl(path):
    """The lines of a JSONL file as dicts; [] if there is no file. A torn last one is left out."""
    if not Path(path).exists():
        return []
    whole, _, _ = Path(path).read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in whole.split(b"\n") if line]


class Appender:
    """Appends dicts to a JSONL file, each on disk at once.

    What a killed writer left of its last line is cut off first.
    """

    def __init__(self, path):
        self.file = open(path, "ab+")
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)

    def __call__(self, row):
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()


class Metrics:
    """metrics.jsonl: one line per step, {"stage", "step", ...}.

    Tensors become numbers here, so that one sync serves them all.
    """

    def __init__(self, folder, stage):
        self.append, self.stage, self.begun = Appender(folder / "metrics.jsonl"), stage, time.time()

    def __call__(self, step, **values):
        values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        self.append({"stage": self.stage, "step": step, **values})
        return values

    def seconds(self, earlier=0.0):
        return earlier + time.time() - self.begun


def read_metrics(folder, stage):
    """{step: values} of a stage; where a resumed run did a step again, the later values count."""
    steps = {}
    for row in read_jsonl(Path(folder) / "metrics.jsonl"):
        if row["stage"] == stage:
            steps.setdefault(row["step"], {}).update(row)
    return dict(sorted(steps.items()))


# ---- checkpoints ----

def save_checkpoint(path, config, **state):
    """State for an exact resume: what is given, the config and the random streams.

    Given are state dicts and numbers. The file is complete or absent.
    """
    streams = {"torch": torch.get_rng_state(), "python": json.dumps(random.getstate()),
               "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    with open(beside, "wb") as file:
        torch.save({**state, "config": dataclasses.asdict(config), "streams": streams}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load_checkpoint(path, config):
    """The saved state, with the random streams put back; None if there is none.

    Raises SystemExit if the settings differ in what the result depends on: it would be neither run.
    """
    if not Path(path).exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    before = state["config"]
    changed = [f"{f.name} was {before.get(f.name)!r}, is {getattr(config, f.name)!r}"
               for f in dataclasses.fields(config)
               if f.metadata["result"] and before.get(f.name) != getattr(config, f.name)]
    if changed:
        raise SystemExit(f"{path} was made with other settings ({'; '.join(changed)}). Give the "
                         "same ones, another --out, or delete it.")
    torch.set_rng_state(state["streams"]["torch"])
    version, internal, gauss = json.loads(state["streams"]["python"])
    random.setstate((version, tuple(internal), gauss))
    if torch.cuda.is_available() and state["streams"]["cuda"]:
        torch.cuda.set_rng_state_all(state["streams"]["cuda"])
    return state


@contextlib.contextmanager
def interruptible():
    """Yields a function that says whether Ctrl-C or SIGTERM has come.

    So a loop can finish its step and save. Twice ends at once.
    """
    asked = []

    def handler(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping after this step; once more to stop now", file=sys.stderr)

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for s, old in before.items():
            signal.signal(s, old)


# ---- stages ----

def need(there, path, script, config):
    """Unless `path` is there, run the stage that makes it, and say so. It reads settings.json."""
    if there:
        return
    print(f"\n{path} is missing: running {script} first", flush=True)
    command = [sys.executable, str(Path(__file__).parent.parent / script), "--out", config.out]
    child = subprocess.Popen(command)
    # Ctrl-C reaches the child too: let it save, and end when it has ended. SIGTERM reaches only
    # us, and is passed on.
    def handler(number, frame):
        if number == signal.SIGTERM:
            child.terminate()

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    code = child.wait()
    for s, old in before.items():
        signal.signal(s, old)
    if code:
        sys.exit(code)
