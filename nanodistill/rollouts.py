"""Some responses of each PPO step, token by token: rollouts.jsonl, a line per response.

    {"step", "i" (its number in the step), "id", "question", "answer", "vote", "right" (by the
     vote), "score", "ended", "tokens" [pieces of text], and as many numbers each: "logprobs" and
     "entropy" of the policy that sampled, "ref_logprobs", "rewards", "values", "advantages",
     "returns"}

No training reads it: it is there to be looked at, as report.html shows it.
"""

import torch

from nanodistill import files, parallel


def pieces(tokenizer, tokens):
    """What each token adds to the text; of one that adds none, as the EOS, its name."""
    found = []
    for i, token in enumerate(tokens):
        # A few before it tell whether it begins with a blank.
        start = max(i - 4, 0)
        before, after = (tokenizer.decode(tokens[start:end]) for end in (i, i + 1))
        # A character that was unfinished before it may be whole now.
        added = after.removeprefix(before.rstrip("\ufffd"))
        found.append(added or tokenizer.tokenizer.id_to_token(token) or f"<{token}>")
    return found


def writer(path, n, tokenizer, anew):
    """-> `write(step, tokens, **columns)`, which appends the first `n` of a step's B responses.

    tokens: B lists of token ids. columns: B values each, or (B, R) tensors, which come in one copy;
    numbers are kept to four digits. A stage that goes on from no checkpoint starts the file `anew`.
    The first process alone writes.
    """
    if parallel.rank() == 0 and anew:
        path.unlink(missing_ok=True)
    if parallel.rank() or not n:
        return lambda *_, **__: None
    append = files.Appender(path)

    def write(step, tokens, **columns):
        tensors = {k: x for k, x in columns.items() if isinstance(x, torch.Tensor)}
        numbers = torch.stack([x[:n].float() for x in tensors.values()]).tolist()
        for i, its in enumerate(tokens[:n]):
            append({"step": step, "i": i,
                    **{k: short(values[i]) for k, values in columns.items() if k not in tensors},
                    "tokens": pieces(tokenizer, its),
                    **{k: [*map(short, rows[i][:len(its)])] for k, rows in zip(tensors, numbers)}})
    return write


def short(x):
    """A float to four digits; all else as it is."""
    return float(f"{x:.4g}") if isinstance(x, float) else x


def read(path):
    """The rows in the order of steps; of a step that a resumed run did again, the later ones."""
    rows = {(row["step"], row["i"]): row
            for row in files.read_jsonl(path, "step", "i", "question", "tokens", "logprobs")}
    return [rows[key] for key in sorted(rows)]
