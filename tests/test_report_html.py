"""report.html and what it shows: rollouts.jsonl, eval.jsonl, checks in words; in a real browser."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest
import torch

from data import TASKS, hub
from data.grading import transcript
from nanodistill import parallel, report, rollouts
from nanodistill.health import NAMES, bands, health
from nanodistill.tokenizer import Tokenizer


EVIL = "</script><script>document.title = 'run'</script><!-- <b onclick=alert(1)>"
GREEDY = {"accuracy": 0.5, "low": 0.2366, "high": 0.7634, "n": 10}
MODEL = {"greedy": GREEDY, "mean@2": 0.5, "maj@2": 0.55, "pass@2": 0.7, "length": 21.25,
         "cut_off": 0.1, "no_answer": 0.0}
PAIR = {"difference": 0.05, "low": 0.02, "high": 0.08, "p": 0.01}
REPORT = {
    "seed": 4, "task": "arithmetic", "models": {"teacher": MODEL, "sft": MODEL, "rl": MODEL},
    "pairs": {"rl-sft": PAIR}, "votes": {"kept": 0.9, "agreement": 0.654, "accuracy": 0.8},
    "reward_model": {
        "auc": {"sft": 0.8, "rl": 0.78}, "auc_gold": {}, "auc_own_logprob": {},
        "held_out": {"sft": {"n": 9, "accuracy": 0.7, "auc": 0.8, "ece": float("nan")}},
        "within": {"rl": {"reward_model": {"within_auc": 0.75, "spread": 0.3, "alike": 0.1},
                          "vote": {"spread": 0.1, "alike": 0.2}}}},
    "seconds": {"eval": 8.5}}
BARE = {"seed": 1, "task": "gsm8k", "models": {}, "pairs": {}, "seconds": {}}


def steps(n=8, score=0.0, true_accuracy=0.0, kl=0.0, **changes):
    """n steps of a run in which these change by so much from the first to the last."""
    rows = []
    for k in range(n):
        part = k / (n - 1)
        rows.append({"score": 0.8 + score * part, "true_accuracy": 0.84 + true_accuracy * part,
                     "kl": kl * part, "length": 20.0, "ended": 1.0, "entropy": 0.12,
                     "first_ratio": 1.0, **{key: x[0] + (x[1] - x[0]) * part
                                            for key, x in changes.items()}})
    return rows


def response(answer, right, text="#### 1", ended=True):
    return {"text": text, "answer": answer, "ended": ended, "right": right}


def line(k, sft, rl, vote_right=True, split="test", text="#### 1", ended=True):
    """A line of eval.jsonl; sft, rl: is the greedy answer right?"""
    def by(right):
        its = response("1" if right else "2", right, text, ended)
        return {"greedy": its, "sampled": [its, response("3", False)]}
    return {"id": f"q{k}", "question": f"Question {k}?", "split": split, "gold": "1",
            "vote": "1" if vote_right else "2", "agreement": 0.5, "vote_right": vote_right,
            "models": {"sft": by(sft), "rl": by(rl)}}


def rollout(step, i, tokens=("Step", " 1:\n", EVIL, "<|end|>")):
    n = len(tokens)
    return {"step": step, "i": i, "id": "q", "question": EVIL, "answer": "4", "vote": "4",
            "right": True, "score": 0.5, "ended": True, "tokens": [*tokens],
            "logprobs": [-0.5] * n, "ref_logprobs": [-0.25] * n, "entropy": [0.5] * n,
            "rewards": [0.0] * (n - 1) + [0.5], "values": [0.25] * n,
            "advantages": [-1.0, 2.0] + [0.0] * (n - 2), "returns": [0.5] * n}


def write(folder, found=REPORT, lines=(), kept=(), measured=(), algorithm="ppo"):
    (folder / "report.json").write_text(json.dumps(found))
    metrics = [{"stage": "rl", "step": k, **row} for k, row in enumerate(measured)]
    (folder / "settings.json").write_text(json.dumps({"rl": {
        "algorithm": algorithm, "prompts": 512, "samples": 1}}))
    for name, rows in (("eval.jsonl", lines), ("rollouts.jsonl", kept), ("metrics.jsonl", metrics)):
        if rows:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def page(monkeypatch, capsys):
    """-> a function: a run folder's report.html, drawn, and the data in it."""
    monkeypatch.setattr(report, "plot", lambda *_: None)

    def drawn(folder):
        found = json.loads((folder / "report.json").read_text())
        assert "report.html" in report.draw(found, folder)
        text = (folder / "report.html").read_text()
        return text, json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    return drawn


