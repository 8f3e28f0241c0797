"""Octave masses and half-mass distances against exact values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laid_eval.spectrum.distance import (
    half_mass_distance,
    js_divergence,
    mean_log2_distance,
    octave_edges,
    octave_mass,
    wasserstein_octaves,
)

masses = st.lists(st.floats(0, 1), min_size=1, max_size=70)


@pytest.mark.parametrize(
    ("longest", "edges"),
    [(1, [0, 1]), (2, [0, 1, 2]), (3, [0, 1, 2, 3]), (8, [0, 1, 2, 4, 8]), (9, [0, 1, 2, 4, 8, 9])],
)
def test_octave_edges(longest, edges):
    assert octave_edges(longest).tolist() == edges


def test_octave_mass_bin_by_bin():
    profile = np.arange(1.0, 11.0)  # d = 0 .. 9 holds d + 1
    assert octave_mass(profile, tail=0.5).tolist() == [1, 2, 3 + 4, 5 + 6 + 7 + 8, 9 + 10, 0.5]


@settings(max_examples=50, deadline=None)
@given(profile=masses, tail=st.floats(0, 1))
def test_octaves_and_tail_sum_to_the_total(profile, tail):
    assert octave_mass(profile, tail).sum() == pytest.approx(sum(profile) + tail, abs=1e-12)
    assert octave_mass(profile).shape == octave_edges(len(profile)).shape


def test_half_mass_distance_of_an_exponential():
    """T6: d50 = ceil(tau ln 2) - 1."""
    profile = np.exp(-np.arange(4096) / 50)
    assert half_mass_distance(profile) == 34 == np.ceil(50 * np.log(2)) - 1
    assert half_mass_distance(profile, 0.9) == np.ceil(50 * np.log(10)) - 1


def test_half_mass_distance_in_the_tail_is_censored():
    profile = np.array([[0.3, 0.1, 0.0], [0.3, 0.1, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found = half_mass_distance(profile, 0.5, tail=[0.1, 0.7, 0.2, 0.0])
    np.testing.assert_array_equal(found, [0, np.inf, np.inf, np.nan])
    assert half_mass_distance(np.full(1000, 0.1), 1.0) == 999  # rounding of the sum moves nothing into the tail


@settings(max_examples=50, deadline=None)
@given(profile=masses, scale=st.floats(1e-3, 1e3))
def test_half_mass_distance_is_the_first_to_reach_the_share(profile, scale):
    total = sum(profile)
    if total < 1e-6:
        return
    d = int(half_mass_distance(profile, 0.5))
    assert sum(profile[: d + 1]) >= 0.5 * total * (1 - 1e-9)
    assert sum(profile[:d]) < 0.5 * total * (1 + 1e-9)
    assert half_mass_distance(scale * np.array(profile), 0.9) >= d


def test_mean_log2_distance():
    assert mean_log2_distance([3.0, 0, 0, 0]) == 0
    assert mean_log2_distance([[0, 1, 0, 1], [0, 0, 0, 5.0]]).tolist() == [1.5, 2.0]


def test_js_divergence():
    p = np.random.default_rng(0).gamma(1.0, size=(4, 32))
    q = np.random.default_rng(1).gamma(1.0, size=(4, 32))
    np.testing.assert_array_equal(js_divergence(p, p), 0)
    np.testing.assert_allclose(js_divergence(p, q), js_divergence(q, 7 * p), rtol=1e-12)
    assert js_divergence([1, 0], [0, 1]) == pytest.approx(np.log(2))
    first, second = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    m = (first + second) / 2
    plain = 0.5 * sum((x * np.log(x / m)).sum() for x in (first, second))
    assert js_divergence(first, second) == pytest.approx(plain)


def test_transport_in_octaves():
    octaves = np.arange(6.0)
    moved = wasserstein_octaves(np.eye(6)[4], np.eye(6)[1], octaves)
    assert (moved.distance, moved.shift) == (3, 3)
    spread = wasserstein_octaves(np.eye(6)[[1, 3]].sum(0), np.eye(6)[2], octaves)
    assert (spread.distance, spread.shift) == (1, 0)
    back = wasserstein_octaves(np.eye(6)[1], np.eye(6)[4], octaves[::-1])  # positions in any order
    assert (back.distance, back.shift) == (3, 3)
    with pytest.raises(ValueError, match="positions must be finite octaves"):
        wasserstein_octaves([1, 1], [1, 1], [1, np.inf])


def test_transport_agrees_with_scipy():
    from scipy.stats import wasserstein_distance

    rng = np.random.default_rng(3)
    where, p, q = rng.uniform(2, 20, 32), rng.gamma(1.0, size=(3, 32)), rng.gamma(1.0, size=(3, 32))
    expected = [wasserstein_distance(where, where, a, b) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(wasserstein_octaves(p, q, where).distance, expected)
