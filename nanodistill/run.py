"""What every stage does around its own work: run folder, metrics, checkpoints.

All that a stage reads and writes lies in one run folder:

    settings.json                         every stage's settings (settings.py)
    inputs.json                           digests of what each artefact was made from
    teacher.jsonl  labels.jsonl           append-only; a torn last line is dropped and redone
    student.jsonl  metrics.jsonl
    rollouts.jsonl                        a few responses of each RL step, token by token
    sft/  rm/  rl/                        HF folders, and resume.pt while a stage is under way
    samples/  eval.jsonl                  what eval.py has sampled, by model and by question
    report.html  report.md  report.json  curves.png

One process at a time has the folder, and hands it on to the stages that it runs.
"""

import atexit
import copy
import dataclasses
import hashlib
import importlib
import json
import pickle
import random
import sys
import time
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

from nanodistill import files, fit, lora, losses, parallel, process, settings


def start(configs, stage):
    """Join the other processes, make the run folder, take it, write its settings, fix the threads,
    seed everything.

    Returns (folder Path, device, dtype of the arithmetic). Raises SystemExit where --tracker names
    no tracker.
    """
    config = configs[stage]
    folder, device = Path(config.out), fit.pick_device(config.device)
    parallel.start(device)
    if config.tracker:
        # The first process imports it, and the answer is all processes'.
        fault = parallel.gather("" if parallel.rank() else tracker_fault(config.tracker))[0]
        if fault:
            sys.exit(fault)
    folder.mkdir(parents=True, exist_ok=True)
    process.take(folder)
    if parallel.rank() == 0:
        settings.save(folder, stage, configs)
    if config.threads:
        torch.set_num_threads(config.threads)
    # Each stage has a random stream of its own.
    seed = random.Random(f"{stage} {config.seed}").getrandbits(32)
    random.seed(seed)
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    return folder, device, fit.pick_dtype(config.dtype, device)


def fitted(stage, config, model, dtype, device, prompt, response, batch=0, jobs=0, reference=None):
    """--slots, --micro-batch and --checkpoint as given, else the fastest that fit: a fit.Choice,
    the same in all processes.

    Args:
        prompt, response: tokens of the longest of each.
        batch: sequences per optimizer step.
        jobs: samples to be drawn.
        reference: of "rl", the Config of a reference that is not the student.
    Raises SystemExit with what would fit, where nothing does.
    """
    shards = config.shards or 1
    if parallel.world() % shards:
        sys.exit(f"--shards {shards} must divide the number of processes, which is "
                 f"{parallel.world()}: torchrun's --nproc-per-node (times its --nnodes)")
    if shards > 1 and config.lora:
        sys.exit(f"--shards {shards}: not with --lora, whose frozen weights are whole")
    try:
        choice = fit.choose(
            stage, model, dtype, min(parallel.gather(fit.free_bytes(device))), batch=batch,
            prompt=prompt, response=response, jobs=jobs, device=device.type, reference=reference,
            **fit.asked(config))
    except ValueError as error:
        sys.exit(str(error))
    print(f"{stage}: {choice.line}")
    return choice


def compile_layers(sequences, *models):
    """In fp32 on a CPU compiled layers take a fifth off a step of the tiny default, and half a
    minute once (docs/log.md): so where a stage sees so many sequences. weights.load does it for
    CUDA. In bf16 passes with and without gradients may round otherwise, which PPO's first ratio
    forbids; with adapters it gains nothing.
    """
    for model in models if sequences >= 20_000 else ():
        plain = model.model.dtype in (None, torch.float32) and not any(
            isinstance(m, lora.LoRALinear) for m in model.modules())
        weight = model.model.embed_tokens.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and plain:
            model.model.compiled = not losses.no_compiler("cpu")


def halve_when_full(work, size, *args):
    """`work(size, *args)`; where memory runs out, again with half the size. -> (result, size).

    size: the stage's --micro-batch. `work` must begin anew each time. Where size 1 is too much, or
    other processes with parts of the same weights are at work, the error stays: see process.guard.
    """
    while True:
        try:
            return work(size, *args), size
        except RuntimeError as error:
            if not process.memory_is_full(error) or size == 1 or parallel.splits():
                raise
        # Not inside `except`, where the traceback still holds the failed attempt's tensors.
        size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"\nout of memory: once more, and from here on, with --micro-batch {size}",
              file=sys.stderr)


class Bar(tqdm):
    """A progress bar that ends in [passed < left of the whole]; of several processes, the first's.
    """

    def __init__(self, *args, **kwargs):
        kwargs["disable"] = parallel.rank() > 0
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


# ---- metrics ----

