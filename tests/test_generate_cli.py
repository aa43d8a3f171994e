"""`python -m nanodistill.generate FOLDER "question"`: the engine's text, as it comes."""

import io
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_model

from nanodistill import ask, weights
from nanodistill.generate import generate, stream
from nanodistill.tokenizer import Tokenizer


ROOT = Path(__file__).resolve().parents[1]
STUDENT = ROOT / "data" / "tiny" / "student"
QUESTIONS = ["Ann has 7 pens. She loses 5. She finds 4 more. How many pens does Ann have now?",
             "Leo has 3 coins. He buys 2 boxes of 4 coins. How many coins does Leo have now?"]


@pytest.fixture(scope="module")
def student():
    return weights.load(STUDENT), Tokenizer(STUDENT)


def texts(student, question, id_="0", **how):
    """What the engine says to a question, n times."""
    model, tokenizer = student
    how = {"max_new_tokens": 56, "temperature": 0.0, "seed": 1, **how}
    done = {j: tokenizer.decode(sample.tokens) for _, j, sample in generate(
        model, [tokenizer.prompt_ids(question)], ids=[id_], eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id, **how)}
    return [done[j] for j in sorted(done)]


# ---- what it prints ----

@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answer_is_the_engines_greedy_text(student, question, capsys):
    ask.main([str(STUDENT), question])
    printed = capsys.readouterr()
    assert printed.out == texts(student, question)[0] + "\n" and printed.err == ""
    assert "#### " in printed.out


def test_samples_are_the_engines_by_seed(student, capsys):
    hot = ["--temperature", "1.2", "--seed", "7"]
    ask.main([str(STUDENT), QUESTIONS[0], "--samples", "4", *hot])
    four = texts(student, QUESTIONS[0], n=4, temperature=1.2, seed=7)
    assert capsys.readouterr().out == "\n\n".join(four) + "\n" and len({*four}) > 1
    ask.main([str(STUDENT), QUESTIONS[0], *hot])
    assert capsys.readouterr().out == four[0] + "\n"


def test_each_line_of_standard_input_is_a_question(student, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTIONS[1]}\n\n  {QUESTIONS[0]}\n"))
    ask.main([str(STUDENT), "--temperature", "1"])
    assert capsys.readouterr().out == "".join(
        texts(student, QUESTIONS[1 - i], str(i), temperature=1.0)[0] + "\n" for i in (0, 1))


def test_a_cut_off_answer_is_said_to_be_one(student, capsys):
    ask.main([str(STUDENT), QUESTIONS[0], "--max-new-tokens", "5"])
    printed = capsys.readouterr()
    assert printed.out == texts(student, QUESTIONS[0], max_new_tokens=5)[0] + "\n"
    assert printed.err == "(1 cut off after 5 tokens)\n"


def test_tokens_come_one_by_one_until_the_end_or_the_limit():
    model, prompt = random_model(), [5, 6, 7]
    for temperature in (0.0, 1.5):
        how = dict(pad_id=0, max_new_tokens=12, temperature=temperature, seed=3)
        (_, _, whole), = generate(model, [prompt], eos_ids=[95], ids=["x"], **how)
        assert list(stream(model, prompt, eos_ids=[95], id_="x", **how)) == whole.tokens
        end = whole.tokens[4]
        (_, _, ended), = generate(model, [prompt], eos_ids=[end], ids=["x"], **how)
        assert list(stream(model, prompt, eos_ids=[end], id_="x", **how)) == ended.tokens
        assert ended.ended and ended.tokens == whole.tokens[:whole.tokens.index(end) + 1]
    # The second token is not drawn before it is asked for.
    assert next(stream(model, prompt, eos_ids=[95], **how)) < 96


def test_a_character_of_several_tokens_is_printed_once_it_is_whole():
    text, broken = "aé€🙂b", "🙂".encode()[:2]

    def decode(tokens):
        return bytes(tokens).decode(errors="replace")
    assert list(ask.pieces(text.encode(), decode)) == [
        "a", "", "é", "", "", "€", "", "", "", "🙂", "b", ""]
    assert "".join(ask.pieces(b"a" + broken, decode)) == "a\ufffd"
    assert "".join(ask.pieces(b"a" + broken + b"c", decode)) == "a\ufffdc"


# ---- what it can't do ----

def test_faults_are_one_plain_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    bare, reward = tmp_path / "bare", tmp_path / "rl"
    shutil.copytree(STUDENT, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(STUDENT, reward)
    (reward / "model.safetensors").write_bytes(b"no tensors")
    there = str(STUDENT)
    for arguments, said in [
            ([str(tmp_path / "none"), "?"], "none holds no model: there is no config.json"),
            ([str(bare), "?"], "bare: neither model.safetensors nor"),
            ([str(tmp_path), "?"], f"; these have one: {bare}, {reward}"),
            ([str(reward), "?"], "model.safetensors"),
            ([there, " "], "the question is empty"),
            ([there], "no question came on standard input"),
            ([there, "pens " * 300], "the model has 256 positions, and the answer needs 1"),
            ([there, "?", "--max-new-tokens", "254"], "and the answer needs 254"),
            ([there, "?", "--max-new-tokens", "0"], "max_new_tokens 0"),
            ([there, "?", "--samples", "0"], "each must be 1 or more"),
            ([there, "?", "--temperature", "-1"], "0 (greedy) or 1e-6 to 1e6"),
            ([there, "?", "--temperature", "warm"], "invalid float value: 'warm'"),
            ([there, "?", "--dtype", "fp16"], "--dtype"),
            ([there, "\udcff"], "\\udcff")]:
        with pytest.raises(SystemExit) as error:
            ask.main(arguments)
        message = str(error.value)
        assert said in message and "\n\n" not in message and len(message) < 400, message


def test_help_says_that_the_question_is_asked_as_given(capsys):
    with pytest.raises(SystemExit):
        ask.main(["--help"])
    assert "as it is given" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_the_command_streams_and_ends_at_once_on_ctrl_c(student):
    """The answer is there while standard input is open yet."""
    command = [sys.executable, "-m", "nanodistill.generate", str(STUDENT)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        wanted = texts(student, QUESTIONS[0])[0]
        process.stdin.write(QUESTIONS[0] + "\n")
        process.stdin.flush()
        lines = [process.stdout.readline() for _ in wanted.splitlines()]
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert "".join(lines) == wanted + "\n" and out == ""
    assert error.strip() == "stopped" and process.returncode == 1
