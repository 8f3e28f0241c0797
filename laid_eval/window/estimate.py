"""The window estimate: pure, from a table of trials.

Why not "the longest length that passes"? Such a figure jumps by octaves, has no interval, and depends on which
lengths were tried. Here the whole curve of score against length is fitted and the window is where it crosses a
criterion, with a credible interval that counts questions on one haystack as one cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from laid_eval.errors import UserError
from laid_eval.records import Curve, CurvePoint, Unit, WindowEstimate
from laid_eval.window import isotonic
from laid_eval.window.curve import Criterion, Floats, parse_criterion, score_at
from laid_eval.window.posterior import Cells, Posterior, cells, posterior

COLUMNS = ("length", "score", "chance", "haystack")
FEWEST_TRIALS = 8
_MISFIT = 0.005  # posterior-predictive p below which the curve is not believed


def estimate_window(
    trials: pd.DataFrame,
    criterion: str | Criterion = "relative",
    confidence: float = 0.95,
    seed: int = 0,
    *,
    probe: str = "",
    unit: Unit = "tokens",
) -> WindowEstimate:
    """Effective context window with its interval.

    Args:
        trials: One row a question; columns `length` (tokens or images), `score` (0..1, missing where the trial
            failed), `chance` (0..1) and `haystack` (cluster id).
        criterion: `relative` (share 0.85 of the base score, corrected for chance), `half`, `absolute` (raw
            0.856), `chance` (raw 0.5), each also as `name:value`; or a `Criterion`, the only way to `anchored`.
        confidence: Mass of the interval.
        seed: Of the predictive check and of the bootstrap of the fallback.
        probe: Goes into the record.
        unit: Goes into the record.

    Returns:
        The estimate; censored in words where the crossing lies outside the tested lengths.

    Raises:
        UserError: Missing columns, values out of range, fewer than 8 valid trials or 2 lengths.

    >>> rows = [(2**x, float(x < 12), 0.125, h) for h in range(8) for x in range(8, 15) for _ in range(4)]
    >>> table = pd.DataFrame(rows, columns=["length", "score", "chance", "haystack"])
    >>> w = estimate_window(table)
    >>> 2048 < w.low < w.length < w.high < 4096, w.censored
    (True, 'no')
    """
    fit = fit_trials(trials, seed)
    return windows_of(fit, [criterion], confidence=confidence, seed=seed, probe=probe, unit=unit)[0]


@dataclass(frozen=True)
class Fit:
    """The curve fitted to one table of trials: every criterion is read off it."""

    data: Cells
    posterior: Posterior
    misfit: bool
    """The scores are not of the curve's shape; windows come from the isotonic fallback."""
    trials: int
    failed_trials: int


def fit_trials(trials: pd.DataFrame, seed: int = 0) -> Fit:
    """Fit the curve. Arguments and errors as for `estimate_window`."""
    valid = _validated(trials)
    data = cells(valid)
    fit = posterior(data)
    return Fit(data, fit, _misfit(data, fit, seed), len(valid), len(trials) - len(valid))


def windows_of(
    fit: Fit,
    criteria: Sequence[str | Criterion],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    probe: str = "",
    unit: Unit = "tokens",
) -> list[WindowEstimate]:
    """The window under each criterion. Arguments and errors as for `estimate_window`."""
    ends = _interval(confidence)
    data, curve = fit.data, fit.posterior
    base = curve.quantiles(curve.scores(np.array([curve.base]))[:, 0], ends)
    # A base score that may be chance has no window: shares of nothing cross nowhere.
    able = base[0] > data.chance + 0.02 * (1 - data.chance)
    shared: dict[str, Any] = {
        "probe": probe,
        "unit": unit,
        "confidence": confidence,
        "tested_min": float(2 ** data.x[0]),
        "tested_max": float(2 ** data.x[-1]),
        "base_score": float(base[1]),
        "base_low": float(base[0]),
        "base_high": float(base[2]),
        "chance": data.chance,
        "trials": fit.trials,
        "failed_trials": fit.failed_trials,
        "haystacks": len(data.right),
        "design_effect": curve.design_effect,
    }
    out = []
    for given in criteria:
        rule = parse_criterion(given) if isinstance(given, str) else given
        found, method = _quantiles(fit, rule, ends, seed)
        if not able and rule.name in ("relative", "half", "anchored"):
            found = np.full(3, -np.inf)
            method += "; the base score can't be told from chance"
        text: dict[str, Any] = {"criterion": str(rule), "definition": rule.definition, "method": method}
        out.append(WindowEstimate(**text, **_censor(found, data.x), **shared))
    return out