class Metrics:
    """metrics.jsonl: measurements by stage and step, {"stage", "step", ...}.

    Tensors become numbers here, all in one wait. A stage that does not go on from a checkpoint
    starts `anew`, which a line of its own says: what came before is another run's.
    """

    def __init__(self, folder, stage, anew=True):
        self.stage, self.begun = stage, time.monotonic()
        self.append = (lambda row: None) if parallel.rank() else files.Appender(
            folder / "metrics.jsonl")
        self.track = tracking(folder, stage)
        if anew:
            self.append({"stage": stage, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

    def __call__(self, step, **values):
        tensors = {k: v for k, v in values.items() if isinstance(v, torch.Tensor)}
        if tensors:
            values |= zip(tensors, torch.stack([*tensors.values()]).tolist())
        self.append({"stage": self.stage, "step": step, **values})
        self.track(step=step, **values)
        return values

    def seconds(self, earlier=0.0):
        return earlier + time.monotonic() - self.begun


def tracker_fault(name):
    """Why --tracker can't be `name`, or ""."""
    if not all(part.isidentifier() for part in name.split(".")):
        return f"--tracker {name}: wants the name of a Python module, such as trackio"
    try:
        module = importlib.import_module(name)
    except Exception as error:                                   # whatever it raises
        return (f"--tracker {name}: it can't be imported ({type(error).__name__}: {error}). "
                '--tracker "" does without')
    lacks = [f for f in ("init", "log", "finish") if not callable(getattr(module, f, None))]
    return f"--tracker {name}: the module has no {', no '.join(lacks)}" if lacks else ""


def tracking(folder, stage):
    """-> track(**values), which hands them to the module of --tracker, under the keys STAGE/KEY.

    The first begins a run named FOLDER/STAGE there, which is finished when this process ends,
    unless it is killed. Steps go as values only: a resumed stage does some again, and trackers want
    them to rise. What the module raises is said once, and nothing more is handed to it.
    """
    config = settings.load(folder).get(stage, {})
    name, state = config.get("tracker"), "new"
    if not name or parallel.rank():
        return lambda **values: None

    def attempt(what, *args, **kwargs):
        nonlocal state
        try:
            if state != "broken":
                getattr(importlib.import_module(name), what)(*args, **kwargs)
        except Exception as error:                               # it must not end the training
            state = "broken"
            print(f"\n--tracker {name}: {what} failed ({type(error).__name__}: {error}), so it is "
                  "handed nothing more. metrics.jsonl has everything", file=sys.stderr)

    def track(**values):
        nonlocal state
        if state == "new":
            state = "begun"
            attempt("init", project="nanodistill", config=config,
                    name=f"{Path(folder).resolve().name}/{stage}")
            atexit.register(attempt, "finish")
        attempt("log", {f"{stage}/{key}": value for key, value in values.items()})
    return track


def read_metrics(folder, stage):
    """{step: values} of a stage's last start; where a resumed run did a step again, the later
    values count."""
    path, steps = Path(folder) / "metrics.jsonl", {}
    for row in files.read_jsonl(path, "stage"):
        if row["stage"] == stage and "started" in row:
            steps = {}
        elif row["stage"] == stage:
            if type(row.get("step")) is not int:
                sys.exit(f"{path}: a line of {stage} has no whole number as its step. Delete it.")
            steps.setdefault(row["step"], {}).update(row)
    return dict(sorted(steps.items()))


class Watch:
    """Stops a stage at the first number that is not finite: `watch(step, *tensors)`.

    It looks at all of a step's numbers when the next step's come: one wait per step. `settle` looks
    at the last ones, before anything is measured, and at all weights of the `models` to be saved.
    """

    def __init__(self, stage):
        self.stage, self.step, self.values = stage, 0, []

    def __call__(self, step, *values):
        if step != self.step:
            self.settle()
        self.step = step
        self.values += [v.detach().float() for v in values]

    def settle(self, *models):
        tensors = [torch.stack(self.values)] if self.values else []
        tensors += [parallel.own(p) for m in models for p in m.parameters()]
        self.values = []
        bad = tensors and not torch.stack([x.isfinite().all() for x in tensors]).all()
        # Of split weights each process sees its own.
        if parallel.any_(bool(bad)) if models else bad:
            raise FloatingPointError(
                f"{self.stage}: nan or inf in step {self.step}'s loss, gradients or weights: "
                f"stopped. Nothing of it was saved; a {self.stage}/resume.pt is of before it.\n"
                "Start again with a lower --learning-rate: in another --out, or without that file.")


# ---- what several processes write ----

def own_file(path):
    """The JSONL file that this process appends to: the first to `path`, others beside it."""
    return path.with_name(f"{path.name}.{parallel.rank()}") if parallel.rank() else path


def merge(path, key):
    """Append to `path` what other processes have written beside it, now or before they were
    stopped, less the rows whose `key(row)` it has. All wait until that is done."""
    # Whoever still writes waits here.
    parallel.gather(None)
    parts = sorted(path.parent.glob(f"{path.name}.[0-9]*"))
    if parts and parallel.rank() == 0:
        known, append = set(map(key, files.read_jsonl(path))), files.Appender(path)
        for part in parts:
            for row in files.read_jsonl(part):
                if key(row) not in known:
                    append(row)
            part.unlink()
    parallel.gather(None)


# ---- what an artefact was made from ----

def stale(folder):
    """What lies in the run folder and was made from other inputs than lie there now: messages."""
    found = []
    for name, inputs in _inputs(folder).items():
        there = folder / name
        if settings.begun(there):
            found += [f"{there} was made from another {folder / i} than lies there now. Delete "
                      f"{there} and what was made from it, or give another --out"
                      for i, was in inputs.items() if files.digest(folder / i) not in ("", was)]
    return found


def refuse_stale(folder):
    """Raises SystemExit with what is `stale`."""
    problems = stale(folder)
    if problems:
        sys.exit("\n".join(problems[:3]))


def made_from(folder, name, *inputs):
    """Write down, before `name` is made, what it is made from: names in the run folder or paths.

    Raises SystemExit if anything in the folder was made from other inputs than lie there now.
    """
    refuse_stale(folder)
    if not settings.begun(folder / name) and parallel.rank() == 0:
        now = {str(i): files.digest(folder / i) for i in inputs}
        files.write_atomic(folder / "inputs.json",
                           json.dumps({**_inputs(folder), name: now}, indent=1) + "\n")


def keep(folder, name):
    """Say that `name` in the run folder is whole, and stays.

    Raises SystemExit if anything in the folder was made from other inputs than lie there now.
    """
    refuse_stale(Path(folder))
    print(f"{Path(folder, name)} is complete; delete it to train again")


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
    """State for an exact resume, on any number of processes. The file is complete or absent.

    Args:
        parts: {name: model or optimizer}: what is trained of a model, an optimizer's state.
        state: numbers and tensors; the config is saved beside them. Random streams are not: all
            that is drawn follows from the seed, the step, and ids.
    """
    state |= {name: lora.trained(part) if isinstance(part, torch.nn.Module) else part.state_dict()
              for name, part in (parts or {}).items()}
    whole = parallel.to_save({**state, "config": dataclasses.asdict(config)})
    if parallel.rank():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(beside):
        with open(beside, "wb") as file:
            torch.save(whole, file)
    files.write_atomic(path, write)


def load_checkpoint(path, config, parts=None):
    """The saved state less `parts`, which are filled with theirs; None if there is none.

    Raises SystemExit if the file is damaged, or if the settings differ in what the result depends
    on: it would be neither run.
    """
    # The first process's view counts: a shared folder may show the others an older one.
    if not parallel.gather(Path(path).exists())[0]:
        return None
    try:
        with zipfile.ZipFile(path) as archive:                   # torch.load looks at no checksum
            if parallel.rank() == 0 and archive.testzip():
                raise ValueError
        # Mapped, where several processes read it.
        mapped = parallel.world() > 1
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        before, saved = state["config"], {name: state[name] for name in parts or {}}
        for name, value in saved.items():
            if isinstance(parts[name], torch.nn.Module):
                if value.keys() != lora.trained(parts[name]).keys():
                    raise ValueError
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
        if isinstance(parts[name], torch.nn.Module):
            put_back(parts[name], value)
        else:
            owners = [p for group in parts[name].param_groups for p in group["params"]]
            value["state"] = {i: {key: parallel.like(x, owners[i]) if torch.is_tensor(x) else x
                                  for key, x in of.items()} for i, of in value["state"].items()}
            parts[name].load_state_dict(value)
    # What stays must not be in a file that the next checkpoint replaces.
    return {name: copy.deepcopy(x) if mapped else x for name, x in state.items()
            if name not in saved}


def put_back(model, trained):
    """Load what is trained of a model from {name: tensor}, whole or split as the model is."""
    there = lora.trained(model)
    model.load_state_dict({name: parallel.like(x, there[name]) for name, x in trained.items()},
                          strict=False)


def every(minutes):
    """-> a function that is True when about `minutes` have gone by since it last was. All processes
    must ask, and get the same answer: their clocks differ."""
    last = time.monotonic()

    def due():
        nonlocal last
        if not parallel.any_(time.monotonic() - last >= 60 * minutes):
            return False
        last = time.monotonic()
        return True
    return due


def saver(path, config, parts, watch):
    """-> `save(stop, **state)`, which a loop calls once per step: a checkpoint of `parts` and
    `state` (see `save_checkpoint`) every --save-minutes, and in the end if any process is to stop.
    """
    due, models = every(config.save_minutes), [
        part for part in parts.values() if isinstance(part, torch.nn.Module)]

    def save(stop, **state):
        # `stop` is one asking: an interrupt between two would not be saved.
        stop = parallel.any_(stop)
        if stop or due():
            watch.settle(*models)
            save_checkpoint(path, config, parts, **state)
        if stop:
            # The first may be writing yet, and torchrun gives it half a minute once others end.
            parallel.gather(None)
            sys.exit("stopped after saving; the same command goes on from here")
    return save
