"""The benchmarks run, at sizes that say nothing of speed; and say what docs/speed.md says."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.name for path in (ROOT / "bench").glob("*.py") if path.name != "common.py")
HEAD = ["--tokens", "1024", "--hidden", "8", "--vocabulary", "2048"]
RUNS = {
    "losses.py": [*HEAD, "--rounds", "1"],
    "memory.py": [*HEAD, "--vocabularies", "2", "--lengths", "1"],
    "load.py": ["--model", str(ROOT / "data" / "tiny" / "student"), "--rounds", "1"],
    "generate.py": ["--load", "ragged", "--requests", "3", "--batch", "2", "--new-tokens", "4",
                    "--layers", "1", "--rounds", "1"]}
FIGURES = {"median", "ratio", "added_mib", "tokens_a_second", "beyond_gradients_mib"}


def run(name, *flags):
    # What is freed goes back at once: else a second run of so small a size adds nothing.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, ROOT / "bench" / name, *flags], capture_output=True,
                          text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the memory")
@pytest.mark.parametrize("name", RUNS)
def test_figures_are_finite_and_positive(name):
    lines = run(name, "--threads", "1", *RUNS[name]).splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    figures = {row["side"]: {key: row[key] for key in FIGURES & row.keys()} for row in rows}
    for side, values in figures.items():
        assert values and all(math.isfinite(v) and v > 0 for v in values.values()), (side, values)
    sides = {*figures}
    assert sides >= {"losses.py": {"three matrix products", "linear_cross_entropy", "naive",
                                   "four matrix products", "linear_logprobs with entropy"},
                     "memory.py": {"linear_cross_entropy", "naive"}}.get(name, {"nanodistill"})
    table = [line for line in lines if line.startswith("| ")]
    assert all(any(side in line for line in table) for side in sides)
    left_out = {line.split()[0] for line in lines if line.endswith("is not installed: left out")}
    peers = {"losses.py": {"cut_cross_entropy": "cut-cross-entropy, torch_compile",
                           "liger_kernel": "Liger, selective logprobs, no entropy"},
             "load.py": {"transformers": "transformers"},
             "generate.py": {"transformers": "Hugging Face generate"}}.get(name, {})
    for package, side in peers.items():
        assert (side in sides) != (package in left_out)


@pytest.mark.parametrize("name", FILES)
def test_docstring_quotes_the_page(name):
    doc = (ROOT / "bench" / name).read_text().split('"""')[1]
    speed = (ROOT / "docs" / "speed.md").read_text()
    figures = re.findall(r"\d[\d.]* (?:s|tokens a second|useful ones)\b|\+[\d,]+\d", doc)
    assert name in ("compare.py", "gpu.py", "memory.py", "plan.py") or figures
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.,]*\d)", speed), figure


@pytest.mark.parametrize("name", [name for name in FILES if name not in RUNS])
def test_the_others_start(name):
    assert "--threads" in run(name, "--help")


def test_commands_have_flags_that_there_are():
    common = (ROOT / "bench" / "common.py").read_text()
    for name in FILES:
        doc, source = (ROOT / "bench" / name).read_text().split('"""', 2)[1:]
        assert f"python bench/{name}" in doc
        known = re.findall(r'add_argument\("(--[\w-]+)"', common + source)
        assert {*re.findall(r"--[\w-]+", doc)} <= {*known}, name
