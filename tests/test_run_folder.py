"""The run folder: one process at a time, what an artefact was made from, files that are whole."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanodistill import files, process, run, weights


ROOT = Path(__file__).resolve().parents[1]


def python(code, *args, **kwargs):
    """A process that runs `code` with the library at hand."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def wait_for(there, seconds=30):
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.05)


# ---- one process at a time ----

HOLD = """if True:
    import sys, time
    from nanodistill import process
    process.take(sys.argv[1])
    print("taken", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_with_the_name_of_who_has_it(tmp_path):
    holder = python(HOLD, tmp_path)
    try:
        assert holder.stdout.readline() == "taken\n"
        with pytest.raises(SystemExit, match=f"in use by process {holder.pid} on ") as stopped:
            process.take(tmp_path, patience=0.5)
        assert str(tmp_path) in str(stopped.value) and "--out" in str(stopped.value)
    finally:
        holder.kill()
    holder.wait()
    process.take(tmp_path, patience=5)                               # a dead process has nothing
    process.take(tmp_path, patience=0)                               # it is ours already


STAGE = """if True:
    import sys, time
    from pathlib import Path
    from nanodistill import process
    def main():
        folder = Path(sys.argv[sys.argv.index("--out") + 1])
        process.take(folder)
        with process.interruptible() as stop:
            (folder / "begun").touch()
            while not stop():
                time.sleep(0.02)
        (folder / "saved").write_text("once")
        time.sleep(float((folder / "linger").read_text()))
        sys.exit("stopped after saving")
    process.guard(main)
"""
PARENT = """if True:
    import sys
    from pathlib import Path
    from types import SimpleNamespace
    from nanodistill import process
    def main():
        process.take(sys.argv[1])
        process.need(False, "that", sys.argv[2], SimpleNamespace(out=sys.argv[1]))
        print("went on")
    process.guard(main)
