"""What every stage does around its own work: run folder, JSONL, checkpoints, signals, devices.

All that a stage reads and writes lies in one run folder:

    settings.json                         every stage's settings (settings.py)
    inputs.json                           digests of what each artefact was made from
    teacher.jsonl  labels.jsonl           append-only; a torn last line is dropped and redone
    student.jsonl  metrics.jsonl
    sft/  rm/  rl/                        HF folders, and resume.pt while a stage is under way
    samples/                              what eval.py has sampled, a file a model
    report.md  report.json  curves.png

One process at a time has the folder, and hands it on to the stages that it runs.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

from nanodistill import fit, settings, weights


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
    """Make the run folder, take it, write its settings, fix the threads, seed everything.

    Returns (folder Path, device, dtype of the arithmetic).
    """
    config = configs[stage]
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    take(folder)
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
    """Did an error come for want of memory? The CPU's allocator has no error of its own."""
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
    def stop(number, frame):
        raise KeyboardInterrupt

    for number in STOPS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, stop)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped at once. What was saved is whole; the same command goes on from there.")
    except FloatingPointError as error:
        sys.exit(str(error))
    except Exception as error:
        if memory_is_full(error):
            sys.exit("out of memory, though as little as possible was tried at once. What was "
                     "saved is whole. Fewer --max-new-tokens, a smaller --student or more memory "
                     "would do.")
        if not cannot_write(error):
            raise
        sys.exit(f"{error}. What was there is whole, and the same command goes on from there once "
                 "it can be written to.")


def cannot_write(error):
    """Did an error come because a file could not be written? PyTorch's and safetensors' writers
    have errors of their own."""
    return getattr(error, "errno", None) in (
        errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM) or any(
        words in str(error) for words in ("PytorchStreamWriter failed", "os error 28",
                                          "os error 27", "os error 122", "os error 30"))


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

def read_jsonl(path, *keys):
    """The lines of a JSONL file as dicts that have `keys`; [] if there is no file.

    A last line that a killed writer left torn is left out. Raises SystemExit that names any other
    line that is no such object.
    """
    if not Path(path).exists():
        return []
    lines, rows = Path(path).read_bytes().split(b"\n"), []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict):
                raise ValueError("not an object")
            if not row.keys() >= {*keys}:
                raise ValueError(f"no {', no '.join(k for k in keys if k not in row)}")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            if n == len(lines):                                  # no line ends in it: it is torn
                return rows
            sys.exit(f"{path}, line {n}: {error}. Delete that line, and the same command makes it "
                     "anew.")
    return rows


class Appender:
    """Appends dicts to a JSONL file, each on disk at once.

    What a killed writer left of its last line is cut off first.
    """

    def __init__(self, path):
        self.file = open(path, "ab+")
        self.file.seek(0)
        whole, end, last = self.file.read().rpartition(b"\n")
        try:
            json.loads(last)
            self.file.write(b"\n")                               # it lacks its end alone
        except ValueError:
            self.file.truncate(len(whole + end))

    def __call__(self, row):
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()


