"""The figures of the report, by hand and against SciPy."""

import math

import pytest
import torch

from nanodistill import stats


def test_wilson_interval_against_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    for right, n in ((0, 10), (7, 10), (812, 1000), (1000, 1000)):
        expected = scipy_stats.binomtest(right, n).proportion_ci(0.95, "wilson")
        assert stats.wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_paired_difference_by_hand_and_mcnemar_against_scipy():
    a, b = [True] * 8 + [False] * 2 + [True] * 10, [False] * 8 + [True] * 2 + [True] * 10
    # 8 only a, 2 only b of 20: difference 0.3.
    result = stats.paired(a, b)
    assert result["difference"] == pytest.approx(0.3)
    half = 1.96 * ((10 / 20 - 0.09) / 20) ** 0.5
    assert (result["low"], result["high"]) == pytest.approx((0.3 - half, 0.3 + half))
    scipy_stats = pytest.importorskip("scipy.stats")
    assert result["p"] == pytest.approx(scipy_stats.binomtest(8, 10).pvalue)
    assert stats.paired(a, a) == {"difference": 0, "low": 0, "high": 0, "p": 1.0}


def test_within_a_question_by_hand():
    """a: good 2 and 3, bad 1 and 3: above, above, below, tie of 4 pairs (2 > 1, 3 > 1, 2 < 3,
    3 = 3). b: all alike, both kinds, one tie. c: good alone. d: one response, which counts for
    nothing, though it is bad and far above. Deviations 0.829, 0, 0.5."""
    rows = [("a", 2, True), ("d", 99, False), ("a", 1, False), ("b", 5, True), ("a", 3, True),
            ("b", 5, False), ("a", 3, False), ("c", 0, True), ("c", 1, True)]
    found = stats.within(*zip(*rows))
    assert found["within_auc"] == pytest.approx((2.5 + 0.5) / 5)
    assert found["alike"] == pytest.approx(1 / 3)
    assert found["spread"] == pytest.approx(((11 / 16) ** 0.5 + 0 + 0.5) / 3)
    # No pair, and no question with two responses.
    assert set(stats.within("cc", [0, 1], [True, True])) == {"spread", "alike"}
    assert stats.within("abc", [0, 1, 2], [True, False, True]) == {} == stats.within([], [], [])


def test_auc_by_hand_and_against_scipy():
    assert stats.auc([1, 2, 3, 4], [False, False, True, True]) == 1.0
    assert stats.auc([1, 2, 3, 4], [True, False, True, False]) == 0.25       # 1 pair of 4
    # Pairs: tie, win, win, win.
    assert stats.auc([1, 1, 2, 0], [True, False, True, False]) == 0.875
    assert math.isnan(stats.auc([1, 2], [True, True]))
    scipy_stats = pytest.importorskip("scipy.stats")
    scores = torch.randint(0, 20, (200,), generator=torch.Generator().manual_seed(0)).numpy()
    labels = torch.rand(200, generator=torch.Generator().manual_seed(1)).numpy() < 0.3
    u = scipy_stats.mannwhitneyu(scores[labels], scores[~labels]).statistic
    assert stats.auc(scores, labels) == pytest.approx(u / (labels.sum() * (~labels).sum()))


def test_calibration_by_hand():
    logit = math.log(3)                                          # sigmoid 0.75
    labels = [True, True, True, False, True, True, False, False]
    error, rows = stats.calibration([logit] * 4 + [-logit] * 4, labels)
    assert [(pytest.approx(p), good, n) for p, good, n in rows] == [(0.25, 0.5, 4), (0.75, 0.75, 4)]
    assert error == pytest.approx(0.125)


def test_figures_of_nothing_and_of_one_kind():
    nothing = stats.measure([], [])
    assert nothing.pop("n") == 0 and all(map(math.isnan, nothing.values())) and len(nothing) == 3
    error, rows = stats.calibration([], [])
    assert math.isnan(error) and rows == [] and math.isnan(stats.auc([], []))
    good = stats.measure([1.0, -1.0, 2.0], [True] * 3)
    assert math.isnan(good["auc"]) and good["accuracy"] == pytest.approx(2 / 3)
    # Bins of 0.73 (1), 0.27 (-1), 0.88 (2), each with all good: mean of 1 - p.
    p = [1 / (1 + math.exp(-x)) for x in (1.0, -1.0, 2.0)]
    assert good["ece"] == pytest.approx(1 - sum(p) / 3)


@pytest.mark.parametrize("scores", [[math.nan, 1.0, 2.0], torch.tensor([0.0, 1.0, math.nan])])
def test_scores_that_are_nan_are_not_ranked(scores):
    for figure in (stats.auc, stats.calibration, stats.measure):
        for labels in ([True, False, True], [True] * 3):
            with pytest.raises(ValueError, match="1 of 3 scores are nan"):
                figure(scores, labels)


@pytest.mark.filterwarnings("error")
def test_infinite_and_huge_scores_rank_and_are_probabilities_of_0_and_1():
    scores = [-math.inf, -1e5, 1e5, math.inf]
    assert stats.auc(scores, [False, True, False, True]) == 0.75
    error, rows = stats.calibration(scores, [False, False, True, False])
    assert rows == [(0.0, 0.0, 2), (1.0, 0.5, 2)] and error == 0.25
