"""Kills at random moments of a small run: what comes out is what an undisturbed run gives.

    pytest -s -m slow tests/test_kills.py                     200 kills
    NANODISTILL_KILLS=20 pytest -s -m slow tests/test_kills.py    20, some minutes

Prints a line a run and, at its end, the table of docs/reliability.md.
"""

import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanodistill import files


ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("NANODISTILL_KILLS", "200"))
A_RUN = 5                                                        # kills before a run may end
FLAGS = ["--questions", "40", "--threads", "1", "--seed", "3", "--steps", "4", "--prompts", "32",
         "--teacher.samples", "4", "--rm.samples", "2", "--eval.samples", "2",
         "--sft.epochs", "2", "--sft.batch-size", "8", "--rm.batch-size", "8",
         "--sft.save-minutes", "0.002", "--rm.save-minutes", "0.002", "--save-minutes", "0.002"]
KINDS = [(number, group) for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT,
                                        signal.SIGHUP) for group in (False, True)]


def start(folder):
    """The run as a process; what it says on stderr goes to a file, for a pipe would fill up."""
    with open(f"{folder}.err", "w") as err:
        return subprocess.Popen([sys.executable, str(ROOT / "train_rl.py"), *FLAGS, "--out",
                                 str(folder)], cwd=ROOT, start_new_session=True,
                                stdout=subprocess.DEVNULL, stderr=err)


def said(folder):
    return Path(f"{folder}.err").read_text()


def final(folder):
    """What a run has made, as far as it should follow from its settings alone."""
    rows = {name: {row["id"]: row for row in files.read_jsonl(folder / name)}
            for name in ("teacher.jsonl", "labels.jsonl", "student.jsonl")}
    counts = {name: len(files.read_jsonl(folder / name)) for name in rows}
    weights = {f"{stage}/{name}": tensor.numpy().tobytes() for stage in ("sft", "rm", "rl")
               for name, tensor in load_file(folder / stage / "model.safetensors").items()}
    report = {**json.loads((folder / "report.json").read_text()), "seconds": None}
    leftovers = [str(p.relative_to(folder)) for p in folder.rglob("*")
                 if p.suffix == ".partial" or p.name in ("resume.pt", "teacher.part.jsonl")]
    return {"rows": rows, "counts": counts, "weights": weights, "report": report,
            "leftovers": leftovers}


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_gives_what_an_undisturbed_one_gives(tmp_path):
    begun = time.monotonic()
    assert start(tmp_path / "whole").wait(600) == 0, said(tmp_path / "whole")[-2000:]
    takes, expected = time.monotonic() - begun, final(tmp_path / "whole")
    rng, seen, bad, number = random.Random(0), collections.Counter(), [], 0
    while sum(seen.values()) < KILLS:
        folder, killed, number = tmp_path / f"run{number}", [], number + 1
        while len(killed) < A_RUN and sum(seen.values()) < KILLS:
            process = start(folder)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, 0.3 * takes))
            what, group = rng.choice(KINDS)
            if process.poll() is not None:                       # the run is over
                break
            (os.killpg if group else os.kill)(process.pid, what)
            kind = f"{signal.Signals(what).name}, {'group' if group else 'process'}"
            killed.append(kind)
            seen[kind] += 1
            process.wait(120)
            err = said(folder)
            if "Traceback" in err and "KeyboardInterrupt" not in err:
                bad.append((number, killed, err[-500:]))
        if start(folder).wait(600):
            bad.append((number, killed, said(folder)[-500:]))
            continue
        got = final(folder)
        differ = [key for key in expected if got[key] != expected[key]]
        print(f"run {number}: {'; '.join(killed)}: {f'{differ} differ' if differ else 'equal'}",
              flush=True)
        if differ:
            bad.append((number, killed, differ))
    print("| signal | kills |\n|---|---|")
    print("\n".join(f"| {kind} | {count} |" for kind, count in sorted(seen.items())))
    assert not bad, bad
