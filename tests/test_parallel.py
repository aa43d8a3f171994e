"""Several processes, started by torchrun as a user starts them, against one process.

They meet over gloo on the CPU. A run's numbers do not depend on how many they are.
"""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import train_rl
import train_rm
import train_sft
from data import teacher
from nanodistill import files, parallel, process, run


ROOT = Path(__file__).resolve().parents[1]
MAINS = {"teacher": teacher.main, "sft": train_sft.main, "rm": train_rm.main, "rl": train_rl.main,
         "eval": evaluation.main}
COMMON = ["--questions", "40", "--threads", "1", "--seed", "3", "--date", "2026-01-31"]
# Muon's products in bf16 magnify the rounding of the last bit.
FLAGS = {"teacher": ["--samples", "4"],
         "sft": ["--epochs", "1", "--batch-size", "7"],
         "rm": ["--samples", "2", "--batch-size", "9", "--evals", "2", "--optimizer", "adamw",
                "--learning-rate", "1e-3"],
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


def worker(tmp_path, source, count, *args, seconds=90):
    """Run the text of a script in so many processes; returns what they said."""
    script = tmp_path / "worker.py"
    script.write_text(source)
    code, said = ends(start(tmp_path / "worker", count, script, *args), tmp_path / "worker",
                      seconds)
    assert code == 0, said[-3000:]
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


# Rounding itself; and what magnifies it: of each response's logprobs the sum, of values a quotient.
ROUNDING, WITHIN = ("padding_gap", "sampler_gap", "sampler_kl"), {
    "kl": 1e-5, "explained_variance": 1e-5}


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
    (2, 1), (4, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        (4, 1), (2, 2), (4, 4), (3, 3)])])
def test_a_whole_run_gives_the_same(alone, tmp_path, count, shards):
    more = ["--shards", str(shards)]
    stages(tmp_path, count, *(flags(stage, tmp_path / "run", *more) for stage in STAGES))
    expect_same_run(alone, tmp_path / "run")


# What leaves processes without a row: one item in each step, or fewer questions than processes.
FEW = {"sft": ["--batch-size", "1", "--epochs", "0.15"],
       "rm": ["--batch-size", "1", "--epochs", "0.06"],
       "rm ": ["--batch-size", "2", "--epochs", "0.3", "--rm-loss", "bt"],
       "rl": ["--prompts", "2", "--steps", "2", "--minibatches", "2", "--ppo-epochs", "1"],
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


@pytest.mark.parametrize("count, shards", [(3, 1), (3, 3), pytest.param(
    4, 2, marks=pytest.mark.slow)])
def test_processes_without_a_row_wait_for_none(alone, few_alone, tmp_path, count, shards):
    rows = few(alone, tmp_path / "runs", "--shards", str(shards))
    stages(tmp_path, count, *rows)
    for name in FEW:
        folder = name.replace(" ", "2")
        expect_same_metrics(few_alone / folder, tmp_path / "runs" / folder, name.strip())
    updates = [row["updates"] for row in run.read_metrics(tmp_path / "runs" / "rl2", "rl").values()
               if "updates" in row]
    # An update beyond the limit is not made, and ends the step before the fifth minibatch.
    assert len(updates) == 2 and all(1 < n < 5 for n in updates)


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
