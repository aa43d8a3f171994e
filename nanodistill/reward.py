"""The reward model's own pieces: the score of a sequence, the two losses, and the figures that say what the scores are worth.

The score of a response is the scalar head's output at its last token, the EOS of a response that ended. Sequences are packed, and neither
batch mates nor the padding that attention sees can change it.
"""

import numpy as np
import torch
import torch.nn.functional as F

from nanodistill.model import pack


def score(model, rows):
    """Scores (B,) of token-id lists (prompt + response)."""
    packed = pack(rows, model.score.weight.device)
    return model(packed).index_select(0, packed.tail([1] * len(rows)))


@torch.no_grad()
def score_sequences(model, rows, batch_size=16):
    """Scores of token-id lists (prompt + response), as floats in their order.

    `batch_size` rows of like length at a time; no score depends on it.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts = [score(model, [rows[i] for i in order[start:start + batch_size]]) for start in range(0, len(rows), batch_size)]
    scores = dict(zip(order, torch.cat(parts).tolist() if parts else []))
    return [scores[i] for i in range(len(rows))]


def bce_loss(scores, labels, shares):
    """Each response by itself: sigmoid(score) is the probability that it is good. scores, labels, and what each counts (n,) -> their sum."""
    return F.binary_cross_entropy_with_logits(scores, labels, weight=shares, reduction="sum")


def bt_loss(good, bad, denominator):
    """Bradley-Terry pairs of one question: -log sigmoid(good - bad) (arXiv 2203.02155, eq. 1). good, bad (B,) -> summed / denominator."""
    return -F.logsigmoid(good - bad).sum() / denominator


def numbers(scores):
    """Scores as an array, for the figures below. Raises ValueError if one is nan, without rank."""
    scores = np.asarray(scores, float)
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {len(scores)} scores are nan")
    return scores


def auc(scores, labels):
    """P(a random good score is above a bad one), ties half; nan if one kind is missing."""
    scores, labels = numbers(scores), np.asarray(labels, bool)
    good, bad = labels.sum(), (~labels).sum()
    if good == 0 or bad == 0:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]                                 # ties share their mean rank, from 1
    return float((ranks[labels].sum() - good * (good + 1) / 2) / (good * bad))


def calibration(scores, labels, bins=10):
    """Reliability of sigmoid(score) as a probability: (expected calibration error, nan if empty;
    [(mean predicted, share good, n)] by equal bins)."""
    p, labels = np.exp(-np.logaddexp(0, -numbers(scores))), np.asarray(labels, float)
    which = np.minimum((p * bins).astype(int), bins - 1)
    rows = [(float(p[which == b].mean()), float(labels[which == b].mean()), int((which == b).sum())) for b in range(bins) if (which == b).any()]
    gaps = [n * abs(predicted - good) for predicted, good, n in rows]
    return sum(gaps) / len(p) if rows else float("nan"), rows


def measure(scores, labels):
    """{"n", "accuracy" at score 0, "auc", "ece"} of scores against labels."""
    accuracy = float(np.mean((np.asarray(scores) > 0) == np.asarray(labels, bool))) if len(scores) else float("nan")
    return {"n": len(scores), "accuracy": accuracy, "auc": auc(scores, labels), "ece": calibration(scores, labels)[0]}
