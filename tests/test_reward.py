"""Scores, the reward model's losses and the figures about it."""

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
    in_pairs = reward.score_sequences(model, ROWS[::-1], batch_size=2)[::-1]      # other mates
    assert max(alone) - min(alone) > 0.1
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(in_pairs), torch.tensor(alone), rtol=1e-4, atol=1e-5)


def test_the_score_is_read_at_the_eos():
    model = random_model(ScalarModel)
    ids = torch.tensor([ROWS[0] + [0, 0]])
    assert reward.score_sequences(model, [ROWS[0]])[0] == pytest.approx(model(ids)[0, 3].item(), abs=1e-5)
    assert abs(model(ids)[0, 3] - model(ids)[0, 2]) > 1e-3               # the EOS is seen: without it the score is another


def test_auc_by_hand_and_against_scipy():
    assert reward.auc([1, 2, 3, 4], [False, False, True, True]) == 1.0
    assert reward.auc([1, 2, 3, 4], [True, False, True, False]) == 0.25  # one of four pairs in order
    assert reward.auc([1, 1, 2, 0], [True, False, True, False]) == 0.875 # pairs: tie, win, win, win
    assert math.isnan(reward.auc([1, 2], [True, True]))
    stats = pytest.importorskip("scipy.stats")
    scores = torch.randint(0, 20, (200,), generator=torch.Generator().manual_seed(0)).numpy()
    labels = torch.rand(200, generator=torch.Generator().manual_seed(1)).numpy() < 0.3
    u = stats.mannwhitneyu(scores[labels], scores[~labels]).statistic
    assert reward.auc(scores, labels) == pytest.approx(u / (labels.sum() * (~labels).sum()))


def test_calibration_by_hand():
    logit = math.log(3)                                                  # sigmoid 0.75
    error, rows = reward.calibration([logit] * 4 + [-logit] * 4, [True, True, True, False, True, True, False, False])
    assert [(pytest.approx(p), good, n) for p, good, n in rows] == [(0.25, 0.5, 4), (0.75, 0.75, 4)]
    assert error == pytest.approx(0.125)


def test_losses_by_hand():
    scores = torch.tensor([math.log(3), -math.log(3)])
    assert reward.bce_loss(scores, torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.5])).item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert reward.bt_loss(scores[:1], scores[1:], 1).item() == pytest.approx(math.log(10 / 9))    # sigmoid(log 9) = 0.9
    # Two pairs, over the five of a whole batch: (log(10 / 9) + log(1 + 9)) / 5.
    loss = reward.bt_loss(scores, scores.flip(0), 5)
    assert loss.item() == pytest.approx((math.log(10 / 9) + math.log(10)) / 5)


def test_figures_of_nothing_and_of_one_kind():
    nothing = reward.measure([], [])
    assert nothing.pop("n") == 0 and all(map(math.isnan, nothing.values())) and len(nothing) == 3
    error, rows = reward.calibration([], [])
    assert math.isnan(error) and rows == [] and math.isnan(reward.auc([], []))
    good = reward.measure([1.0, -1.0, 2.0], [True] * 3)
    assert math.isnan(good["auc"]) and good["accuracy"] == pytest.approx(2 / 3)
    # Bins of 0.73 (1), 0.27 (-1), 0.88 (2), each with all good: mean of 1 - p.
    p = [1 / (1 + math.exp(-x)) for x in (1.0, -1.0, 2.0)]
    assert good["ece"] == pytest.approx(1 - sum(p) / 3)


@pytest.mark.parametrize("scores", [[math.nan, 1.0, 2.0], torch.tensor([0.0, 1.0, math.nan])])
def test_scores_that_are_nan_are_not_ranked(scores):
    for figure in (reward.auc, reward.calibration, reward.measure):
        for labels in ([True, False, True], [True] * 3):
            with pytest.raises(ValueError, match="1 of 3 scores are nan"):
                figure(scores, labels)


@pytest.mark.filterwarnings("error")
def test_infinite_and_huge_scores_rank_and_are_probabilities_of_0_and_1():
    scores = [-math.inf, -1e5, 1e5, math.inf]
    assert reward.auc(scores, [False, True, False, True]) == 0.75
    error, rows = reward.calibration(scores, [False, False, True, False])
    assert rows == [(0.0, 0.0, 2), (1.0, 0.5, 2)] and error == 0.25
