"""A head's distance profile in the frequency domain.

The *profile* P(d) is the mean attention mass at distance d = query - key position (tokens), over queries that all see
every d in [0, W): no edge bias, and the first token (the usual sink) is never inside. Frequencies are in cycles/token,
0..0.5. Two views of one profile:

    transfer function   H(nu) = sum_d Phat(d) exp(-i 2 pi nu d), Phat = P / sum P    absolute: H(0) = 1, |H| <= 1
    periodogram         power of P - mean, per cycle/token                           only its shape means something

A purely local head has a flat |H|^2 near 1: its raw low-frequency power is *high*. Ratios and bandwidths compare heads.
All functions take profiles (..., W), e.g. (layer, head, W), and work in float64. Undefined (a head without mass in
[0, W), the spectrum of a flat profile) is NaN, a bound that is never reached +inf; records turn both into null.

The FFT's window is called *taper*. scipy's default, a Hann over [0, W), is not offered: it is zero at d = 0, where
most heads hold most of their mass. `hann-symmetric` is even about d = 0 instead and keeps that mass.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Complexes = NDArray[np.complex128]
Taper = Literal["boxcar", "hann-symmetric"]

_BLOCK = 4096  # distances whose exponentials are held at a time
_SHARED = 0.1  # of the power, common to two samples of a profile, for it to have a spectrum
_ROUNDING = 1e-12  # a profile that varies by less than this share of its peak is flat


class Transfer(NamedTuple):
    """A transfer function on the FFT's own frequencies."""

    frequency: Floats
    """(W // 2 + 1,), cycles/token."""
    response: Complexes
    """(..., W // 2 + 1)."""


class Periodogram(NamedTuple):
    """One-sided power over frequency; its integral is the (tapered) variance of the profile over distance."""

    frequency: Floats
    """(F,), cycles/token."""
    density: Floats
    """(..., F), squared mass per cycle/token."""


class Centroid(NamedTuple):
    """Mean frequency of a periodogram, cycles/token, each (...)."""

    linear: Floats
    log: Floats
    """Geometric mean: the centre on an axis of octaves."""


class Leakage(NamedTuple):
    """Share of a pure tone's power that a taper leaves within the main lobe (1: none leaks)."""

    on_bin: float
    half_bin: float
    """A tone halfway between two bins: the worst case."""


def normalised(profile: ArrayLike) -> Floats:
    """Profiles (..., W) that sum to one over distance; NaN where there is no mass."""
    mass = np.asarray(profile, dtype=np.float64)
    total = mass.sum(axis=-1, keepdims=True)
    return mass / np.where(total > 0, total, np.nan)


def frequency_grid(width: int, count: int = 64) -> Floats:
    """(count,) frequencies, log-spaced from 1/(2 W) to 1/2 cycles/token (D5)."""
    return np.geomspace(1 / (2 * width), 0.5, count)


def transfer(profile: ArrayLike, frequency: ArrayLike) -> Complexes:
    """Transfer function H at any frequencies (D5): softmax attention as a filter over distance (Wang et al. 2022).

    Args:
        profile: (..., W) mass by distance.
        frequency: (K,) cycles/token; a rotary pair of inv_freq rad/token lies at inv_freq / 2 pi.

    Returns:
        (..., K), with H(0) = 1 and |H| <= 1.

    >>> bool(np.isclose(abs(transfer([0.0, 1.0, 0.0], [0.25]))[0], 1.0))  # one distance only: all frequencies pass
    True
    """
    share = normalised(profile)
    frequency = np.asarray(frequency, dtype=np.float64)
    response = np.zeros((*share.shape[:-1], len(frequency)), dtype=np.complex128)
    for start in range(0, share.shape[-1], _BLOCK):
        block = share[..., start : start + _BLOCK]
        distance = np.arange(start, start + block.shape[-1])
        phase = 2 * np.pi * distance[:, None] * frequency
        response += block @ np.cos(phase) - 1j * (block @ np.sin(phase))
    return response


