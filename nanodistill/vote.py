"""Majority vote: from the answers a teacher gave to one question to a label for each response.

Self-consistency (arXiv 2203.11171) as a labeller: the answer on which most samples agree is taken
to be right, and a response is good if it ends in that answer. No gold answer is involved. This file
imports nothing of ours and can be copied out alone.
"""

import math
from collections import Counter
from dataclasses import dataclass


@dataclass
class Vote:
    """`answer` None: the question is dropped. `agreement`: the winner's share of all n samples,
    those without an answer included."""
    answer: str | None
    agreement: float
    n: int


def plurality(answers):
    """The answers that most samples gave: several if they tie, [] if all are None."""
    counts = Counter(a for a in answers if a is not None)
    most = max(counts.values(), default=0)
    return [a for a, count in counts.items() if count == most]


def majority(answers, min_agreement=0.0):
    """The vote over the answers (str, or None where a response has none) of one question's samples.

    Ours, not the paper's: a tie for the first place drops the question, since nothing tells which
    side is right; so does an agreement below `min_agreement`. Answers must be normalised, so that
    equal answers are equal strings.
    """
    first = plurality(answers)
    agreement = answers.count(first[0]) / len(answers) if first else 0.0
    kept = len(first) == 1 and agreement >= min_agreement
    return Vote(first[0] if kept else None, agreement, len(answers))


def together(*groups):
    """The vote over several models' answers to one question, of which each group has the same say,
    however many they are."""
    groups = [group for group in groups if group]
    whole = math.lcm(*map(len, groups))
    return majority([a for group in groups for a in group for _ in range(whole // len(group))])


def labels(answers, vote):
    """[bool] for each answer: is it the vote's? None for all where the question is dropped."""
    return [None if vote.answer is None else a == vote.answer for a in answers]


def self_scores(answers):
    """What each answer has of the first place among all, without a teacher (TTRL, arXiv
    2504.16084): 1 if most samples gave it, 1 / t if t tie; else, and where there is none, 0."""
    first = plurality(answers)
    return [1 / len(first) if a in first else 0.0 for a in answers]


def summary(votes):
    """{"kept": share of the questions with a vote, "agreement": mean agreement over those}."""
    kept = [v for v in votes if v.answer is not None]
    return {"kept": len(kept) / max(len(votes), 1),
            "agreement": sum(v.agreement for v in kept) / max(len(kept), 1)}
