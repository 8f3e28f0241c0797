"""What a model's rotary frequencies can tell apart within a context, from the frequencies alone.

A rotary pair turns by `inv_freq` radians per token, once every 2 pi / inv_freq tokens (its wavelength). Within a
context of L tokens it makes inv_freq * L / 2 pi cycles. A pair with less than one was never seen at all of its angles
in training; every pair whose wavelength exceeds the measured length falls in bin 0 of an FFT over distance.
Always take inv_freq from the model (`laid_eval.models.rotary`): for scaled RoPE the base alone does not give it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from laid_eval.spectrum.fourier import Floats

CLASSES = ("full", "partial", "quasi-dc", "none")
_CHUNK = 4096


def cycles(inv_freq: ArrayLike, length: int) -> Floats:
    """(..., F) turns that pairs of inv_freq (rad/token) make in `length` tokens (D14)."""
    return np.asarray(inv_freq, dtype=np.float64) * length / (2 * np.pi)


def coverage_class(inv_freq: ArrayLike, length: int) -> NDArray[np.str_]:
    """(..., F) how much of its circle each pair sees in `length` tokens (D14).

    `full`: one cycle or more; `partial`: a quarter to one; `quasi-dc`: less than a quarter; `none`: does not rotate.

    >>> coverage_class([1.0, 0.001, 0.0001, 0.0], 4096).tolist()
    ['full', 'partial', 'quasi-dc', 'none']
    """
    turns = cycles(inv_freq, length)
    return np.select([turns >= 1, turns >= 0.25, turns > 0], CLASSES[:3], CLASSES[3])


def low_band(inv_freq: ArrayLike, length: int) -> NDArray[np.bool_]:
    """(..., F) the pairs that rotate but make less than one full cycle in `length` tokens: wavelength > length."""
    turns = cycles(inv_freq, length)
    return np.asarray((turns > 0) & (turns < 1))


def critical_pair(base: float, head_dim: int, length: int) -> int:
    """Pairs that make a full cycle in training, from the rotary base of plain RoPE: half of d_extra (D14).

    ceil(head_dim / 2 * log_base(length / 2 pi)), Liu et al. 2023 (arXiv 2310.05209). For scaled RoPE count
    `~low_band(inv_freq, length)` instead.

    >>> critical_pair(1e4, 128, 4096)  # Llama-2-7B
    46
    """
    return math.ceil(head_dim / 2 * math.log(length / (2 * math.pi), base))


def discrimination_horizon(inv_freq: ArrayLike, weights: ArrayLike | None = None, limit: int = 1 << 20) -> int | None:
    """First distance m >= 1, tokens, where sum_f w_f cos(m inv_freq_f) < 0 (D15); `None` if beyond `limit`.

    From there on a key like the query can score lower than a random one (Men et al. 2024, arXiv 2405.14591). It is not
    monotone in the base.

    Args:
        inv_freq: (F,) rad/token.
        weights: (F,) non-negative, e.g. the usage of each pair; `None`: all equal.
        limit: Longest distance that is searched.

    Raises:
        ValueError: Weights of another shape.
    """
    rate = np.asarray(inv_freq, dtype=np.float64)
    weight = np.ones_like(rate) if weights is None else np.asarray(weights, dtype=np.float64)
    if weight.shape != rate.shape or rate.ndim != 1:
        raise ValueError(f"inv_freq and weights must be (F,) both, got {rate.shape} and {weight.shape}")
    for start in range(1, limit + 1, _CHUNK):
        distance = np.arange(start, min(start + _CHUNK, limit + 1))
        below = np.flatnonzero(np.cos(distance[:, None] * rate) @ weight < 0)
        if len(below):
            return int(distance[below[0]])
    return None
