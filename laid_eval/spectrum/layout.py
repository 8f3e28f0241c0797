"""Where things are counted: sinks, the stationary range of distances, grids, bands of wavelengths. Needs no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SINKS = 4
"""Tokens at the start of a text that are taken for attention sinks (Xiao et al. 2023, arXiv 2309.17453)."""
BANDS = (0.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, float("inf"))
"""Edges of the bands of rotary pairs, wavelength in tokens."""
DISTANCES = 64
"""Points of the log grid of distances."""


def stationary_width(length: int) -> int:
    """Distances that every query of a text's second half sees, sinks not counted.

    >>> stationary_width(8192)
    4094
    """
    return (length - SINKS) // 2


def log_distances(length: int, count: int = DISTANCES) -> NDArray[np.int64]:
    """(M,) distinct distances from 0 to the stationary width, evenly spaced in the logarithm."""
    top = stationary_width(length) - 1
    return np.unique(np.concatenate([[0], np.geomspace(1, top, count).round()]).astype(np.int64))


def far_distance(length: int, share: int) -> int:
    """The largest power of two within `length / share` tokens, where an octave begins.

    >>> far_distance(8192, 4), far_distance(6000, 4)
    (2048, 1024)
    """
    return 1 << int(np.log2(length // share))


def far_bins(length: int, share: int) -> slice:
    """The octave bins from `far_distance` on."""
    return slice(int(np.log2(length // share)) + 1, None)