class Metrics:
    """metrics.jsonl: one line per step, {"stage", "step", ...}.

    Tensors become numbers here, so that one sync serves them all. A stage that does not go on from
    a checkpoint starts `anew`, which a line of its own says: what came before is another run's.
    """

    def __init__(self, folder, stage, anew=True):
        self.append, self.stage = Appender(folder / "metrics.jsonl"), stage
        self.begun = time.monotonic()
        if anew:
            self.append({"stage": stage, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

    def __call__(self, step, **values):
        values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        self.append({"stage": self.stage, "step": step, **values})
        return values

    def seconds(self, earlier=0.0):
        return earlier + time.monotonic() - self.begun


def read_metrics(folder, stage):
    """{step: values} of a stage's last start; where a resumed run did a step again, the later
    values count."""
    steps = {}
    for row in read_jsonl(Path(folder) / "metrics.jsonl", "stage"):
        if row["stage"] == stage and "started" in row:
            steps = {}
        elif row["stage"] == stage:
            steps.setdefault(row["step"], {}).update(row)
    return dict(sorted(steps.items()))


class Watch:
    """Stops a stage at the first number that is not finite: `watch(step, *tensors)`.

    It looks at each step's numbers when the next one's come, so that nothing waits for the device;
    `settle` looks at the last ones, before anything is measured; and at all weights of the
    `models` that are to be saved.
    """

    def __init__(self, stage):
        self.stage, self.step, self.last = stage, 0, None

    def __call__(self, step, *values):
        self.settle()
        self.step, self.last = step, torch.stack([v.detach().float() for v in values])

    def settle(self, *models):
        good = self.last is None or self.last.isfinite().all()
        step, self.last = self.step, None
        if not (good and all(p.isfinite().all() for m in models for p in m.parameters())):
            raise FloatingPointError(
                f"{self.stage}: nan or inf in step {step}'s loss, gradients or weights: stopped. "
                f"Nothing of it was saved; a {self.stage}/resume.pt is of before it.\n"
                "Start again with a lower --learning-rate: in another --out, or without that file.")


# ---- what an artefact was made from ----

@functools.cache
def _sha256(path, size, changed):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(path):
    """SHA-256 of a file; of a folder, of its config, tokenizer and weights. "" if it is absent.

    The hub's cache names its files by what is in them, and is not read again.
    """
    path = Path(path)
    if path.is_dir():
        files = [f for f in sorted(path.iterdir())
                 if f.name in ("config.json", "tokenizer.json") or f.suffix == ".safetensors"]
        whole = " ".join(f"{f.name} {digest(f)}" for f in files)
        return hashlib.sha256(whole.encode()).hexdigest() if files else ""
    if not path.exists():
        return ""
    path = path.resolve()
    if path.parent.name == "blobs":
        return path.name
    return _sha256(path, path.stat().st_size, path.stat().st_mtime_ns)


def stale(folder):
    """What lies in the run folder and was made from other inputs than lie there now: messages."""
    found = []
    for name, inputs in _inputs(folder).items():
        there = folder / name
        if settings.begun(there):
            found += [f"{there} was made from another {folder / i} than lies there now. Delete "
                      f"{there} and what was made from it, or give another --out"
                      for i, was in inputs.items() if digest(folder / i) not in ("", was)]
    return found


def made_from(folder, name, *inputs):
    """Write down, before `name` is made, what it is made from: names in the run folder or paths.

    Raises SystemExit if a part of it is there and was made from something else.
    """
    problems = stale(folder)
    if problems:
        sys.exit("\n".join(problems[:3]))
    if not settings.begun(folder / name):
        now = {str(i): digest(folder / i) for i in inputs}
        weights.write_atomic(folder / "inputs.json",
                             json.dumps({**_inputs(folder), name: now}, indent=1) + "\n")


def finished(folder, name):
    """Is `name` in the run folder whole, and made from what lies there now? If so, says it."""
    folder = Path(folder)
    if not weights.complete(folder / name):
        return False
    problems = stale(folder)
    if problems:
        sys.exit("\n".join(problems[:3]))
    print(f"{folder / name} is complete; delete it to train again")
    return True


def _inputs(folder):
    try:
        return dict(json.loads((folder / "inputs.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, TypeError) as error:
        sys.exit(f"{folder / 'inputs.json'} can't be read ({error}): delete it, or give another "
                 "--out")


# ---- checkpoints ----

def save_checkpoint(path, config, parts=None, **state):
    """State for an exact resume. The file is complete or absent.

    Args:
        parts: {name: model or optimizer}, whose state dicts are saved.
        state: numbers and tensors; the config and the random streams are saved beside them.
    """
    state |= {name: part.state_dict() for name, part in (parts or {}).items()}
    streams = {"torch": torch.get_rng_state(), "python": json.dumps(random.getstate()),
               "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    try:
        with open(beside, "wb") as file:
            torch.save({**state, "config": dataclasses.asdict(config), "streams": streams}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_checkpoint(path, config, parts=None):
    """The saved state, put back into the random streams and `parts`; None if there is none.

    Raises SystemExit if the file is damaged, or if the settings differ in what the result depends
    on: it would be neither run.
    """
    if not Path(path).exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:                   # torch.load looks at no checksum
            if archive.testzip():
                raise ValueError
        state = torch.load(path, map_location="cpu", weights_only=True)
        before, saved = state["config"], {name: state[name] for name in parts or {}}
    except (ValueError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile,
            pickle.UnpicklingError):
        sys.exit(f"{path} is damaged, or no checkpoint of this program. Delete it, and the stage "
                 "starts from its beginning.")
    changed = [f"{f.name} was {before.get(f.name)!r}, is {getattr(config, f.name)!r}"
               for f in dataclasses.fields(config)
               if f.metadata["result"] and before.get(f.name) != getattr(config, f.name)]
    if changed:
        raise SystemExit(f"{path} was made with other settings ({'; '.join(changed)}). Give the "
                         "same ones, another --out, or delete it.")
    for name, value in saved.items():
        parts[name].load_state_dict(value)
    torch.set_rng_state(state["streams"]["torch"])
    version, internal, gauss = json.loads(state["streams"]["python"])
    random.setstate((version, tuple(internal), gauss))
    if torch.cuda.is_available() and state["streams"]["cuda"]:
        torch.cuda.set_rng_state_all(state["streams"]["cuda"])
    return state


def every(minutes):
    """-> a function that is True when about `minutes` have gone by since it last was."""
    last = time.monotonic()

    def due():
        nonlocal last
        if time.monotonic() - last < 60 * minutes:
            return False
        last = time.monotonic()
        return True
    return due


# ---- signals, the folder's lock, stages ----

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)           # Ctrl-C, kill, a dropped ssh


@contextlib.contextmanager
def on_stop(handler):
    """`handler(number, frame)` for the signals that ask to stop; not for those that nohup or a
    shell's & has switched off."""
    before = {number: signal.getsignal(number) for number in STOPS}
    before = {number: old for number, old in before.items() if old != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def interruptible():
    """Yields a function that says whether Ctrl-C, SIGTERM or SIGHUP has come.

    So a loop can finish its step and save. Twice ends at once.
    """
    asked = []

    def handler(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        with contextlib.suppress(OSError):                       # of a terminal that is gone
            print("\nstopping after this step; once more to stop now", file=sys.stderr)

    with on_stop(handler):
        yield lambda: bool(asked)


_taken = {}                                                      # {run folder: its open lock}


def take(folder, patience=15.0):
    """Take the run folder for this process, until it ends.

    A stage that another one runs shares its lock, and stops when that one is gone. Raises
    SystemExit that names the process that has the folder, if it does not end within `patience`
    seconds.
    """
    folder = Path(folder).resolve()
    if folder in _taken:
        return
    handed = os.environ.pop("NANODISTILL_LOCK", "")
    with contextlib.suppress(OSError, ValueError):
        lock, parent = map(int, handed.split())
        if os.path.samestat(os.fstat(lock), os.stat(folder / ".lock")):
            _taken[folder] = os.fdopen(lock, "r+")
            threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    if folder not in _taken:
        file, until = open(folder / ".lock", "a+"), time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
            if time.monotonic() > until:
                sys.exit(f"--out {folder} is in use by {owner}: wait for it, or give another --out")
            time.sleep(0.2)
        _taken[folder] = file
    sign(_taken[folder])


def sign(file):
    """Write into a lock who has it."""
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()} ({Path(sys.argv[0]).name})")
    file.flush()


def end_with(parent):
    """Stop this process as SIGTERM does when the other end of a pipe is closed."""
    os.read(parent, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def need(there, path, script, config):
    """Unless `path` is there, run the stage that makes it, and say so. It reads settings.json."""
    if there:
        return
    print(f"\n{path} is missing: running {script} first", flush=True)
    command = [sys.executable, str(Path(__file__).parent.parent / script), "--out", config.out]
    take(config.out)
    lock, (parent, ours) = _taken[Path(config.out).resolve()], os.pipe()
    child, came = None, []

    # The child is in a session of its own, so that each signal reaches it once: from here.
    def handler(number, frame):
        came.append(number)
        if child:
            child.send_signal(number)

    with on_stop(handler):
        started = subprocess.Popen(
            command, start_new_session=True, pass_fds=(lock.fileno(), parent),
            env={**os.environ, "NANODISTILL_LOCK": f"{lock.fileno()} {parent}"})
        early, child = [*came], started
        for number in early:
            child.send_signal(number)
        code = child.wait()
    os.close(parent), os.close(ours)
    sign(lock)
    if code < 0:
        sys.exit(f"{script} was ended by {signal.Signals(-code).name}; the same command goes on "
                 "from what was saved")
    if code or came:
        sys.exit(code or "stopped; the same command goes on from here")
