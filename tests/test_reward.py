"""Scores and the reward model's losses."""

import math

import pytest
import torch
from conftest import random_model

from nanodistill import reward
from nanodistill.model import ScalarModel


ROWS = [[5, 6, 7, 3], [8, 3], [9, 10, 11, 12, 13, 14, 15, 16, 17, 3], [19, 20, 21, 3]]


def test_a_score_depends_on_neither_padding_nor_batch_mates():
    model = random_model(ScalarModel)
    alone = [reward.score_sequences(model, [row])[0] for row in ROWS]
    together = reward.score_sequences(model, ROWS)
    in_pairs = reward.score_sequences(model, ROWS[::-1], batch_size=2)[::-1]
    assert max(alone) - min(alone) > 0.1
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(in_pairs), torch.tensor(alone), rtol=1e-4, atol=1e-5)


def test_the_score_is_read_at_the_eos():
    model = random_model(ScalarModel)
    ids = torch.tensor([ROWS[0] + [0, 0]])
    score = reward.score_sequences(model, [ROWS[0]])[0]
    assert score == pytest.approx(model(ids)[0, 3].item(), abs=1e-5)
    # The EOS is seen: without it the score is another.
    assert abs(model(ids)[0, 3] - model(ids)[0, 2]) > 1e-3


def test_losses_by_hand():
    scores = torch.tensor([math.log(3), -math.log(3)])
    loss = reward.bce_loss(scores, torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.5]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    # sigmoid(log 9) = 0.9.
    assert reward.bt_loss(scores[:1], scores[1:], 1).item() == pytest.approx(math.log(10 / 9))
    # Two pairs, over the five of a whole batch: (log(10 / 9) + log(1 + 9)) / 5.
    loss = reward.bt_loss(scores, scores.flip(0), 5)
    assert loss.item() == pytest.approx((math.log(10 / 9) + math.log(10)) / 5)
