"""Several processes, started by torchrun as a user starts them, against one process.

They meet over gloo on the CPU. A run's numbers do not depend on how many they are.
"""

import fcntl
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_server import Server, completion

import eval as evaluation
import train_rl
import train_rm
import train_sft
from data import grading, hub, teacher
from nanodistill import files, parallel, process, run, weights


ROOT = Path(__file__).resolve().parents[1]
MAINS = {"teacher": teacher.main, "sft": train_sft.main, "rm": train_rm.main, "rl": train_rl.main,
         "eval": evaluation.main}
COMMON = ["--questions", "40", "--threads", "1", "--seed", "3", "--date", "2026-01-31"]
# Muon's products in bf16 magnify the rounding of the last bit.
FLAGS = {"teacher": ["--samples", "4"],
         "sft": ["--epochs", "1", "--batch-size", "7"],
         "rm": ["--samples", "2", "--batch-size", "9", "--evals", "2", "--optimizer", "adamw",
                "--learning-rate", "1e-3", "--rm-votes", "teacher"],
         "rl": ["--steps", "3", "--prompts", "20", "--ppo-epochs", "2"],
         "eval": ["--samples", "2"]}
STAGES = ("teacher", "sft", "rm", "rl", "eval")
# Runs stages one after another in processes that are started once. A stage is [name, flags], and
# with a third item it is asked to stop where its loop asks for the so-manieth time.
STAGES_WORKER = '''
import contextlib, json, sys
from test_parallel import MAINS
from nanodistill import process

def stops_after(n):
    @contextlib.contextmanager
    def interruptible():
        asked = iter(range(n))
        yield lambda: next(asked, None) in (None, n - 1)
    return interruptible

def main():
    # These follow one another here.
    process.need, real = lambda *_: None, process.interruptible
    for stage, flags, *stop in json.loads(sys.argv[1]):
        process.interruptible = stops_after(*stop) if stop else real
        try:
            MAINS[stage](flags)
        except SystemExit as error:
            if not (stop and "same command goes on" in str(error.code)):
                raise
process.guard(main)
'''


def slow(case):
    """A case that says little more than another one: the processes of a test take seconds each."""
    return pytest.param(*case, marks=pytest.mark.slow)


def environment():
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def torchrun(count, *command):
    """The start of a command for torchrun."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count),
            "--master-port", str(port), *map(str, command)]


def start(folder, count, *command, **env):
    """A command under torchrun, as a process; what it says goes to `folder`.log."""
    with open(f"{folder}.log", "w") as log:
        return subprocess.Popen(torchrun(count, *command), cwd=ROOT, start_new_session=True,
                                stdout=log, stderr=log, env={**environment(), **env})


def alive(word):
    """Numbers of the processes whose command line holds `word`, less this one's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            pass                                                 # it has ended
    return found


def ends(job, folder, seconds=90):
    """(exit status, what it said) of a job; ends all its processes if they do not end."""
    try:
        code = job.wait(seconds)
    except subprocess.TimeoutExpired:
        code = "it hangs"
        for number in alive(str(folder)):
            os.kill(number, signal.SIGKILL)
        job.kill()
        job.wait()
    return code, Path(f"{folder}.log").read_text()


def worker(tmp_path, source, count, *args, seconds=90, code=0):
    """Run the text of a script in so many processes, to this exit status; returns what they said.
    """
    script = tmp_path / "worker.py"
    script.write_text(source)
    ended, said = ends(start(tmp_path / "worker", count, script, *args), tmp_path / "worker",
                       seconds)
    assert ended == code, said[-3000:]
    return said


def flags(stage, folder, *more):
    return [stage, [*COMMON, *FLAGS[stage], "--out", str(folder), *more]]


def stages(tmp_path, count, *rows, seconds=90):
    """Run stages, each as `flags` gives it, in so many processes."""
    return worker(tmp_path, STAGES_WORKER, count, json.dumps(rows), seconds=seconds)


def copy(source, target, *names):
    """A new run folder with some of another's files."""
    target.mkdir()
    for name in names:
        (shutil.copytree if (source / name).is_dir() else shutil.copy)(source / name, target / name)
    return target


def in_this(monkeypatch, *rows):
    """Run stages in this process."""
    monkeypatch.setattr(process, "need", lambda *_: None)
    for stage, argv in rows:
        MAINS[stage](argv)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A whole run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_this(monkeypatch, *(flags(stage, folder) for stage in STAGES))
    return folder


