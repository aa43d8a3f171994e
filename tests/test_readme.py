"""What the README and the pages in docs/ name exists: their commands start, files and links are
there. docs/log.md tells of the past, and is left out.

test_commands.py runs them.
"""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
         if path.name != "log.md"}
SCRIPTS = ("train_sft.py", "train_rm.py", "train_rl.py", "eval.py", "data/teacher.py")
DOCSTRINGS = "".join((ROOT / name).read_text().split('"""')[1] for name in (
    *SCRIPTS, "data/tiny/curves.py", "data/tiny/facts.py", "docs/museum.py", "nanodistill/ask.py",
    "nanodistill/report.py"))
COMMANDS = sorted(set(re.findall(
    r"python ((?:-m [\w.]+|[\w/]+\.py)[^`\n&|<]*?)(?: {2,}|`|\n| [&<])",
    "".join(PAGES.values()) + DOCSTRINGS)))
# It has no flags.
PLAIN = "-m tests.test_method out/s21"


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {PLAIN}))
def test_command_is_known_to_its_script(command):
    """`--help` behind the command's own flags: argparse rejects an unknown flag or a wrong value
    before it prints the help."""
    done = subprocess.run([sys.executable, *shlex.split(command), "--help"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    known = re.findall(r"--[\w-]+", done.stdout)
    assert set(re.findall(r"--[\w-]+", command)) <= set(known)


def test_the_main_commands_are_among_them():
    assert {*SCRIPTS} <= {c.split()[0] for c in COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_links_to_exist(page):
    for name in re.findall(r"\]\(((?!http)[^)#]+)", PAGES[page]):
        assert (page.parent / name).exists(), name


def test_the_five_lines_run_beside_a_copied_file(tmp_path):
    start = README.index("    from ppo import")
    lines = [line[4:] for line in README[start:README.index("## Status")].splitlines()]
    (tmp_path / "ppo.py").write_bytes((ROOT / "nanodistill" / "ppo.py").read_bytes())
    (tmp_path / "five.py").write_text("\n".join([
        "import torch", "mask = torch.tensor([[True] * 3, [True, True, False]])",
        "scores = torch.randn(2)",
        "logprobs, ref_logprobs, values = torch.randn(3, 2, 3)",
        "new_logprobs = logprobs.clone().requires_grad_()", *lines,
        "assert new_logprobs.grad[mask].all() and not new_logprobs.grad[~mask].any()"]))
    done = subprocess.run([sys.executable, "five.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_table_of_copies_calls_is_there():
    rows = re.findall(r"^\| `nanodistill/(\w+)\.py` \| \w* *\| (.*) \|$", README, re.M)
    assert len(rows) == 10
    for file, calls in rows:
        module = importlib.import_module(f"nanodistill.{file}")
        for name in re.findall(r"`(\w+)", calls):
            assert hasattr(module, name), (file, name)


def test_the_readme_is_one_screen_and_a_bit():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert all(len(line) <= 100 for line in lines if not line.startswith("|"))
    for name in re.findall(r"`((?:nanodistill|data|bench)/[\w/]+\.py)`", README):
        assert (ROOT / name).exists(), name
