"""Windows against a limit, or against the window of a baseline.

Each window comes with a posterior that counts questions on one haystack as one cluster, and whose intervals are
calibrated (`laid-eval window --self-check`). A drop is the difference of two of them. They are not independent: the
same questions are hard for both models. So the two are joined by a normal copula with the correlation that the answers
to shared questions show, taken low where few haystacks tell it. A bootstrap over haystacks would be simpler, but with
the 8 haystacks of a short run its intervals are far too narrow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm

from laid_eval.errors import UserError, nearest
from laid_eval.records import WindowEstimate
from laid_eval.report.gate.evidence import Evidence, Look, Size, further
from laid_eval.report.gate.rules import Rule
from laid_eval.runs import LoadedRun
from laid_eval.window import isotonic
from laid_eval.window.curve import Criterion, Floats, parse_criterion
from laid_eval.window.estimate import Fit, fit_trials, windows_of

_DRAWS = 20_000
_PSEUDO = 3
"""Questions answered differently that are added to what was seen: none in n may still be 3 in n (95%)."""


@dataclass(frozen=True)
class Side:
    """The window of one run."""

    fit: Fit
    trials: pd.DataFrame
    criterion: Criterion
    estimate: WindowEstimate
    seed: int

    @cached_property
    def draws(self) -> Floats:
        """(20,000 or fewer,) sorted draws of the log2 window; infinite where it lies outside the tested lengths."""
        if self.fit.misfit:
            found = isotonic.crossings(self.fit.data, self.criterion, self.seed)[1:]
        elif self.estimate.censored == "below" and self.estimate.high == self.estimate.tested_min:
            found = np.full(2, -np.inf)
        else:
            rng = np.random.default_rng([self.seed, 11])
            found = self.fit.posterior.draw(_DRAWS, rng).crossings(self.criterion)
        x = self.fit.data.x
        found = np.where(found > x[-1] + 1e-6, np.inf, np.where(found < x[0] - 1e-6, -np.inf, found))
        return np.sort(found)

    @property
    def questions(self) -> float:
        """Answered, on a haystack."""
        return self.estimate.trials / self.estimate.haystacks


def side(run: LoadedRun, rule: Rule, look: Look) -> Side:
    """Fit the window that a rule speaks of.

    Raises:
        UserError: The run has no such probe or criterion, or too few answers.
    """
    settings = run.header.settings
    if rule.name not in settings.probes:
        hint, held = nearest(rule.name, settings.probes), ", ".join(settings.probes)
        raise UserError(f"Rule {rule.text!r}: '{run.path}' holds no probe {rule.name!r}{hint}; it holds: {held}.")
    criterion = parse_criterion(rule.criterion or settings.criterion, settings.anchor)
    trials = run.trials[run.trials["probe"] == rule.name]
    valid = trials[trials["score"].notna()]
    fit = fit_trials(trials, settings.seed)
    confidence = 1 - 2 * look.tail(valid["haystack"].nunique())
    (estimate,) = windows_of(
        fit, [criterion], confidence=confidence, seed=settings.seed, probe=rule.name, unit=run.header.unit
    )
    return Side(fit, valid, criterion, estimate, settings.seed)


def at_least(run: Side, limit: float, look: Look) -> Evidence:
    """A window against a length, in the unit of the run.

    A draw beyond the longest tested length says "at least that": it speaks for a limit within the tested lengths, and
    neither for nor against a longer one. Likewise below the shortest.
    """
    window, at = run.estimate, np.log2(limit)
    least, most = _ends(run.draws, run)
    middle = None if window.length is None else float(np.log2(window.length))
    return Evidence(
        run=str(window),
        baseline=None,
        change=window.length,
        low=window.low,
        high=window.high,
        unit=window.unit,
        p_fail=look.p(_p(most >= at), window.haystacks),
        p_pass=look.p(_p(least < at), window.haystacks),
        method=window.method,
        clusters=window.haystacks,
        more=_further([run], _deviation(least, most), middle, at, look),
        note=_beyond(run, limit),
    )


def drop(run: Side, baseline: Side, limit: float, look: Look) -> Evidence:
    """The drop of the window in octaves, log2(baseline / run), against a limit."""
    shared = run.trials.merge(baseline.trials, on="id", suffixes=("", "_baseline"))
    rho = correlation(run, baseline, shared)
    common, own = np.random.default_rng([run.seed, 12]).normal(size=(2, _DRAWS))
    before = _ends(_quantile(baseline.draws, common), baseline)
    after = _ends(_quantile(run.draws, rho * common + np.sqrt(1 - rho**2) * own), run)
    least, most = before[0] - after[1], before[1] - after[0]
    clusters = min(run.estimate.haystacks, baseline.estimate.haystacks)
    tail = look.tail(clusters)
    low, high = np.quantile(least, tail, method="lower"), np.quantile(most, 1 - tail, method="higher")
    middles = np.median(least), np.median(most)
    middle = float(middles[0]) if middles[0] == middles[1] else None
    kinds = dict.fromkeys(one.estimate.method for one in (baseline, run))
    return Evidence(
        run=str(run.estimate),
        baseline=str(baseline.estimate),
        change=middle,
        low=float(low) if np.isfinite(low) else None,
        high=float(high) if np.isfinite(high) else None,
        unit="octaves",
        p_fail=look.p(_p(least <= limit), clusters),
        p_pass=look.p(_p(most > limit), clusters),
        method=f"{', '.join(kinds)}; correlation {rho:.2f} by {len(shared)} shared questions",
        clusters=clusters,
        pairs=len(shared),
        more=_further([run, baseline], _deviation(least, most), middle, limit, look),
        note=_censored(run, baseline),
    )


def correlation(run: Side, baseline: Side, shared: pd.DataFrame) -> float:
    """Correlation of the two window estimates, as far as it is certain.

    An answer moves an estimate by its residual times the slope of the curve there over its variance (the score of the
    location). The correlation of these, once summed by haystack and once question by question, each less one standard
    error (Fisher's z), the lower of both; a haystack or a question of one run alone has no partner and adds nothing.
    """
    if shared.empty:
        return 0.0
    a, b = _influence(run), _influence(baseline)
    both = pd.concat([a.loc[shared["id"]], b.loc[shared["id"]]], axis=1).to_numpy(dtype=np.float64)
    weight = np.abs(both).sum(axis=1)
    # questions in the fall carry the estimate, those far from it hardly
    count = float(weight.sum() ** 2 / np.square(weight).sum()) if weight.any() else 0.0
    whole = float(np.square(a).sum()), float(np.square(b).sum())
    questions = _cautious(float(both[:, 0] @ both[:, 1]), *whole, count)
    texts = pd.concat(
        [v.groupby(s.trials.set_index("id")["haystack"]).sum() for v, s in ((a, run), (b, baseline))], axis=1
    ).fillna(0.0)
    left, right = texts.to_numpy(dtype=np.float64).T
    haystacks = _cautious(float(left @ right), float(left @ left), float(right @ right), shared["haystack"].nunique())
    return max(0.0, min(questions, haystacks)) * count / (count + _PSEUDO)


def _influence(one: Side) -> pd.Series[float]:
    """By question id: how far an answer moves the location of the curve, up to a common factor."""
    trials, curve = one.trials, one.fit.posterior
    x = np.log2(trials["length"].to_numpy(dtype=float))
    lengths, where = np.unique(x, return_inverse=True)
    at, below, above = (curve.weight @ curve.scores(lengths + d) for d in (0.0, -0.05, 0.05))
    p, slope = np.clip(at, 0.01, 0.99), (below - above) / 0.1
    moved = (trials["score"].to_numpy(dtype=float) - p[where]) * (slope / (p * (1 - p)))[where]
    return pd.Series(moved, index=trials["id"])


def _cautious(product: float, square: float, other: float, count: float) -> float:
    """A correlation less one standard error of Fisher's z; 1 stays 1."""
    if square <= 0 or other <= 0:
        return 0.0
    r = float(np.clip(product / np.sqrt(square * other), -1, 1))
    return r if abs(r) > 1 - 1e-12 else float(np.tanh(np.arctanh(r) - 1 / np.sqrt(max(count - 3, 1))))


def _quantile(draws: Floats, z: Floats) -> Floats:
    """Draws of that distribution for standard normal `z`."""
    return np.asarray(draws[np.minimum((norm.cdf(z) * len(draws)).astype(int), len(draws) - 1)])


def _ends(x: Floats, one: Side) -> tuple[Floats, Floats]:
    """What a draw says at least and at most: beyond the longest tested length it is at least that."""
    shortest, longest = one.fit.data.x[[0, -1]]
    return np.where(x == np.inf, longest, x), np.where(x == -np.inf, shortest, x)


def _p(against: NDArray[np.bool_]) -> float:
    """Share of draws against, never 0: so many draws can't show less."""
    return float((against.sum() + 1) / (len(against) + 1))


def _deviation(least: Floats, most: Floats) -> float:
    """Standard deviation by the middle two thirds; infinite where these reach outside the tested lengths."""
    low = np.quantile(least, norm.cdf(-1), method="lower")
    high = np.quantile(most, norm.cdf(1), method="higher")
    return float(high - low) / 2 if np.isfinite(high) and np.isfinite(low) else float("inf")


def _further(sides: list[Side], deviation: float, middle: float | None, limit: float, look: Look) -> Size:
    """Further haystacks and questions on them, of every run concerned."""
    if middle is None:
        return None
    haystacks = min(one.estimate.haystacks for one in sides)
    questions = haystacks * max(one.questions for one in sides)
    return further(haystacks, questions, deviation, middle - limit, look.tail(haystacks))


def _beyond(run: Side, limit: float) -> str:
    window = run.estimate
    if limit > window.tested_max:
        return f"the limit lies beyond the longest tested length ({window.tested_max:,.0f}): measure with --max-length"
    if limit < window.tested_min:
        return f"the limit lies below the shortest tested length ({window.tested_min:,.0f}): measure with --min-length"
    return ""


def _censored(run: Side, baseline: Side) -> str:
    words = {run.estimate.censored, baseline.estimate.censored} - {"no"}
    if not words:
        return ""
    if words == {"above"} and run.estimate.censored == "no":
        return f"the baseline's window lies above its longest length: the drop is at least {_least(run, baseline)}"
    option = "--max-length" if "above" in words else "--min-length"
    return (
        f"a window outside the tested lengths is a bound, and no number of questions makes a drop of it: measure both "
        f"runs with another {option}, or ask for a length (window.{run.estimate.probe} >= ...)"
    )


def _least(run: Side, baseline: Side) -> str:
    return f"{np.log2(baseline.estimate.tested_max / float(run.estimate.length or 1)):.2f} octaves"