def rows_of(path):
    """The lines of a JSONL file, sorted: their order is that in which samples end."""
    return sorted(path.read_text().splitlines())


# Rounding itself; and what magnifies it: a sum of many logprobs, a quotient, a norm.
ROUNDING, WITHIN = ("padding_gap", "sampler_gap", "sampler_kl"), {
    "kl": 1e-5, "approx_kl": 1e-5, "explained_variance": 1e-5, "grad_norm": 1e-5}


def expect_same_metrics(a, b, stage):
    a, b = run.read_metrics(a, stage), run.read_metrics(b, stage)
    assert a.keys() == b.keys() and a
    for step in a:
        ours, theirs = ({k: v for k, v in rows[step].items() if k not in (*ROUNDING, "seconds")}
                        for rows in (a, b))
        assert ours.keys() == theirs.keys()
        differ = {k: (v, theirs[k]) for k, v in ours.items()
                  if not near(v, theirs[k], WITHIN.get(k, 1e-6))}
        assert not differ, (stage, step, differ)


def near(a, b, within):
    return a == b or isinstance(a, float) and (
        math.isclose(a, b, abs_tol=within, rel_tol=within) or math.isnan(a) and math.isnan(b))


def expect_same_run(a, b):
    for name in ("teacher.jsonl", "labels.jsonl", "student.jsonl"):
        assert rows_of(a / name) == rows_of(b / name), name
    for stage in ("sft", "rm", "rl"):
        expect_same_metrics(a, b, stage)
    for name in ("teacher", "base", "sft", "rl"):
        a_rows, b_rows = (
            {row["id"]: [r["text"] for r in row["responses"]] for row in files.read_jsonl(
                folder / "samples" / f"{name}.jsonl")[1:] if row["what"].endswith("greedy")}
            for folder in (a, b))
        assert a_rows == b_rows and len(a_rows) == 40
    leftovers = [str(p) for p in b.rglob("*") if p.suffix == ".partial" or p.name == "resume.pt"
                 or p.name.rpartition(".jsonl.")[2].isdigit()]
    assert not leftovers


@pytest.mark.parametrize("count, shards", [
    (2, 1), *map(slow, [(4, 2), (4, 1), (2, 2), (4, 4), (3, 3)])])
def test_a_whole_run_gives_the_same(alone, tmp_path, count, shards):
    more = ["--shards", str(shards)]
    stages(tmp_path, count, *(flags(stage, tmp_path / "run", *more) for stage in STAGES))
    expect_same_run(alone, tmp_path / "run")


# What leaves processes without a row: one item in each step, or fewer questions than processes.
FEW = {"sft": ["--batch-size", "1", "--epochs", "0.15"],
       "rm": ["--batch-size", "1", "--epochs", "0.06"],
       "rm ": ["--batch-size", "2", "--epochs", "0.3", "--rm-loss", "bt"],
       "rl": ["--prompts", "2", "--steps", "2", "--minibatches", "2", "--ppo-epochs", "1"],
       "rl  ": ["--prompts", "10", "--steps", "2", "--algorithm", "grpo", "--samples", "2",
                "--reward", "self"],
       "rl ": ["--prompts", "20", "--steps", "2", "--kl-limit", "1e-4", "--minibatches", "5"]}
INPUTS = {"sft": ["teacher.jsonl", "labels.jsonl"],
          "rm": ["teacher.jsonl", "labels.jsonl", "sft", "student.jsonl"],
          "rl": ["labels.jsonl", "sft", "rm"]}


def few(alone, folder, *more):
    """Stages on copies of `alone`, each in a folder of its own."""
    folder.mkdir()
    return [flags(name.strip(), copy(alone, folder / name.replace(" ", "2"), *INPUTS[name.strip()]),
                  *own, *more) for name, own in FEW.items()]


