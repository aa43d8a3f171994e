"""The four scripts on a small run: they chain, resume and accumulate exactly, need no gold."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SAMPLER_GAP
from safetensors.torch import load_file, save_file

import eval as evaluation
import train_rl
import train_rm
import train_sft
from data import TASKS, hub, response_ids, teacher
from nanodistill import files, generate, process, report, responses, rollouts, run, weights
from nanodistill.tokenizer import Tokenizer


ROOT = Path(__file__).resolve().parents[1]
# A date, for a test that goes on past midnight is of another day.
COMMON = ["--questions", "80", "--threads", "1", "--seed", "7", "--date", "2026-01-31"]
SFT = ["--epochs", "1", "--batch-size", "16"]
RM = ["--epochs", "0.5", "--samples", "4", "--batch-size", "16"]
RL = ["--steps", "3", "--prompts", "32"]
# Muon's steps magnify the rounding of the last bit.
ADAMW = ["--optimizer", "adamw", "--learning-rate", "1e-4"]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A run folder with the teacher's samples."""
    folder = tmp_path_factory.mktemp("run")
    teacher.main([*COMMON, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def finished(sampled):
    """A run folder after every stage."""
    out = ["--out", str(sampled)]
    train_sft.main(COMMON + SFT + out)
    train_rm.main(COMMON + RM + out)
    train_rl.main(COMMON + RL + out)
    return sampled


def copy(source, target, *names):
    """A new run folder with some of another's files."""
    target.mkdir()
    for name in names:
        (shutil.copytree if (source / name).is_dir() else shutil.copy)(source / name, target / name)
    return ["--out", str(target)]


def same_weights(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return all(torch.equal(a[key], b[key]) for key in a.keys() | b.keys())


def steps_of(folder, stage, key):
    return {step: row[key] for step, row in run.read_metrics(folder, stage).items() if key in row}


def test_first_minibatch_of_every_step_starts_from_the_policy_sampled(finished):
    rows = [row for row in run.read_metrics(finished, "rl").values() if "score" in row]
    assert len(rows) == 3
    for row in rows:
        assert row["first_ratio"] == pytest.approx(1, abs=1e-5)
        assert row["first_approx_kl"] == pytest.approx(0, abs=1e-9)
        assert row["first_clipfrac"] == 0
        # The logprobs scored are those sampled from.
        assert row["sampler_gap"] < SAMPLER_GAP and 0 <= row["sampler_kl"] < SAMPLER_GAP**2
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4) and abs(rows[2]["kl"]) > 1e-3
    assert rows[2]["ratio"] != pytest.approx(1, abs=1e-7)        # it did move within a step
    # Of three steps, one is no warm-up.
    rates = [row["learning_rate"] for row in rows]
    assert rates == pytest.approx([2e-4, 2e-4 * 2 / 3, 2e-4 / 3])


def test_report(finished, tmp_path):
    found = json.loads((finished / "report.json").read_text())
    assert found["seed"] == 7 and found["task"] == "arithmetic"
    assert set(found["models"]) == {"teacher", "base", "sft", "rl"}
    for m in found["models"].values():
        assert set(m["greedy"]) == {"accuracy", "low", "high", "n"} and m["greedy"]["n"] == 80
        assert 0 <= m["greedy"]["low"] <= m["greedy"]["accuracy"] <= m["greedy"]["high"] <= 1
        assert m["mean@8"] <= m["pass@8"] and m["maj@8"] <= m["pass@8"]
    assert {"rl-sft", "rl-teacher", "sft-teacher"} <= set(found["pairs"])
    assert all({"difference", "low", "high"} <= set(p) for p in found["pairs"].values())
    for key in ("auc", "auc_gold", "auc_own_logprob"):
        assert set(found["reward_model"][key]) == {"teacher", "sft", "rl"}
    for by in found["reward_model"]["within"].values():
        assert set(by) == {"reward_model", "vote"}
        assert all(0 <= f["alike"] <= 1 for f in by.values())
    assert set(found["votes"]) == {"kept", "agreement", "accuracy", "both"}
    assert set(found["votes"]["both"]) == {"kept", "agreement", "accuracy"}
    # The stage's own last look at the held-out responses, by the same votes.
    last = [*run.read_metrics(finished, "rm").values()][-1]
    for name, source in (("teacher", "teacher"), ("sft", "student")):
        figures = found["reward_model"]["held_out"][name]
        assert figures["n"] == last[f"n_{source}"]
        assert figures["auc"] == pytest.approx(last[f"auc_{source}"], abs=1e-6)
        assert figures["accuracy"] == pytest.approx(last[f"accuracy_{source}"])
    assert set(found["seconds"]) == {"teacher", "sft", "rm", "rl", "eval"}
    assert "| rl | " in (finished / "report.md").read_text()
    # Drawn anew elsewhere, page and pictures are those that the evaluation left.
    copy(finished, tmp_path / "run", "metrics.jsonl", "settings.json", "eval.jsonl",
         "rollouts.jsonl")
    for name in report.draw(found, tmp_path / "run"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_the_responses_stay_with_what_is_right_of_them(finished):
    found = json.loads((finished / "report.json").read_text())
    lines = files.read_jsonl(finished / "eval.jsonl")
    test, train = ([line for line in lines if line["split"] == split]
                   for split in ("test", "train"))
    assert len(test) == 80 and {line["id"] for line in train} == {
        row["id"] for row in files.read_jsonl(finished / "labels.jsonl")
        if run.held_out(row["id"]) and row["vote"] is not None} != set()
    for name, m in found["models"].items():
        said = [line["models"][name] for line in test]
        assert sum(by["greedy"]["right"] for by in said) == 80 * m["greedy"]["accuracy"]
        every = [r for by in said for r in by["sampled"]]
        assert sum(r["right"] for r in every) / 640 == pytest.approx(m["mean@8"])
        assert len(every) == 640 and {*every[0]} == {"text", "answer", "ended", "right"}
    asked = {row["id"]: row for row in files.read_jsonl(finished / "teacher.jsonl")}
    for line in train:
        teachers = line["models"]["teacher"]["sampled"]
        assert [r["text"] for r in teachers] == [r["text"] for r in asked[line["id"]]["responses"]]
        assert [r["right"] for r in teachers] == [r["answer"] == line["gold"] for r in teachers]
        assert line["vote_right"] == (line["vote"] == line["gold"])
        assert len(line["models"]["rl"]["sampled"]) == 8


def test_some_rollouts_of_each_step_stay_with_what_each_token_was_worth(finished):
    rows, asked = rollouts.read(finished / "rollouts.jsonl"), TASKS["arithmetic"](seed=7)
    assert [(row["step"], row["i"]) for row in rows] == [(s, i) for s in range(3) for i in range(8)]
    questions = {q["id"]: q["question"] for q in asked.questions("train")}
    for row in rows:
        assert row["question"] == questions[row["id"]] and row["ended"]
        *pieces, end = row["tokens"]
        assert asked.extract_answer("".join(pieces)) == row["answer"] and end == "<|end|>"
        assert row["right"] == (row["answer"] == row["vote"])
        drift = sum(row["logprobs"]) - sum(row["ref_logprobs"])
        # The probability that is the score is within 0 and 1; a nat of drift costs 0.05.
        assert sum(row["rewards"]) == pytest.approx(row["score"] - 0.05 * drift, abs=1e-3)
        assert row["step"] or drift == pytest.approx(0, abs=1e-3)
        for key in ("entropy", "rewards", "values", "advantages", "returns"):
            assert len(row[key]) == len(row["tokens"])
        assert row["returns"][-1] == pytest.approx(row["rewards"][-1], abs=1e-3)   # nothing follows


def test_every_folder_loads_in_transformers_with_equal_logits(finished):
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(4, 400, (2, 40))
    with torch.no_grad():
        for name in ("sft", "rl"):
            oracle = transformers.AutoModelForCausalLM.from_pretrained(
                finished / name, dtype=torch.float32)
            assert (oracle(ids).logits - weights.load(finished / name)(ids)).abs().max() <= 1e-4
        reward_model = transformers.AutoModelForSequenceClassification.from_pretrained(
            finished / "rm", dtype=torch.float32)
        ours = weights.load(finished / "rm", weights.ScalarModel)(ids)[:, -1]
        assert (reward_model(ids).logits.squeeze(-1) - ours).abs().max() <= 1e-4


class StopAfter:
    """Stands in for `process.interruptible`: the n-th time that a loop asks, Ctrl-C has come."""

    def __init__(self, n):
        self.left = n

    def __call__(self):
        return self

    def __enter__(self):
        return self.stop

    def __exit__(self, *_):
        pass

    def stop(self):
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("stage, script, flags, inputs", [
    ("sft", train_sft, SFT, ["teacher.jsonl", "labels.jsonl"]),
    ("rm", train_rm, RM, ["teacher.jsonl", "labels.jsonl", "student.jsonl", "sft"]),
    ("rl", train_rl, RL, ["teacher.jsonl", "labels.jsonl", "student.jsonl", "sft", "rm"])])
def test_stopped_and_resumed_equals_unbroken(
        finished, tmp_path, monkeypatch, capsys, stage, script, flags, inputs):
    out = copy(finished, tmp_path / "broken", *inputs)
    monkeypatch.setattr(process, "interruptible", StopAfter(2))
    # No evaluation after RL.
    monkeypatch.setattr(process, "need", lambda *_: None)
    with pytest.raises(SystemExit, match="stopped after saving"):
        script.main(COMMON + flags + out)
    folder = tmp_path / "broken" / stage
    assert (folder / "resume.pt").exists() and not (folder / "model.safetensors").exists()
    monkeypatch.setattr(process, "interruptible", StopAfter(10**9))
    script.main(COMMON + flags + out)
    assert same_weights(folder, finished / stage)
    assert not (folder / "resume.pt").exists()                           # for 1b it has 30 GB
    key = "score" if stage == "rl" else "loss"
    assert steps_of(tmp_path / "broken", stage, key) == steps_of(finished, stage, key) != {}
    if stage == "rl":
        assert (tmp_path / "broken" / "rollouts.jsonl").read_bytes() == (
            finished / "rollouts.jsonl").read_bytes()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "broken" / "report.md").write_text("the table")
    capsys.readouterr()
    script.main(COMMON + flags + out)                            # nothing is trained twice
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    printed = capsys.readouterr().out
    assert "is complete" in printed and (stage != "rl" or "the table" in printed)


def test_lora_goes_through_every_stage_and_resumes_exactly(sampled, tmp_path, monkeypatch, capsys):
    """Its PPO starts from the policy that sampled, and a checkpoint holds what is trained alone."""
    monkeypatch.setattr(process, "need", lambda *_: None)
    whole, broken = (copy(sampled, tmp_path / name, "teacher.jsonl", "labels.jsonl")
                     for name in ("whole", "broken"))
    for stage, script, flags in (("sft", train_sft, SFT), ("rm", train_rm, RM),
                                 ("rl", train_rl, RL)):
        asked = [*COMMON, *flags, "--lora", "4"]
        monkeypatch.setattr(process, "interruptible", StopAfter(10**9))
        script.main(asked + whole)
        assert "LoRA of rank 4, alpha 32: 0.03 of" in capsys.readouterr().out
        if stage == "rm":
            # Else the stop would come while it samples.
            shutil.copy(tmp_path / "whole" / "student.jsonl", tmp_path / "broken")
        monkeypatch.setattr(process, "interruptible", StopAfter(2))
        with pytest.raises(SystemExit, match="stopped after saving"):
            script.main(asked + broken)
        folder = tmp_path / "broken" / stage
        saved = torch.load(folder / "resume.pt", weights_only=True)["model" if stage != "rl" else
                                                                    "policy"]
        assert all("lora_" in name or name == "score.weight" for name in saved)
        monkeypatch.setattr(process, "interruptible", StopAfter(10**9))
        script.main(asked + broken)
        assert same_weights(tmp_path / "whole" / stage, folder)
        adapters = [(tmp_path / name / stage / "adapter" / "adapter_model.safetensors").read_bytes()
                    for name in ("whole", "broken")]
        assert adapters[0] == adapters[1]
    rows = [row for row in run.read_metrics(tmp_path / "whole", "rl").values() if "score" in row]
    assert [row["first_ratio"] for row in rows] == pytest.approx([1] * 3, abs=1e-5)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4) and rows[2]["ratio"] != 1


def test_teacher_resumes_without_asking_twice(sampled, tmp_path):
    copy(sampled, tmp_path / "torn", "teacher.jsonl")
    path = tmp_path / "torn" / "teacher.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:70]) + lines[70][:50])      # killed in the middle of a line
    teacher.main([*COMMON, "--out", str(tmp_path / "torn")])
    rows = files.read_jsonl(path)
    assert path.read_bytes().startswith(b"".join(lines[:70]))            # what was there stays
    assert len({row["id"] for row in rows}) == len(rows) == 80
    assert all(len(row["responses"]) == 10 for row in rows)
    assert len(files.read_jsonl(tmp_path / "torn" / "labels.jsonl")) == 80
    with pytest.raises(SystemExit, match="--temperatures was '0.7,0.8,0.9,1.0,1.1', not '0.5'"):
        teacher.main([*COMMON, "--temperatures", "0.5", "--out", str(tmp_path / "torn")])


def test_a_student_with_another_tokenizer_learns_the_same_from_the_teachers_text(sampled, tmp_path):
    """The tiny student, and the same with its token ids in reverse order: a loss that took the
    teacher's ids for its own would differ."""
    source, other = hub.TINY / "student", tmp_path / "other"
    shutil.copytree(source, other)
    raw = json.loads((source / "tokenizer.json").read_text())
    last = len(raw["model"]["vocab"]) - 1
    raw["model"]["vocab"] = {token: last - i for token, i in raw["model"]["vocab"].items()}
    for token in raw["added_tokens"]:
        token["id"] = last - token["id"]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((source / name).read_text())
        turned = {key: last - raw[key] for key in ("eos_token_id", "pad_token_id")}
        (other / name).write_text(json.dumps({**raw, **turned}))
    tensors = load_file(source / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"][:last + 1]
    tensors["model.embed_tokens.weight"][:last + 1] = rows.flip(0)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert Tokenizer(other).encode("Step 1: 2") != Tokenizer(source).encode("Step 1: 2")
    losses = []
    for student in (source, other):
        out = copy(sampled, tmp_path / f"run of {student.name}", "teacher.jsonl", "labels.jsonl")
        named = ["--student", str(student), "--teacher", "tiny", "--task", "arithmetic"]
        train_sft.main([*COMMON, *SFT, *named, "--max-new-tokens", "56", "--learning-rate", "5e-4",
                        *out])
        measured = steps_of(tmp_path / f"run of {student.name}", "sft", "held_out_loss")
        losses.append(list(measured.values()))
    # A text read with the wrong ids has several nats per token.
    assert losses[0][0] < 0.5 and losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("script, stage, flags, inputs, key", [
    (train_sft, "sft", SFT, ["teacher.jsonl", "labels.jsonl"], "loss"),
    (train_rm, "rm", RM + ADAMW, ["teacher.jsonl", "labels.jsonl", "student.jsonl", "sft"], "loss"),
    (train_rm, "rm", RM + ADAMW + ["--rm-loss", "bt", "--batch-size", "4"],
     ["teacher.jsonl", "labels.jsonl", "student.jsonl", "sft"], "loss"),
    (train_rl, "rl", ["--steps", "2", "--prompts", "32"],
     ["teacher.jsonl", "labels.jsonl", "student.jsonl", "sft", "rm"], "value_loss")])
def test_micro_batches_do_not_change_the_training(
        finished, tmp_path, monkeypatch, script, stage, flags, inputs, key):
    monkeypatch.setattr(process, "need", lambda *_: None)
    figures = []
    for micro in ("2", "8"):
        out = copy(finished, tmp_path / micro, *inputs)
        script.main([*COMMON, *flags, "--micro-batch", micro, *out])
        figures.append(list(steps_of(tmp_path / micro, stage, key).values()))
    assert figures[0] and figures[0] == pytest.approx(figures[1], rel=1e-3)


def test_with_a_probability_as_score_the_values_are_probabilities_too(
        finished, tmp_path, monkeypatch):
    """A reward model of huge scores: the step's mean score and the value loss show which of the two
    was squashed."""
    monkeypatch.setattr(process, "need", lambda *_: None)
    rows = {}
    for kind in ("logit", "probability"):
        out = copy(finished, tmp_path / kind, "labels.jsonl", "sft", "rm")
        tensors = load_file(tmp_path / kind / "rm" / "model.safetensors")
        tensors["score.weight"] *= 100
        save_file(tensors, tmp_path / kind / "rm" / "model.safetensors")
        train_rl.main([*COMMON, "--steps", "1", "--prompts", "32", "--score", kind, *out])
        rows[kind] = run.read_metrics(tmp_path / kind, "rl")[0]
    assert abs(rows["logit"]["score"]) > 1 and 0 <= rows["probability"]["score"] <= 1
    assert rows["logit"]["value_loss"] > 1 > rows["probability"]["value_loss"]


def test_with_less_than_a_batch_to_train_on_a_step_takes_all_of_it_and_says_so(
        finished, tmp_path, capsys):
    out = copy(finished, tmp_path / "run", "teacher.jsonl", "labels.jsonl", "student.jsonl", "sft")
    for script, stage, flags in ((train_rm, "rm", RM), (train_sft, "sft", SFT)):
        shutil.rmtree(tmp_path / "run" / stage, ignore_errors=True)
        script.main([*COMMON, *flags, "--epochs", "2.5", "--batch-size", "100000", *out])
        assert "less than one batch of 100000" in capsys.readouterr().out
        assert weights.complete(tmp_path / "run" / stage)
        # Two whole passes, a step each.
        assert max(run.read_metrics(tmp_path / "run", stage)) == 2


def test_no_vote_left_is_an_error_that_says_what_to_do(finished, tmp_path):
    out = copy(finished, tmp_path / "run", "teacher.jsonl", "labels.jsonl", "student.jsonl", "sft")
    rows = files.read_jsonl(tmp_path / "run" / "labels.jsonl")
    (tmp_path / "run" / "labels.jsonl").write_text("".join(
        json.dumps({**row, "vote": None, "labels": [False] * 10}) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="No question has both a vote in"):
        train_rm.main([*COMMON, *RM, *out])
    shutil.rmtree(tmp_path / "run" / "sft")
    with pytest.raises(SystemExit, match="no response to train on"):
        train_sft.main([*COMMON, *SFT, *out])
    assert not (tmp_path / "run" / "sft").exists() and not (tmp_path / "run" / "rm").exists()


def test_training_scripts_do_not_name_gold():
    for name in ("train_sft.py", "train_rm.py", "train_rl.py", "data/teacher.py"):
        tree = ast.walk(ast.parse((ROOT / name).read_text()))
        names = {node.attr if isinstance(node, ast.Attribute) else node.id for node in tree
                 if isinstance(node, (ast.Attribute, ast.Name))}
        assert "gold" not in names, name
        assert name == "train_rl.py" or "true_accuracy" not in names, name


def test_nothing_trained_depends_on_gold(finished, tmp_path, monkeypatch):
    """With gold out of reach, and then false, every stage trains to the very same weights."""
    Task = TASKS["arithmetic"]

    def unreachable(self, split):
        raise AssertionError("a training stage read the gold answers")

    monkeypatch.setattr(Task, "gold", unreachable)
    monkeypatch.setattr(process, "need", lambda *_: None)
    out = ["--out", str(tmp_path)]
    teacher.main(COMMON + out)
    train_sft.main(COMMON + SFT + out)
    train_rm.main(COMMON + RM + out)
    monkeypatch.setattr(Task, "gold", lambda self, split: {
        q["id"]: "wrong" for q in self.questions(split)})
    # It logs true_accuracy, and here that log is wrong.
    train_rl.main(COMMON + RL + out)
    assert set(steps_of(tmp_path, "rl", "true_accuracy").values()) == {0.0}
    for stage in ("sft", "rm", "rl"):
        assert same_weights(tmp_path / stage, finished / stage), stage


def test_sft_and_rm_train_the_eos_and_no_prompt_token(finished):
    """A student that never saw the EOS in its loss would not stop; and RM rows end in EOS exactly
    when the response ended."""
    rl = [row for row in run.read_metrics(finished, "rl").values() if "score" in row]
    assert rl[0]["ended"] > 0.9
    tokenizer = Tokenizer(finished / "sft")
    row = files.read_jsonl(finished / "student.jsonl")[0]["responses"][0]
    assert row["ended"] and tokenizer.eos_ids[0] not in tokenizer.encode(row["text"])


def test_ctrl_c_saves_and_the_same_command_goes_on(finished, tmp_path):
    """A real SIGINT to a real process."""
    out = copy(finished, tmp_path / "run", "teacher.jsonl", "labels.jsonl", "student.jsonl", "sft",
               "rm")
    command = [sys.executable, str(ROOT / "train_rl.py"), *COMMON, "--steps", "5000", "--prompts",
               "32", *out]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)
    deadline = time.time() + 60
    while not steps_of(tmp_path / "run", "rl", "score") and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "stopped after saving" in err and "Traceback" not in err
    done = torch.load(tmp_path / "run" / "rl" / "resume.pt", weights_only=True)["step"]
    assert done == max(steps_of(tmp_path / "run", "rl", "score")) + 1


def test_one_command_from_nothing_runs_every_stage_and_says_so(tmp_path):
    command = [sys.executable, str(ROOT / "train_rl.py"), "--questions", "60", "--threads", "1",
               "--steps", "1", "--prompts", "32", "--out", str(tmp_path / "out")]
    before = set(os.listdir(tmp_path))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    for script in ("data/teacher.py", "train_sft.py", "train_rm.py", "eval.py"):
        assert f"is missing: running {script}" in done.stdout
    assert "| rl | " in done.stdout
    assert set(os.listdir(tmp_path)) - before == {"out"}                 # nothing outside --out


# ---- memory that runs out ----

def small_memory(function, most, size=lambda first, *_: len(first)):
    """`function`, on a device whose memory runs out where `size` of its arguments passes `most`."""
    def bounded(*args, **kwargs):
        if size(*args) > most:
            raise torch.OutOfMemoryError("made up")
        return function(*args, **kwargs)
    return bounded


@pytest.mark.parametrize("script, stage, flags, inputs, name, most, key", [
    (train_sft, "sft", SFT, ["teacher.jsonl", "labels.jsonl"], "linear_cross_entropy", 200, "loss"),
    (train_rm, "rm", RM + ADAMW, ["teacher.jsonl", "labels.jsonl", "student.jsonl", "sft"],
     "bce_loss", 200, "loss"),
    (train_rl, "rl", ["--steps", "2", "--prompts", "32"],
     ["teacher.jsonl", "labels.jsonl", "student.jsonl", "sft", "rm"], "linear_logprobs", 150,
     "policy_loss")])
def test_where_memory_runs_out_smaller_micro_batches_learn_the_same(
        finished, tmp_path, monkeypatch, capsys, script, stage, flags, inputs, name, most, key):
    """The function that takes the most memory fails above some tokens, which 16 and 8 responses
    have."""
    monkeypatch.setattr(process, "need", lambda *_: None)
    figures = []
    for small in (False, True):
        out = copy(finished, tmp_path / str(small), *inputs)
        if small:
            place = responses if stage == "rl" else script
            monkeypatch.setattr(place, name, small_memory(getattr(place, name), most))
        script.main([*COMMON, *flags, *out])
        figures.append(list(steps_of(tmp_path / str(small), stage, key).values()))
    assert figures[0] and figures[1] == pytest.approx(figures[0], rel=1e-3)
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    # Each size once, not each step.
    assert said and len(said) == len(set(said)) <= 3


@pytest.mark.parametrize("script, stage, flags, inputs, name, key", [
    (train_sft, "sft", [*SFT, "--micro-batch", "8", "--learning-rate", "5e-5"],
     ["teacher.jsonl", "labels.jsonl"],
     "linear_cross_entropy", "loss"),
    (train_rm, "rm", [*RM, *ADAMW, "--micro-batch", "8"],
     ["teacher.jsonl", "labels.jsonl", "student.jsonl", "sft"], "bce_loss", "loss"),
    (train_rl, "rl", ["--steps", "2", "--prompts", "32", "--micro-batch", "4"],
     ["teacher.jsonl", "labels.jsonl", "student.jsonl", "sft", "rm"], "linear_logprobs",
     "policy_loss")])
def test_the_gradients_of_a_pass_that_failed_half_way_do_not_count(
        finished, tmp_path, monkeypatch, script, stage, flags, inputs, name, key):
    """Memory runs out once, in the second micro-batch: the first one's gradients are there."""
    monkeypatch.setattr(process, "need", lambda *_: None)
    place = responses if stage == "rl" else script
    whole, passes = getattr(place, name), []

    def fails_once(*args, **kwargs):
        passes.append(torch.is_grad_enabled())
        if passes[-1] and sum(passes) == 2:
            raise torch.OutOfMemoryError("made up")
        return whole(*args, **kwargs)

    figures = []
    for disturbed in (False, True):
        if disturbed:
            monkeypatch.setattr(place, name, fails_once)
        script.main([*COMMON, *flags, *copy(finished, tmp_path / str(disturbed), *inputs)])
        weight = load_file(tmp_path / str(disturbed) / stage / "model.safetensors")
        figures.append((list(steps_of(tmp_path / str(disturbed), stage, key).values()),
                        weight["model.layers.0.mlp.up_proj.weight"]))
    (losses, before), (again, after) = figures
    start = load_file(tmp_path / "True" / "sft" / "model.safetensors" if stage != "sft" else
                      hub.TINY / "student" / "model.safetensors")
    moved = (before - start["model.layers.0.mlp.up_proj.weight"].float()).norm()
    assert sum(passes) > 4 and again == pytest.approx(losses, rel=1e-3)
    assert (after - before).norm() < 0.01 * moved


def test_the_size_is_halved_until_it_fits_and_stays_so(capsys):
    tried = []

    def work(size, most):
        tried.append(size)
        if size > most:
            raise torch.OutOfMemoryError("made up")
        return "done"

    assert run.halve_when_full(work, 16, 5) == ("done", 4)
    assert tried == [16, 8, 4] and "with --micro-batch 4" in capsys.readouterr().err
    with pytest.raises(torch.OutOfMemoryError):
        run.halve_when_full(work, 2, 0)


def test_a_device_too_small_for_anything_ends_in_a_message(finished, tmp_path, monkeypatch):
    out = copy(finished, tmp_path / "run", "teacher.jsonl", "labels.jsonl")
    monkeypatch.setattr(train_sft, "linear_cross_entropy", small_memory(None, 0))
    with pytest.raises(SystemExit, match="out of memory, though"):
        process.guard(lambda: train_sft.main([*COMMON, *SFT, *out]))


# ---- own questions ----

def test_own_questions_without_answers_go_through_every_stage_with_one_command(tmp_path):
    """200 lines of `question`, nothing else, of the kind that the tiny models know. No gold."""
    questions = TASKS["arithmetic"](seed=9).questions("train")[:200]
    (tmp_path / "mine.jsonl").write_text("".join(
        json.dumps({"question": q["question"]}) + "\n" for q in questions))
    done = subprocess.run([sys.executable, str(ROOT / "train_rl.py"), "--data", "mine.jsonl",
                           "--threads", "1", "--steps", "1", "--prompts", "16",
                           "--teacher.samples", "4", "--rm.samples", "1", "--sft.epochs", "1"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no test questions with answers" in done.stdout
    assert "No training question has a gold" in done.stdout
    folder = tmp_path / "out" / "mine-tiny"
    report = json.loads((folder / "report.json").read_text())
    assert report["models"] == {} and set(report["reward_model"]["auc"]) == {"teacher", "sft", "rl"}
    assert "accuracy" not in report["votes"] and report["votes"]["kept"] > 0
    assert "true_accuracy" not in run.read_metrics(folder, "rl")[0]


# ---- numbers that are none ----

@pytest.mark.parametrize("script, stage, inputs", [
    (train_sft, "sft", ["teacher.jsonl", "labels.jsonl"]),
    (train_rm, "rm", ["teacher.jsonl", "labels.jsonl", "student.jsonl", "sft"]),
    (train_rl, "rl", ["labels.jsonl", "sft", "rm"])])
def test_a_stage_that_diverges_stops_and_leaves_no_weights(
        finished, tmp_path, monkeypatch, script, stage, inputs):
    """Whatever makes a gradient nan: here a weight that is, of one step on."""
    out = copy(finished, tmp_path / "run", *inputs)
    step, calls = torch.optim.AdamW.step, []

    def broken(self, *args, **kwargs):
        step(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    flags = {"sft": SFT, "rm": RM, "rl": RL}[stage]
    with pytest.raises(SystemExit, match=f"{stage}: nan or inf in step"):
        process.guard(lambda: script.main([*COMMON, *flags, "--save-minutes", "1e-9", *out]))
    folder = tmp_path / "run" / stage
    assert not (folder / "model.safetensors").exists()
    if (folder / "resume.pt").exists():                          # of before it: whole and finite
        state = torch.load(folder / "resume.pt", weights_only=True)
        kept = state["policy" if stage == "rl" else "model"]
        assert all(tensor.isfinite().all() for tensor in kept.values())


# ---- the tokens that were sampled ----

def test_the_students_tokens_are_kept_and_are_its_texts(finished):
    tokenizer = Tokenizer(finished / "sft")
    for row in files.read_jsonl(finished / "student.jsonl"):
        for r in row["responses"]:
            assert tokenizer.decode(r["tokens"]) == r["text"]
            assert (r["tokens"][-1] in tokenizer.eos_ids) == r["ended"]
    assert "tokens" not in files.read_jsonl(finished / "teacher.jsonl")[0]["responses"][0]


def test_a_responses_ids_are_what_was_sampled_with_the_first_stop_token_at_its_end(finished):
    tokenizer = Tokenizer(finished / "sft")
    tokenizer.eos_ids = [tokenizer.eos_ids[0], 77]
    eos, text = tokenizer.eos_ids[0], "Step 1"
    whole = tokenizer.encode(text)
    spelt = [i for c in text for i in tokenizer.encode(c)]       # other tokens of the same text
    assert len(spelt) > len(whole)
    for ended, tokens, expected in ((True, [*spelt, 77], [*spelt, eos]),
                                    (True, [*spelt, eos], [*spelt, eos]), (False, spelt, spelt)):
        response = {"text": text, "ended": ended, "tokens": tokens}
        assert response_ids(tokenizer, response) == expected
        assert response_ids(tokenizer, response, own=False) == whole + [eos] * ended


def test_ppo_scores_a_response_with_the_stop_token_that_the_reward_model_knows(
        finished, tmp_path, monkeypatch):
    """The student stops at any digit, too, of which the reward model has never seen one stop."""
    monkeypatch.setattr(process, "need", lambda *_: None)
    out, seen = copy(finished, tmp_path / "run", "labels.jsonl", "sft", "rm"), []
    tokenizer = Tokenizer(finished / "sft")
    digits = [tokenizer.encode(str(d))[0] for d in range(10)]
    path = tmp_path / "run" / "sft" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [*tokenizer.eos_ids, *digits]}))
    score = train_rl.score

    def recorded(model, rows):
        seen.extend(rows)
        return score(model, rows)

    monkeypatch.setattr(train_rl, "score", recorded)
    train_rl.main([*COMMON, "--steps", "1", "--prompts", "16", *out])
    assert len(seen) == 16 and {row[-1] for row in seen} == {tokenizer.eos_ids[0]}


# ---- what a second start finds ----

def test_an_evaluation_goes_on_with_the_samples_that_are_there(finished, tmp_path, monkeypatch):
    out = copy(finished, tmp_path / "run", "labels.jsonl", "student.jsonl", "teacher.jsonl", "sft",
               "rm", "rl", "samples", "metrics.jsonl", "settings.json")
    monkeypatch.setattr(generate, "generate", lambda model, prompts, **_: iter(
        [] if not prompts else pytest.fail("asked again")))
    evaluation.main([*COMMON, *out])
    again = json.loads((tmp_path / "run" / "report.json").read_text())
    first = json.loads((finished / "report.json").read_text())
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    monkeypatch.undo()
    file = tmp_path / "run" / "samples" / "sft.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:40]) + lines[40][:9])       # killed among the greedy ones
    asked = []
    original = generate.generate
    monkeypatch.setattr(generate, "generate", lambda model, prompts, **kwargs: (
        asked.append(len(prompts)) or original(model, prompts, **kwargs)))
    evaluation.main([*COMMON, *out])
    assert sorted(asked)[-2:] == [41, 80]
    again = json.loads((tmp_path / "run" / "report.json").read_text())
    assert again["models"] == first["models"]
    # Samples of other weights are none of this model's.
    tensors = load_file(tmp_path / "run" / "rl" / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, tmp_path / "run" / "rl" / "model.safetensors", metadata={"format": "pt"})
    asked.clear()
    evaluation.main([*COMMON, *out])
    assert sum(asked) > 80


def test_an_evaluation_says_what_it_leaves_out(finished, tmp_path, capsys):
    out = copy(finished, tmp_path / "run", "labels.jsonl", "sft", "rm", "samples")
    evaluation.main([*COMMON, *out])
    printed = capsys.readouterr().out
    assert "rl holds no whole model: left out" in printed
    assert "student.jsonl has no response to a held-out question" in printed


def test_labels_of_a_teacher_that_was_not_asked_to_the_end_are_not_there(sampled, tmp_path,
                                                                         monkeypatch):
    """More questions are asked for, and the sampling is stopped: the earlier vote is not theirs."""
    out = copy(sampled, tmp_path / "run", "teacher.jsonl", "labels.jsonl", "settings.json")
    monkeypatch.setattr(process, "interruptible", StopAfter(3))
    with pytest.raises(SystemExit, match="stopped"):
        teacher.main([*COMMON, "--questions", "120", *out])
    assert not (tmp_path / "run" / "labels.jsonl").exists()
    assert len(files.read_jsonl(tmp_path / "run" / "teacher.jsonl")) >= 80


def test_a_question_whose_text_has_changed_is_named(sampled, tmp_path):
    out = copy(sampled, tmp_path / "run", "teacher.jsonl")
    path = tmp_path / "run" / "teacher.jsonl"
    rows = files.read_jsonl(path)
    rows[5]["question"] += " And now?"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match=f"another text of question {rows[5]['id']}"):
        teacher.main([*COMMON, *out])


def test_a_stage_whose_inputs_have_changed_says_which(finished, tmp_path, monkeypatch):
    out = copy(finished, tmp_path / "run", "teacher.jsonl", "labels.jsonl")
    monkeypatch.setattr(process, "interruptible", StopAfter(2))
    with pytest.raises(SystemExit, match="stopped after saving"):
        train_sft.main([*COMMON, *SFT, *out])
    lines = (tmp_path / "run" / "labels.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "labels.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(SystemExit, match="sft was made from another .*labels.jsonl"):
        train_sft.main([*COMMON, *SFT, *out])


def test_questions_that_are_too_long_for_the_model_are_named_and_left_out(tmp_path, capsys):
    questions = [q["question"] for q in TASKS["arithmetic"](seed=9).questions("train")[:60]]
    questions[7] = "Ann has 3 pens. " * 40 + questions[7]
    (tmp_path / "mine.jsonl").write_text("".join(
        json.dumps({"question": q}) + "\n" for q in questions))
    common = ["--data", str(tmp_path / "mine.jsonl"), "--threads", "1",
              "--out", str(tmp_path / "o")]
    teacher.main([*common, "--samples", "4"])
    assert "gsm8k-train-7 (its prompt of" in capsys.readouterr().out
    train_sft.main([*common, *SFT])
    train_rm.main([*common, *RM])
    rows = {row["id"] for row in files.read_jsonl(tmp_path / "o" / "student.jsonl")}
    assert len(rows) > 20 and "gsm8k-train-7" not in rows
