"""The fallback for curves that are not of the psychometric shape: monotone, otherwise free.

Pooled scores by length, made non-increasing (pool adjacent violators), interpolated in log2 length; the interval
is a bootstrap over haystacks. Needs more data than the posterior and knows nothing between tested lengths.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import isotonic_regression

from laid_eval.window.curve import Criterion, Floats
from laid_eval.window.posterior import Cells

RESAMPLES = 999


def fall(right: Floats, asked: Floats) -> Floats:
    """(X,) scores by length, non-increasing; lengths without an answer take their neighbour's."""
    seen = asked > 0
    fitted = isotonic_regression(right[seen] / asked[seen], weights=asked[seen], increasing=False).x
    where = np.flatnonzero(seen)
    return np.asarray(np.interp(np.arange(len(asked)), where, fitted))


def level(criterion: Criterion, base: float, chance: float) -> float:
    """The raw score at which the criterion is crossed."""
    if criterion.name in ("relative", "half"):
        return chance + criterion.value * max(base - chance, 0.0)
    if criterion.name == "anchored":
        return chance + criterion.value * float(criterion.anchor or 0.0) * (1 - chance)
    return criterion.value


def cross(x: Floats, scores: Floats, target: float) -> float:
    """Log2 length where a non-increasing curve comes down to `target`; infinite where it does not."""
    if scores[0] < target:
        return -np.inf
    below = np.flatnonzero(scores < target)
    if not len(below):
        return np.inf
    i = int(below[0])
    drop = scores[i - 1] - scores[i]
    return float(x[i - 1] + (scores[i - 1] - target) / drop * (x[i] - x[i - 1]))


def crossings(data: Cells, criterion: Criterion, seed: int) -> Floats:
    """(1 + RESAMPLES,) crossing of the data, then of bootstrap resamples of its haystacks."""
    rng = np.random.default_rng([seed, 8])
    count = len(data.right)
    out = []
    for k in range(RESAMPLES + 1):
        pick = np.arange(count) if k == 0 else rng.integers(count, size=count)
        right, asked = data.right[pick].sum(axis=0), data.asked[pick].sum(axis=0)
        scores = fall(right, asked)
        out.append(cross(data.x, scores, level(criterion, float(scores[0]), data.chance)))
    return np.array(out)