@pytest.fixture(scope="module")
def few_alone(alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("few") / "runs"
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_this(monkeypatch, *few(alone, folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("count, shards", [(3, 3), (3, 1), (4, 2)])
def test_processes_without_a_row_wait_for_none(alone, few_alone, tmp_path, count, shards):
    rows = few(alone, tmp_path / "runs", "--shards", str(shards))
    stages(tmp_path, count, *rows)
    for name in FEW:
        folder = name.replace(" ", "2")
        expect_same_metrics(few_alone / folder, tmp_path / "runs" / folder, name.strip())
    updates = [row["updates"] for row in run.read_metrics(tmp_path / "runs" / "rl2", "rl").values()
               if "updates" in row]
    # An update beyond the limit is not made, and ends the step before the fifth minibatch.
    assert len(updates) == 2 and 1 < updates[0] < 5


def test_items_are_dealt_out_by_hand(monkeypatch):
    def of(rank, items, size, world=3):
        monkeypatch.setattr(parallel, "rank", lambda: rank)
        monkeypatch.setattr(parallel, "world", lambda: world)
        return list(parallel.micro_batches(items, size))

    # Two passes each; what is left to nobody is the first item, times 0.
    assert of(0, "abcd", 1) == [("a", 1), ("d", 1)]
    assert of(1, "abcd", 1) == [("b", 1), ("a", 0)]
    assert of(2, "abcd", 1) == [("c", 1), ("a", 0)]
    # Fewer than processes, and none.
    assert [of(r, [7], 4) for r in range(3)] == [[([7], 1)], [([7], 0)], [([7], 0)]]
    assert of(2, [], 4) == []
    # Two at a time: 0, 3, 6 to the first; 1, 4 to the second.
    assert of(0, [*range(7)], 2) == [([0, 3], 1), ([6], 1)]
    assert of(1, [*range(7)], 2) == [([1, 4], 1), ([0], 0)]
    assert of(0, [*range(4)], 3, world=1) == [([0, 1, 2], 1), ([3], 1)]


# ---- stopped and resumed ----

def stopped(alone, folder, *more):
    """Stages on copies of `alone`, each told to stop in its second step or later."""
    folder.mkdir()
    return [(*flags(s, copy(alone, folder / s, *INPUTS[s]), *more), n)
            for s, n in (("sft", 8), ("rm", 13), ("rl", 2))]


@pytest.mark.parametrize("shards, then", [(2, 1), *map(slow, [(1, 1), (1, 4), (2, 4), (2, 3)])])
def test_what_two_processes_left_goes_on_in_another_number(alone, tmp_path, monkeypatch, shards,
                                                           then):
    rows = stopped(alone, tmp_path / "runs", "--shards", str(shards))
    stages(tmp_path, 2, *rows)
    for stage, *_ in rows:
        assert (tmp_path / "runs" / stage / stage / "resume.pt").exists()
        assert not list((tmp_path / "runs" / stage / stage).glob("*.safetensors"))
    # As many shards as processes, or whole weights.
    rest = [flags(stage, tmp_path / "runs" / stage, "--shards", str(then if shards > 1 else 1))
            for stage, *_ in rows]
    in_this(monkeypatch, *rest) if then == 1 else stages(tmp_path, then, *rest)
    for stage, *_ in rows:
        expect_same_metrics(alone, tmp_path / "runs" / stage, stage)


# The clocks of two processes never agree: here that of the second stands still.
ONE_CLOCK_STANDS = '''
import types
from nanodistill import parallel, run
if parallel.rank():
    run.time = types.SimpleNamespace(monotonic=lambda: 0.0, strftime=run.time.strftime)
'''


@pytest.mark.slow
@pytest.mark.parametrize("shards", [2, 1])
def test_checkpoints_by_the_clock_are_written_by_all_at_once(alone, tmp_path, shards):
    folder = copy(alone, tmp_path / "run", *INPUTS["sft"])
    more = ["--shards", str(shards), "--save-minutes", "1e-5"]
    worker(tmp_path, ONE_CLOCK_STANDS + STAGES_WORKER, 2,
           json.dumps([flags("sft", folder, *more)]))
    expect_same_metrics(alone, folder, "sft")


def begun(alone, tmp_path, script="train_rl.py", depth=3):
    """Two processes of a script, which have each started the stage before it, and so on to
    train_sft.py, which has done some steps -> (torchrun, run folder)."""
    folder = copy(alone, tmp_path / "run", "teacher.jsonl", "labels.jsonl")
    job = start(tmp_path / "run", 2, ROOT / script, *COMMON, "--sft.epochs", "9",
                "--sft.batch-size", "7", "--out", folder)
    until = time.monotonic() + 60
    while not any(step >= 10 for step in run.read_metrics(folder, "sft")) and job.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert len(alive(str(folder))) == 2 * depth + 1
    return job, folder


@pytest.mark.parametrize("script, depth", [("train_rm.py", 2), slow(("train_rl.py", 3))])
def test_a_signal_to_torchrun_saves_once_and_leaves_no_process(alone, tmp_path, script, depth):
    job, folder = begun(alone, tmp_path, script, depth)
    job.terminate()
    code, said = ends(job, folder, 20)
    assert code == 1 and not alive(str(folder))
    for words in ("stopping after this step", "stopped after saving; the same command goes on"):
        assert said.count(words) == 1
    # Not a word of another process's failure.
    assert "[rank" not in said and (folder / "sft" / "resume.pt").exists()


@pytest.mark.slow
def test_when_one_process_dies_all_end_and_the_rest_goes_on_from_what_was_saved(alone, tmp_path):
    job, folder = begun(alone, tmp_path)
    of_second = [number for number in alive(str(folder)) if b"train_sft.py" in Path(
        f"/proc/{number}/cmdline").read_bytes() and b"\0RANK=1\0" in Path(
        f"/proc/{number}/environ").read_bytes()]
    os.kill(*of_second, signal.SIGKILL)
    code, said = ends(job, folder, 40)
    assert code == 1 and said.count("Another of the processes has ended") == 1
    assert "[rank" not in said
    until = time.monotonic() + 10
    while alive(str(folder)):
        assert time.monotonic() < until
        time.sleep(0.1)
    # The same command, on another number of processes.
    job = start(tmp_path / "run", 3, ROOT / "train_sft.py", "--out", folder)
    code, said = ends(job, folder, 60)
    assert code == 0 and weights.complete(folder / "sft")


@pytest.mark.parametrize("count, more, says", [
    slow((3, ["--shards", "2"], "--shards 2 must divide the number of processes, which is 3")),
    (1, ["--shards", "2"], "--shards 2 must divide the number of processes, which is 1"),
    slow((2, ["--shards", "2", "--lora", "4"], "--shards 2: not with --lora"))])
def test_what_cannot_be_split_is_said(alone, tmp_path, count, more, says):
    folder = copy(alone, tmp_path / "run", *INPUTS["sft"])
    said = worker(tmp_path, STAGES_WORKER, count, json.dumps([flags("sft", folder, *more)]), code=1)
    assert said.count(says) == 1 and "[rank" not in said


@pytest.mark.slow
def test_when_torchrun_dies_its_processes_save_and_end(alone, tmp_path):
    job, folder = begun(alone, tmp_path)
    job.kill()
    job.wait()
    until = time.monotonic() + 30
    while alive(str(folder)):
        assert time.monotonic() < until
        time.sleep(0.1)
    said = Path(f"{folder}.log").read_text()
    assert said.count("stopped after saving; the same command goes on") == 1
    assert (folder / "sft" / "resume.pt").exists()


# The second process's memory runs out where it scores the held-out responses of the student.
ONE_IS_FULL = """
import torch
from nanodistill import parallel, reward
score, calls = reward.score, []
def full(model, rows):
    calls.append(len(rows))
    if parallel.rank() and len(calls) == 2:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return score(model, rows)
reward.score = full
"""


@pytest.mark.slow
def test_where_one_process_runs_out_of_memory_it_alone_begins_anew(alone, tmp_path):
    folder = copy(alone, tmp_path / "run", *INPUTS["rm"])
    said = worker(tmp_path, ONE_IS_FULL + STAGES_WORKER, 2, json.dumps([flags("rm", folder)]))
    assert said.count("out of memory: once more, and from here on, with --micro-batch 4") == 1
    expect_same_metrics(alone, folder, "rm")


# ---- the run folder, and what lies in it ----

def test_a_folder_that_another_run_has_is_left_alone(alone, tmp_path):
    folder = copy(alone, tmp_path / "run", "teacher.jsonl", "labels.jsonl")
    (folder / "teacher.jsonl.1").write_text('{"id": "torn')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with open(folder / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 7 on a host")
        lock.flush()
        impatient = "from nanodistill import process\nprocess.take.__defaults__ = (0.5,)\n"
        said = worker(tmp_path, impatient + STAGES_WORKER, 2,
                      json.dumps([flags("teacher", folder)]), code=1)
    assert said.count("is in use by process 7 on a host: wait for it") == 1
    assert "[rank1]" not in said and "RuntimeError" not in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()
            if path.name != ".lock"} == before


@pytest.mark.parametrize("stage, name", [("teacher", "teacher.jsonl"), ("eval", "samples"),
                                         slow(("rm", "student.jsonl"))])
def test_what_three_processes_left_half_done_one_goes_on_from(alone, tmp_path, monkeypatch, stage,
                                                              name):
    inputs = {**INPUTS, "teacher": [], "rm": INPUTS["rm"][:-1], "eval": ["rl"]}[stage]
    folder = copy(alone, tmp_path / "run", *inputs)
    more = ["--models", str(folder / "rl")] if stage == "eval" else []
    source = STAGES_WORKER
    if stage == "eval":                                          # it has no loop that asks
        source = DIES_AFTER_TEN + source
    asked = flags(stage, folder, *more)
    worker(tmp_path, source, 3, json.dumps([asked if stage == "eval" else (*asked, 10)]),
           code=1 if stage == "eval" else 0)
    file, = folder.glob("samples/*.jsonl") if stage == "eval" else [folder / name]
    parts = sorted(file.parent.glob(f"{file.name}.*"))
    if stage == "eval":
        # Each of them ended where it was.
        assert len(parts) == 2
        torn = parts[0]
    else:
        # They merged what they had before they ended; a kill would have left it so:
        assert not parts and 3 <= len(rows_of(file)) < 36
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:1]))
        torn = file.with_name(f"{file.name}.1")
        # Two parts, one line of them there already.
        torn.write_text("".join(lines[1:-1]))
        file.with_name(f"{file.name}.2").write_text(lines[0] + lines[-1])
    with open(torn, "a") as part:
        part.write('{"id": "to')
    before = {json.dumps(json.loads(line)) for part in (torn, file) for line in
              part.read_text().splitlines() if line != '{"id": "to'}
    in_this(monkeypatch, asked)
    assert not list(file.parent.glob(f"{file.name}.*"))
    after = [json.dumps(json.loads(line)) for line in file.read_text().splitlines()]
    assert before <= set(after) and len(after) == len(set(after))
    if stage == "eval":
        said, expected = ({(row["what"].split(", ")[-1], row["id"]): [
            r["text"] for r in row["responses"]] for row in files.read_jsonl(path)[1:]}
            for path in (file, alone / "samples" / "rl.jsonl"))
        assert len(said) == 80 and said.items() <= expected.items()
    else:
        assert rows_of(file) == rows_of(alone / name)


