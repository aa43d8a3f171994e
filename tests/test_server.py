"""The teacher behind a server, against a faulty server made for the purpose.

Every test has a deadline, and what is asked of a server that fails for ever is bounded by it too.
"""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import chat, teacher
from data import server as client
from nanodistill import files


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def deadline():
    def expired(*_):
        raise AssertionError("this test hangs")
    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---- a server that does as it is told ----

def completion(*messages, reason="stop", usage=5):
    """The body of a chat completion with these messages, one a choice."""
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m",
            "usage": {"completion_tokens": usage, "prompt_tokens": 3, "total_tokens": 8},
            "choices": [{"index": k, "finish_reason": reason,
                         "message": {"role": "assistant", **m} if isinstance(m, dict) else m}
                        for k, m in enumerate(messages)]}


class Server:
    """Answers chat completions with "<k> of <n>, #### <request number>".

    `reply(request, number)` gives another answer, or None: a status, a body (dict: as JSON), a
    tuple (status, body, headers), or a function of the handler that writes what it wants.
    """

    def __init__(self, reply=lambda request, number: None):
        self.reply, self.requests, self.lock = reply, [], threading.Lock()
        self.models, self.asked = (501, b""), []                 # not every server has a list
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):                                    # the list of models
                outer.asked.append((self.path, dict(self.headers)))
                if callable(outer.models):
                    return outer.models(self)
                self.send(*outer.models)

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append({**request, "path": self.path,
                                           "headers": dict(self.headers)})
                    number = len(outer.requests)
                answer = outer.reply(request, number)
                if callable(answer):
                    return answer(self)
                if answer is None:
                    n = request.get("n", 1)
                    answer = completion(*({"content": f"{k} of {n}\n#### {number}"}
                                          for k in range(n)))
                if isinstance(answer, int):
                    answer = (answer, b"")
                self.send(*answer if isinstance(answer, tuple) else (200, answer))

            def send(self, status, body=b"", headers=()):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(body), **dict(headers)}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

            def handle(self):
                try:
                    super().handle()
                except OSError:
                    pass                                         # the client has left

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads, self.http.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


def first(*replies):
    """These replies one after another, then good ones."""
    return lambda request, number: replies[number - 1] if number <= len(replies) else None


def always(reply):
    return lambda request, number: reply


def of(question, reply, others=None):
    """A reply for one question, whatever the request's number."""
    return lambda request, number: \
        reply if request["messages"][0]["content"] == f"question {question}" else others


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(client, "wait_before", lambda attempt, retry_after, rng: 0.02)
    started = []

    def start(*args, **kwargs):
        started.append(Server(*args, **kwargs))
        return started[-1]
    yield start
    for server in started:
        server.close()


def ask(server, tmp_path, questions=("a", "b", "c"), temperatures=(0.7, 1.0, 0.7, 1.0), key="",
        **kwargs):
    """[(id, j, response, tokens)] of all that comes."""
    prompts = {q: f"question {q}" for q in questions}
    options = {"concurrency": 2, "patience": 5.0, "timeout": 1.0, **kwargs}
    return [sample for sample in client.generate(
        server.url, "m", key, prompts, list(temperatures), 16, tmp_path / "part.jsonl", **options)
        if sample]


def places(samples):
    return sorted((q, j) for q, j, *_ in samples)


EVERY = sorted((q, j) for q in "abc" for j in range(4))


# ---- what is asked ----

def test_several_samples_a_request_at_each_temperature(serve, tmp_path):
    server = serve()
    samples = ask(server, tmp_path)
    assert places(samples) == EVERY and all(response["ended"] for _, _, response, _ in samples)
    assert len(server.requests) == 6 and {r["n"] for r in server.requests} == {2}
    assert {r["temperature"] for r in server.requests} == {0.7, 1.0}
    assert {r["path"] for r in server.requests} == {"/v1/chat/completions"}
    assert {r["model"] for r in server.requests} == {"m"}
    # One seed for all would give the same sample again and again.
    assert len({r["seed"] for r in server.requests}) == 6


@pytest.mark.parametrize("reply", [
    lambda request, number: completion({"content": f"text {number}"}),
    lambda request, number: 400 if request["n"] > 1 else completion({"content": f"text {number}"})])
def test_a_server_that_gives_one_sample_a_request(serve, tmp_path, reply):
    server = serve(reply)
    samples = ask(server, tmp_path)
    assert places(samples) == EVERY
    assert len({response["text"] for _, _, response, _ in samples}) == 12
    # Two were under way when it showed.
    assert sum(r["n"] > 1 for r in server.requests) <= 2
    assert len({r["seed"] for r in server.requests}) == 12


