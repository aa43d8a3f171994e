"""The reward model's own pieces: the score of a sequence, and the two losses.

The score of a response is the scalar head's output at its last token, the EOS of a response that
ended. Sequences are packed: neither batch mates nor any padding change it.
"""

import torch
import torch.nn.functional as F

from nanodistill import parallel
from nanodistill.batches import pack


def score(model, rows):
    """Scores (B,) of token-id lists (prompt + response)."""
    packed = pack(rows, model.score.weight.device)
    return model(packed).index_select(0, packed.last)


@torch.no_grad()
def score_sequences(model, rows, batch_size=16):
    """Scores of token-id lists (prompt + response), as floats in their order.

    `batch_size` rows of like length at a time; no score depends on it.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts = [score(model, [rows[i] for i in some])[:len(some) * real]
             for some, real in parallel.micro_batches(order, batch_size)]
    mine = torch.cat(parts).tolist() if parts else []
    scores = {}
    for part in parallel.gather(dict(zip(parallel.deal(order), mine))):
        scores |= part
    return [scores[i] for i in range(len(rows))]


def bce_loss(scores, labels, weights):
    """Each response by itself: sigmoid(score) is the probability that it is good.

    scores, labels, weights: (n,). Returns the weighted sum.
    """
    return F.binary_cross_entropy_with_logits(scores, labels, weight=weights, reduction="sum")


def bt_loss(good, bad, denominator):
    """Bradley-Terry pairs of one question: -log sigmoid(good - bad) (arXiv 2203.02155, eq. 1).

    good, bad: (B,). Returns the sum divided by `denominator`.
    """
    return -F.logsigmoid(good - bad).sum() / denominator
