"""What every stage does around its own work: flags, run folder, JSONL, checkpoints, interrupts, devices, and calling the stage before.

A stage is a script with a dataclass of settings at its top. `parse` makes flags of it. All it reads and writes lies in one run folder:

    teacher.jsonl  labels.jsonl  student.jsonl  metrics.jsonl     append-only; a torn last line is dropped and redone
    sft/  rm/  rl/                                                HF folders, and resume.pt while a stage is under way
    report.md  report.json  curves.png
"""

import argparse
import contextlib
import dataclasses
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
from nanodistill.weights import write_atomic


def flag(default, help, choices=None):
    """A dataclass field that `parse` turns into a command-line flag."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass
class Common:
    """The flags of every stage, handed on to the stage before it. Each script's Config adds its own."""
    student: str = flag("tiny", "the student's base: tiny, 135m, 0.5b, 1b, 3b, 8b, a hub name, or an HF folder")
    revision: str = flag("", "branch, tag or commit of the student on the hub; empty = its main branch")
    teacher: str = flag("tiny", "the teacher, named in the same way")
    teacher_revision: str = flag("", "branch, tag or commit of the teacher on the hub")
    teacher_url: str = flag("", "the teacher is behind this OpenAI-compatible server instead, such as http://host:8000/v1")
    teacher_model: str = flag("", "its name on that server")
    task: str = flag("arithmetic", "what is asked", ("arithmetic", "gsm8k", "mmlu_pro"))
    data: str = flag("", "folder with the task's rows, <split>.jsonl or <split>*.parquet; empty = the hub")
    questions: int = flag(0, "questions used of the stage's split; 0 = all")
    seed: int = flag(1, "samples, order of the batches, and the embedded task's questions")
    out: str = flag("", "run folder; empty = out/<task>-<student>")
    device: str = flag("auto", "cuda, cpu or auto")
    dtype: str = flag("auto", "of the arithmetic; trained weights stay fp32; auto = bf16 on CUDA, fp32 on CPU", ("auto", "bf16", "fp32"))
    threads: int = flag(0, "CPU threads; 0 = PyTorch's choice")
    dry_run: bool = flag(False, "say what would be loaded and what memory it takes, and stop; needs no weights")


def parse(config_class, doc, tiny=None, argv=None):
    """Command line -> config. `tiny`: other defaults for `--student tiny` on its own task. Unknown flags fail; every value is printed once."""
    class Help(argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            small = (tiny or {}).get(action.dest)
            return f"{action.help} (default: {action.default}{'' if small is None else f'; for the tiny student {small}'})"

    parser = argparse.ArgumentParser(description=doc, formatter_class=Help)
    for field in dataclasses.fields(config_class):
        options = {"help": field.metadata["help"].replace("%", "%%"), "default": field.default, "dest": field.name}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type=field.type, choices=field.metadata["choices"], metavar=None if field.metadata["choices"] else field.type.__name__)
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    values = vars(parser.parse_args(argv))
    if values["student"] == "tiny" and values["task"] == "arithmetic" and tiny:      # what was not given on the command line takes the tiny default
        parser.set_defaults(**tiny)
        values = vars(parser.parse_args(argv))
    if not values["out"]:
        compared = "+".join("-".join(Path(name).parts[-2:]) for name in values.get("models", "").split(",") if name)
        values["out"] = f"out/{values['task']}-{compared or Path(values['student']).name}"
    print("  ".join(f"{key}={value}" for key, value in values.items()))
    return config_class(**values)


def start(config, stage):
    """Make the run folder, fix the threads, seed everything. Returns (folder Path, device, dtype of the arithmetic)."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    if config.threads:
        torch.set_num_threads(config.threads)
    seed = random.Random(f"{stage} {config.seed}").getrandbits(32)  # each stage has a stream of its own
    random.seed(seed)
    torch.manual_seed(seed)
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    name = config.dtype if config.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    return folder, device, {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def held_out(question_id, share=0.05):
    """Is a training question among the `share` that no stage trains on? By a hash of its id: the same ones in every stage."""
    return int.from_bytes(hashlib.sha256(question_id.encode()).digest()[:4], "big") < share * 2**32


# ---- JSONL ----

def read_jsonl(path):
    """The complete lines of a JSONL file as a list of dicts; [] if there is no file. A torn last line is left out."""
    if not Path(path).exists():
        return []
    whole, _, _ = Path(path).read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in whole.split(b"\n") if line]


class Appender:
    """Appends dicts to a JSONL file, each on disk at once. What a killed writer left of its last line is cut off first."""

    def __init__(self, path):
        self.file = open(path, "ab+")
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)

    def __call__(self, row):
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()


class Metrics:
    """metrics.jsonl: one line a step, {"stage", "step", ...}. Tensors become numbers here, so that one sync serves them all."""

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
    """State for an exact resume: what is given (state dicts, numbers), the config and the random streams. Complete or absent."""
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


def load_checkpoint(path, config, may_differ=("out", "steps", "device", "threads", "save_every")):
    """The saved state, with the random streams put back; None if there is none.

    Raises ValueError if the settings differ in anything but `may_differ`: the result would be neither run.
    """
    if not Path(path).exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    now = dataclasses.asdict(config)
    changed = [f"{k} was {v!r}, is {now.get(k)!r}" for k, v in state["config"].items() if now.get(k) != v and k not in may_differ]
    if changed:
        raise SystemExit(f"{path} was made with other settings ({'; '.join(changed)}). Give the same ones, another --out, or delete it.")
    torch.set_rng_state(state["streams"]["torch"])
    version, internal, gauss = json.loads(state["streams"]["python"])
    random.setstate((version, tuple(internal), gauss))
    if torch.cuda.is_available() and state["streams"]["cuda"]:
        torch.cuda.set_rng_state_all(state["streams"]["cuda"])
    return state


@contextlib.contextmanager
def interruptible():
    """Yields a function that says whether Ctrl-C or SIGTERM has come, so that a loop can finish its step and save. Twice ends at once."""
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

def need(path, script, config):
    """If `path` is missing, run the stage that makes it, with this run's common flags, and say so."""
    if Path(path).exists():
        return
    print(f"\n{path} is missing: running {script} first", flush=True)
    command = [sys.executable, str(Path(__file__).parent.parent / script)]
    for field in dataclasses.fields(Common):
        if field.name == "dry_run":                                # a stage that only estimates never comes here
            continue
        command += ["--" + field.name.replace("_", "-"), str(getattr(config, field.name))]
    child = subprocess.Popen(command)
    # Ctrl-C reaches the child too: let it save, and end when it has ended. SIGTERM reaches only us, and is passed on.
    before = {s: signal.signal(s, lambda number, frame: number == signal.SIGTERM and child.terminate())
              for s in (signal.SIGINT, signal.SIGTERM)}
    code = child.wait()
    for s, old in before.items():
        signal.signal(s, old)
    if code:
        sys.exit(code)
