"""The commands that test_readme.py finds are run, on finished runs of 80 questions; each that is
left out is named with the reason.

    pytest -s -m slow tests/test_commands.py     half an hour on one core
"""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from test_readme import COMMANDS, README, ROOT, SCRIPTS


# {what a command begins with: the flags that make it small}; the longest that fits counts.
TEACHER = "--teacher.questions 80"
SFT = f"{TEACHER} --sft.epochs 1 --sft.batch-size 16"
RM = f"{SFT} --rm.epochs 0.5 --rm.batch-size 16"
EVAL = "--eval.questions 40"
SMALL = {
    "data/teacher.py": "--questions 80",
    "train_sft.py": f"{TEACHER} --epochs 1 --batch-size 16",
    "train_rm.py": f"{SFT} --epochs 0.5 --batch-size 16",
    "train_rl.py": f"{RM} --steps 2 --prompts 32 {EVAL}",
    "eval.py": "--questions 40",
    "data/tiny/facts.py": "--least 1",
    "-m": "", "data/": "", "docs/museum.py": "",
}
LEFT_OUT = {
    r"--student (135m|1b|8b)(?!.*--dry-run)": "weights of the hub, or a server",
    "mmlu_pro": "rows of the hub",
    "data/gsm8k.py": "rows of the hub",
    "-m nanodistill.generate$": "a name",
    "bench/compare.py": "hours; test_compare.py walks through its arms",
    "bench/gpu.py": "a card",
    "bench/(?!compare|gpu)": "test_bench.py runs it",
    "docs/museum.py --base out/s25( --out out/museum)?$": "half an hour",
    "tests/mutations.py": "an hour",
}
RUN = [command for command in COMMANDS
       if not any(re.search(pattern, command) for pattern in LEFT_OUT)]


def python(tree, *flags, given=""):
    env = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *flags], cwd=tree, env=env, input=given, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the repository, so that no picture of its own is overwritten, with finished runs
    under the names that the pages use."""
    tree = tmp_path_factory.mktemp("tree") / "nanodistill"
    ignored = shutil.ignore_patterns(".git", "out", "__pycache__", ".venv")
    shutil.copytree(ROOT, tree, ignore=ignored)
    small = SMALL["train_rl.py"].split()
    python(tree, "train_rl.py", *small)
    for seed in "21", "25":
        python(tree, "train_rl.py", *small, "--seed", seed, "--rm.rm-votes", "teacher", "--out",
               f"out/s{seed}")
    for seed in 2, 5:
        shutil.copytree(tree / "out" / "arithmetic-tiny", f"{tree}/out/arithmetic-tiny-seed{seed}")
    return tree


def test_each_command_is_run_or_left_out_for_a_reason():
    assert len(RUN) > 30
    for pattern in LEFT_OUT:
        assert any(re.search(pattern, command) for command in COMMANDS), pattern


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_it_runs(tree, command):
    script, *flags = shlex.split(command.replace("FOLDER", "out/arithmetic-tiny"))
    small = SMALL[max((name for name in SMALL if script.startswith(name)), key=len)].split()
    if script in {*SCRIPTS} - {"eval.py"} and "--dry-run" not in flags:
        # Else it would find a finished stage and be done.
        flags += ["--out", f"out/{RUN.index(command)}"]
    # What the command says itself comes last.
    said = python(tree, script, *small, *flags, given="Ann has 7 pens. How many pens?\n")
    assert said.strip()


@pytest.mark.slow
def test_a_function_as_the_reward(tree):
    start = README.index("    import train_rl")
    lines = [line[4:] for line in README[start:README.index("**Try it**")].splitlines()]
    call = next(i for i, line in enumerate(lines) if line.startswith("process.guard"))
    lines.insert(call, f"flags += {SMALL['train_rl.py'].split()}")
    (tree / "five.py").write_text("\n".join(lines))
    python(tree, "five.py")
    assert (tree / "out" / "short" / "report.html").exists()
