"""Position-stretched training: a short text at positions with random gaps, so that far positions are met cheaply.

One of two reasons why a window ends is that positions were never seen in training; gaps in the position ids show
them without the tokens in between. (The other, too many competing keys, they do not touch.) Sources: PoSE (Zhu et
al. 2023, arXiv 2309.10400) and CREAM (Wu et al. 2024, arXiv 2406.07138), here with any number of gaps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MOST_GAPS = 8


def stretched(
    positions: NDArray[np.int64], reach: int, rng: np.random.Generator, breaks: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """The same positions with up to 8 random gaps, so that the last is anywhere up to `reach` - 1.

    Args:
        positions: (N,), or (A, N) by axis (M-RoPE): every axis gets the same gaps, so an image keeps its shape.
        reach: Positions that may be used, from 0.
        rng: Draws the last position (evenly), and number, places and sizes of the gaps.
        breaks: (N,) whether a gap may lie before a token; not within an image. All but the first where `None`.

    >>> stretched(np.arange(6), 1000, np.random.default_rng(0)).tolist()
    [0, 427, 515, 553, 777, 851]
    """
    last = int(positions.max())
    allowed = np.ones(positions.shape[-1], dtype=bool) if breaks is None else breaks.copy()
    allowed[0] = False
    places = np.flatnonzero(allowed)
    room = int(rng.integers(last, max(reach, last + 1))) - last
    if not len(places) or room == 0:
        return positions
    chosen = rng.choice(places, size=min(len(places), int(rng.integers(1, MOST_GAPS + 1))), replace=False)
    edges = np.sort(rng.integers(0, room + 1, size=len(chosen) - 1))
    gaps = np.zeros(positions.shape[-1], dtype=np.int64)
    gaps[np.sort(chosen)] = np.diff([0, *edges, room])
    return positions + np.cumsum(gaps)
