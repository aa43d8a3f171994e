"""The figures of the report, by hand and against SciPy."""

import pytest

import eval as evaluation


def test_wilson_interval_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for right, n in ((0, 10), (7, 10), (812, 1000), (1000, 1000)):
        expected = stats.binomtest(right, n).proportion_ci(0.95, "wilson")
        assert evaluation.wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_paired_difference_by_hand_and_mcnemar_against_scipy():
    a, b = [True] * 8 + [False] * 2 + [True] * 10, [False] * 8 + [True] * 2 + [True] * 10
    result = evaluation.paired(a, b)                                     # 8 only a, 2 only b of 20: difference 0.3
    assert result["difference"] == pytest.approx(0.3)
    half = 1.96 * ((10 / 20 - 0.09) / 20) ** 0.5
    assert (result["low"], result["high"]) == pytest.approx((0.3 - half, 0.3 + half))
    stats = pytest.importorskip("scipy.stats")
    assert result["p"] == pytest.approx(stats.binomtest(8, 10).pvalue)
    assert evaluation.paired(a, a) == {"difference": 0, "low": 0, "high": 0, "p": 1.0}