# Ends a process, as a kill does, when it has written ten lines.
DIES_AFTER_TEN = '''
import os
from nanodistill import files
write, lines = files.Appender.__call__, []
def counted(self, row):
    write(self, row)
    if "what" in row:
        lines.append(row)
        if len(lines) == 10:
            os._exit(1)
files.Appender.__call__ = counted
'''


def test_more_samples_of_a_question_count_whoever_drew_them(tmp_path):
    samples = object.__new__(grading.Samples)
    samples.file = tmp_path / "rl.jsonl"
    rows = [{"seed": 1}] + [{"what": "sampled", "id": id_, "responses": [0] * n}
                            for id_, n in [("a", 2), ("b", 2), ("a", 4)]]
    samples.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = tmp_path / "rl.jsonl.1"
    part.write_text(json.dumps({"what": "sampled", "id": "b", "responses": [1] * 4}) + "\n")
    samples.read()
    assert samples.rows == {("sampled", "a"): [0] * 4, ("sampled", "b"): [1] * 4}
    assert not part.exists()


# ---- split weights ----

# Prints a line of JSON per case: what differs between split weights and those of one process.
SPLIT_WORKER = '''
import json, random, sys
from pathlib import Path
import torch
import train_rm, train_sft
from conftest import random_model
from nanodistill import optim, parallel, weights
from nanodistill.model import CausalLM, ScalarModel
from types import SimpleNamespace

folder, student = map(Path, sys.argv[1:3])
device = torch.device("cpu")
parallel.start(device)
rng = random.Random(0)
# Nine rows: five to the first, four to the second, then a filler.
pairs = [([rng.randrange(4, 96) for _ in range(rng.randrange(2, 9))],
          [rng.randrange(4, 96) for _ in range(rng.randrange(1, 9))]) for _ in range(9)]
examples = [train_rm.Example("q", len(a), a + b, bool(i % 3)) for i, (a, b) in enumerate(pairs)]

def distance(a, b):
    """Of all of a to all of b, relative."""
    far, size = (torch.cat([x.flatten() for x in of]).norm().item() for of in (
        [a[n] - b[n] for n in b], b.values()))
    return far / size

def gradients(kind, model, rows, split):
    optimizer = torch.optim.AdamW(optim.groups(model.parameters()), lr=1e-2)
    tokens = sum(len(b) for _, b in pairs)
    if split and kind is CausalLM:
        loss = train_sft.gradients(2, model, optimizer, pairs)
    elif split:
        config = SimpleNamespace(rm_loss="bce", token_loss=0.5)
        loss = train_rm.gradients(2, config, model, [optimizer], examples)
    else:
        # Two rows at a time too: sums of bf16 gradients round alike.
        loss = 0.0
        for k in range(0, 9, 2):
            part = (train_sft.summed_loss(model, pairs[k:k + 2], tokens) if kind is CausalLM else
                    train_rm.summed_bce(model, examples[k:k + 2], 9, tokens, 0.5))
            part.backward()
            loss += part.item()
    return float(loss), optimizer, {
        n: parallel.whole(p.grad).double() for n, p in model.named_parameters()}

for case in sys.argv[3].split():
    name, tied, kind, how = case.split("-")
    kind = {"lm": CausalLM, "scalar": ScalarModel}[kind]
    source = folder / f"{name}-{tied}-{kind.__name__}"
    model = random_model(kind, vocab_size=448, num_hidden_layers=3, model_type=name,
                         tie_word_embeddings=tied == "tied")
    weights.save(model, source, student)
    dtype = torch.bfloat16 if "bf16" in how else torch.float32
    exact = gradients(kind, weights.load_to_train(source, kind, device, torch.float32), pairs, 0)
    one = weights.load_to_train(source, kind, device, dtype)
    many = weights.load_to_train(source, kind, device, dtype, 0, 2)
    one.model.checkpoint = many.model.checkpoint = "again" in how
    one.model.compiled = many.model.compiled = "compiled" in how
    a, b = gradients(kind, one, pairs, 0), gradients(kind, many, pairs, 1)
    said = {"case": case, "loss": abs(a[0] - b[0]), "gradient": distance(b[2], a[2]),
            "one": distance(a[2], exact[2]), "many": distance(b[2], exact[2]),
            "each": sum(parallel.own(p).numel() for p in many.parameters()),
            "all": sum(p.numel() for p in one.parameters())}
    if "compiled" in how:
        import torch._dynamo.utils as dynamo
        said["compiled"] = dict(dynamo.counters["stats"])
        said["breaks"] = dict(dynamo.counters["graph_break"])
    # A step each, then the weights.
    norm = optim.clipped_step(many, [b[1]], 1.0)
    parallel.sum_gradients, real = lambda model: None, parallel.sum_gradients
    said["norm"] = abs(norm / optim.clipped_step(one, [a[1]], 1.0) - 1).item()
    parallel.sum_gradients = real
    whole = {n: parallel.whole(p) for n, p in many.named_parameters()}
    said["step"] = max((whole[n] - p).abs().max().item() for n, p in one.named_parameters())
    if kind is CausalLM:
        said["tied"] = many.lm_head.weight is many.model.embed_tokens.weight
    weights.save(many, folder / case, student)
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        split = many(ids)
        saved = weights.load(folder / case, kind, dtype=torch.float32)
        saved.model.dtype = dtype
        said["saved"] = (saved(ids) - split).abs().max().item()
    if parallel.rank() == 0:
        print(json.dumps(said), flush=True)
'''


