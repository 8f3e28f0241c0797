"""Which lengths to read next: first a coarse look over everything, then the bracket where the curve falls.

The cost of a haystack is its longest cut point, whatever is asked on the way, so reading stops where the curve
has come down, and where two successive lengths are at chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binom

from laid_eval.window.posterior import Posterior

PER_OCTAVE = 4
STRATA = 12
"""Most slices of depth asked at each cut point."""
COARSE = 2
"""Haystacks of the first look."""
FEWEST = 8
"""Haystacks before a precise estimate may end the measurement: fewer clusters can't show how they differ."""


def length_grid(shortest: int, longest: int) -> list[int]:
    """Lengths at quarter octaves down from `longest`, ending with `shortest`; tokens or images.

    >>> length_grid(256, 1024)
    [256, 304, 362, 431, 512, 609, 724, 861, 1024]
    >>> length_grid(1, 16)
    [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16]
    """
    steps = int(np.floor(PER_OCTAVE * np.log2(longest / shortest) + 1e-9))
    grid = [round(longest * 2 ** (-k / PER_OCTAVE)) for k in range(steps, -1, -1)]
    if grid[0] > shortest * 2 ** (0.5 / PER_OCTAVE):
        grid.insert(0, shortest)
    grid[0] = shortest
    return sorted(set(grid))  # few pictures have fewer quarter octaves


def coarse_cuts(grid: Sequence[int], haystack: int) -> list[int]:
    """Every octave from the top (second haystack: half an octave below), and the shortest length."""
    top = len(grid) - 1 - haystack * PER_OCTAVE // COARSE
    return sorted({grid[0], *(grid[i] for i in range(top, 0, -PER_OCTAVE))})


def refined_cuts(grid: Sequence[int], fit: Posterior, haystack: int) -> list[int]:
    """The shortest length and up to five in the bracket where the expected score falls.

    Every fourth haystack stays short: it costs next to nothing, and a share of the base score is known no better
    than the base score itself.
    """
    x = np.log2(np.array(grid, dtype=float))
    share = (fit.weight @ fit.scores(x)) - fit.chance
    share = share / max(share[0], 1e-9)
    high = int(np.argmax(share <= 0.55)) if (share <= 0.55).any() else len(grid) - 1
    low = int(np.flatnonzero(share >= 0.95)[-1])
    high = max(high, min(2, len(grid) - 1))
    low = max(0, min(low, high - PER_OCTAVE))
    if haystack % 4 == 3 and low > PER_OCTAVE:
        return [grid[i] for i in range(0, min(low, 2 * PER_OCTAVE + 1), PER_OCTAVE)]
    count = 5 - haystack % 2
    picked = np.unique(np.round(np.linspace(low, high, count)).astype(int))
    return sorted({grid[0], *(grid[int(i)] for i in picked)})


def at_chance(trials: pd.DataFrame) -> bool:
    """Whether the scores can't be told from chance: no evidence above it in at least six answers."""
    scores = trials["score"].dropna()
    if len(scores) < 6:
        return False
    return bool(binom.sf(np.floor(scores.sum()) - 1, len(scores), trials["chance"].mean()) > 0.1)


@dataclass(frozen=True)
class Next:
    """What to do after the haystacks so far: read one with these cuts, or stop for this reason."""

    cuts: tuple[int, ...] = ()
    stop: str | None = None
