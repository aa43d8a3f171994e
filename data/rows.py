"""Tasks that are read: rows from a local folder or from the Hugging Face hub, and what such tasks share."""

import json
from pathlib import Path


def read_rows(data, hub, pattern, split):
    """The rows of one split of a published data set, as a list of dicts.

    `data` is a folder that holds `<split>.jsonl` or `<split>*.parquet` files, or "" for the files matching `pattern` of the hub's
    data set `hub`. Parquet needs the [data] extra. Raises FileNotFoundError with what was looked for.
    """
    if data:
        folder = Path(data)
    else:
        from huggingface_hub import snapshot_download
        folder = Path(snapshot_download(hub, repo_type="dataset", allow_patterns=[pattern])) / Path(pattern).parent
    plain = folder / f"{split}.jsonl"
    if plain.exists():
        return [json.loads(line) for line in plain.read_text(encoding="utf-8").split("\n") if line.strip()]
    files = sorted(folder.glob(f"{split}*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder}: neither {plain.name} nor {split}*.parquet is there")
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f'{files[0]} is parquet, which needs pyarrow: pip install -e ".[data]"') from error
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


class ReadTask:
    """A task whose `rows(split)` gives {id: (question, gold)}. Its interface is that of every task (data/arithmetic.py)."""

    def questions(self, split):
        """[{"id", "question"}] of the split, "train" or "test". Without answers."""
        return [{"id": id_, "question": question} for id_, (question, _) in self.rows(split).items()]

    def gold(self, split):
        """{id: answer as text}. For evaluation and diagnostics only: nothing that trains may call it."""
        return {id_: answer for id_, (_, answer) in self.rows(split).items()}

    def prompt(self, question):
        """The user's message that asks a model the question."""
        return f"{question}\n\n{self.instruction}"

    def equal(self, answer, other):
        """Are two extracted answers the same? None equals nothing."""
        return answer is not None and answer == other