def test_seeds_follow_from_seed_question_and_index_alone(serve, tmp_path):
    def seeds(name, questions, seed):
        server = serve()
        (tmp_path / name).mkdir()
        ask(server, tmp_path / name, questions, (1.0,), seed=seed)
        return {r["messages"][0]["content"]: r["seed"] for r in server.requests}
    both, one, other = seeds("x", "ab", 5), seeds("y", "b", 5), seeds("z", "b", 6)
    assert both["question b"] == one["question b"] != other["question b"]


def test_a_sample_of_another_temperature_is_asked_for_again(serve, tmp_path):
    server = serve()
    ask(server, tmp_path)
    server.requests = []
    assert places(ask(server, tmp_path, temperatures=(0.7, 1.0, 0.7, 0.3))) == EVERY
    assert {r["temperature"] for r in server.requests} == {0.3} and len(server.requests) == 3


def test_extra_keys_win_and_null_takes_out(serve, tmp_path):
    server = serve()
    ask(server, tmp_path, "a", extra={"max_tokens": None, "max_completion_tokens": 9, "seed": None,
                                      "temperature": 0.5, "kwargs": {"deep": [1, None]}})
    for request in server.requests:
        assert request["max_completion_tokens"] == 9 and request["temperature"] == 0.5
        assert request["kwargs"] == {"deep": [1, None]}
        assert not {"max_tokens", "seed"} & set(request)


def test_an_address_with_a_query_keeps_it(serve, tmp_path):
    server = serve()
    server.url += "/?api-version=7"
    assert len(ask(server, tmp_path, "a", (1.0,))) == 1
    client.problems(server.url, "m", "")
    assert server.requests[0]["path"] == "/v1/chat/completions?api-version=7"
    assert server.asked[0][0] == "/v1/models?api-version=7"


# ---- what comes ----

