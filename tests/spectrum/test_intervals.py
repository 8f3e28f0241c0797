"""Coverage of the interval and calibration of the permutation test, on data with a known truth."""

import numpy as np
import pytest
from scipy.stats import kstest, t

from laid_eval.spectrum.intervals import sign_flip_p, text_interval


@pytest.mark.parametrize("texts", [2, 4, 12])
def test_interval_covers_the_truth_as_often_as_it_says(texts):
    """T14: 20,000 heads measured at once, standard error of the coverage 0.15 %."""
    values = 0.3 + np.random.default_rng(texts).normal(size=(texts, 20000))
    found = text_interval(values)
    covered = (found.low <= 0.3) & (found.high >= 0.3)
    assert covered.mean() == pytest.approx(0.95, abs=0.006)


def test_interval_against_the_textbook():
    values = np.array([1.0, 2.0, 4.0])
    found = text_interval(values, confidence=0.9)
    half = t.ppf(0.95, 2) * values.std(ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(found, [7 / 3, 7 / 3 - half, 7 / 3 + half])


def test_one_text_has_no_interval_and_no_warning():
    found = text_interval(np.ones((1, 2, 3)))
    np.testing.assert_array_equal(found.mean, 1)
    assert np.isnan(found.low).all()
    assert np.isnan(found.high).all()


def test_texts_without_a_value_do_not_count():
    found = text_interval([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan], [np.nan, np.nan, np.nan]])
    np.testing.assert_array_equal(found.mean, [2, 5, np.nan])
    np.testing.assert_array_equal(np.isnan(found.low), [False, True, True])
    np.testing.assert_allclose(found.high[0], text_interval([1.0, 3.0]).high)
    with pytest.raises(ValueError, match=r"need \(texts, ...\) values"):
        text_interval(np.zeros((0, 3)))


@pytest.mark.parametrize("layers", [8, 20])
def test_p_is_uniform_under_the_null(layers):
    """Exact and random flips; heads of one layer share most of their noise, which flipping heads alone would miss."""
    rng = np.random.default_rng(layers)
    p = []
    for trial in range(400):
        layer = rng.normal(size=(layers, 1))
        p.append(sign_flip_p(layer + 0.1 * rng.normal(size=(layers, 6)), seed=trial, rounds=499))
    assert kstest(p, "uniform").pvalue > 0.01
    assert np.mean(np.array(p) <= 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_flips_of_up_to_twelve_layers_are_exact():
    assert sign_flip_p(np.ones((12, 3)), seed=0) == 2 / 4096
    assert sign_flip_p(np.ones((12, 3)), seed=1, rounds=3) == 2 / 4096
    assert sign_flip_p([1.0], seed=0) == 1.0
    brute = [abs(a * 3 + b * 1 + c * 0.5) >= 2.5 for a in (1, -1) for b in (1, -1) for c in (1, -1)]
    assert sign_flip_p([3.0, -1.0, 0.5], seed=0) == np.mean(brute)


def test_random_flips_never_give_zero():
    assert sign_flip_p(np.ones(30), seed=0, rounds=99) == 0.01
    assert sign_flip_p(np.zeros(30), seed=0, rounds=99) == 1.0
    noise = np.random.default_rng(0).normal(0.2, 1, size=(30, 4))
    assert sign_flip_p(noise, seed=5) == sign_flip_p(noise, seed=5)
    assert sign_flip_p(-noise, seed=5) == sign_flip_p(noise, seed=5)


def test_missing_values_are_left_out():
    data = np.array([[1.0, np.nan], [2.0, 2.0], [np.nan, np.nan]])
    assert sign_flip_p(data, seed=0) == sign_flip_p([1.0, 4.0], seed=0)
    assert sign_flip_p([np.nan, np.nan], seed=0) is None