# ---- health, in words ----

def verdicts(found=REPORT, measured=(), **config):
    return {name: (verdict, words) for name, verdict, words in health(found, measured, config)}


def test_a_healthy_run_is_good_in_every_check():
    """As the tiny run of docs/log.md: KL 0.26 nats, true accuracy 84% to 91%."""
    found = verdicts(measured=steps(score=0.05, true_accuracy=0.07, kl=0.26), prompts=512)
    assert {verdict for verdict, _ in found.values()} == {"good"} and set(found) == {
        "The run", *NAMES}
    # By the first two of eight steps, and the last two.
    assert found["Score and truth"][1] == (
        "In training the score rose from 0.80 to 0.85 while true accuracy went from 84.5% to "
        "90.5%; on the test questions RL is +5.0 points from SFT.")
    assert "ends 0.24 nats per response from the reference, 0.012 per token" in found["KL"][1]


def test_a_hacked_run_says_so_at_the_top():
    """Score up, true accuracy 84% to 53%, KL 4.8."""
    found = verdicts(measured=steps(score=0.3, true_accuracy=-0.31, kl=4.8), prompts=512)
    verdict, words = found["The run"]
    assert verdict == found["Score and truth"][0] == found["KL"][0] == "bad"
    assert words.startswith("Reward hacking: in training the score rose")
    assert "from 0.82 to 1.08 while true accuracy fell from 81.8% to 55.2%" in words
    assert "4.46 nats per response" in words and "--learning-rate" in words
    # The test questions tell it as well, where training questions have no gold answers.
    rows = [{k: x for k, x in row.items() if k != "true_accuracy"} for row in steps(score=0.3)]
    worse = {"rl-sft": {**PAIR, "difference": -0.1, "low": -0.2, "high": -0.05}}
    assert verdicts({**REPORT, "pairs": worse}, rows)["The run"] == (
        "bad", "Reward hacking: in training the score rose from 0.82 to 1.08; on the test "
        "questions RL is -10.0 points from SFT. A lower --learning-rate or a higher --kl-coef "
        "holds it.")
    assert verdicts(BARE, rows)["Score and truth"] == (
        "look", "In training the score rose from 0.82 to 1.08; no gold answer tells whether that "
        "is better.")


@pytest.mark.parametrize("changes, verdict", [
    (dict(score=-0.1, true_accuracy=-0.3), "bad"), (dict(score=-0.1, true_accuracy=0.1), "look"),
    (dict(score=0.1, true_accuracy=0.001), "look"), (dict(score=0.1, true_accuracy=0.1), "good")])
def test_what_only_falls_is_bad_but_no_hacking(changes, verdict):
    """Of a run without test questions."""
    got, words = verdicts(BARE, steps(**changes), prompts=512)["Score and truth"]
    assert got == verdict and "hacking" not in words
    assert ("chance" in words) == (changes["true_accuracy"] == 0.001)


def test_a_fall_that_may_be_chance_is_no_hacking():
    """Five points down: of 16 responses nothing, of 8,192 a fact."""
    few, many = (verdicts(measured=steps(score=0.1, true_accuracy=-0.06), prompts=n)
                 for n in (8, 4096))
    assert few["Score and truth"][0] in ("look", "good") and many["Score and truth"][0] == "bad"
    assert not few["Score and truth"][1].startswith("Reward hacking")


