"""A stage as a process: how it stops, whose the run folder is, and how it runs another stage."""

import contextlib
import errno
import fcntl
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from nanodistill import parallel


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)           # Ctrl-C, kill, a dropped ssh


# ---- errors that are no fault of the program ----

def memory_is_full(error):
    """Did an error come for want of memory? The CPU's allocator has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def guard(main):
    """Run a script. What is no fault of the program ends in a message and not in a traceback."""
    def stop(number, frame):
        raise KeyboardInterrupt

    for number in STOPS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, stop)
    if parallel.world() > 1 and "NANODISTILL_LOCK" not in os.environ:
        threading.Thread(target=end_after, args=(orphaned,), daemon=True).start()
    # Of several processes the first prints; what ends them all is said by one on each machine.
    if parallel.rank():
        sys.stdout = open(os.devnull, "w")
    try:
        main()
    except SystemExit as error:
        sys.exit(1 if error.code and parallel.local_rank() else error.code)
    except KeyboardInterrupt:
        sys.exit(1 if parallel.local_rank() else
                 "stopped at once. What was saved is whole; the same command goes on from there.")
    except FloatingPointError as error:
        sys.exit(str(error))
    except Exception as error:
        if memory_is_full(error):
            sys.exit("out of memory, though as little as possible was tried at once. What was "
                     "saved is whole. Fewer --max-new-tokens, a smaller --student or more memory "
                     "would do.")
        if "gloo/transport" in str(error):
            sys.exit(1 if parallel.local_rank() else "Another of the processes has ended: "
                     "above or below it, or torchrun, says why. What was saved is whole; the same "
                     f"command goes on from there. (gloo: {str(error)[-200:]})")
        if not cannot_write(error):
            raise
        sys.exit(f"{error}. What was there is whole, and the same command goes on from there once "
                 "it can be written to.")


def cannot_write(error):
    """Did an error come because a file could not be written? PyTorch's and safetensors' writers
    have errors of their own."""
    return getattr(error, "errno", None) in (
        errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM) or any(
        words in str(error) for words in ("PytorchStreamWriter failed", "os error 28",
                                          "os error 27", "os error 122", "os error 30"))


# ---- signals ----

@contextlib.contextmanager
def on_stop(handler):
    """`handler(number, frame)` for the signals that ask to stop; not for those that nohup or a
    shell's & has switched off."""
    before = {number: signal.getsignal(number) for number in STOPS}
    before = {number: old for number, old in before.items() if old != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def interruptible():
    """Yields a function that says whether Ctrl-C, SIGTERM or SIGHUP has come.

    So a loop can finish its step and save. Twice ends at once.
    """
    asked = []

    def handler(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        if parallel.rank():
            return
        with contextlib.suppress(OSError):                       # of a terminal that is gone
            print("\nstopping after this step; once more to stop now", file=sys.stderr)

    with on_stop(handler):
        yield lambda: bool(asked)


# ---- the folder's lock, and the stages that share it ----

_taken = {}                                                      # {run folder: its open lock}


def take(folder, patience=15.0):
    """Take the run folder for this process, until it ends.

    A stage that another one runs shares its lock, and stops when that one is gone. Raises
    SystemExit that names the process that has the folder, if it does not end within `patience`
    seconds.
    """
    folder = Path(folder).resolve()
    if folder in _taken:
        return
    handed = os.environ.pop("NANODISTILL_LOCK", "")
    with contextlib.suppress(OSError, ValueError):
        lock, parent = map(int, handed.split())
        if os.path.samestat(os.fstat(lock), os.stat(folder / ".lock")):
            _taken[folder] = os.fdopen(lock, "r+")
            threading.Thread(target=end_after, args=(os.read, parent, 1), daemon=True).start()
    if folder not in _taken:
        file, until, owner = open(folder / ".lock", "a+"), time.monotonic() + patience, ""
        # Of several processes the first takes it for all.
        while parallel.rank() == 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                owner = ""
                break
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
            if time.monotonic() > until:
                break
            time.sleep(0.2)
        # None touches the folder before.
        owner = parallel.gather(owner)[0]
        if owner:
            sys.exit(f"--out {folder} is in use by {owner}: wait for it, or give another --out")
        _taken[folder] = file
    sign(_taken[folder])


def sign(file):
    """Write into a lock who has it."""
    if parallel.rank():
        return
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()} ({Path(sys.argv[0]).name})")
    file.flush()


def orphaned():
    """Returns when the process that started this one, torchrun, is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)


def end_after(wait, *args):
    """Stop this process as SIGTERM does when `wait` returns: from a pipe whose other end is closed,
    or `orphaned`."""
    wait(*args)
    os.kill(os.getpid(), signal.SIGTERM)
    if parallel.world() > 1:
        # It may wait for a process that is gone, and never see that signal.
        time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)


def need(there, path, script, config):
    """Unless `path` is there, run the stage that makes it, on as many processes, and say so.

    That stage takes its settings from settings.json.
    """
    parallel.start(torch.device("cpu"))
    # The first process's view counts: a shared folder may show the others an older one.
    if parallel.gather(there)[0]:
        return
    print(f"\n{path} is missing: running {script}", flush=True)
    command = [sys.executable, str(Path(__file__).parent.parent / script), "--out", config.out]
    take(config.out)
    # What this stage has freed is for the next one, which is another process.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    # The child inherits the lock and a pipe's read end; the pipe closes when this process dies.
    lock, (parent, ours) = _taken[Path(config.out).resolve()], os.pipe()
    child, came = None, []

    # The child is in a session of its own, so that each signal reaches it once: from here.
    def handler(number, frame):
        came.append(number)
        if child:
            child.send_signal(number)

    with on_stop(handler):
        started = subprocess.Popen(
            command, start_new_session=True, pass_fds=(lock.fileno(), parent),
            env={**os.environ, "NANODISTILL_LOCK": f"{lock.fileno()} {parent}",
                 **parallel.meeting_point()})
        early, child = [*came], started
        for number in early:
            child.send_signal(number)
        code = child.wait()
    os.close(parent), os.close(ours)
    sign(lock)
    if code < 0:
        sys.exit(f"{script} was ended by {signal.Signals(-code).name}; the same command goes on "
                 "from what was saved")
    if code or came:
        sys.exit(code or "stopped; the same command goes on from here")
    parallel.gather(None)
