"""Anytime-valid p-values: true however often one looks while a run grows.

Windows: the estimate is a smooth function of the haystacks, asymptotically a mean over them, so the normal-mixture
martingale of Robbins (1970) holds for it in the limit: Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas 2024,
"Time-uniform central limit theory and asymptotic confidence sequences", Theorem 2.2. It is used from 8 haystacks on;
the self-check shows how far the limit has come by then.

Scores: exact at any number of documents, whatever their distribution between 0 and 1: betting (Waudby-Smith & Ramdas
2024, "Estimating means of bounded random variables by betting"), with an even mixture over fixed bets.
"""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp
from scipy.stats import norm

from laid_eval.window.curve import Floats

FEWEST = 8
"""Haystacks before the first verdict on a window."""
_TUNED = 6.3 / 24
# The mixture's variance: the bound is tightest, at alpha 0.05, for 24 haystacks, thrice as many as a window has at
# least (n times this = 2 log(1/a) + log(1 + 2 log(1/a)), a = 2 x 0.05; section 3.5 of the paper).
_BETS = np.geomspace(0.01, 0.95, 24)


def anytime(p: float, clusters: int) -> float:
    """The anytime-valid p-value of an estimate whose p-value, looked at once, would be `p`."""
    z = float(norm.isf(p))
    if z <= 0:
        return 1.0
    if z == float("inf"):
        return 0.0
    n = clusters * _TUNED
    return float(min(1.0, 0.5 * np.sqrt(n + 1) * np.exp(-0.5 * z**2 * n / (n + 1))))


def once(p: float, clusters: int) -> float:
    """The inverse of `anytime`: the p-value looked at once that an anytime-valid `p` asks for."""
    n = clusters * _TUNED
    return float(norm.sf(np.sqrt(2 * (n + 1) / n * np.log(np.sqrt(n + 1) / (2 * p)))))


def betting_p(x: Floats, least: float, most: float, mean: float, above: bool) -> float:
    """Anytime-valid p-value against the mean of `x` being at most (`above`) or at least `mean`: one over the wealth.

    Args:
        x: (n,) independent values between `least` and `most`.
        least: Bound of the values.
        most: Bound of the values.
        mean: Of the null hypothesis.
        above: The test bets on values above it.
    """
    gains = (x - mean if above else mean - x)[:, None]
    room = mean - least if above else most - mean  # the most that one value can lose
    if room <= 0:  # the null leaves one value possible
        return 0.0 if gains.any() else 1.0
    log = np.log1p(_BETS / room * gains).sum(axis=0)
    return float(min(1.0, np.exp(-logsumexp(log) + np.log(len(_BETS)))))
