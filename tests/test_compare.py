"""bench/compare.py: its intervals, and what an arm is given instead of what the others have."""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import compare  # noqa: E402


def test_interval_over_questions_is_the_paired_one_and_over_seeds_students():
    one = np.array([1.0] * 30 + [-1.0] * 10 + [0.0] * 60)
    mean, half = compare.interval([one])
    assert mean == pytest.approx(0.2)
    # By hand: the mean square is 0.4, the variance 0.4 - 0.04.
    assert half == pytest.approx(1.96 * 0.06)
    # Three seeds that differ by more than their questions explain.
    seeds = [one * 0 + shift for shift in (0.0, 0.1, 0.2)]
    mean, half = compare.interval(seeds)
    low, high = stats.t.interval(0.95, 2, loc=0.1, scale=stats.sem([0.0, 0.1, 0.2]))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    # And three that agree by chance: the questions' own noise stays.
    assert compare.interval([one] * 3)[1] == pytest.approx(1.96 * 0.06 / np.sqrt(3))


def test_best_of_n_over_all_choices():
    values, n = np.array([0.0, 1.0, 0.5, 0.25, 2.0]), 3
    brute = np.mean([values[list(some)][-1] for some in itertools.combinations(range(5), n)])
    assert values @ compare.chances(n, 5) == pytest.approx(brute)
    assert compare.chances(1, 5) == pytest.approx([0.2] * 5)
    assert compare.chances(5, 5) == pytest.approx([0, 0, 0, 0, 1])


def test_groups_follow_the_teachers_samples():
    assert compare.group_of(["3", "3", "4", None], "3") == "right"
    assert compare.group_of(["3", "4", "4"], "3") == "wrong"
    assert compare.group_of(["3", "4"], "3") == "tied"
    assert compare.group_of(["4", "4", None], "3") == "never"


def folder_of(path, votes):
    path.mkdir()
    answers = [["5", "5", "7", None], ["2", "2", "2", "2"], ["1", "3", "3", "3"]]
    compare.write_rows(path / "teacher.jsonl", [
        {"id": str(i), "responses": [{"answer": a, "text": f"so {a}", "temperature": j}
                                     for j, a in enumerate(row)]}
        for i, row in enumerate(answers)])
    compare.write_rows(path / "labels.jsonl", [
        {"id": str(i), "vote": vote, "labels": [a == vote for a in row]}
        for i, (vote, row) in enumerate(zip(votes, answers))])
    return path


def rows_of(path, name="labels.jsonl"):
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def test_wrong_votes_are_what_the_teacher_says_then(tmp_path):
    base, folder = folder_of(tmp_path / "base", ["5", "2", None]), tmp_path / "arm"
    folder.mkdir()
    compare.wrong_votes(0.0)(folder, base)
    assert [row["vote"] for row in rows_of(folder)] == ["5", "2", None]
    # A resumed arm does it once more.
    for _ in range(2):
        compare.wrong_votes(1.0)(folder, base)
        # Of the second the teacher gave no other answer, the third has no vote.
        first, *rest = rows_of(folder)
        assert first["vote"] == "7" and first["labels"] == [True, True, False, False]
        assert rest == rows_of(base)[1:]
        said, *rest = rows_of(folder, "teacher.jsonl")
        assert said["responses"] == [
            {"answer": a, "text": f"so {a}", "temperature": j}
            for j, a in enumerate(["7", "7", "5", None])]
        assert rest == rows_of(base, "teacher.jsonl")[1:]


def test_the_vote_of_both_is_by_both_alike(tmp_path):
    """Of "a" the student's two say 5, of the teacher's seven 2; "b" ties; the student was not asked
    "c". Where there is no vote no label is, of an answer that is none neither."""
    rows = {"teacher": {"a": "4444455", "b": ["7", None], "c": "1"},
            "student": {"a": "55", "b": ["8", None]}}
    for name, said in rows.items():
        compare.write_rows(tmp_path / f"{name}.jsonl", [
            {"id": id_, "responses": [{"answer": a} for a in answers]}
            for id_, answers in said.items()])
    arm = tmp_path / "arm"
    arm.mkdir()
    compare.vote_of_both(arm, tmp_path)
    assert {row["id"]: (row["vote"], row["labels"]) for row in rows_of(arm)} == {
        "a": ("5", [False] * 5 + [True] * 2), "b": (None, [None] * 2), "c": (None, [None])}


