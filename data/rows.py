"""Reads the rows of a task from JSONL or parquet, and says what is wrong with them."""

import codecs
import json
from pathlib import Path


def find_files(data, split, required=True):
    """[Path] of a split's rows: `data` if it is a file, else its <split>.jsonl or <split>*.parquet.

    FileNotFoundError: `data` is not there, or has no rows of a split that is `required`.
    ValueError: what goes by a file's name is a folder, a pipe or a device.
    """
    path = Path(data)
    folder = sorted(path.glob(f"{split}.jsonl")) or sorted(path.glob(f"{split}*.parquet"))
    files = folder if path.is_dir() or not path.exists() else [path]
    for file in files:
        if not file.is_file():                          # reading a pipe would wait for ever
            raise ValueError(f"{file}: not a file, but a folder, a pipe or a device")
    if not files and (required or not path.exists()):
        raise FileNotFoundError(
            f"{path}: no such file, and no folder with {split}.jsonl or {split}*.parquet in it")
    return files


def load(file):
    """[(place, row)]: ("line 3", bytes) of JSONL, ("row 3", dict) of parquet, or an ImportError.

    ValueError: the file is no UTF-8, or no parquet. OSError: it can't be read.
    """
    if file.suffix != ".parquet":                       # bytes: bad UTF-8 spoils no other line
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(f"{file} is UTF-16 or UTF-32: save it as UTF-8")
        lines = content.split(b"\n")                    # JSON takes the \r of \r\n for a space
        return [(f"line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f'{file} is parquet, which needs pyarrow: pip install -e ".[data]"') from error
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{file} can't be read as parquet: {why}") from None
    return [(f"row {n}", row) for n, row in enumerate(rows, 1)]


def text_of(row, key):
    """row[key], a text that is not blank. ValueError: it is something else, or `row` is no dict."""
    if not isinstance(row, dict):
        raise ValueError("not an object")
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"no {key}" if value is None else f"{key} is not a text")
    if not value.strip():
        raise ValueError(f"empty {key}")
    value.encode()          # half a surrogate pair, which no tokenizer takes, is a ValueError
    return value


def read_rows(files, read, example):
    """[value] that `read` keeps of the rows of `files`; prints one line for a file with faults.

    `read(i, row)`, i from 0 over all rows, returns (keys, value, fault): what no two rows share,
    what is kept (None: nothing), what is reported ("": nothing). It raises ValueError for a row
    that it does not understand. Where a file has no other, that ends in ValueError with `example`.
    """
    kept, first, start = [], {}, 0
    for file in files:
        rows, faults, understood, before = load(file), [], 0, len(kept)
        for i, (place, row) in enumerate(rows, start):
            try:
                row = json.loads(row.decode()) if isinstance(row, bytes) else row
                keys, value, fault = read(i, row)
                if known := [first[key] for key in keys if key in first]:
                    raise ValueError(f"a duplicate of {known[0]}")
                understood += 1
                if value is not None:
                    first.update(dict.fromkeys(keys, f"{place} of {file.name}"))
                    kept.append(value)
                    fault = fault and f"{fault}, kept"
            except (ValueError, RecursionError) as error:
                fault = f"bad JSON, {error.msg}" if hasattr(error, "msg") else str(error)
            faults += [f"{place}: {fault}"] if fault else []
        start += len(rows)
        if not understood:
            raise ValueError(f"{file}: {faults[0] if faults else 'no rows'}; and no other row is "
                             f"understood. One looks like this: {example}")
        if faults:
            more = [f"and {len(faults) - 5} more"] if len(faults) > 5 else []
            print(f"{file}: {len(rows) - len(kept) + before} of {len(rows)} rows left out:",
                  "; ".join(faults[:5] + more))
    return kept