def split(tmp_path, *cases):
    said = worker(tmp_path, SPLIT_WORKER, 2, tmp_path, hub.TINY / "student", " ".join(cases))
    return {row["case"]: row for row in map(json.loads, (
        line for line in said.splitlines() if line.startswith('{"case"')))}


def test_split_weights_learn_and_are_saved_as_whole_ones(tmp_path):
    rows = split(tmp_path, "llama-tied-lm-fp32", "qwen3-untied-lm-fp32", "qwen2-tied-lm-fp32again",
                 "llama-untied-lm-fp32again", "llama-untied-scalar-fp32", "llama-tied-lm-bf16",
                 "qwen3-untied-lm-bf16again", "qwen2-untied-scalar-bf16")
    assert len(rows) == 8
    for case, row in rows.items():
        assert row.get("tied", False) == ("-tied-lm" in case)
        # Each process keeps a half, and of dimensions that are odd a little more.
        assert row["each"] < 0.51 * row["all"]
        if "fp32" in case:
            assert row["loss"] < 1e-6 and row["gradient"] < 1e-6 and row["norm"] < 1e-6
            # AdamW's first step is the rate, 0.01, whatever the gradient, but where that is
            # rounding: 1e-8 is added to it.
            assert row["step"] < 1e-4 and row["saved"] < 1e-6
        else:
            assert 0 < row["many"] <= 1.25 * row["one"]
    # The oracle reads what was saved.
    transformers = pytest.importorskip("transformers")
    ids = torch.arange(4, 24).view(2, 10)
    for case in ("llama-tied-lm-fp32", "qwen3-untied-lm-fp32"):
        oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / case,
                                                                   dtype=torch.float32)
        with torch.no_grad():
            assert (oracle(ids).logits - weights.load(tmp_path / case)(ids)).abs().max() <= 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