def transfer_fft(profile: ArrayLike) -> Transfer:
    """Transfer function of profiles (..., W) at the W // 2 + 1 frequencies k / W."""
    share = normalised(profile)
    return Transfer(_grid(share.shape[-1]), np.fft.rfft(share, axis=-1))


def effective_distances(profile: ArrayLike) -> Floats:
    """(...) number of distances in use, 1 / sum Phat^2: 1 for a one-distance head, W for a uniform one (D5).

    By Parseval this is also W / sum_k c_k |H_k|^2: a bandwidth in disguise.
    """
    return np.asarray(1 / np.square(normalised(profile)).sum(axis=-1))


def line_weights(width: int) -> Floats:
    """(W // 2 + 1,) how many lines of the two-sided FFT of length W each one-sided line stands for: 1, 2, ..., 2, 1."""
    weights = np.full(width // 2 + 1, 2.0)
    weights[0] = 1.0
    if width % 2 == 0:
        weights[-1] = 1.0
    return weights


def periodogram(profile: ArrayLike, taper: Taper = "boxcar", other: ArrayLike | None = None) -> Periodogram:
    """One-sided power spectrum of P - mean over distance (D6).

    Args:
        profile: (..., W) mass by distance.
        taper: `boxcar` (none; frequencies k / W), or `hann-symmetric`: the profile continued evenly to negative
            distances under a Hann centred on d = 0 (frequencies k / 2W).
        other: A second, independent sample of the same profile: the power is then the real part of both samples'
            cross-power, in which their sampling noise (white, so high-frequency power that is not there) averages to
            nothing. Lines may fall below zero.

    Raises:
        ValueError: Another taper.
    """
    tapered, energy = _tapered(np.asarray(profile, dtype=np.float64), taper)
    length = tapered.shape[-1]
    lines = np.fft.rfft(tapered, axis=-1)
    again = lines if other is None else np.fft.rfft(_tapered(np.asarray(other, dtype=np.float64), taper)[0], axis=-1)
    power = (lines * again.conj()).real
    return Periodogram(_grid(length), line_weights(length) * power / energy)


def low_frequency_ratio(
    profile: ArrayLike, cut: float, taper: Taper = "boxcar", other: ArrayLike | None = None
) -> Floats:
    """(...) share of the power at 0 < nu <= cut, cut in cycles/token (LFER, D7). `other`: see `periodogram`.

    It moves little, and may move either way, when a two-scale head loses its far mass: read octave masses first.
    """
    frequency, share = _power_shares(profile, taper, other)
    low = share[..., frequency <= cut * (1 + 1e-9)].sum(axis=-1)  # a line on the cut is low, rounding or not
    return np.where(np.isnan(share[..., 0]), np.nan, low)


def default_cuts(width: int) -> tuple[float, float]:
    """The two cuts of D7, cycles/token: four cycles in the profile, and one in 64 tokens."""
    return 4 / width, 1 / 64


def spectral_centroid(profile: ArrayLike, taper: Taper = "boxcar", other: ArrayLike | None = None) -> Centroid:
    """Mean frequency of the power above zero frequency, cycles/token (D7)."""
    frequency, share = _power_shares(profile, taper, other)
    return Centroid(np.asarray(share @ frequency), np.exp(share @ np.log(frequency)))


def spectral_entropy(profile: ArrayLike, taper: Taper = "boxcar", other: ArrayLike | None = None) -> Floats:
    """(...) entropy of the power over frequency, nats: 0 for a tone, ln(number of lines) for white (D7)."""
    _, share = _power_shares(profile, taper, other)
    share = normalised(np.maximum(share, 0))  # lines of a cross-power may lie below zero
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return np.asarray(-(share * logs).sum(axis=-1)) + 0.0


def spectral_edge(
    profile: ArrayLike, share: float = 0.95, taper: Taper = "boxcar", other: ArrayLike | None = None
) -> Floats:
    """(...) lowest frequency, cycles/token, below which `share` of the power lies (edge-95 of D7)."""
    frequency, shares = _power_shares(profile, taper, other)
    reached = np.cumsum(shares, axis=-1) >= share * (1 - 1e-12)
    return np.where(np.isnan(shares[..., 0]), np.nan, frequency[np.argmax(reached, axis=-1)])


def half_power_frequency(profile: ArrayLike) -> Floats:
    """(...) first frequency with |H|^2 <= 1/2 (nu_3dB, D4), cycles/token; +inf where |H|^2 stays above.

    Interpolated linearly on a grid four times as fine as the FFT's. It jumps for heads with two scales: print the
    half-mass distance first.
    """
    share = normalised(profile)
    fine = 4 * share.shape[-1]
    frequency = _grid(fine)
    rows = share.reshape(-1, share.shape[-1])  # one profile at a time: the padded spectra of all heads are large
    found = [_first_half(frequency, np.square(np.abs(np.fft.rfft(row, fine)))) for row in rows]
    return np.array(found).reshape(share.shape[:-1])


def taper_leakage(taper: Taper, width: int) -> Leakage:
    """How much of a tone's power a taper leaves in its main lobe: its leakage is not the head's (D7).

    The tone lies near a quarter cycle/token, away from both ends of the spectrum. The main lobe reaches to the first
    zeros: one bin to either side for `boxcar`, two of the finer bins of `hann-symmetric` (1/W both).
    """
    distance = np.arange(width)

    def kept(bins: float) -> float:
        frequency, density = periodogram(1 + np.cos(2 * np.pi * bins / width * distance), taper)
        near = np.abs(frequency - bins / width) < (1 - 1e-6) / width
        return float(density[near].sum() / density[1:].sum())

    return Leakage(on_bin=kept(width // 4), half_bin=kept(width // 4 + 0.5))


def _grid(width: int) -> Floats:
    return np.asarray(np.fft.rfftfreq(width), dtype=np.float64)


def _tapered(mass: Floats, taper: Taper) -> tuple[Floats, float]:
    """The profile less its mean, ready for the FFT, and the taper's energy sum t^2."""
    if taper not in get_args(Taper):
        raise ValueError(f"unknown taper {taper!r}; allowed: {', '.join(get_args(Taper))}")
    width = mass.shape[-1]
    if taper == "boxcar":
        return _varying(mass, mass.mean(axis=-1, keepdims=True)), float(width)
    half = np.square(np.cos(np.pi * np.arange(width) / (2 * width)))  # the Hann's falling half: 1 at d = 0
    both = np.concatenate([half, [0.0], half[:0:-1]])  # d = 0 .. W-1, -W, -(W-1) .. -1
    even = np.concatenate([mass, mass[..., :1], mass[..., :0:-1]], axis=-1)
    # The mean under the taper, else what is left of it would show as the lowest line.
    centre = (even @ both)[..., None] / both.sum()
    return _varying(even, centre) * both, float(np.square(both).sum())


def _varying(mass: Floats, mean: Floats) -> Floats:
    """Mass less its mean; exactly zero where only rounding is left, so that a flat profile has no spectrum."""
    rest = mass - mean
    flat = np.abs(rest).max(axis=-1, keepdims=True) <= _ROUNDING * np.abs(mass).max(axis=-1, keepdims=True)
    return np.where(flat, 0.0, rest)


def _power_shares(profile: ArrayLike, taper: Taper, other: ArrayLike | None) -> tuple[Floats, Floats]:
    """Frequencies above zero (F,) and the share of the power at each (..., F)."""
    frequency, density = periodogram(profile, taper, other)
    power = density[..., 1:]
    if other is not None:
        # Where the samples share next to nothing there is only noise: no shares, instead of wild ones.
        own = (periodogram(profile, taper).density + periodogram(other, taper).density)[..., 1:].sum(axis=-1) / 2
        power = np.where((power.sum(axis=-1) > _SHARED * own)[..., None], power, np.nan)
    return frequency[1:], normalised(power)


def _first_half(frequency: Floats, power: Floats) -> float:
    below = np.flatnonzero(power <= 0.5)
    if np.isnan(power[0]):
        return float("nan")
    if not len(below):
        return float("inf")
    i: Any = below[0]
    part = (power[i - 1] - 0.5) / (power[i - 1] - power[i])
    return float(frequency[i - 1] + part * (frequency[i] - frequency[i - 1]))