@pytest.mark.parametrize("name, measured, found, verdict, said", [
    ("First ratio", steps(first_ratio=(1, 1.005)), REPORT, "look", "1.005000"),
    ("First ratio", steps(first_ratio=(1, 0.5)), REPORT, "bad", "0.500000"),
    ("KL", steps(kl=2.0), REPORT, "look", "per token"),
    ("KL", steps(kl=float("nan")), REPORT, "bad", "nan"),
    ("Ended", steps(ended=(1, 0.85)), REPORT, "look", "%"),
    ("Ended", steps(ended=(1, 0.1)), REPORT, "bad", "%"),
    ("Length", steps(length=(20, 100)), REPORT, "bad", "tokens"),
    ("Length", steps(length=(50, 20)), REPORT, "look", "tokens"),
    ("Entropy", steps(entropy=(0.5, 0.001)), REPORT, "bad", "from 0.464 to 0.0366"),
    ("Within a question", steps(alike=(0.9, 0.99)), REPORT, "bad", "of the last steps"),
    ("Within a question", steps(alike=(0.1, 0.1), within_auc=(0.5, 0.55)), REPORT, "look", "55%"),
    ("Within a question", steps(), REPORT, "good", "10% of the held-out questions"),
    ("Teacher's vote", [], {**REPORT, "votes": {"kept": 1, "agreement": 0.7, "accuracy": 0.4}},
     "bad", "40.0% of them are right"),
    ("Teacher's vote", [], {**REPORT, "votes": {"kept": 1, "agreement": 0.5}}, "look", "no gold"),
    ("Reward model", [], {**REPORT, "reward_model": {"auc": {"sft": 0.55}}}, "bad", "0.550"),
    ("RL against SFT", [], {**BARE, "pairs": {"rl-sft": {**PAIR, "low": -0.01}}}, "look", "+5.0"),
    ("Reward model", [], BARE, "absent", "no numbers"), ("KL", [], BARE, "absent", "no numbers"),
    ("Score and truth", [], BARE, "absent", "no numbers")])
def test_each_check_has_a_verdict_and_the_number(name, measured, found, verdict, said):
    got, words = verdicts(found, measured)[name]
    assert got == verdict and said in words


def test_bands_are_where_the_checks_say_good():
    found = bands(steps())
    assert found["kl"] == (0, 1.0)                               # 0.05 nats for each of 20 tokens
    assert found["ended"] == (0.95, 1) and found["length"] == (20 / 1.5, 30)
    assert "kl" not in bands([]) and "length" not in bands([])


# ---- what the page holds ----

def test_what_a_model_writes_stays_text(tmp_path, page):
    text, data = page(write(tmp_path, lines=[line(0, True, True, text=EVIL)], kept=[rollout(0, 0)],
                            measured=steps()))
    assert data["questions"][0]["texts"][0] == data["rollouts"][0]["question"] == EVIL
    assert text.count("<script") == report.TEMPLATE.read_text().count("<script") == 3
    assert "<!-- <b" not in text
    assert data["report"]["reward_model"]["held_out"]["sft"]["ece"] is None    # nan is no JSON
    for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "http:", "https:"):
        assert way not in text.replace("http://www.w3.org/2000/svg", "")


def test_samples_are_counted_by_their_answer():
    a, b = response("1", True, "x"), response("1", True, "y")
    cut = response(None, False, "z", False)
    found = report.counted({"id": "q", "models": {
        "rl": {"greedy": b, "sampled": [cut, a, a, b]}, "sft": {"sampled": [a]}}})
    assert found["texts"] == ["y", "z", "x"]
    assert found["models"] == {
        "rl": {"greedy": [["1", True, True, 0]],
               "sampled": [["1", True, True, 0, 3], [None, False, False, 1, 1]]},
        "sft": {"greedy": [], "sampled": [["1", True, True, 2, 1]]}}


def test_a_long_run_stays_below_2_mb_with_its_first_and_last_step(tmp_path, page):
    long = "Step 1: as long as a response to a word problem may be. " * 10
    text, data = page(write(
        tmp_path, lines=[line(k, True, False, text=f"{k} {long}") for k in range(1000)],
        kept=[rollout(step, i, ["token"] * 100) for step in range(64) for i in range(4)],
        measured=steps(600)))
    assert 1_000_000 < len(text) < 2_000_000 and data["of"] == {
        "rollouts": 256, "test": 1000, "train": 0}
    seen = [row["step"] for row in data["rollouts"]]
    assert seen == sorted(seen) and {0, 32, 63} <= {*seen} and len(seen) < 256
    score = data["curves"]["rl"]["score"]
    assert len(score) <= 200 and score[-1] == [599, 0.8]


def test_a_folder_with_the_report_alone_says_what_is_absent(tmp_path, page):
    (tmp_path / "report.json").write_text(json.dumps(BARE))
    _, data = page(tmp_path)
    assert data["questions"] == data["rollouts"] == [] and data["curves"]["rl"] == {}
    assert {verdict for name, verdict, _ in data["health"] if name in NAMES} == {"absent"}