"""


@pytest.fixture
def stages(tmp_path):
    """(run folder, a process that runs a stage in it that waits to be stopped)."""
    (tmp_path / "stage.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{STAGE}")
    (tmp_path / "linger").write_text("0")
    parent = python(PARENT, tmp_path, tmp_path / "stage.py", start_new_session=True)
    wait_for((tmp_path / "begun").exists)
    yield tmp_path, parent
    if parent.poll() is None:
        os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("group", [False, True])
def test_a_signal_to_the_first_process_or_its_group_reaches_the_stage_once(stages, number, group):
    folder, parent = stages
    (os.killpg if group else os.kill)(parent.pid, number)
    out, err = parent.communicate(timeout=30)
    assert (folder / "saved").read_text() == "once"              # a second one would have ended it
    assert parent.returncode == 1 and "went on" not in out and "Traceback" not in err
    assert "stopped after saving" in err


def test_a_stage_ends_when_the_process_that_runs_it_is_killed_and_keeps_the_folder_till_then(
        stages):
    folder, parent = stages
    (folder / "linger").write_text("2")
    parent.kill()
    parent.wait()
    wait_for((folder / "saved").exists)
    with pytest.raises(SystemExit, match="in use by process"):
        process.take(folder, patience=0.2)
    process.take(folder, patience=20)


def test_a_stage_that_is_killed_ends_its_parent_with_its_name(stages):
    folder, parent = stages
    pid = int((folder / ".lock").read_text().split()[1])
    assert pid != parent.pid
    os.kill(pid, signal.SIGKILL)
    out, err = parent.communicate(timeout=30)
    assert "was ended by SIGKILL" in err and "went on" not in out and parent.returncode == 1


# ---- made from what ----

@pytest.fixture
def made(tmp_path):
    """A run folder with sft/ made from labels.jsonl, and rm/ from both."""
    (tmp_path / "labels.jsonl").write_text("one")
    for name, inputs in (("sft", ["labels.jsonl"]), ("rm", ["sft", "labels.jsonl"])):
        run.made_from(tmp_path, name, *inputs)
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights of " + name.encode())
    return tmp_path


def test_what_was_made_from_other_inputs_is_named(made):
    assert run.stale(made) == []
    run.made_from(made, "rm", "sft", "labels.jsonl")             # goes on: nothing has changed
    (made / "sft" / "model.safetensors").write_bytes(b"other weights")
    message, = run.stale(made)
    assert f"{made / 'rm'} was made from another {made / 'sft'}" in message and "--out" in message
    with pytest.raises(SystemExit, match="was made from another"):
        run.made_from(made, "rl", "sft", "rm")
    (made / "rm" / "model.safetensors").unlink()                 # nothing of it is there: anew
    run.made_from(made, "rm", "sft", "labels.jsonl")
    assert run.stale(made) == []
    (made / "labels.jsonl").write_text("two")
    assert len(run.stale(made)) == 1                             # sft; rm is not there yet


def test_an_input_that_is_gone_or_a_folder_elsewhere_says_nothing(made, tmp_path_factory):
    (made / "labels.jsonl").unlink()
    assert run.stale(made) == []
    elsewhere = tmp_path_factory.mktemp("student")
    (elsewhere / "config.json").write_text("{}")
    run.made_from(made, "rl", elsewhere)
    (made / "rl").mkdir(), (made / "rl" / "resume.pt").touch()
    assert run.stale(made) == []
    (elsewhere / "config.json").write_text("{ }")                # a checkpoint counts as well
    assert "rl was made from another" in run.stale(made)[0]


def test_a_digest_is_of_what_is_read_of_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"a")
    before = files.digest(tmp_path)
    (tmp_path / "resume.pt").write_bytes(b"b")
    assert files.digest(tmp_path) == before != ""
    (tmp_path / "config.json").write_bytes(b"{}")
    assert files.digest(tmp_path) != before
    assert files.digest(tmp_path / "nothing") == ""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(b"x")               # as the hub's cache names it
    (tmp_path / "linked").symlink_to(tmp_path / "blobs" / "abc")
    assert files.digest(tmp_path / "linked") == "abc"


def test_an_unreadable_list_of_inputs_is_named(made):
    (made / "inputs.json").write_text("[1")
    with pytest.raises(SystemExit, match="inputs.json can't be read"):
        run.stale(made)


# ---- files that are whole ----

@pytest.mark.parametrize("line, words", [
    (b'{"id": 1', "line 2"), (b"\0\0", "line 2"), (b'{"id": "\xff"}', "line 2"), (b"[1]", "line 2"),
    (b'{"no": 1}', "line 2: no id"), (b"7", "line 2"),
    (b"[" * 100000, "line 2")])
def test_a_bad_line_is_named_and_a_torn_last_one_is_left_out(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 0}\n' + line + b'\n{"id": 2}\n')
    with pytest.raises(SystemExit, match=words) as stopped:
        files.read_jsonl(path, "id")
    assert str(path) in str(stopped.value) and len(str(stopped.value).splitlines()) == 1
    path.write_bytes(b'{"id": 0}\n' + line)
    assert files.read_jsonl(path, "id") == [{"id": 0}]


def test_a_last_line_that_lacks_its_newline_alone_is_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 0}\n{"id": 1}')
    assert files.read_jsonl(path) == [{"id": 0}, {"id": 1}]
    files.Appender(path)({"id": 2})
    assert files.read_jsonl(path) == [{"id": 0}, {"id": 1}, {"id": 2}]


def test_every_flipped_byte_of_a_checkpoints_numbers_is_noticed(tmp_path):
    from test_run import Config
    path = tmp_path / "resume.pt"
    run.save_checkpoint(path, Config(), weight=torch.arange(64.0))
    good = path.read_bytes()
    at = good.index(torch.arange(64.0).numpy().tobytes())
    for offset in range(0, 256, 17):
        bad = bytearray(good)
        bad[at + offset] ^= 1
        path.write_bytes(bad)
        with pytest.raises(SystemExit, match="is damaged"):
            run.load_checkpoint(path, Config())
    for bad in (b"", good[:len(good) // 2], b"no zip at all"):
        path.write_bytes(bad)
        with pytest.raises(SystemExit, match="is damaged"):
            run.load_checkpoint(path, Config())


def test_no_part_of_a_checkpoint_stays_when_it_cannot_be_written(tmp_path, monkeypatch):
    from test_run import Config
    path = tmp_path / "resume.pt"
    run.save_checkpoint(path, Config(), weight=torch.ones(2))
    good = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        run.save_checkpoint(path, Config(), weight=torch.zeros(2))
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["resume.pt"]


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), OSError(30, "Read-only file system"),
    RuntimeError("[enforce fail at inline_container.cc:1] . PytorchStreamWriter failed writing"),
    ValueError("Error while serializing: I/O error: No space left on device (os error 28)")])
def test_what_can_not_be_written_ends_in_a_message(error):
    def main():
        raise error
    with pytest.raises(SystemExit, match="What was there is whole"):
        process.guard(main)


# ---- numbers, times, metrics ----

@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_watch_stops_at_the_step_whose_number_is_not_finite(bad):
    watch = run.Watch("sft")
    watch(1, torch.tensor(2.0), torch.tensor(3.0))
    watch.settle()
    watch(2, torch.tensor(1.0), torch.tensor(bad))               # nothing waits for it here
    with pytest.raises(FloatingPointError, match="step 2"):
        watch(3, torch.tensor(1.0))
    watch = run.Watch("sft")
    watch(9, torch.tensor(bad, dtype=torch.bfloat16))
    with pytest.raises(FloatingPointError, match="step 9"):
        watch.settle()
    watch.settle()


def test_metrics_of_a_run_that_was_deleted_do_not_count(tmp_path):
    first = run.Metrics(tmp_path, "rl")
    first(1, score=0.1), first(2, score=0.2)
    run.Metrics(tmp_path, "sft")(5, loss=1.0)
    run.Metrics(tmp_path, "rl")(1, score=0.5)
    assert {s: r["score"] for s, r in run.read_metrics(tmp_path, "rl").items()} == {1: 0.5}
    run.Metrics(tmp_path, "rl", anew=False)(2, score=0.6)        # goes on from a checkpoint
    assert {s: r["score"] for s, r in run.read_metrics(tmp_path, "rl").items()} == {1: 0.5, 2: 0.6}
    assert run.read_metrics(tmp_path, "sft")[5]["loss"] == 1.0


def test_durations_do_not_follow_the_clock_on_the_wall(tmp_path, monkeypatch):
    metrics = run.Metrics(tmp_path, "rl")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= metrics.seconds() < 60


def test_it_is_time_to_save_once_in_so_many_minutes(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    due = run.every(2)
    assert not due()
    now[0] += 121
    assert due() and not due()
    now[0] += 119
    assert not due()


def test_a_finished_stage_says_so_and_a_stale_one_what_is_wrong(tmp_path, capsys):
    (tmp_path / "labels.jsonl").write_text("one")
    run.made_from(tmp_path, "sft", "labels.jsonl")
    assert not weights.complete(tmp_path / "sft")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.json").write_text("{}")
    save_file({"x": torch.ones(1)}, tmp_path / "sft" / "model.safetensors")
    assert weights.complete(tmp_path / "sft")
    run.keep(tmp_path, "sft")
    assert "sft is complete" in capsys.readouterr().out
    (tmp_path / "labels.jsonl").write_text("two")
    with pytest.raises(SystemExit, match="was made from another"):
        run.keep(tmp_path, "sft")


def test_signals_that_nohup_has_switched_off_stay_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with process.interruptible() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)

