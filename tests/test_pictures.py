"""The pictures of data/tiny: misconceived facts by name, and the curves of several runs."""

import json
import sys

import numpy as np
import pytest

from data.tiny import curves, facts


plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, instead of closing them."""
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    yield drawn
    monkeypatch.undo()
    plt.close("all")


# ---- facts ----

# In make.py's corpus 5 - 1 is often 5 and 3 + 3 often 16; everyone knows 1 + 1 and 2 * 2.
TEXTS = {"teacher": ["Step 1: 5 - 1 = 5\nStep 2: 2 * 2 = 4\n#### 9"] * 3
         + ["Step 1: 5 - 1 = 4\nStep 2: 3 + 3 = 16\n#### 16"],
         "sft": ["Step 1: 5 - 1 = 4\nStep 2: 3 + 3 = 16\n#### 16",
                 "Step 1: 2 * 2 = 4\nStep 2: 5 - 1 = 5\n#### 5"],
         "rl": ["Step 1: 5 - 1 = 4\nStep 2: 3 + 3 = 16\nStep 3: 1 + 1 = 2\n#### 2"]}


def test_steps_are_counted_by_fact():
    tally = facts.shares(TEXTS["teacher"])
    assert tally == {(5, "-", 1): (1, 4), (2, "*", 2): (3, 3), (3, "+", 3): (0, 1)}
    assert facts.describe("teacher", tally) == (
        "teacher: steps right on misconceived facts 20.0%, on the others 100.0%; steps that use a "
        "misconceived fact 62.5%")


def test_each_misconceived_fact_is_named_and_joins_teacher_to_rl(tmp_path, figures):
    tallies = {name: facts.shares(texts) for name, texts in TEXTS.items()}
    table = facts.table_of(tallies, 1)
    assert [(row["fact"], row["believed"], row["teacher"], row["sft"], row["rl"])
            for row in table] == [("3 + 3", 16, 0.0, 0.0, 0.0), ("5 - 1", 5, 0.25, 0.5, 1.0)]
    assert facts.table_of(tallies, 2) == []
    worse = {"fact": "4 - 1", "believed": 13, "teacher": 0.5, "sft": 0.25, "rl": 0.125}
    facts.plot([*table, worse], tmp_path / "facts.png")
    axis, = figures[0].axes
    assert [x.get_text() for x in axis.get_yticklabels()] == [
        "3 + 3 = 6, not 16", "5 - 1 = 4, not 5", "4 - 1 = 3, not 13"]
    joins, teacher, sft, rl = axis.collections
    assert [line.tolist() for line in joins.get_segments()] == [
        [[0, 0], [0, 0]], [[25, 1], [100, 1]], [[50, 2], [12.5, 2]]]
    same, better, red = joins.get_colors().tolist()
    assert same == better != red
    assert [points.get_offsets().tolist() for points in (teacher, sft, rl)] == [
        [[0, 0], [25, 1], [50, 2]], [[0, 0], [50, 1], [25, 2]], [[0, 0], [100, 1], [12.5, 2]]]
    assert (tmp_path / "facts.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_reads_a_run_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "samples").mkdir()
    for name, texts in TEXTS.items():
        row = {"what": f"{name}, sampled", "responses": [{"text": text} for text in texts]}
        (tmp_path / "samples" / f"{name}.jsonl").write_text('{"seed": 1}\n' + json.dumps(row))
    monkeypatch.setattr(sys, "argv", ["facts.py", "--out", str(tmp_path), "--least", "1"])
    facts.main()
    assert capsys.readouterr().out.endswith("facts.json, facts.png\n")
    assert [row["fact"] for row in json.loads((tmp_path / "facts.json").read_text())] == [
        "3 + 3", "5 - 1"]


# ---- curves ----

def test_runs_are_joined_over_the_steps_that_all_span():
    steps, values = curves.together([{0: 1.0, 10: 3.0, 20: 7.0}, {4: 2.0, 16: 8.0}])
    assert steps.tolist() == [4, 10, 16]
    np.testing.assert_allclose(values, [[1.8, 3.0, 5.4], [2.0, 5.0, 8.0]])


def finished(folder, score, accuracy):
    """A run folder with `score` at PPO's steps 0 and 1, and two models."""
    folder.mkdir()
    rows = [{"stage": "rl", "step": step, "score": s} for step, s in enumerate(score)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "report.json").write_text(json.dumps({"seed": 4, "models": {
        name: {"greedy": {"accuracy": a, "low": a - 0.1, "high": a + 0.2}}
        for name, a in accuracy.items()}}))
    return str(folder)


@pytest.mark.parametrize("count", [1, 3])
def test_n_runs_are_one_picture_with_bands(tmp_path, figures, count):
    folders = [finished(tmp_path / str(i), [i, 3 * i + 1], {"sft": 0.5, "out/rl": 0.6 + i / 10})
               for i in range(count)]
    curves.main([*folders, "--to", str(tmp_path / "all.png")])
    _, score, *_, bars = figures[0].axes
    mean, = score.lines
    band = score.collections[0].get_paths()[0].vertices
    edges = {x: {y for at, y in band.tolist() if at == x} for x in (0, 1)}
    if count == 1:
        assert mean.get_ydata().tolist() == [0, 1] and edges == {0: {0}, 1: {1}}
    else:
        assert mean.get_ydata().tolist() == [1, 4] and edges == {0: {0, 2}, 1: {1, 7}}
        assert [bar.get_height() for bar in bars.patches] == pytest.approx([50, 70])
    assert [x.get_text() for x in bars.get_xticklabels()] == ["sft", "rl"]
    assert [line.get_ydata().tolist() for line in bars.lines] == [
        pytest.approx([50, 60 + 10 * i]) for i in range(count)]
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_each_run_has_its_bars_with_intervals(tmp_path, figures):
    folders = [finished(tmp_path / str(i), [0, 1], {"sft": 0.5, "out/rl": 0.6 + i / 10})
               for i in range(2)]
    curves.main([*folders, "--bars", str(tmp_path / "bars.png")])
    axis, = figures[0].axes
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([50, 50, 60, 70])
    errors = [c for group in axis.containers for c in getattr(group, "errorbar", [[], [], []])[2]]
    spans = [sorted(point[1] for point in line) for c in errors for line in c.get_segments()]
    assert spans == [pytest.approx(s) for s in ([40, 70], [40, 70], [50, 80], [60, 90])]
    assert [x.get_text() for x in axis.get_xticklabels()] == ["seed 4", "seed 4"]


def test_what_cannot_be_in_one_picture_is_said(tmp_path):
    one = finished(tmp_path / "1", [0, 1], {"sft": 0.5})
    other = finished(tmp_path / "2", [0, 1], {"rl": 0.5})
    for folders, said in [([one, other], "the runs compared other models"),
                          ([one, str(tmp_path / "none")], "report.json: ")]:
        with pytest.raises(SystemExit, match=said):
            curves.main([*folders, "--to", str(tmp_path / "x.png")])