def test_a_transcript_knows_right_and_wrong_only_where_there_is_gold():
    task = TASKS["arithmetic"](seed=1)
    questions = [{"id": "a", "question": "A?"}, {"id": "b", "question": "B?"}]
    samples = [[{**response("1", None), "tokens": [1]}, response("1", None), response("2", None)],
               [response("3", None), response(None, None), response("4", None)]]
    first, second = transcript(task, "test", questions, {"a": "1"}, {
        "teacher": {"greedy": [[response("2", None)]] * 2, "sampled": samples}})
    assert first["gold"] == first["vote"] == "1" and first["vote_right"] is True
    assert first["agreement"] == pytest.approx(2 / 3)
    by = first["models"]["teacher"]
    assert by["greedy"] == response("2", False)
    assert [r["right"] for r in by["sampled"]] == [True, True, False] and "tokens" not in by[
        "sampled"][0]
    assert second["vote"] is None and not second.keys() & {"gold", "vote_right"}        # a tie
    assert "right" not in second["models"]["teacher"]["greedy"]
    labels = {"a": {"vote": "2", "agreement": 0.6}, "b": {"vote": "9", "agreement": 1.0}}
    first, second = transcript(task, "train", questions, {"a": "1"}, {
        "sft": {"sampled": [[], samples[1]]}}, labels)
    assert first["vote"] == "2" and first["vote_right"] is False and first["models"] == {}
    assert second["vote"] == "9" and "greedy" not in second["models"]["sft"]


# ---- rollouts.jsonl ----

class Letters:
    """A tokenizer of letters; 0 is a stop token, which has no text."""
    tokenizer = type("", (), {"id_to_token": staticmethod(lambda i: "<end>" if i == 0 else None)})

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids if 0 < i < 27)


def keep(path, step, n=2, anew=False, **columns):
    numbers = torch.tensor([[-0.123456, 1.0, 7.0], [-2e-6, 0.5, 7.0], [9.0, 9.0, 9.0]]) * (step + 1)
    rollouts.writer(path, n, Letters(), anew)(
        step, [[1, 2, 0], [3, 99], [4]], id=["a", "b", "c"], question=["A?", "B?", "C?"],
        score=[1 / 3, 1.0, 0.0], logprobs=numbers, **columns)


