"""The lines of docs/elsewhere.md, on the tiny student: each answers with the engine's greedy text.
"""

import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from nanodistill import ask, weights
from nanodistill.generate import respond
from nanodistill.tokenizer import Tokenizer


ROOT = Path(__file__).resolve().parents[1]
STUDENT = ROOT / "data" / "tiny" / "student"
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```\n(?:```\n(.*?)```)?",
                    (ROOT / "docs" / "elsewhere.md").read_text(encoding="utf-8"), re.DOTALL)
COMMAND, TRANSFORMERS, CONVERT_KNOWN, CONVERT, LLAMA = BLOCKS
QUESTION = shlex.split(COMMAND[1])[-1]
# A checkout of llama.cpp, for its converter.
LLAMA_CPP = os.environ.get("LLAMA_CPP", "")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder in which the page's paths lead to the student and to llama.cpp."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "arithmetic-tiny").mkdir(parents=True)
    (tmp_path / "out" / "arithmetic-tiny" / "rl").symlink_to(STUDENT)
    if LLAMA_CPP:
        (tmp_path / "llama.cpp").symlink_to(Path(LLAMA_CPP).resolve())
    return tmp_path


@pytest.fixture(scope="module")
def greedy():
    """The engine's text, and a line break."""
    tokenizer = Tokenizer(STUDENT)
    (_, _, text, sample), = respond(weights.load(STUDENT), tokenizer,
                                    {"0": tokenizer.prompt_ids(QUESTION)}, max_new_tokens=56,
                                    temperature=0.0)
    assert sample.ended
    return text + "\n"


def test_the_page_asks_one_question_and_shows_one_answer():
    for block in (TRANSFORMERS, LLAMA):
        names = {}
        exec(re.search(r"question = \(.*?\)\n", block[1], re.DOTALL)[0], names)
        assert names["question"] == QUESTION and block[2] == COMMAND[2]
    assert COMMAND[2].endswith("#### 8\n")


def test_the_command(place, greedy, capsys):
    python, m, module, *arguments = shlex.split(COMMAND[1])
    assert (python, m, module) == ("python", "-m", "nanodistill.generate")
    ask.main(arguments)
    assert capsys.readouterr().out == greedy


def test_transformers(place, greedy, capsys):
    pytest.importorskip("transformers")
    exec(TRANSFORMERS[1], {})
    assert capsys.readouterr().out == greedy


@pytest.mark.skipif(not LLAMA_CPP, reason="LLAMA_CPP names no checkout of llama.cpp")
@pytest.mark.skipif(not importlib.util.find_spec("xllamacpp"), reason="xllamacpp is not installed")
def test_llama_cpp(place, greedy, capfd, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["-"])
    exec(CONVERT[1], {})
    capfd.readouterr()
    exec(LLAMA[1], {})
    assert capfd.readouterr().out == greedy
    assert "convert_hf_to_gguf.py out/gsm8k-135m/rl --outtype f32" in CONVERT_KNOWN[1]
