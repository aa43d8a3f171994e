"""The map in docs/design.md is of this tree, and imports point one way, without a circle."""

import ast
import graphlib
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
MAP = PAGE.split("## The house\n")[1].split("\n\n")[0]
FOLDERS = "nanodistill", "data", "bench"
FILES = [str(path.relative_to(ROOT)) for folder in ("", *FOLDERS)
         for path in sorted((ROOT / folder).glob("*.py")) if path.name != "__init__.py"]


def imports(name):
    """Names of our own files that a file imports, anywhere in it: "nanodistill/run.py", ..."""
    modules = []
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from data import rows` is data/rows.py, `from data import TASKS` data/__init__.py.
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    found = set()
    for module in modules:
        path, parent = module.replace(".", "/"), module.replace(".", "/").rpartition("/")[0]
        options = f"{path}.py", f"{parent}.py", f"{path}/__init__.py", f"{parent}/__init__.py"
        found |= {next((file for file in options if (ROOT / file).is_file()), "")} - {""}
    return found


def test_every_file_stands_in_the_map_and_nothing_else_does():
    folder, there = "", set()
    for line in MAP.splitlines():
        # Up to the first gap of two blanks: what follows is the sentence.
        head = re.match(r" *\S+(?: \S+)*", line)[0]
        if match := re.match(r"    (\w+)/", head):
            folder = match[1] + "/"
        elif re.match(r"    \w", head):
            folder = ""
        there |= {folder + name for name in re.findall(r"\w+\.py", head)}
    scripts = set(re.findall(r"(?:train_\w+|eval)\.py", MAP))
    assert {name for name in there | scripts} == set(FILES)


def test_imports_point_from_scripts_to_data_to_the_library():
    for name in FILES:
        folder = name.rpartition("/")[0]
        for other in imports(name):
            allowed = {"nanodistill": ("nanodistill",), "data": ("nanodistill", "data"),
                       "bench": ("nanodistill", "data", "bench", "")}.get(
                           folder, ("nanodistill", "data", ""))
            assert other.rpartition("/")[0] in allowed, f"{name} imports {other}"


def test_imports_make_no_circle():
    graph = {name: imports(name) for name in [*FILES, "data/__init__.py"]}
    graphlib.TopologicalSorter(graph).prepare()                  # CycleError names one


def test_no_script_imports_the_script_that_runs_after_it():
    order = ["train_sft.py", "train_rm.py", "train_rl.py", "eval.py"]
    for i, name in enumerate(order):
        assert not imports(name) & set(order[i:]), name


@pytest.mark.parametrize("name", re.search(r"Imports point one way.*?import\s+nothing", PAGE,
                                           re.DOTALL)[0].split("`")[1::2])
def test_files_that_copy_out_import_nothing_of_ours(name):
    assert not imports(f"nanodistill/{name}")
