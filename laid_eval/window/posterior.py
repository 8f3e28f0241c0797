"""Posterior of the psychometric curve on a grid, with haystacks as clusters.

Questions on one haystack share its text, so they are not independent: each haystack h has a location of its
own, t_h = t + b_h with b_h ~ Normal(0, spread). The shift is integrated out exactly on the grid of t, so a
posterior over (t, w, r, spread) costs a few matrix products. The grid is laid twice: coarse over everything,
then fine where the mass is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit

from laid_eval.window.curve import Criterion, Floats, crossing, marginal_width, score_at

# Octaves by which haystacks may differ in their own window. 0 is the case of independent questions: even odds
# for it, else exponential.
SPREADS = np.array([0.0, 0.08, 0.16, 0.3, 0.5])
_DIFFER = np.exp(-SPREADS[1:] / 0.2) * np.gradient(SPREADS)[1:]
SPREAD_PRIOR = np.append(0.5, 0.5 * _DIFFER / _DIFFER.sum())
# Width: 1 octave of scale is a fall over four octaves; 0.02 is a cliff.
WIDTHS = np.geomspace(0.02, 1.4, 15)
CEILINGS = 1 - np.array(
    [0.002, 0.01, 0.02, 0.035, 0.055, 0.08, 0.12, 0.17, 0.24, 0.33, 0.43, 0.54, 0.66, 0.78, 0.88, 0.96]
)


@dataclass(frozen=True)
class Cells:
    """Scores summed per haystack and length. H haystacks, X lengths."""

    x: Floats
    """(X,) log2 of the distinct lengths, ascending."""
    right: Floats
    """(H, X) sum of scores."""
    asked: Floats
    """(H, X) number of questions."""
    chance: float


def cells(trials: pd.DataFrame) -> Cells:
    """Sum valid trials (columns `length`, `score`, `chance`, `haystack`) per haystack and length."""
    lengths = np.unique(trials["length"].to_numpy(dtype=float))
    haystacks, h = np.unique(trials["haystack"].astype(str).to_numpy(), return_inverse=True)
    k = np.searchsorted(lengths, trials["length"].to_numpy(dtype=float))
    right = np.zeros((len(haystacks), len(lengths)))
    asked = np.zeros_like(right)
    np.add.at(right, (h, k), trials["score"].to_numpy(dtype=float))
    np.add.at(asked, (h, k), 1.0)
    return Cells(np.log2(lengths), right, asked, float(trials["chance"].mean()))


@dataclass(frozen=True)
class Posterior:
    """Weighted nodes of the grid; every array has shape (N,)."""

    t: Floats
    w: Floats
    """Width of the curve averaged over haystacks, octaves."""
    r: Floats
    spread: Floats
    weight: Floats
    """Sums to 1."""
    chance: float
    base: float
    """Log2 of the base length."""
    design_effect: float | None = None
    """Variance of t against that of a fit which takes the questions for independent."""

    def crossings(self, criterion: Criterion) -> Floats:
        """(N,) log2 length at which each node crosses the criterion."""
        return crossing(criterion, self.t, self.w, self.r, self.chance, self.base)

    def quantiles(self, values: Floats, levels: tuple[float, ...]) -> Floats:
        """Weighted quantiles of a per-node quantity, interpolated between nodes; infinities allowed."""
        order = np.argsort(values, kind="stable")
        v, cumulated = values[order], np.cumsum(self.weight[order])
        middle = cumulated - self.weight[order] / 2
        out = []
        for level in levels:
            i = int(np.searchsorted(middle, level))
            if i == 0 or i == len(v):
                out.append(v[min(i, len(v) - 1)])
            elif np.isinf(v[i - 1]) or np.isinf(v[i]):
                out.append(v[i - 1] if cumulated[i - 1] >= level else v[i])
            else:
                share = (level - middle[i - 1]) / (middle[i] - middle[i - 1])
                out.append(v[i - 1] + share * (v[i] - v[i - 1]))
        return np.array(out)

    def scores(self, x: Floats) -> Floats:
        """(N, X) expected score of every node at log2 lengths `x` (X,)."""
        return score_at(x[None, :], self.t[:, None], self.w[:, None], self.r[:, None], self.chance)

    def draw(self, size: int, rng: np.random.Generator) -> Posterior:
        """`size` nodes drawn by weight, now of equal weight: for bands and predictive checks."""
        i = rng.choice(len(self.weight), size=size, p=self.weight)
        equal = np.full(size, 1.0 / size)
        return Posterior(self.t[i], self.w[i], self.r[i], self.spread[i], equal, self.chance, self.base)


def _grid(data: Cells, t: Floats, widths: Floats, ceilings: Floats) -> tuple[Floats, Floats]:
    """Log posterior (T, W, R, S), up to a constant, and the marginal widths (W, S). `t` is equally spaced."""
    step = t[1] - t[0]
    reach = int(np.ceil(2.6 * SPREADS[-1] / step))
    wide = np.concatenate([t[0] - step * np.arange(reach, 0, -1), t, t[-1] + step * np.arange(1, reach + 1)])
    s = expit((wide[None, :, None] - data.x[:, None, None]) / widths)  # (X, T', W)
    p = data.chance + ceilings * (1 - data.chance) * s[..., None]  # (X, T', W, R)
    p = np.clip(p, 1e-9, 1 - 1e-9)
    shape = p.shape[1:]
    loglik = data.right @ np.log(p).reshape(len(data.x), -1)
    loglik += (data.asked - data.right) @ np.log1p(-p).reshape(len(data.x), -1)  # (H, T' W R)
    peak = loglik.max(axis=1, keepdims=True)
    likelihood = np.exp(loglik - peak).reshape(-1, shape[0], shape[1] * shape[2])
    out = np.empty((len(t), shape[1], shape[2], len(SPREADS)))
    offset = (wide[None, :] - t[:, None]) / step
    for k, spread in enumerate(SPREADS):
        sigma = spread / step
        kernel = np.exp(-0.5 * (offset / sigma) ** 2) if sigma > 0.3 else (np.abs(offset) < 0.5) * 1.0
        kernel /= kernel.sum(axis=1, keepdims=True)
        marginal = np.matmul(kernel, likelihood)  # (H, T, W R)
        out[..., k] = np.log(marginal + 1e-300).sum(axis=0).reshape(len(t), *shape[1:])
    prior = _width_prior(widths)[:, None, None] * _ceiling_prior(ceilings)[:, None] * SPREAD_PRIOR
    out += np.log(prior)
    return out, marginal_width(widths[:, None], SPREADS[None, :])


def _width_prior(widths: Floats) -> Floats:
    """Log-normal around 0.3 octaves; the nodes are spaced evenly in the logarithm."""
    return np.asarray(np.exp(-0.5 * np.log(widths / 0.3) ** 2))


def _ceiling_prior(ceilings: Floats) -> Floats:
    """Jeffreys' prior of a proportion: flat in its arcsine, hence the spacing of the nodes there."""
    return np.asarray(np.abs(np.gradient(np.arcsin(np.sqrt(ceilings)))))


