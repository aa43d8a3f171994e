"""A finished run's page and pictures, drawn anew from its report.json and metrics.jsonl; of
report.html see test_report_html.py."""

import json
import sys

import pytest

from nanodistill import report


GREEDY = {"accuracy": 0.5, "low": 0.2366, "high": 0.7634, "n": 10}
MODEL = {"greedy": GREEDY, "mean@3": 0.5, "maj@3": 0.55, "pass@3": 0.7, "length": 21.25,
         "cut_off": 0.1, "no_answer": 0.0}
BEST = {**MODEL, "greedy": {"accuracy": 1.0, "low": 0.7225, "high": 0.99999, "n": 10}}
REPORT = {
    "seed": 4, "task": "arithmetic", "models": {"teacher": MODEL, "out/x/rl": BEST},
    "pairs": {"out/x/rl-teacher": {"difference": 0.5, "low": 0.1901, "high": 0.8099, "p": 0.0625}},
    "reward_model": {
        "auc": {"teacher": 0.75, "sft": 0.8}, "auc_gold": {"teacher": 0.7004},
        "auc_own_logprob": {"teacher": 0.6}, "held_out": {
            "teacher": {"n": 20, "accuracy": 0.65, "auc": 0.75, "ece": 0.125},
            "sft": {"n": 10, "accuracy": 0.7, "auc": 0.8, "ece": float("nan")}}},
    "votes": {"kept": 0.9, "agreement": 0.654, "accuracy": 0.8},
    "ppo": {"start": {"score": 0.1, "true_accuracy": 0.5, "kl": 0.0, "length": 20.0, "ended": 1.0},
            "end": {"score": 0.456, "true_accuracy": 0.75, "kl": 1.2, "length": 30.5,
                    "ended": 0.9}},
    "seconds": {"teacher": 61.6, "eval": 8.5}}
PAGE = """\
# arithmetic, seed 4

| model | greedy | 95% interval | mean@3 | maj@3 | pass@3 | length | ended | no answer |
|---|---|---|---|---|---|---|---|---|
| teacher | 50.0% | 23.7% to 76.3% | 50.0% | 55.0% | 70.0% | 21.2 | 90.0% | 0.0% |
| out/x/rl | 100.0% | 72.2% to 100.0% | 50.0% | 55.0% | 70.0% | 21.2 | 90.0% | 0.0% |

10 test questions; length in tokens. Two models on the same questions, greedy:

| pair | difference, points | 95% interval | p (McNemar) |
|---|---|---|---|
| out/x/rl-teacher | +50.0 | +19.0 to +81.0 | 0.062 |

Teacher's vote: 90.0% of the training questions kept, mean agreement 65.4%; right by gold (a \
diagnostic) 80.0%.

| reward model on the responses of | AUC, vote | accuracy, vote | calibration error | AUC, gold \
| own log-probability's AUC, gold |
|---|---|---|---|---|---|
| teacher | 0.750 | 0.650 | 0.125 | 0.700 | 0.600 |
| sft | 0.800 | 0.700 | nan |  |  |

AUC against the vote: training questions held out from every stage. Against gold: test questions.

| PPO, sampled on training questions | score | true accuracy | KL, nats per response | length \
| ended |
|---|---|---|---|---|---|
| start (mean of at most 5 steps) | 0.10 | 50.0% | 0.00 | 20.0 | 100.0% |
| end (mean of at most 5 steps) | 0.46 | 75.0% | 1.20 | 30.5 | 90.0% |

Seconds: teacher 62, eval 8.
"""
METRICS = [{"stage": "sft", "step": 0, "loss": 2.0},
           {"stage": "sft", "step": 4, "held_out_loss": 1.0},
           {"stage": "rl", "step": 0, "score": 9.0}, {"stage": "rl", "started": "of another run"},
           *({"stage": "rl", "step": step, "score": step / 2, "true_accuracy": 0.25 * step,
              "kl": 0.1 * step, "length": 20 + step} for step in range(3)),
           {"stage": "rl", "step": 3, "seconds": 7.5}]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    return tmp_path


def main(monkeypatch, folder):
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    report.main()


def test_the_page_is_drawn_from_the_report_alone(folder, monkeypatch, capsys):
    monkeypatch.setattr(report, "plot", lambda *_: None)
    main(monkeypatch, folder)
    assert (folder / "report.md").read_text() == PAGE
    assert PAGE in capsys.readouterr().out
    assert json.loads((folder / "report.json").read_text())["ppo"] == REPORT["ppo"]


def test_what_is_told_within_a_question_is_a_table_of_its_own():
    """By gold in one row; in the other no question has both a right response and a wrong one."""
    judges = {"reward_model": {"within_auc": 0.75, "spread": 0.3, "alike": 0.0},
              "vote": {"within_auc": 0.5, "spread": 0.1, "alike": 0.625}}
    bare = {judge: {"spread": 0.0, "alike": 1.0} for judge in judges}
    page = report.markdown({**REPORT, "reward_model": {
        **REPORT["reward_model"], "within": {"sft": judges, "rl": bare}}})
    assert "| sft | 0.750 | 0.500 | 0.000 | 0.625 |\n| rl |  |  | 1.000 | 1.000 |\n" in page