def test_a_response_is_chosen_by_vote_or_not_at_all(tmp_path):
    base = folder_of(tmp_path / "base", ["5", "2", "3"])
    rows = [{"id": "0", "responses": [{"answer": "7"}, {"answer": "5"}, {"answer": "5"}]},
            {"id": "1", "responses": [{"answer": "1"}, {"answer": None}, {"answer": "3"}]}]
    assert compare.first_by_vote(rows, base) == [1, None]
    assert compare.the_first(rows, base) == [0, 0]


def test_judged_reads_what_eval_wrote(tmp_path):
    def row(what, id_, *answers):
        return {"what": what, "id": id_, "responses": [{"answer": a} for a in answers]}
    compare.write_rows(tmp_path / "rl.jsonl", [
        {"model": "digest"}, row("rl, greedy", "a", "4"), row("rl, greedy", "b", None),
        row("rl, sampled", "a", "4", "5"), row("rl, sampled", "b", "1", "1"),
        row("rl, held-out questions", "c", "9", "9")])
    found = compare.judged(tmp_path / "rl.jsonl", {"a": "4", "b": "2"})
    assert found["greedy"] == {"a": 1.0, "b": 0.0}
    assert found["mean"] == {"a": 0.5, "b": 0.0} and found["pass"] == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize("what", compare.ARMS)
def test_what_an_arm_begins_from_comes_before_it(what):
    names = [*compare.ARMS[what]]
    for name, arm in compare.ARMS[what].items():
        assert not arm.base or arm.base in names[:names.index(name)]


def test_arms_named_bring_those_that_they_begin_from():
    arms = compare.ARMS["algorithms"]
    assert [*compare.needed(arms, ["rloo-both"])] == ["ppo-model", "ppo-both", "rloo-both"]
    assert [*compare.needed(compare.ARMS["budget"], ["500-all"])] == ["500-model", "500-all"]


def test_an_arm_computes_with_the_threads_that_it_was_told(tmp_path, monkeypatch):
    """Two runs beside each other with all threads each took thirty times as long to sample."""
    seen, before = [], torch.get_num_threads()
    arm = compare.Arm("", lambda folder, base, args: seen.append(
        (torch.get_num_threads(), folder, base)))
    monkeypatch.setitem(compare.ARMS["algorithms"], "rloo-gold", arm)
    monkeypatch.setattr(sys, "argv", [
        "compare.py", "algorithms", "--seeds", "3", "--threads", str(before + 1),
        "--out", str(tmp_path), "--arm", "rloo-gold"])
    try:
        compare.main()
    finally:
        torch.set_num_threads(before)
    seed = tmp_path / "seed-3"
    assert seen == [(before + 1, seed / "rloo-gold", seed / "ppo-model")]


def test_pairs_are_of_the_same_questions_of_the_same_seeds(tmp_path, monkeypatch):
    """Both have seed 6 alone, and the first of two answers is the greedy one too."""
    monkeypatch.setattr(compare, "task_of", lambda base: (argparse.Namespace(
        gold=lambda split: dict.fromkeys("1234", "x")), None))
    arms = {name: compare.Arm(name, None) for name in "ab"}
    said = {"a": ["xx", "xy", "yy", "yy"], "b": ["xx", "xx", "xy", "yy"]}
    there = {}
    for name, seeds in (("a", (5, 6)), ("b", (6, 7))):
        there[name] = {seed: (tmp_path / f"{name}{seed}", None) for seed in seeds}
        for folder, _ in there[name].values():
            (folder / "samples").mkdir(parents=True)
            compare.write_rows(folder / "samples" / "rl.jsonl", [{}] + [
                {"what": f"rl, {what}", "id": id_, "responses": [{"answer": a} for a in answers]}
                for id_, answers in zip("1234", said[name]) for what in ("greedy", "sampled")])
    table = compare.table_of_pairs(arms, there, "a").split("\n")
    # Greedy 0, 0, 1, 0: mean 1/4, variance 3/16. Of both answers 0, 1/2, 1/2, 0: 1/4 and 1/16.
    assert table[0].startswith("| less a |") and len(table) == 3
    assert table[2] == "| b | 1 | +25.0 (-17.4 to +67.4) | +25.0 (+0.5 to +49.5) |"