def test_split_weights_with_compiled_layers(tmp_path):
    row, = split(tmp_path, "llama-untied-lm-fp32compiled").values()
    assert row["loss"] < 1e-6 and row["gradient"] < 1e-5 and row["saved"] < 1e-5
    # What is before and what is after attention, of whole layers and of split ones: all three
    # layers run the same, and nothing breaks a graph.
    assert row["compiled"]["unique_graphs"] == 4 and not row["breaks"]


# ---- whom each process asks, and what it adapts ----

def test_a_server_is_asked_once_per_sample_in_all(tmp_path):
    server = Server(lambda request, number: completion(
        *[{"content": "#### 7"}] * request.get("n", 1)))
    folder = tmp_path / "run"
    try:
        stages(tmp_path, 2, ["teacher", [
            *COMMON[2:], "--questions", "12", "--samples", "3", "--out", str(folder),
            "--teacher-url", server.url, "--teacher-model", "m"]])
    finally:
        server.close()
    asked = [request["messages"][0]["content"] for request in server.requests
             for _ in range(request.get("n", 1))]
    assert len(asked) == 36 and len(set(asked)) == 12
    assert len(rows_of(folder / "teacher.jsonl")) == len(rows_of(folder / "labels.jsonl")) == 12
    assert not list(folder.glob("*.1")) and not (folder / "teacher.part.jsonl").exists()


