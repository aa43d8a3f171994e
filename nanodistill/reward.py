"""The scores of responses: a reward model's, with its two losses, or others in its place.

The score of a response is the scalar head's output at its last token, the EOS of a response that
ended. Sequences are packed: neither batch mates nor any padding change it.
"""

import torch
import torch.nn.functional as F

from nanodistill import parallel
from nanodistill.batches import pack
from nanodistill.vote import self_scores


def score(model, rows):
    """Scores (B,) of token-id lists (prompt + response)."""
    packed = pack(rows, model.score.weight.device)
    return model(packed).index_select(0, packed.last)


def squash_of(config):
    """What scores and values go through. A probability has a ceiling: a response that is surely
    good gains nothing more, and the gradient goes to those that are not."""
    squashed = config.score == "probability" and config.reward == "model"
    return torch.sigmoid if squashed else torch.nn.Identity()


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


def score_answers(config, votes, reward, ids, texts, answers):
    """Scores of B responses, floats, where no reward model gives them: see train_rl.py's --reward.

    Args:
        votes: {question id: vote}. reward: the function, (ids, texts) -> B scores.
        ids, texts, answers: B each; a question's `samples` responses lie beside each other.
    Raises ValueError if the function gives more scores or fewer.
    """
    if config.reward == "vote":
        return [float(answer is not None and answer == votes[id_])
                for id_, answer in zip(ids, answers)]
    if config.reward == "self":
        n = config.samples
        return [s for start in range(0, len(ids), n) for s in self_scores(answers[start:start + n])]
    # Asked once: it need not say the same in each process.
    found = None if parallel.rank() else [float(s) for s in reward(ids, texts)]
    found = parallel.gather(found)[0]
    if len(found) != len(ids):
        raise ValueError(f"the reward function gave {len(found)} scores of {len(ids)} responses")
    return found