def curve_of(fit: Fit, *, confidence: float = 0.95, seed: int = 0, probe: str = "") -> Curve:
    """The fitted curve with its interval, at 61 lengths over the tested range."""
    x = np.linspace(fit.data.x[0], fit.data.x[-1], 61)
    scores = fit.posterior.draw(2000, np.random.default_rng([seed, 9])).scores(x)
    low, middle, high = np.quantile(scores, _interval(confidence), axis=0)
    points = tuple(
        CurvePoint(length=float(2**a), score=float(b), low=float(c), high=float(d))
        for a, b, c, d in zip(x, middle, low, high, strict=True)
    )
    return Curve(probe=probe, chance=fit.data.chance, points=points)


def _interval(confidence: float) -> tuple[float, float, float]:
    """Levels of the lower end, the median and the upper end."""
    if not 0 < confidence < 1:
        raise UserError(f"confidence must lie between 0 and 1, got {confidence}.")
    return (1 - confidence) / 2, 0.5, (1 + confidence) / 2


def _quantiles(fit: Fit, rule: Criterion, ends: tuple[float, float, float], seed: int) -> tuple[Floats, str]:
    """Log2 of interval and window, and the method they come from."""
    if fit.misfit:
        reason = "the scores do not follow a psychometric curve"
    elif rule.name in ("absolute", "chance") and rule.value <= fit.data.chance:
        reason = "the fitted curve never falls to its own chance level"
    else:
        return fit.posterior.quantiles(fit.posterior.crossings(rule), ends), "posterior"
    found = isotonic.crossings(fit.data, rule, seed)
    low, high = np.quantile(found[1:], (ends[0], ends[2]), method="inverted_cdf")
    return np.array([min(low, found[0]), found[0], max(high, found[0])]), f"isotonic: {reason}"


def _validated(trials: pd.DataFrame) -> pd.DataFrame:
    missing = [c for c in COLUMNS if c not in trials.columns]
    if missing:
        raise UserError(f"The trials lack the column(s) {', '.join(missing)}; needed are {', '.join(COLUMNS)}.")
    valid = trials[trials["score"].notna()]
    for column, low, high in (("score", 0, 1), ("chance", 0, 0.99), ("length", 1, np.inf)):
        numbers = valid[column].to_numpy(dtype=float)
        if len(numbers) and not ((numbers >= low) & (numbers <= high)).all():
            raise UserError(f"Column {column!r} must lie between {low} and {high}.")
    lengths = valid["length"].nunique()
    if len(valid) < FEWEST_TRIALS or lengths < 2:
        raise UserError(
            f"A window needs at least {FEWEST_TRIALS} valid trials at 2 lengths; "
            f"given were {len(valid)} trials at {lengths} length(s)."
        )
    if "probe" in valid.columns and valid["probe"].nunique() > 1:
        names = ", ".join(sorted(valid["probe"].unique()))
        raise UserError(f"The trials are of several probes ({names}); estimate each by itself.")
    if valid["chance"].nunique() > 1:
        raise UserError("The trials mix chance levels; estimate each kind of question by itself.")
    return valid


def _censor(found: Floats, x: Floats) -> dict[str, Any]:
    """Length, ends and censoring from log2 quantiles (low, median, high) and the tested lengths."""
    low, middle, high = (float(v) for v in found)
    # The grid's own resolution: a crossing within it of the longest length is not "beyond".
    bottom, top = float(x[0]) - 1e-6, float(x[-1]) + 1e-6
    censored = "above" if middle > top else "below" if middle < bottom else "no"

    return {
        "length": float(2**middle) if censored == "no" else None,
        "low": float(2 ** min(low, float(x[-1]))) if low >= bottom else None,
        "high": float(2 ** max(high, float(x[0]))) if high <= top else None,
        "censored": censored,
    }


def _misfit(data: Cells, fit: Posterior, seed: int) -> bool:
    """Whether scores by length stray further from the curve than the fitted model itself would produce."""
    rng = np.random.default_rng([seed, 7])
    asked = data.asked.sum(axis=0)
    draws = fit.draw(400, rng)
    own = np.sqrt(np.maximum(draws.w**2 - (0.588 * draws.spread) ** 2, 1e-4))
    mean = draws.scores(data.x)  # (draws, X)
    noise = asked * mean * (1 - mean) + 0.25
    shift = draws.spread[:, None] * rng.normal(size=(len(draws.t), len(data.asked)))
    p = score_at(
        data.x[None, None, :],
        (draws.t[:, None] + shift)[..., None],
        own[:, None, None],
        draws.r[:, None, None],
        data.chance,
    )
    again = rng.binomial(np.round(data.asked).astype(int)[None], np.clip(p, 0, 1)).sum(axis=1)
    seen = ((data.right.sum(axis=0) - asked * mean) ** 2 / noise).sum(axis=1)
    expected = ((again - asked * mean) ** 2 / noise).sum(axis=1)
    return bool((expected >= seen).mean() < _MISFIT)
