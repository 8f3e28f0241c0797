"""Ground truths of the frequency domain: Parseval, planted tones, an exponential, and what tapers leak."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import get_window
from scipy.special import iv

from laid_eval.spectrum.fourier import (
    default_cuts,
    effective_distances,
    frequency_grid,
    half_power_frequency,
    line_weights,
    low_frequency_ratio,
    periodogram,
    spectral_centroid,
    spectral_edge,
    spectral_entropy,
    taper_leakage,
    transfer,
    transfer_fft,
)

TAPERS = ["boxcar", "hann-symmetric"]


def profiles(width, heads=(2, 3), seed=0):
    return np.random.default_rng(seed).gamma(0.3, size=(*heads, width))


def exponential(tau, width):
    return np.exp(-np.arange(width) / tau)


@pytest.mark.parametrize("width", [256, 257])
def test_parseval(width):
    """T4: sum of c_k |H_k|^2 / W = sum of Phat^2 = 1 / effective distances."""
    profile = profiles(width)
    power = line_weights(width) * np.abs(transfer_fft(profile).response) ** 2
    share = profile / profile.sum(-1, keepdims=True)
    np.testing.assert_allclose(power.sum(-1) / width, (share**2).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(1 / effective_distances(profile), (share**2).sum(-1), rtol=1e-12)


def test_transfer_function_is_absolute():
    """T4: H(0) = 1 and |H| <= 1, whatever the scale of the profile."""
    profile = 37.0 * profiles(5000)
    response = transfer(profile, np.r_[0.0, frequency_grid(5000)])
    np.testing.assert_allclose(response[..., 0], 1, atol=1e-12)
    assert np.abs(response).max() <= 1 + 1e-12


@pytest.mark.parametrize("width", [9000, 9001])
def test_transfer_equals_the_fft_on_its_grid(width):
    """Wider than one block of distances."""
    profile = profiles(width, heads=(2,))
    frequency, response = transfer_fft(profile)
    np.testing.assert_allclose(transfer(profile, frequency[::97]), response[..., ::97], atol=1e-12)


def test_transfer_of_one_distance_is_a_pure_phase():
    response = transfer(np.eye(64)[5], [0.125])
    np.testing.assert_allclose(response, np.exp(-2j * np.pi * 0.125 * 5), atol=1e-14)


def test_frequency_grid_runs_from_half_a_cycle_to_nyquist():
    grid = frequency_grid(512)
    assert len(grid) == 64
    np.testing.assert_allclose(grid[[0, -1]], [1 / 1024, 0.5])
    np.testing.assert_allclose(np.diff(np.log(grid)), np.diff(np.log(grid))[0])


@pytest.mark.parametrize(("sharpness", "ratio"), [(1.0, 0.0577), (2.5, None)])
def test_softmax_of_a_rotary_tone_is_a_comb(sharpness, ratio):
    """T5 (Jacobi-Anger): exp(a cos wd) peaks at its bin; its second harmonic holds (I2(a) / I1(a))^2 of the power."""
    width, line = 1024, 32
    frequency, density = periodogram(np.exp(sharpness * np.cos(2 * np.pi * line / width * np.arange(width))))
    assert frequency[np.argmax(density)] == line / width
    measured = density[2 * line] / density[line]
    assert measured == pytest.approx((iv(2, sharpness) / iv(1, sharpness)) ** 2, rel=1e-10)
    if ratio:
        assert measured == pytest.approx(ratio, abs=5e-5)


@pytest.mark.parametrize("taper", TAPERS)
@pytest.mark.parametrize("width", [512, 513])
def test_power_is_per_cycle_per_token(taper, width):
    """A tone of amplitude a holds a^2 / 2 under any taper: the integral of the density."""
    tone = 5 + 0.2 * np.cos(2 * np.pi * 100 / width * np.arange(width))
    frequency, density = periodogram(tone, taper)
    assert density.sum() * frequency[1] == pytest.approx(0.02, rel=0.01)


def test_boxcar_power_integrates_to_the_variance():
    profile = profiles(400)
    frequency, density = periodogram(profile)
    np.testing.assert_allclose(density.sum(-1) * frequency[1], profile.var(-1), rtol=1e-12)


def test_half_power_frequency_of_an_exponential():
    """T6: closed form arccos((1 + a^2 - 2 (1 - a)^2) / 2a) / 2 pi."""
    a = np.exp(-1 / 50)
    truth = np.arccos((1 + a * a - 2 * (1 - a) ** 2) / (2 * a)) / (2 * np.pi)
    assert truth == pytest.approx(0.00318, abs=5e-6)
    found = [half_power_frequency(exponential(50, width)) for width in (1024, 4096)]
    np.testing.assert_allclose(found, truth, rtol=2e-3)


def test_half_power_frequency_of_a_local_head_is_censored():
    profile = np.zeros((2, 64))
    profile[0, 0], profile[1, :] = 1.0, 1.0
    found = half_power_frequency(profile)
    assert found[0] == np.inf
    assert found[1] == pytest.approx(0.443 / 64, rel=0.02)  # the first half-power point of a boxcar of width 64


def test_the_jump_of_half_power_where_distance_says_little():
    """Section 6: raw low-frequency |H|^2 of a two-scale head *rises* when its far mass is lost; the ratio hardly falls."""
    width = 2048
    near, far = exponential(4, width), exponential(600, width)
    near, far = near / near.sum(), far / far.sum()
    keeps, lost = 0.6 * near + 0.4 * far, 0.92 * near + 0.08 * far
    raw = np.abs(transfer(np.stack([keeps, lost]), [1 / 512]))[:, 0] ** 2
    assert raw[1] > raw[0] + 0.3
    ratio = low_frequency_ratio(np.stack([keeps, lost]), 1 / 64)
    assert abs(ratio[0] - ratio[1]) < 0.1


@pytest.mark.parametrize("taper", TAPERS)
def test_band_statistics_of_a_planted_tone(taper):
    width, nu = 2048, 1 / 32
    profile = 1 + 0.5 * np.cos(2 * np.pi * nu * np.arange(width))
    assert low_frequency_ratio(profile, 1 / 64, taper) == pytest.approx(0, abs=1e-4)
    assert low_frequency_ratio(profile, 1 / 16, taper) == pytest.approx(1, abs=1e-4)
    centroid = spectral_centroid(profile, taper)
    assert centroid.linear == pytest.approx(nu, rel=1e-3)
    assert centroid.log == pytest.approx(nu, rel=1e-3)
    assert spectral_edge(profile, taper=taper) == pytest.approx(nu, abs=1 / width)
    assert spectral_entropy(profile, taper) < 1.1  # a boxcar tone on its bin: 0; the Hann's own three lines: 1.0


def test_white_profile_has_the_largest_entropy():
    spike = np.eye(256)[3]
    assert spectral_entropy(spike) == pytest.approx(np.log(128), abs=0.01)
    assert spectral_edge(spike) == pytest.approx(0.475, abs=0.01)
    assert spectral_centroid(spike).linear == pytest.approx(0.25, abs=0.01)
    assert spectral_entropy(1 + np.cos(np.pi / 8 * np.arange(256))) == pytest.approx(0, abs=1e-9)


def test_the_cut_itself_is_low():
    width = 768
    cut = default_cuts(width)[0]
    profile = 1 + np.cos(2 * np.pi * 4 / width * np.arange(width))
    assert default_cuts(width) == (4 / width, 1 / 64)
    assert low_frequency_ratio(profile, cut) == pytest.approx(1)


@pytest.mark.parametrize("taper", TAPERS)
def test_flat_and_empty_profiles_are_undefined_without_a_warning(taper):
    profile = np.stack([np.full(100, 0.1), np.zeros(100), exponential(5, 100)])
    for statistic in (
        low_frequency_ratio(profile, 1 / 64, taper),
        spectral_entropy(profile, taper),
        spectral_edge(profile, taper=taper),
        *spectral_centroid(profile, taper),
    ):
        assert statistic.shape == (3,)
        np.testing.assert_array_equal(np.isnan(statistic), [True, True, False])
    np.testing.assert_array_equal(np.isnan(half_power_frequency(profile)), [False, True, False])
    np.testing.assert_array_equal(np.isnan(effective_distances(profile)), [False, True, False])
    assert effective_distances(profile)[0] == pytest.approx(100)


def test_what_tapers_leak():
    """On a bin a boxcar leaks nothing, between bins a fifth; the even Hann keeps a hundredth in either case."""
    boxcar, hann = (taper_leakage(taper, 1024) for taper in TAPERS)
    assert boxcar.on_bin == pytest.approx(1, abs=1e-12)
    assert boxcar.half_bin == pytest.approx(8 / np.pi**2, abs=0.01)
    assert hann.on_bin > 0.99
    assert hann.half_bin > 0.99


def test_why_a_hann_over_the_distances_is_not_offered():
    """It erases d = 0, where most heads hold their mass, and ranks a local head as a far one."""
    width = 2048
    local = exponential(2, width)
    one_sided = get_window("hann", width)
    even = np.cos(np.pi * np.arange(width) / (2 * width)) ** 2
    kept = [((local * taper)[:8] ** 2).sum() / (local[:8] ** 2).sum() for taper in (one_sided, even)]
    assert kept[0] < 1e-5
    assert kept[1] > 0.99
    with pytest.raises(ValueError, match="unknown taper 'hann'; allowed: boxcar, hann-symmetric"):
        periodogram(local, "hann")


@pytest.mark.parametrize("taper", TAPERS)
def test_statistics_go_over_leading_axes(taper):
    profile = profiles(300)
    for function in (
        lambda p: low_frequency_ratio(p, 1 / 64, taper),
        lambda p: spectral_entropy(p, taper),
        lambda p: spectral_edge(p, taper=taper),
        lambda p: spectral_centroid(p, taper).log,
        half_power_frequency,
        effective_distances,
        lambda p: transfer(p, [0.01, 0.1]),
    ):
        whole = function(profile)
        single = np.array([[function(profile[i, j]) for j in range(3)] for i in range(2)])
        np.testing.assert_allclose(whole, single, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 1000), width=st.integers(16, 200), taper=st.sampled_from(TAPERS))
def test_scaling_a_profile_changes_nothing(scale, seed, width, taper):
    profile = profiles(width, heads=(), seed=seed) + 1e-3
    for function in (
        lambda p: low_frequency_ratio(p, 0.1, taper),
        lambda p: spectral_entropy(p, taper),
        lambda p: spectral_centroid(p, taper).linear,
        half_power_frequency,
        effective_distances,
    ):
        np.testing.assert_allclose(function(scale * profile), function(profile), rtol=1e-7, atol=1e-9)


def test_noise_of_a_sampled_profile_does_not_count_as_high_frequency_power():
    """Two samples of one profile: their cross-power has its centroid, each alone is taken for far more local."""
    rng = np.random.default_rng(0)
    profile = np.exp(-np.arange(512) / 60)
    one, two = (profile + rng.normal(0, 0.15, size=(400, 512)) for _ in range(2))
    true = spectral_centroid(profile)
    cross, alone = spectral_centroid(one, other=two), spectral_centroid((one + two) / 2)
    assert np.mean(cross.linear) == pytest.approx(float(true.linear), abs=0.004)
    assert np.mean(alone.linear) > true.linear + 0.02
    ratio = low_frequency_ratio(one, 1 / 64, other=two)
    assert np.mean(ratio) == pytest.approx(float(low_frequency_ratio(profile, 1 / 64)), abs=0.02)


def test_two_samples_that_share_nothing_have_no_spectrum():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 50, 256))
    assert np.isnan(spectral_centroid(one, other=two).log).mean() > 0.8
