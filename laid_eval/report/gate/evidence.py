"""What a statistic hands to the verdict: a figure with its interval and two p-values, and what is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from scipy.optimize import brentq
from scipy.stats import norm

from laid_eval.report.gate.sequential import FEWEST, anytime, once

Size = tuple[int, int] | None
POWER = 0.8
_FARTHEST = 100  # times as many as there are: beyond that the figure lies on the limit, as far as anyone can tell


@dataclass(frozen=True)
class Look:
    """How the figures are looked at: once, or again and again while the run grows."""

    alpha: float
    sequential: bool = False

    def p(self, p: float, clusters: int) -> float:
        """The p-value of an estimate from so many haystacks; looked at again and again, 1 below 8 haystacks."""
        if not self.sequential:
            return p
        return anytime(p, clusters) if clusters >= FEWEST else 1.0

    def tail(self, clusters: int) -> float:
        """Mass beyond each end of the interval of an estimate from so many haystacks."""
        return once(self.alpha, clusters) if self.sequential else self.alpha


@dataclass(frozen=True)
class Evidence:
    """How one figure lies to its limit."""

    run: str
    baseline: str | None
    change: float | None
    low: float | None
    high: float | None
    unit: str
    p_fail: float
    p_pass: float
    method: str
    clusters: int | None = None
    cluster_name: str = "haystacks"
    pairs: int | None = None
    more: Size = None
    """Further clusters, and the questions on them."""
    note: str = ""
    """Why more of the same would not settle it."""


def further(clusters: int, questions: float, deviation: float, distance: float, alpha: float) -> Size:
    """Further clusters and questions so that a one-sided test at `alpha` decides with probability `POWER`.

    The standard error falls with the root of the number of clusters, so of these are needed, in all,
    clusters * ((z_(1-alpha) + z_power) * deviation / distance)^2.

    Args:
        clusters: There are.
        questions: On them.
        deviation: Standard error of the figure now.
        distance: Of the true figure to the limit, in the same unit.
        alpha: Of the test.

    Returns:
        `None` where it would take more than a hundred times what there is.
    """
    if distance == 0 or not deviation < float("inf"):
        return None
    z = float(norm.isf(alpha) + norm.ppf(POWER))
    needed = clusters * (z * deviation / distance) ** 2
    if needed > _FARTHEST * clusters:
        return None
    more = max(ceil(needed) - clusters, 1)
    return more, ceil(more * questions / clusters)


def inverted(p: Callable[[float], float], alpha: float, middle: float, end: float) -> float | None:
    """Where a p-value, as a function of the limit, falls to `alpha` between `middle` and `end`; `None`: nowhere."""
    if p(end) >= alpha:
        return None
    if p(middle) <= alpha:
        return middle
    return float(brentq(lambda limit: p(limit) - alpha, middle, end, xtol=1e-6))
