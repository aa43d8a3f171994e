"""What a model says of sampled responses: log-probabilities and values as (B, R) tensors; and which
responses are taken together.

A tensor (B, R) has a row per response and a column per response token. R is the longest response;
shorter ones are padded on the right with zeros. Inside, sequences lie end to end (`pack`), so that
at most attention computes on padding.
"""

from dataclasses import dataclass

import torch

from nanodistill import parallel
from nanodistill.batches import Packed, on_device, pack, ranges
from nanodistill.losses import linear_logprobs


@dataclass
class Batch:
    """Some responses as all models take them, M tokens in all. What lies on the device came there
    in one copy."""
    packed: Packed                         # without their last tokens, which predict nothing
    targets: torch.Tensor                  # (M,) int64: the response tokens
    cells: torch.Tensor                    # (M,) of each target in the flattened (B, R) grid
    at: torch.Tensor                       # (B,) their numbers among all responses
    width: int                             # R

    def grid(self, flat):
        """flat (M,) -> (B, R): each response's numbers in its row, then zeros."""
        zeros = flat.new_zeros(len(self.at) * self.width)
        return zeros.index_copy(0, self.cells, flat).view(-1, self.width)


def batch(rows, counts, at, device):
    """The responses whose numbers are `at` -> Batch.

    rows: lists of token ids, prompt + response. counts: how many of each row's last tokens are the
    response. R is the longest of all.
    """
    R, rows, counts = max(counts), [rows[b] for b in at], [counts[b] for b in at]
    targets = [token for row, n in zip(rows, counts) for token in row[-n:]]
    cells = ranges(range(0, len(rows) * R, R), counts)
    packed = pack([row[:-1] for row in rows], device, counts=counts, more=(targets, cells, at))
    return Batch(packed, *packed.more, R)


def mask(counts, device="cpu"):
    """(B, R) bool: True in the first counts[b] columns of row b."""
    lengths, = on_device(device, counts)
    return torch.arange(max(counts), device=device) < lengths[:, None]


def minibatches(count, size, epochs, rng):
    """Yield lists of `size` of the indices 0 to count - 1. Each epoch uses all of them once, in a
    new order."""
    for _ in range(epochs):
        order = list(range(count))
        rng.shuffle(order)
        for start in range(0, count, size):
            yield order[start:start + size]


def alike(indices, rows, size):
    """`parallel.micro_batches` of `indices`: `size` at a time, whose rows have like lengths."""
    return parallel.micro_batches(sorted(indices, key=lambda b: len(rows[b])), size)


def logprobs(model, batch, temperature):
    """Log-probability of each response token, and the entropy it was drawn with: (B, R) both.

    Args:
        model: a CausalLM. temperature: that of the sampling.
    """
    def loss(hidden, head):
        before_each = hidden.index_select(0, batch.packed.last)                # (M, D)
        return linear_logprobs(before_each, head, batch.targets, temperature, ignore_index=None)

    chosen, entropy = model(batch.packed, loss)                                # (M,) both
    return batch.grid(chosen), batch.grid(entropy)


def values(model, batch, squash):
    """What a ScalarModel expects before each response token, `squash`ed: (B, R)."""
    before_each = model(batch.packed).index_select(0, batch.packed.last)       # (M,)
    return batch.grid(squash(before_each))
