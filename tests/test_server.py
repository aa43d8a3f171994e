"""The teacher behind a server, against a faulty server made for the purpose."""

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from data import server as client
from data import teacher
from nanodistill import run


class Server:
    """Answers chat completions with "#### <request number>"; `faults` are taken one a request: a status, "cut", "stall" or "garbage"."""

    def __init__(self, faults=(), choices=None, refuse_n=False):
        self.faults, self.requests, self.lock = list(faults), [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):                                    # the list of models
                status, body = outer.models
                outer.asked.append((self.path, self.headers.get("Authorization")))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    fault = outer.faults.pop(0) if outer.faults else None
                    if fault is None and refuse_n and request["n"] > 1:
                        fault = 400
                    outer.requests.append({**request, "fault": fault, "path": self.path, "key": self.headers.get("Authorization")})
                    number = len(outer.requests)
                body = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": {
                    "completion_tokens": 5, "prompt_tokens": 3, "total_tokens": 8}, "choices": [
                    {"index": k, "finish_reason": "stop", "message": {"role": "assistant", "content": f"{k} of {request['n']}\n#### {number}"}}
                    for k in range(min(request["n"], choices or request["n"]))]}).encode()
                if isinstance(fault, int):
                    self.send_response(fault)
                    self.send_header("Retry-After", "0")
                    self.end_headers()
                    return
                if fault == "stall":
                    outer.released.wait(5)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:20] if fault == "cut" else b"x" * len(body) if fault == "garbage" else body)

            def log_message(self, *args):
                pass

        self.models, self.asked = (501, b""), []                 # not every server has one
        self.released = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(client, "wait_before", lambda attempt, retry_after, rng: 0.01)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)      # as users have it; conftest.py sets it
    started = []

    def start(*args, **kwargs):
        started.append(Server(*args, **kwargs))
        return started[-1]
    yield start
    for server in started:
        server.close()


def ask(server, tmp_path, questions=("a", "b", "c"), temperatures=(0.7, 1.0, 0.7, 1.0), **kwargs):
    return list(client.generate(server.url, "m", "", {q: f"question {q}" for q in questions}, list(temperatures), 16, tmp_path / "part.jsonl",
                                **{**dict(concurrency=2, timeout=1.0), **kwargs}))


EVERY = sorted((q, j) for q in "abc" for j in range(4))


def test_several_samples_a_request_at_each_temperature(serve, tmp_path):
    server = serve()
    samples = ask(server, tmp_path)
    assert sorted((q, j) for q, j, *_ in samples) == EVERY and all(ended for *_, ended, _ in samples)
    assert len(server.requests) == 6 and {r["n"] for r in server.requests} == {2} and {r["temperature"] for r in server.requests} == {0.7, 1.0}
    assert {r["path"] for r in server.requests} == {"/v1/chat/completions"} and {r["model"] for r in server.requests} == {"m"}
    assert len({r["seed"] for r in server.requests}) == 6                # one seed for all would give the same sample again and again


@pytest.mark.parametrize("options", [dict(choices=1), dict(refuse_n=True)])
def test_a_server_that_gives_one_sample_a_request(serve, tmp_path, options):
    server = serve(**options)
    samples = ask(server, tmp_path)
    assert sorted((q, j) for q, j, *_ in samples) == EVERY
    assert len({text for _, _, text, *_ in samples}) == 12 and len({r["seed"] for r in server.requests if r["fault"] is None}) == 12


@pytest.mark.parametrize("fault", [429, 500, 503, "cut", "garbage", "stall"])
def test_faults_that_pass_are_tried_again(serve, tmp_path, fault):
    server = serve(faults=[fault, fault])
    assert sorted((q, j) for q, j, *_ in ask(server, tmp_path)) == EVERY
    assert len(server.requests) == 8


@pytest.mark.parametrize("fault, word", [(401, "OPENAI_API_KEY"), (404, "--teacher-url")])
def test_faults_that_stay_end_the_run_with_what_to_do(serve, tmp_path, fault, word):
    server = serve(faults=[fault] * 100)
    with pytest.raises(SystemExit, match=word):
        ask(server, tmp_path)
    assert len(server.requests) <= 2                                     # those under way when the first refusal came


