"""What a model says of sampled responses: log-probabilities and values as (B, R) tensors; and which
responses are taken together.

`rows` are B lists of token ids, prompt + response, whose last `counts[b]` tokens are the response.
A tensor (B, R) has a row per response and a column per response token. R is the longest response;
shorter ones are padded on the right with zeros. Inside, sequences lie end to end (`pack`), so that
only attention computes on padding.
"""

import torch

from nanodistill.batches import pack
from nanodistill.losses import linear_logprobs


def mask(counts):
    """(B, R) bool: True at the counts[b] tokens of each response."""
    return torch.arange(max(counts)) < torch.tensor(counts)[:, None]


def grid(flat, counts, width):
    """flat (sum of counts,) -> (B, width): row b has its counts[b] numbers, then zeros."""
    cells = torch.cat([torch.arange(n) + b * width for b, n in enumerate(counts)])
    zeros = flat.new_zeros(len(counts) * width)
    return zeros.index_copy(0, cells.to(flat.device), flat).view(-1, width)


def minibatches(count, size, epochs, rng):
    """Yield lists of `size` of the indices 0 to count - 1. Each epoch uses all of them once, in a
    new order."""
    for _ in range(epochs):
        order = list(range(count))
        rng.shuffle(order)
        for start in range(0, count, size):
            yield order[start:start + size]


def alike(indices, rows, size):
    """Yield `indices` in lists of `size` whose rows have like lengths."""
    ordered = sorted(indices, key=lambda b: len(rows[b]))
    for start in range(0, len(ordered), size):
        yield ordered[start:start + size]


def before_each(model, rows, counts):
    """What `model` gives at the positions that predict the response tokens, end to end."""
    packed = pack([row[:-1] for row in rows], next(model.parameters()).device)
    return model(packed).index_select(0, packed.tail(counts))


def logprobs(model, rows, counts, width, temperature):
    """Log-probability of each response token, and the entropy it was drawn with: (B, width) both.

    Args:
        model: a CausalLM. temperature: that of the sampling.
    """
    hidden = before_each(model.model, rows, counts)                            # (sum of counts, D)
    targets = [token for row, n in zip(rows, counts) for token in row[-n:]]
    chosen, entropy = linear_logprobs(
        hidden, model.head, torch.tensor(targets).to(hidden.device), temperature,
        ignore_index=None)
    return grid(chosen, counts, width), grid(entropy, counts, width)


def values(model, rows, counts, width, squash):
    """What a ScalarModel expects before each response token, `squash`ed: (B, width)."""
    return grid(squash(before_each(model, rows, counts)), counts, width)
