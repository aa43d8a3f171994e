"""Files that are complete or absent, lines that survive a kill, and digests of what files hold.

Imports the standard library only.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
from pathlib import Path


def write_atomic(path, data):
    """Write `data` beside `path`, flush it to disk, and rename: readers see the old file or the
    whole new one.

    data: text, bytes, or a function of the path that it shall write to.
    """
    write_together(Path(path).parent, {Path(path).name: data})


def write_together(folder, contents, stale=()):
    """Write {name: data} into a folder, all beside their places first: what was there stays if they
    cannot be. Then the paths `stale` go, and each file takes its place."""
    beside = {folder / (name + ".partial"): name for name in contents}
    try:
        for path, data in zip(beside, contents.values()):
            if callable(data):
                path.touch()
                mode = path.stat().st_mode
                data(path)
                # safetensors makes files that nobody else may read.
                path.chmod(mode)
            else:
                path.write_bytes(data.encode() if isinstance(data, str) else data)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        for path in stale:
            path.unlink(missing_ok=True)
        for path, name in beside.items():
            os.replace(path, folder / name)
    finally:
        for path in beside:
            path.unlink(missing_ok=True)
    if os.name == "posix":                                       # others open no folder
        entry = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):                       # nor do some file systems flush it
            os.fsync(entry)
        os.close(entry)


def read_jsonl(path, *keys):
    """The lines of a JSONL file as dicts that have `keys`; [] if there is no file.

    A last line that a killed writer left torn is left out. Raises SystemExit that names any other
    line that is no such object.
    """
    if not Path(path).exists():
        return []
    lines, rows = Path(path).read_bytes().split(b"\n"), []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict):
                raise ValueError("not an object")
            if not row.keys() >= {*keys}:
                raise ValueError(f"no {', no '.join(k for k in keys if k not in row)}")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            if n == len(lines):                                  # no line ends in it: it is torn
                return rows
            sys.exit(f"{path}, line {n}: {error}. Delete that line, and give the same command "
                     "again.")
    return rows


class Appender:
    """Appends dicts to a JSONL file, each handed to the system at once: a kill loses none.

    What a killed writer left of its last line is cut off first.
    """

    def __init__(self, path):
        self.file = open(path, "ab+")
        self.file.seek(0)
        whole, end, last = self.file.read().rpartition(b"\n")
        try:
            json.loads(last)
            self.file.write(b"\n")                               # it lacks its end alone
        except ValueError:
            self.file.truncate(len(whole + end))

    def __call__(self, row):
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()


@functools.cache
def _sha256(path, size, changed):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(path):
    """SHA-256 of a file; of a folder, of its config, tokenizer and weights. "" if it is absent.

    In the hub's cache a file's name is its digest, and the file is not read.
    """
    path = Path(path)
    if path.is_dir():
        files = [f for f in sorted(path.iterdir())
                 if f.name in ("config.json", "tokenizer.json") or f.suffix == ".safetensors"]
        whole = " ".join(f"{f.name} {digest(f)}" for f in files)
        return hashlib.sha256(whole.encode()).hexdigest() if files else ""
    if not path.exists():
        return ""
    path = path.resolve()
    if path.parent.name == "blobs":
        return path.name
    return _sha256(path, path.stat().st_size, path.stat().st_mtime_ns)
