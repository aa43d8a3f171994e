"""What the README names exists: its commands start, its files and links are there.

test_stages.py runs the main command as a whole.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = ("train_sft.py", "train_rm.py", "train_rl.py", "eval.py", "data/teacher.py")
DOCSTRINGS = "".join((ROOT / name).read_text().split('"""')[1] for name in SCRIPTS)
COMMANDS = sorted(set(re.findall(
    r"python ((?:data/|bench/)?(?:tiny/)?\w+\.py[^`\n&|]*?)(?:   |`|\n| &)", README + DOCSTRINGS)))


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_known_to_its_script(command):
    """`--help` behind the command's own flags: argparse rejects an unknown flag or a wrong value
    before it prints the help."""
    done = subprocess.run([sys.executable, *command.split(), "--help"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    known = re.findall(r"--[\w-]+", done.stdout)
    assert set(re.findall(r"--[\w-]+", command)) <= set(known)


def test_the_main_commands_are_among_them():
    assert {*SCRIPTS} <= {c.split()[0] for c in COMMANDS}


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / name).exists(), name
    house = README.split("## The house")[1].split("`model.py`")[0]
    for name in re.findall(r"[\w/]+\.py", house):
        folders = ("", "nanodistill", "data", "data/tiny")
        assert any((ROOT / folder / name).exists() for folder in folders), name
