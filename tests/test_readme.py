"""What the README and the pages in docs/ name exists: their commands start, files and links are
there. docs/log.md tells of the past, and is left out.

test_stages.py runs the main command as a whole.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
         if path.name != "log.md"}
SCRIPTS = ("train_sft.py", "train_rm.py", "train_rl.py", "eval.py", "data/teacher.py")
DOCSTRINGS = "".join((ROOT / name).read_text().split('"""')[1] for name in SCRIPTS)
COMMANDS = sorted(set(re.findall(
    r"python ((?:data/|bench/)?(?:tiny/)?\w+\.py[^`\n&|]*?)(?:   |`|\n| &)",
    "".join(PAGES.values()) + DOCSTRINGS)))


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


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_links_to_exist(page):
    for name in re.findall(r"\]\(((?!http)[^)#]+)", PAGES[page]):
        assert (page.parent / name).exists(), name


def test_the_readme_is_one_screen_and_a_bit():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert all(len(line) <= 100 for line in lines if not line.startswith("|"))
    for name in re.findall(r"`((?:nanodistill|data|bench)/[\w/]+\.py)`", README):
        assert (ROOT / name).exists(), name