def posterior(data: Cells) -> Posterior:
    """Fit the curve. Time grows with haystacks x lengths; typically 0.1 s."""
    low, high = data.x[0] - 2.0, data.x[-1] + 2.0
    t = np.arange(low, high, 0.1)
    log, _ = _grid(data, t, WIDTHS, CEILINGS)
    mass = np.exp(log - log.max())
    mass /= mass.sum()

    def support(axes: tuple[int, int, int], tiny: float) -> tuple[int, int]:
        kept = np.flatnonzero(mass.sum(axis=axes) > tiny)
        return max(int(kept[0]) - 1, 0), int(kept[-1]) + 1

    a, b = support((1, 2, 3), 1e-5)
    t = np.linspace(t[a], t[min(b, len(t) - 1)], int(np.clip((b - a) * 5, 21, 81)))
    a, b = support((0, 2, 3), 1e-4)
    fine = np.geomspace(WIDTHS[a], WIDTHS[min(b, len(WIDTHS) - 1)], 11)
    a, b = support((0, 1, 3), 1e-4)
    miss = 1 - CEILINGS
    fine_r = 1 - np.geomspace(miss[a], miss[min(b, len(miss) - 1)], 12)
    log, width = _grid(data, t, fine, fine_r)
    weight = np.exp(log - log.max())
    independent = np.exp(log[..., 0] - log[..., 0].max()).sum(axis=(1, 2))
    clustered = weight.sum(axis=(1, 2, 3))
    weight /= weight.sum()
    keep = weight > 1e-8
    shape = weight.shape
    return Posterior(
        t=np.broadcast_to(t[:, None, None, None], shape)[keep],
        w=np.broadcast_to(width[None, :, None, :], shape)[keep],
        r=np.broadcast_to(fine_r[None, None, :, None], shape)[keep],
        spread=np.broadcast_to(SPREADS, shape)[keep],
        weight=weight[keep] / weight[keep].sum(),
        chance=data.chance,
        base=float(data.x[0]),
        design_effect=_variance(t, clustered) / _variance(t, independent),
    )


def _variance(t: Floats, mass: Floats) -> float:
    share = mass / mass.sum()
    step = t[1] - t[0]  # a grid can't tell a variance below that of its own step
    return float(share @ t**2 - (share @ t) ** 2 + step**2 / 12)
