"""How far a head looks: statistics of its attention mass over distance, exact and without any taper.

A *profile* (..., W) is the mean attention mass at distance d = query - key position, d = 0 .. W-1 tokens. Mass that
lies at W or beyond but in no sink is the *tail*, one number per profile (...). Sinks are counted apart and belong to
neither: every statistic here is conditional on attention that is not in a sink. Octaves (doublings of distance) are the
natural bins: a head's reach spans orders of magnitude.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from laid_eval.spectrum.fourier import Floats, normalised


class Transport(NamedTuple):
    """How far apart two distributions over octaves lie, each (...)."""

    distance: Floats
    """Wasserstein-1, octaves: mass times the octaves it has to move."""
    shift: Floats
    """Mean position of the first less that of the second, octaves."""


def octave_edges(longest: int) -> NDArray[np.int64]:
    """(B + 1,) edges, tokens, of the bins d = 0, [1, 2), [2, 4), ... up to `longest` (exclusive).

    >>> octave_edges(10).tolist()
    [0, 1, 2, 4, 8, 10]
    """
    powers = 1 << np.arange(max(longest - 1, 0).bit_length(), dtype=np.int64)
    return np.concatenate([[0], powers, [longest]])


def octave_mass(profile: ArrayLike, tail: ArrayLike = 0.0) -> Floats:
    """(..., B + 1) mass of each octave bin, the tail last (D3): they sum to the profile's mass plus the tail."""
    mass = np.asarray(profile, dtype=np.float64)
    bins = np.add.reduceat(mass, octave_edges(mass.shape[-1])[:-1], axis=-1)
    last = np.broadcast_to(np.asarray(tail, dtype=np.float64), bins.shape[:-1])
    return np.concatenate([bins, last[..., None]], axis=-1)


def half_mass_distance(profile: ArrayLike, share: float = 0.5, tail: ArrayLike = 0.0) -> Floats:
    """(...) smallest distance within which `share` of the mass lies, tokens (d50, d90 of D4).

    +inf where it lies in the tail, at W or beyond: censored, not a number for a record; NaN without any mass.
    """
    mass = np.asarray(profile, dtype=np.float64)
    within = np.cumsum(mass, axis=-1)
    total = within[..., -1] + np.asarray(tail, dtype=np.float64)
    # Rounding in the running sum must not push a share of the whole beyond the last distance.
    reached = within >= (share * total * (1 - 1e-12))[..., None]
    distance = np.where(reached.any(axis=-1), np.argmax(reached, axis=-1), np.inf)
    return np.where(total > 0, distance, np.nan)


def mean_log2_distance(profile: ArrayLike) -> Floats:
    """(...) mean of log2(1 + d), octaves (D4): finite at d = 0, log2 d far out; of the mass within [0, W)."""
    share = normalised(profile)
    return np.asarray(share @ np.log2(1 + np.arange(share.shape[-1])))


def js_divergence(p: ArrayLike, q: ArrayLike) -> Floats:
    """(...) Jensen-Shannon divergence over the last axis, nats, 0 .. ln 2; both are scaled to sum to one."""
    first, second = normalised(p), normalised(q)
    middle = (first + second) / 2
    # Clipped: equal arguments must give 0, not a rounding error below it.
    return np.maximum((_kl(first, middle) + _kl(second, middle)) / 2, 0.0)


def wasserstein_octaves(p: ArrayLike, q: ArrayLike, log2_positions: ArrayLike) -> Transport:
    """Distance and shift between two distributions (..., B) over positions (B,) in octaves (D20).

    Args:
        p: Mass per position, e.g. of the student; scaled to sum to one.
        q: Likewise, e.g. of the teacher.
        log2_positions: log2 of a distance or wavelength in tokens, any order.

    Raises:
        ValueError: A position is not finite (a pair that does not rotate has no wavelength: leave it out).
    """
    where = np.asarray(log2_positions, dtype=np.float64)
    if not np.isfinite(where).all():
        raise ValueError(f"positions must be finite octaves, got {where.tolist()}")
    order = np.argsort(where)
    gap = (normalised(p) - normalised(q))[..., order]
    moved = np.abs(np.cumsum(gap, axis=-1)[..., :-1]) @ np.diff(where[order])
    return Transport(np.asarray(moved), np.asarray(gap @ where[order]))


def _kl(p: Floats, q: Floats) -> Floats:
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    return np.asarray((p * np.log(ratio)).sum(axis=-1))
