"""The sampling stage: what it hands to a sampler, what it makes of its samples, what it says."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from data import hub, teacher
from data.arithmetic import Arithmetic
from nanodistill import files, settings
from nanodistill.generate import Sample
from nanodistill.tokenizer import Tokenizer


TASK = Arithmetic(1, train=6)
QUESTIONS = TASK.questions("train")


def given(text="#### 7", ended=True, tokens=(5, 6, 7), **more):
    """A sampler that gives every sample alike; `asked` has what it was called with."""
    def sampler(questions, temperatures, seed):
        sampler.asked.append(([q["id"] for q in questions], temperatures, seed))
        for q in questions:
            yield None
            for j in reversed(range(len(temperatures))):
                yield q["id"], j, {"text": text, "ended": ended, **more}, list(tokens)
    sampler.asked = []
    return sampler


def collect(path, sampler, questions=QUESTIONS, n=2, **kwargs):
    return teacher.collect(path / "t.jsonl", questions, TASK, sampler, [1.0] * n, "x", **kwargs)


# ---- collect ----

def test_a_row_is_the_questions_samples_in_their_order(tmp_path):
    rows = collect(tmp_path, given())
    assert [row["id"] for row in rows] == [q["id"] for q in QUESTIONS]
    assert rows[0] == {**QUESTIONS[0], "responses": [
        {"text": "#### 7", "temperature": 1.0, "ended": True, "answer": "7"}] * 2}
    assert files.read_jsonl(tmp_path / "t.jsonl") == rows


def test_the_seed_does_not_depend_on_what_is_there(tmp_path):
    """So a sample follows from seed, id and index alone, which the sampler is given."""
    torch.manual_seed(11)
    sampler = given()
    collect(tmp_path, sampler, QUESTIONS[:2])
    collect(tmp_path, sampler)
    torch.manual_seed(12)
    (tmp_path / "other").mkdir()
    collect(tmp_path / "other", sampler)
    (_, _, first), (asked, _, again), (_, _, other) = sampler.asked
    assert first == again == 11 != other == 12 and asked == [q["id"] for q in QUESTIONS[2:]]


def test_tokens_are_kept_on_request(tmp_path):
    rows = collect(tmp_path, given(), keep_tokens=True)
    assert all(r["tokens"] == [5, 6, 7] for row in rows for r in row["responses"])
    assert files.read_jsonl(tmp_path / "t.jsonl") == rows
    assert collect(tmp_path, given(), keep_tokens=True) == rows
    (tmp_path / "without").mkdir()
    collect(tmp_path / "without", given(), QUESTIONS[:1])
    with pytest.raises(SystemExit, match="t.jsonl, line 1, .*'tokens'"):
        collect(tmp_path / "without", given(), keep_tokens=True)


def test_of_rows_with_one_id_the_first_counts(tmp_path):
    collect(tmp_path, given("#### 7"), QUESTIONS[:1])
    path = tmp_path / "t.jsonl"
    path.write_text(path.read_text() + path.read_text().replace("7", "8"))
    rows = collect(tmp_path, given("#### 9"))
    assert rows[0]["responses"][0]["answer"] == "7" and len(rows) == len(QUESTIONS)


@pytest.mark.parametrize("line, what", [
    ("{}", "'id'"), ("[]", "object"), ("null", "object"), ('"x"', "object"),
    ('{"id": 5, "question": "q", "responses": []}', "'id'"),
    ('{"id": "i", "question": "q"}', "'responses'"),
    ('{"id": "i", "question": "q", "responses": {}}', "'responses'"),
    ('{"id": "i", "question": "q", "responses": [7]}', "'text'"),
    ('{"id": "i", "question": "q", "responses": [{"text": "a"}]}', "'temperature'")])
def test_a_foreign_row_is_named_by_file_and_line(tmp_path, line, what):
    collect(tmp_path, given(), QUESTIONS[:1], n=1)
    with open(tmp_path / "t.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit) as stopped:
        collect(tmp_path, given(), n=1)
    assert f"{tmp_path / 't.jsonl'}, line 2" in stopped.value.code and what in stopped.value.code
    assert len(stopped.value.code.splitlines()) <= 3


def test_blank_lines_count_as_lines(tmp_path):
    collect(tmp_path, given(), QUESTIONS[:1], n=1)
    row = (tmp_path / "t.jsonl").read_text()
    (tmp_path / "t.jsonl").write_text("\n" + row + " \n\n" + '{"id": "i", "question": "q"}\n')
    with pytest.raises(SystemExit, match="t.jsonl, line 5, is no row"):
        collect(tmp_path, given(), n=1)
    (tmp_path / "t.jsonl").write_text("\n\n" + row.replace('"text"', '"txt"'))
    with pytest.raises(SystemExit, match="t.jsonl, line 3, a response, is no row"):
        collect(tmp_path, given(), n=1)


def test_a_clock_that_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    assert len(collect(tmp_path, given())) == len(QUESTIONS)


# ---- what is said ----

def response(ended=True, answer="7", **more):
    return {"text": "", "temperature": 1.0, "ended": ended, "answer": answer, **more}


def test_shares():
    rows = [{"id": "a", "responses": [response(), response(answer=None)]},
            {"id": "b", "responses": [response(False, None), response(False, None, failed="no")]},
            {"id": "c", "responses": [response(False, None)] * 4}]
    assert teacher.shares(rows) == {"cut_off": 5 / 8, "no_answer": 1 / 8, "failed": 1 / 8}
    assert teacher.shares([]) == {"cut_off": 0, "no_answer": 0, "failed": 0}


@pytest.mark.parametrize("sampler, words, not_words", [
    (given(), ["0.0% of the responses were cut off, 0.0% ended without"], ["--max-new", "look at"]),
    (given(ended=False), ["100.0% of the responses were cut off", "--max-new-tokens"], ["look at"]),
    (given("no marks"), ["100.0% ended without", "look at texts in", "t.jsonl"], ["--max-new"]),
    (given("", False, failed="the reason"),
     ["100.0% of the responses, to 6 questions", f"{QUESTIONS[2]['id']} (the reason); ..."],
     ["--max-new", QUESTIONS[3]["id"]])])
def test_what_was_lost_is_said_with_what_to_do(tmp_path, capsys, sampler, words, not_words):
    collect(tmp_path, sampler)
    out = capsys.readouterr().out
    assert all(w in out for w in words) and not any(w in out for w in not_words)
    assert len(out.splitlines()) <= 2


def tiny(tmp_path, *argv):
    return ["--questions", "3", "--samples", "2", "--threads", "1", "--out", str(tmp_path), *argv]


def test_a_run_with_no_vote_left_stops_with_what_to_do(tmp_path, capsys):
    (tmp_path / "labels.jsonl").write_text("{}\n")               # of an earlier vote
    with pytest.raises(SystemExit) as stopped:
        teacher.main(tiny(tmp_path, "--max-new-tokens", "2"))
    assert "dropped all 3 questions" in stopped.value.code and "--samples" in stopped.value.code
    assert "3 have no response with an answer" in stopped.value.code
    assert len(stopped.value.code.splitlines()) <= 3
    assert "100.0% of the responses were cut off" in capsys.readouterr().out
    assert not (tmp_path / "labels.jsonl").exists() and (tmp_path / "teacher.jsonl").exists()


def test_the_shares_are_logged(tmp_path):
    teacher.main(tiny(tmp_path))
    row = files.read_jsonl(tmp_path / "metrics.jsonl")[-1]
    assert {"cut_off", "no_answer", "failed", "kept", "agreement"} <= set(row)
    rows = files.read_jsonl(tmp_path / "teacher.jsonl")
    assert row["cut_off"] == sum(not r["ended"] for w in rows for r in w["responses"]) / 6


# ---- the model in this process ----

def test_a_prompt_that_is_too_long_fails_alone(monkeypatch):
    tokenizer, calls = Tokenizer(hub.TINY / "teacher"), []
    lengths = {q["id"]: len(tokenizer.prompt_ids(q["question"])) for q in QUESTIONS}
    most = sorted(lengths.values())[-2]                          # one or more are longer
    long = {id_ for id_, n in lengths.items() if n > most}
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=most + 8))

    def generate(model, prompts, **kwargs):
        calls.append((prompts, kwargs))
        for i in range(len(prompts)):
            for j in range(kwargs["n"]):
                yield i, j, Sample(tokenizer.encode("#### 7"), [], True)
    monkeypatch.setattr("nanodistill.generate.generate", generate)
    sampler = teacher.local(model, tokenizer, TASK, 8, 4)
    samples = list(sampler(QUESTIONS, [0.5, 1.0], 3))
    assert len(samples) == 12 and len(long) >= 1
    for id_, _, given, tokens in samples:
        assert ("failed" in given) == (id_ in long)
        if id_ in long:
            assert given["text"] == "" and not given["ended"] and len(tokens) == 0
            assert f"{lengths[id_]} tokens" in given["failed"] and str(most + 8) in given["failed"]
        else:
            assert given == {"text": "#### 7", "ended": True} and len(tokens) > 0
    (prompts, kwargs), = calls
    assert kwargs["ids"] == [q["id"] for q in QUESTIONS if q["id"] not in long]
    assert [len(p) for p in prompts] == [lengths[i] for i in kwargs["ids"]] and kwargs["seed"] == 3


def test_no_prompt_fits(monkeypatch, tmp_path):
    monkeypatch.setattr(teacher.ready, "check", lambda *_: None)
    with pytest.raises(SystemExit, match="exceed the teacher's .* positions: fewer"):
        teacher.main(tiny(tmp_path, "--max-new-tokens", "100000"))


# ---- flags ----

SERVER = ["--teacher-url", "http://x/v1", "--teacher-model", "m"]


def problems(tmp_path, *argv):
    try:
        settings.parse("teacher", teacher.STAGES, "doc", [*argv, "--out", str(tmp_path)])
    except SystemExit as stopped:
        return stopped.code
    return None


@pytest.mark.parametrize("argv", [
    ["--concurrency", "3"], ["--patience", "3"], ["--teacher-extra", "{}"],
    ["--reasoning", "drop"], ["--retry-failed"]])
def test_flags_of_a_server_do_nothing_without_one(tmp_path, argv):
    assert problems(tmp_path, *argv) == f"{argv[0]} does nothing without --teacher-url"
    assert problems(tmp_path, *argv, *SERVER) is None


@pytest.mark.parametrize("text", [
    "{", "7", "[]", "null", '"x"', '{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', "[" * 100_000,
    '{"messages": []}', '{"stream": true}', "{'seed': null}"])
def test_an_extra_that_is_no_object_is_an_error_at_the_start(tmp_path, text):
    message = problems(tmp_path, *SERVER, "--teacher-extra", text)
    assert message.startswith("--teacher-extra") and "wants a JSON object" in message
    assert len(message) < 1000


def test_patience_and_reasoning(tmp_path):
    assert "more than 0" in problems(tmp_path, *SERVER, "--patience", "0")
    assert "finite" in problems(tmp_path, *SERVER, "--patience", "inf")
    assert "keep, drop" in problems(tmp_path, *SERVER, "--reasoning", "maybe")
    config = settings.parse("teacher", teacher.STAGES, "doc", [*SERVER, "--out", str(tmp_path)])
    assert config["teacher"].patience == 10 and config["teacher"].reasoning == "keep"
    extra = json.dumps({"chat_template_kwargs": {"enable_thinking": False}, "seed": None})
    assert teacher.read_extra(extra) == json.loads(extra) and teacher.read_extra("") == {}