def test_a_page_without_test_questions_and_gold():
    bare = {"seed": 1, "task": "gsm8k", "models": {}, "pairs": {},
            "votes": {"kept": 1.0, "agreement": 0.5},
            "ppo": {"start": {"score": 0.1, "kl": 0.0, "length": 20.0, "ended": 1.0}},
            "seconds": {"eval": 2.0}}
    assert report.markdown(bare) == """\
# gsm8k, seed 1

There are no test questions with answers, and so no accuracies: put test.jsonl, with a `question` \
and an `answer` per line, beside train.jsonl.

Teacher's vote: 100.0% of the training questions kept, mean agreement 50.0%. No training question \
has a gold answer to compare with.

| PPO, sampled on training questions | score | true accuracy | KL, nats per response | length \
| ended |
|---|---|---|---|---|---|
| start (mean of at most 5 steps) | 0.10 | no gold | 0.00 | 20.0 | 100.0% |

Seconds: eval 2.
"""


def test_the_page_names_the_algorithm_of_the_run(folder, monkeypatch, capsys):
    monkeypatch.setattr(report, "plot", lambda *_: None)
    (folder / "settings.json").write_text(json.dumps({"rl": {"algorithm": "rloo"}}))
    main(monkeypatch, folder)
    assert (folder / "report.md").read_text() == PAGE.replace("PPO, sampled", "RLOO, sampled")
    (folder / "settings.json").write_text("{")
    with pytest.raises(SystemExit, match="settings.json can't be read"):
        main(monkeypatch, folder)


def test_the_curves_are_of_the_last_start_and_the_bars_of_the_models(folder, monkeypatch, capsys):
    axes = pytest.importorskip("matplotlib.axes").Axes
    curves, bars, plot, bar = [], [], axes.plot, axes.bar

    def recorded_bar(self, names, heights, **kwargs):
        bars.append((names, heights, kwargs["yerr"]))
        return bar(self, names, heights, **kwargs)

    monkeypatch.setattr(axes, "plot", lambda self, x, y, **kwargs: (
        curves.append([*zip(x, y)]), plot(self, x, y, **kwargs)))
    monkeypatch.setattr(axes, "bar", recorded_bar)
    main(monkeypatch, folder)
    assert capsys.readouterr().out.endswith(f"-> {folder}: report.md, report.html, curves.png\n")
    assert curves == [
        [(4, 1.0)], [(0, 0.0), (1, 0.5), (2, 1.0)], [(0, 0.0), (1, 0.25), (2, 0.5)],
        [(0, 0.0), (1, 0.1), (2, 0.2)], [(0, 20), (1, 21), (2, 22)]]
    (names, heights, (below, above)), = bars
    assert names == ["teacher", "rl"] and heights == [50.0, 100.0]
    assert below == pytest.approx([26.34, 27.75]) and above == pytest.approx([26.34, 0])
    first = (folder / "curves.png").read_bytes()
    (folder / "curves.png").unlink()
    main(monkeypatch, folder)
    assert (folder / "curves.png").read_bytes() == first and first.startswith(b"\x89PNG")


def test_without_matplotlib_there_is_the_page(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    main(monkeypatch, folder)
    printed = capsys.readouterr().out
    assert "no curves.png: it needs matplotlib" in printed
    assert printed.endswith(f"-> {folder}: report.md, report.html\n")
    assert (folder / "report.md").read_text() == PAGE and not (folder / "curves.png").exists()


@pytest.mark.parametrize("content, said", [
    (None, "is missing: `python eval.py --out"), ("", "JSONDecodeError"), ("[1]", "TypeError"),
    ('{"seed": 1', "JSONDecodeError"), ("\udcff", "UnicodeDecodeError"), ("{}", "KeyError: 'task'"),
    (json.dumps({**REPORT, "models": {"a": {}}}), "KeyError: 'greedy'"),
    (json.dumps({**REPORT, "models": ["a"]}), "AttributeError"),
    (json.dumps({**REPORT, "votes": {**REPORT["votes"], "kept": "x"}}), "ValueError"),
    ("[" * 100_000, "RecursionError")])
def test_a_report_that_is_missing_or_broken_is_one_message(folder, monkeypatch, content, said):
    (folder / "report.json").unlink()
    if content is not None:
        (folder / "report.json").write_bytes(content.encode(errors="surrogateescape"))
    (folder / "report.md").write_text("an earlier page")
    with pytest.raises(SystemExit) as error:
        main(monkeypatch, folder)
    message = str(error.value)
    assert message.startswith(str(folder / "report.json")) and said in message
    assert "\n" not in message and len(message) < 400
    assert (folder / "report.md").read_text() == "an earlier page"