@pytest.mark.slow
def test_adapters(alone, tmp_path, monkeypatch):
    one, two, cut = (tmp_path / name for name in ("one", "two", "cut"))
    lora = {"sft": ["--lora", "4"], "rm": ["--lora", "4"], "rl": ["--lora", "4"]}
    for folder in (one, two):
        copy(alone, folder, *INPUTS["sft"])
    in_this(monkeypatch, *(flags(stage, one, *more) for stage, more in lora.items()))
    # SFT stops and goes on.
    asked = [flags(stage, two, *more) for stage, more in lora.items()]
    said = worker(tmp_path, DIGESTS + STAGES_WORKER, 2, json.dumps([(*asked[0], 7), *asked]))
    for stage in lora:
        expect_same_metrics(one, two, stage)
        ours, theirs = (load_file(folder / stage / "adapter" / "adapter_model.safetensors")
                        for folder in (one, two))
        # PPO's rate is 2e-3: a step of it where a gradient is but rounding.
        assert ours.keys() == theirs.keys() and all(
            torch.allclose(ours[name], theirs[name], atol=5e-4) for name in ours)
    digests = [line.split()[1:] for line in said.splitlines() if line.startswith("digest")]
    # Of SFT, the reward model, the policy: once in each process.
    assert len(digests) == 6 and all(digests.count(d) == 2 for d in digests)


# Each process says what its adapters are when they are saved.
DIGESTS = """
import hashlib, os, sys
from nanodistill import lora, weights
real = weights.save
def save(model, folder, *args, **kwargs):
    tensors = b"".join(p.detach().numpy().tobytes() for p in lora.trained(model).values())
    os.write(2, f"digest {folder} {hashlib.sha256(tensors).hexdigest()}\\n".encode())
    real(model, folder, *args, **kwargs)
weights.save = save
"""


def test_torchrun_of_one_process(alone, tmp_path):
    folder = copy(alone, tmp_path / "run", *INPUTS["sft"])
    code, said = ends(start(tmp_path / "run", 1, ROOT / "train_sft.py", *flags("sft", folder)[1]),
                      folder)
    assert code == 0, said[-2000:]
    # Bit for bit.
    ours, theirs = (load_file(f / "sft" / "model.safetensors") for f in (alone, folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