def cut(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def cut_in_the_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le")
    handler.close_connection = True


def slam(handler):
    handler.close_connection = True


def no_http(handler):
    handler.wfile.write(b"220 mail.example.org ESMTP\r\n")
    handler.close_connection = True


def trickle(start, each):
    """A byte every 50 ms, for ever."""
    def reply(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + start)
        while True:
            handler.wfile.write(each)
            time.sleep(0.05)
    return reply


def flood(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while True:
        handler.wfile.write(b" " * 65536)


def chunked_badly(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello")
    handler.close_connection = True


def stall(handler):
    time.sleep(2)


HTML = (200, b"<!DOCTYPE html><html><body>Sign in</body></html>", {"Content-Type": "text/html"})
GOOD = b'{"choices": [{"finish_reason": "stop", "message": {"content": "fine"}}]}'
ERROR = {"error": {"message": "a hiccup", "code": 503}}
# What is tried again: the second request gets a good answer.
AGAIN = {
    "408": 408, "409": 409, "425": 425, "429": 429, "500": 500, "502": 502, "503": 503, "504": 504,
    "529": 529, "429 till tomorrow": (429, b"", {"Retry-After": "0"}), "cut": cut, "slam": slam,
    "cut in the headers": cut_in_the_headers, "no HTTP": no_http, "stall": stall,
    "a trickling body": trickle(b"Content-Type: application/json\r\n\r\n", b" "),
    "a trickling header": trickle(b"X-Long: ", b"x"),
    "endless headers": trickle(b"", b"X: y\r\n"),
    "an endless body": flood, "bad chunks": chunked_badly,
    "bad gzip": (200, b"no gzip", {"Content-Encoding": "gzip"}),
    "an HTML page": HTML, "an empty body": (200, b""), "204": (204, b""),
    "JSON null": (200, b"null"), "a JSON list": (200, b"[1]"), "a JSON text": (200, b'"text"'),
    "torn JSON": (200, GOOD[:-9]), "deep JSON": (200, b"[" * 100_000),
    "a long number": (200, b'{"choices": ' + b"9" * 9999 + b"}"),
    "an event stream": (200, b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]'),
    "no choices": {"id": "x"}, "choices: []": {"choices": []}, "choices: null": {"choices": None},
    "choices: {}": {"choices": {"0": {"message": {"content": "a"}}}}, "choices: 7": {"choices": 7},
    "a choice that is null": {"choices": [None]}, "a choice that is a list": {"choices": [[1]]},
    "message missing": {"choices": [{"finish_reason": "stop"}]},
    "message null": {"choices": [{"finish_reason": "stop", "message": None}]},
    "message a text": {"choices": [{"finish_reason": "stop", "message": "a"}]},
    "content a number": completion({"content": 7}), "content a dict": completion({"content": {}}),
    "nothing, for no reason": completion({"content": None}, reason=None),
    "an error that says 200": ERROR, "an error text that says 200": {"error": "a hiccup"},
    "an error with choices []": {**ERROR, "choices": []},
}


@pytest.mark.parametrize("name", AGAIN)
def test_what_makes_no_sense_is_tried_again(serve, tmp_path, name):
    server = serve(first(AGAIN[name]))
    samples = ask(server, tmp_path, "a", (1.0,), timeout=0.3)
    assert samples[0][:3] == ("a", 0, {"text": "0 of 1\n#### 2", "ended": True})
    assert len(samples) == 1 and len(server.requests) == 2
    assert len(files.read_jsonl(tmp_path / "part.jsonl")) == 1


def message(**values):
    return completion(values)


TWO = completion({"content": "one"}, {"content": "two"})
# What is understood at once: (the answer, text, ended).
UNDERSTOOD = {
    "plain": (message(content="x"), "x", True),
    "content null": (message(content=None), "", True),
    "content missing": (message(), "", True),
    "content empty, cut": (completion({"content": ""}, reason="length"), "", False),
    "filtered to nothing": (completion({"content": None}, reason="content_filter"), "", False),
    "parts": (message(content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
              "ab", True),
    "odd parts": (message(content=["a", None, 7, {"type": "image"}, {"text": "b"}]), "ab", True),
    "thoughts": (message(content="x", reasoning_content="hm"), "<think>\nhm\n</think>\n\nx", True),
    "thoughts, other name": (message(content="x", reasoning="hm"), "<think>\nhm\n</think>\n\nx",
                             True),
    "thoughts alone": (message(content=None, reasoning_content="hm"), "<think>\nhm\n</think>\n\n",
                       True),
    "cut while thinking": (completion({"content": "", "reasoning": "hm"}, reason="length"),
                           "<think>\nhm", False),
    "thoughts twice": (message(content="<think>hm</think>x", reasoning_content="hm"),
                       "<think>hm</think>x", True),
    "thoughts null": (message(content="x", reasoning_content=None, reasoning={"effort": 1}), "x",
                      True),
    "refusal": (message(content=None, refusal="No."), "No.", True),
    "a tool call": (completion({"content": "x", "tool_calls": [{}]}, reason="tool_calls"), "x",
                    True),
    "usage missing": ({k: v for k, v in message(content="x").items() if k != "usage"}, "x", True),
    "usage null": ({**message(content="x"), "usage": None}, "x", True),
    "usage a text": ({**message(content="x"), "usage": {"completion_tokens": "5"}}, "x", True),
    "usage below nothing": (completion({"content": "x"}, usage=-3), "x", True),
    "usage beyond all": (completion({"content": "x"}, usage=10**40), "x", True),
    "a lone surrogate": (message(content="a\ud83db"), "a\ufffdb", True),
    "a surrogate pair": ((200, GOOD.replace(b"fine", rb"\ud83d\ude00")), "\U0001f600", True),
    "a surrogate in thoughts": (message(content="x", reasoning="\udc00"),
                                "<think>\n\ufffd\n</think>\n\nx", True),
    "bad UTF-8": ((200, GOOD.replace(b"fine", b"f\xffne")), "f\ufffdne", True),
    "a byte order mark": ((200, b"\xef\xbb\xbf" + GOOD), "fine", True),
    "gzip": ((200, gzip.compress(GOOD), {"Content-Encoding": "gzip"}), "fine", True),
    "no content type": ((200, GOOD, {"Content-Type": "text/html"}), "fine", True),
    "201": ((201, GOOD), "fine", True),
    "more choices than asked": (TWO, "one", True),
    "a bad choice and a good one": (completion("odd", {"content": "two"}), "two", True),
    "line ends kept": (message(content="a\r\nb\u2028c\x00"), "a\r\nb\u2028c\x00", True),
    **{f"reason {reason!r}": (completion({"content": "x"}, reason=reason), "x", ended)
       for reason, ended in (("stop", True), ("eos", True), ("eos_token", True), (None, True),
                             ("end_turn", True), ({"type": "stop"}, True), (7, True),
                             ("length", False), ("content_filter", False))},
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_what_is_odd_is_understood(serve, tmp_path, name):
    body, text, ended = UNDERSTOOD[name]
    server = serve(first(body))
    samples = ask(server, tmp_path, "a", (1.0,))
    assert [s[:3] for s in samples] == [("a", 0, {"text": text, "ended": ended})]
    assert len(server.requests) == 1 and len(samples[0][3]) >= 0
    assert files.read_jsonl(tmp_path / "part.jsonl") == [
        {"id": "a", "j": 0, "temperature": 1.0, "text": text, "ended": ended}]
    assert ask(server, tmp_path, "a", (1.0,))[0][2] == {"text": text, "ended": ended}
    assert len(server.requests) == 1


@pytest.mark.parametrize("values, text", [
    (dict(content="x", reasoning_content="hm"), "x"), (dict(content=None, reasoning="hm"), ""),
    (dict(content="<think>\nhm\n</think>\n\nx"), "x"), (dict(content="hm</think>x"), "x")])
def test_thoughts_can_be_dropped(serve, tmp_path, values, text):
    server = serve(first(message(**values)))
    assert ask(server, tmp_path, "a", (1.0,), reasoning="drop")[0][2]["text"] == text


def test_tokens_are_counted(serve, tmp_path):
    assert [len(tokens) for *_, tokens in ask(serve(first(completion(
        {"content": "x"}, {"content": "y"}, usage=12))), tmp_path, "a", (1.0, 1.0))] == [6, 6]


# ---- what ends the run ----

ENDS = {
    "401": (401, "OPENAI_API_KEY"), "403": (403, "may not use this model"),
    "404": (404, "--teacher-url"), "402": ((402, {"error": {"message": "no credit"}}), "no credit"),
    "405": (405, "405"), "418": ((418, b"I'm a teapot"), "I'm a teapot"),
    "a redirect": ((301, b"", {"Location": "http://elsewhere/v1"}), "http://elsewhere/v1"),
    "a redirect to nowhere": (302, "nowhere"),
    "401 inside 200": ({"error": {"code": 401, "message": "who?"}}, "OPENAI_API_KEY"),
}


@pytest.mark.parametrize("name", ENDS)
def test_faults_that_stay_end_the_run_with_what_to_do(serve, tmp_path, name):
    reply, words = ENDS[name]
    server = serve(always(reply))
    with pytest.raises(SystemExit) as stopped:
        ask(server, tmp_path)
    assert words in stopped.value.code and len(stopped.value.code.splitlines()) <= 3
    assert len(server.requests) <= 2               # those under way when the first refusal came


@pytest.mark.parametrize("reply", [
    503, 500, {"choices": []}, HTML, slam, stall, (429, b"", {"Retry-After": "86400"}),
    (503, b"", {"Retry-After": "Fri, 31 Dec 2099 23:59:59 GMT"}), (503, b"", {"Retry-After": "0"})])
def test_a_server_that_gives_nothing_is_given_up(serve, tmp_path, monkeypatch, reply):
    monkeypatch.undo()                             # the waits as they are
    server, begun = serve(always(reply)), time.monotonic()
    with pytest.raises(SystemExit, match="nothing for .* minutes .--patience., last: .*goes on"):
        ask(server, tmp_path, patience=0.8, timeout=None)
    assert 0.7 < time.monotonic() - begun < 3
    assert len(server.requests) <= 6               # two at once, a second or so between tries
    assert files.read_jsonl(tmp_path / "part.jsonl") == []


def test_what_came_is_kept_and_not_asked_for_again(serve, tmp_path):
    server = serve(lambda request, number: None if number <= 3 else 503)
    with pytest.raises(SystemExit, match="goes on"):
        ask(server, tmp_path, concurrency=1, patience=0.5)
    assert len(files.read_jsonl(tmp_path / "part.jsonl")) == 6
    server.reply, server.requests = first(), []
    assert places(ask(server, tmp_path)) == EVERY
    assert len(server.requests) == 3


def test_nobody_at_the_address(tmp_path, serve):
    server = serve()
    server.url = "http://127.0.0.1:9/v1"
    with pytest.raises(SystemExit, match="--patience"):
        ask(server, tmp_path, patience=0.3)


@pytest.mark.parametrize("url", ["http://[bad/v1", "http://:99999999/v1", "http:///v1",
                                 "http://a b/v1", "http://\u2603\ud800/v1"])
def test_an_address_that_is_none(tmp_path, serve, url):
    server = serve()
    server.url = url
    with pytest.raises(SystemExit) as stopped:
        ask(server, tmp_path, patience=0.3)
    assert url in stopped.value.code or "--patience" in stopped.value.code
    assert len(client.problems(url, "m", "")) == 1


def test_an_answer_on_the_wire_is_kept_when_another_request_is_refused(serve, tmp_path):
    def reply(request, number):
        if "question a" in request["messages"][0]["content"]:
            time.sleep(0.3)                        # under way when the 401 comes
            return completion({"content": "late"})
        return 401
    server = serve(reply)
    with pytest.raises(SystemExit, match="OPENAI_API_KEY"):
        ask(server, tmp_path, "ab", (1.0,))
    assert [row["text"] for row in files.read_jsonl(tmp_path / "part.jsonl")] == ["late"]


def test_samples_are_on_disk_before_their_group_is_complete(serve, tmp_path):
    """Two samples of one temperature, asked for one at a time; the second never comes."""
    server = serve(lambda request, number: completion({"content": "x"}) if number == 1 else stall)
    samples = client.generate(server.url, "m", "", {"a": "q"}, [1.0, 1.0], 16,
                              tmp_path / "part.jsonl", patience=9)
    while len(server.requests) < 2:
        next(samples)
    assert len(files.read_jsonl(tmp_path / "part.jsonl")) == 1
    begun = time.monotonic()
    samples.close()
    assert time.monotonic() - begun < 1.9


# ---- one question ----

REFUSAL = (400, {"error": {"message": "the prompt was filtered"}})


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_question_that_is_refused_is_unanswered(serve, tmp_path, code):
    server = serve(of("b", (code, {"detail": "not this one"})))
    samples = ask(server, tmp_path)
    assert places(samples) == EVERY
    failed = {(q, j): r for q, j, r, _ in samples if "failed" in r}
    assert set(failed) == {("b", j) for j in range(4)}
    assert failed["b", 0] == {"text": "", "ended": False, "failed": f"{code}: not this one"}
    assert sum("failed" in row for row in files.read_jsonl(tmp_path / "part.jsonl")) == 4
    server.requests, server.reply = [], first()
    assert sum("failed" in r for *_, r, _ in ask(server, tmp_path)) == 4 and not server.requests
    again = ask(server, tmp_path, retry_failed=True)
    assert places(again) == EVERY and not any("failed" in r for *_, r, _ in again)
    assert {r["messages"][0]["content"] for r in server.requests} == {"question b"}
    assert not any("failed" in r for *_, r, _ in ask(server, tmp_path))


@pytest.mark.parametrize("questions, asked", [("abcdefghij", "[56]"), ("ab", "2")])
def test_a_request_that_every_question_fails_at_ends_the_run(serve, tmp_path, questions, asked):
    server = serve(always(REFUSAL))
    with pytest.raises(SystemExit, match=f"none of {asked} questions.*the prompt was filtered"):
        ask(server, tmp_path, questions, (1.0,))
    assert files.read_jsonl(tmp_path / "part.jsonl") == [] and len(server.requests) <= 6


FORBIDDEN = (403, {"error": {"message": "the prompt breaks a rule"}})


def test_a_question_that_is_forbidden_after_others_were_answered_is_unanswered(serve, tmp_path):
    server = serve(of("b", FORBIDDEN))
    samples = ask(server, tmp_path, concurrency=1)
    assert places(samples) == EVERY
    failed = {(q, j): r for q, j, r, _ in samples if "failed" in r}
    assert set(failed) == {("b", j) for j in range(4)}
    assert failed["b", 0] == {"text": "", "ended": False, "failed": "403: the prompt breaks a rule"}
    server.requests, server.reply = [], first()
    assert sum("failed" in r for *_, r, _ in ask(server, tmp_path)) == 4 and not server.requests


def test_a_403_before_any_answer_ends_the_run_with_the_servers_words(serve, tmp_path):
    server = serve(of("a", FORBIDDEN))
    with pytest.raises(SystemExit, match="403: the prompt breaks a rule .*may not use this model"):
        ask(server, tmp_path, concurrency=1)
    assert files.read_jsonl(tmp_path / "part.jsonl") == [] and len(server.requests) == 1


def test_a_403_after_an_earlier_start_was_answered(serve, tmp_path):
    """It may be one question that is forbidden. Where it is all of them, none is marked."""
    server = serve(of("b", FORBIDDEN))
    samples = ask(server, tmp_path, "bc", (1.0,), concurrency=1, answered=True)
    assert {q: "failed" in r for q, _, r, _ in samples} == {"b": True, "c": False}
    server = serve(always(FORBIDDEN))
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match="none of 2[56] questions in a row, last: 403: the prompt"):
        ask(server, tmp_path / "other", [f"q{i}" for i in range(40)], (1.0,), answered=True)
    assert files.read_jsonl(tmp_path / "other" / "part.jsonl") == []


def test_a_key_that_is_withdrawn_midway_loses_nothing(serve, tmp_path):
    """Five answers, then 403 for all others: fewer than are given up in a row."""
    names = [f"q{i}" for i in range(20)]
    server = serve(lambda request, number: None if number <= 5 else FORBIDDEN)
    with pytest.raises(SystemExit, match="none of 15 questions in a row, last: 403: the prompt"):
        ask(server, tmp_path, names, (1.0,), concurrency=1)
    assert ["failed" in row for row in files.read_jsonl(tmp_path / "part.jsonl")] == [False] * 5
    server.reply = lambda request, number: None
    samples = ask(server, tmp_path, names, (1.0,), concurrency=1)
    assert len(samples) == 20 and not any("failed" in r for _, _, r, _ in samples)


def test_the_last_question_of_a_run_that_went_well_does_not_end_it(serve, tmp_path):
    server = serve(always(REFUSAL))
    samples = ask(server, tmp_path, "a", (1.0,), answered=True)
    assert samples[0][2]["failed"] == "400: the prompt was filtered"


def test_a_server_that_turns_to_refusing_ends_the_run(serve, tmp_path):
    server = serve(lambda request, number: None if number == 1 else REFUSAL)
    with pytest.raises(SystemExit, match="none of 2[56] questions in a row"):
        ask(server, tmp_path, [f"q{i}" for i in range(100)], (1.0,))


@pytest.mark.parametrize("reply", [{"choices": []}, 500, slam, HTML])
def test_a_question_whose_answer_never_makes_sense_is_unanswered(serve, tmp_path, reply):
    server = serve(of("b", reply))
    server.reply = lambda request, number: (time.sleep(0.03), of("b", reply)(request, number))[1]
    questions = [f"q{i}" for i in range(20)]
    samples = ask(server, tmp_path, ["b", *questions], (1.0,))
    failed = {q: r["failed"] for q, _, r, _ in samples if "failed" in r}
    assert set(failed) == {"b"} and "failed 8 times, last" in failed["b"]


def test_the_last_question_may_fail_as_well(serve, tmp_path):
    """Others are answered before its tries are used up, so only the patience is left."""
    server = serve(of("b", {"choices": []}))
    samples = ask(server, tmp_path, "ab", (1.0,), patience=0.6)
    assert {q: "failed" in r for q, _, r, _ in samples} == {"a": False, "b": True}


def test_but_not_where_the_server_has_gone(serve, tmp_path):
    server = serve(of("b", 503))
    with pytest.raises(SystemExit, match="--patience"):
        ask(server, tmp_path, "ab", (1.0,), patience=0.6)
    assert [row["id"] for row in files.read_jsonl(tmp_path / "part.jsonl")] == ["a"]


# ---- waits ----

def test_retry_after_is_honoured():
    rng = random.Random(0)
    assert client.wait_before(0, "7", rng) == 7 and client.wait_before(0, " 7.5 ", rng) == 7.5
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    for nothing in (None, "soon", "", "0", past, "-5", "nan", "inf", "\u00b2", "1e9"):
        assert 0.7 < client.wait_before(0, nothing, rng) <= 1.3, nothing
        assert 6 <= client.wait_before(3, nothing, rng) <= 10
        assert 45 <= client.wait_before(10**6, nothing, rng) <= 75


def test_a_wait_is_never_longer_than_the_patience(serve, tmp_path, monkeypatch):
    """The server asks one question to wait for a day, and answers the others in the meantime."""
    tomorrow, seen = (429, b"", {"Retry-After": "86400"}), []

    def reply(request, number):
        time.sleep(0.2)
        if request["messages"][0]["content"] == "question a":
            seen.append(number)
            return tomorrow if len(seen) == 1 else None
    server = serve(reply)
    monkeypatch.undo()
    samples = ask(server, tmp_path, "abcdefgh", (1.0,), patience=0.6, timeout=1.0)
    assert len(samples) == 8 and len(seen) == 2 and not any("failed" in r for *_, r, _ in samples)


# ---- the key ----

def headers_of(server):
    return [r["headers"] for r in server.requests] + [headers for _, headers in server.asked]


def test_no_token_but_the_key_goes_to_the_server(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password netrc_secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server = serve()
    ask(server, tmp_path)
    client.problems(server.url, "m", "")
    assert len(headers_of(server)) == 7
    for headers in headers_of(server):
        assert "Authorization" not in headers and "secret" not in str(headers)
    server.requests, server.asked = [], []
    ask(server, tmp_path, "z", key=" own\n")
    client.problems(server.url, "m", "own")
    assert {headers["Authorization"] for headers in headers_of(server)} == {"Bearer own"}
    server.requests, server.asked = [], []
    ask(server, tmp_path, "y", key="Basic dXNlcjpodXNo")
    assert {headers["Authorization"] for headers in headers_of(server)} == {"Basic dXNlcjpodXNo"}


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_the_key_goes_nowhere_else(serve, tmp_path, code):
    other = serve()
    other.models = (200, b'{"data": []}')
    server = serve(always((code, b"", {"Location": other.url + "/chat/completions"})))
    server.models = (code, b"", {"Location": other.url + "/models"})
    with pytest.raises(SystemExit, match="--teacher-url"):
        ask(server, tmp_path, key="own")
    assert other.url in client.problems(server.url, "m", "own")[0]
    assert not headers_of(other)


def test_what_can_be_no_key(serve, tmp_path):
    server = serve()
    for key in ("na\u00efve", "two\nlines"):
        with pytest.raises(SystemExit, match="OPENAI_API_KEY"):
            ask(server, tmp_path, key=key)
        assert "OPENAI_API_KEY" in client.problems(server.url, "m", key)[0]
    assert not headers_of(server)


# ---- the journal ----

@pytest.mark.parametrize("line", [
    b"{}", b"7", b"null", b'{"id": "a", "j": 0}',
    b'{"id": "a", "j": "0", "temperature": 1.0, "text": "x", "ended": true}'])
def test_a_journal_with_a_foreign_line_is_named(serve, tmp_path, line):
    good = {"id": "a", "j": 0, "temperature": 1.0, "text": "x", "ended": True}
    (tmp_path / "part.jsonl").write_bytes(json.dumps(good).encode() + b"\n" + line + b"\n")
    server = serve()
    with pytest.raises(SystemExit, match="part.jsonl, line 2"):
        ask(server, tmp_path, "a", (1.0,))
    (tmp_path / "part.jsonl").write_bytes(json.dumps(good).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(SystemExit, match="part.jsonl, line 3"):      # blank lines count
        ask(server, tmp_path, "a", (1.0,))
    assert not server.requests


def test_a_journals_lone_surrogate_and_places_that_are_none(serve, tmp_path):
    rows = [{"id": "a", "j": j, "temperature": 1.0, "text": "\ud800", "ended": True}
            for j in (0, -1, 5)]
    (tmp_path / "part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [s[:3] for s in ask(serve(), tmp_path, "a", (1.0,))] == [
        ("a", 0, {"text": "\ufffd", "ended": True})]


# ---- before the first stage ----

@pytest.mark.parametrize("models, words", [
    ((200, b'{"data": [{"id": "m"}, {"id": "other"}]}'), None), ((404, b""), None),
    ((200, b'{"data": []}'), None), ((500, b""), None),
    ((200, b'{"data": [{"id": "other"}]}'), "the server at"), ((401, b""), "set OPENAI_API_KEY"),
    ((403, b""), "may not use this model"), (HTML, "no OpenAI-compatible server"),
    ((200, b"[1]"), "no OpenAI-compatible server"), ((200, b'{"data": 7}'), "no OpenAI-compatible"),
    ((200, b'{"data": ["m"]}'), "no OpenAI-compatible"), (slam, "nobody answers"),
    (stall, "no whole answer"), (trickle(b"\r\n", b" "), "no whole answer"),
    (trickle(b"X: ", b"y"), "no whole answer")])
def test_the_server_is_tried_before_the_first_stage(serve, models, words):
    server = serve()
    server.models = models
    found = client.problems(server.url, "m", "", timeout=0.5)
    assert len(found) == (words is not None) and (words is None or words in found[0])
    assert server.asked[0][0] == "/v1/models"


def test_words_of_a_server_are_one_short_line():
    assert chat.words(b'{"error": {"message": "too\\nlong\\u001b[31m"}}') == "too long [31m"
    assert chat.words(b'{"detail": [{"loc": 1}]}') == "{'detail': [{'loc': 1}]}"
    assert chat.words(b"") == "nothing" and len(chat.words(b"x" * 9999)) == 200


# ---- the stage ----

def flags(server, tmp_path, *more):
    return ["--questions", "5", "--out", str(tmp_path), "--teacher-url", server.url,
            "--teacher-model", "m", "--samples", "3", "--temperatures", "1.0", *more]


def stage(reply=lambda request, number: None):
    """Replies with "#### 7", so that there is a vote."""
    seven = completion(*[{"content": "#### 7"}] * 3)
    return lambda request, number: reply(request, number) or seven


def test_the_teacher_stage_through_a_server(serve, tmp_path, capsys):
    server = serve(stage(first(429, cut)))
    teacher.main(flags(server, tmp_path))
    rows = files.read_jsonl(tmp_path / "teacher.jsonl")
    assert len(rows) == 5 and all([r["answer"] for r in row["responses"]] == ["7"] * 3
                                  for row in rows)
    assert not (tmp_path / "teacher.part.jsonl").exists()
    assert "0.0% of the responses were cut off, 0.0% ended without" in capsys.readouterr().out
    asked = len(server.requests)
    teacher.main(flags(server, tmp_path))
    assert len(server.requests) == asked == 7


def test_a_question_that_is_refused_is_named_and_asked_again_when_that_is_wanted(
        serve, tmp_path, capsys):
    calls = []

    def reply(request, number):
        text = request["messages"][0]["content"]
        calls.append(text)
        return REFUSAL if text == calls[0] and request["n"] == 1 or request["n"] == 3 and \
            text == calls[0] else None
    server = serve(stage(reply))
    teacher.main(flags(server, tmp_path, "--concurrency", "1"))
    out = capsys.readouterr().out
    assert "20.0% of the responses, to 1 question, were not to be had" in out
    assert "400: the prompt was filtered" in out and "--retry-failed" in out
    rows = files.read_jsonl(tmp_path / "teacher.jsonl")
    bad = rows[0]["responses"] if "failed" in rows[0]["responses"][0] else rows[-1]["responses"]
    assert [(r["text"], r["ended"], r["answer"], r["failed"]) for r in bad] == \
        [("", False, None, "400: the prompt was filtered")] * 3
    asked = len(server.requests)
    teacher.main(flags(server, tmp_path))
    assert len(server.requests) == asked
    server.reply = stage()
    teacher.main(flags(server, tmp_path, "--retry-failed"))
    assert len(server.requests) == asked + 1
    rows = files.read_jsonl(tmp_path / "teacher.jsonl")
    assert len(rows) == 5 and not any("failed" in r for row in rows for r in row["responses"])
    assert json.loads((tmp_path / "settings.json").read_text())["teacher"]["retry_failed"] is False


def test_a_question_that_alone_is_left_may_be_refused(serve, tmp_path):
    """An earlier start was answered, so it is the question and not the request."""
    server = serve(stage())
    teacher.main(flags(server, tmp_path, "--questions", "4"))
    server.reply = always(REFUSAL)
    teacher.main(flags(server, tmp_path))
    rows = files.read_jsonl(tmp_path / "teacher.jsonl")
    assert ["failed" in row["responses"][0] for row in rows] == [False] * 4 + [True]


def test_samples_of_questions_that_are_not_asked_now_stay(serve, tmp_path):
    """Interrupted with 5 questions, then ended with 2: what came of the other 3 was paid for."""
    server = serve(stage())
    other = {"id": "arithmetic-1-train-4", "j": 0, "temperature": 1.0, "text": "#### 7",
             "ended": True}
    (tmp_path / "teacher.part.jsonl").write_text(json.dumps(other) + "\n")
    teacher.main(flags(server, tmp_path, "--questions", "2"))
    assert files.read_jsonl(tmp_path / "teacher.part.jsonl")[0] == other
    teacher.main(flags(server, tmp_path, "--questions", "5"))
    assert not (tmp_path / "teacher.part.jsonl").exists()
    assert sum(r.get("n", 1) for r in server.requests) == 14


@pytest.mark.parametrize("number, near", [(signal.SIGINT, 1), (signal.SIGTERM, 0)])
def test_ctrl_c_while_answers_are_under_way(serve, tmp_path, number, near):
    """8 requests: 3 are answered, `near` is about to be, the others would take a minute."""
    late, lock, count = threading.Event(), threading.Lock(), []

    def reply(request, number):
        with lock:
            count.append(number)
            mine = len(count)
        if mine > 3:
            late.wait(60)
            time.sleep(0.2 if mine <= 3 + near else 60)
        return completion({"content": "#### 7"})
    server = serve(reply)
    command = [sys.executable, str(ROOT / "data/teacher.py"), *flags(
        server, tmp_path, "--questions", "8", "--samples", "1", "--concurrency", "8")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, text=True,
                               stderr=subprocess.PIPE, env={**os.environ, "HF_TOKEN": "hf_secret"})
    journal, begun = tmp_path / "teacher.part.jsonl", time.monotonic()
    try:
        while len(files.read_jsonl(journal)) < 3 or len(server.requests) < 8:
            assert process.poll() is None and time.monotonic() - begun < 50
            time.sleep(0.05)
        process.send_signal(number)
        late.set()
        begun = time.monotonic()
        _, err = process.communicate(timeout=20)
        seconds = time.monotonic() - begun
    finally:
        process.kill()
    # A machine with more to do than it has cores is given more time.
    busy = max(os.getloadavg()[0] / os.cpu_count(), 1)
    assert seconds < 2 * busy and process.returncode == 1
    assert "the same command goes on" in err and "Traceback" not in err and "Task" not in err
    assert len(files.read_jsonl(journal)) == 3 + near
    assert not any("secret" in str(headers) for headers in headers_of(server))
    server.reply = stage()
    teacher.main(command[2:])
    assert len(server.requests) == 13 - near
    assert len(files.read_jsonl(tmp_path / "teacher.jsonl")) == 8
