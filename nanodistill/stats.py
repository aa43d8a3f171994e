"""Figures with their uncertainty: intervals of shares, paired tests, AUC, calibration.

This file imports numpy alone and can be copied out.
"""

import math

import numpy as np


def wilson(right, n, z=1.96):
    """95% interval of a share `right` / n (Wilson 1927): (low, high)."""
    p = right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def paired(a, b, z=1.96):
    """Two models on the same questions: lists of bool, right or not.

    Returns {"difference" of the accuracies a - b, "low", "high" (its 95% interval), "p" (McNemar's
    exact test)}.
    """
    n = len(a)
    only_a = sum(x and not y for x, y in zip(a, b))
    only_b = sum(y and not x for x, y in zip(a, b))
    difference, discordant = (only_a - only_b) / n, only_a + only_b
    half = z * math.sqrt(max(discordant / n - difference**2, 0) / n)
    tail = sum(math.comb(discordant, i) for i in range(min(only_a, only_b) + 1)) / 2**discordant
    return {"difference": difference, "low": difference - half, "high": difference + half,
            "p": min(1.0, 2 * tail)}


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
    # Ties share their mean rank; ranks begin at 1.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]                    # (n,)
    return float((ranks[labels].sum() - good * (good + 1) / 2) / (good * bad))


def within(ids, scores, labels):
    """What scores tell of the responses to one question; `ids` say to which each response is.

    Returns {"within_auc": P(a good response is above a bad one to its question), ties half, absent
    if no question has both; "spread": the mean of the questions' standard deviations; "alike": the
    share of questions whose scores are all the same}, of questions with several responses; {} if
    there is none.
    """
    groups = {}
    for id_, score, label in zip(ids, numbers(scores), labels):
        groups.setdefault(id_, []).append((score, label))
    groups = [tuple(zip(*rows)) for rows in groups.values() if len(rows) > 1]
    pairs = [sum(labels) * (len(labels) - sum(labels)) for _, labels in groups]
    above = sum(n * auc(*group) for n, group in zip(pairs, groups) if n)
    if not groups:
        return {}
    return ({"within_auc": float(above / sum(pairs))} if sum(pairs) else {}) | {
        "spread": float(np.mean([np.std(scores) for scores, _ in groups])),
        "alike": sum(len(set(scores)) == 1 for scores, _ in groups) / len(groups)}


def calibration(scores, labels, bins=10):
    """Reliability of sigmoid(score) as a probability: (expected calibration error, nan if empty;
    [(mean predicted, share good, n)] by equal bins)."""
    p, labels = np.exp(-np.logaddexp(0, -numbers(scores))), np.asarray(labels, float)
    which = np.minimum((p * bins).astype(int), bins - 1)                       # (n,)
    rows = [(float(p[which == b].mean()), float(labels[which == b].mean()),
             int((which == b).sum())) for b in range(bins) if (which == b).any()]
    gaps = [n * abs(predicted - good) for predicted, good, n in rows]
    return sum(gaps) / len(p) if rows else float("nan"), rows


def measure(scores, labels):
    """{"n", "accuracy" at score 0, "auc", "ece"} of scores against labels."""
    right = (np.asarray(scores) > 0) == np.asarray(labels, bool)
    return {"n": len(scores), "accuracy": float(right.mean()) if len(scores) else float("nan"),
            "auc": auc(scores, labels), "ece": calibration(scores, labels)[0]}
