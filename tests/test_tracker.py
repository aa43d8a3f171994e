"""--tracker: a module with init, log and finish is handed what metrics.jsonl gets."""

import atexit
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from data import teacher
from nanodistill import parallel, run, settings


ROOT = Path(__file__).resolve().parents[1]
# Writes its calls to a file beside it, as they come.
SPY = """
import json, pathlib
def note(*call):
    with open(pathlib.Path(__file__).parent / "calls", "a") as file:
        file.write(json.dumps(call) + "\\n")
def init(**what): note("init", what)
def log(values): note("log", values)
def finish(): note("finish")
"""


@pytest.fixture
def spy(tmp_path, monkeypatch):
    """-> a function that writes the module `spy` and returns another that reads its calls."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source=SPY):
        sys.modules.pop("spy", None)
        (tmp_path / "spy.py").write_text(source)
        (tmp_path / "calls").touch()
        return lambda: [*map(json.loads, (tmp_path / "calls").read_text().splitlines())]
    yield write
    sys.modules.pop("spy", None)


@pytest.fixture
def at_exit(monkeypatch):
    """What is to be called at the process's end, instead of calling it then."""
    calls = []
    monkeypatch.setattr(atexit, "register", lambda f, *args: calls.append(lambda: f(*args)))
    return calls


def run_folder(tmp_path, tracker="spy"):
    folder = tmp_path / "my-run"
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps({"rl": {"tracker": tracker, "seed": 5}}))
    return folder


def test_a_stage_hands_over_its_settings_and_its_rows(tmp_path, spy, at_exit, capsys):
    calls, out = spy(), tmp_path / "my-run"
    flags = ["--out", str(out), "--questions", "3", "--samples", "2", "--temperatures", "1"]
    teacher.main([*flags, "--tracker", "spy"])
    row, = run.read_metrics(out, "teacher").values()
    row = {f"teacher/{key}": value for key, value in row.items() if key != "stage"}
    saved = json.loads((out / "settings.json").read_text())["teacher"]
    assert calls() == [["init", {"project": "nanodistill", "name": "my-run/teacher",
                                 "config": saved}], ["log", row]]
    assert row["teacher/step"] == 3 and saved["questions"] == 3
    [end() for end in at_exit]
    assert calls()[2:] == [["finish"]]
    # A stage that another one runs is told by settings.json; what was made stays valid without.
    assert settings.parse("teacher", teacher.STAGES, "", flags)["teacher"].tracker == "spy"
    assert settings.parse("teacher", teacher.STAGES, "", [*flags, "--tracker", ""])[
        "teacher"].tracker == ""


def test_a_step_done_again_is_handed_over_again_and_none_makes_no_run(tmp_path, spy, at_exit):
    calls, folder = spy(), run_folder(tmp_path)
    run.Metrics(folder, "rl")
    assert calls() == [] and at_exit == []
    metrics = run.Metrics(folder, "rl", anew=False)
    metrics(7, kl=0.5)
    metrics(7, kl=0.25)
    assert [c[0] for c in calls()] == ["init", "log", "log"] and len(at_exit) == 1
    assert calls()[2] == ["log", {"rl/step": 7, "rl/kl": 0.25}]


def test_only_the_first_process_hands_over(tmp_path, spy, at_exit, monkeypatch):
    calls = spy()
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    run.Metrics(run_folder(tmp_path), "rl")(1, kl=0.5)
    assert calls() == [] and at_exit == []


@pytest.mark.parametrize("broken, had", [("init", []), ("log", ["init"]),
                                         ("finish", ["init", "log", "log"])])
def test_a_tracker_that_fails_is_named_once_and_the_stage_goes_on(
        tmp_path, spy, at_exit, capsys, broken, had):
    calls = spy(f"{SPY}\ndef {broken}(*args, **what): raise OSError('no route')")
    folder = run_folder(tmp_path)
    metrics = run.Metrics(folder, "rl")
    metrics(1, kl=0.5)
    metrics(2, kl=0.75)
    [end() for end in at_exit]
    assert [c[0] for c in calls()] == had
    assert capsys.readouterr().err == (
        f"\n--tracker spy: {broken} failed (OSError: no route), so it is handed nothing more. "
        "metrics.jsonl has everything\n")
    assert {s: v["kl"] for s, v in run.read_metrics(folder, "rl").items()} == {1: 0.5, 2: 0.75}


@pytest.mark.parametrize("name, source, said", [
    ("spy", "init = log = print", "--tracker spy: the module has no finish"),
    ("spy", "log = 1", "--tracker spy: the module has no init, no log, no finish"),
    ("spy", "import no_such_module", "it can't be imported (ModuleNotFoundError: No module named "
     "'no_such_module'). --tracker \"\" does without"),
    ("no_such_tracker", SPY, "--tracker no_such_tracker: it can't be imported (ModuleNotFound"),
    ("../spy", SPY, "--tracker ../spy: wants the name of a Python module"),
    (".spy", SPY, "--tracker .spy: wants the name of a Python module")])
def test_a_tracker_that_is_none_stops_the_first_stage(tmp_path, spy, name, source, said):
    calls, out = spy(source), tmp_path / "my-run"
    with pytest.raises(SystemExit) as error:
        teacher.main(["--out", str(out), "--questions", "3", "--tracker", name])
    assert said in str(error.value) and "\n" not in str(error.value)
    assert calls() == [] and not (out / "teacher.jsonl").exists()


STAGE = """
import os, pathlib, signal, sys
from nanodistill import process, run
def main():
    run.Metrics(pathlib.Path(sys.argv[1]), "rl")(1, kl=0.5)
    os.kill(os.getpid(), signal.SIGINT)
process.guard(main)
"""


def stopped(folder, **environment):
    """A process that is stopped by Ctrl-C after a row of metrics."""
    done = subprocess.run([sys.executable, "-c", STAGE, str(folder)], capture_output=True,
                          text=True, env={**os.environ, **environment})
    assert done.returncode == 1 and "stopped at once" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_finishes_the_run(tmp_path, spy):
    calls = spy()
    stopped(run_folder(tmp_path), PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert [c[0] for c in calls()] == ["init", "log", "finish"]


@pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="trackio is not installed")
def test_trackio_has_what_was_handed_over(tmp_path):
    stopped(run_folder(tmp_path, "trackio"), PYTHONPATH=str(ROOT),
            TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "nanodistill.db") as base:
        (name, values), = base.execute("select run_name, metrics from metrics").fetchall()
        (config,), = base.execute("select config from configs").fetchall()
    assert name == "my-run/rl" and json.loads(values) == {"rl/step": 1, "rl/kl": 0.5}
    assert json.loads(config)["seed"] == 5
