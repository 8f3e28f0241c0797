"""Uncertainty of spectra: intervals over texts, and a permutation test over layers.

Texts are the independent units: queries within a text are not. Heads of one layer read the same stream and are not
independent either, so the test of a difference between two models flips whole layers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from laid_eval.spectrum.fourier import Floats

_EXACT = 12  # layers up to which all 2^n flips are enumerated
_BLOCK = 4096


class Interval(NamedTuple):
    """A mean over texts with its interval, arrays of one shape."""

    mean: Floats
    low: Floats
    """NaN (null in a record) where fewer than two texts have a value: one text has no interval."""
    high: Floats


def mean_there(x: ArrayLike, axis: int) -> Floats:
    """Mean over an axis of what is there (not NaN); NaN where nothing is."""
    values = np.asarray(x, dtype=np.float64)
    count = (~np.isnan(values)).sum(axis=axis)
    return np.asarray(np.nansum(values, axis=axis) / np.where(count > 0, count, np.nan))


def text_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean over texts and its Student-t interval.

    Args:
        values: (texts, ...), one measurement a text. NaN: this text has none (no mean at all: NaN).
        confidence: Coverage of the interval.

    Raises:
        ValueError: No texts, or a confidence outside 0..1.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim == 0 or not len(data) or not 0 < confidence < 1:
        raise ValueError(f"need (texts, ...) values and 0 < confidence < 1, got {data.shape} and {confidence}")
    there = ~np.isnan(data)
    count = there.sum(axis=0)
    mean = np.where(there, data, 0.0).sum(axis=0) / np.where(count > 0, count, np.nan)
    free = np.where(count > 1, count - 1, np.nan)
    variance = np.square(np.where(there, data - mean, 0.0)).sum(axis=0) / free
    half = student.ppf((1 + confidence) / 2, free) * np.sqrt(variance / np.where(count > 0, count, np.nan))
    return Interval(np.asarray(mean), np.asarray(mean - half), np.asarray(mean + half))


def sign_flip_p(differences: ArrayLike, seed: int, rounds: int = 9999) -> float | None:
    """Two-sided permutation p-value of the mean difference, whole layers flipped together.

    Under the null a layer's differences are as likely as their negatives. Up to 12 layers all flips are tried and p is
    exact (at least 2 / 2^layers); beyond, `rounds` random flips with the usual +1, so that p is never 0 and never too
    small (Phipson & Smyth 2010).

    Args:
        differences: (layers, ...), e.g. student minus teacher per head; NaN: no value there.
        seed: Of the random flips.
        rounds: Number of random flips.

    Returns:
        `None` where no layer has a value.

    >>> sign_flip_p([1.0, 1.0, 1.0], seed=0)  # 2 of 8 flips are as extreme
    0.25
    """
    data = np.asarray(differences, dtype=np.float64)
    rows = data.reshape(len(data), -1)
    sums = np.nansum(rows[~np.isnan(rows).all(axis=1)], axis=1)
    if not len(sums):
        return None
    least = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()  # a flip that ties but for rounding is as extreme
    if len(sums) <= _EXACT:
        bits = np.arange(1 << len(sums))[:, None] >> np.arange(len(sums))
        return float(np.mean(np.abs((1 - 2 * (bits & 1)) @ sums) >= least))
    rng = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, rounds, _BLOCK):
        signs = 1 - 2 * rng.integers(2, size=(min(_BLOCK, rounds - start), len(sums)))
        extreme += int(np.count_nonzero(np.abs(signs @ sums) >= least))
    return (1 + extreme) / (1 + rounds)