def test_shared_samples_cost_what_the_first_arm_waited(tmp_path, monkeypatch):
    base = folder_of(tmp_path / "base", ["5", "2", "3"])
    task = type("Task", (), {"questions": lambda self, split: [{"id": i} for i in "012"]})()
    config = type("Config", (), {"seed": 1, "date": "2026-01-31", "max_new_tokens": 8})()

    def collect(path, questions, *_):
        if not path.exists():
            compare.write_rows(path, questions)
        return compare.files.read_jsonl(path)
    for name, value in {"task_of": lambda base: (task, config), "collect": collect,
                        "local": lambda *_: None, "Tokenizer": lambda *_: None}.items():
        monkeypatch.setattr(compare, name, value)
    monkeypatch.setattr(compare.weights, "load", lambda *_: None)
    clock = iter([0.0, 30.0, 40.0, 40.5])
    monkeypatch.setattr(compare, "time", type("Time", (), {"monotonic": lambda: next(clock)}))
    args = type("Args", (), {"small": True})()
    for _ in range(2):
        compare.sampled(base, args, "sft-samples", "model")
    assert compare.seconds_of(tmp_path, ["sft-samples"]) == 30.0


def test_figures_of_an_arm_are_above_or_below_its_own_sft_student(tmp_path):
    """Four test questions. SFT has one greedy answer right, the arm three; of two samples each SFT
    has one of eight right, the arm five."""
    base, arm = tmp_path / "base", tmp_path / "arm"
    settings = {"task": "arithmetic", "seed": 3, "data": "", "student": "tiny", "teacher": "tiny"}
    for folder in (base, arm):
        (folder / "samples").mkdir(parents=True)
    (base / "settings.json").write_text(json.dumps({"sft": settings}))
    gold = [*compare.task_of(base)[0].gold("test").items()][:4]
    said = {base / "samples" / "sft.jsonl": ["R", "w", "w", "w"], arm / "samples" / "rl.jsonl": [
        "R", "R", "R", "w"], base / "samples" / "teacher.jsonl": ["R", "w", "w", "w"]}
    twice = {"sft.jsonl": ["Rw", "ww", "ww", "ww"], "rl.jsonl": ["RR", "RR", "Rw", "ww"],
             "teacher.jsonl": ["RR", "Rw", "ww", "ww"]}
    for path, greedy in said.items():
        rows = [{"what": f"x, {what}", "id": id_, "responses": [
            {"answer": right if c == "R" else "none"} for c in letters[k]]}
            for what, letters in (("greedy", greedy), ("sampled", twice[path.name]))
            for k, (id_, right) in enumerate(gold)]
        compare.write_rows(path, [{"model": "digest"}, *rows])
    compare.write_rows(arm / "metrics.jsonl", [
        {"stage": "rm", "step": 1, "seconds": 5.0}, {"stage": "rl", "step": 0, "score": 0.5,
         "kl": 0.25}, {"stage": "rl", "step": 1, "seconds": 2.0}])
    found = compare.figures(compare.ARMS["algorithms"]["rloo-model"], {3: (arm, base)})
    one = found["seeds"][3]
    assert (one["greedy"], one["sft"], one["mean"], one["pass"]) == (0.75, 0.25, 0.625, 0.75)
    assert found["gain"]["greedy"][0] == 0.5 and found["gain"]["mean"][0] == 0.5
    assert one["seconds"] == 7.0 and one["kl"] == 0.25
    groups = {name: (g["questions"], g["sft"], g["greedy"]) for name, g in found["groups"].items()}
    assert groups == {"right": (1, 1.0, 1.0), "tied": (1, 0.0, 1.0), "never": (2, 0.0, 0.5)}
    assert "| RLOO, reward model | 1 | 75.0% | +50.0 (" in compare.table({"x": found})