def test_a_server_that_does_not_recover_ends_the_run_and_keeps_what_came(serve, tmp_path):
    server = serve(faults=[None] * 3 + [503] * 1000)
    with pytest.raises(SystemExit, match="goes on"):
        ask(server, tmp_path, concurrency=1, tries=3)
    assert len(run.read_jsonl(tmp_path / "part.jsonl")) == 6
    server.faults, server.requests = [], []
    assert sorted((q, j) for q, j, *_ in ask(server, tmp_path)) == EVERY
    assert len(server.requests) == 3                                     # nothing is asked for twice


def test_a_sample_of_another_temperature_is_asked_for_again(serve, tmp_path):
    server = serve()
    ask(server, tmp_path)
    server.requests = []
    assert sorted((q, j) for q, j, *_ in ask(server, tmp_path, temperatures=(0.7, 1.0, 0.7, 0.3))) == EVERY
    assert {r["temperature"] for r in server.requests} == {0.3} and len(server.requests) == 3


def test_offline_mode_is_an_error_that_says_so(serve, tmp_path, monkeypatch):
    server = serve()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="unset it"):
        ask(server, tmp_path)


def test_nobody_at_the_address(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "wait_before", lambda *_: 0.0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(SystemExit, match="failed 2 times"):
        list(client.generate("http://127.0.0.1:9/v1", "m", "", {"a": "q"}, [1.0], 16, tmp_path / "part.jsonl", tries=2))


def test_retry_after_is_honoured():
    rng = random.Random(0)
    assert client.wait_before(0, "7", rng) == 7
    assert client.wait_before(0, "Wed, 21 Oct 2015 07:28:00 GMT", rng) == 0
    assert 6 <= client.wait_before(3, None, rng) <= 10 and 6 <= client.wait_before(3, "soon", rng) <= 10 and client.wait_before(30, None, rng) <= 75


def test_the_teacher_stage_through_a_server(serve, tmp_path):
    server = serve(faults=[429, "cut"])
    flags = ["--questions", "5", "--out", str(tmp_path), "--teacher-url", server.url, "--teacher-model", "m", "--samples", "3", "--temperatures", "1.0"]
    teacher.main(flags)
    rows = run.read_jsonl(tmp_path / "teacher.jsonl")
    assert len(rows) == 5 and all(len(r["responses"]) == 3 and r["responses"][0]["answer"].isdigit() for r in rows)
    assert not (tmp_path / "teacher.part.jsonl").exists()
    asked = len(server.requests)
    teacher.main(flags)
    assert len(server.requests) == asked == 7


def test_the_hubs_token_is_nobodys_but_the_hubs(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server = serve()
    ask(server, tmp_path)
    client.problems(server.url, "m", "")
    sent = [r["key"] for r in server.requests] + [key for _, key in server.asked]
    assert len(sent) > 1 and not any("hf_secret" in (key or "") for key in sent)
    ask_with_key = client.generate(server.url, "m", "own", {"z": "q"}, [1.0], 16, tmp_path / "own.jsonl")
    list(ask_with_key)
    assert server.requests[-1]["key"] == "Bearer own"


@pytest.mark.parametrize("models, words", [
    ((200, b'{"data": [{"id": "m"}, {"id": "other"}]}'), None), ((404, b""), None),
    ((200, b'{"data": [{"id": "other"}]}'), "the server at"), ((401, b""), "set OPENAI_API_KEY"),
    ((403, b""), "may not use this model"), ((200, b"<html>"), "no OpenAI-compatible server"),
    ((200, b"[1]"), "no OpenAI-compatible server")])
def test_the_server_is_tried_before_the_first_stage(serve, models, words):
    server = serve()
    server.models = models
    found = client.problems(server.url, "m", "")
    assert len(found) == (words is not None) and (words is None or words in found[0])
    assert server.asked[0][0] == "/v1/models"