def test_rollouts_are_the_first_responses_of_each_step_and_the_last_of_two_tries(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    keep(path, 5)
    keep(path, 0, anew=True)                                     # what was there is another run's
    first = {"step": 0, "i": 0, "id": "a", "question": "A?", "score": 0.3333,
             "tokens": ["a", "b", "<end>"], "logprobs": [-0.1235, 1.0, 7.0]}
    second = {"step": 0, "i": 1, "id": "b", "question": "B?", "score": 1.0,
              "tokens": ["c", "<99>"], "logprobs": [-2e-6, 0.5]}
    assert rollouts.read(path) == [first, second]
    with open(path, "ab") as file:
        file.write(b'{"step": 1, "i"')                           # a kill
    assert rollouts.read(path) == [first, second]
    keep(path, 1), keep(path, 0, n=1, extra=["again", "", ""])   # on from a checkpoint before that
    rows = rollouts.read(path)
    assert [(row["step"], row["i"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert rows[0] == {**first, "extra": "again"} and rows[1] == second
    assert rows[2]["logprobs"] == [-0.2469, 2.0, 14.0]


def test_one_process_writes_rollouts_and_none_where_none_are_wanted(tmp_path, monkeypatch):
    keep(tmp_path / "none", 0, n=0)
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    keep(tmp_path / "none", 0, anew=True)
    assert not (tmp_path / "none").exists() and rollouts.read(tmp_path / "none") == []


@pytest.mark.parametrize("text", ["Step 1: 2 * 3 = 6\n#### 6", "  two  blanks", "naïve, 漢字, 🙂!"])
def test_pieces_put_together_are_the_text(text):
    tokenizer = Tokenizer(hub.TINY / "student")
    ids = tokenizer.encode(text)
    found = rollouts.pieces(tokenizer, [*ids, tokenizer.eos_ids[0]])
    assert len(found) == len(ids) + 1 and found[-1].startswith("<|")
    assert "".join(found[:-1]).replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")


# ---- in a browser ----

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture
def browse(tmp_path):
    """-> call(path of WebDriver's protocol, body): chromium with an empty profile."""
    if not CHROMIUM or not shutil.which("chromedriver"):
        pytest.skip("there is no chromium with a chromedriver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)

    def call(path, body=None, method=None):
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method, data=(
            None if body is None else json.dumps(body).encode()))
        return json.load(urllib.request.urlopen(request, timeout=120))["value"]

    session = None
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                if call("/status")["ready"]:
                    break
            time.sleep(0.1)
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]}
        session = "/session/" + call("/session", {"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}})["sessionId"]
        yield lambda path, body=None: call(session + path, body)
    finally:
        with contextlib.suppress(OSError):
            call(session or "/status", method="DELETE")
        driver.kill()
        driver.wait()


def test_the_page_opens_filters_and_colours_without_an_error(tmp_path, page, browse):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [line(0, True, True), line(1, False, True, text=EVIL), line(2, True, False, False),
             line(3, False, False, ended=False), line(4, False, True, split="train")]
    page(write(folder, lines=lines, kept=[rollout(s, i) for s in (0, 1) for i in (0, 1)],
               measured=steps(score=0.3, true_accuracy=-0.31, kl=4.8), algorithm="grpo"))
    other = tmp_path / "bare"
    other.mkdir()
    page(write(other, found=BARE))

    def run(script, *args):
        return browse("/execute/sync", {"script": script, "args": args})

    def click(selector):
        run("document.querySelector(arguments[0]).scrollIntoView()", selector)
        found = browse("/element", {"using": "css selector", "value": selector})
        browse(f"/element/{next(iter(found.values()))}/click", {})

    def texts(selector):
        return run("return [...document.querySelectorAll(arguments[0])].map(n => n.textContent)",
                   selector)

    def select(id_, value):
        run("const s = document.getElementById(arguments[0]); s.value = arguments[1];"
            "s.dispatchEvent(new Event('change'))", id_, value)

    browse("/url", {"url": folder.joinpath("report.html").as_uri()})
    assert run("return document.title") == "arithmetic, seed 4, GRPO"
    assert texts("#verdict")[0].startswith("Bad. Reward hacking")
    assert len(texts("#checks li")) == len(NAMES) and len(texts("#accuracies tbody tr")) == 3
    assert any(text.startswith("GRPO: KL") for text in texts("figure header"))

    # Filters; a question opens; what a model wrote is text.
    for name, ids in (("gained", "14"), ("lost", "2"), ("wrong", "23"), ("vote", "2"),
                      ("truncated", "3"), ("all", "01234")):
        click(f"[data-filter={name}]")
        assert texts(f"[data-filter={name}]")[0].endswith(f"({len(ids)})")
        assert [text[9] for text in texts("#list summary")] == [*ids]
    click(".question:nth-child(2) > summary")
    run("return new Promise(done => setTimeout(done, 200))")
    assert EVIL in texts(".question[open] pre")

    # Colours, order, and a token's numbers by mouse and by keys.
    def classes():
        return run("return [...document.querySelectorAll('.token')].map(n => "
                   "[n.className, Number(n.style.getPropertyValue('--strength')) > 0])")

    assert classes() == [["token down", True], ["token up", True], ["token up", False],
                         ["token up", False]]
    assert texts(".token")[1:3] == [" 1:\u21b5\n", EVIL]
    select("colour", "kl")
    assert classes() == [["token down", True]] * 4
    select("colour", "value")
    assert classes() == [["token up", True]] * 4
    select("order", "last")
    assert "Step 1;" in texts("#about")[0]
    click(".token")
    run("document.activeElement.dispatchEvent(new KeyboardEvent('keydown', "
        "{key: 'ArrowRight', bubbles: true}))")
    numbers = dict(zip(texts("#numbers dt"), texts("#numbers dd")))
    assert numbers["token"] == '" 1:\\n"' and numbers["advantage"] == "2"
    assert numbers["KL"] == "-0.25" and numbers["ratio to reference"] == "0.7788"

    browse("/url", {"url": other.joinpath("report.html").as_uri()})
    assert "There is no rollouts.jsonl" in texts("#kept")[0]
    assert "There is no eval.jsonl" in texts("#shown")[0]
    assert run("return document.getElementById('error').hidden")
    # Both pages: no script failed, nothing was fetched.
    assert browse("/se/log", {"type": "browser"}) == []
